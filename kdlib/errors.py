"""The errors that a user can cause. Everything else is a fault of the program."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class KdlibError(Exception):
    """A user's error: its text says what is wrong, where, and what to do. The command line exits with 2."""

    @property
    def page(self) -> str:
        """The section of the documentation with cause and cure; a plugin's own error has that of its base.

        Example:
            >>> TapError("no tap").page
            'errors.html#taperror'
        """
        nearest = next(one for one in type(self).__mro__ if one.__module__ == __name__)
        return f"errors.html#{nearest.__name__.lower()}"


class TapError(KdlibError):
    """A tap is missing, did not fire, fired twice, or was changed in place."""


class BatchError(KdlibError):
    """A batch lacks a key that a point or a source needs, or has the wrong shape."""


class PluginError(KdlibError):
    """A plugin is broken, unknown, or claimed by two packages."""


class RecipeError(KdlibError):
    """A recipe has an unknown key, a bad value, or lacks a value."""


class DataError(KdlibError):
    """A data set on disk is not what its reader expects."""

    parts: Any = None
    """What its reader could make of it all the same, for ``kdlib data check`` to read on; never trained on."""


class TrainingError(KdlibError):
    """Training cannot start or cannot go on, for example at a loss that is not finite."""


class RankError(TrainingError):
    """Another process of the same job failed; the text says which, and why."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'? Known: ..." for an unknown name."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    shown = names if len(names) <= 25 else names[:20]
    listed = ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
    return f"{hint} Known: {listed or 'none'}."


def printable(text: str, keep: str = "") -> str:
    r"""Return text with what a terminal would act on, or cannot show, written as escapes.

    Args:
        text: any text; a file name may hold line ends, escape sequences, and bytes of another encoding.
        keep: characters to leave as they are.

    Example:
        >>> printable("caf\u00e9\x1b[2J\n.wav")
        'café\\x1b[2J\\n.wav'
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
