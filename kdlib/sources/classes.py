"""What sources without a teacher network know of the classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlib.errors import BatchError, KdlibError


def classes_of(data: Any, classes: int | None) -> int:
    """Return the number of classes: as given, else of the data's names, else one more than its largest label.

    Raises:
        KdlibError: nothing tells it, or the data says otherwise.
    """
    names = getattr(data, "classes", None)
    if classes is not None:
        if names is not None and len(names) != classes:
            raise KdlibError(f"classes={classes}, and the data has {len(names)}: {', '.join(map(str, names))}.")
        return classes
    if names is not None:
        return len(names)
    labels = getattr(data, "labels", None)
    if labels is None:
        raise KdlibError("The number of classes is not known: the data has neither 'classes' nor 'labels'.")
    return int(np.max(labels)) + 1


def class_numbers(labels: Tensor, classes: int, mask: Tensor | None = None) -> Tensor:
    """Return class numbers, checked; what the mask leaves out may hold any number, and becomes 0.

    Raises:
        BatchError: a number is below 0 or not below ``classes``.
    """
    numbers = labels if mask is None else labels.where(mask.bool(), torch.zeros_like(labels))
    least, largest = (int(numbers.min()), int(numbers.max())) if numbers.numel() else (0, 0)
    if least < 0 or largest >= classes:
        raise BatchError(f"labels are from {least} to {largest}; there are {classes} classes.")
    return numbers
