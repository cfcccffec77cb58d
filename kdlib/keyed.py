"""Randomness as a function of a key, so that workers, ranks and resumed runs agree without shared state."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def keyed_seed(seed: int, *key: int | str) -> int:
    """Return a 63-bit seed that depends on every part of the key and on their order.

    >>> keyed_seed(0, "order", 1) == keyed_seed(0, "order", 1)
    True
    >>> keyed_seed(0, 1, 23) == keyed_seed(0, 12, 3)
    False
    """
    # operator.index: a numpy integer is the same key as the number it is.
    parts = [part if isinstance(part, str) else operator.index(part) for part in (seed, *key)]
    digest = blake2b(repr(tuple(parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed(seed: int, *key: int | str) -> torch.Generator:
    """Return a generator whose draws are a function of (seed, key) alone.

    Args:
        seed: the run's seed.
        key: what the draw is for, for example ``(epoch, index, "roll")``.

    Example:
        >>> import torch, kdlib
        >>> a = torch.rand(3, generator=kdlib.keyed(0, 1, "noise"))
        >>> b = torch.rand(3, generator=kdlib.keyed(0, 1, "noise"))
        >>> torch.equal(a, b)
        True
    """
    return torch.Generator().manual_seed(keyed_seed(seed, *key))


@contextmanager
def default_generators_keyed(device: torch.device | None, seed: int, *key: int | str) -> Iterator[None]:
    """Seed torch's default generators, of the CPU and of a CUDA device, and give the caller's state back."""
    before = torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
    drawn = keyed_seed(seed, *key)
    # Not torch.manual_seed: without CUDA it queues a call with a stack trace, for ever.
    torch.default_generator.manual_seed(drawn)
    try:
        if on_cuda is not None:
            torch.cuda.manual_seed(drawn)
        yield
    finally:
        torch.set_rng_state(before)
        if on_cuda is not None and device is not None:
            torch.cuda.set_rng_state(on_cuda, device)
