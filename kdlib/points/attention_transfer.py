"""Attention transfer: where in the map a layer is active."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.maps import VARIANTS, by_largest, length, refuse_shapes, same_size, unit
from kdlib.points.reduction import fixed, one_of, widened


def attention_loss(
    student: Tensor, teacher: Tensor, *, p: int = 2, variant: Literal["paper", "code"] = "code"
) -> Tensor:
    """Return the distance of two normalised attention maps; the teacher is detached.

    The map of a tap (B, C, ...) is q = Σ_c ‖a_c‖^p, one number a position; d = q_S / ‖q_S‖ - q_T / ‖q_T‖. ``code``
    averages d² over positions and rows, ``paper`` averages the length ‖d‖ over rows.

    Raises:
        TapError: a tap has no positions.

    Example:
        >>> import torch
        >>> left, right = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> attention_loss(left, right).item(), round(attention_loss(left, right, variant="paper").item(), 4)
        (1.0, 1.4142)
    """
    one_of("variant", variant, VARIANTS)
    refuse_shapes("attention maps want taps (B, C, T) or (B, C, H, W)", student, teacher)
    maps = (by_largest(widened(tap)).abs().pow(p).mean(1, keepdim=True) for tap in (student, fixed(teacher)))
    ours, theirs = (unit(one.flatten(1)) for one in same_size(*maps))
    difference = ours - theirs
    return length(difference).mean() if variant == "paper" else difference.square().mean()


class AttentionTransfer:
    """The distance of the attention maps of one layer (Zagoruyko and Komodakis 2017, eq. 2, activation-based).

    A tap (B, C, T) or (B, C, H, W) is brought to one number a position, q = Σ_c ‖a_c‖^p, and scaled to length 1 over
    the positions, on both sides; d is the difference. The channels of the two networks need not agree, and no scale
    of a tap matters. Where the sizes differ, the larger map is brought to the smaller by adaptive average pooling.
    The teacher's side is detached. A batch of 1 will do; a map of zeros stays zero, without NaN.

    ``code`` (the authors', and the default) is the mean of d² over positions and rows, with a weight of 1000 in their
    experiments. ``paper`` is the length ‖d‖, averaged over rows, without the factor β / 2, which is this point's
    weight; where both maps agree its gradient is set to 0. Several layers are several points; the sum is eq. 2's.

    Args:
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.
        p: the power, at least 1; 2 in the paper's experiments.
        variant: ``code`` or ``paper``.

    Raises:
        TapError: a tap has no positions, or the two differ in rows or axes.

    Example:
        >>> import torch
        >>> from kdlib.points.attention_transfer import AttentionTransfer
        >>> taps = {"layer2": torch.rand(4, 8, 6, 6)}
        >>> AttentionTransfer(tap="layer2")(taps, {"layer2": 3 * taps["layer2"]}, {}).item() < 1e-12
        True
    """

    def __init__(
        self,
        *,
        tap: str,
        teacher_tap: str | None = None,
        p: Annotated[int, Field(ge=1)] = 2,
        variant: Literal["paper", "code"] = "code",
    ) -> None:
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.p = p
        self.variant: Literal["paper", "code"] = variant

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return attention_loss(student[self.tap], teacher[self.teacher_tap], p=self.p, variant=self.variant)
