"""The point ``cosine`` for kdlib."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

import kdlib


def cosine_gap(student: Tensor, teacher: Tensor, margin: float = 0.0) -> Tensor:
    """Return max(0, 1 - cos(student, teacher) - margin), averaged over rows; the teacher is detached.

    A row of zeros has the cosine 0.

    Example:
        >>> cosine_gap(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]]), margin=0.25).item()
        0.75
    """
    kdlib.same_shape(student, teacher)
    cosine = (direction(student) * direction(teacher.detach())).sum(1)
    return (1 - cosine - margin).clamp(min=0).mean()


def direction(rows: Tensor) -> Tensor:
    """Return each row at length 1. A row of zeros stays one, with a gradient that is not large."""
    rows = widened(rows)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.where(length > 0, 1)


def widened(rows: Tensor) -> Tensor:
    """Return rows in float32 or better: squares of large numbers overflow in float16."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


class Cosine(nn.Module):
    """The angle between the student's and the teacher's tap, where it is more than a margin.

    max(0, 1 - cos(r(E_S), E_T) - margin), averaged over rows, from 0 to 2 - margin. r is a linear layer from the
    student's width to the teacher's, or nothing where they agree; ``prepare`` makes it. The teacher's side is detached.
    A batch of 1 will do. A row of zeros has the cosine 0.

    Args:
        tap: the tap of both sides, (B, D).
        margin: how far 1 - cos may be before it costs anything.

    Raises:
        KdlibError: it was not prepared.
    """

    def __init__(self, *, tap: str = "embedding", margin: Annotated[float, Field(ge=0, lt=2)] = 0.0) -> None:
        super().__init__()
        self.tap = tap
        self.margin = margin
        self.projector: nn.Module | None = None

    def prepare(self, student: kdlib.Taps, teacher: kdlib.Taps, batch: kdlib.Batch) -> None:
        """Make the projector by the taps' widths, once."""
        ours, theirs = student[self.tap], teacher[self.tap]
        if self.projector is None:
            width, wanted = ours.shape[1], theirs.shape[1]
            self.projector = nn.Identity() if width == wanted else nn.Linear(width, wanted).to(ours.device)

    def forward(self, student: kdlib.Taps, teacher: kdlib.Taps, batch: kdlib.Batch) -> Tensor:
        """Return the loss of the batch, a scalar."""
        if self.projector is None:
            raise kdlib.KdlibError("it has no projector yet: call distiller.prepare(batch) first.")
        return cosine_gap(self.projector(widened(student[self.tap])), teacher[self.tap], self.margin)


@kdlib.hookimpl
def kdlib_points() -> dict[str, type[Cosine]]:
    """Tell kdlib the point's name in recipes."""
    return {"cosine": Cosine}
