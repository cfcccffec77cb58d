"""Jensen-Shannon divergence: symmetric and bounded, so that one row cannot dominate a batch."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import logit_rows
from kdlib.points.reduction import mean_over_batch
from kdlib.schedules import Schedule, Value, value_in


def js_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int = -1, mask: Tensor | None = None
) -> Tensor:
    """Return T² times the Jensen-Shannon divergence. The settings are those of :class:`JensenShannon`.

    Example:
        >>> import torch
        >>> round(js_loss(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])).item(), 4)  # log 2
        0.6931
    """
    z_student, z_teacher = logit_rows(student, teacher, temperature=temperature, dim=dim, mask=mask)
    log_s, log_t = z_student.log_softmax(-1), z_teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    divergence = (log_t.exp() * (log_t - log_m) + log_s.exp() * (log_s - log_m)).sum(-1) / 2
    return temperature**2 * mean_over_batch(divergence, mask)


class JensenShannon:
    """Jensen-Shannon divergence of student's and teacher's softened distributions (Lin 1991, section IV).

    T² (KL(p_T ‖ m) + KL(p_S ‖ m)) / 2 with p = softmax(z / T) and m = (p_S + p_T) / 2, in natural logarithms: from 0
    to T² log 2. A sum over classes, a mean over the batch. Both sides are softened; Lin has no temperature, and T² is
    there, as in Hinton et al. (2015), so that the gradient keeps its size as T grows: it tends to a quarter of the KL
    divergence's. The teacher's side is detached. A ``mask`` in the batch is honoured; a batch of 1 will do.

    Args:
        temperature: T, above 0, or a schedule.
        tap: the student's logits.
        teacher_tap: the teacher's logits. Default: as ``tap``.
        dim: the axis of the classes.

    Example:
        >>> import torch
        >>> point = JensenShannon(temperature=2.0)
        >>> round(point({"logits": torch.tensor([[4.0, 0.0]])}, {"logits": torch.tensor([[0.0, 4.0]])}, {}).item(), 4)
        1.3113
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(gt=0)] | Schedule = 1.0,
        tap: str = "logits",
        teacher_tap: str | None = None,
        dim: int = -1,
    ) -> None:
        self.temperature: Value = temperature
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.dim = dim

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return js_loss(
            student[self.tap],
            teacher[self.teacher_tap],
            temperature=value_in(self.temperature, batch, "temperature"),
            dim=self.dim,
            mask=batch.get("mask"),
        )
