"""Projectors from the student's channels to the teacher's, made by the shapes of real taps."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdlib.errors import KdlibError, TapError
from kdlib.points.maps import refuse_shapes
from kdlib.points.reduction import one_of

LAYERS: dict[int, Any] = {2: nn.Linear, 3: partial(nn.Conv1d, kernel_size=1), 4: partial(nn.Conv2d, kernel_size=1)}
"""What projects a tap of so many axes; channels are on axis 1."""


def make_projector(student: Tensor, teacher: Tensor, projector: Literal["auto", "always"] = "auto") -> nn.Module:
    """Return a module from the student's channels to the teacher's, on the student's device, in float32 or better.

    A linear layer for taps (B, D), a convolution of size 1 for (B, C, T) and (B, C, H, W), all with a bias. ``auto``
    gives the identity where the channels agree.

    Raises:
        TapError: the taps have other axes, or not the same number on both sides.

    Example:
        >>> import torch
        >>> make_projector(torch.zeros(2, 16), torch.zeros(2, 64))
        Linear(in_features=16, out_features=64, bias=True)
        >>> make_projector(torch.zeros(2, 16, 9), torch.zeros(2, 16, 4))
        Identity()
    """
    one_of("projector", projector, ("auto", "always"))
    refuse_shapes("a projector wants (B, D), (B, C, T) or (B, C, H, W)", student, teacher, axes=tuple(LAYERS))
    if projector == "auto" and student.shape[1] == teacher.shape[1]:
        return nn.Identity()
    layer: nn.Module = LAYERS[student.dim()](student.shape[1], teacher.shape[1])
    return layer.to(student.device, torch.promote_types(student.dtype, torch.float32))


def unprepared() -> KdlibError:
    """Return the error of a point that has no projector yet."""
    return KdlibError(
        "it has no projector yet: call distiller.prepare(batch) before the optimizer is made and before "
        "load_state_dict."
    )


def projected(projector: nn.Module | None, tap: Tensor) -> Tensor:
    """Return a tap through a projector.

    Raises:
        KdlibError: there is no projector yet.
        TapError: the tap has other axes or channels than the one that the projector was made for.
    """
    if projector is None:
        raise unprepared()
    if isinstance(projector, nn.Identity):
        return tap
    weight = next(projector.parameters())
    if tap.shape[1] != weight.shape[1] or tap.dim() != weight.dim():
        raise TapError(
            f"the student's tap has shape {tuple(tap.shape)}; the projector was made for {weight.shape[1]} channels "
            f"and {weight.dim()} axes."
        )
    result: Tensor = projector(tap.to(weight.dtype))
    return result
