"""What a recipe will cost on this machine: each training tried for a few steps, nothing kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdlib.batch import LAYOUTS, call, map_tensors
from kdlib.blocks import Train
from kdlib.building import facts_of, make_features, make_model
from kdlib.checking import Few, built
from kdlib.data import CLEAN, to_device
from kdlib.distiller import Distiller
from kdlib.featured import MEMORY
from kdlib.interfaces import DataPart, DataParts
from kdlib.place import threads_set
from kdlib.points import HardLabels
from kdlib.recipe import Part, Recipe, System
from kdlib.run import make_data
from kdlib.taps import teachers_in

TRIED = 16
"""Rows of a step that is tried; the whole batch where that is quick. With fewer, the memory that a step asks the system
for costs less than it will, and the time comes out a third too short."""
REPEATS = 3
"""Steps that are timed, after one that is not; fewer where one takes long."""
ENOUGH = 2.0
"""Seconds of timing."""
NOISE = 1 << 27
"""Bytes below which the growth of the program says little."""
COPIES = 4
"""Of each trained weight: itself, its gradient and Adam's two moments."""


class Cost(NamedTuple):
    """What one training costs."""

    system: str
    training: str
    steps: int
    step: float
    """Seconds an optimizer step."""
    seconds: float
    """In all: steps, validation, and the reading of clips that are not kept in memory."""
    memory: int
    """Bytes of weights and of a step."""


@dataclass(frozen=True)
class Estimate:
    """What a recipe costs."""

    costs: list[Cost]
    """Of one fold."""
    folds: int
    other: float
    """Seconds a fold for features that are kept, for what a teacher computes once, and for scoring."""
    kept: int
    """Bytes of clips, of features and of what a source keeps of each clip in memory, at most."""
    program: int
    """Bytes of the program itself."""

    @property
    def seconds(self) -> float:
        """All of the time."""
        return self.folds * (self.other + sum(cost.seconds for cost in self.costs))

    @property
    def memory(self) -> int:
        """The most bytes at one time."""
        return self.program + self.kept + max(cost.memory for cost in self.costs)


class _Training(NamedTuple):
    """A training of a system: what is built for it, and on how many rows."""

    name: str
    model: Part | None
    """None: the student, by its own distiller."""
    train: Train
    rows: int


def estimate(recipe: Recipe) -> Estimate:
    """Try each training of a recipe for a few steps on a few clips, and say what the whole will cost here.

    A step is tried with a few rows, or with the whole batch where that is quick, and scaled. So the answer is rough,
    and what else runs on the machine makes it larger. Early stopping is not foreseen.

    Args:
        recipe: see :func:`kdlib.recipe.read`.
    """
    folds = make_data(recipe)
    parts = next(iter(folds.values()))
    costs: list[Cost] = []
    other, kept = 0.0, _kept(parts.train)
    for name, system in recipe.systems.items():
        with threads_set(system.student.train.threads):
            own, of_fold, in_memory = _of_system(name, system, parts, recipe.cache is not None)
        costs += own
        other += of_fold
        kept += in_memory
    return Estimate(costs, len(folds), other, kept, _resident())


def _of_system(name: str, system: System, parts: DataParts, cached: bool) -> tuple[list[Cost], float, int]:
    """Return the costs of a system's trainings, the other seconds of a fold, and the bytes kept in memory."""
    few = Few(parts.train)
    train, valid, test = len(parts.train), len(parts.valid or ()), len(parts.test)
    item, size = _item(system, parts)
    fits = system.features is not None and (cached or train * size <= MEMORY)
    with torch.random.fork_rng():
        distiller, joined, batch = built(name, system, few, parts, facts_of(parts))
        forward = _forward(distiller.student.eval(), batch)
        # A source may keep in memory what its teacher makes of each clip, or load more than the student's input.
        kept = _kept(joined) * (train + valid) // len(few)
        labelling = sum(_forward(teacher, batch) for teacher in teachers_in(distiller.source)) if kept else 0.0
        drawn = 1.0 if kept else _numbers(batch) / _numbers({"x": batch["x"]})
        costs = []
        for one in _trainings(system, train):
            at_work = distiller
            if one.model is not None:
                points: Any = {"hard": HardLabels()} if system.source is not None else distiller.points
                at_work = Distiller(make_model(one.model, facts_of(parts), one.train.seed, "estimate"), **points)
            step, memory = _tried(at_work, batch, one)
            batches = -(-one.rows // one.train.batch)
            share = one.rows / (batches * one.train.batch)  # the last batch of an epoch is smaller
            read = 0.0 if fits else item * (one.rows * (drawn if at_work.source is not None else 1) + valid)
            epoch = batches * step * share + valid * forward + read
            steps = one.train.epochs * -(-batches // one.train.accumulate)
            costs.append(Cost(name, one.name, steps, step * one.train.accumulate, one.train.epochs * epoch, memory))
    networks = 1 + (system.source is not None) * (1 + system.control)
    scoring = networks * (train + test) * (forward + (0.0 if fits else item))
    reading = (train + valid + test) * item if fits else 0.0
    features = (train + valid + test) * size if fits and not cached else 0
    return costs, reading + scoring + (train + valid) * labelling, features + kept


def _trainings(system: System, rows: int) -> Iterator[_Training]:
    teachers = {"teacher": rows} if system.weights is None else {}
    if system.cross_fit is not None:
        teachers |= {
            f"teacher without part {part}": rows - rows // system.cross_fit for part in range(system.cross_fit)
        }
    for title, own in teachers.items():
        if system.teacher.pretrain is not None:
            model, train = system.teacher.pretrain
            yield _Training(f"{title}, first step", model, train, own)
        yield _Training(title, system.teacher.model, system.teacher.train, own)
    if system.source is None:
        return
    student = system.student
    if system.start == "random" and student.pretrain is not None:
        yield _Training("student, first step", *student.pretrain, rows)
    if system.control:
        yield _Training("control", student.model, student.train, rows)
    yield _Training("student", None, student.train, rows)


def _tried(distiller: Distiller, batch: Mapping[str, Any], training: _Training) -> tuple[float, int]:
    """Return the seconds of a step with a whole batch, and the bytes that it keeps."""
    wanted, there = min(training.train.batch, training.rows), len(batch["index"])
    rows = min(TRIED, wanted, there)
    seconds, kept = _step(distiller, _first(batch, rows), training.train)
    if rows < wanted <= there and seconds < 0.5:
        rows = wanted
        seconds, kept = _step(distiller, _first(batch, rows), training.train)
    weights = COPIES * sum(parameter.nbytes for parameter in distiller.parameters() if parameter.requires_grad)
    return seconds * wanted / rows, weights + kept * wanted // rows


def _step(distiller: Distiller, batch: Mapping[str, Any], train: Train) -> tuple[float, int]:
    """Return the seconds of a step, and the bytes that it needs beside the weights."""
    layout = LAYOUTS[train.layout]
    distiller.to(memory_format=layout).train()  # type: ignore[call-overload]
    moved = {**to_device(batch, torch.device("cpu"), layout), "clock": lambda: (0, 0)}
    distiller.prepare(moved)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.0)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def once() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16"):
            total = distiller(moved).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        peak = _peak(once)
    # The peak also has what kernels need for a moment; of a small network it is mostly noise.
    saved = sum(kept.values())
    return _quickest(once), max(peak, saved) if saved > NOISE else saved


def _peak(function: Callable[[], object]) -> int:
    """Return by how many bytes the program grows at most during a call, 0 where the system does not tell."""
    before = _resident()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins here
    except OSError:
        function()
        return 0
    function()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    mark = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return max(0, 1024 * int(mark) - before)


def _forward(model: Callable[..., Any], batch: Mapping[str, Any]) -> float:
    """Return the seconds that a row takes a model in eval mode."""
    rows = min(TRIED, len(batch["index"]))
    x = _first(batch, rows)["x"]
    with torch.inference_mode():
        call(model, x)
        return _quickest(lambda: call(model, x)) / rows


def _item(system: System, parts: DataParts) -> tuple[float, int]:
    """Return the seconds from a clip's file to its features, and the bytes of these."""
    features: Any = None if system.features is None else make_features(system.features, facts_of(parts))
    if hasattr(features, "fit"):
        features.fit([parts.test[CLEAN, 0]["x"]])
    rows = range(1, min(1 + TRIED, len(parts.test)))
    started = time.perf_counter()
    items = [parts.test[CLEAN, index]["x"] for index in rows]
    made = [item if features is None else features(item) for item in items]
    seconds = (time.perf_counter() - started) / max(1, len(rows))
    return seconds, max((4 * _numbers({"x": one}) for one in made), default=0)


def _quickest(function: Callable[[], object]) -> float:
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH:
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return min(taken)  # what else runs on the machine only adds


def _first(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    return {name: map_tensors(lambda tensor: tensor[:rows], value) for name, value in batch.items()}


def _numbers(batch: Mapping[str, Any]) -> int:
    """Count the floating-point numbers of a batch or an item."""
    found: list[int] = []
    map_tensors(lambda tensor: found.append(tensor.numel() if tensor.is_floating_point() else 0), batch)
    return sum(found)


def _kept(part: DataPart) -> int:
    """Return the bytes that a part says it will keep at most."""
    tells: Any = getattr(part, "memory", None)
    return 0 if tells is None else int(tells())


def _resident() -> int:
    """Return the bytes that this program holds now, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
