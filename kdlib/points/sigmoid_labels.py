"""Soft labels where several classes may be true at once: one sigmoid a label."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import logit_rows
from kdlib.points.reduction import mean_over_batch, one_of
from kdlib.schedules import Schedule, Value, value_in


def sigmoid_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    form: Literal["cross_entropy", "kl"] = "cross_entropy",
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the binary cross-entropy with the teacher's sigmoids. The settings are those of :class:`SigmoidLabels`.

    Example:
        >>> import torch
        >>> round(sigmoid_cross_entropy(torch.zeros(1, 3), torch.zeros(1, 3)).item(), 4)  # 3 log 2
        2.0794
    """
    one_of("form", form, ("cross_entropy", "kl"))
    z_student, z_teacher = logit_rows(student, teacher, temperature=temperature, dim=dim, mask=mask)
    target = z_teacher.sigmoid()
    loss = F.binary_cross_entropy_with_logits(z_student, target, reduction="none")
    if form == "kl":
        loss = loss - F.binary_cross_entropy_with_logits(z_teacher, target, reduction="none")
    return temperature**2 * mean_over_batch(loss.sum(-1), mask)


class SigmoidLabels:
    """Binary cross-entropy with the teacher's softened sigmoids, for multi-label data (Yang et al. 2023, L_MLD).

    -T² Σ_k [s_T log s_S + (1 - s_T) log(1 - s_S)] with s = sigmoid(z_k / T): a sum over labels, a mean over the batch.

    Both sides are softened. Yang et al. take the KL divergence, which has the same gradient (``form``), and no
    temperature; T² is there, as in Hinton et al. (2015), so that the gradient keeps its size as T grows. Their code
    clamps the probabilities by 1e-8, which stops the gradient beyond logits of 18; here it is computed from logits. The
    teacher's side is detached. A ``mask`` in the batch, over positions and not labels, is honoured; a batch of 1 will
    do, and one label.

    Args:
        temperature: T, above 0, or a schedule.
        form: ``cross_entropy``, or ``kl``, which subtracts the teacher's entropy and is 0 where both agree.
        tap: the student's logits.
        teacher_tap: the teacher's logits. Default: as ``tap``.
        dim: the axis of the labels.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, -2.0]]), torch.tensor([[2.0, 0.0]])
        >>> round(SigmoidLabels(form="kl")({"logits": student}, {"logits": teacher}, {}).item(), 4)
        0.4338
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(gt=0)] | Schedule = 1.0,
        form: Literal["cross_entropy", "kl"] = "cross_entropy",
        tap: str = "logits",
        teacher_tap: str | None = None,
        dim: int = -1,
    ) -> None:
        self.temperature: Value = temperature
        self.form = form
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.dim = dim

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return sigmoid_cross_entropy(
            student[self.tap],
            teacher[self.teacher_tap],
            temperature=value_in(self.temperature, batch, "temperature"),
            form=self.form,
            dim=self.dim,
            mask=batch.get("mask"),
        )
