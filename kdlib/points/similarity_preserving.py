"""Similarity-preserving distillation: which rows excite the network alike."""

from __future__ import annotations

from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import gram, relation_rows, unit_rows


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the normalised similarities, over all pairs of rows.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(similarity_preserving_loss(rows, torch.ones(2, 3)).item(), 4)  # ((1 - √½)² + ½) / 2
        0.2929
    """
    ours, theirs = (unit_rows(gram(rows)) for rows in relation_rows(student, teacher))
    return ((theirs - ours) ** 2).mean()


class SimilarityPreserving:
    """Squared difference of the rows' similarities (similarity-preserving distillation, Tung and Mori 2019, eq. 4).

    ‖G_T - G_S‖² / B², where G is X Xᵀ of the flattened rows X (B, D), each row of G scaled to L2 length 1.

    No temperature and no T². The teacher's side is detached. Widths may differ; taps of any shape are flattened row by
    row. It is invariant to rotation and to the scale of a side as a whole, not to a shift. The smallest batch is 2: one
    row gives 0. Paper and code agree; scaling the rows of G to L1 length, as ``normalize(G, 1)`` seems to ask for and
    some copies do, is another loss of about half the size.

    Args:
        tap: the student's tap, for example the last feature map.
        teacher_tap: the teacher's tap. Default: as ``tap``.

    Example:
        >>> import torch
        >>> student, teacher = torch.ones(2, 6, 5, 5), torch.eye(2)
        >>> round(SimilarityPreserving()({"embedding": student}, {"embedding": teacher}, {}).item(), 4)
        0.2929
    """

    def __init__(self, *, tap: str = "embedding", teacher_tap: str | None = None) -> None:
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return similarity_preserving_loss(student[self.tap], teacher[self.teacher_tap])
