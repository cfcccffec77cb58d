"""Hints: the student's hidden layer predicts the teacher's through a projector."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import mse_loss

from kdlib.batch import same_shape
from kdlib.interfaces import Batch, Taps
from kdlib.points.maps import VARIANTS, same_size
from kdlib.points.projector import make_projector, projected
from kdlib.points.reduction import fixed, one_of, widened


def hint_loss(student: Tensor, teacher: Tensor, *, variant: Literal["paper", "code"] = "code") -> Tensor:
    """Return half the squared error of two taps (B, C, ...) of one shape; the teacher is detached.

    ½ Σ (h_T - h_S)², averaged over rows. ``paper`` sums over channels and positions, ``code`` sums over channels and
    averages over positions. For flat taps (B, D) they are the same.

    Example:
        >>> import torch
        >>> a, b = torch.zeros(2, 3, 5), torch.ones(2, 3, 5)
        >>> hint_loss(a, b).item(), hint_loss(a, b, variant="paper").item()
        (1.5, 7.5)
    """
    same_shape(student, teacher)
    one_of("variant", variant, VARIANTS)
    count = len(student) if variant == "paper" else student.numel() // student.shape[1]
    squared = mse_loss(widened(student), widened(fixed(teacher)), reduction="sum")
    return squared * (0.5 / count)


class FitNet(nn.Module):
    """The hint of FitNets: the teacher's hidden layer, predicted from the student's (Romero et al. 2015, eq. 3).

    ½ ‖h_T - r(h_S)‖², where r is a projector from the student's channels to the teacher's, made by ``prepare`` from
    the taps' shapes: a linear layer for (B, D), a convolution of size 1 for (B, C, T) and (B, C, H, W). Channels are
    on axis 1. Where the sizes differ, the larger map is brought to the smaller by adaptive average pooling, axis by
    axis. The teacher's side is detached. A batch of 1 will do.

    The paper sums over channels and positions; the authors' code sums over channels and averages over positions, which
    is the default here, for a weight that does not depend on the size of the map. 2 / C times it is the mean squared
    error of other libraries. Paper and code match sizes by the kernel of the regressor and give it the teacher's
    nonlinearity; here it is linear, and pooling matches the sizes. Their first stage (hints only, up to the guided
    layer) is a training with this point alone.

    Args:
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.
        projector: ``auto`` takes none where the channels agree, ``always`` makes one there too.
        variant: ``code`` or ``paper``.

    Raises:
        KdlibError: it was not prepared.
        TapError: the taps have other axes, or not the same on both sides.

    Example:
        >>> import torch
        >>> from kdlib.points.fitnet import FitNet
        >>> point, student, teacher = FitNet(), {"embedding": torch.zeros(2, 16)}, {"embedding": torch.zeros(2, 64)}
        >>> point.prepare(student, teacher, {})
        >>> point.regressor
        Linear(in_features=16, out_features=64, bias=True)
    """

    def __init__(
        self,
        *,
        tap: str = "embedding",
        teacher_tap: str | None = None,
        projector: Literal["auto", "always"] = "auto",
        variant: Literal["paper", "code"] = "code",
    ) -> None:
        super().__init__()
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.projector: Literal["auto", "always"] = projector
        self.variant: Literal["paper", "code"] = variant
        self.regressor: nn.Module | None = None

    def prepare(self, student: Taps, teacher: Taps, batch: Batch) -> None:
        """Make the projector by the taps' shapes, once."""
        if self.regressor is None:
            self.regressor = make_projector(student[self.tap], teacher[self.teacher_tap], self.projector)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        ours, theirs = same_size(student[self.tap], teacher[self.teacher_tap])
        return hint_loss(projected(self.regressor, ours), theirs, variant=self.variant)
