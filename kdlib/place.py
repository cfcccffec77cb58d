"""Where and how a forward runs: device, memory layout, precision and threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdlib.data import to_device
from kdlib.distiller import Losses
from kdlib.errors import TrainingError
from kdlib.interfaces import Batch

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Place:
    """Where and how a forward runs."""

    device: torch.device
    layout: torch.memory_format
    precision: str

    def batch(self, batch: Batch) -> dict[str, Any]:
        """Return a batch that is here."""
        return to_device(batch, self.device, self.layout)

    def module(self, module: nn.Module) -> None:
        """Move a module here."""
        module.to(self.device).to(memory_format=self.layout)  # type: ignore[call-overload]

    def autocast(self) -> torch.autocast:
        """Return a context in which a forward has this precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self, distiller: nn.Module, batch: Mapping[str, Any]) -> Losses:
        """Return a distiller's losses of a batch that is here."""
        with self.autocast():
            losses: Losses = distiller(batch)
        return losses


def device_of(device: str | torch.device) -> torch.device:
    """Return a device that can be used, ``auto`` as CUDA where there is one, or raise a TrainingError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return place


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Give torch so many threads for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
