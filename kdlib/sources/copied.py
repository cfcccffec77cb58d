"""A copy of the student that is a teacher: nobody trains it, and it is saved with the source that holds it."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from kdlib.batch import call
from kdlib.interfaces import Batch, Taps


class StudentCopy(nn.Module):
    """A copy of a student, always in eval mode, with its weights as buffers: saved, and in no ``parameters()``.

    Args:
        student: what to copy, with the weights that it has now.

    Example:
        >>> import torch
        >>> held = StudentCopy(torch.nn.Linear(4, 3))
        >>> list(held.parameters()), sorted(held.state_dict())
        ([], ['model.bias', 'model.weight'])
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(student)
        kept: dict[Tensor, Tensor] = {}  # tied weights stay tied
        for module in self.model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, kept.setdefault(parameter, parameter.detach()))
        # Recurrent layers hold a list of their weights: have it made anew.
        self.model._apply(lambda tensor: tensor)  # type: ignore[no-untyped-call]
        self.train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Taps:
        """Return the copy's taps for ``batch["x"]``, without gradient."""
        taps: Taps = call(self.model, batch["x"])
        return taps

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whoever asks."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, share: float = 1.0) -> None:
        """Move each weight by ``share`` of the way to the student's, and copy the student's buffers."""
        weights = dict(student.named_parameters(remove_duplicate=False))
        buffers = dict(student.named_buffers(remove_duplicate=False))
        for name, own in self.model.named_buffers():  # each tensor once
            if name in weights and own.is_floating_point():
                own.lerp_(weights[name].to(own), share)
            else:
                own.copy_(buffers[name] if name in buffers else weights[name])
