"""A run that goes on: what it is made of is compared, and what it has done is not done again."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlib import ranks
from kdlib.errors import KdlibError, RecipeError
from kdlib.files import (
    make_folder,
    parse_json,
    read_bounded,
    read_tensors,
    remove_left_over,
    write_json,
    write_tensors,
)
from kdlib.fusion import Scores
from kdlib.interfaces import DataParts
from kdlib.made_of import data_made_of, plain, refusal, surroundings
from kdlib.recipe import Recipe
from kdlib.versions import versions

UNFINISHED = "unfinished"
"""The folder in a run's folder that holds what it needs to go on; where it is gone the run is finished."""
MADE_OF = "made_of.json"
LARGEST = 64 << 20


@dataclass(frozen=True)
class Keeping:
    """Where a run keeps what it needs to go on, how often it does, and whether it goes on now."""

    folder: Path
    every: int | None = None
    """Optimizer steps from one checkpoint to the next. None: one at the end of each epoch."""
    resumed: bool = False
    force: bool = False
    forced: list[str] = field(default_factory=list)
    """A line for each difference that was forced."""

    def within(self, folder: Path) -> Keeping:
        """Return the same for a part of the run."""
        return replace(self, folder=folder)

    def note(self, lines: list[str]) -> None:
        """Note what was forced."""
        self.forced.extend(line for line in lines if line not in self.forced)

    def found(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what an earlier process of this run wrote into a file; None where a rank finds nothing to rely on."""
        if not self.resumed or self.force:
            return None
        found = None
        try:
            found = read_tensors(path) if path.exists() else None
        except KdlibError as error:
            warnings.warn(f"{error} It is made anew.", stacklevel=2)
        return found if all(ranks.gathered([found is not None])) else None

    def keep_scores(self, role: str, scores: Scores) -> None:
        """Write the scores of a network, so that a scorer is not trained again."""
        make_folder(self.folder)
        notes = {"ids": scores.ids, "classes": scores.classes, "spread": scores.spread}
        write_tensors(self.folder / f"{role}-scores.safetensors", {"values": torch.from_numpy(scores.values)}, notes)

    def kept_scores(self, role: str, ids: tuple[str, ...]) -> Scores | None:
        """Return the scores that were kept for these ids, or None."""
        found = self.found(self.folder / f"{role}-scores.safetensors")
        if found is None or tuple(found[1]["ids"]) != ids:
            return None
        mean, deviation = found[1]["spread"]
        return Scores(ids, tuple(found[1]["classes"]), found[0]["values"].numpy(), (mean, deviation))


def finished(folder: Path) -> bool:
    """Return whether a run has come to its end."""
    return os.path.exists(folder / "result.json") and not (folder / UNFINISHED).exists()


def begin(folder: Path, recipe: Recipe, folds: Mapping[str, DataParts]) -> None:
    """Write into a new folder what a run is made of, its recipe last: a folder without one is no run."""
    (folder / UNFINISHED).mkdir()
    write_json(folder / MADE_OF, {"made_of": run_made_of(recipe, folds), "resumed": 0, "forced": []})
    write_json(folder / "recipe.json", recipe.dump())


def take_up(folder: Path, recipe: Recipe, folds: Mapping[str, DataParts], *, force: bool) -> list[str]:
    """Compare an unfinished run with what would go on, and return what was forced so far.

    Raises:
        RecipeError: they differ, and it is not forced; the text names both sides of each difference.
        KdlibError: there is no run.
    """
    stated, now = _read(folder), run_made_of(recipe, folds)
    lines, text = refusal(stated["made_of"], now)
    if lines and not force:
        raise RecipeError(f"{folder}: this run is made of something else.\n{text}")
    if lines:
        write_json(folder / "recipe.json", recipe.dump())
    forced = [*stated["forced"], *(line for line in lines if line not in stated["forced"])]
    write_json(folder / MADE_OF, {"made_of": now, "resumed": stated["resumed"] + 1, "forced": forced})
    (folder / UNFINISHED).mkdir(exist_ok=True)
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        remove_left_over(place)
    return forced


def refuse_other(folder: Path, recipe: Recipe) -> None:
    """Refuse to take a finished run for the result of another recipe (RecipeError)."""
    lines, _ = refusal(_read(folder)["made_of"]["recipe"], plain(_comparable(recipe.dump())))
    if lines:
        raise RecipeError(f"{folder}: this run is finished, and its recipe is another:\n  " + "\n  ".join(lines))


def end(folder: Path) -> None:
    """Remove what was kept for going on, last of all."""
    shutil.rmtree(folder / UNFINISHED)


def times_resumed(folder: Path) -> int:
    """Return how often a run went on."""
    resumed: int = _read(folder)["resumed"]
    return resumed


def run_made_of(recipe: Recipe, folds: Mapping[str, DataParts]) -> dict[str, Any]:
    """Return what the bits of a run's results depend on, as plain data."""
    data = {
        name: {
            part: None if of is None else data_made_of(of, f"{part} part")
            for part, of in (("training", parts.train), ("validation", parts.valid), ("test", parts.test))
        }
        for name, parts in folds.items()
    }
    files = [path for system in recipe.systems.values() for path in (system.weights, system.start)]
    weights = {str(path): _digest(path) for path in files if isinstance(path, Path) and os.path.isfile(path)}
    around = surroundings()
    around["versions"] |= versions("scikit-learn", "soundfile")
    made_of = {"recipe": _comparable(recipe.dump()), "data": data, "weights": weights, **around}
    return {name: plain(value) for name, value in made_of.items()}


def _comparable(block: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Return a recipe without what changes no result: the number of loader processes, and where a cache lies."""
    idle = {("train", "workers"), ("cache", "folder")}
    return {
        key: _comparable(value, key) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if (inside, key) not in idle
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MADE_OF
    try:
        if not os.path.isfile(folder / "recipe.json"):
            raise KdlibError(f"{folder}: there is no run to resume; it has no recipe.json.")
        stated = parse_json(read_bounded(path, LARGEST))
    except ValueError as error:
        raise KdlibError(f"{path}: cannot be read, so that this run cannot be resumed: {error}.") from None
    if not isinstance(stated, dict) or not {"made_of", "resumed", "forced"} <= stated.keys():
        raise KdlibError(f"{path}: is not what a run is made of, so that this run cannot be resumed.")
    return stated
