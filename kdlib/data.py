"""Data parts, the sampler and the loader: items are asked for by (epoch, index), in an order keyed by the seed."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from kdlib import ranks
from kdlib.batch import SHARE, as_batch, layout_of, map_tensors
from kdlib.errors import DataError, KdlibError
from kdlib.interfaces import Batch, DataPart
from kdlib.keyed import keyed as _keyed
from kdlib.signals import left_to_parent

CLEAN = -1
"""The epoch that asks for items without augmentation."""
Shards = Literal["rows", "batches"]


@dataclass(frozen=True)
class Parts:
    """A data set split for one training, satisfying :class:`kdlib.interfaces.DataParts`."""

    train: DataPart
    valid: DataPart | None
    test: DataPart
    classes: tuple[str, ...]


def changes(part: Any) -> bool:
    """Return whether items of a part may change from epoch to epoch: of one that does not tell, they may."""
    if hasattr(part, "augmented"):
        return bool(part.augmented)
    made_by = getattr(part, "made_by", None)
    return not (isinstance(made_by, Mapping) and made_by.get("augmentation", "not told") is None)


def asked(key: tuple[int, int]) -> tuple[int, int]:
    """Return the epoch and the index that a part is asked for, where it is asked as a part is.

    Raises:
        DataError: it is asked by a number alone, as torch's DataLoader asks.
    """
    try:
        epoch, index = key
    except TypeError:
        raise DataError(
            "A data part gives its items by (epoch, index), and was asked by a number alone: load it with "
            "kdlib.Loader(part)."
        ) from None
    return epoch, index


class TensorPart:
    """A data part of tensors in memory.

    Args:
        x: inputs, first axis N.
        labels: class numbers, (N,).
        ids: a name for each item. Default: its number.
        classes: the class names. Default: not known.
        groups: what must not be split between parts. Default: each item its own.

    Items are the same in every epoch. A subclass with a ``__getitem__`` of its own says whether its are: it is taken to
    change them (``augmented``) unless it sets ``augmented = False``.
    """

    augmented = False

    def __init_subclass__(cls) -> None:
        if "__getitem__" in vars(cls):
            cls.augmented = vars(cls).get("augmented", True)

    def __init__(
        self,
        x: Tensor,
        labels: Any,
        *,
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.x = x
        self.labels = np.asarray(labels, dtype=np.int64)
        self.ids = list(ids) if ids is not None else [str(index) for index in range(len(x))]
        self.groups = list(groups) if groups is not None else self.ids
        self.classes = classes
        if not len(self.x) == len(self.labels) == len(self.ids) == len(self.groups):
            raise DataError("x, labels, ids and groups must have the same length.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = asked(key)
        return {"x": self.x[index], "y": int(self.labels[index]), "index": index, "epoch": epoch}

    @property
    def made_by(self) -> Mapping[str, Any]:
        """Items are the same in every epoch."""
        if self.augmented:
            raise AttributeError(f"{type(self).__name__} makes items of its own")
        return {"augmentation": None}

    def fingerprint(self, index: int) -> str:
        """Return a hash of the values of an item."""
        x = self.x[index].detach().cpu().contiguous()
        digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def as_part(dataset: Any) -> Any:
    """Return a data part as it is, and any other map-style data set as one that is asked for by (epoch, index)."""
    if isinstance(dataset, DataLoader):
        raise DataError("A data set is wanted here, not a DataLoader: pass loader.dataset, and batch=... beside it.")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"A data set is asked for its items by number; {type(dataset).__name__} has no length or no items by "
            "number. Use it in a loop of your own."
        )
    return dataset if isinstance(dataset, DataPart | _Plain) else _Plain(dataset)


class _Plain:
    """Any map-style data set of ``(x, y)`` pairs or mappings, asked for by (epoch, index)."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = asked(key)
        return {**as_batch(self.dataset[index]), "index": index, "epoch": epoch}


class _EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): the order is a function of (seed, epoch), so workers and a resumed run agree."""

    def __init__(self, length: int, batch: int, seed: int, shuffle: bool, shards: Shards | None) -> None:
        self.length = length
        self.batch = batch
        self.seed = seed
        self.shuffle = shuffle
        self.shards = shards
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Not a generator: epoch and start are read now, not when the first batch is asked for.
        if self.shuffle:
            order = torch.randperm(self.length, generator=_keyed(self.seed, self.epoch, "order")).tolist()
        else:
            order = list(range(self.length))
        pairs = [(self.epoch, index) for index in order]
        first = self.start * self.batch
        batches = [pairs[row : row + self.batch] for row in range(first, self.length, self.batch)]
        if self.shards == "batches":
            return iter(ranks.dealt(batches))
        if self.shards == "rows":
            return iter([list(ranks.split(rows)) or rows for rows in batches])
        return iter(batches)

    def __len__(self) -> int:
        whole = range(-(-self.length // self.batch))
        return len(ranks.dealt(whole) if self.shards == "batches" else whole)

    def rows(self, number: int) -> int:
        """Return how many rows a batch of the epoch has, on all ranks together."""
        return min(self.batch, self.length - number * self.batch)

    def share(self, number: int) -> float:
        """Return this rank's rows of a batch in units of all ranks' mean."""
        rows = self.rows(number)
        return ranks.world() * len(ranks.split(range(rows))) / rows


class Loader:
    """Batches of a data part, epoch by epoch, in the order that :func:`kdlib.fit` uses.

    Every ``for`` over it is the next epoch, from 0; :meth:`epoch` asks for a certain one. An iterator that was not
    drawn from counts as none: trainers make one to see whether they can. Random state outside is neither used nor
    changed.

    Args:
        dataset: a data part, or any map-style data set of ``(x, y)`` pairs or mappings.
        batch: rows a batch, at least 1. The last batch of an epoch may be smaller.
        seed: keys the order.
        shuffle: False keeps the order of the data set.
        workers: loader processes; 0 loads in this one. The batches are the same.
        keyed: whether ``dataset[epoch, index]`` is how it is asked. Default: if it is a data part.
        shards: what each process of a process group gets. ``rows``: its run of the rows of every batch, and in the
            batch a number ``share``, by which to multiply its loss: world · its rows / all rows. Where a last batch
            has fewer rows than there are processes, some get it whole with the share 0: they have to take part, and
            nothing is counted twice. ``batches``: whole batches, dealt out like cards. Default: all of it.

    Example:
        >>> import torch, kdlib
        >>> data = torch.utils.data.TensorDataset(torch.zeros(10, 4), torch.arange(10))
        >>> loader = kdlib.Loader(data, batch=4)
        >>> [len(batch["y"]) for batch in loader]
        [4, 4, 2]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch: int,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
        keyed: bool | None = None,
        shards: Shards | None = None,
    ) -> None:
        if batch < 1:
            raise DataError(f"A batch has at least 1 row, not {batch}.")
        self.dataset = dataset if keyed else as_part(dataset)
        if not len(self.dataset):
            raise DataError("The data set is empty.")
        self._batches = _EpochBatches(len(self.dataset), batch, seed, shuffle, shards)
        self._next = 0
        self._loader: DataLoader[Any] = DataLoader(
            _Telling(self.dataset),
            collate_fn=_collate,
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=left_to_parent,
            generator=_keyed(seed, "loader"),
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(self._next)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Return the batches of one epoch; the next ``for`` over the loader goes on from there.

        Args:
            epoch: which.
            start: the batch to begin with; those before it are not loaded.
        """
        self._next = self._batches.epoch = epoch
        self._batches.start = start
        return self._counted(epoch, start, _raising(iter(self._loader)))

    def close(self) -> None:
        """End the loader's processes. Left to the garbage collector, torch waits 5 seconds for each."""
        iterator: Any = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def rows(self, number: int) -> int:
        """Return how many rows a batch of an epoch has, on all ranks together."""
        return self._batches.rows(number)

    def _counted(self, epoch: int, start: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        self._next = epoch + 1
        if self._batches.shards != "rows":
            yield from batches
            return
        for number, batch in enumerate(batches, start):
            yield {**batch, SHARE: self._batches.share(number)}


class _Telling(Dataset[Any]):
    """Returns a user's error instead of raising it, so that it comes out of a loader's process as it was.

    A raised one comes with the traceback of that process as its text, and its own traceback keeps torch's workers
    until they are collected as garbage, which takes 5 seconds for each.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        try:
            return self.dataset[key]
        except KdlibError as error:
            return error.with_traceback(None) if _travels(error) else KdlibError(str(error))


def _travels(error: Exception) -> bool:
    """Tell whether an error can go to another process: torch waits for ever for what cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _collate(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, KdlibError)), None) or default_collate(items)


def _raising(batches: Iterator[Any]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, KdlibError):
            try:
                raise batch
            finally:
                del batch  # it holds this frame, which holds the workers
        yield batch


def to_device(batch: Batch, device: torch.device, layout: torch.memory_format) -> dict[str, Any]:
    """Return the batch on a device. ``index`` and ``epoch`` stay behind: they look things up on the host."""

    def moved(value: Tensor) -> Tensor:
        return value.to(device, non_blocking=True, memory_format=layout_of(value, layout))

    kept = ("index", "epoch")
    return {name: value if name in kept else map_tensors(moved, value) for name, value in batch.items()}
