"""Mean teacher: the teacher is a moving average of the student."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kdlib.errors import KdlibError
from kdlib.interfaces import Batch, Taps
from kdlib.sources.copied import StudentCopy


class Ema(nn.Module):
    """A teacher that is the moving average of the student: mean teacher (Tarvainen and Valpola 2017, section 2).

    θ'_t = α θ'_(t-1) + (1 - α) θ_t after each optimizer step t = 1, 2, ..., from θ'_0 = θ_0, the student's weights
    when this source is made. Buffers, such as the statistics of batch norm, are copied from the student. The teacher
    sees what the student sees. Its taps carry no gradient.

    With ``warm_up`` α is min(decay, 1 - 1 / (t + 1)): the plain mean of all weights so far, until that average is
    longer than the moving one's. That is the authors' code; the paper takes a smaller α in the first part of training
    instead. In both the teacher runs in train mode, with its own dropout and batch statistics; here it runs in eval
    mode.

    State: a copy of the student and the number of steps, as buffers; it changes only in ``advance``, the same on all
    ranks since their students are the same. Cost: a forward of the student without gradient a step, and its memory.

    Args:
        student: what to average; it is copied, not kept.
        decay: α, from 0 (the student itself, in eval mode) to below 1.
        warm_up: begin with the plain mean.

    Example:
        >>> import torch, kdlib
        >>> from kdlib.sources.ema import Ema
        >>> student = kdlib.Tapped(torch.nn.Linear(4, 3), logits="")
        >>> source = Ema(student, decay=0.99)
        >>> distiller = kdlib.Distiller(student, source, soft=kdlib.SoftLabels(), hard=kdlib.HardLabels())
        >>> len(list(distiller.parameters()))
        2
    """

    steps: Tensor

    def __init__(
        self, student: nn.Module, *, decay: Annotated[float, Field(ge=0, lt=1)] = 0.999, warm_up: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise KdlibError(f"decay is from 0 to below 1, not {decay}.")
        self.decay = decay
        self.warm_up = warm_up
        self.average = StudentCopy(student)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Taps:
        """Return the average's taps for the batch."""
        taps: Taps = self.average(batch)
        return taps

    def advance(self, student: nn.Module) -> None:
        """Take the student's new weights into the average."""
        self.steps += 1
        decay = min(self.decay, 1 - 1 / (int(self.steps) + 1)) if self.warm_up else self.decay
        self.average.follow(student, 1 - decay)
