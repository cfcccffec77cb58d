"""The teacher's ranking of the classes and nothing else of its logits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kdlib.errors import KdlibError
from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import logit_rows
from kdlib.points.reduction import mean_over_batch


def list_mle(
    student: Tensor, teacher: Tensor, *, top: int | None = None, dim: int = -1, mask: Tensor | None = None
) -> Tensor:
    """Return minus the log-likelihood of the teacher's ranking. The settings are those of :class:`Ranking`.

    Example:
        >>> import torch
        >>> round(list_mle(torch.zeros(1, 3), torch.tensor([[0.0, 5.0, 1.0]])).item(), 4)  # log 3 + log 2
        1.7918
    """
    if top is not None and top < 1:
        raise KdlibError(f"top is at least 1 place, not {top}.")
    z_student, z_teacher = logit_rows(student, teacher, dim=dim, mask=mask)
    order = z_teacher.argsort(dim=-1, descending=True, stable=True)
    ranked = z_student.gather(-1, order)
    remaining = ranked.flip(-1).logcumsumexp(-1).flip(-1)  # log Σ exp over a place and those after it
    return mean_over_batch((remaining - ranked)[..., :top].sum(-1), mask)


class Ranking:
    """ListMLE: minus the log-likelihood, under the student, of the teacher's ranking (Xia et al. 2008).

    With π(1), π(2), ... the classes from the teacher's highest logit to its lowest: -Σ_i log(exp z_S[π(i)] / Σ_{k≥i}
    exp z_S[π(k)]), the Plackett-Luce probability of drawing the classes in that order. A sum over places, a mean over
    the batch.

    Nothing is softened, so there is no T²; of the teacher only the order matters, and of equal logits the class of the
    lower number comes first. With ``top=1`` it is cross-entropy with the teacher's first class. The teacher's side is
    an order and carries no gradient. A ``mask`` in the batch is honoured; a batch of 1 will do, and two classes.

    Args:
        top: places that count, from the first, at least 1. Default: all. With hundreds of classes the order of the last
            ones is noise.
        tap: the student's logits.
        teacher_tap: the teacher's logits. Default: as ``tap``.
        dim: the axis of the classes.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[9.0, 1.0, 0.0]])
        >>> round(Ranking()({"logits": student}, {"logits": teacher}, {}).item(), 4)
        0.7209
    """

    def __init__(
        self,
        *,
        top: Annotated[int, Field(ge=1)] | None = None,
        tap: str = "logits",
        teacher_tap: str | None = None,
        dim: int = -1,
    ) -> None:
        self.top = top
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.dim = dim

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return list_mle(
            student[self.tap], teacher[self.teacher_tap], top=self.top, dim=self.dim, mask=batch.get("mask")
        )
