"""A whole recipe: every system on every fold, fused, counted, and written into one folder."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlib import figures
from kdlib.building import facts_of
from kdlib.errors import KdlibError, RecipeError
from kdlib.files import parse_json, read_checked, reason, write_atomically, write_json, write_sums
from kdlib.fusion import Scores, fuse
from kdlib.interfaces import DataPart, DataParts
from kdlib.metrics import confusion_matrix, macro_accuracy, wilson_interval
from kdlib.recipe import FUSED, Part, Recipe
from kdlib.recipe import LARGEST as LARGEST_RECIPE
from kdlib.registry import build
from kdlib.system import train_system
from kdlib.versions import versions

LARGEST = {"recipe.json": LARGEST_RECIPE, "result.json": 1 << 26}
"""Bytes of the files of a run that are read again, but for the networks."""
ROLES = ("without", "continued", "alone", "with")


@dataclass(frozen=True)
class Pooled:
    """The test scores of one system and role, over all folds."""

    ids: list[str]
    folds: list[str]
    labels: np.ndarray
    predicted: np.ndarray


def run(
    recipe: Recipe, out: Path | None = None, *, progress: bool = True, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Train and score everything that a recipe asks for, and return the folder with the results.

    Args:
        recipe: see :func:`kdlib.recipe.read`.
        out: the folder to make. Default: ``runs/<name>/<UTC time>-<8 hex digits of the resolved recipe>``.
        progress: show bars.
        say: is told what begins.

    Raises:
        RecipeError: the folder is there already.
    """
    with _quiet(not progress):
        return _run(recipe, out, progress, say)


def _run(recipe: Recipe, out: Path | None, progress: bool, say: Callable[[str], None]) -> Path:
    started, cpu = time.perf_counter(), time.process_time()
    now = datetime.datetime.now(datetime.UTC)
    folder = out or Path("runs") / recipe.name / f"{now:%Y%m%dT%H%M%SZ}-{recipe.digest()}"
    folds = make_data(recipe)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise RecipeError(f"{folder}: is there already; a run never writes into another. Name a new --out.") from None
    except (OSError, ValueError) as error:
        raise KdlibError(f"{folder}: cannot be made: {reason(error)}.") from None
    write_json(folder / "recipe.json", recipe.dump())
    no_pictures = figures.missing()
    if no_pictures is not None:
        say(f"{no_pictures} This run goes on without.")

    collected: dict[tuple[str, str], list[tuple[str, DataPart, Scores]]] = {}
    for fold, parts in folds.items():
        for name, system_scores in _systems(recipe, fold, parts, folder, progress, say).items():
            for role, scores in system_scores.items():
                collected.setdefault((name, role), []).append((fold, parts.test, scores))
    classes = tuple(next(iter(folds.values())).classes)
    pooled = {key: _pooled(of, classes) for key, of in collected.items()}
    result = {
        "name": recipe.name,
        "rows": [_row(*key, of, len(classes)) for key, of in pooled.items()],
        "classes": list(classes),
        "folds": list(folds),
        "facts": facts_of(next(iter(folds.values()))),
        "spreads": _spreads(collected),
        "seconds": {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu},
        "environment": _environment(),
    }
    skipping = [parts.skipped for parts in folds.values() if hasattr(parts, "skipped")]
    if skipping:
        result["skipped"] = dict(pair for pairs in skipping for pair in pairs)
    _write_predictions(folder / "predictions.csv", pooled, classes)
    write_json(folder / "result.json", result)
    write_sums(folder, LARGEST)
    if no_pictures is None:
        figures.draw(folder, result)
    return folder


def read_result(folder: Path, wanted: Collection[str]) -> dict[str, Any]:
    """Return what ``result.json`` of a finished run holds; it and ``recipe.json`` are compared with their checksums.

    Raises:
        KdlibError: there is none, one of the two is damaged, or it is not that of a run, for it lacks a wanted key.
    """
    if not os.path.exists(folder / "result.json"):
        raise KdlibError(f"{folder}: no finished run; it has no result.json.")
    try:
        result = parse_json(read_checked(folder, LARGEST)["result.json"])
    except ValueError as error:
        raise KdlibError(f"{folder}: result.json cannot be read: {error}.") from None
    lacking = set(wanted) - set(result if isinstance(result, dict) else ())
    if lacking:
        raise KdlibError(f"{folder}: result.json is not that of a run: it lacks {', '.join(sorted(lacking))}.")
    return dict(result)


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Silence the bars of everything below, sources and plugins too: they write to rich's own console."""
    from rich import get_console

    console = get_console()
    before, console.quiet = console.quiet, quiet or console.quiet
    try:
        yield
    finally:
        console.quiet = before


def make_data(recipe: Recipe) -> dict[str, DataParts]:
    """Build the data set of a recipe: its folds by name, or one split named ''."""
    return open_data(recipe.data)


def open_data(part: Part) -> dict[str, DataParts]:
    """Build a data set: its folds by name, or one split named ''."""
    data = build(part.plugin, part.settings, {}, {}, part.at)
    folds = {str(fold): parts for fold, parts in data.items()} if isinstance(data, Mapping) else {"": data}
    if len({tuple(parts.classes) for parts in folds.values()}) != 1:
        raise RecipeError(f"{part.at}: the folds do not have the same classes.")
    return folds


def place_of(folder: Path, fold: str, system: str) -> Path:
    """Return where the files of a system stand in a run's folder."""
    return folder / f"fold-{fold}" / system if fold else folder / system


def _systems(
    recipe: Recipe, fold: str, parts: DataParts, folder: Path, progress: bool, say: Callable[[str], None]
) -> dict[str, dict[str, Scores]]:
    """Return the test scores of every system and role on one fold, the fusion among them."""
    scores: dict[str, dict[str, Scores]] = {}
    for name in recipe.systems:
        title = " ".join(filter(None, (f"fold {fold}" if fold else "", name if len(recipe.systems) > 1 else "")))
        say(f"{title or recipe.name}: {len(parts.train)} to train on, {len(parts.test)} to test")
        scores[name] = train_system(name, recipe, parts, place_of(folder, fold, name), title, progress)
    if recipe.fusion is not None:
        settings = recipe.fusion
        common = [role for role in ROLES if all(role in of for of in scores.values())]
        scores[FUSED] = {
            role: fuse(
                {name: scores[name][role] for name in recipe.systems},
                weights=settings.weights,
                normalise=settings.normalise,
            )
            for role in common
        }
    return {name: {role: of[role] for role in ROLES if role in of} for name, of in scores.items()}


def _pooled(of: list[tuple[str, DataPart, Scores]], classes: tuple[str, ...]) -> Pooled:
    """Return the predictions of all folds."""
    ids: list[str] = []
    folds: list[str] = []
    labels, predicted = [], []
    for fold, test, scores in of:
        ids += test.ids
        folds += [fold] * len(test)
        labels.append(test.labels)
        predicted.append(scores.predicted(test.ids, classes))
    return Pooled(ids, folds, np.concatenate(labels), np.concatenate(predicted))


def _spreads(collected: Mapping[tuple[str, str], list[tuple[str, DataPart, Scores]]]) -> dict[str, Any]:
    """Return mean and standard deviation of each network's training scores, for a fusion by z-norm later on."""
    spreads: dict[str, Any] = {}
    for (system, role), of in collected.items():
        for fold, _, scores in of:
            if system != FUSED:
                spreads.setdefault(fold, {}).setdefault(system, {})[role] = list(scores.spread)
    return spreads


def _row(system: str, role: str, pooled: Pooled, classes: int) -> dict[str, Any]:
    confusion = confusion_matrix(pooled.labels, pooled.predicted, classes)
    correct, total = int(confusion.trace()), int(confusion.sum())
    return {
        "system": system,
        "role": role,
        "correct": correct,
        "total": total,
        "accuracy": correct / total,
        "macro": macro_accuracy(confusion),
        "interval": list(wilson_interval(correct, total)),
        "confusion": confusion.tolist(),
    }


def _write_predictions(path: Path, pooled: Mapping[tuple[str, str], Pooled], classes: tuple[str, ...]) -> None:
    writer = csv.writer(text := io.StringIO(newline=""))
    writer.writerow(["system", "role", "fold", "id", "label", "predicted"])
    for (system, role), of in pooled.items():
        for row in zip(of.folds, of.ids, of.labels.tolist(), of.predicted.tolist(), strict=True):
            writer.writerow([system, role, row[0], row[1], classes[row[2]], classes[row[3]]])
    write_atomically(path, text.getvalue().encode())


def _environment() -> dict[str, Any]:
    """Return what bits depend on beside the recipe."""
    found = {"python": platform.python_version()}
    found |= versions("kdlib-asc", "torch", "numpy", "scikit-learn", "soundfile")
    machine = f"{platform.system()} {platform.machine()}"
    return {"versions": found, "machine": machine, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
