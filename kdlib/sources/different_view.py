"""The teacher sees another view of the sample than the student."""

from __future__ import annotations

from torch import nn

from kdlib.batch import call
from kdlib.errors import TapError
from kdlib.interfaces import Batch, Taps, Teacher


class DifferentView:
    """Teacher taps for another key of the batch than the student's ``x``: clean against noisy, long against short.

    Li et al. 2017 (Large-scale domain adaptation via teacher-student learning) give the teacher the clean and the
    student the noisy recording of one utterance; Jung et al. 2018 (arXiv 1810.10884) a long and a short one. The data
    set brings both views: its items hold ``{"x": ..., key: ...}``. There is no state and no gradient.

    Args:
        teacher: a frozen model, see :func:`kdlib.freeze`.
        key: what the teacher sees: a tensor, or a tuple or mapping of them.

    Raises:
        TapError: the teacher is not frozen.
        BatchError: the batch has no such key.

    Example:
        >>> import torch, kdlib
        >>> from kdlib.sources.different_view import DifferentView
        >>> source = DifferentView(lambda x: {"logits": 2 * x}, key="clean")
        >>> source({"x": torch.zeros(1, 2), "clean": torch.ones(1, 2)})["logits"]
        tensor([[2., 2.]])
    """

    def __init__(self, teacher: Teacher, *, key: str = "teacher_x") -> None:
        if isinstance(teacher, nn.Module):
            raise TapError(f"A source wants a frozen teacher, not {type(teacher).__name__}: kdlib.freeze(model).")
        self.teacher = teacher
        self.key = key

    def __call__(self, batch: Batch) -> Taps:
        """Return the teacher's taps for its view of the batch."""
        taps: Taps = call(self.teacher, batch[self.key])
        return taps
