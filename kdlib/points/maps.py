"""What the points on hidden layers share: precision, lengths without NaN, and maps brought to one size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdlib.errors import TapError
from kdlib.points.reduction import widened

VARIANTS = ("paper", "code")


def length(x: Tensor, dim: int = -1) -> Tensor:
    """Return the Euclidean length along an axis, kept with size 1; a zero vector has a gradient of 0, not NaN."""
    squared = x.square().sum(dim, keepdim=True)
    above = squared > 0
    return squared.where(above, 1).sqrt().where(above, 0)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """Return vectors of length 1 along an axis; a zero vector stays zero.

    Vectors are scaled by their largest entry first, so that squares neither overflow nor vanish.

    Example:
        >>> import torch
        >>> unit(torch.tensor([[0.0, -2e30], [0.0, 0.0]])).tolist()
        [[0.0, -1.0], [0.0, 0.0]]
    """
    scaled = _scaled(x, (dim,))
    size = length(scaled, dim)
    return scaled / size.where(size > 0, 1)


def by_largest(tap: Tensor) -> Tensor:
    """Return each row divided by its largest absolute entry, taken as a constant: for ideas that no scale changes."""
    return _scaled(tap, tuple(range(1, tap.dim())))


def _scaled(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    largest = x.detach().abs().amax(dims, keepdim=True)
    return x / largest.where(largest > 0, 1)


def refuse_shapes(wanted: str, *taps: Tensor, axes: tuple[int, ...] = (3, 4)) -> None:
    """Refuse taps that differ in rows or in the number of axes, or have another number of axes than wanted.

    Raises:
        TapError: with what is wanted and all shapes.
    """
    alike = len({(len(tap), tap.dim()) for tap in taps if tap.dim()}) == 1
    if not alike or any(tap.dim() not in axes for tap in taps):
        shapes = " and ".join(str(tuple(tap.shape)) for tap in taps)
        raise TapError(f"{wanted}, with as many axes and rows on both sides; the taps have shapes {shapes}.")


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two taps, widened, at the smaller size of the two, axis by axis, by adaptive average pooling.

    Raises:
        TapError: they differ in rows or axes, or are not (B, D), (B, C, T) or (B, C, H, W).
    """
    if student.shape == teacher.shape and student.dim() in (2, 3, 4):
        return widened(student), widened(teacher)
    refuse_shapes("taps to compare are (B, D), (B, C, T) or (B, C, H, W)", student, teacher, axes=(2, 3, 4))
    size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    return _averaged(widened(student), size), _averaged(widened(teacher), size)


def _averaged(tap: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(tap.shape[2:]) == size:
        return tap
    return F.adaptive_avg_pool1d(tap, size) if len(size) == 1 else F.adaptive_avg_pool2d(tap, (size[0], size[1]))
