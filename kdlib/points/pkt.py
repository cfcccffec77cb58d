"""Probabilistic knowledge transfer: which rows are neighbours of which."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kdlib.interfaces import Batch, Taps
from kdlib.points.pairs import gram, relation_rows, unit_rows
from kdlib.points.reduction import one_of

EPS = 1e-7
"""Added inside the logarithm, as in the authors' code: opposite rows have probability 0."""


def pkt_loss(student: Tensor, teacher: Tensor, *, variant: Literal["paper", "code"] = "code") -> Tensor:
    """Return the divergence of the neighbour distributions. The settings are those of :class:`Pkt`.

    Example:
        >>> import torch
        >>> rows = torch.eye(3)
        >>> round(pkt_loss(rows, torch.ones(3, 2)).item(), 4)  # (2 log 4/3 + log 2/3) / 9
        0.0189
    """
    one_of("variant", variant, ("paper", "code"))
    q, p = (_neighbours(rows, variant) for rows in relation_rows(student, teacher))
    divergence = p * ((p + EPS) / (q + EPS)).log()
    return divergence.mean() if variant == "code" else divergence.sum()


def _neighbours(rows: Tensor, variant: str) -> Tensor:
    """Return each row's distribution over the rows."""
    similarity = (gram(unit_rows(rows)) + 1) / 2
    if variant == "paper":
        similarity = similarity.tril(-1) + similarity.triu(1)
    return similarity / similarity.sum(-1, keepdim=True).clamp(min=EPS)


class Pkt:
    """KL divergence of the rows' neighbour distributions (probabilistic knowledge transfer, Passalis and Tefas 2018).

    Σ_ij p_ij log(p_ij / q_ij), p the teacher's and q the student's, with p_ij = K(x_i, x_j) / Σ_k K(x_i, x_k) and the
    cosine kernel K(a, b) = (cos(a, b) + 1) / 2.

    No temperature and no T². The teacher's side is detached. Widths may differ; taps of any shape are flattened row by
    row. It is invariant to rotation and to the scale of each row, not to a shift. The smallest batch is 2: one row is
    its own only neighbour and gives 0, in the paper's form also two rows do.

    Args:
        variant: in the paper a row is no neighbour of itself (k, j ≠ i) and the divergence is a sum over all pairs. The
            authors' ``code`` counts the row itself, and takes the mean over B²; weights of 30000 that one meets in the
            literature are meant for it.
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.

    Example:
        >>> import torch
        >>> student, teacher = torch.eye(3), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> round(Pkt(variant="paper")({"embedding": student}, {"embedding": teacher}, {}).item(), 4)
        0.1133
    """

    def __init__(
        self,
        *,
        variant: Literal["paper", "code"] = "code",
        tap: str = "embedding",
        teacher_tap: str | None = None,
    ) -> None:
        self.variant = variant
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return pkt_loss(student[self.tap], teacher[self.teacher_tap], variant=self.variant)
