"""A recipe looked over: everything is built and tried on one batch, nothing is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kdlib.building import (
    facts_of,
    load_weights,
    make_cache,
    make_features,
    make_model,
    make_points,
    make_source,
    make_teacher,
    named,
)
from kdlib.cache import Cache, fit_features
from kdlib.data import Loader, changes
from kdlib.distiller import Distiller
from kdlib.featured import Featured
from kdlib.interfaces import Batch, DataPart, DataParts
from kdlib.points import HardLabels
from kdlib.recipe import Recipe, System
from kdlib.report import Report
from kdlib.run import make_data
from kdlib.sources import Stored
from kdlib.sources.parts import Alike
from kdlib.sources.stored import KEY

LOOKED_AT = 64
"""Clips of the training part that a check reads."""


def check(recipe: Recipe) -> Iterator[tuple[str, Report]]:
    """Yield a title and a report for each system, with networks as they are before training, or a teacher's weights."""
    parts = next(iter(make_data(recipe).values()))
    facts = facts_of(parts)
    for name, system in recipe.systems.items():
        with named(recipe.data, system.features, system.source):
            if system.stored:  # soft labels of the whole part, and of no other
                cache = make_cache(recipe.cache, system.features, facts)
                distiller, _, batch = built(name, system, parts.train, parts, facts, cache)
            else:
                distiller, _, batch = built(name, system, Few(parts.train), parts, facts)
        report = distiller.prepare(batch).check(batch)
        report.rows = [row for row in report.rows if row[1] != "optimizer"]  # the training makes and attaches it
        yield name, report


def built(
    name: str,
    system: System,
    some: DataPart,
    parts: DataParts,
    facts: Mapping[str, Any],
    cache: Cache | None = None,
) -> tuple[Distiller, DataPart, Batch]:
    """Return a system's distiller, what it trains on and a batch of that; stored soft labels of few are any."""
    features: Any = None if system.features is None else make_features(system.features, facts)
    if hasattr(features, "fit"):
        fit_features(features, some, cache)
    seed = system.teacher.train.seed
    train: Any = Featured(some, features, classes=parts.classes, augment=True, seed=seed, cache=cache)
    student = make_model(system.student.model, facts, system.student.train.seed, name, "student")
    if system.source is None:
        points = make_points(system, None, student, train) or {"hard": HardLabels()}
        distiller = Distiller(student, **points)
    else:
        trained = make_model(system.teacher.model, facts, system.teacher.train.seed, name, "teacher")
        if system.weights is not None:
            load_weights(trained, system.weights, parts.classes)
        teacher = make_teacher(trained, system)
        source = make_source(system, teacher, student, train)
        distiller = Distiller(student, source, **make_points(system, teacher, student, train))
        if isinstance(source, Stored) and isinstance(some, Few):
            train = Alike(train, partial(_of_first, train))
        elif hasattr(source, "dataset"):
            train = source.dataset(train)
    size = min(system.student.train.batch, len(some))
    return distiller, train, next(Loader(train, batch=size, keyed=True).epoch(0))


def _of_first(part: DataPart, key: tuple[int, int]) -> Mapping[str, Any]:
    return {**part[key], KEY: 0}


class Few:
    """Some clips of each class of a part, as a part: enough to try everything."""

    def __init__(self, part: DataPart) -> None:
        self.part = part
        self.augmented = changes(part)
        turn = np.empty(len(part), dtype=np.int64)
        for label in np.unique(part.labels):
            own = np.flatnonzero(part.labels == label)
            seen: Counter[str] = Counter()
            nth = []
            for index in own.tolist():  # places take turns, for sources that want clips from different ones
                nth.append(seen[part.groups[index]])
                seen[part.groups[index]] += 1
            turn[own[np.argsort(nth, kind="stable")]] = np.arange(len(own))
        self._chosen = np.sort(np.argsort(turn, kind="stable")[:LOOKED_AT]).tolist()
        self.labels: np.ndarray = part.labels[self._chosen]
        self.groups: Sequence[str] = [part.groups[index] for index in self._chosen]
        self.ids: Sequence[str] = [part.ids[index] for index in self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        return {**self.part[epoch, self._chosen[index]], "index": index}
