"""A run taken up again: its networks, features and scorers from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kdlib.building import load_weights, make_features, make_model
from kdlib.errors import KdlibError
from kdlib.files import read_arrays, read_tensors
from kdlib.interfaces import Features, Scorer
from kdlib.recipe import Recipe, read
from kdlib.run import place_of


@dataclass(frozen=True)
class Run:
    """What a run left behind, on one fold."""

    recipe: Recipe
    classes: tuple[str, ...]
    result: dict[str, Any]
    """What ``result.json`` holds."""
    students: dict[str, nn.Module]
    """By system, in eval mode; without a source, the one network that was trained."""
    features: dict[str, Features]
    """By system, with the statistics of the training part; empty where a system has none."""
    scorers: dict[str, Scorer]
    """By system, the student's; empty where the recipe has none."""


def load_run(path: str | Path, fold: str | int | None = None) -> Run:
    """Load the students of a finished run, with what scores them.

    Args:
        path: the run's folder.
        fold: of which fold. Default: the only one.

    Raises:
        KdlibError: the folder holds no finished run, or several folds and none was named.

    Example:
        >>> import kdlib
        >>> kdlib.load_run("no/such/run")
        Traceback (most recent call last):
        kdlib.errors.KdlibError: no/such/run: no finished run; it has no result.json.
    """
    folder = Path(path)
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except OSError:
        raise KdlibError(f"{folder}: no finished run; it has no result.json.") from None
    except ValueError as error:
        raise KdlibError(f"{folder}: result.json cannot be read: {error}.") from None
    if not isinstance(result, dict) or not {"folds", "facts", "classes"} <= set(result):
        raise KdlibError(f"{folder}: result.json is not that of a run: it lacks folds, facts or classes.")
    chosen = _chosen(folder, result["folds"], fold)
    recipe = read(folder / "recipe.json")
    students: dict[str, nn.Module] = {}
    features: dict[str, Features] = {}
    scorers: dict[str, Scorer] = {}
    for name, system in recipe.systems.items():
        place = place_of(folder, chosen, name)
        network, file = (system.teacher, "teacher") if system.source is None else (system.student, "student")
        students[name] = make_model(network.model, result["facts"], network.train.seed)
        load_weights(students[name], place / f"{file}.safetensors", result["classes"])
        students[name].eval()
        if system.features is not None:
            made = make_features(system.features, result["facts"])
            made.load_state_dict(read_tensors(place / "features.safetensors")[0])
            features[name] = made
        if recipe.scorer is not None:
            scorer: Any = recipe.scorer.plugin.build
            scorers[name] = scorer.from_state(read_arrays(place / f"{file}-scorer.safetensors"))
    return Run(recipe, tuple(result["classes"]), result, students, features, scorers)


def _chosen(folder: Path, folds: list[str], fold: str | int | None) -> str:
    if fold is None and len(folds) == 1:
        return folds[0]
    if str(fold) not in folds:
        raise KdlibError(f"{folder}: name one of its folds: fold={' | '.join(folds)}.")
    return str(fold)
