"""Which other segments of a scene the teacher hears with a clip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kdlib import DataError, keyed


def partners(
    labels: np.ndarray,
    groups: Sequence[str],
    segments: int,
    seed: int,
    epoch: int,
    *,
    other_group: bool = False,
    repeat: bool = False,
    classes: Sequence[str] | None = None,
) -> np.ndarray:
    """Return for each clip the clips to join to it in an epoch, (N, segments - 1) indices.

    In each class the clips are shuffled by (seed, epoch), and partner s of the clip at place p is the clip at place
    p + s, cyclically. So none is its own partner, the partners of a clip differ, and every clip serves once a column.
    The table is a function of its arguments: every process computes the same one for itself.

    Args:
        labels: class numbers, (N,).
        groups: the recording place of each clip, N names; used with ``other_group``.
        segments: segments the teacher hears, the clip itself included, at least 1.
        seed: of the run.
        epoch: keys the shuffle; -1 is the table for validation.
        other_group: draw partners from other places only, for each clip by itself.
        repeat: where a class is too small, use clips more than once, and in a class of one the clip itself.
        classes: names for the message.

    Raises:
        DataError: a class has fewer clips (or, with ``other_group``, fewer from elsewhere) than are wanted.

    Source:
        Heo et al. 2019, section 3.1, joins another recording of the same class; the table is ours.

    Example:
        >>> import numpy as np
        >>> partners(np.array([0, 0, 1, 1]), ["a", "b", "c", "d"], 2, seed=0, epoch=0).ravel().tolist()
        [1, 0, 3, 2]
    """
    if segments < 1:
        raise DataError(f"segments counts the clip itself and is at least 1, not {segments}.")
    labels = np.asarray(labels)
    table = np.empty((len(labels), segments - 1), dtype=np.int64)
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        name = classes[label] if classes is not None else str(label)
        if other_group:
            for clip in members.tolist():
                table[clip] = _elsewhere(clip, members, groups, segments - 1, seed, epoch, repeat, name)
            continue
        if len(members) < segments and not repeat:
            raise _too_few(name, len(members), segments, "clips")
        order = members[torch.randperm(len(members), generator=keyed(seed, epoch, "partners", label)).numpy()]
        for column in range(segments - 1):
            shift = 1 + column % max(len(members) - 1, 1)
            table[order, column] = np.roll(order, -shift)
    return table


def _elsewhere(
    clip: int, members: np.ndarray, groups: Sequence[str], wanted: int, seed: int, epoch: int, repeat: bool, name: str
) -> np.ndarray:
    allowed = np.array([other for other in members.tolist() if groups[other] != groups[clip]], dtype=np.int64)
    if len(allowed) < wanted and not (repeat and len(allowed)):
        raise _too_few(name, len(allowed), wanted, f"clips recorded elsewhere than '{groups[clip]}'")
    drawn = torch.randperm(len(allowed), generator=keyed(seed, epoch, "partners", "clip", clip)).numpy()
    return np.resize(allowed[drawn], wanted)


def _too_few(name: str, there: int, wanted: int, what: str) -> DataError:
    return DataError(
        f"Class '{name}' has {there} {what}, and {wanted} are needed to join. "
        "Take fewer segments, or allow clips to be used again with repeat = true."
    )
