"""Soft labels: cross-entropy with the teacher's distribution."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdlib.batch import same_shape
from kdlib.errors import KdlibError
from kdlib.interfaces import Batch, Taps
from kdlib.points.reduction import fixed, mean_over_batch, one_of, rows_of
from kdlib.schedules import Schedule, Value, value_in


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    student_temperature: float = 1.0,
    soften: Literal["logits", "posteriors"] = "logits",
    form: Literal["cross_entropy", "kl"] = "cross_entropy",
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of the student's distribution with the teacher's, the teacher without gradient.

    -S² Σ_j p_T(j) log p_S(j), with p_T = softmax(z_T / T) and p_S = softmax(z_S / S): a sum over classes, a mean over
    all other axes. The settings are those of :class:`SoftLabels`.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> soft_cross_entropy(z, torch.tensor([[2.0, 0.0]])).backward()
        >>> z.grad.abs().max().item() < 1e-6
        True
    """
    same_shape(student, teacher)
    if temperature <= 0 or student_temperature <= 0:
        raise KdlibError(f"temperatures are above 0, not {temperature} and {student_temperature}.")
    one_of("soften", soften, ("logits", "posteriors"))
    one_of("form", form, ("cross_entropy", "kl"))
    z_student, z_teacher = rows_of(student, dim, mask), rows_of(fixed(teacher), dim, mask)
    scores = z_teacher if soften == "logits" else z_teacher.softmax(-1)
    target = F.softmax(scores / temperature, -1)
    log_ratio = F.log_softmax(z_student / student_temperature, -1)
    if form == "kl":
        # A class that the teacher excludes has a logarithm of -inf, and counts nothing.
        log_ratio = log_ratio - F.log_softmax(scores / temperature, -1).where(target > 0, 0.0)
    terms, scale = target * log_ratio, -(student_temperature**2)
    if mask is None:  # a mean of sums in one operation less, and one less in the backward
        return terms.sum() * (scale / max(terms.shape[:-1].numel(), 1))
    return scale * mean_over_batch(terms.sum(-1), mask)


class SoftLabels:
    """Cross-entropy with the teacher's softened distribution (Heo et al. 2019, eq. 1 to 3).

    -S² Σ_j softmax(z_T / T)_j log softmax(z_S / S)_j, summed over classes, averaged over the batch; the teacher's side
    is detached. At the defaults' S = 1 only the teacher is softened and nothing is rescaled, which is the paper's form.
    With S = T it is Hinton's (Hinton et al. 2015, section 2): both sides softened, times T² so that the gradient keeps
    its size as T grows. :meth:`hinton` writes that down. A ``mask`` in the batch is honoured; a batch of 1 will do.

    Args:
        temperature: T, above 0, or a schedule.
        student_temperature: S, above 0, or a schedule. The loss is multiplied by S².
        soften: what T divides. ``logits`` is the common reading; ``posteriors`` is eq. 3 to the letter, which applies
            exp to probabilities and caps the teacher's top probability at 0.232 for ten classes at T = 1.
        form: ``cross_entropy`` (eq. 1) or ``kl``, which subtracts the teacher's entropy: the same gradient, and 0 where
            both agree.
        tap: the student's logits.
        teacher_tap: the teacher's logits. Default: as ``tap``.
        dim: the axis of the classes.

    Example:
        >>> import torch, kdlib
        >>> point = kdlib.SoftLabels(temperature=5.0)
        >>> taps = {"logits": torch.tensor([[1.0, -1.0]])}
        >>> round(point(taps, taps, {}).item(), 4)
        0.9296
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(gt=0)] | Schedule = 1.0,
        student_temperature: Annotated[float, Field(gt=0)] | Schedule = 1.0,
        soften: Literal["logits", "posteriors"] = "logits",
        form: Literal["cross_entropy", "kl"] = "cross_entropy",
        tap: str = "logits",
        teacher_tap: str | None = None,
        dim: int = -1,
    ) -> None:
        self.temperature: Value = temperature
        self.student_temperature: Value = student_temperature
        self.soften = soften
        self.form = form
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.dim = dim

    @classmethod
    def hinton(cls, temperature: float | Schedule = 4.0) -> SoftLabels:
        """Return Hinton's form: both sides softened by one temperature, times its square.

        Example:
            >>> import kdlib
            >>> kdlib.SoftLabels.hinton(4.0).student_temperature
            4.0
        """
        return cls(temperature=temperature, student_temperature=temperature)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return soft_cross_entropy(
            student[self.tap],
            teacher[self.teacher_tap],
            temperature=value_in(self.temperature, batch, "temperature"),
            student_temperature=value_in(self.student_temperature, batch, "student_temperature"),
            soften=self.soften,
            form=self.form,
            dim=self.dim,
            mask=batch.get("mask"),
        )
