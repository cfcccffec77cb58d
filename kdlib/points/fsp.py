"""The flow of the solution procedure: how two layers of one network go together."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdlib.batch import same_shape
from kdlib.errors import KdlibError
from kdlib.interfaces import Batch, Taps
from kdlib.points.maps import refuse_shapes
from kdlib.points.reduction import full_precision, widened

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Return G_ij = mean over positions of first_i · second_j, (B, C1, C2), for two taps of one network.

    Args:
        first: (B, C1), (B, C1, T) or (B, C1, H, W).
        second: the same with C2 channels. Where the sizes differ the larger is brought to the smaller by adaptive
            maximum pooling.

    Raises:
        TapError: the two differ in rows or axes.

    Example:
        >>> import torch
        >>> fsp_matrix(torch.ones(1, 2, 4), 3 * torch.ones(1, 1, 2)).tolist()
        [[[3.0], [3.0]]]
    """
    refuse_shapes("layers of an FSP matrix are (B, D), (B, C, T) or (B, C, H, W)", first, second, axes=(2, 3, 4))
    size = tuple(map(min, first.shape[2:], second.shape[2:]))
    one, other = (_peaks(widened(tap), size).flatten(2) if size else widened(tap)[..., None] for tap in (first, second))
    with full_precision(one):
        return torch.bmm(one, other.mT) / one.shape[2]


def _peaks(tap: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(tap.shape[2:]) == size:
        return tap
    return F.adaptive_max_pool1d(tap, size[0]) if len(size) == 1 else F.adaptive_max_pool2d(tap, list(size))


def fsp_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Return Σ_ij (G_T - G_S)², averaged over rows; the teacher is detached.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, 3, 4), torch.zeros(2, 5, 4)
        >>> fsp_loss((a, a[:, :2]), (a, b[:, :2])).item()
        6.0
    """
    ours, theirs = fsp_matrix(*student), fsp_matrix(*teacher).detach()
    same_shape(ours, theirs)
    return (ours - theirs).square().sum((1, 2)).mean()


class Fsp:
    """The distance of the FSP matrices of two layers (Yim et al. 2017, eq. 1 and 2).

    G_ij = mean over positions of F1_i · F2_j for two layers F1 and F2 of one network; the loss is the sum of
    (G_T - G_S)² over the matrix, averaged over rows, which is the paper's. Other libraries take the mean over the
    matrix: 1 / (C1 · C2) of this. No side is normalised; the teacher's is detached. A batch of 1 will do.

    Layers are (B, C, T), (B, C, H, W) or flat (B, D), a map of one position. Both layers of a network have one number
    of axes; where their sizes differ the larger is brought to the smaller by maximum pooling, as in the paper.
    Student and teacher may differ in size, but not in channels: the matrix has no projector. Several pairs of layers
    are several points, their weights the paper's λ.

    Args:
        taps: two taps of the student.
        teacher_taps: two taps of the teacher. Default: as ``taps``.

    Raises:
        TapError: the matrices differ in shape, or two layers in rows or axes.

    Example:
        >>> import torch
        >>> from kdlib.points.fsp import Fsp
        >>> point = Fsp(taps=["layer1", "layer2"])
        >>> taps = {"layer1": torch.ones(2, 4, 8, 8), "layer2": torch.ones(2, 6, 4, 4)}
        >>> point(taps, taps, {}).item()
        0.0
    """

    def __init__(self, *, taps: Pair, teacher_taps: Pair | None = None) -> None:
        self.taps = taps
        self.teacher_taps = taps if teacher_taps is None else teacher_taps
        if len(self.taps) != 2 or len(self.teacher_taps) != 2:
            raise KdlibError(f"FSP wants two taps a side, not {self.taps} and {self.teacher_taps}.")

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        (a, b), (c, d) = self.taps, self.teacher_taps
        return fsp_loss((student[a], student[b]), (teacher[c], teacher[d]))
