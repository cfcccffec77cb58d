"""Features and their statistics kept on disk, under a name made of everything that they depend on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdlib import ranks
from kdlib.data import CLEAN
from kdlib.errors import DataError
from kdlib.fingerprints import items_of, name_of, source_of, state_of
from kdlib.interfaces import DataPart
from kdlib.points.reduction import one_of
from kdlib.progress import track
from kdlib.store import Store, make_store, rounded
from kdlib.versions import versions

OWN = ("y", "index", "epoch")
"""Of an item, what is known without reading it."""
ERROR = "x_error"
"""The array in which a row says by how much its float16 features differ from float32."""


@dataclass(frozen=True)
class Cache:
    """Where features are kept, and as what.

    Each part of each set of features is a :class:`kdlib.store.Store` of its own in the folder, named by a hash of the
    features (``made_by``, their module's source, their state with its statistics), the data (ids, and the fingerprint
    of each item), ``dtype`` and the versions of kdlib, torch, numpy, scipy and soundfile. What no longer fits is not
    found, and never used; any of the stores may be deleted.

    Args:
        folder: is made where it is missing. Processes and runs may share it.
        dtype: ``float32`` keeps features as they are computed, bit for bit. ``float16`` takes half the room: float32
            features are rounded to 11 significant bits (relative error up to 2^-11, 0.05 %, or absolute up to 2^-25
            below 2^-14; from 65520 on, which would round beyond the largest, 65504, values are refused), and read back
            as float32.
        made_by: the kind and the settings of the features, and what else they depend on, as JSON has it.

    Raises:
        KdlibError: there is no such ``dtype``.
    """

    folder: Path
    dtype: Literal["float32", "float16"] = "float32"
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, ("float32", "float16"))

    def place(self, made_of: Mapping[str, Any]) -> Path:
        """Return the folder of the store that is made of this."""
        return self.folder / hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def fit_features(features: Any, part: DataPart, cache: Cache | None, title: str = "features") -> None:
    """Take the statistics of features over a part, or those of the same features over the same data from the cache.

    Args:
        features: to fit, in place. With a cache their ``state_dict()`` holds what ``fit`` sets.
        part: the training part.
        cache: where to look, and to keep them. None reads every item.
        title: what to call it beside the progress bar.

    Raises:
        DataError: the part cannot be cached (see :func:`filled`).
    """
    ranks.once(_fit, features, part, cache, title)
    if ranks.world() > 1:
        features.load_state_dict(ranks.once(features.state_dict))


def _fit(features: Any, part: DataPart, cache: Cache | None, title: str) -> None:
    indices = track(range(len(part)), f"{title}: statistics")
    clips = (part[CLEAN, index]["x"] for index in indices)
    if cache is None:
        features.fit(clips)
        return
    made_of = _made_of("statistics", features, part, cache, title)

    @functools.cache
    def fitted() -> dict[str, np.ndarray]:
        features.fit(clips)
        return {name: tensor.numpy() for name, tensor in features.state_dict().items()}

    store = make_store(cache.place(made_of), made_of, rows=1, row=fitted)
    if not store.intact(0):
        store.write(0, {name: array[None] for name, array in fitted().items()})
    features.load_state_dict({name: torch.from_numpy(array) for name, array in store[0].items()})


def filled(
    features: Any, part: DataPart, cache: Cache, compute: Callable[[int], Mapping[str, Any]], title: str = "features"
) -> Store:
    """Return the store of a part's features, having computed what it lacked: nothing, or the rest, or all of it.

    Of several ranks each computes its share of the shards; the bytes are the same for any number of them.

    Args:
        features: fitted.
        part: the data. It needs the method ``fingerprint(index) -> str`` (see :class:`kdlib.DataPart`).
        cache: where to keep them.
        compute: returns the item of an index with its features.
        title: what to call it beside the progress bar.

    Raises:
        DataError: the part has no fingerprints, items differ in shape, or hold something else than tensors; the
            text names the item.
        KdlibError: it cannot be written.
    """
    from rich import get_console
    from rich.progress import Progress

    made_of = {**_made_of("features", features, part, cache, title), "dtype": cache.dtype}

    def row(index: int) -> dict[str, np.ndarray]:
        return _row(compute(index), cache.dtype, f"{title}: {part.ids[index]}")

    with ranks.together():
        store = make_store(cache.place(made_of), made_of, rows=len(part), row=lambda: row(0))
        forms = {name: tuple(form.shape) for name, form in store.manifest.arrays.items()}
        wrote = False
        mine = ranks.dealt(range(store.shards))
        with Progress(transient=True, disable=not get_console().is_terminal) as bar:
            task = bar.add_task(title, total=sum(len(store.span(shard)) for shard in mine))
            for shard in mine:
                rows: list[dict[str, np.ndarray]] = []
                whole = store.intact(shard)
                for index in () if whole else store.span(shard):
                    rows.append(row(index))
                    found = {name: array.shape for name, array in rows[-1].items()}
                    if found != forms:
                        raise DataError(
                            f"{title}: {part.ids[index]}: {found}, and the first item {forms}; a cache keeps one shape."
                        )
                    bar.advance(task)
                if whole:
                    bar.advance(task, len(store.span(shard)))
                else:
                    store.write(shard, {name: np.stack([one[name] for one in rows]) for name in forms})
                    wrote = True
    if any(ranks.gathered([wrote])) and ranks.rank() == 0 and ERROR in forms:
        worst = store.whole(ERROR).max()
        get_console().print(f"{title}: kept as float16, at most {worst:.2g} from what was computed", markup=False)
    return store


def read_item(store: Store, part: DataPart, index: int) -> dict[str, Any]:
    """Return an item from the store of its part."""
    item: dict[str, Any] = {name: torch.from_numpy(array) for name, array in store[index].items()}
    if ERROR in item:
        del item[ERROR]
        item["x"] = item["x"].float()
    return {**item, "y": int(part.labels[index]), "index": index, "epoch": CLEAN}


def _row(item: Mapping[str, Any], dtype: str, at: str) -> dict[str, np.ndarray]:
    """Return what is kept of an item."""
    arrays = {}
    for name, value in item.items():
        if name in OWN:
            continue
        if not isinstance(value, Tensor) or value.dtype == torch.bfloat16:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise DataError(f"{at}: '{name}' is of {kind}; a cache keeps tensors of types that numpy knows.")
        arrays[name] = value.numpy()
    if dtype == "float16":
        x = arrays["x"]
        if x.dtype != np.float32:
            raise DataError(f"{at}: the features are {x.dtype}; a float16 cache is of float32 features.")
        kept, error = rounded(x[None])
        if not np.isfinite(error).all():
            raise DataError(f"{at}: the features go to {np.abs(x).max():g}; float16 ends at 65504. Cache float32.")
        arrays["x"], arrays[ERROR] = kept[0], error.reshape(())
    return arrays


def _made_of(what: str, features: Any, part: DataPart, cache: Cache, title: str) -> dict[str, Any]:
    if not hasattr(part, "fingerprint"):
        raise DataError(
            f"{title}: the data set's {type(part).__name__} has no method fingerprint(index), by which its items would "
            "be known again. Take [cache] out of the recipe, or give it the method (see kdlib.DataPart)."
        )
    state = features.state_dict() if hasattr(features, "state_dict") else {}
    return {
        "what": what,
        "features": {"class": name_of(features), **cache.made_by},
        "source": source_of(type(features)),
        "state": state_of(state),
        "data": items_of(part, title),
        "versions": versions("kdlib-asc", "torch", "numpy", "scipy", "soundfile"),
    }
