"""Soft labels computed once and kept: of any source over a data part, or of the teacher of a finished run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from kdlib import ranks
from kdlib.batch import LAYOUTS
from kdlib.building import facts_of, load_weights, make_cache, make_features, make_model, make_source, make_teacher
from kdlib.data import CLEAN, to_device
from kdlib.errors import DataError, KdlibError, TapError, did_you_mean
from kdlib.featured import Featured
from kdlib.files import read_tensors
from kdlib.fingerprints import data_of, settings_of
from kdlib.interfaces import DataPart, DataParts, SoftLabelSource, Taps
from kdlib.keyed import default_generators_keyed
from kdlib.place import device_of, threads_set
from kdlib.points.reduction import one_of
from kdlib.recipe import Recipe, System, read
from kdlib.run import make_data, place_of, read_result
from kdlib.settings import LIVE
from kdlib.sources import SameInput, Stored
from kdlib.sources.stored import ERROR, SOFT_LABELS, views_of
from kdlib.store import MANIFEST, SHARD, Store, make_store, require_same, rounded
from kdlib.taps import Frozen
from kdlib.versions import versions

BLOCKS = 16
"""Teacher batches a shard, at most: what a killed build loses, and what ranks share out."""


def build_store(
    source: SoftLabelSource,
    part: DataPart,
    folder: str | Path,
    *,
    views: int = 1,
    dtype: Literal["float32", "float16"] = "float32",
    batch: int = 32,
    seed: int = 0,
    device: str | torch.device = "auto",
    threads: int | None = None,
    title: str = "soft labels",
) -> Store:
    """Run a source over a data part, without augmentation and in ``views`` epochs, and store every tap that it returns.

    A build that was killed goes on where it was, by shards. Under torchrun (``RANK`` and ``WORLD_SIZE``), or where
    ``torch.distributed`` is initialised, each process writes its share of the shards. In a process group it waits for
    the others; without one it returns when its share is written, and says how many shards are missing then.

    The bytes do not depend on the number of processes: a sample's taps vary in the last bits with the batch that it
    sits in, and here a batch is cut at the same samples by all. They vary with the kind of device, the threads and the
    versions as well; these are in the manifest, and compared as long as a shard is missing or damaged.

    Args:
        source: holds frozen teachers and does not change during training.
        part: the data. It needs ``fingerprint(index)`` and ``made_by`` (see :class:`kdlib.interfaces.DataPart`).
        folder: is made where it is missing.
        views: epochs to draw, from 0. 0 stores the view without augmentation alone, which is what validation wants.
            Where nothing changes from epoch to epoch, that view is stored alone and serves for all.
        dtype: ``float16`` takes half the room: taps are rounded to 11 significant bits (relative error up to 2^-11,
            or absolute up to 2^-25 below 2^-14; from 65520 on, which would round beyond the largest, 65504, values are
            refused). The largest error of each tap is kept, and told.
        batch: samples that the teacher sees at once.
        seed: keys what a source draws from torch's default generators.
        device: where the teacher runs; ``auto`` takes CUDA where there is one.
        threads: torch's threads for the time of the build.
        title: what to call it beside the progress bar.

    Returns:
        The store. Its row ``index * (1 + views) + view`` is a view of a sample; view 0 is without augmentation.

    Raises:
        DataError: what the taps depend on cannot be told; or the folder holds a store of something else, and the text
            says what differs.
        TapError: the source changes during training, or its taps are not one entry a row.
        KdlibError: there is no such ``dtype``; or the store cannot be written.

    Example:
        >>> import tempfile, torch, kdlib
        >>> part = kdlib.TensorPart(torch.eye(3), [0, 1, 2])
        >>> teacher = kdlib.freeze(kdlib.Tapped(torch.nn.Linear(3, 2), logits=""))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     build_store(kdlib.SameInput(teacher), part, folder).manifest.arrays["logits"].shape
        [2]
    """
    if views < 0 or batch < 1:
        raise KdlibError(f"views is at least 0 and batch at least 1, not {views} and {batch}.")
    one_of("dtype", dtype, ("float32", "float16"))
    if not len(part):
        raise DataError(f"{title}: the data part is empty.")
    place, folder = device_of(device), Path(folder)
    with threads_set(threads):
        data, asked = data_of(part, title), source_made_of(source)
        wrapped: DataPart = source.dataset(part) if hasattr(source, "dataset") else part
        of_itself = getattr(source, "augmented", False)
        changes = of_itself or wrapped is not part or data["made_by"]["augmentation"] is not None
        drawn = views if changes else 0
        made_of = {
            "what": SOFT_LABELS,
            "source": asked,
            "data": data,
            "views": drawn,
            "changes": changes,
            "dtype": dtype,
            "block": batch,
            "seed": seed,
        }
        made_with = {
            "device": place.type,
            "threads": torch.get_num_threads(),
            "versions": versions("kdlib-asc", "torch", "numpy"),
        }
        teacher = _Labels(source, wrapped, drawn, dtype, place, seed, title)
        with ranks.together():
            store = _opened(folder, made_of, made_with, teacher, len(part), batch)
        _fill(store, made_with, teacher, batch, title)
    return store


def source_made_of(source: Any) -> dict[str, Any]:
    """Return what a source's taps depend on beside the data: class, settings, teachers, and the sources inside it.

    Raises:
        TapError: it changes during training, or holds a teacher that was not frozen.
        DataError: its settings cannot be told.
    """
    made = settings_of(source)
    kind = type(source)
    live = [name for name in inspect.signature(kind).parameters if name in LIVE]
    if "student" in live or (hasattr(source, "advance") and "sources" not in live):
        raise TapError(f"{kind.__name__} follows the student: its soft labels are made in training, not before.")
    if isinstance(source, Stored):
        raise DataError(f"{source.folder} holds stored soft labels already.")
    if "teacher" in live:
        if not isinstance(source.teacher, Frozen):
            raise TapError(f"The teacher of {kind.__name__} is a {type(source.teacher).__name__}: kdlib.freeze(model).")
        made["teacher"] = source.teacher.made_of()
    if "sources" in live:
        made["sources"] = {name: source_made_of(inner) for name, inner in source.sources.items()}
    return made


def rounding(store: Store) -> dict[str, float]:
    """Return by how much a tap of a float16 store differs at most from what was computed, by name; else nothing."""
    if ERROR not in store.manifest.arrays:
        return {}
    taps = [name for name in store.manifest.arrays if name != ERROR]
    return dict(zip(taps, store.whole(ERROR).max(0).tolist(), strict=True))


class _Labels:
    """A source asked for the taps of samples in all views."""

    def __init__(
        self,
        source: SoftLabelSource,
        part: DataPart,
        views: int,
        dtype: str,
        device: torch.device,
        seed: int,
        title: str,
    ) -> None:
        self.source = source
        self.part = part
        self.epochs = [CLEAN, *range(views)]
        self.dtype = np.dtype(dtype)
        self.device = device
        self.seed = seed
        self.title = title

    def of(self, blocks: list[range]) -> dict[str, np.ndarray]:
        """Return the rows of some blocks of samples: by name (samples x views, ...), the views of a sample together."""
        views = []
        for epoch in self.epochs:  # outermost: what a source draws for an epoch it draws once
            pieces = [self._block(epoch, block) for block in blocks]
            if any(piece.keys() != pieces[0].keys() for piece in pieces):
                raise TapError(f"{self.title}: the source does not return the same taps for every batch.")
            views.append({name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})
        stacked = {name: np.stack([view[name] for view in views], 1) for name in views[0]}
        return {name: array.reshape(-1, *array.shape[2:]) for name, array in stacked.items()}

    @torch.no_grad()
    def _block(self, epoch: int, block: range) -> dict[str, np.ndarray]:
        with default_generators_keyed(self.device, self.seed, "store", epoch, block.start):
            items = default_collate([self.part[epoch, index] for index in block])
            taps: Taps = self.source(to_device(items, self.device, LAYOUTS["contiguous"]))
        exact = {name: _exact(name, tap, len(block), self.title) for name, tap in sorted(taps.items())}
        if self.dtype == np.float32:
            return exact
        kept, errors = {}, []
        for name, array in exact.items():
            kept[name], error = array, np.zeros(len(block), np.float32)
            if array.dtype == np.float32:
                kept[name], error = rounded(array)
            if not np.isfinite(error).all():
                raise DataError(
                    f"{self.title}: '{name}' goes to {np.abs(array).max():g}; float16 ends at 65504. Store float32."
                )
            errors.append(error)
        return {**kept, ERROR: np.stack(errors, 1)}


def _exact(name: str, tap: Tensor, rows: int, title: str) -> np.ndarray:
    if name == ERROR or tap.dim() == 0 or len(tap) != rows:
        raise TapError(f"{title}: the tap '{name}' has shape {tuple(tap.shape)} for {rows} rows; it cannot be stored.")
    array: np.ndarray = (tap.float() if tap.is_floating_point() else tap).cpu().numpy()
    return array


def _opened(
    folder: Path,
    made_of: Mapping[str, Any],
    made_with: Mapping[str, Any],
    teacher: _Labels,
    samples: int,
    batch: int,
) -> Store:
    """Return the store in a folder, which is made where there is none: its shards are of whole batches."""
    views = len(teacher.epochs)
    row: dict[str, np.ndarray] = {}
    shard_rows = None
    if not os.path.exists(folder / MANIFEST):
        row = {name: array[0] for name, array in teacher.of([range(min(batch, samples))]).items()}
        block = batch * views
        size = block * max(1, sum(array.nbytes for array in row.values()))
        shard_rows = block * max(1, min(BLOCKS, SHARD // size))
    return make_store(
        folder, made_of, rows=samples * views, row=lambda: row, shard_rows=shard_rows, made_with=made_with
    )


def _fill(store: Store, made_with: Mapping[str, Any], teacher: _Labels, batch: int, title: str) -> None:
    """Write this process's share of what a store lacks."""
    from rich import get_console
    from rich.progress import Progress

    rank, world = ranks.launched()
    views = views_of(store)
    mine = range(rank, store.shards, world)
    wrote = False
    with (
        ranks.together(),
        Progress(transient=True, disable=rank > 0 or not get_console().is_terminal) as bar,
    ):
        task = bar.add_task(title, total=len(mine))
        for shard in mine:
            if not store.intact(shard):
                require_same(store, made_with=made_with)
                rows = store.span(shard)
                samples = range(rows.start // views, rows.stop // views)
                blocks = [samples[start : start + batch] for start in range(0, len(samples), batch)]
                store.write(shard, teacher.of(blocks))
                wrote = True
            bar.advance(task)
    missing = store.shards - len(store.finished())
    if missing:  # without a process group nobody has waited
        get_console().print(
            f"{title}: rank {rank} of {world} has written its share; {missing} of {store.shards} shards are missing, "
            f"which other ranks write. 'kdlib store info {store.folder}' tells how many there are, and 'kdlib store "
            "verify' whether they are whole.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if any(ranks.gathered([wrote])) and rank == 0 and not missing:
        for name, error in rounding(store).items():
            get_console().print(
                f"{title}: '{name}' kept as float16, at most {error:.2g} from what was computed", markup=False
            )


def store_run(
    run: Path,
    out: Path,
    *,
    system: str | None = None,
    views: int = 1,
    dtype: Literal["float32", "float16"] = "float32",
    batch: int | None = None,
    threads: int | None = None,
    changes: list[str] | None = None,
) -> list[Store]:
    """Store the soft labels of a finished run's teacher, as its source makes them, for every fold.

    Args:
        run: the run's folder.
        out: gets ``training`` and, where the run has a validation part, ``validation``; in ``fold-N`` of several folds.
        system: of which system. Default: the only one.
        views: see :func:`build_store`; the validation part gets the view without augmentation.
        dtype: see :func:`build_store`.
        batch: samples that the teacher sees at once. Default: as in its training.
        threads: torch's threads. Default: as in the teacher's training.
        changes: ``"key=value"`` over the run's recipe, such as another ``data.root`` or source. Without a source the
            teacher sees each sample as it is.

    Raises:
        KdlibError: the folder holds no finished run, or several systems and none was named; or its labels came from
            teachers that it did not keep.
    """
    with ranks.together():  # what all refuse is said once
        result = read_result(run, ("folds", "facts", "classes"))
        recipe = read(run / "recipe.json", changes)
        name = _named(run, recipe, system)
        own = recipe.systems[name]
        if own.cross_fit is not None:
            raise KdlibError(
                f"{run}: its labels came from {own.cross_fit} cross-fitted teachers, which a run does not keep."
            )
        folds = make_data(recipe)
        if list(folds) != result["folds"]:
            raise KdlibError(f"{run}: the run has the folds {result['folds']}, the data {list(folds)}.")
    stores = []
    for fold, parts in folds.items():
        teacher = make_model(own.teacher.model, result["facts"], own.teacher.train.seed)
        load_weights(teacher, place_of(run, fold, name) / "teacher.safetensors", parts.classes)
        training, *validation = _parts(own, recipe, parts, place_of(run, fold, name))
        frozen = make_teacher(teacher, own, parts.classes)
        source = make_source(own, frozen, None, training) or SameInput(frozen)
        for what, part, drawn in (("training", training, views), *(("validation", one, 0) for one in validation)):
            stores.append(
                build_store(
                    source,
                    part,
                    place_of(out, fold, what),
                    views=drawn,
                    dtype=dtype,
                    batch=batch or own.teacher.train.batch,
                    device=own.teacher.train.device,
                    threads=threads or own.teacher.train.threads,
                    title=f"fold {fold} {what}" if fold else what,
                )
            )
    return stores


def _named(run: Path, recipe: Recipe, system: str | None) -> str:
    if system is None and len(recipe.systems) > 1:
        raise KdlibError(f"{run}: name one of its systems with --system: {', '.join(recipe.systems)}.")
    name = next(iter(recipe.systems)) if system is None else system
    if name not in recipe.systems:
        raise KdlibError(f"{run}: the run has no system '{name}'.{did_you_mean(name, recipe.systems)}")
    return name


def _parts(system: System, recipe: Recipe, parts: DataParts, place: Path) -> list[Featured]:
    """Return the training part, and the validation part if there is one, through the features of a run."""
    facts = facts_of(parts)
    features: Any = None
    if system.features is not None:
        features = make_features(system.features, facts)
        features.load_state_dict(read_tensors(place / "features.safetensors")[0])
    cache = make_cache(recipe.cache, system.features, facts)
    found: Mapping[str, DataPart | None] = {"training": parts.train, "validation": parts.valid}
    return [
        Featured(
            part,
            features,
            classes=parts.classes,
            augment=name == "training",
            seed=system.teacher.train.seed,
            title=f"features of {name}",
            cache=cache,
        )
        for name, part in found.items()
        if part is not None
    ]
