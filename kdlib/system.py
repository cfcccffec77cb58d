"""One system of a recipe, trained on one split of the data: teacher, control, student, and their scores."""

from __future__ import annotations

import copy
import os
import warnings
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdlib import figures, ranks
from kdlib.batch import call
from kdlib.blocks import CacheBlock, Train
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
from kdlib.cache import fit_features
from kdlib.checkpoint import unsaved
from kdlib.data import CLEAN, Loader
from kdlib.distiller import Distiller
from kdlib.errors import RecipeError
from kdlib.featured import Featured
from kdlib.files import make_folder, require_room, write_arrays, write_atomically, write_tensors
from kdlib.fit import OPTIMIZERS, fit
from kdlib.fusion import Scores, log_softmax
from kdlib.interfaces import DataPart, DataParts, Scorer
from kdlib.metrics import confusion_matrix, most_confused
from kdlib.points import HardLabels
from kdlib.recipe import Network, Part, Recipe, System
from kdlib.registry import build
from kdlib.resuming import Keeping
from kdlib.sources import CrossFit, fold_of_groups
from kdlib.sources.parts import Rows


@dataclass(frozen=True)
class Job:
    """What the trainings of one system have in common."""

    name: str
    system: System
    data: Part
    scorer: Part | None
    parts: DataParts
    folder: Path
    title: str
    progress: bool
    keeping: Keeping
    cache: CacheBlock | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is filled into the settings of models and features."""
        return facts_of(self.parts)


def stem(role: str) -> str:
    """Return the name of the files of a role: of the rows ``without`` and ``with`` those of teacher and student."""
    return {"without": "teacher", "with": "student"}.get(role, role)


def train_system(
    name: str, recipe: Recipe, parts: DataParts, folder: Path, title: str, progress: bool, keeping: Keeping
) -> dict[str, Scores]:
    """Train what a system asks for, save it, and return the test scores by role.

    The roles: ``without`` (the teacher), ``with`` (the student), and with ``student.control`` the control, trained like
    the student but on hard labels: ``continued`` where both start from the teacher, else ``alone``.
    """
    _refuse_missing(recipe.systems[name])
    system = recipe.systems[name]
    job = Job(name, system, recipe.data, recipe.scorer, parts, folder, title, progress, keeping, recipe.cache)
    train, valid, test, features = _featured(job)
    ranks.once(make_folder, folder)
    if features is not None:
        ranks.once(write_tensors, folder / "features.safetensors", features.state_dict())

    teacher = _teacher(job, train, valid)
    _save(folder / "teacher.safetensors", teacher, parts.classes)  # now: what follows may fail
    roles, source = {"without": teacher}, None
    if system.source is not None:
        start = _start(job, teacher, train, valid)
        students, source = _students(job, teacher, start, train, valid)
        roles |= students
    scores = {}
    for role, network in roles.items():
        if role != "without":
            _save(folder / f"{stem(role)}.safetensors", network, parts.classes)
        scores[role] = _scored(job, role, network, train, test)
    if hasattr(source, "pictures") and figures.missing() is None:
        ranks.once(_draw, job, source, test, scores["without"])
    return scores


def _draw(job: Job, source: Any, test: DataPart, scores: Scores) -> None:
    """Save what a source draws of the test clips of the two classes that are confused most, if any are."""
    classes = job.parts.classes
    with figures.attempt(job.folder / f"pictures of {type(source).__name__}"):
        confusion = confusion_matrix(test.labels, scores.predicted(test.ids, classes), len(classes))
        for pair in most_confused(confusion):
            clips = Rows(test, np.flatnonzero(np.isin(test.labels, pair)))
            for name, figure in source.pictures(clips).items():
                figures.save(figure, job.folder / f"{name}.png")


def _refuse_missing(system: System) -> None:
    """Refuse a file of weights that is not there before anything is trained."""
    for key, path in (("teacher.weights", system.weights), ("student.start", system.start)):
        if isinstance(path, Path) and not os.path.isfile(path):
            raise RecipeError(f"{key}: {path}: there is no such file.")


def outputs(model: nn.Module, part: DataPart, train: Train) -> dict[str, np.ndarray]:
    """Return the taps of every clip of a part in order: clean data, eval mode. Ranks share the batches out."""
    model.eval()
    loader = Loader(part, batch=train.batch, shuffle=False, workers=train.workers, shards="batches")
    own: list[dict[str, np.ndarray]] = []
    with ranks.together(), closing(loader), torch.inference_mode():
        for batch in loader.epoch(CLEAN):
            own.append({name: tap.float().numpy() for name, tap in call(model, batch["x"]).items()})
    pieces = ranks.collected(own)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _featured(job: Job) -> tuple[DataPart, DataPart | None, DataPart, Any]:
    """Return train, valid and test through the features, which take their statistics from the training part."""
    parts, block = job.parts, job.system.features
    features: Any = None if block is None else make_features(block, job.facts)
    cache = make_cache(job.cache, block, job.facts)

    def about(name: str) -> str:
        return f"{job.title} features of {name}".strip()

    def through(part: DataPart, name: str, *, augment: bool = False) -> Featured:
        seed = job.system.teacher.train.seed
        return Featured(
            part, features, classes=parts.classes, augment=augment, seed=seed, title=about(name), cache=cache
        )

    with named(job.data, block):
        known = job.keeping.found(job.folder / "features.safetensors")
        if known is not None:
            features.load_state_dict(known[0])
        elif hasattr(features, "fit"):
            fit_features(features, parts.train, cache, about("training"))
        valid = None if parts.valid is None else through(parts.valid, "validation")
        return through(parts.train, "training", augment=True), valid, through(parts.test, "test"), features


def _teacher(job: Job, train: DataPart, valid: DataPart | None, name: str = "teacher") -> nn.Module:
    system = job.system
    teacher = make_model(system.teacher.model, job.facts, system.teacher.train.seed, job.name, "teacher")
    if system.weights is not None:
        load_weights(teacher, system.weights, job.parts.classes)
        return teacher
    teacher = _pretrained(job, name, system.teacher, teacher, train, valid)
    points = make_points(system, None, teacher, train) if system.source is None else {}
    distiller = Distiller(teacher, **(points or {"hard": HardLabels()}))
    _fit(job, name, distiller, system.teacher.train, train, valid)
    return teacher


def _start(job: Job, teacher: nn.Module, train: DataPart, valid: DataPart | None) -> nn.Module:
    """Return the network that student and control start from."""
    system = job.system
    student = make_model(system.student.model, job.facts, system.student.train.seed, job.name, "student")
    if system.start == "teacher":
        student.load_state_dict(teacher.state_dict())
    elif isinstance(system.start, Path):
        load_weights(student, system.start, job.parts.classes)
    else:
        student = _pretrained(job, "student", system.student, student, train, valid)
    return student


def _students(
    job: Job, trained: nn.Module, start: nn.Module, train: DataPart, valid: DataPart | None
) -> tuple[dict[str, nn.Module], Any]:
    """Train the control and the student, and return them with the student's source."""
    system, roles = job.system, {}
    teacher = make_teacher(copy.deepcopy(trained), system)
    student = start
    if system.cross_fit is None:  # before the control: what is refused here is refused before it is trained
        source = make_source(system, teacher, student, train)
        for part in (train, valid) if system.stored and system.control else ():
            if part is not None:
                source.dataset(part)  # compares it with its store
    if system.control:
        role = "continued" if system.start == "teacher" else "alone"
        roles[role] = copy.deepcopy(start)
        _fit(job, role, Distiller(roles[role], hard=HardLabels()), system.student.train, train, valid)
    if system.cross_fit is not None:
        source = _cross_fitted(job, system.cross_fit, student, train, valid)
    distiller = Distiller(student, source, **make_points(system, teacher, student, train))
    _fit(job, "student", distiller, system.student.train, train, valid)
    return {**roles, "with": student}, source


def _cross_fitted(job: Job, parts: int, student: nn.Module, train: DataPart, valid: DataPart | None) -> CrossFit:
    """Train one teacher without each part of the recordings, and return the source that asks the one that fits."""
    system, seed = job.system, job.system.teacher.train.seed
    folds = fold_of_groups(train.labels, train.groups, parts, seed)
    sources = []
    for part in range(parts):
        rest = Rows(train, np.flatnonzero(folds != part))
        teacher = _teacher(job, rest, valid, f"teacher-without-{part}")
        sources.append(make_source(system, make_teacher(teacher, system), student, train))
    return CrossFit(sources, train, seed=seed)


def _pretrained(
    job: Job, role: str, network: Network, model: nn.Module, train: DataPart, valid: DataPart | None
) -> nn.Module:
    """Train the preliminary model, and carry over every parameter of the same name and shape."""
    if network.pretrain is None:
        return model
    part, settings = network.pretrain
    place = "pretrain" if role == "teacher" else f"{role}-pretrain"
    first = make_model(part, job.facts, settings.seed, job.name, "pretrain")
    _fit(job, place, Distiller(first, hard=HardLabels()), settings, train, valid)
    trained, own = first.state_dict(), model.state_dict()
    carried = {name: value for name, value in trained.items() if name in own and own[name].shape == value.shape}
    if not carried:
        raise RecipeError(f"{part.at}: no weight of this model has the name and shape of one of the model to train.")
    model.load_state_dict({**own, **carried})
    new = [name for name in own if name not in carried]
    text = "".join(f"{name}\n" for name in new)
    ranks.once(write_atomically, job.folder / place / "not_carried_over.txt", text.encode())
    return model


def _fit(job: Job, role: str, distiller: Distiller, train: Train, data: DataPart, valid: DataPart | None) -> None:
    keywords = {name: getattr(train, name) for name in Train.model_fields if name != "optimizer"}
    maker = partial(OPTIMIZERS[train.optimizer.kind], **train.optimizer.keywords())
    title = f"{job.title} {role}"
    system = job.system
    ranks.once(require_room, job.folder, sum(value.nbytes for value in distiller.student.state_dict().values()))
    involved = [job.data, system.features, system.teacher.model, system.student.model, system.source]
    keeping, lost = job.keeping, unsaved(distiller)
    if lost and ranks.rank() == 0:
        warnings.warn(f"{title}: has no checkpoints: {'; '.join(lost)}. It begins anew if resumed.", stacklevel=2)
    elif not lost:
        keywords |= {"checkpoint": keeping.folder / f"{role}.safetensors", "every": keeping.every}
        keywords |= {"resume": keeping.resumed, "force": keeping.force}
    with named(*involved, *(point.part for point in system.points.values())):
        history = fit(
            distiller,
            data,
            valid=valid,
            optimizer=maker,
            lr=train.optimizer.lr,
            folder=job.folder / role,
            progress=title if job.progress else False,
            **keywords,
        )
    keeping.note(history.forced)


def _scored(job: Job, role: str, network: nn.Module, train: DataPart, test: DataPart) -> Scores:
    """Return the test scores of a network: of the scorer trained on its embeddings, or its log-softmax."""
    settings = job.system.teacher.train if role == "without" else job.system.student.train
    ids, classes = tuple(test.ids), tuple(job.parts.classes)
    kept = job.keeping.kept_scores(role, ids)
    if kept is None:
        kept = _scored_anew(job, role, network, train, test, settings, ids, classes)
        ranks.once(job.keeping.keep_scores, role, kept)
    return kept


def _scored_anew(
    job: Job,
    role: str,
    network: nn.Module,
    train: DataPart,
    test: DataPart,
    settings: Train,
    ids: tuple[str, ...],
    classes: tuple[str, ...],
) -> Scores:
    seen, unseen = outputs(network, train, settings), outputs(network, test, settings)
    if job.scorer is None:
        own, values = (log_softmax(taps["logits"]) for taps in (seen, unseen))
        return Scores(ids, classes, values, _spread(own))
    if "embedding" not in seen:
        raise RecipeError(f"{job.scorer.at}: a scorer wants the tap 'embedding'; the model gives {', '.join(seen)}.")
    with named(job.scorer):
        return ranks.once(_scored_by, job, role, job.scorer, seen["embedding"], train.labels, unseen["embedding"], ids)


def _scored_by(
    job: Job,
    role: str,
    part: Part,
    seen: np.ndarray,
    labels: np.ndarray,
    unseen: np.ndarray,
    ids: tuple[str, ...],
) -> Scores:
    """Return the scores of the scorer that is trained on a network's embeddings, and save it."""
    scorer: Scorer = build(part.plugin, part.settings, {}, {}, part.at)
    scorer.fit(seen, labels)
    write_arrays(job.folder / f"{stem(role)}-scorer.safetensors", scorer.state())
    columns = tuple(job.parts.classes[number] for number in scorer.classes_)
    return Scores(ids, columns, scorer.scores(unseen), _spread(scorer.scores(seen)))


def _spread(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std())


def _save(path: Path, network: nn.Module, classes: Any) -> None:
    """Save a network under its own names: the file loads in a program that never heard of kdlib."""
    ranks.once(write_tensors, path, network.state_dict(), {"classes": list(classes)})
