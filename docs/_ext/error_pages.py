"""Hold the page of errors to all errors: a class without a section fails the build."""

import re
from pathlib import Path

from sphinx.errors import ExtensionError

from kdlib import errors


def missing(page: str) -> list[str]:
    """Return the error classes that the page has no section with a cause and a cure for."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.KdlibError)]
    return [
        one.__name__
        for one in classes
        if not all(word in sections.get(one.__name__, "") for word in ("\nCause\n: ", "\nCure\n: "))
    ]


def check(page: Path) -> None:
    """Refuse to build where an error is not explained."""
    if found := missing(page.read_text(encoding="utf-8")):
        raise ExtensionError(f"{page.name} lacks a section, with Cause and Cure, for {', '.join(found)}")
