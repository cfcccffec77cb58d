"""The teacher's taps, computed once and looked up."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor, nn

from kdlib.batch import NamedBatch, tensors_in
from kdlib.errors import BatchError, DataError, TapError
from kdlib.fingerprints import data_of
from kdlib.interfaces import Batch, DataPart, Taps, Teacher
from kdlib.settings import RecipePath, Strict
from kdlib.sources.parts import Alike, Item, Key
from kdlib.store import MANIFEST, Store, Whole, differences, listed

KEY = "stored"
"""The key that ``dataset`` adds to an item where there are stores of several parts: which it belongs to."""
SOFT_LABELS = "soft labels"
"""What the manifest of a store of soft labels says that it holds."""
ERROR = "float16 error"
"""The array in which a row says by how much each of its taps differs from float32, taps by name."""


class Told(Strict):
    """A part of what a manifest says; it may say more."""

    model_config = ConfigDict(extra="allow")


class TeacherMade(Told):
    """A teacher, as a manifest tells of it."""

    kind: str = Field(alias="class")
    state: str


class SourceMade(Told):
    """A source, with those inside it."""

    kind: str = Field(alias="class")
    settings: dict[str, Any]
    teacher: TeacherMade | None = None
    sources: dict[str, SourceMade] = {}  # noqa: RUF012


class DataMade(Told):
    """A data part."""

    rows: Whole
    items: str
    classes: list[str] | None


class LabelsMade(Told):
    """What a store of soft labels is made of, as far as it is read."""

    views: Whole
    changes: bool
    source: SourceMade
    data: DataMade


class Stored:
    """The taps of a teacher that ran before, looked up by ``index`` and ``epoch``: no teacher is run.

    :func:`kdlib.storing.build_store` or ``kdlib store build`` ran another source over a data part, without augmentation
    and in K epochs. Here epoch e gets view e mod K, so with K at least the epochs of the training the taps are those of
    the other source, up to rounding where they are kept as float16; epoch -1 gets the view without augmentation. Where
    nothing changes from epoch to epoch, one view serves for all.

    ``dataset`` looks for the store of a part by what the part is made of: contents, labels, groups, order of classes,
    features and their augmentation. Where the folder holds stores of several parts, a batch must come from a part that
    passed through it. Where there is one store, a batch from elsewhere is looked up by its numbers alone, and a warning
    says that nothing compared its data. Needs ``index`` and ``epoch`` in the batch. Taps are float32, without gradient,
    on the device of ``x``.

    Args:
        teacher: the teacher whose labels these should be, to compare; not needed, and never run to label.
        folder: holds one store, or stores of several parts (training, validation, folds) in folders below it.

    Raises:
        DataError: there is no store, or it is not finished. From ``dataset``: there is none of this part, and the text
            says what differs from the one that is there.
        TapError: the labels are those of another teacher.
        BatchError: an index or an epoch is missing or not in the store.

    Example:
        >>> import tempfile, torch, kdlib
        >>> from kdlib.sources import Stored
        >>> from kdlib.storing import build_store
        >>> part = kdlib.TensorPart(torch.eye(3), [0, 1, 2])
        >>> teacher = kdlib.freeze(kdlib.Tapped(torch.nn.Linear(3, 3), logits=""))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = build_store(kdlib.SameInput(teacher), part, folder)
        ...     source = Stored(folder=folder)
        ...     batch = next(iter(kdlib.Loader(source.dataset(part), batch=2)))
        ...     bool(torch.allclose(source(batch)["logits"], teacher(batch["x"])["logits"]))
        True
    """

    def __init__(self, teacher: Teacher | None = None, *, folder: RecipePath) -> None:
        if isinstance(teacher, nn.Module):
            raise TapError(f"A source wants a frozen teacher, not {type(teacher).__name__}: kdlib.freeze(model).")
        self.teacher = teacher
        self.folder = Path(folder)
        self.stores = open_stores(self.folder)
        for store in self.stores:
            missing = store.shards - len(store.finished())
            if missing:
                raise DataError(
                    f"{store.folder}: not finished: {missing} of {store.shards} shards are missing. Build it "
                    "again, in the same way; it goes on where it was."
                )
            if teacher is not None:
                _compare(store, teacher)

    def __call__(self, batch: Batch) -> Taps:
        """Return the stored taps for the batch."""
        batch = NamedBatch(batch)
        store = self._store_of(batch)
        example = next(tensors_in(batch.get("x")), None)
        rows = _rows(store, torch.as_tensor(batch["index"]).cpu(), torch.as_tensor(batch["epoch"]).cpu())
        taps = {name: torch.from_numpy(array) for name, array in store.take(rows).items() if name != ERROR}
        device = None if example is None else example.device
        return {
            name: tap.to(device, torch.float32 if tap.dtype == torch.float16 else None) for name, tap in taps.items()
        }

    def dataset(self, part: DataPart) -> DataPart:
        """Return the part, its items marked with their store; refuse it where there is none of it."""
        made_of = data_of(part, "stored soft labels")
        found = [differences(store.manifest.made_of["data"], made_of) for store in self.stores]
        fitting = [number for number, lines in enumerate(found) if not lines]
        if len(fitting) == 1:
            return Alike(part, partial(_marked, part, fitting[0]))
        if fitting:
            both = " and ".join(str(self.stores[number].folder) for number in fitting)
            raise DataError(f"{both} both hold soft labels of this part. Name the folder of one of them.")
        nearest = min(range(len(found)), key=lambda number: len(found[number]))
        others = ", and no other store there fits better" if len(found) > 1 else ""
        raise DataError(
            f"{self.stores[nearest].folder}: holds soft labels of other data than this part of {len(part)} rows"
            f"{others}. Build a store of this part, or use the data that it was built on.\n{listed(found[nearest])}"
        )

    def _store_of(self, batch: Batch) -> Store:
        if KEY not in batch:
            if len(self.stores) > 1:
                raise BatchError(
                    f"{self.folder} holds stores of {len(self.stores)} parts, and the batch does not say of which it "
                    "is. Load it from source.dataset(part)."
                )
            warnings.warn(
                f"{self.folder}: a batch is looked up by its numbers alone, and nothing has compared its data with the "
                "store's. Load batches from source.dataset(part).",
                stacklevel=2,
            )
            return self.stores[0]
        numbers = set(batch[KEY].tolist())
        if len(numbers) > 1:
            raise BatchError("the batch has rows of several parts, and soft labels are looked up in one store.")
        number: int = numbers.pop()
        return self.stores[number]


def open_stores(folder: Path) -> list[Store]:
    """Return the stores of soft labels in a folder and below it, in the order of their names.

    Raises:
        DataError: there is none, or one of something else, or a manifest is damaged.
    """
    stores = [Store(path.parent) for path in sorted(folder.rglob(MANIFEST))] if os.path.isdir(folder) else []
    if not stores:
        raise DataError(f"{folder}: there are no stored soft labels. Build them: kdlib store build RUN {folder}")
    for store in stores:
        if store.manifest.made_of.get("what") != SOFT_LABELS:
            raise DataError(f"{store.folder}: a store of {store.manifest.made_of.get('what')}, not of {SOFT_LABELS}.")
        try:
            made = LabelsMade.model_validate(store.manifest.made_of)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise DataError(f"{store.folder}: its manifest is not that of a store: {place}: {problem['msg']}") from None
        if len(store) != made.data.rows * (1 + made.views):
            raise DataError(
                f"{store.folder}: its manifest is not that of a store: {len(store)} rows for {made.data.rows} samples "
                f"in {1 + made.views} views"
            )
    return stores


def views_of(store: Store) -> int:
    """Return how many rows a sample has: one without augmentation, and one for each epoch that was drawn."""
    views: int = store.manifest.made_of["views"]
    return 1 + views


def _rows(store: Store, index: Tensor, epoch: Tensor) -> Tensor:
    drawn = views_of(store) - 1
    samples = len(store) // (1 + drawn)
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < samples:
        raise BatchError(
            f"index goes from {int(index.min())} to {int(index.max())}; {store.folder} has {samples} rows."
        )
    if drawn:
        if len(epoch) and int(epoch.max()) >= drawn and store.manifest.made_of["data"]["made_by"]["augmentation"]:
            warnings.warn(
                f"{store.folder}: soft labels of {drawn} epochs serve for all: from epoch {drawn} on they are those of "
                "epochs before, while the student's input changes. Build it with more views.",
                stacklevel=2,
            )
        view = torch.where(epoch < 0, 0, 1 + epoch % drawn)
    elif store.manifest.made_of["changes"] and len(epoch) and int(epoch.max()) >= 0:
        raise BatchError(
            f"epoch {int(epoch.max())} is asked, and {store.folder} holds only the view without augmentation of what "
            "changes from epoch to epoch, as validation wants it. Build it with views."
        )
    else:
        view = torch.zeros_like(epoch)
    return index * (1 + drawn) + view


def _marked(part: DataPart, number: int, key: Key) -> Item:
    return {**part[key], KEY: number}


def _compare(store: Store, teacher: Any) -> None:
    """Refuse labels that came from another teacher."""
    made_of = teacher.made_of()
    here = made_of["state"]
    there = [one["state"] for one in teachers_of(store.manifest.made_of["source"])]
    if here not in there:
        types = [str(one.get("dtype") or "as it was") for one in teachers_of(store.manifest.made_of["source"])]
        raise TapError(
            f"{store.folder}: the soft labels are of another teacher. There {' and '.join(there) or 'none'}, here "
            f"{here} (sha256 of its weights; type there {' and '.join(types) or 'none'}, here "
            f"{made_of['dtype'] or 'as it was'}). Load the teacher of the run that they were built from."
        )


def teachers_of(source: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what a manifest tells of each teacher of a source, and of those of the sources inside it."""
    if "teacher" in source:
        yield source["teacher"]
    for inner in source.get("sources", {}).values():
        yield from teachers_of(inner)
