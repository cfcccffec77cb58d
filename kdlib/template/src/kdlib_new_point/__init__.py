"""The point ``new_point`` for kdlib."""

from torch import Tensor

import kdlib


class NewPoint:
    """The mean absolute difference of the student's and the teacher's tap.

    mean of |E_S - E_T| over rows and columns. The teacher's side is detached.

    Args:
        tap: the tap of both sides, of one shape.
    """

    def __init__(self, *, tap: str = "embedding") -> None:
        self.tap = tap

    def __call__(self, student: kdlib.Taps, teacher: kdlib.Taps, batch: kdlib.Batch) -> Tensor:
        """Return the loss of the batch, a scalar."""
        ours, theirs = student[self.tap], teacher[self.tap].detach()
        kdlib.same_shape(ours, theirs)
        return (ours - theirs).abs().mean()


@kdlib.hookimpl
def kdlib_points() -> dict[str, type[NewPoint]]:
    """Tell kdlib the point's name in recipes."""
    return {"new_point": NewPoint}
