"""Logit standardisation: soft labels of z-scores, so that the student need not match the teacher's scale."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import centred, logit_rows, positive
from kdlib.points.reduction import mean_over_batch, one_of
from kdlib.schedules import Schedule, Value, value_in

EPS = 1e-7
"""Added to the standard deviation, as in the authors' code."""


def standardised_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 2.0,
    variant: Literal["paper", "code"] = "code",
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """Return T² times the KL divergence of z-scored logits. The settings are those of :class:`LogitStandardised`.

    Example:
        >>> import torch
        >>> z = torch.tensor([[3.0, 1.0, 0.0]])
        >>> abs(round(standardised_kl(z, 5 * z + 2).item(), 4))
        0.0
    """
    one_of("variant", variant, ("paper", "code"))
    positive("temperature", temperature)
    rows = logit_rows(student, teacher, dim=dim, mask=mask)
    # Divided by T after the z-score, which would undo a division before it.
    log_s, log_t = ((_standardised(z, variant) / temperature).log_softmax(-1) for z in rows)
    return temperature**2 * mean_over_batch((log_t.exp() * (log_t - log_s)).sum(-1), mask)


def _standardised(rows: Tensor, variant: str) -> Tensor:
    rest, length, varies = centred(rows)
    deviation = length / math.sqrt(max(rows.shape[-1] - (variant == "code"), 1))
    # A row of equal logits, as a head set to zero gives, has no scale to take out.
    return rest / (deviation + EPS).where(varies & (deviation > EPS), 1.0)


class LogitStandardised:
    """KL divergence of z-scored logits (Sun et al. 2024, algorithms 1 and 2).

    T² KL(softmax(Z(z_T) / T) ‖ softmax(Z(z_S) / T)) with Z(z) = (z - mean z) / std z over the classes of a row. Only
    the order and the proportions of the logits are taught: scale and shift of either side do not matter.

    A sum over classes, a mean over the batch. Both sides are standardised and softened by one base temperature, times
    T² in paper and code alike. The teacher's side is detached; the student's mean and deviation are not. A ``mask`` in
    the batch is honoured; a batch of 1 will do. With two classes Z is the same for all rows up to the sign, and the
    gradient is 0.

    Args:
        temperature: T, above 0, or a schedule. The authors have 2 and weigh the loss with 9.
        variant: ``paper`` divides the variance by K, ``code`` by K - 1, as torch.std does: with T that is a factor
            sqrt(K / (K - 1)). Both add 1e-7 to the deviation, which only the code does,
            and do not divide a row that varies by no more than that or than rounding.
        tap: the student's logits.
        teacher_tap: the teacher's logits. Default: as ``tap``.
        dim: the axis of the classes.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0, 1.0]])
        >>> round(LogitStandardised()({"logits": student}, {"logits": teacher}, {}).item(), 4)
        0.1003
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(gt=0)] | Schedule = 2.0,
        variant: Literal["paper", "code"] = "code",
        tap: str = "logits",
        teacher_tap: str | None = None,
        dim: int = -1,
    ) -> None:
        self.temperature: Value = temperature
        self.variant = variant
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.dim = dim

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return standardised_kl(
            student[self.tap],
            teacher[self.teacher_tap],
            temperature=value_in(self.temperature, batch, "temperature"),
            variant=self.variant,
            dim=self.dim,
            mask=batch.get("mask"),
        )
