"""A run taken up again: its networks, features and scorers from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.batch import call
from kdlib.building import load_weights, make_features, make_model
from kdlib.errors import KdlibError, did_you_mean
from kdlib.files import read_arrays, read_tensors
from kdlib.fusion import Scores, fuse, log_softmax
from kdlib.interfaces import Features, Scorer
from kdlib.recipe import Recipe, read
from kdlib.run import place_of, read_result
from kdlib.system import stem

ROWS = 32
"""Inputs that a network sees at once."""


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
    spreads: dict[str, tuple[float, float]]
    """By system, mean and standard deviation of the scores on the training part."""

    def scores(self, x: Tensor, system: str | None = None) -> np.ndarray:
        """Return one score a class for inputs as the data set gives them, (N, ...) -> (N, K), columns as ``classes``.

        Args:
            x: what comes before features: for clips samples (N, channels, time).
            system: the one to ask. Default: the fusion, or the only one.

        Raises:
            KdlibError: there is no such system; or there are several, the recipe fuses none, and none was named.
        """
        if system is not None and system not in self.students:
            raise KdlibError(f"The run has no system '{system}'.{did_you_mean(system, self.students)}")
        asked = list(self.students) if system is None else [system]
        each = {name: self._scores(name, x) for name in asked}
        fusion = self.recipe.fusion
        if len(each) == 1:
            fused = each[asked[0]]
        elif fusion is None:
            raise KdlibError(f"The run fuses nothing; name one of its systems: {', '.join(each)}.")
        else:
            fused = fuse(each, weights=fusion.weights, normalise=fusion.normalise)
        values = np.full((len(x), len(self.classes)), -np.inf)  # of a class that the scorer has not seen
        values[:, [self.classes.index(name) for name in fused.classes]] = fused.values
        return values

    @torch.inference_mode()
    def _scores(self, system: str, x: Tensor) -> Scores:
        pieces: dict[str, list[np.ndarray]] = {}
        for rows in torch.split(x, ROWS):
            features: Any = self.features.get(system)
            seen = rows if features is None else features(rows)
            for name, tap in call(self.students[system], seen).items():
                pieces.setdefault(name, []).append(tap.float().numpy())
        taps = {name: np.concatenate(piece) for name, piece in pieces.items()}
        ids = tuple(str(row) for row in range(len(x)))
        if system not in self.scorers:
            return Scores(ids, self.classes, log_softmax(taps["logits"]), self.spreads[system])
        scorer = self.scorers[system]
        columns = tuple(self.classes[number] for number in scorer.classes_)
        return Scores(ids, columns, scorer.scores(taps["embedding"]), self.spreads[system])


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
    result = read_result(folder, ("folds", "facts", "classes", "spreads"))
    chosen = _chosen(folder, result["folds"], fold)
    recipe = read(folder / "recipe.json")
    students: dict[str, nn.Module] = {}
    features: dict[str, Features] = {}
    scorers: dict[str, Scorer] = {}
    spreads: dict[str, tuple[float, float]] = {}
    for name, system in recipe.systems.items():
        place = place_of(folder, chosen, name)
        network, role = (system.teacher, "without") if system.source is None else (system.student, "with")
        file = stem(role)
        mean, deviation = result["spreads"][chosen][name][role]
        spreads[name] = (float(mean), float(deviation))
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
    return Run(recipe, tuple(result["classes"]), result, students, features, scorers, spreads)


def _chosen(folder: Path, folds: list[str], fold: str | int | None) -> str:
    if fold is None and len(folds) == 1:
        return folds[0]
    if folds == [""]:
        raise KdlibError(f"{folder}: this run has no folds; leave fold={fold} out.")
    if str(fold) not in folds:
        raise KdlibError(f"{folder}: name one of its folds: fold={' | '.join(folds)}.")
    return str(fold)
