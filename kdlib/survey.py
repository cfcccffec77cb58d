"""A data set looked through before anything is trained: every fold opened, every item read, every problem told."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdlib.data import CLEAN
from kdlib.errors import DataError, KdlibError, printable
from kdlib.interfaces import DataPart, DataParts
from kdlib.reading import unreadable
from kdlib.recipe import Part, read_data
from kdlib.registry import registry
from kdlib.run import open_data

SHOWN = 5
"""How many names of a group are spelled out."""
NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Survey:
    """What a data set holds and what is wrong with it; true where nothing is."""

    refusal: str
    """What its reader said of the layout, or nothing."""
    folds: Mapping[str, DataParts]
    read: int
    """Items that were read, each once."""
    bad: Mapping[str, str]
    """Reasons by id."""
    advice: Mapping[str, Any]
    """Settings under which the bad items could be read too, as far as it is known."""

    def __bool__(self) -> bool:
        return not self.refusal and not self.bad

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.refusal:
            yield printable(self.refusal, keep="\n")
        if self.bad:
            yield f"{len(self.bad)} of {self.read} clips cannot be read:"
        yield from listed(self.bad)
        yield from _holdings(self.folds)
        if self.advice:
            changes = " ".join(f"--set {name}={json.dumps(value)}" for name, value in self.advice.items())
            yield f"the settings that would read it: {changes}"


def survey(kind: str, settings: Mapping[str, Any], changes: list[str] | None = None) -> Survey:
    """Open every fold of a data set and read each of its items once, as it is, from a few threads.

    Args:
        kind: a registered data set.
        settings: its settings; ``fold`` is ``"all"`` and ``keep_in_memory`` false, if it has them and none are given.
        changes: ``"key=value"``, over the settings.

    Raises:
        RecipeError: a setting that there is not, or a bad value.
        PluginError: a kind that nobody registered.
    """
    known = registry().get("dataset", kind).settings.model_fields
    whole = {name: value for name, value in {"fold": "all", "keep_in_memory": False}.items() if name in known}
    part = read_data(kind, {**whole, **settings}, changes)
    refusal, folds = _opened(part)
    items: dict[str, tuple[DataPart, int]] = {}
    for parts in folds.values():
        for one in _parts(parts):
            for index, name in enumerate(one.ids):
                items.setdefault(name, (one, index))

    def read(name: str) -> None:
        one, index = items[name]
        one[CLEAN, index]

    errors = unreadable(list(items), read, title="reading clips", caught=Exception)
    skipped = dict(pair for parts in folds.values() for pair in getattr(parts, "skipped", ()))
    return Survey(
        refusal=refusal,
        folds=folds,
        read=len(items) + len(skipped),
        bad=skipped | {name: reason_of(name, error) for name, error in errors.items()},
        advice=_advice(part, folds, list(errors.values()), len(items) - len(errors)),
    )


def grouped(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Return the ids that share a reason, most first; numbers may differ, and those that do read "...".

    Example:
        >>> grouped({"a": "9 samples, not 16", "b": "12 samples, not 16", "c": "empty"})
        [('... samples, not 16', ['a', 'b']), ('empty', ['c'])]
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        alike[NUMBER.sub("#", reason)].append(name)
    found = []
    for names in sorted(alike.values(), key=len, reverse=True):
        pieces = zip(*(NUMBER.split(reasons[name]) for name in names), strict=True)
        found.append(("".join(piece[0] if len(set(piece)) == 1 else "..." for piece in pieces), names))
    return found


def listed(reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines that tell ids by reason, some of those that share one."""
    for place, (reason, names) in enumerate(grouped(reasons), start=1):
        yield f"{place}. {printable(reason)} ({len(names)}):"
        yield from (f"     {printable(name)}" for name in names[:SHOWN])
        if len(names) > SHOWN:
            yield f"     and {len(names) - SHOWN} more"


def reason_of(name: str, error: Exception) -> str:
    """Return what an error says, without the path that ends in the name."""
    text = str(error) if isinstance(error, KdlibError) else f"{type(error).__name__}: {error}"
    _, found, after = text.partition(f"{name}: ")
    return after if found else text


def _opened(part: Part) -> tuple[str, dict[str, DataParts]]:
    """Return what the reader has against the layout, and the folds as far as they can be read."""
    try:
        return "", open_data(part)
    except DataError as error:
        parts = error.parts
        folds = {str(fold): of for fold, of in parts.items()} if isinstance(parts, Mapping) else {"": parts}
        return str(error), folds if parts is not None else {}


def _parts(parts: DataParts) -> list[DataPart]:
    return [part for part in (parts.train, parts.valid, parts.test) if part is not None]


def _advice(part: Part, folds: Mapping[str, DataParts], errors: Sequence[Exception], fine: int) -> dict[str, Any]:
    advise = next((parts.advice for parts in folds.values() if hasattr(parts, "advice")), None)
    settings = advise(errors, fine) if advise and errors else {}
    return {name: value for name, value in settings.items() if getattr(part.settings, name, None) != value}


def _holdings(folds: Mapping[str, DataParts]) -> Iterator[str]:
    """Yield what there is: the parts of each fold, then the recordings of each class over all of them."""
    ids: set[str] = set()
    recordings: dict[str, set[str]] = {}
    for fold, parts in folds.items():
        counts = f"{len(parts.train)} to train on, {len(parts.test)} to test"
        valid = "" if parts.valid is None else f", {len(parts.valid)} to validate"
        yield f"{f'fold {fold}: ' if fold else ''}{counts}{valid}"
        for one in _parts(parts):
            ids.update(one.ids)
            for label, group in zip(one.labels.tolist(), one.groups, strict=True):
                recordings.setdefault(parts.classes[label], set()).add(group)
    if recordings:
        sizes = [len(groups) for groups in recordings.values()]
        spread = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
        yield f"{len(ids)} clips, {len(sizes)} classes, {spread} recordings a class"
