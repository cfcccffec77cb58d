"""What all points share: float32 or better, rows of logits, a mean over what the mask leaves, checked settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdlib.errors import BatchError, KdlibError, did_you_mean
from kdlib.interfaces import Batch

IGNORED = -100
"""The class number that torch and others take for "no label here"."""


def widened(tap: Tensor) -> Tensor:
    """Return a tap in float32 or better."""
    return tap.float() if tap.element_size() < 4 else tap


def fixed(tap: Tensor) -> Tensor:
    """Return a tap without gradient. ``detach()`` takes microseconds where there is none, too."""
    return tap.detach() if tap.requires_grad else tap


def full_precision(tap: Tensor) -> torch.autocast:
    """Return a context without autocast, for matrix products of taps that were widened."""
    return torch.autocast(tap.device.type, enabled=False)


def one_of(setting: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that would else be read as one of the known ones.

    Raises:
        KdlibError: it is not known.
    """
    if value not in known:
        raise KdlibError(f"{setting}={value!r} is unknown.{did_you_mean(str(value), known)}")


def rows_of(logits: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """Return logits with the classes on the last axis, in float32 or better, and 0 where the mask does not count.

    What the mask leaves out may be anything, NaN too: it reaches neither the loss nor a gradient.
    """
    rows = widened(logits if dim == -1 else logits.movedim(dim, -1))
    if mask is None:
        return rows
    if mask.shape != rows.shape[:-1]:
        raise BatchError(f"the mask has shape {tuple(mask.shape)}; the logits want {tuple(rows.shape[:-1])}.")
    return rows.where(mask.bool().unsqueeze(-1), 0.0)


def mean_over_batch(loss: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of a loss per position, over the positions that the mask counts; 0 where it counts none."""
    if mask is None:
        return loss.mean()
    counted = mask.to(loss.dtype)
    return (loss * counted).sum() / counted.sum().clamp(min=1)


@contextmanager
def labels_blamed(logits: Tensor, batch: Batch, dim: int) -> Iterator[None]:
    """Say of which samples the label is no class where that is why the inside fails; until then it costs nothing.

    It fails where it computes on the host. On a GPU torch stops the process with a message of its own.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        labels, classes = batch["y"], logits.shape[dim]
        wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
        if batch.get("mask") is not None:
            wrong &= batch["mask"].bool()
        rows = wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong
        if not rows.any():
            raise
        numbers = torch.as_tensor(batch["index"])[rows.cpu()] if "index" in batch else rows.nonzero().flatten()
        what = "samples" if "index" in batch else "rows of the batch"
        raise BatchError(
            f"labels that are no class: {', '.join(map(str, labels[wrong].unique().tolist()))}, of the {what} "
            f"{', '.join(map(str, numbers.tolist()))}. The logits have {classes} classes, numbered from 0."
        ) from error
