"""A data set that is made rather than found, written to disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kdlib.errors import KdlibError, RecipeError
from kdlib.files import reason
from kdlib.recipe import read_data
from kdlib.registry import registry
from kdlib.run import open_data


def make(folder: Path, kind: str, changes: list[str] | None = None) -> None:
    """Write a data set into a new folder; it is there whole or not at all.

    Args:
        folder: the folder to make.
        kind: a registered data set whose parts can ``write``.
        changes: ``"key=value"``, its settings, over those that its builder names in ``written``.

    Raises:
        RecipeError: the folder is there already, or a setting is wrong.
        KdlibError: this kind cannot be written, or the disk refuses.
    """
    if os.path.lexists(folder):
        raise RecipeError(f"{folder}: is there already. Name a new folder.")
    usual = getattr(registry().get("dataset", kind).build, "written", {})
    parts = next(iter(open_data(read_data(kind, usual, changes)).values()))
    write = getattr(parts, "write", None)
    if write is None:
        raise KdlibError(f"The data set '{kind}' cannot be made: it is read, and has no way to write itself.")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        write(beside)
        beside.rename(folder)
    except (OSError, ValueError) as error:
        raise KdlibError(f"{folder}: cannot be written: {reason(error)}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
