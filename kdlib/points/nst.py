"""Neuron selectivity transfer: the distribution of the channels' activation patterns."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.maps import refuse_shapes, same_size, unit
from kdlib.points.reduction import fixed, full_precision, one_of

Kernel = Literal["polynomial", "linear", "gaussian"]


def selectivity_mmd(
    student: Tensor, teacher: Tensor, *, kernel: Kernel = "polynomial", degree: int = 2, constant: float = 0.0
) -> Tensor:
    """Return the squared maximum mean discrepancy of two taps' channels, averaged over rows; the teacher is detached.

    A channel of (B, C, ...) is a vector over the positions, scaled to length 1. With averages over pairs of channels:
    mean k(t, t') + mean k(s, s') - 2 mean k(s, t).

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 2.0]]])
        >>> selectivity_mmd(a, b).item(), selectivity_mmd(b[:, :1], b).item()
        (2.0, 0.0)
    """
    one_of("kernel", kernel, get_args(Kernel))
    refuse_shapes("neuron selectivity wants taps (B, C, T) or (B, C, H, W)", student, teacher)
    s, t = (unit(tap.flatten(2)) for tap in same_size(student, fixed(teacher)))
    precise = torch.promote_types(s.dtype, t.dtype)
    s, t = s.to(precise), t.to(precise)
    with full_precision(s):
        if kernel == "gaussian":
            # One width for all three terms: otherwise it is no MMD, and equal taps would not give 0.
            spread = _squared_distances(s, t).detach().mean((1, 2), keepdim=True)
            spread = spread.where(spread > 0, 1)
            tt, ss, st = (torch.exp(-_squared_distances(a, b) / (2 * spread)) for a, b in ((t, t), (s, s), (s, t)))
        else:
            power, shift = (degree, constant) if kernel == "polynomial" else (1, 0.0)
            tt, ss, st = ((torch.bmm(a, b.mT) + shift).pow(power) for a, b in ((t, t), (s, s), (s, t)))
    return (tt.mean((1, 2)) + ss.mean((1, 2)) - 2 * st.mean((1, 2))).mean()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :]
    return (lengths - 2 * torch.bmm(a, b.mT)).clamp(min=0)


class Nst:
    """The discrepancy of what the channels of a layer respond to (Huang and Wang 2017, section 4).

    Each channel of a tap (B, C, T) or (B, C, H, W) is a vector over the positions, scaled to length 1 on both sides.
    The loss is the squared maximum mean discrepancy of the student's and the teacher's channels,
    mean k(t, t') + mean k(s, s') - 2 mean k(s, t), averaged over rows. It is 0 where both have the same channels, in
    any order; their numbers need not agree. Where the sizes differ, the larger map is brought to the smaller by
    adaptive average pooling. The teacher's side is detached. A batch of 1 will do; a channel of zeros stays zero.

    ``polynomial`` (x · y + c)^d with d = 2 and c = 0 is the paper's choice, ``linear`` x · y (for it the loss is the
    distance of the mean patterns), ``gaussian`` exp(-‖x - y‖² / 2σ²) with σ² the mean squared distance of a student's
    and a teacher's channel in the row, taken as a constant. The authors' code leaves out mean k(t, t'), a constant:
    the gradient is the same. The factor λ / 2 is this point's weight.

    Args:
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.
        kernel: ``polynomial``, ``linear`` or ``gaussian``.
        degree: d of the polynomial kernel, at least 1.
        constant: c of the polynomial kernel, 0 or more.

    Raises:
        TapError: a tap has no positions, or the two differ in rows or axes.

    Example:
        >>> import torch
        >>> from kdlib.points.nst import Nst
        >>> taps = {"layer2": torch.rand(4, 8, 6, 6)}
        >>> abs(Nst(tap="layer2")(taps, {"layer2": 2 * taps["layer2"].flip(1)}, {}).item()) < 1e-6
        True
    """

    def __init__(
        self,
        *,
        tap: str,
        teacher_tap: str | None = None,
        kernel: Kernel = "polynomial",
        degree: Annotated[int, Field(ge=1)] = 2,
        constant: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.kernel: Kernel = kernel
        self.degree = degree
        self.constant = constant

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return selectivity_mmd(
            student[self.tap],
            teacher[self.teacher_tap],
            kernel=self.kernel,
            degree=self.degree,
            constant=self.constant,
        )
