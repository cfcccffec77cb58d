"""The processes of one job: which of them this is, and what they do together. One process is a job of its own."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from kdlib.batch import map_tensors
from kdlib.errors import RankError

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others: rank 0 may be fitting a scorer. One that died is noticed at once."""
LOST = (
    "rank {rank}: another process of the job is gone. Its own message says why, or the list in which torchrun "
    "tells how each ended."
)
_alone: ContextVar[bool] = ContextVar("alone", default=False)
"""Whether rank 0 does something by itself, for which it is a job of its own."""


def grouped() -> bool:
    """Return whether this process is one of a process group, and not alone for the moment (:func:`once`)."""
    return distributed.is_available() and distributed.is_initialized() and not _alone.get()


def rank() -> int:
    """Return this process's number in the process group, 0 where there is none."""
    return distributed.get_rank() if grouped() else 0


def world() -> int:
    """Return how many processes are in the process group, 1 where there is none."""
    return distributed.get_world_size() if grouped() else 1


def launched() -> tuple[int, int]:
    """Return rank and world of the job, inside of :func:`once` too, and where torchrun's group was not entered."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def group() -> Iterator[None]:
    """Be in the process group that torchrun's environment describes; do nothing where there is no such environment.

    Raises:
        RankError: another rank is gone; torch's own errors say that in several ways.
    """
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
        if _is_loss(error):
            raise RankError(LOST.format(rank=rank())) from error
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
    """Call a function on rank 0, and return its result, or raise its error, on every rank.

    Inside it rank 0 is a job of its own: what is shared out elsewhere it does whole.
    """
    result: Any = None
    with together():
        if rank() == 0:
            before = _alone.set(True)
            try:
                result = function(*args)
            finally:
                _alone.reset(before)
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


def mapped(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the function's results in order, each computed on one rank, and pickled on the way to the others."""
    with together():
        own = [function(item) for number, item in enumerate(items) if number % world() == rank()]
    return collected(own)


def split(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's run of items where each rank has as many as the others, or one less; there may be none."""
    return items[rank() * len(items) // world() : (rank() + 1) * len(items) // world()]


def summed(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one type and device by their sums over all ranks."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    _put_back(flat, tensors)


def level(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of rank 0."""
    if world() == 1:
        return
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for some in alike.values():
        flat = torch.cat([tensor.flatten() for tensor in some])
        distributed.broadcast(flat, src=0)
        _put_back(flat, some)


def _put_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Give tensors the values that stand one after the other in a flat one."""
    for tensor, values in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


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


def _is_loss(error: BaseException) -> bool:
    """Return whether an error of torch says that the connection to another rank broke."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _forget_frames(error: BaseException | None) -> None:
    """Clear the local variables that an error's traceback keeps: a DDP wrapper may be one of them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
