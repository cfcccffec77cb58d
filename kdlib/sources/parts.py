"""Data parts for sources that hold several: a choice of rows, and items that serve each of the sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kdlib.batch import NamedBatch
from kdlib.interfaces import Batch, DataPart

Item = Mapping[str, Any]
Key = tuple[int, int]


class Rows:
    """Some rows of a data part, as a part with an ``index`` of its own. Views stay those of the whole part.

    Args:
        part: the whole part.
        rows: the indices to keep, in this order.

    Example:
        >>> import torch, kdlib
        >>> part = Rows(kdlib.TensorPart(torch.arange(4.0), [0, 1, 0, 1]), [3, 1])
        >>> part[0, 0]["x"].item(), part[0, 0]["index"], part.labels.tolist()
        (3.0, 0, [1, 1])
    """

    def __init__(self, part: DataPart, rows: Sequence[int] | np.ndarray) -> None:
        self.part = part
        self.rows = np.asarray(rows, dtype=np.int64)
        self.labels: np.ndarray = np.asarray(part.labels)[self.rows]
        self.groups = [part.groups[row] for row in self.rows]
        self.ids = [part.ids[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> Item:
        epoch, index = key
        return {**self.part[epoch, int(self.rows[index])], "index": index}

    @property
    def fingerprint(self) -> Callable[[int], str]:
        """The whole part's, if it has one, by the index here."""
        look: Callable[[int], str] = _of_whole(self, "fingerprint")
        return lambda index: look(int(self.rows[index]))

    def __getattr__(self, name: str) -> Any:
        return _of_whole(self, name)


class Alike:
    """A data part that knows what another knows and makes items of its own. Loader workers get a copy of it."""

    def __init__(self, part: DataPart, items: Callable[[Key], Item]) -> None:
        self.part = part
        self.items = items
        self.labels = part.labels
        self.groups = part.groups
        self.ids = part.ids

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: Key) -> Item:
        return self.items(key)

    def __getattr__(self, name: str) -> Any:
        return _of_whole(self, name)


def _of_whole(part: Any, name: str) -> Any:
    """Return what only the whole part has: classes, a time axis, whether it is augmented."""
    if name == "part" or name.startswith("__"):  # asked while a copy is being made
        raise AttributeError(name)
    return getattr(part.part, name)


def wrapped_for(sources: Mapping[str, Any], part: DataPart) -> DataPart:
    """Return the part with what each source adds to an item.

    What one source adds stands under its own key. Where several add something it stands under ``name.key``, since two
    sources of one kind use the same keys; ``view_of`` undoes it.
    """
    wrapped = {name: source.dataset(part) for name, source in sources.items() if hasattr(source, "dataset")}
    wrapped = {name: own for name, own in wrapped.items() if own is not part}
    if len(wrapped) < 2:
        return next(iter(wrapped.values()), part)
    return Alike(part, partial(_joined, part, wrapped))


def _joined(part: DataPart, wrapped: Mapping[str, DataPart], key: Key) -> Item:
    item = dict(part[key])
    added = {
        f"{name}.{own}": value
        for name, other in wrapped.items()
        for own, value in other[key].items()
        if own not in item
    }
    return {**item, **added}


def view_of(batch: Batch, name: str) -> NamedBatch:
    """Return the batch with what was added for one of the sources under its own keys."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
    return NamedBatch({**batch, **own})
