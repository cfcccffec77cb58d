"""Soft labels without a teacher: the true class, smoothed."""

from __future__ import annotations

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdlib.errors import KdlibError
from kdlib.interfaces import Batch, Taps
from kdlib.sources.classes import class_numbers, classes_of


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return log((1 - ε) y + ε / K), classes last, for class numbers or for probabilities with the classes last.

    Example:
        >>> import torch
        >>> smoothed(torch.tensor([1]), 2, 0.5).exp()
        tensor([[0.2500, 0.7500]])
    """
    target = labels if labels.is_floating_point() else F.one_hot(labels.long(), classes).float()
    return ((1 - smoothing) * target + smoothing / classes).log()


class LabelSmoothing:
    """Soft labels from the true class alone (Szegedy et al. 2016, section 7).

    The tap ``logits`` is log((1 - ε) y + ε / K), with y the one-hot label and K the number of classes: its softmax at
    temperature 1 is the smoothed label. A point's temperature T softens it further, to p^(1/T) scaled to sum 1. This is
    also the hand-made teacher of Yuan et al. 2020 (Tf-KD), who give the true class the probability a and each other
    (1 - a) / (K - 1): ε = (1 - a) K / (K - 1).

    Needs ``y`` in the batch: class numbers, or probabilities with the classes last. A ``mask`` is honoured. There is no
    network, no gradient and no state. With ``SoftLabels()`` it is the loss of ``HardLabels(label_smoothing=ε)``; as a
    source it can be softened, scheduled and mixed with others.

    Args:
        data: the training part, for the number of classes.
        smoothing: ε, the share that is spread over all classes, above 0 and at most 1.
        classes: K, at least 2. Default: the data's.

    Raises:
        KdlibError: the number of classes is not known.
        BatchError: a label is no class.

    Example:
        >>> import torch
        >>> from kdlib.sources.label_smoothing import LabelSmoothing
        >>> LabelSmoothing(None, smoothing=0.3, classes=3)({"y": torch.tensor([0])})["logits"].exp()
        tensor([[0.8000, 0.1000, 0.1000]])
    """

    def __init__(
        self,
        data: Any,
        *,
        smoothing: Annotated[float, Field(gt=0, le=1)] = 0.1,
        classes: Annotated[int, Field(ge=2)] | None = None,
    ) -> None:
        if not 0 < smoothing <= 1:
            raise KdlibError(f"smoothing is above 0 and at most 1, not {smoothing}.")
        self.smoothing = smoothing
        self.classes = classes_of(data, classes)

    def __call__(self, batch: Batch) -> Taps:
        """Return the smoothed labels as logits."""
        labels: Tensor = batch["y"]
        if not labels.is_floating_point():
            labels = class_numbers(labels, self.classes, batch.get("mask"))
        return {"logits": smoothed(labels, self.classes, self.smoothing)}
