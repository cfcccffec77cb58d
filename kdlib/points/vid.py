"""Variational information distillation: the teacher's layer as a Gaussian given the student's."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdlib.batch import same_shape
from kdlib.errors import KdlibError, TapError
from kdlib.interfaces import Batch, Taps
from kdlib.points.maps import VARIANTS, same_size
from kdlib.points.projector import make_projector, projected, unprepared
from kdlib.points.reduction import fixed, one_of, widened

LEAST = 1e-5
"""What is added to every variance, so that none gets to 0 (the authors' value)."""


def gaussian_nll(
    mean: Tensor, teacher: Tensor, variance: Tensor, *, variant: Literal["paper", "code"] = "code"
) -> Tensor:
    """Return ½ ((t - μ)² / σ² + log σ²), the teacher detached: minus the log-likelihood without ½ log 2π.

    Args:
        mean: μ, (B, C, ...).
        teacher: t, of the same shape.
        variance: σ² of each channel, (C,).
        variant: ``code`` averages over rows, channels and positions; ``paper`` sums over channels and positions.

    Example:
        >>> import torch
        >>> gaussian_nll(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(3)).item()
        0.5
    """
    same_shape(mean, teacher)
    one_of("variant", variant, VARIANTS)
    mean, teacher = widened(mean), widened(fixed(teacher))
    if variance.shape != mean.shape[1:2]:
        raise TapError(f"there are {len(variance)} variances; the taps have shape {tuple(mean.shape)}.")
    variance = variance.view(1, -1, *[1] * (mean.dim() - 2))
    loss = 0.5 * ((teacher - mean).square() / variance + variance.log())
    return loss.flatten(1).sum(1).mean() if variant == "paper" else loss.mean()


class Vid(nn.Module):
    """The information that a student's layer has of the teacher's, by a Gaussian bound (Ahn et al. 2019, eq. 5).

    The teacher's tap t is taken as a Gaussian with mean μ(s), a projector of the student's tap, and a learned variance
    per channel, σ_c² = log(1 + exp(α_c)) + 1e-5. The loss is ½ ((t - μ)² / σ² + log σ²); it can be below 0. The
    teacher's side is detached. Taps are (B, D), (B, C, T) or (B, C, H, W), channels on axis 1; where the sizes differ,
    the larger map is brought to the smaller by adaptive average pooling. A batch of 1 will do.

    The paper sums over channels and positions; the authors' code, and the default here, averages over them, so that
    the weight does not depend on the size of the map. Their mean is three convolutions of size 1 with ReLUs between;
    here it is one, made by ``prepare``, as for the other points with a projector.

    Args:
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.
        projector: ``auto`` takes none where the channels agree, ``always`` makes one there too.
        variance: each channel's variance at the start, at least 0.001; 5 in the authors' code.
        variant: ``code`` or ``paper``.

    Raises:
        KdlibError: it was not prepared.
        TapError: the taps have other axes, or not the same on both sides.

    Example:
        >>> import torch
        >>> from kdlib.points.vid import Vid
        >>> point, student, teacher = Vid(), {"embedding": torch.zeros(2, 16)}, {"embedding": torch.zeros(2, 64)}
        >>> point.prepare(student, teacher, {})
        >>> sorted(name for name, _ in point.named_parameters())
        ['alpha', 'mean.bias', 'mean.weight']
    """

    def __init__(
        self,
        *,
        tap: str = "embedding",
        teacher_tap: str | None = None,
        projector: Literal["auto", "always"] = "auto",
        variance: Annotated[float, Field(ge=0.001)] = 5.0,
        variant: Literal["paper", "code"] = "code",
    ) -> None:
        super().__init__()
        if variance < 0.001:
            raise KdlibError(f"variance is at least 0.001, not {variance}.")
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.projector: Literal["auto", "always"] = projector
        self.variance = variance
        self.variant: Literal["paper", "code"] = variant
        self.mean: nn.Module | None = None
        self.alpha: nn.Parameter | None = None

    def prepare(self, student: Taps, teacher: Taps, batch: Batch) -> None:
        """Make the projector and the variances by the taps' shapes, once."""
        if self.mean is not None:
            return
        ours, theirs = student[self.tap], teacher[self.teacher_tap]
        self.mean = make_projector(ours, theirs, self.projector)
        wanted = self.variance - LEAST
        start = wanted + math.log(-math.expm1(-wanted))  # the inverse of log(1 + exp(start)), without overflow
        kind = torch.promote_types(ours.dtype, torch.float32)
        self.alpha = nn.Parameter(torch.full(theirs.shape[1:2], start, device=ours.device, dtype=kind))

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        ours, theirs = same_size(student[self.tap], teacher[self.teacher_tap])
        mean = projected(self.mean, ours)
        return gaussian_nll(mean, theirs, self.variances(), variant=self.variant)

    def variances(self) -> Tensor:
        """Return the learned variance of each of the teacher's channels, (C,)."""
        if self.alpha is None:
            raise unprepared()
        return F.softplus(self.alpha) + LEAST
