"""Cross-fitting: a clip's soft label comes from the teacher that has not heard its recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kdlib.batch import NamedBatch, map_tensors
from kdlib.errors import BatchError, DataError, KdlibError, TapError
from kdlib.interfaces import Batch, DataPart, SoftLabelSource, Taps
from kdlib.keyed import keyed
from kdlib.sources.parts import Alike, Item, Key, Rows, view_of, wrapped_for
from kdlib.sources.several import advance_all, states_of

KEY = "cross_fit"
"""The key that ``dataset`` adds to an item: the number of its teacher, or -1 where none was trained on its part."""


def fold_of_groups(labels: np.ndarray, groups: Sequence[str], parts: int, seed: int = 0) -> np.ndarray:
    """Return the part of each row, (N,) from 0 to ``parts`` - 1: whole groups, each class spread evenly.

    The groups are shuffled by the seed and dealt out largest first, each to the part where its classes are rarest, and
    of those to the smallest. The answer does not depend on the order of the rows.

    Args:
        labels: class numbers, (N,).
        groups: the recording of each row: what stays in one part.
        parts: how many, at least 2.
        seed: keys the split.

    Raises:
        DataError: there are fewer groups than parts, or a class lies in one part only, so that the teacher trained
            without that part would not know it.

    Example:
        >>> fold_of_groups(np.array([0, 0, 0, 1, 1, 1]), ["a", "a", "b", "c", "d", "d"], 2).tolist()
        [1, 1, 0, 1, 0, 0]
    """
    labels = np.asarray(labels)
    names, group_of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    classes, class_of = np.unique(labels, return_inverse=True)
    if not 2 <= parts <= len(names):
        raise DataError(f"{len(names)} groups cannot be split into {parts} parts; it takes 2 parts or more.")
    counts = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(counts, (group_of, class_of), 1)
    shuffled = torch.randperm(len(names), generator=keyed(seed, "cross_fit", parts)).numpy()
    held = np.zeros((parts, len(classes)), dtype=np.int64)
    part_of = np.zeros(len(names), dtype=np.int64)
    for group in shuffled[np.argsort(-counts[shuffled].sum(1), kind="stable")]:
        overlap, size = held @ counts[group], held.sum(1)
        part_of[group] = np.lexsort((size, overlap))[0]
        held[part_of[group]] += counts[group]
    narrow = classes[(held > 0).sum(0) < 2]
    if len(narrow):
        raise DataError(
            f"Class {narrow[0]} lies in one of the {parts} parts only: the teacher trained without that part would not "
            "know it. It needs groups (recordings) of its own in two parts."
        )
    return part_of[group_of]


class CrossFit(nn.Module):
    """Soft labels from K teachers, each trained without one part of the recordings (Dao et al. 2021, cross-fitting).

    A teacher is nearly always right on clips that it was trained on, so its labels there are nearly one-hot and say
    little. Here the training part is split by ``fold_of_groups`` into K parts of whole recordings; teacher k was
    trained on all parts but k, and labels the clips of part k. Each row goes to its teacher's source, and the taps are
    put together row by row.

    A source that adds to the items (``dataset``), such as one that joins segments, is given part k alone, so that the
    partners of a clip are clips that its teacher has not heard either; a class then needs as many clips in each part
    as it joins. For any other part of the data (validation) no recording was trained on: every teacher labels every
    row, and the taps are averaged over the teachers, logits as logits. That costs K forwards, and what the sources add
    is loaded K times. ``dataset`` marks the rows; rows of a part that did not pass through it are looked up by
    ``index`` as rows of the training part.

    Taps carry no gradient. The teachers must give the same taps in the same shapes.

    Dao et al. 2021: Knowledge distillation as semiparametric inference, ICLR. Their correction of the loss is not
    made here.

    Args:
        sources: K sources, at least 2; number k holds the teacher that was trained without part k.
        data: the training part: labels, groups and ids.
        seed: keys the split; the same as that by which the teachers were trained.

    Raises:
        DataError: the groups cannot be split; or a part shares recordings with the training part and is not it.
        TapError: the teachers' taps differ in name or shape.

    Example:
        >>> import torch, kdlib
        >>> from kdlib.sources.cross_fit import CrossFit
        >>> data = kdlib.TensorPart(torch.zeros(4, 1), [0, 1, 0, 1], groups=["a", "a", "b", "b"])
        >>> one, other = lambda batch: {"logits": batch["x"] + 1}, lambda batch: {"logits": batch["x"] + 2}
        >>> source = CrossFit([one, other], data)
        >>> source.folds.tolist()
        [1, 1, 0, 0]
        >>> source({"x": torch.zeros(2, 1), "index": torch.tensor([3, 0])})["logits"].tolist()
        [[1.0], [2.0]]
    """

    def __init__(self, sources: Sequence[SoftLabelSource], data: Any, *, seed: Annotated[int, Field(ge=0)] = 0) -> None:
        super().__init__()
        if len(sources) < 2:
            raise KdlibError(f"Cross-fitting wants at least 2 sources, not {len(sources)}.")
        self.sources = {str(number): source for number, source in enumerate(sources)}
        self.states = states_of(self.sources)
        self.seed = seed
        self.folds = fold_of_groups(data.labels, data.groups, len(sources), seed)
        self._known = _facts(data)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Taps:
        """Return each row's taps from the teacher that has not heard its recording."""
        folds = self._folds_of(batch)
        rows, pieces = [], []
        for fold in sorted(set(folds.tolist())):
            chosen = (folds == fold).nonzero().flatten()
            part = _chosen(batch, chosen, len(folds))
            pieces.append(self._mean(part) if fold < 0 else dict(self.sources[str(fold)](part)))
            rows.append(chosen)
        _refuse_unlike(pieces, [len(chosen) for chosen in rows])
        order = torch.cat(rows).argsort()
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        return {name: tap[order.to(tap.device)] for name, tap in joined.items()}

    def dataset(self, part: DataPart) -> DataPart:
        """Return the part with the number of each row's teacher, and with what that teacher's source wants.

        Raises:
            DataError: the part shares groups with the training part and is another.
        """
        if _facts(part) == self._known:
            rows = [np.flatnonzero(self.folds == number) for number in range(len(self.sources))]
            wrapped = [
                wrapped_for({name: source}, Rows(part, chosen))
                for (name, source), chosen in zip(self.sources.items(), rows, strict=True)
            ]
            place = np.zeros(len(part), dtype=np.int64)
            for chosen in rows:
                place[chosen] = np.arange(len(chosen))
            return Alike(part, partial(_routed, wrapped, self.folds, place))
        shared = sorted(set(map(str, part.groups)) & set(self._known[1]))
        if shared:
            raise DataError(
                f"This part shares {len(shared)} groups with the part that the teachers were trained on, '{shared[0]}' "
                "first, and is not that part: its labels would come from teachers that have heard it. Give all parts "
                "the groups (recordings) that they have."
            )
        return Alike(part, partial(_held_out, wrapped_for(self.sources, part)))

    def advance(self, student: nn.Module) -> None:
        """Advance the sources that have a state."""
        advance_all(self.sources, student)

    def _folds_of(self, batch: Batch) -> Tensor:
        if KEY in batch:
            folds: Tensor = batch[KEY].cpu()
            return folds
        index = batch["index"].cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self.folds):
            raise BatchError(f"index goes to {int(index.max())}; the training part has {len(self.folds)} rows.")
        return torch.from_numpy(self.folds)[index]

    def _mean(self, batch: Batch) -> dict[str, Tensor]:
        each = [dict(source(view_of(batch, name))) for name, source in self.sources.items()]
        _refuse_unlike(each, [len(batch[KEY])] * len(each))
        return {name: torch.stack([taps[name] for taps in each]).mean(0) for name in each[0]}


def _facts(part: Any) -> tuple[list[int], list[str], list[str]]:
    """Return what a part is known by; the object may be another, for example in another process."""
    if not isinstance(part, DataPart):
        raise DataError(f"Cross-fitting wants data parts with labels, groups and ids, not {type(part).__name__}.")
    return np.asarray(part.labels).tolist(), [str(group) for group in part.groups], [str(one) for one in part.ids]


def _routed(wrapped: Sequence[DataPart], folds: np.ndarray, place: np.ndarray, key: Key) -> Item:
    epoch, index = key
    fold = int(folds[index])
    return {**wrapped[fold][epoch, int(place[index])], "index": index, KEY: fold}


def _held_out(part: DataPart, key: Key) -> Item:
    return {**part[key], KEY: -1}


def _chosen(batch: Batch, rows: Tensor, length: int) -> NamedBatch:
    """Return some rows of a batch."""

    def of(value: Tensor) -> Tensor:
        return value[rows.to(value.device)] if value.dim() and len(value) == length else value

    return NamedBatch({name: map_tensors(of, value) for name, value in batch.items()})


def _refuse_unlike(pieces: Sequence[Mapping[str, Tensor]], rows: Sequence[int]) -> None:
    """Refuse taps that cannot be put together: other names, other shapes, or not one entry a row."""
    shapes = [{name: tuple(tap.shape[1:]) for name, tap in piece.items()} for piece in pieces]
    for piece, shape, count in zip(pieces, shapes, rows, strict=True):
        if shape != shapes[0]:
            raise TapError(f"the cross-fitted teachers give other taps: {shapes[0]} and {shape}.")
        for name, tap in piece.items():
            if tap.dim() == 0 or len(tap) != count:
                raise TapError(
                    f"tap '{name}' has shape {tuple(tap.shape)} for {count} rows; it cannot be put together."
                )
