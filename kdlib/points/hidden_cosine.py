"""Hidden layers compared by their direction."""

from __future__ import annotations

from torch import Tensor

from kdlib.batch import same_shape
from kdlib.interfaces import Batch, Taps
from kdlib.points.maps import unit
from kdlib.points.reduction import fixed, widened


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cos(student, teacher), each row taken as one vector, averaged over rows; the teacher is detached.

    Where a vector is zero its cosine is 0: the loss of that row is 1.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [5.0, 0.0]])
        >>> cosine_distance(a, b).item()
        0.5
    """
    same_shape(student, teacher)
    ours, theirs = (unit(widened(tap).flatten(1)) for tap in (student, fixed(teacher)))
    return 1 - (ours * theirs).sum(1).mean()


class HiddenCosine:
    """One minus the cosine of the angle between the student's and the teacher's tap (Jung et al. 2018).

    mean over rows of 1 - E_S · E_T / (‖E_S‖ ‖E_T‖). From 0 to 2; only directions count, lengths do not. All axes but
    the first are one vector. The teacher's side is detached. A batch of 1 will do, and a zero row costs 1 and gives
    no NaN.

    Jung et al. 2018: Short utterance compensation in speaker verification via cosine-based teacher-student learning
    of speaker embeddings, arXiv 1810.10884.

    Args:
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.

    Raises:
        TapError: the taps differ in shape.

    Example:
        >>> import torch
        >>> from kdlib.points.hidden_cosine import HiddenCosine
        >>> HiddenCosine()({"embedding": torch.ones(2, 64)}, {"embedding": -torch.ones(2, 64)}, {}).item()
        2.0
    """

    def __init__(self, *, tap: str = "embedding", teacher_tap: str | None = None) -> None:
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return cosine_distance(student[self.tap], teacher[self.teacher_tap])
