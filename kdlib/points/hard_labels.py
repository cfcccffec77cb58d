"""Hard labels: cross-entropy with the true class. A point like any other."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdlib.errors import BatchError
from kdlib.interfaces import Batch, Taps
from kdlib.points.reduction import IGNORED, labels_blamed, mean_over_batch, rows_of


def hard_cross_entropy(
    logits: Tensor, labels: Tensor, *, dim: int = -1, mask: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy of logits with class numbers: a sum over classes, a mean over all other axes.

    Args:
        logits: any shape, classes on ``dim``.
        labels: class numbers, shaped like the logits without ``dim``; or probabilities, shaped like the logits. A
            position with the number -100 does not count, as in torch.
        dim: the axis of the classes.
        mask: 1 where a position counts and 0 where not, shaped like the logits without ``dim``.
        label_smoothing: the share of the target spread evenly over all classes, from 0 to 1.

    Raises:
        BatchError: labels or mask do not have the shape that the logits want.

    Example:
        >>> import torch
        >>> round(hard_cross_entropy(torch.zeros(2, 10), torch.tensor([3, 4])).item(), 4)
        2.3026
    """
    rows = rows_of(logits, dim, mask)
    if labels.is_floating_point():
        targets = rows_of(labels, dim, mask).to(rows.dtype)
    else:  # what is masked may hold any number
        targets = labels.long() if mask is None else labels.long().where(mask.bool(), IGNORED)
    if (
        targets.shape not in (rows.shape, rows.shape[:-1])
        or (targets.dim() == rows.dim()) != labels.is_floating_point()
    ):
        raise BatchError(
            f"labels have shape {tuple(labels.shape)}, logits {tuple(logits.shape)}; class numbers are shaped like the "
            "logits without the axis of the classes, probabilities like the logits."
        )
    flat = targets.flatten(0, -2) if labels.is_floating_point() else targets.flatten()
    loss = F.cross_entropy(
        rows.flatten(0, -2), flat, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORED
    )
    if not labels.is_floating_point():
        mask = (targets != IGNORED) if mask is None else mask * (targets != IGNORED)
    return mean_over_batch(loss.view(rows.shape[:-1]), mask)


class HardLabels:
    """The one-hot point: minus the log-probability of the true class, averaged over the batch.

    Needs ``y`` in the batch. A ``mask`` in the batch is honoured, and so is the label -100, as in torch. Looks at no
    teacher.

    Args:
        tap: the student's logits.
        dim: the axis of the classes.
        label_smoothing: the share of the target spread evenly over all classes, from 0 to 1.

    Raises:
        BatchError: labels do not have the shape that the logits want, or are no class of theirs (on the CPU).

    Example:
        >>> import torch, kdlib
        >>> point = kdlib.HardLabels()
        >>> loss = point({"logits": torch.zeros(2, 10)}, {}, {"y": torch.tensor([3, 4])})
        >>> round(loss.item(), 4)
        2.3026
    """

    def __init__(
        self, *, tap: str = "logits", dim: int = -1, label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    ) -> None:
        self.tap = tap
        self.dim = dim
        self.label_smoothing = label_smoothing

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        logits = student[self.tap]
        with labels_blamed(logits, batch, self.dim):
            return hard_cross_entropy(
                logits, batch["y"], dim=self.dim, mask=batch.get("mask"), label_smoothing=self.label_smoothing
            )
