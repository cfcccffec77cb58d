"""What is said of predictions: accuracy, macro accuracy, a confusion matrix, an interval."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return counts (K, K): rows are true classes, columns predicted ones.

    Example:
        >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def macro_accuracy(confusion: np.ndarray) -> float:
    """Return the mean over the classes that occur of the share of each that was recognised.

    Example:
        >>> macro_accuracy(np.array([[1, 1], [0, 1]]))
        0.75
    """
    total = confusion.sum(axis=1)
    return float((confusion.diagonal()[total > 0] / total[total > 0]).mean())


def wilson_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of Wilson (1927) for a share of ``correct`` in ``total``.

    It speaks of the clips that were drawn, for one training: not of the spread over seeds.

    Example:
        >>> [round(bound, 3) for bound in wilson_interval(80, 100)]
        [0.711, 0.867]
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = correct / total
    middle = share + z**2 / (2 * total)
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    scale = 1 + z**2 / total
    low, high = (middle - half) / scale, (middle + half) / scale
    return max(min(low, share), 0.0), min(max(high, share), 1.0)  # rounding stays inside


def most_confused(confusion: np.ndarray, pairs: int = 1) -> list[tuple[int, int]]:
    """Return the pairs of classes with the most errors, both directions together, most first.

    Among equals the order of the classes decides. A pair without an error is none.

    Example:
        >>> most_confused(np.array([[5, 1, 0], [2, 5, 4], [0, 0, 5]]), pairs=3)
        [(1, 2), (0, 1)]
    """
    first, second = np.triu_indices(len(confusion), k=1)
    errors = confusion[first, second] + confusion[second, first]
    order = np.argsort(-errors, kind="stable")[:pairs]
    return [(int(first[pair]), int(second[pair])) for pair in order if errors[pair]]
