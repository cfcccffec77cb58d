"""A bar for what takes a while, and silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
    """Return the items, with a bar while they are used that goes away at the end; for authors of plugins.

    It writes to rich's own console, which ``kdlib run --quiet`` silences, and nothing where that is no terminal.

    Args:
        items: what to go through.
        title: what to call it beside the bar.
        total: how many there are, where ``len(items)`` does not tell.

    Example:
        >>> import kdlib
        >>> [number for number in kdlib.track(range(3), "counting")]
        [0, 1, 2]
    """
    # Imported here, as everywhere: rich draws from Python's random state when it is imported.
    from rich import get_console
    from rich.progress import track as bar

    return bar(items, title, total=total, transient=True, disable=not get_console().is_terminal)


@contextmanager
def silent(wanted: bool, *others: Console) -> Iterator[None]:
    """Silence the bars of everything below, sources and plugins too: they write to rich's own console. And others."""
    from rich import get_console

    consoles = (get_console(), *others)
    before = [console.quiet for console in consoles]
    for console in consoles:
        console.quiet = wanted or console.quiet
    try:
        yield
    finally:
        for console, was in zip(consoles, before, strict=True):
            console.quiet = was
