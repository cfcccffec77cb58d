"""The paper's point of distillation: the last hidden layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from kdlib import Batch, Taps, same_shape


class HiddenMse:
    """Mean squared error between the student's and the teacher's tap (Heo et al. 2019, eq. 5).

    mean over batch and dimensions of (E_T - E_S)². The teacher's side is detached. A batch of 1 will do. The paper
    sums over the batch; the mean over batch and dimensions is ours.

    Args:
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.

    Raises:
        TapError: the taps differ in shape.

    Example:
        >>> import torch
        >>> point = HiddenMse()
        >>> point({"embedding": torch.ones(2, 64)}, {"embedding": torch.zeros(2, 64)}, {}).item()
        1.0
    """

    def __init__(self, *, tap: str = "embedding", teacher_tap: str | None = None) -> None:
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        ours, theirs = student[self.tap], teacher[self.teacher_tap].detach()
        same_shape(ours, theirs)
        precise = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
        return mse_loss(ours.to(precise), theirs.to(precise))
