"""Scores of several systems made one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdlib.errors import KdlibError


@dataclass(frozen=True)
class Scores:
    """A score matrix with the names of its rows and columns."""

    ids: tuple[str, ...]
    """Clips, N of them."""
    classes: tuple[str, ...]
    """Classes, K of them."""
    values: np.ndarray
    """(N, K)."""
    spread: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of the network's scores on its training part, for z-norm."""

    def aligned(self, ids: tuple[str, ...], classes: tuple[str, ...]) -> np.ndarray:
        """Return the values with rows and columns in this order.

        Raises:
            KdlibError: clips or classes are not the same.
        """
        for what, own, wanted in (("clips", self.ids, ids), ("classes", self.classes, classes)):
            if len(set(own)) != len(own) or set(own) != set(wanted):
                odd = sorted(set(own) ^ set(wanted))[:3] or sorted({name for name in own if own.count(name) > 1})[:3]
                raise KdlibError(f"Scores cannot be fused: the {what} differ or repeat, for example {', '.join(odd)}.")
        row = {name: place for place, name in enumerate(self.ids)}
        column = {name: place for place, name in enumerate(self.classes)}
        return self.values[np.ix_([row[name] for name in ids], [column[name] for name in classes])]

    def predicted(self, ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
        """Return the number among ``classes`` of each clip's highest score, (N,): the lowest among equal scores."""
        known = [number for number, name in enumerate(classes) if name in self.classes]
        values = self.aligned(tuple(ids), tuple(classes[number] for number in known))
        highest: np.ndarray = np.array(known)[values.argmax(axis=1)]
        return highest


def log_softmax(values: np.ndarray) -> np.ndarray:
    """Return rows of log-probabilities, (N, K) float64."""
    wide = values.astype(np.float64)
    normalised: np.ndarray = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
    return normalised


def fuse(
    systems: Mapping[str, Scores],
    *,
    weights: Mapping[str, float] | None = None,
    normalise: Literal["none", "z", "log_softmax"] = "none",
) -> Scores:
    """Return the weighted mean of score matrices, aligned by class label and clip id to the first.

    Args:
        systems: scores by system (Heo et al. 2019, section 2.2: the mean of the SVMs' scores).
        weights: a weight a system, 1 where none is named; they are divided by their sum.
        normalise: before the mean, ``z`` subtracts the mean and divides by the standard deviation of the network's
            scores on its training part; ``log_softmax`` makes rows log-probabilities.

    Raises:
        KdlibError: the systems' clips or classes differ; all weights are 0.

    Example:
        >>> a = Scores(("u", "v"), ("x", "y"), np.array([[1.0, 0.0], [0.0, 1.0]]))
        >>> b = Scores(("v", "u"), ("y", "x"), np.array([[3.0, 0.0], [0.0, 5.0]]))
        >>> fuse({"a": a, "b": b}).values.tolist()
        [[3.0, 0.0], [0.0, 2.0]]
    """
    first = next(iter(systems.values()))
    share = np.array([(weights or {}).get(name, 1.0) for name in systems])
    if share.sum() <= 0:
        raise KdlibError("fusion.weights: all are 0.")
    matrices = []
    for scores in systems.values():
        values = scores.aligned(first.ids, first.classes)
        if normalise == "z":
            values = (values - scores.spread[0]) / max(scores.spread[1], 1e-12)
        elif normalise == "log_softmax":
            values = log_softmax(values)
        matrices.append(values)
    return Scores(first.ids, first.classes, np.average(np.stack(matrices), axis=0, weights=share))
