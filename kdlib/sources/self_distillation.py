"""Self-distillation: the teacher is the student as it was."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kdlib.errors import KdlibError
from kdlib.interfaces import Batch, Taps
from kdlib.sources.copied import StudentCopy


class SelfDistillation(nn.Module):
    """A teacher that is a snapshot of the student, taken anew each ``every`` optimizer steps (Yang et al. 2019).

    After step t = every, 2 every, ... the student is copied, and the copy is the teacher of the following steps. With
    ``every`` the steps of a learning rate's cycle this is Yang et al.'s snapshot distillation; with the steps of one
    epoch it is the teacher of Kim et al. 2021 (progressive self-knowledge distillation), the student of the epoch
    before. Born-again networks (Furlanello et al. 2018) begin each generation with a new student: that is one training
    a generation with :class:`kdlib.SameInput`.

    Up to the first snapshot the teacher is the student as it was when this source was made. Where that was random,
    give the soft points a weight of 0 until then: a schedule with ``begin``, or ``epochs`` in a recipe.

    The teacher sees what the student sees, in eval mode, without gradient. State: the snapshot and the number of
    steps, as buffers; it changes only in ``advance``, the same on all ranks. Cost: a forward of the student without
    gradient a step, and its memory.

    Yang et al. 2019: Snapshot distillation, CVPR. Kim et al. 2021: Self-knowledge distillation with progressive
    refinement of targets, ICCV.

    Args:
        student: what to take snapshots of; it is copied, not kept.
        every: optimizer steps from one snapshot to the next, at least 1.

    Example:
        >>> import torch, kdlib
        >>> from kdlib.sources.self_distillation import SelfDistillation
        >>> student = kdlib.Tapped(torch.nn.Linear(4, 3), logits="")
        >>> source = SelfDistillation(student, every=2)
        >>> bool(source({"x": torch.ones(1, 4)})["logits"].equal(student(torch.ones(1, 4))["logits"]))
        True
    """

    steps: Tensor

    def __init__(self, student: nn.Module, *, every: Annotated[int, Field(ge=1)] = 100) -> None:
        super().__init__()
        if every < 1:
            raise KdlibError(f"every is at least 1 step, not {every}.")
        self.every = every
        self.snapshot = StudentCopy(student)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Taps:
        """Return the snapshot's taps for the batch."""
        taps: Taps = self.snapshot(batch)
        return taps

    def advance(self, student: nn.Module) -> None:
        """Count the step, and take a snapshot where it is time."""
        self.steps += 1
        if int(self.steps) % self.every == 0:
            self.snapshot.follow(student)
