"""Values that change during training: a schedule stands wherever a weight or a temperature stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kdlib.errors import BatchError
from kdlib.interfaces import Batch
from kdlib.settings import Strict

Value = float | Callable[[int, int], float]
"""A number, or a function of (step, epoch) that gives one."""


class Schedule(Strict):
    """A value that goes from ``start`` to ``end`` and stays there.

    With u = (t - begin) / length, held between 0 and 1, where t is the epoch or the step:
    linear: start + u (end - start); cosine: end + (start - end) (1 + cos(pi u)) / 2; constant: start.

    Args:
        kind: ``linear``, ``cosine`` or ``constant``.
        start: the value up to ``begin``.
        end: the value from ``begin`` plus the length on.
        epochs: the length in epochs, at least 1.
        steps: the length in optimizer steps, at least 1. One of the two, unless the kind is constant.
        begin: the epoch or step at which the change begins, 0 or more.

    Example:
        >>> import kdlib
        >>> warm_up = kdlib.Schedule(kind="linear", start=0.0, end=1.0, epochs=4)
        >>> [warm_up(0, epoch) for epoch in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    kind: Literal["constant", "linear", "cosine"]
    start: float
    end: float | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    begin: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "constant":
            if self.end is not None or self.epochs is not None or self.steps is not None:
                raise ValueError("a constant schedule has a start and nothing else")
        elif self.end is None:
            raise ValueError(f"a {self.kind} schedule needs an end")
        elif (self.epochs is None) == (self.steps is None):
            raise ValueError(f"a {self.kind} schedule needs epochs or steps, one of the two")
        return self

    def __call__(self, step: int, epoch: int) -> float:
        """Return the value in force."""
        if self.kind == "constant" or self.end is None:
            return self.start
        now, length = (step, self.steps) if self.steps is not None else (epoch, self.epochs or 1)
        u = min(max((now - self.begin) / length, 0.0), 1.0)
        if self.kind == "cosine":
            u = (1 - math.cos(math.pi * u)) / 2
        value = (1 - u) * self.start + u * self.end
        return min(max(value, min(self.start, self.end)), max(self.start, self.end))  # rounding stays inside


@dataclass(frozen=True)
class Between:
    """A weight that holds from epoch ``first`` on and before epoch ``last``, and is 0 elsewhere."""

    weight: Value
    first: int
    last: int

    def __call__(self, step: int, epoch: int) -> float:
        """Return the weight in force."""
        return value_at(self.weight, step, epoch) if self.first <= epoch < self.last else 0.0


def value_at(value: Value, step: int, epoch: int | None) -> float:
    """Return a number, or what its schedule gives at a step and epoch; one that counts steps needs no epoch."""
    if not callable(value):
        return value
    if epoch is None and not (isinstance(value, Schedule) and value.steps is not None):
        raise BatchError("a schedule needs 'epoch' in the batch: the epoch of each row, or one number.")
    return float(value(step, -1 if epoch is None else epoch))


def value_in(value: Value, batch: Batch, name: str) -> float:
    """Return a number, or what its schedule gives at the clock that the Distiller puts into the batch."""
    if not callable(value):
        return value
    if "clock" not in batch:
        raise BatchError(f"'{name}' is a schedule and needs a clock: call the point through a kdlib.Distiller.")
    return value_at(value, *batch["clock"]())


__all__ = ["Between", "Schedule", "Value", "value_at", "value_in"]
