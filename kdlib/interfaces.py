"""The interfaces. Each is a protocol: third parties inherit nothing, and a function will do where there is one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from torch import Tensor

Taps = Mapping[str, Tensor]
"""Named tensors read off a network, such as ``logits`` (B, K) and ``embedding`` (B, D)."""

Batch = Mapping[str, Any]
"""``x`` (the student's input), ``y``, ``index`` and ``epoch`` ((B,) int64), and whatever a source added."""


class Teacher(Protocol):
    """A role of a model: it turns an input into taps and is not trained (see :func:`kdlib.freeze`)."""

    def __call__(self, *x: Any) -> Taps:
        """Return the taps for an input."""
        ...


class Student(Protocol):
    """A role of a model: it turns an input into taps and is trained."""

    def __call__(self, *x: Any) -> Taps:
        """Return the taps for an input."""
        ...


class SoftLabelSource(Protocol):
    """Decides what the teacher sees for a batch and returns the teacher's taps, without gradient.

    Four methods are optional. ``dataset(part) -> dataset`` wraps a data part to add to each item what the source needs
    in its batch. ``advance(student)`` is called after each optimizer step, and is the only place where a source may
    change state. ``pictures(part) -> {name: figure}`` draws, for looking only, what the teacher makes of a part: a run
    calls it after the training with the test clips of the two classes that the teacher confuses most, and saves each
    matplotlib figure as ``name.png``. ``difference(part) -> {name: number}`` is for a source that takes a shortcut: how
    far its taps are from those without, on some items of what ``dataset`` returned; ``fit`` reports it once.

    A source whose taps change from epoch to epoch by themselves, by noise of its own say, has the attribute
    ``augmented = True``; else a store keeps one view of what comes from data that does not change.
    """

    def __call__(self, batch: Batch) -> Taps:
        """Return the teacher's taps for the batch, row by row."""
        ...


class DistillPoint(Protocol):
    """Where student and teacher are compared, and how. Returns one number.

    Two methods are optional. ``prepare(student, teacher, batch)`` is called once with real taps, for projectors.
    ``advance(student)`` is called after each optimizer step, and is the only place where a point may change state.
    """

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch, a scalar."""
        ...


@runtime_checkable
class DataPart(Protocol):
    """One part of a data set: items by ``(epoch, index)``, and what is known of each without loading it.

    The epoch keys augmentation; an epoch of -1 asks for the item as it is, without any.

    Two methods are optional. ``memory()`` tells the bytes that a part keeps at most, for estimates.
    ``fingerprint(index) -> str`` names the content of an item as it is: two items with one fingerprint are equal,
    whatever they are called. It is a hash of all that the item is made of, such as the bytes of its file and the
    settings of the reader. A cache on disk needs it.

    The attribute ``augmented`` is optional: whether items change from epoch to epoch. What does not change is computed
    once, such as features and the frames of a teacher; a part that tells neither by it nor by ``made_by`` is taken to
    change.

    A store of soft labels also needs the attribute ``made_by``, a mapping of plain data: whatever else its items depend
    on, and under ``augmentation`` how they change from epoch to epoch, None where they never do. Parts with equal
    fingerprints and an equal ``made_by`` have equal items in every epoch.
    """

    @property
    def labels(self) -> np.ndarray:
        """Class numbers, (N,) int64."""
        ...

    @property
    def groups(self) -> Sequence[str]:
        """The recording, place or speaker of each item, which must not be split between parts."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """A name for each item, for messages and result files."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> Mapping[str, Any]:
        """Return ``{"x", "y", "index", "epoch"}`` of one item."""
        ...


class DataParts(Protocol):
    """A data set split for one training: ``valid`` is None where nothing was split off.

    Optional: ``rate`` and ``channels`` are filled into the settings of models and features. ``skipped`` holds the id
    and the reason of each item that was left out as bad, for the run's result. ``advice(errors, fine)`` is told what
    reading raised and how many items could be read, and returns the settings under which all can be, for
    ``kdlib data check``. ``write(folder)`` writes the whole data set into a new folder, for ``kdlib data make``.

    A data-set plugin returns its parts, or a mapping from fold to parts. Of its settings ``root``, ``fold`` and
    ``keep_in_memory`` the command ``kdlib data check`` sets those that there are: the folder, ``"all"`` and false.

    Two attributes of the builder are optional. ``windows`` is a function of (path, settings) that reads one file as the
    items' ``x`` before features, (windows, ...): then ``kdlib predict`` takes files of that kind. ``written`` holds
    settings that ``kdlib data make`` takes where none are given.
    """

    @property
    def train(self) -> DataPart:
        """The part that is trained on."""
        ...

    @property
    def valid(self) -> DataPart | None:
        """The part that chooses the epoch, split off the training part."""
        ...

    @property
    def test(self) -> DataPart:
        """The part that is scored and chooses nothing."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """The class names, in the order of the labels."""
        ...


class Features(Protocol):
    """A module from samples (channels, time) to what a network eats.

    Two methods are optional. ``fit(clips)`` takes statistics over the training part, and keeps them in the module's
    ``state_dict()``. ``augment(x, generator)`` draws another view of one item from the generator; it is called in
    training only.
    """

    time_axis: int
    """The axis of a batch of features on which segments are joined, counted from the end."""

    def __call__(self, samples: Tensor) -> Tensor:
        """Return the features of one clip or of a batch of clips."""
        ...


class Scorer(Protocol):
    """A classifier on embeddings, trained after the network."""

    classes_: np.ndarray
    """The class numbers of the score columns."""

    def fit(self, embeddings: np.ndarray, labels: np.ndarray) -> Self:
        """Train on embeddings (N, D) and class numbers (N,)."""
        ...

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Return one column of scores a class, (N, K)."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Return the fitted scorer as plain arrays."""
        ...

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """Return the scorer that ``state()`` described."""
        ...


__all__ = [
    "Batch", "DataPart", "DataParts", "DistillPoint", "Features", "Scorer", "SoftLabelSource", "Student", "Taps",
    "Teacher",
]  # fmt: skip
