"""What both networks share: the width setting, the check of an input, running the blocks, and the end to taps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.utils.checkpoint import checkpoint

from kdlib import BatchError, KdlibError

EMBEDDING = 64
"""Size of Dense1 (paper, Tables 2 and 3). No width changes it, so embeddings of any two networks compare."""

SLOPE = 0.3
"""Slope of every LeakyReLU: Keras' default, and the paper used Keras."""


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """Return ``channels * width``, rounded to a multiple, at least 4.

    Raises:
        KdlibError: the width is not above 0.

    >>> scaled(30, 1.0), scaled(30, 0.25), scaled(30, 0.01)
    (30, 8, 4)
    >>> scaled(30, 1.0, 32), scaled(30, 0.01, 32)
    (32, 32)
    """
    if not width > 0:
        raise KdlibError(f"width is a factor on the numbers of channels and must be above 0, got {width}.")
    return multiple * max(math.ceil(4 / multiple), round(channels * width / multiple))


def check_input(network: str, x: Tensor, channels: int, *axes: str) -> None:
    """Check that ``x`` is a batch with these channels and that no axis is empty.

    Args:
        network: who asks, for the message.
        x: the input.
        channels: what axis 1 must be.
        axes: names of the axes after batch and channels.

    Raises:
        BatchError: another number of axes or channels, or an empty axis.
    """
    wanted = f"{network} takes (batch, {channels}, {', '.join(axes)})"
    if x.ndim != 2 + len(axes):
        raise BatchError(f"{wanted}; this input has {x.ndim} axes: {tuple(x.shape)}.")
    if x.shape[1] != channels:
        raise BatchError(f"{wanted}; this input has {x.shape[1]} channels: {tuple(x.shape)}.")
    if 0 in x.shape:
        raise BatchError(f"{wanted}; this input is empty: {tuple(x.shape)}.")


def through(blocks: Iterable[nn.Module], x: Tensor, *, checkpoint_activations: bool) -> Tensor:
    """Return what the blocks, one after the other, make of ``x``.

    Args:
        blocks: each takes and returns one tensor.
        x: the input of the first.
        checkpoint_activations: keep for the backward what goes into each block and nothing inside of it, and compute
            that again there.
    """
    for block in blocks:
        if checkpoint_activations and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))
        else:
            x = block(x)
    return x


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what a block runs in: in the forward, and when it computes again."""
    return nullcontext(), _again(block)


@contextmanager
def _again(block: nn.Module) -> Iterator[None]:
    """Let a block compute again what it has computed: its running statistics have seen the batch and stay."""
    buffers = [(module, name, buffer) for module in block.modules() for name, buffer in module.named_buffers("", False)]
    for module, name, buffer in buffers:  # writing a buffer back would count as a change of what the backward needs
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


def end(pooled: Tensor, dense1: nn.Module, output: nn.Module, *, activate: bool) -> dict[str, Tensor]:
    """Return the taps of pooled frames: Dense1 (linear unless ``activate``), then Output.

    Args:
        pooled: one vector a clip, (B, D).
        dense1: D -> 64.
        output: 64 -> K.
        activate: put a LeakyReLU(0.3) on the embedding.
    """
    embedding: Tensor = dense1(pooled)
    if activate:
        embedding = leaky_relu(embedding, SLOPE)
    return {"logits": output(embedding), "embedding": embedding}
