"""What a recipe's blocks become: models, features, sources and points, with what is known of the data filled in."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdlib.blocks import CacheBlock
from kdlib.cache import Cache
from kdlib.errors import KdlibError, RecipeError
from kdlib.files import read_tensors
from kdlib.fingerprints import source_of
from kdlib.interfaces import DataParts
from kdlib.keyed import default_generators_keyed
from kdlib.points import of
from kdlib.recipe import Part, System
from kdlib.registry import build
from kdlib.taps import Frozen, freeze

DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
"""What a teacher's weights and inputs are cast to, by precision."""


def facts_of(parts: DataParts) -> dict[str, Any]:
    """Return what is known of the data: ``classes``, and ``channels`` and ``rate`` where it has them."""
    facts = {"classes": len(parts.classes), "channels": None, "rate": None}
    return facts | {name: getattr(parts, name) for name in ("channels", "rate") if hasattr(parts, name)}


def make_model(part: Part, facts: Mapping[str, Any], seed: int, *key: str) -> nn.Module:
    """Build a model with weights keyed by the seed; the caller's random state is left alone."""
    with default_generators_keyed(None, seed, "weights", *key):
        model = build(part.plugin, part.settings, {}, facts, part.at)
    if not isinstance(model, nn.Module):
        raise KdlibError(f"{part.at}: the model '{part.plugin.name}' is a {type(model).__name__}, not a module.")
    return model


def make_teacher(model: nn.Module, system: System, classes: Sequence[str] | None = None) -> Frozen:
    """Make a teacher of a trained network, which runs as the recipe says."""
    how = system.inference
    layout = how.layout or system.student.train.layout
    return freeze(model, dtype=DTYPES[how.precision], layout=layout, compile=how.compile, classes=classes)


def make_features(part: Part, facts: Mapping[str, Any]) -> Any:
    """Build features, unfitted."""
    return build(part.plugin, part.settings, {}, facts, part.at)


def make_cache(block: CacheBlock | None, part: Part | None, facts: Mapping[str, Any]) -> Cache | None:
    """Build the cache of a system's features, if both are wanted."""
    if block is None or part is None:
        return None
    filled = {name: value for name, value in facts.items() if name in type(part.settings).model_fields}
    made_by = {"plugin": part.plugin.package, "builder": source_of(part.plugin.build), **part.dump(), **filled}
    return Cache(block.folder, block.dtype, made_by)


def make_source(system: System, teacher: Any, student: nn.Module | None, data: Any) -> Any:
    """Build a system's source, with the sources inside it."""

    def made(part: Part) -> Any:
        inner = {name: made(one) for name, one in part.nested.get("sources", {}).items()}
        live = {"teacher": teacher, "student": student, "data": data, "sources": inner, "points": make_nested(part)}
        return build(part.plugin, part.settings, live, {}, part.at)

    return None if system.source is None else made(system.source)


def make_nested(part: Part) -> dict[str, Any]:
    """Build the points inside of a block."""
    nested = part.nested.get("points", {})
    return {
        name: build(one.plugin, one.settings, {"points": make_nested(one)}, {}, one.at) for name, one in nested.items()
    }


def make_points(system: System, teacher: Any, student: nn.Module, data: Any) -> dict[str, Any]:
    """Build a system's points as ``name: (weight, point)``."""
    points = {}
    for name, one in system.points.items():
        live = {"teacher": teacher, "student": student, "data": data, "points": make_nested(one.part)}
        point = build(one.part.plugin, one.part.settings, live, {}, one.part.at)
        points[name] = (one.weight, point if one.teacher is None else of(one.teacher, point))
    return points


def load_weights(model: nn.Module, path: Path, classes: Sequence[str] | None = None) -> None:
    """Load weights by name.

    Raises:
        RecipeError: the file's names or shapes are not the model's, or it tells another order of classes.
    """
    tensors, notes = read_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise RecipeError(f"{path}: these weights are not of this model. {error}") from None
    if classes is not None and notes.get("classes", list(classes)) != list(classes):
        raise RecipeError(
            f"{path}: these weights are of the classes {notes['classes']}, the data's are {list(classes)}."
        )


@contextmanager
def named(*involved: Part | None) -> Iterator[None]:
    """Say in an exception which of the plugins it went through, or else which were at work."""
    try:
        yield
    except Exception as error:
        plugins = [part.plugin for part in involved if part]
        modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
        met = [plugin for plugin in plugins if getattr(plugin.build, "__module__", None) in modules]
        if met or not isinstance(error, KdlibError):
            labels = sorted({plugin.label for plugin in met or plugins})
            error.add_note(f"{'in' if met else 'at work:'} {'; '.join(labels)}")
        raise
