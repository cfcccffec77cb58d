"""A new plugin package, made from the one in ``template``: a real package whose names are replaced."""

from __future__ import annotations

import keyword
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from kdlib.errors import KdlibError
from kdlib.registry import registry

TEMPLATE = Path(__file__).parent / "template"
LITTER = shutil.ignore_patterns("__pycache__", ".*_cache")
"""What stands in the template only where its tests ran in place."""


def new_plugin(name: str, parent: Path) -> Path:
    """Write a plugin package with one point into a new folder; it is there whole or not at all.

    Args:
        name: the package's name, lower-case words joined by hyphens. The point has it without ``kdlib-``.
        parent: where the folder of that name is made.

    Raises:
        KdlibError: the name cannot be one, is taken, or the folder is there already or cannot be written.
    """
    point = _point_of(name)
    folder = parent / name
    if os.path.lexists(folder):
        raise KdlibError(f"{folder}: is there already, and is left alone. Take another name or another --parent.")
    names = {
        "kdlib-new-point": name,
        "kdlib_new_point": name.replace("-", "_"),
        "new_point": point,
        "NewPoint": "".join(word.capitalize() for word in point.split("_")),
    }
    beside = parent / f".{name}.{os.getpid()}"
    try:
        shutil.copytree(TEMPLATE, beside, ignore=LITTER)
        for path in sorted(beside.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_file():
                path.write_text(_renamed(path.read_text(encoding="utf-8"), names), encoding="utf-8")
            path.rename(path.with_name(_renamed(path.name, names)))
        beside.rename(folder)
    except OSError as error:
        raise KdlibError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _point_of(name: str) -> str:
    """Return the point's name for a package's, or refuse it."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        usable = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789")
        raise KdlibError(
            f"'{name}' cannot be the name of a package here: lower-case words joined by hyphens, a letter first."
            f"{f' For example: {usable}.' if usable else ''}"
        )
    module = name.replace("-", "_")
    point = module.removeprefix("kdlib_")
    if keyword.iskeyword(module) or not point.isidentifier():
        raise KdlibError(f"'{name}' cannot be imported as '{module}'. Take another name, for example kdlib-my-loss.")
    if find_spec(module) is not None:
        raise KdlibError(f"'{name}': a module '{module}' is installed already. Take another name.")
    taken = [one.package for one in registry().plugins() if (one.kind, one.name) == ("point", point)]
    if taken or point in registry().packages:
        owner = taken[0] if taken else point
        raise KdlibError(
            f"'{name}' would bring the point '{point}', a name that the plugin '{owner}' has. Take another name."
        )
    return point


def _renamed(text: str, names: dict[str, str]) -> str:
    return re.sub("|".join(names), lambda found: names[found[0]], text)
