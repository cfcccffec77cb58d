"""The processes of one job: which of them this is, and what they do together. One process is a job of its own."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from kdlib.batch import map_tensors
from kdlib.errors import RankError

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others: rank 0 may be fitting a scorer. One that died is noticed at once."""


def grouped() -> bool:
    """Return whether this process is one of a process group."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return this process's number in the process group, 0 where there is none."""
    return distributed.get_rank() if grouped() else 0


def world() -> int:
    """Return how many processes are in the process group, 1 where there is none."""
    return distributed.get_world_size() if grouped() else 1


def launched() -> tuple[int, int]:
    """Return rank and world as the process group has them, or else as torchrun set them in the environment."""
    if grouped():
        return rank(), world()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def group() -> Iterator[None]:
    """Be in the process group that torchrun's environment describes; do nothing where there is no such environment."""
    if grouped() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    except BaseException as error:
        _forget_frames(error)
        raise
    finally:
        # A DDP wrapper sits in a reference cycle. One that outlives the group holds gloo's threads, and torch then
        # aborts the process every now and then.
        gc.collect()
        distributed.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Wait for all ranks at the end, and raise on every rank what one of them raised inside.

    The first rank that failed raises its own error, the others a :class:`RankError` with the same text. Ranks must not
    wait for one another inside.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = _lowest(world() if error is None else rank(), error)
    if failed == world():
        return
    if failed == rank() and error is not None:
        text = f"rank {failed}: {type(error).__name__}: {error}"
        _broadcast(text, failed)
        raise error
    raise RankError(_broadcast(None, failed)) from error


def once(function: Callable[..., T], *args: Any) -> T:
    """Call a function on rank 0 alone, and return its result, or raise its error, on every rank."""
    result: Any = None
    with together():
        if rank() == 0:
            result = function(*args)
    return _broadcast(result, 0)  # type: ignore[no-any-return]


def gathered(items: Sequence[T]) -> list[T]:
    """Return the items of all ranks, those of rank 0 first; ranks may have different numbers of them.

    Tensors come back on the host where there are other ranks.
    """
    if world() == 1:
        return list(items)
    found: list[Any] = [None] * world()
    distributed.all_gather_object(found, map_tensors(Tensor.cpu, list(items)))
    return [item for of_rank in found for item in of_rank]


def dealt(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's items where they are dealt out like cards."""
    return items[rank() :: world()]


def collected(items: Sequence[T]) -> list[T]:
    """Return the items of all ranks in the order in which they were :func:`dealt`."""
    placed = [(place * world() + rank(), item) for place, item in enumerate(items)]
    return [item for _, item in sorted(gathered(placed), key=lambda pair: pair[0])]


def split(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's run of items where each rank has as many as the others, or one less; there may be none."""
    return items[rank() * len(items) // world() : (rank() + 1) * len(items) // world()]


def summed(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one type and device by their sums over all ranks."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    totals = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, total in zip(tensors, totals, strict=True):
        tensor.copy_(total.view_as(tensor))


def highest(number: int) -> int:
    """Return the highest number of all ranks."""
    return -_lowest(-number, None)


def _lowest(number: int, error: Exception | None) -> int:
    """Return the lowest number of all ranks."""
    if world() == 1:
        return number
    lowest = torch.tensor(number)
    try:
        distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    except RuntimeError:
        if error is not None:  # another rank is gone, which this one's error came from
            raise error from None
        raise
    return int(lowest)


def _broadcast(value: Any, source: int) -> Any:
    if world() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=source)
    return value if rank() == source else box[0]


def _forget_frames(error: BaseException | None) -> None:
    """Clear the local variables that an error's traceback keeps: a DDP wrapper may be one of them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
