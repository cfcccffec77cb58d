"""The teacher sees what the student sees."""

from __future__ import annotations

from torch import nn

from kdlib.batch import call
from kdlib.errors import TapError
from kdlib.interfaces import Batch, Taps, Teacher


class SameInput:
    """The source of ordinary distillation: teacher taps for ``batch["x"]``.

    Args:
        teacher: a frozen model, see :func:`kdlib.freeze`.

    Raises:
        TapError: the teacher is not frozen.

    Example:
        >>> import torch, kdlib
        >>> teacher = kdlib.freeze(kdlib.Tapped(torch.nn.Linear(4, 3), logits=""))
        >>> tuple(kdlib.SameInput(teacher)({"x": torch.zeros(2, 4)})["logits"].shape)
        (2, 3)
    """

    def __init__(self, teacher: Teacher) -> None:
        if isinstance(teacher, nn.Module):
            raise TapError(f"A source wants a frozen teacher, not {type(teacher).__name__}: kdlib.freeze(model).")
        self.teacher = teacher

    def __call__(self, batch: Batch) -> Taps:
        """Return the teacher's taps for the batch."""
        taps: Taps = call(self.teacher, batch["x"])
        return taps
