"""Batches and taps as mappings that say what they lack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from kdlib.errors import BatchError, TapError, did_you_mean
from kdlib.interfaces import Batch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHARE = "share"
"""The key of a batch by whose value a rank's loss is multiplied: see :class:`kdlib.Loader`."""


class NamedTaps(dict[str, Tensor]):
    """Taps of one side. A missing one is an error that names the side and the taps there are."""

    __slots__ = ("side",)

    def __init__(self, taps: Mapping[str, Tensor], side: str) -> None:
        super().__init__(taps)
        self.side = side

    @classmethod
    def of(cls, taps: Mapping[str, Tensor], side: str) -> NamedTaps:
        """Return the taps themselves where they are named so already."""
        return taps if isinstance(taps, cls) and taps.side == side else cls(taps, side)

    def __missing__(self, name: str) -> NoReturn:
        raise TapError(f"the {self.side} has no tap '{name}'.{did_you_mean(name, self)}")


class NamedBatch(dict[str, Any]):
    """A batch. A missing key is an error that names the keys there are."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        if not isinstance(batch, Mapping):
            raise BatchError(
                f"A batch is a mapping with 'x', not a {type(batch).__name__}. Make one: kdlib.as_batch((x, y))."
            )
        super().__init__(batch)

    def __missing__(self, name: str) -> NoReturn:
        raise BatchError(f"the batch has no '{name}'.{did_you_mean(name, self.keys() - {'clock'})}")


def as_batch(batch: Any) -> Batch:
    """Turn an ``(x, y)`` pair into the mapping ``{"x": x, "y": y}``; a mapping stays as it is.

    Raises:
        BatchError: it is neither.

    Example:
        >>> import kdlib
        >>> sorted(kdlib.as_batch((1, 2)))
        ['x', 'y']
    """
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return {"x": batch[0], "y": batch[1]}
    raise BatchError(
        f"A batch is a mapping with 'x', or a pair (x, y), not {type(batch).__name__}. "
        'Make one: {"x": inputs, "y": labels}.'
    )


def borrowed(batch: Batch) -> bool:
    """Return whether a batch's rows are another rank's, for this one has none: what counts rows leaves it out."""
    return batch.get(SHARE) == 0


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse a student's and a teacher's tap of different shapes, naming both; for authors of points.

    Raises:
        TapError: the shapes differ.

    Example:
        >>> import torch, kdlib
        >>> kdlib.same_shape(torch.zeros(2, 3), torch.zeros(2, 4))
        Traceback (most recent call last):
        kdlib.errors.TapError: the student's tap has shape (2, 3), the teacher's (2, 4); they must be equal.
    """
    if student.shape != teacher.shape:
        raise TapError(
            f"the student's tap has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; "
            "they must be equal."
        )


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a nest of mappings, tuples and lists with the function applied to its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(function, item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def layout_of(tensor: Tensor, layout: torch.memory_format) -> torch.memory_format:
    """Return the layout in which a tensor goes into a network: images (four axes) in ``layout``, others as they are."""
    return layout if tensor.dim() == 4 and tensor.is_floating_point() else torch.preserve_format


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nest of mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def call(model: Any, x: Any) -> Any:
    """Call a model with what a batch holds under ``x``: a tensor, or a tuple or mapping of arguments."""
    if isinstance(x, Tensor):
        return model(x)
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)
