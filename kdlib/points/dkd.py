"""Decoupled knowledge distillation: the true class and the other classes weighted apart."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdlib.errors import BatchError, KdlibError
from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import logit_rows
from kdlib.points.reduction import labels_blamed, mean_over_batch
from kdlib.schedules import Schedule, Value, value_in


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """Return T² (alpha TCKD + beta NCKD), a mean over all axes but the classes. The settings are those of :class:`Dkd`.

    Raises:
        KdlibError: fewer than 3 classes.
        BatchError: the labels are not class numbers, shaped like the logits without ``dim``.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 1.0, 0.0]])
        >>> round(dkd_loss(z, z, torch.tensor([0])).item(), 6)
        0.0
    """
    z_student, z_teacher = logit_rows(student, teacher, temperature=temperature, dim=dim, mask=mask)
    classes = z_student.shape[-1]
    if classes < 3:
        raise KdlibError(
            f"DKD compares the classes beside the true one and wants at least 3 in all, not {classes}. With 2 take "
            "SoftLabels."
        )
    if labels.is_floating_point() or labels.shape != z_student.shape[:-1]:
        raise BatchError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; DKD wants class numbers of shape "
            f"{tuple(z_student.shape[:-1])}."
        )
    labels = labels.long() if mask is None else labels.long().where(mask.bool(), 0)  # the masked may be any number
    true = labels.unsqueeze(-1)
    others = torch.arange(classes - 1, device=labels.device)
    others = others + (others >= true)  # all class numbers but the true one

    # In logarithms throughout: the probability of the true class may round to 1 and that of the others to 0.
    log_s, log_t = z_student.log_softmax(-1), z_teacher.log_softmax(-1)
    target_class = _kl(*(torch.cat([z.gather(-1, true), _rest(z, others)], -1) for z in (log_t, log_s)))
    other_classes = _kl(*(F.log_softmax(z.gather(-1, others), -1) for z in (z_teacher, z_student)))
    return temperature**2 * mean_over_batch(alpha * target_class + beta * other_classes, mask)


def _rest(log_p: Tensor, others: Tensor) -> Tensor:
    """Return the logarithm of the probability of all other classes together."""
    return log_p.gather(-1, others).logsumexp(-1, keepdim=True)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class Dkd:
    """Decoupled knowledge distillation (Zhao et al. 2022, eq. 7): alpha TCKD + beta NCKD, times T².

    With p = softmax(z / T) of teacher and student and y the true class: TCKD is the KL divergence of (p_y, 1 - p_y),
    NCKD that of softmax over the classes other than y. Ordinary KL is TCKD + (1 - p_y of the teacher) NCKD: there a
    sure teacher silences the other classes.

    Both sides are softened; a sum over classes, a mean over the batch, times T², as in the authors' code. The teacher's
    side is detached. Needs ``y`` in the batch and at least 3 classes; a ``mask`` is honoured; a batch of 1 will do. The
    code leaves y out of NCKD by taking 1000 from its logit and takes the logarithm of probabilities, which is infinite
    at a logit of -400; here y is left out and logarithms are never undone. The code's warm-up of 20 epochs is a
    schedule of the point's weight: ``{kind = "linear", start = 0.0, end = 1.0, epochs = 20}``.

    Args:
        alpha: weight of the true class against the rest, 0 or more, or a schedule.
        beta: weight of the other classes among themselves, 0 or more, or a schedule. The paper has 1 to 8.
        temperature: T, above 0, or a schedule.
        tap: the student's logits.
        teacher_tap: the teacher's logits. Default: as ``tap``.
        dim: the axis of the classes.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 2.0]])
        >>> loss = Dkd(temperature=1.0)({"logits": student}, {"logits": teacher}, {"y": torch.tensor([0])})
        >>> round(loss.item(), 4)
        2.8492
    """

    def __init__(
        self,
        *,
        alpha: Annotated[float, Field(ge=0)] | Schedule = 1.0,
        beta: Annotated[float, Field(ge=0)] | Schedule = 8.0,
        temperature: Annotated[float, Field(gt=0)] | Schedule = 4.0,
        tap: str = "logits",
        teacher_tap: str | None = None,
        dim: int = -1,
    ) -> None:
        self.alpha: Value = alpha
        self.beta: Value = beta
        self.temperature: Value = temperature
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.dim = dim

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        with labels_blamed(student[self.tap], batch, self.dim):
            return dkd_loss(
                student[self.tap],
                teacher[self.teacher_tap],
                batch["y"],
                alpha=value_in(self.alpha, batch, "alpha"),
                beta=value_in(self.beta, batch, "beta"),
                temperature=value_in(self.temperature, batch, "temperature"),
                dim=self.dim,
                mask=batch.get("mask"),
            )
