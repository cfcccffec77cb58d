"""Reading every item of a data set once, to say what is wrong with all of them and not only with the first."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from kdlib.errors import DataError
from kdlib.progress import track

THREADS = 4
BLOCK = 1024
"""Items handed to the threads at a time: each waits as an object of more than a kilobyte."""


def unreadable(
    ids: Sequence[str], read: Callable[[str], Any], *, title: str, caught: type[Exception] = DataError
) -> dict[str, Exception]:
    """Call ``read`` once for each id, from a few threads and with a progress bar, and return what it raised.

    Args:
        ids: the names of the items, each once.
        read: reads one item; what it returns is dropped. Decoders let other threads work meanwhile.
        title: what to call it beside the bar.
        caught: errors that tell of a bad item. Others are faults and end it.

    Returns:
        The errors by id, in the order of the ids, whichever thread was faster.

    Example:
        >>> list(unreadable(["1", "x", "2"], int, title="reading", caught=ValueError))
        ['x']
    """

    def error_of(name: str) -> Exception | None:
        try:
            read(name)
        except caught as error:
            error.__traceback__ = error.__cause__ = error.__context__ = None  # their frames hold the samples
            return error
        return None

    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        blocks = (ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK))
        every = chain.from_iterable(pool.map(error_of, block) for block in blocks)
        outcomes = track(every, title, len(ids))
        return {name: error for name, error in zip(ids, outcomes, strict=True) if error is not None}
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or a fault, what has not begun does not
