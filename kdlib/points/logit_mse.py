"""Logit matching: the squared difference of the logits."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import logit_rows
from kdlib.points.reduction import mean_over_batch, one_of


def logit_mse_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    variant: Literal["paper", "code"] = "code",
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the squared difference of the logits. The settings are those of :class:`LogitMse`.

    Example:
        >>> import torch
        >>> logit_mse_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
        2.0
    """
    one_of("variant", variant, ("paper", "code"))
    z_student, z_teacher = logit_rows(student, teacher, dim=dim, mask=mask)
    squares = (z_student - z_teacher) ** 2
    return mean_over_batch(squares.mean(-1) if variant == "code" else squares.sum(-1), mask)


class LogitMse:
    """Mean squared difference of the logits (Ba and Caruana 2014, section 2.2; Kim et al. 2021, L_MSE).

    (z_S - z_T)², averaged over the batch. Kim et al. write the squared norm, a sum over classes, and their code takes
    the mean over classes: ``variant``. Ba and Caruana have half the sum. There is no temperature and no T²: it is what
    T² times the KL divergence tends to as T grows, up to the shift and a factor. Unlike a softmax it sees a shift of
    all logits. The teacher's side is detached. A ``mask`` in the batch is honoured; a batch of 1 will do.

    Args:
        variant: ``code`` averages over classes, ``paper`` sums over them.
        tap: the student's logits.
        teacher_tap: the teacher's logits. Default: as ``tap``.
        dim: the axis of the classes.

    Example:
        >>> import torch
        >>> point = LogitMse(variant="paper")
        >>> point({"logits": torch.tensor([[3.0, 0.0]])}, {"logits": torch.tensor([[1.0, 1.0]])}, {}).item()
        5.0
    """

    def __init__(
        self,
        *,
        variant: Literal["paper", "code"] = "code",
        tap: str = "logits",
        teacher_tap: str | None = None,
        dim: int = -1,
    ) -> None:
        self.variant = variant
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.dim = dim

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return logit_mse_loss(
            student[self.tap], teacher[self.teacher_tap], variant=self.variant, dim=self.dim, mask=batch.get("mask")
        )
