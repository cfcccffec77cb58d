"""Relational knowledge distillation: distances between rows, and angles that three rows make."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kdlib.errors import KdlibError
from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import gram, relation_rows, unit_rows
from kdlib.schedules import Schedule, Value, value_in


def rkd_loss(
    student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0, normalise: bool = False
) -> Tensor:
    """Return distance L_D + angle L_A. The settings are those of :class:`Rkd`.

    Raises:
        TapError: the sides have different numbers of rows.
        KdlibError: fewer rows than a relation needs, or no weight above 0.

    Example:
        >>> import torch
        >>> corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> round(rkd_loss(corners, 3 * corners + 1).item(), 6)
        0.0
    """
    ours, theirs = relation_rows(student, teacher)
    needed = 3 if angle > 0 else 2
    if len(ours) < needed:
        raise KdlibError(
            f"RKD needs a batch of at least {needed} rows for {'angles' if needed == 3 else 'distances'}; this one has "
            f"{len(ours)}. Choose a batch size that leaves no such last batch."
        )
    if normalise:
        ours, theirs = unit_rows(ours), unit_rows(theirs)
    terms = [
        weight * smooth_l1_loss(relation(ours), relation(theirs))
        for weight, relation in ((distance, _distances), (angle, _angles))
        if weight > 0
    ]
    if not terms:
        raise KdlibError(f"RKD wants a weight above 0, not distance={distance} and angle={angle}.")
    return torch.stack(terms).sum()


def _distances(rows: Tensor) -> Tensor:
    """Return the distances of all pairs over their mean; 0 where all rows are equal."""
    distances: Tensor = torch.linalg.vector_norm(rows[:, None] - rows[None], dim=-1)
    mean = distances.sum() / (len(rows) * (len(rows) - 1))
    return distances / mean.where(mean > 0, 1.0)


def _angles(rows: Tensor) -> Tensor:
    """Return the cosines of the angles at row j between rows i and k, as [j, i, k]; 0 where two of the rows are one."""
    return gram(unit_rows(rows[None] - rows[:, None]))


class Rkd:
    """Distances and angles between the rows of a batch (Park et al. 2019, sections 3.2.1 and 3.2.2).

    distance · L_D + angle · L_A, each the mean of Huber's loss (delta 1) of the student's relations against the
    teacher's: L_D over all pairs of ‖x_i - x_j‖ / μ, μ being the mean distance in the batch; L_A over all triplets of
    the cosine at x_j between x_i and x_k.

    No temperature and no T². The teacher's side is detached, μ of the student's is not. L_D needs 2 rows and L_A 3;
    smaller batches are refused, and in a batch of 2 L_D is 0 by itself. Widths may differ; taps of any shape are
    flattened row by row; memory is B² D + B³. L_D and L_A are invariant to shift, rotation and scale of either side.
    The paper sums over pairs and triplets of different rows; the authors' code, and this, takes the mean over all B²
    and B³, those of a row with itself included, which add 0. The code squares distances out of products and clamps by
    1e-12; here differences are taken, exactly 0 between equal rows, with gradient 0 there.

    Args:
        distance: weight of L_D, 0 or more, or a schedule.
        angle: weight of L_A, 0 or more, or a schedule.
        normalise: scale every row to length 1 first, as the authors do in metric learning.
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [4.0]])
        >>> round(Rkd()({"embedding": student}, {"embedding": teacher}, {}).item(), 4)
        0.7812
    """

    def __init__(
        self,
        *,
        distance: Annotated[float, Field(ge=0)] | Schedule = 25.0,
        angle: Annotated[float, Field(ge=0)] | Schedule = 50.0,
        normalise: bool = False,
        tap: str = "embedding",
        teacher_tap: str | None = None,
    ) -> None:
        self.distance: Value = distance
        self.angle: Value = angle
        self.normalise = normalise
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return rkd_loss(
            student[self.tap],
            teacher[self.teacher_tap],
            distance=value_in(self.distance, batch, "distance"),
            angle=value_in(self.angle, batch, "angle"),
            normalise=self.normalise,
        )
