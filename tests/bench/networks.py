"""What the scripts measure: the two networks on noise of clips at 48 kHz, and a step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN

NETWORKS: dict[str, Any] = {"spectrogram": SpectrogramCNNGRU, "raw": WaveCNN}
BATCH = 8
RATE, WINDOW, HOP = 48_000, 4800, 1920


def network(kind: str, seed: int = 0, **settings: Any) -> nn.Module:
    """Return a network with the weights of a seed."""
    torch.manual_seed(seed)
    made: nn.Module = NETWORKS[kind](classes=10, **settings)
    return made


def clips(kind: str, count: int = BATCH, seconds: int = 10) -> Tensor:
    """Return noise of this length: waveforms less a sample, or spectrograms of 256 bands."""
    samples = RATE * seconds
    shape = (2, samples - 1) if kind == "raw" else (2, 1 + -(-(samples - WINDOW) // HOP), 256)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def laid_out(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Return both in channels_last; a waveform, which has no columns, as it is."""
    last = torch.channels_last
    return model.to(memory_format=last), x.contiguous(memory_format=last) if x.ndim == 4 else x


def training(model: nn.Module, x: Tensor, bf16: bool) -> Callable[[], object]:
    """Return a training step on hard labels with Adam."""
    labels = torch.arange(len(x)) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = cross_entropy(model(x)["logits"].float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
