"""What points do first with a student's and a teacher's tap: the teacher detached, both in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlib.batch import same_shape
from kdlib.errors import KdlibError, TapError
from kdlib.points.reduction import fixed, full_precision, rows_of, widened


def logit_rows(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int = -1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return both sides' logits divided by a temperature, classes last, 0 where the mask does not count.

    Raises:
        TapError: the shapes differ.
        KdlibError: the temperature is not above 0.
    """
    same_shape(student, teacher)
    positive("temperature", temperature)
    return rows_of(student, dim, mask) / temperature, rows_of(fixed(teacher), dim, mask) / temperature


def relation_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides' taps of any shape as (B, D). The widths may differ, the rows may not.

    Raises:
        TapError: a tap has no rows, or the sides have different numbers of them.
    """
    if not student.dim() or not teacher.dim() or len(student) != len(teacher):
        raise TapError(
            f"the student's tap has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; relations in "
            "a batch want as many rows on both sides."
        )
    return _flat(student), _flat(fixed(teacher))


def gram(rows: Tensor) -> Tensor:
    """Return the products of all pairs of rows, (..., B, D) -> (..., B, B), in the rows' own precision."""
    with full_precision(rows):
        return rows @ rows.mT


def unit_rows(rows: Tensor) -> Tensor:
    """Return rows of length 1. A row of zeros stays one, with a finite gradient."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length.where(length > 0, 1.0)


def centred(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows less their mean, the lengths of that, and where a row varies by more than rounding, (..., 1) each.

    Where it does not, dividing by the length would blow rounding up into a direction, and the gradient with it.
    """
    rest = rows - rows.mean(-1, keepdim=True)
    length, whole = (torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (rest, rows))
    return rest, length, length > 1e-6 * whole


def positive(name: str, value: float) -> None:
    """Refuse a value that is not above 0."""
    if not value > 0:
        raise KdlibError(f"{name} is above 0, not {value}.")


def _flat(tap: Tensor) -> Tensor:
    return widened(tap.reshape(len(tap), -1))
