"""A whole recipe: every system on every fold, fused, counted, and written into one folder."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlib import figures, ranks
from kdlib.building import facts_of
from kdlib.errors import KdlibError, RecipeError
from kdlib.files import parse_json, read_checked, reason, write_atomically, write_json, write_sums
from kdlib.fusion import Scores, fuse
from kdlib.interfaces import DataPart, DataParts
from kdlib.metrics import confusion_matrix, macro_accuracy, wilson_interval
from kdlib.progress import silent
from kdlib.recipe import FUSED, Part, Recipe
from kdlib.recipe import LARGEST as LARGEST_RECIPE
from kdlib.registry import build
from kdlib.resuming import UNFINISHED, Keeping, begin, end, finished, refuse_other, take_up, times_resumed
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
    recipe: Recipe,
    out: Path | None = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
    every: int | None = None,
    resume: Path | None = None,
    force: bool = False,
) -> Path:
    """Train and score everything that a recipe asks for, and return the folder with the results.

    Of several ranks each calls it; rank 0 alone writes and shows, and all return the same folder.

    Args:
        recipe: see :func:`kdlib.recipe.read`.
        out: the folder to make. Default: ``runs/<name>/<UTC time>-<8 hex digits of the resolved recipe>``.
        progress: show bars.
        say: is told what begins.
        every: optimizer steps from one checkpoint to the next. Default: one at the end of each epoch.
        resume: the folder of a run that was killed, stopped or failed, to go on in; what is done is not done again, and
            the results are bit-equal to those of a run that was not interrupted.
        force: go on even if the run was made of something else; ``result.json`` says so.

    Raises:
        RecipeError: the folder is there already; or the run to resume was made of something else.
        Stopped: a signal came, and the training at work is saved.
    """
    if resume is not None and out is not None:
        raise RecipeError("A run that is resumed stays in its folder: leave out=, --out, away.")
    with silent(not progress or ranks.rank() > 0):
        if resume is not None and ranks.once(finished, resume):
            ranks.once(refuse_other, resume, recipe)
            say(f"{resume}: is finished; there is nothing left to do.")
            return resume
        with ranks.together():
            folds = make_data(recipe)
        if resume is None:
            folder = ranks.once(_made_folder, recipe, folds, out)
            keeping = Keeping(folder / UNFINISHED, every)
        else:
            folder = resume
            forced = ranks.once(partial(take_up, force=force), folder, recipe, folds)
            keeping = Keeping(folder / UNFINISHED, every, resumed=True, force=force, forced=forced)
        try:
            return _run(recipe, folds, folder, keeping, progress, say)
        except KeyboardInterrupt as stop:
            stop.add_note(f"Go on with: kdlib run --resume {folder}")
            raise


def _run(
    recipe: Recipe,
    folds: Mapping[str, DataParts],
    folder: Path,
    keeping: Keeping,
    progress: bool,
    say: Callable[[str], None],
) -> Path:
    started, cpu = time.perf_counter(), time.process_time()
    no_pictures = figures.missing()
    if no_pictures is not None:
        say(f"{no_pictures} This run goes on without.")

    collected: dict[tuple[str, str], list[tuple[str, DataPart, Scores]]] = {}
    for fold, parts in folds.items():
        for name, system_scores in _systems(recipe, fold, parts, folder, keeping, progress, say).items():
            for role, scores in system_scores.items():
                collected.setdefault((name, role), []).append((fold, parts.test, scores))
    classes = tuple(next(iter(folds.values())).classes)
    pooled = {key: _pooled(of, classes) for key, of in collected.items()}
    cpus = ranks.gathered([time.process_time() - cpu])
    result: dict[str, Any] = {
        "name": recipe.name,
        "rows": [_row(*key, of, len(classes)) for key, of in pooled.items()],
        "classes": list(classes),
        "folds": list(folds),
        "facts": facts_of(next(iter(folds.values()))),
        "spreads": _spreads(collected),
        "seconds": {"wall": time.perf_counter() - started, "cpu": sum(cpus)},
        "environment": _environment(),
    }
    skipping = [parts.skipped for parts in folds.values() if hasattr(parts, "skipped")]
    if skipping:
        result["skipped"] = dict(pair for pairs in skipping for pair in pairs)
    if keeping.resumed:
        result["resumed"] = ranks.once(times_resumed, folder)
    if keeping.forced:
        result["forced"] = keeping.forced
    ranks.once(_write_results, folder, result, pooled)
    return folder


def _made_folder(recipe: Recipe, folds: Mapping[str, DataParts], out: Path | None) -> Path:
    """Make the folder of a run, with the recipe in it."""
    now = datetime.datetime.now(datetime.UTC)
    folder = out or Path("runs") / recipe.name / f"{now:%Y%m%dT%H%M%SZ}-{recipe.digest()}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        begun = (folder / "recipe.json").exists() and not (folder / "result.json").exists()
        raise RecipeError(
            f"{folder}: is there already; a run never writes into another. Name a new --out"
            f"{', or take up with --resume what was begun there' if begun else ''}."
        ) from None
    except (OSError, ValueError) as error:
        raise KdlibError(f"{folder}: cannot be made: {reason(error)}.") from None
    begin(folder, recipe, folds)
    return folder


def _write_results(folder: Path, result: dict[str, Any], pooled: Mapping[tuple[str, str], Pooled]) -> None:
    _write_predictions(folder / "predictions.csv", pooled, tuple(result["classes"]))
    if figures.missing() is None:
        figures.draw(folder, result)
    write_json(folder / "result.json", result)
    write_sums(folder, LARGEST)
    end(folder)


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
    recipe: Recipe,
    fold: str,
    parts: DataParts,
    folder: Path,
    keeping: Keeping,
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, dict[str, Scores]]:
    """Return the test scores of every system and role on one fold, the fusion among them."""
    scores: dict[str, dict[str, Scores]] = {}
    for name in recipe.systems:
        title = " ".join(filter(None, (f"fold {fold}" if fold else "", name if len(recipe.systems) > 1 else "")))
        say(f"{title or recipe.name}: {len(parts.train)} to train on, {len(parts.test)} to test")
        kept = keeping.within(place_of(keeping.folder, fold, name))
        scores[name] = train_system(name, recipe, parts, place_of(folder, fold, name), title, progress, kept)
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
    threads, world = torch.get_num_threads(), ranks.world()
    return {"versions": found, "machine": machine, "cores": os.cpu_count(), "threads": threads, "ranks": world}
