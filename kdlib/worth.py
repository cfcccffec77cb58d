"""How often a teacher is right: through its source, and on the student's input alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdlib.batch import call
from kdlib.interfaces import Batch, SoftLabelSource, Taps
from kdlib.sources import SameInput
from kdlib.taps import teachers_in

Hits = dict[str, tuple[int, int]]
"""(right, rows) by how the teacher was asked."""
THROUGH = "through the source"
ALONE = "on the student's input alone"


@torch.no_grad()
def hits(source: SoftLabelSource | None, taps: Taps, batch: Batch) -> Hits:
    """Return (right, rows) of the teacher's logits: through the source, and of each teacher on ``batch["x"]`` alone.

    The difference is what the source is worth. Nothing is said where it cannot be: without logits or class numbers,
    and of a teacher that does not take the student's input.

    Args:
        source: what gave the taps.
        taps: the teacher's.
        batch: the batch they belong to.

    Source:
        Ours; Heo et al. 2019, section 4.3, asks that the teacher be superior, and shows it by its input's length.

    Example:
        >>> import kdlib
        >>> source = kdlib.SameInput(kdlib.freeze(kdlib.Tapped(torch.nn.Identity(), logits="")))
        >>> batch = {"x": torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "y": torch.tensor([0, 1])}
        >>> hits(source, source(batch), batch)
        {'through the source': (1, 2)}
    """
    found = {THROUGH: _right(taps, batch)}
    if source is not None and not isinstance(source, SameInput):
        teachers = list(teachers_in(source))
        for number, teacher in enumerate(teachers, start=1):
            try:
                alone: Any = call(teacher, batch["x"])
            except Exception:  # a teacher of another input than the student's
                continue
            which = f"teacher {number} " if len(teachers) > 1 else ""
            found[which + ALONE] = _right(alone, batch)
    return {name: count for name, count in found.items() if count is not None}


def described(found: Hits) -> str:
    """Return the counts as text."""
    return ", ".join(f"{right} of {rows} {name}" for name, (right, rows) in found.items())


def _right(taps: Taps, batch: Batch) -> tuple[int, int] | None:
    labels = batch.get("y")
    if "logits" not in taps or not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    logits = taps["logits"]
    if labels.shape != logits.shape[:-1]:
        return None
    return int((logits.argmax(-1) == labels.to(logits.device)).sum()), labels.numel()
