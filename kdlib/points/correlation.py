"""Correlation congruence: the kernel matrix of a batch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import gram, positive, relation_rows, unit_rows
from kdlib.points.reduction import one_of


def correlation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Literal["gaussian", "bilinear"] = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
) -> Tensor:
    """Return the mean squared difference of the kernel matrices. The settings are those of :class:`Correlation`.

    Example:
        >>> import torch
        >>> correlation_loss(torch.eye(2), torch.ones(2, 1), kernel="bilinear").item()
        0.5
    """
    one_of("kernel", kernel, ("gaussian", "bilinear"))
    positive("gamma", gamma)
    ours, theirs = relation_rows(student, teacher)
    if kernel == "bilinear":
        return ((gram(theirs) - gram(ours)) ** 2).mean()
    return ((_gaussian(theirs, gamma, order) - _gaussian(ours, gamma, order)) ** 2).mean()


def _gaussian(rows: Tensor, gamma: float, order: int) -> Tensor:
    cosines = gram(unit_rows(rows))
    terms = [(2 * gamma) ** power / math.factorial(power) * cosines**power for power in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(0)


class Correlation:
    """Squared difference of the batch's kernel matrices (correlation congruence, CC, Peng et al. 2019, section 3).

    ‖Ψ(X_T) - Ψ(X_S)‖² / B² with Ψ_ij = k(x_i, x_j). ``bilinear`` is k = x_i · x_j. ``gaussian`` is exp(-γ ‖x_i - x_j‖²)
    of rows of length 1, which is exp(-2γ) exp(2γ x_i · x_j), with the second exponential cut after the power P of its
    Taylor series.

    No temperature and no T². The teacher's side is detached. Widths may differ; taps of any shape are flattened row by
    row. Both kernels are invariant to rotation, the Gaussian also to the scale of each row. The smallest batch is 2:
    one row gives 0 with the Gaussian, and with ``bilinear`` compares its squared length only. The code that the authors
    handed to others is another loss, the products of the absolute differences x_S - x_T of neighbouring rows, which
    depends on the order of the rows and wants equal widths; it is not offered. The paper adds its loss to soft labels:
    that is another point here.

    Args:
        kernel: ``gaussian`` or ``bilinear``.
        gamma: γ of the Gaussian, above 0.
        order: P of the Gaussian, at least 1.
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.

    Example:
        >>> import torch
        >>> student, teacher = torch.eye(2), torch.ones(2, 1)
        >>> round(Correlation()({"embedding": student}, {"embedding": teacher}, {}).item(), 4)
        0.1266
    """

    def __init__(
        self,
        *,
        kernel: Literal["gaussian", "bilinear"] = "gaussian",
        gamma: Annotated[float, Field(gt=0)] = 0.4,
        order: Annotated[int, Field(ge=1)] = 2,
        tap: str = "embedding",
        teacher_tap: str | None = None,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.order = order
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return correlation_loss(
            student[self.tap], teacher[self.teacher_tap], kernel=self.kernel, gamma=self.gamma, order=self.order
        )
