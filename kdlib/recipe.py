"""Recipes: what to train, in TOML or as a dictionary, checked against the registry and resolved to every value."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from kdlib.blocks import (
    Block,
    CacheBlock,
    Fusion,
    Inference,
    PointKeys,
    RecipeBlock,
    StudentBlock,
    SystemBlock,
    TeacherBlock,
    Train,
)
from kdlib.errors import KdlibError, PluginError, RecipeError, did_you_mean
from kdlib.files import parse_json, read_bounded, refuse_deep
from kdlib.registry import Plugin, Registry, registry
from kdlib.schedules import Between, Value
from kdlib.settings import CommandLineText, Strict, validated
from kdlib.sources import Stored

FUSED = "fusion"
"""The system under which the rows of the fusion stand."""
COLUMNS = ("epoch", "step", "lr", "total", "seconds", "waiting")
LARGEST = 1 << 19
"""Bytes of a recipe file."""
DOTTED = 300
"""Dots in a line of TOML: the time that a key takes grows with the square of its dots, or faster."""


@dataclass(frozen=True)
class Part:
    """A checked block: a plugin and its settings."""

    plugin: Plugin
    settings: Strict
    at: str
    nested: Mapping[str, Any]
    """Blocks under ``sources`` and ``points``, for a plugin that takes them as live objects."""

    def dump(self) -> Block:
        """Return the block with every value."""
        values = self.settings.model_dump(mode="json")
        paths = {name: value for name, value in self.settings if isinstance(value, Path)}
        values |= {
            name: str(path.absolute()) for name, path in paths.items()
        }  # the default of a plugin may be relative
        nested = {key: {name: part.dump() for name, part in parts.items()} for key, parts in self.nested.items()}
        return {"kind": self.plugin.name, **values, **nested}


@dataclass(frozen=True)
class PointPart:
    """A point of a system: its plugin, its weight and which of several teachers it sees."""

    part: Part
    weight: Value
    teacher: str | None
    written: Block

    def dump(self) -> Block:
        """Return the block with every value."""
        return {**self.part.dump(), **self.written}


@dataclass(frozen=True)
class Network:
    """One network to train: its model and the trainings, the preliminary one first."""

    model: Part
    train: Train
    pretrain: tuple[Part, Train] | None


@dataclass(frozen=True)
class System:
    """A system with every inheritance worked out."""

    features: Part | None
    teacher: Network
    weights: Path | None
    inference: Inference
    cross_fit: int | None
    """Teachers that label only clips of recordings that they were not trained on."""
    pretrain: Block | None
    """``teacher.pretrain`` as it was written, with every value of its training."""
    student: Network
    start: Literal["random", "teacher"] | Path
    control: bool
    source: Part | None
    points: Mapping[str, PointPart]

    @property
    def stored(self) -> bool:
        """Whether the soft labels were computed before."""
        return self.source is not None and self.source.plugin.build is Stored


@dataclass(frozen=True)
class Recipe:
    """A recipe that was checked and resolved: every value is known."""

    name: str
    data: Part
    systems: Mapping[str, System]
    scorer: Part | None
    fusion: Fusion | None
    cache: CacheBlock | None = None

    def dump(self) -> Block:
        """Return the resolved recipe as plain data; it is a recipe itself and resolves to the same."""

        def network(of: Network) -> Block:
            return {"model": of.model.dump(), "train": of.train.model_dump()}

        systems = {}
        for name, system in self.systems.items():
            weights, fits = system.weights and str(system.weights), system.cross_fit
            student = {**network(system.student), "start": str(system.start), "control": system.control}
            systems[name] = {
                "features": system.features and system.features.dump(),
                "teacher": {
                    **network(system.teacher),
                    "inference": system.inference.model_dump() if system.source else None,
                    "weights": weights,
                    "pretrain": system.pretrain,
                    "cross_fit": fits,
                },
                "student": student if system.source else None,
                "source": system.source and system.source.dump(),
                "points": {key: point.dump() for key, point in system.points.items()},
            }
        return _without_none(
            {
                "name": self.name,
                "data": self.data.dump(),
                "systems": systems,
                "scorer": self.scorer and self.scorer.dump(),
                "fusion": self.fusion and self.fusion.model_dump(),
                "cache": self.cache and self.cache.model_dump(mode="json"),
            }
        )

    def digest(self) -> str:
        """Return 8 hex digits of the resolved recipe, but for where a cache lies; an exact one changes no result."""
        block = self.dump()
        if self.cache is not None:
            del block["cache"]
            if self.cache.dtype != "float32":
                block["cache"] = {"dtype": self.cache.dtype}
        return hashlib.sha256(json.dumps(block, sort_keys=True).encode()).hexdigest()[:8]


def shipped(plugins: Registry | None = None) -> dict[str, Path]:
    """Return the recipes that come with kdlib and its plugins, in the ``recipes`` folder of each package."""
    found: dict[str, Path] = {}
    for package in ("kdlib", *_packages(plugins or registry())):
        folder = Path(str(files(package))) / "recipes"
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def _packages(plugins: Registry) -> list[str]:
    names = (getattr(plugin, "__spec__", None) for plugin in plugins.packages.values())
    return [spec.parent for spec in names if spec is not None and spec.parent]


def read(recipe: str | Path | Mapping[str, Any], changes: list[str] | None = None) -> Recipe:
    """Read, check and resolve a recipe.

    Args:
        recipe: the name of a shipped recipe, a path of a TOML or JSON file, or a dictionary.
        changes: ``"key.key=value"``, the value read as TOML, else as a string.

    Raises:
        RecipeError: with every problem found and where it stands.
        PluginError: a ``kind`` that nobody registered.

    Example:
        >>> from kdlib.recipe import read
        >>> read("digits", ["train.epochs=2"]).systems["main"].teacher.train.epochs
        2
    """
    if isinstance(recipe, Mapping):
        written, base = _plain(recipe, "the recipe"), Path.cwd()
    else:
        path = find(recipe)
        written, base = _load(path), path.resolve().parent
    for change in changes or []:
        _apply(written, change)
    return resolve(written, base)


def read_data(kind: str, settings: Mapping[str, Any], changes: list[str] | None = None) -> Part:
    """Read and check a ``[data]`` block that stands alone.

    Args:
        kind: a registered data set.
        settings: its settings.
        changes: as of :func:`read`, with or without ``data.`` before the key.

    Example:
        >>> read_data("digits", {"train": 100}, ["data.train=50"]).settings.train
        50
    """
    block: Block = {"kind": kind, **settings}
    for change in changes or []:
        _apply(block, change.removeprefix("data."))
    return _part("dataset", block, "data", Path.cwd())


def find(recipe: str | Path) -> Path:
    """Return the path of a recipe by its path or, if it is a shipped one, by its name."""
    path = Path(recipe)
    try:
        if path.suffix in (".toml", ".json") or path.is_file():
            return path
    except (OSError, ValueError) as error:
        raise RecipeError(f"No recipe named '{str(recipe)[:40]}': {error}.") from None
    known = shipped()
    if str(recipe) in known:
        return known[str(recipe)]
    raise RecipeError(f"No recipe named '{recipe}', and no file of that name.{did_you_mean(str(recipe), known)}")


def text_of(path: Path) -> str:
    """Return the text of a recipe file, of bounded size."""
    try:
        return read_bounded(path, LARGEST).decode()
    except (KdlibError, UnicodeDecodeError) as error:
        raise RecipeError(str(error) if isinstance(error, KdlibError) else f"{path}: {error}") from None


def _load(path: Path) -> Block:
    text = text_of(path)
    try:
        loaded = parse_json(text) if path.suffix == ".json" else _toml(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: a recipe is a table.")
    return loaded


def _toml(text: str) -> Block:
    if any(line.count(".") > DOTTED for line in text.split("\n")):
        raise ValueError(f"a line of a recipe has at most {DOTTED} dots")
    loaded = tomllib.loads(text)
    refuse_deep(loaded)
    return loaded


def _apply(written: Block, change: str) -> None:
    key, equals, text = change.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {change}: write it as key.key=value.")
    try:
        value = _typed(tomllib.loads(f"value = {text}")["value"])
    except (ValueError, RecursionError):  # no TOML
        value = CommandLineText(text)
    table = written
    for name in keys[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {change}: '{name}' is a value in this recipe, not a table.")
    table[keys[-1]] = value


def _plain(value: Any, at: str, depth: int = 0) -> Any:
    """Return a copy of a recipe made of dictionaries and lists; the caller's stays as it is."""
    if depth > 50:
        raise RecipeError(f"{at[:60]}...: a recipe that deep holds itself, or is none.")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"{at}: the key {key!r} is no string.")
        return {key: _plain(item, f"{at}.{key}", depth + 1) for key, item in value.items()}
    return [_plain(item, at, depth + 1) for item in value] if isinstance(value, list | tuple) else value


def _typed(value: Any) -> Any:
    """Mark the strings of a value as typed on the command line."""
    if isinstance(value, str):
        return CommandLineText(value)
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    return [_typed(item) for item in value] if isinstance(value, list) else value


def resolve(written: Mapping[str, Any], base: Path) -> Recipe:
    """Check a recipe against the registry and work out what it leaves open."""
    top = validated(RecipeBlock, written, "", base)
    own = {"features", "model", "teacher", "student", "source", "points"} & top.model_fields_set
    if top.systems and own:
        key = sorted(own)[0]
        raise RecipeError(
            f"'{key}' stands beside 'systems'; put it into one of them: systems.{next(iter(top.systems))}.{key}."
        )
    if top.systems:
        _changes(top.train, "train", base)
        systems = {
            name: _system(validated(SystemBlock, block, f"systems.{name}", base), f"systems.{name}.", top.train, base)
            for name, block in top.systems.items()
        }
    else:
        systems = {"main": _system(top, "", {}, base)}
    if top.fusion is not None:
        if FUSED in systems:
            raise RecipeError(f"systems.{FUSED}: rows of the fusion are called so; name the system otherwise.")
        if len(systems) < 2:
            raise RecipeError("fusion: there is one system; fusion wants two or more under 'systems'.")
        for name in top.fusion.weights:
            if name not in systems:
                raise RecipeError(f"fusion.weights.{name}: no such system.{did_you_mean(name, systems)}")
        if not any(top.fusion.weights.get(name, 1.0) for name in systems):
            raise RecipeError("fusion.weights: all are 0.")
    if top.cache is not None and all(system.features is None for system in systems.values()):
        raise RecipeError("cache: no system has features, and there is nothing to keep.")
    return Recipe(
        name=top.name,
        data=_part("dataset", top.data, "data", base),
        systems=systems,
        scorer=None if top.scorer is None else _part("scorer", top.scorer, "scorer", base),
        fusion=top.fusion,
        cache=top.cache,
    )


def _system(block: SystemBlock, at: str, train: Block, base: Path) -> System:
    train = _over(train, _changes(block.train, f"{at}train", base))
    pretrain = block.teacher.pretrain
    first: Train | None = None
    if pretrain is not None:  # of the teacher's settings; a student is pre-trained the same way
        place = f"{at}teacher.pretrain.train"
        own = _over(train, _changes(block.teacher.train, f"{at}teacher.train", base))
        merged = _over(own, _changes(pretrain.train, place, base))
        first = validated(Train, merged, place, base)

    def network(role: TeacherBlock | StudentBlock, place: str) -> Network:
        written = _changed(block.model, role.model)
        if written is None:
            raise RecipeError(f"{place}.model: required, and not given (nor {at}model for both).")
        own = _part("model", written, f"{place}.model", base)  # first: its slips are its own
        before = None
        if pretrain is not None and first is not None:
            model = _part("model", {**written, **pretrain.model}, f"{at}teacher.pretrain.model", base)
            before = (model, first)
        merged = _over(train, _changes(role.train, f"{place}.train", base))
        return Network(
            model=own,
            train=validated(Train, merged, f"{at}train", base),
            pretrain=before,
        )

    teacher = network(block.teacher, f"{at}teacher")
    student = teacher if block.source is None else network(block.student, f"{at}student")
    if block.student.start == "teacher" and student.model.dump() != teacher.model.dump():
        raise RecipeError(
            f"{at}student.start: the student can start from the teacher's weights where both are the same model; here "
            f"{at}teacher.model and {at}student.model differ. Take start = 'random'."
        )
    points = {name: _point(name, point, f"{at}points.{name}", base) for name, point in block.points.items()}
    if block.source is not None and not points:
        raise RecipeError(f"{at}points: a system with a source needs a point, for example kind = 'soft_labels'.")
    if block.source is None and block.teacher.cross_fit is not None:
        raise RecipeError(f"{at}teacher.cross_fit: there is no source; cross-fitted teachers label for a student.")
    if block.source is None and "inference" in block.teacher.model_fields_set:
        raise RecipeError(f"{at}teacher.inference: there is no source; it is for a teacher that labels for a student.")
    if block.teacher.weights is not None and block.teacher.cross_fit is not None:
        raise RecipeError(
            f"{at}teacher.cross_fit: its teachers are trained here, each without a part of the recordings; those of "
            f"{at}teacher.weights were trained elsewhere. Leave one of the two out."
        )
    if block.source is None and block.student.model_fields_set - {"model", "train"}:
        raise RecipeError(f"{at}source: required for a student. Without it one network is trained, the teacher.")
    source = None if block.source is None else _part("source", _seeded(block.source, student), f"{at}source", base)
    _refuse_stored(source, block.teacher.weights, at)
    return System(
        features=None if block.features is None else _part("features", block.features, f"{at}features", base),
        teacher=teacher,
        weights=block.teacher.weights,
        inference=block.teacher.inference,
        cross_fit=block.teacher.cross_fit,
        pretrain=None if pretrain is None or first is None else {"model": pretrain.model, "train": first.model_dump()},
        student=student,
        start=block.student.start,
        control=block.student.control,
        source=source,
        points=points,
    )


def _refuse_stored(source: Part | None, weights: Path | None, at: str) -> None:
    """Refuse stored soft labels where the teacher would be another than theirs, or where they are mixed with others."""
    if source is None:
        return
    if source.plugin.build is Stored and weights is None:
        raise RecipeError(
            f"{at}teacher.weights: required. The source '{source.plugin.name}' has the labels of a teacher that was "
            "trained before: name the teacher.safetensors of the run that they were built from. It is compared with "
            "theirs, and scored."
        )
    for inner in source.nested.get("sources", {}).values():
        if inner.plugin.build is Stored:
            raise RecipeError(
                f"{inner.at}: stored soft labels stand alone in a recipe; mix sources when they are built."
            )
        _refuse_stored(inner, weights, at)


def _seeded(source: Block, student: Network) -> Block:
    """Return a source's block with the seed of the training, if it has one and none was written."""
    kind = source.get("kind")
    known = isinstance(kind, str) and kind in registry().names("source")
    if known and "seed" in registry().get("source", str(kind)).settings.model_fields:
        return {"seed": student.train.seed, **source}
    return source


def _changed(block: Block | None, override: Block | None) -> Block | None:
    """Return a model block with an override's settings, or the override where it is of another kind."""
    if block is None or override is None:
        return override if block is None else block
    return {**block, **override} if override.get("kind", block.get("kind")) == block.get("kind") else override


def _over(train: Block, changes: Block) -> Block:
    """Return training settings with single keys changed, single settings of the optimizer too."""
    merged = {**train, **changes}
    if isinstance(train.get("optimizer"), dict) and isinstance(changes.get("optimizer"), dict):
        merged["optimizer"] = _changed({"kind": "adam", **train["optimizer"]}, changes["optimizer"])
    return merged


def _changes(block: Block, at: str, base: Path) -> Block:
    """Return a table of training settings, checked where it stands; what it leaves open may stand elsewhere."""
    validated(Train, {"epochs": 1, **block}, at, base)
    return block


def _part(kind: str, block: Any, at: str, base: Path) -> Part:
    if not isinstance(block, Mapping):
        raise RecipeError(f"{at}: expected a table with a 'kind', got {block!r}.")
    plugins = registry()
    name = block.get("kind")
    if not isinstance(name, str):
        raise RecipeError(f"{at}.kind: required. Registered: {', '.join(plugins.names(kind)) or 'none'}.")
    try:
        plugin = plugins.get(kind, name)
    except PluginError as error:
        raise PluginError(f"{at}.kind: {error}") from None
    nested = {}
    for key, inner in (("sources", "source"), ("points", "point")):
        if key in plugin.live:
            blocks = block.get(key)
            if not isinstance(blocks, Mapping) or not blocks:
                raise RecipeError(f"{at}.{key}: required: a table of {inner}s, name = {{ kind = ... }}.")
            nested[key] = {own: _part(inner, item, f"{at}.{key}.{own}", base) for own, item in blocks.items()}
    settings = {key: value for key, value in block.items() if key != "kind" and key not in nested}
    beside = ["kind", *(PointKeys.model_fields if kind == "point" else ())]
    return Part(plugin, validated(plugin.settings, settings, at, base, beside), at, nested)


def _point(name: str, block: Block, at: str, base: Path) -> PointPart:
    if name in COLUMNS:
        raise RecipeError(f"{at}: a column of the log is called so; name the point otherwise.")
    if not name.isidentifier():
        raise RecipeError(f"{at}: the name of a point is letters, digits and underscores.")
    shared = {key: value for key, value in block.items() if key in PointKeys.model_fields}
    keys = validated(PointKeys, shared, at, base)
    part = _part("point", {key: value for key, value in block.items() if key not in shared}, at, base)
    weight: Value = keys.weight
    if keys.epochs is not None:
        if keys.epochs[0] >= keys.epochs[1]:
            raise RecipeError(f"{at}.epochs: from the first to before the second; {keys.epochs} is no range.")
        weight = Between(weight, *keys.epochs)
    return PointPart(part, weight, keys.teacher, keys.model_dump(mode="json"))


def _without_none(table: Mapping[str, Any]) -> Block:
    """Return a table without the values that are None, which TOML cannot say."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }
