"""DIST: correlation of predictions in place of their equality, for teachers much stronger than the student."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import centred, logit_rows
from kdlib.schedules import Schedule, Value, value_in

EPS = 1e-8
"""Added to the product of the norms, as in the authors' code: where nothing varies the correlation is 0."""


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """Return T² (beta L_inter + gamma L_intra). The settings are those of :class:`Dist`.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
        >>> abs(round(dist_loss(z, z).item(), 4))
        0.0
    """
    z_student, z_teacher = logit_rows(student, teacher, temperature=temperature, dim=dim, mask=mask)
    p_student, p_teacher = (z.softmax(-1).reshape(-1, z.shape[-1]) for z in (z_student, z_teacher))
    if mask is not None:
        counted = mask.bool().flatten()
        p_student, p_teacher = p_student[counted], p_teacher[counted]
    if not len(p_student):
        return 0 * z_student.sum()
    inter = 1 - _correlation(p_student, p_teacher).mean()
    intra = 1 - _correlation(p_student.mT, p_teacher.mT).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return Pearson's correlation row by row."""
    one, length, varies = centred(one)
    other, other_length, other_varies = centred(other)
    lengths = (length * other_length + EPS).where(varies & other_varies, 1.0)
    return (one * other).sum(-1) / lengths.squeeze(-1)


class Dist:
    """Correlation of student's and teacher's probabilities, in each row and in each class (DIST, Huang et al. 2022).

    With P = softmax(z / T), (B, K), and Pearson's correlation r: L_inter = 1 - the mean over rows of r(P_S[i, :],
    P_T[i, :]), L_intra = 1 - the mean over classes of r(P_S[:, j], P_T[:, j]); the loss is T² (beta L_inter + gamma
    L_intra).

    Both sides are softened. The factor T² is in the authors' later code, for all T; the paper and their first code have
    none and there T is 1. The teacher's side is detached. With a ``mask`` in the batch both relations are over the rows
    that count; with logits of more than two axes every position is a row. A row or class whose probabilities do not
    vary counts as correlation 0. The smallest batch is 2: in a batch of 1 no class varies, so that L_intra is 1 without
    gradient. With two classes a row's correlation is 1 or -1 without gradient, and only L_intra teaches.

    Args:
        beta: weight of the relation between classes, 0 or more, or a schedule.
        gamma: weight of the relation inside classes, 0 or more, or a schedule.
        temperature: T, above 0, or a schedule.
        tap: the student's logits.
        teacher_tap: the teacher's logits. Default: as ``tap``.
        dim: the axis of the classes.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
        >>> teacher = torch.eye(3)
        >>> round(Dist()({"logits": student}, {"logits": teacher}, {}).item(), 4)
        0.2091
    """

    def __init__(
        self,
        *,
        beta: Annotated[float, Field(ge=0)] | Schedule = 1.0,
        gamma: Annotated[float, Field(ge=0)] | Schedule = 1.0,
        temperature: Annotated[float, Field(gt=0)] | Schedule = 1.0,
        tap: str = "logits",
        teacher_tap: str | None = None,
        dim: int = -1,
    ) -> None:
        self.beta: Value = beta
        self.gamma: Value = gamma
        self.temperature: Value = temperature
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.dim = dim

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return dist_loss(
            student[self.tap],
            teacher[self.teacher_tap],
            beta=value_in(self.beta, batch, "beta"),
            gamma=value_in(self.gamma, batch, "gamma"),
            temperature=value_in(self.temperature, batch, "temperature"),
            dim=self.dim,
            mask=batch.get("mask"),
        )
