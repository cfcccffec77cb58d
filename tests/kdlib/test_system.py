"""One system of a recipe: where teacher and student come from, how they are trained, and what each may see."""

import copy
import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

import kdlib
from kdlib.building import make_model
from kdlib.checking import check
from kdlib.digits import digits
from kdlib.files import write_tensors
from kdlib.recipe import read
from kdlib.registry import registry
from kdlib.run import run
from kdlib.sources import CrossFit, fold_of_groups
from kdlib.system import outputs, stem

MLP = {"kind": "digits_mlp", "width": 12}
STILL = {"optimizer": {"kind": "sgd", "lr": 1e-30}}
"""Training settings that leave every weight as it is."""
POINTS = {
    "soft": {"kind": "soft_labels", "weight": 0.9, "temperature": 2.0},
    "hard": {"kind": "hard_labels", "weight": 0.1},
}
BASE = {
    "data": {"kind": "digits"},
    "train": {"epochs": 2, "batch": 50, "threads": 1, "optimizer": {"lr": 0.01}},
    "model": MLP,
    "source": {"kind": "same_input"},
    "points": POINTS,
}


class Steps(nn.Module):
    """A network of which only the first layer is the same with and without its second step."""

    def __init__(self, *, classes: int, width: int = 12, second: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        if second:
            self.second = nn.Linear(width, 9)
            self.output = nn.Linear(9, classes)
        else:
            self.first_output = nn.Linear(width, classes)

    def forward(self, x):
        hidden = torch.relu(self.norm(self.first(x)))
        last = torch.relu(self.second(hidden)) if hasattr(self, "second") else hidden
        return {
            "logits": self.output(last) if hasattr(self, "second") else self.first_output(hidden),
            "embedding": last,
        }


class Spying:
    """A source that remembers what it was given."""

    seen = None

    def __init__(self, teacher, data, student=None, *, gain: float = 1.0) -> None:
        Spying.seen = {"teacher": teacher, "data": data, "student": student}
        self.teacher = teacher

    def __call__(self, batch):
        return self.teacher(batch["x"])


class Twice:
    """Two teachers: the one there is, under two names, the second turned round in its classes."""

    def __init__(self, teacher, sources) -> None:
        self.teacher, self.sources = teacher, sources

    def __call__(self, batch):
        taps = self.sources["inner"](batch)
        return {"a.logits": taps["logits"], "b.logits": taps["logits"].flip(-1)}


class SpyingPoint:
    """A point that remembers what it was given."""

    seen = None

    def __init__(self, data, student, teacher) -> None:
        SpyingPoint.seen = {"teacher": teacher, "data": data, "student": student}

    def __call__(self, student, teacher, batch):
        return cross_entropy(student["logits"], batch["y"])


class Sum(nn.Module):
    """A point made of points."""

    def __init__(self, points) -> None:
        super().__init__()
        self.points = points

    def forward(self, student, teacher, batch):
        return sum(point(student, teacher, batch) for point in self.points.values())


class Odd(RuntimeError):
    """What a plugin of somebody raises."""


def raising(*arguments, **keywords):
    raise Odd("the dog ate it")


class OddModel(Steps):
    """Its forward raises."""

    forward = raising


class OddFeatures(nn.Module):
    """Its call raises."""

    time_axis = -1
    forward = raising


class OddFit(nn.Module):
    """Its statistics raise."""

    time_axis = -1
    fit = raising

    def forward(self, samples):
        return samples


class OddScorer:
    """Its fit raises."""

    fit = raising


class OddPart(kdlib.TensorPart):
    """Its items raise."""

    __getitem__ = raising


def odd_data():
    whole = digits()
    return kdlib.Parts(OddPart(whole.train.x, whole.train.labels), None, whole.test, whole.classes)


class Mine:
    """Everything above."""

    @kdlib.hookimpl
    def kdlib_models(self):
        return {"steps": Steps, "odd_model": OddModel}

    @kdlib.hookimpl
    def kdlib_sources(self):
        def spying(teacher, data):
            return Spying(teacher, data)

        def with_student(teacher, student):
            return Spying(teacher, None, student)

        return {"spying": spying, "with_student": with_student, "twice": Twice, "odd_source": lambda: raising}

    @kdlib.hookimpl
    def kdlib_points(self):
        def sees_both(student, data):
            return SpyingPoint(data, student, None)

        return {"sees_all": SpyingPoint, "sees_both": sees_both, "sum": Sum, "odd_point": lambda: raising}

    @kdlib.hookimpl
    def kdlib_features(self):
        return {"odd_features": OddFeatures, "odd_fit": OddFit}

    @kdlib.hookimpl
    def kdlib_scorers(self):
        return {"odd_scorer": OddScorer}

    @kdlib.hookimpl
    def kdlib_datasets(self):
        return {"odd_data": odd_data}


@pytest.fixture(scope="module", autouse=True)
def mine():
    registry.cache_clear()
    kdlib.register(Mine())
    yield
    registry.cache_clear()


@pytest.fixture
def ran(tmp_path):
    """Run a recipe and return its folder's one system."""
    count = iter(range(100))

    def ran(recipe, *changes, **more):
        folder = run(read({**recipe, **more}, list(changes)), tmp_path / f"run{next(count)}", progress=False)
        return folder / "main"

    return ran


@pytest.fixture(scope="module")
def base(mine, tmp_path_factory):
    return run(read(BASE), tmp_path_factory.mktemp("base") / "run", progress=False) / "main"


def weights(system, role):
    return load_file(system / f"{stem(role)}.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def roles(system):
    return sorted(path.stem for path in system.glob("*.safetensors"))


def rows_of(system):
    return json.loads((system.parent / "result.json").read_text())["rows"]


def epochs_of(system, role):
    with (system / role / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def steps_of(system, role):
    return [json.loads(line) for line in (system / role / "metrics.jsonl").read_text().splitlines()]


# the teacher


def test_a_teacher_is_trained_on_hard_labels_and_is_the_row_without(base):
    assert roles(base) == ["student", "teacher"]
    assert [row["role"] for row in rows_of(base)] == ["without", "with"]
    assert {"hard", "total"} <= set(epochs_of(base, "teacher")[0])
    assert "soft" not in epochs_of(base, "teacher")[0]
    assert all(step["total"] == step["terms"]["hard"] for step in steps_of(base, "teacher"))


def test_the_teacher_is_the_network_that_is_trained_alone(base, ran):
    alone = {key: BASE[key] for key in ("data", "train", "model")}
    assert equal(weights(ran(alone), "without"), weights(base, "without"))


def test_the_teacher_is_bit_equal_after_the_students_training(ran):
    """With batch norm, whose running statistics a teacher in train mode would change."""
    recipe = {**BASE, "model": {"kind": "steps", "norm": True}, "student": {"start": "teacher"}}
    alone = {key: recipe[key] for key in ("data", "train", "model")}
    whole, before = ran(recipe), ran(alone)
    assert equal(weights(whole, "without"), weights(before, "without"))
    assert not equal(weights(whole, "with"), weights(whole, "without"))


def test_a_teacher_is_loaded_and_not_trained(base, ran):
    path = base / "teacher.safetensors"
    loaded = ran(BASE, teacher={"weights": str(path)})
    assert equal(weights(loaded, "without"), load_file(path))
    assert not (loaded / "teacher").exists()
    assert equal(weights(loaded, "with"), weights(base, "with"))
    assert rows_of(loaded) == rows_of(base)


def test_weights_of_another_program_have_no_classes_and_are_taken(base, ran, tmp_path):
    save_file(weights(base, "without"), tmp_path / "plain.safetensors")
    loaded = ran(BASE, teacher={"weights": str(tmp_path / "plain.safetensors")})
    assert equal(weights(loaded, "without"), weights(base, "without"))


def test_a_teacher_with_its_classes_in_another_order_is_refused(base, ran, tmp_path):
    path = tmp_path / "turned.safetensors"
    write_tensors(path, weights(base, "without"), {"classes": list("9876543210")})
    with pytest.raises(kdlib.RecipeError, match="classes") as caught:
        ran(BASE, teacher={"weights": str(path)})
    assert str(path) in str(caught.value)
    assert "'9', '8'" in str(caught.value)
    assert "'0', '1'" in str(caught.value)


@pytest.mark.parametrize("key", ["teacher.weights", "student.start"])
def test_weights_that_do_not_fit_are_refused_with_their_file(base, ran, tmp_path, key):
    kept = weights(base, "without")
    save_file({**kept, "output.bias": torch.zeros(11)}, tmp_path / "shape.safetensors")
    save_file({**kept, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file({name: kept[name] for name in list(kept)[1:]}, tmp_path / "fewer.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((base / "teacher.safetensors").read_bytes()[:-8])
    for name, words in (
        ("shape", "output.bias"),
        ("more", "more"),
        ("fewer", next(iter(kept))),
        ("cut", "not a readable"),
    ):
        with pytest.raises(kdlib.KdlibError) as caught:
            ran(BASE, f"{key}={tmp_path / name}.safetensors")
        assert f"{name}.safetensors" in str(caught.value)
        assert words in str(caught.value)


@pytest.mark.parametrize("key", ["teacher.weights", "student.start"])
def test_weights_that_are_not_there_are_named(ran, tmp_path, key):
    with pytest.raises(kdlib.KdlibError, match="there is no such file") as caught:
        ran(BASE, f"{key}={tmp_path / 'missing.safetensors'}")
    assert str(tmp_path / "missing.safetensors") in str(caught.value)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("key", ["teacher.weights", "student.start"])
def test_no_file_makes_anything_run(ran, tmp_path, key):
    torch.save({"hidden.weight": Trap(tmp_path / "sprung")}, tmp_path / "model.pt")
    with pytest.raises(kdlib.KdlibError, match=r"model\.pt"):
        ran(BASE, f"{key}={tmp_path / 'model.pt'}")
    assert not (tmp_path / "sprung").exists()


# the student


def test_a_student_at_random_is_drawn_by_its_own_seed(ran):
    still = {**BASE, "train": {**BASE["train"], **STILL}}
    one, same, other = ran(still), ran(still), ran(still, "student.train.seed=3")
    assert equal(weights(one, "with"), weights(same, "with"))
    assert not equal(weights(one, "with"), weights(other, "with"))
    assert not equal(weights(one, "with"), weights(one, "without"))
    assert equal(weights(one, "without"), weights(other, "without"))


def test_a_student_starts_from_the_trained_teacher(ran):
    recipe = {**BASE, "student": {"start": "teacher", "train": STILL}}
    still = ran(recipe)
    assert equal(weights(still, "with"), weights(still, "without"))
    untrained = ran({**recipe, "train": {**BASE["train"], **STILL}})
    assert not equal(weights(still, "with"), weights(untrained, "without"))


def test_a_student_starts_from_a_file(base, ran):
    path = base / "student.safetensors"
    still = ran(BASE, student={"start": str(path), "train": STILL})
    assert equal(weights(still, "with"), load_file(path))


def test_a_file_whose_classes_are_in_another_order_is_no_start(base, ran, tmp_path):
    path = tmp_path / "turned.safetensors"
    write_tensors(path, weights(base, "with"), {"classes": list("9876543210")})
    with pytest.raises(kdlib.RecipeError, match="classes"):
        ran(BASE, student={"start": str(path)})


def test_a_student_learns_from_the_teacher(base):
    """Its training, done by hand with torch on what the run saved."""
    data = digits().train
    teacher = make_model(read(BASE).systems["main"].teacher.model, {"classes": 10}, 0)
    teacher.load_state_dict(weights(base, "without"))
    first = steps_of(base, "student")[0]["terms"]
    student = make_model(read(BASE).systems["main"].student.model, {"classes": 10}, 0, "main", "student")
    batch = next(kdlib.Loader(data, batch=50, seed=0).epoch(0))
    with torch.no_grad():
        target = (teacher(batch["x"])["logits"] / 2).softmax(-1)
        logits = student(batch["x"])["logits"]
    assert first["soft"] == pytest.approx(cross_entropy(logits, target).item(), rel=1e-5)
    assert first["hard"] == pytest.approx(cross_entropy(logits, batch["y"]).item(), rel=1e-5)


def test_a_teacher_labels_in_the_precision_that_the_recipe_says(ran):
    """The student done again by hand, under a teacher in bf16."""
    system = ran(BASE, teacher={"inference": {"precision": "bf16"}})
    plain = ran(BASE)
    assert equal(weights(system, "without"), weights(plain, "without"))
    recipe, data = read(BASE).systems["main"], digits().train
    teacher = make_model(recipe.teacher.model, {"classes": 10}, 0, "main", "teacher")
    teacher.load_state_dict(weights(plain, "without"))
    student = make_model(recipe.student.model, {"classes": 10}, 0, "main", "student")
    source = kdlib.SameInput(kdlib.freeze(teacher, dtype=torch.bfloat16))
    points = {"soft": (0.9, kdlib.SoftLabels(temperature=2.0)), "hard": (0.1, kdlib.HardLabels())}
    settings = {"epochs": 2, "batch": 50, "threads": 1, "lr": 0.01, "progress": False}
    kdlib.fit(kdlib.Distiller(student, source, **points), data, **settings)
    assert equal(weights(system, "with"), student.state_dict())
    assert not equal(weights(plain, "with"), student.state_dict())


def test_cross_fitted_teachers_each_leave_out_what_they_label(ran):
    """Everything done again by hand: three teachers, each on the rows of the other parts, and the student."""
    system = ran(BASE, teacher={"cross_fit": 3})
    data, recipe = digits().train, read(BASE).systems["main"]
    settings = {"epochs": 2, "batch": 50, "threads": 1, "lr": 0.01, "progress": False}
    folds = fold_of_groups(data.labels, data.groups, 3, 0)
    sources = []
    for part in range(3):
        rest = np.flatnonzero(folds != part)
        teacher = make_model(recipe.teacher.model, {"classes": 10}, 0, "main", "teacher")
        kept = kdlib.TensorPart(data.x[rest], data.labels[rest])
        kdlib.fit(kdlib.Distiller(teacher, hard=kdlib.HardLabels()), kept, **settings)
        sources.append(kdlib.SameInput(kdlib.freeze(teacher)))
        assert len(epochs_of(system, f"teacher-without-{part}")) == 2
    student = make_model(recipe.student.model, {"classes": 10}, 0, "main", "student")
    soft, hard = kdlib.SoftLabels(temperature=2.0), kdlib.HardLabels()
    kdlib.fit(kdlib.Distiller(student, CrossFit(sources, data), soft=(0.9, soft), hard=(0.1, hard)), data, **settings)
    assert equal(weights(system, "with"), student.state_dict())
    assert not equal(weights(ran(BASE), "with"), student.state_dict())


def test_a_control_that_starts_from_the_teacher_is_continued(ran):
    system = ran(BASE, student={"start": "teacher", "control": True})
    assert roles(system) == ["continued", "student", "teacher"]
    assert [row["role"] for row in rows_of(system)] == ["without", "continued", "with"]
    assert "soft" not in epochs_of(system, "continued")[0]
    both = [weights(system, role) for role in ("continued", "with")]
    assert not equal(*both)
    assert len(steps_of(system, "continued")) == len(steps_of(system, "student")) == 4  # the student's updates


def test_a_control_that_starts_like_the_student_is_alone(ran, base):
    system = ran(BASE, student={"control": True})
    assert roles(system) == ["alone", "student", "teacher"]
    assert equal(weights(system, "with"), weights(base, "with"))  # the control takes nothing from the student
    still = ran(BASE, student={"control": True, "train": STILL})
    assert equal(weights(still, "alone"), weights(still, "with"))


def test_a_control_has_the_students_settings(ran):
    system = ran(BASE, student={"control": True, "train": {"epochs": 3}})
    assert [len(epochs_of(system, role)) for role in ("teacher", "alone", "student")] == [2, 3, 3]


# one network


def test_without_a_source_the_points_train_the_one_network(base, ran):
    alone = {key: BASE[key] for key in ("data", "train", "model")}
    smooth = ran(alone, points={"smooth": {"kind": "hard_labels", "label_smoothing": 0.3}})
    assert roles(smooth) == ["teacher"]
    assert "smooth" in epochs_of(smooth, "teacher")[0]
    assert not equal(weights(smooth, "without"), weights(base, "without"))


# a first training


PRETRAINED = {
    **BASE,
    "model": {"kind": "steps"},
    "teacher": {
        "pretrain": {"model": {"second": False}, "train": {"epochs": 1, "optimizer": {"kind": "adam", "lr": 0.01}}},
        "train": STILL,
    },
    "student": {"train": STILL},
}
CARRIED = {"first.weight", "first.bias"}


def test_a_first_training_carries_over_by_name_and_shape_and_lists_the_others(ran):
    system = ran(PRETRAINED)
    after = weights(system, "without")
    recipe = read(PRETRAINED).systems["main"]
    before = make_model(recipe.teacher.model, {"classes": 10}, 0, "main", "teacher").state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == CARRIED
    assert len(epochs_of(system, "pretrain")) == 1

    first = make_model(recipe.teacher.pretrain[0], {"classes": 10}, 0, "main", "pretrain")
    settings = {"epochs": 1, "batch": 50, "lr": 0.01, "threads": 1}
    kdlib.fit(kdlib.Distiller(first, hard=kdlib.HardLabels()), digits().train, **settings, progress=False)
    for name in CARRIED:
        assert torch.equal(first.state_dict()[name], after[name])

    lists = [path.read_text().split() for path in system.rglob("*.txt")]
    assert lists
    for listed in lists:
        assert set(listed) == set(after) - CARRIED


def test_a_name_of_another_shape_is_not_carried_over(ran):
    system = ran(PRETRAINED, "teacher.pretrain.model={second=true, width=7}", "student.start=teacher")
    after = weights(system, "without")
    before = make_model(
        read(PRETRAINED).systems["main"].teacher.model, {"classes": 10}, 0, "main", "teacher"
    ).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"second.bias", "output.weight", "output.bias"}
    (listed,) = (path.read_text().split() for path in system.rglob("*.txt"))
    assert set(listed) == {"first.weight", "first.bias", "second.weight"}


def test_a_student_with_a_random_start_is_trained_first_the_same_way(ran):
    system = ran(PRETRAINED)
    teacher, student = weights(system, "without"), weights(system, "with")
    assert {name for name in student if torch.equal(student[name], teacher[name])} == CARRIED


def test_both_first_trainings_leave_their_log(ran):
    system = ran(PRETRAINED, student={"model": {"width": 5}, "train": STILL})
    logs = [path for path in system.rglob("metrics.csv") if "pretrain" in str(path.relative_to(system))]
    assert len(logs) == 2
    assert len(list(system.rglob("*.txt"))) == 2


def test_a_student_that_starts_elsewhere_is_not_trained_first(ran, base):
    recipe = {**PRETRAINED, "model": MLP, "teacher": {**PRETRAINED["teacher"], "pretrain": {"train": {"epochs": 1}}}}
    path = base / "student.safetensors"
    from_file = ran(recipe, student={"start": str(path), "train": STILL})
    assert equal(weights(from_file, "with"), load_file(path))
    from_teacher = ran(PRETRAINED, student={"start": "teacher", "train": STILL})
    assert equal(weights(from_teacher, "with"), weights(from_teacher, "without"))


def test_a_first_training_that_carries_nothing_over_is_refused(ran):
    with pytest.raises(kdlib.RecipeError, match=r"teacher\.pretrain\.model"):
        ran(PRETRAINED, "teacher.pretrain.model.width=7")


# validation


VALID = {"kind": "digits", "train": 20, "valid": 100}
OVERFIT = {**BASE, "data": VALID, "train": {"epochs": 15, "batch": 10, "threads": 1, "optimizer": {"lr": 0.1}}}


def test_the_best_epoch_is_that_of_the_lowest_validation_loss(ran):
    best, last = ran(OVERFIT), ran(OVERFIT, "train.select=last")
    for role, name in (("teacher", "without"), ("student", "with")):
        losses = [epoch["valid_total"] for epoch in epochs_of(best, role)]
        chosen = int(np.argmin(losses))
        assert chosen < len(losses) - 1, "a training whose last epoch is its best shows nothing"
        changes = [f"{role}.train.epochs={chosen + 1}", f"{role}.train.select=last"]
        assert equal(weights(ran(OVERFIT, *changes), name), weights(best, name))
        assert not equal(weights(last, name), weights(best, name))
    assert equal(weights(ran(OVERFIT, "train.select=best"), "with"), weights(best, "with"))


def test_the_validation_loss_of_a_student_is_the_total_of_its_points(ran):
    for epoch in epochs_of(ran({**BASE, "data": VALID}), "student"):
        assert epoch["valid_total"] == pytest.approx(0.9 * epoch["valid_soft"] + 0.1 * epoch["valid_hard"], rel=1e-5)


@pytest.mark.parametrize("name", ["total", "epoch", "step", "lr", "seconds", "waiting", "valid_total"])
def test_a_point_with_the_name_of_a_column_does_not_take_its_place(ran, name):
    recipe = {**BASE, "data": VALID, "points": {name: {**POINTS["soft"], "weight": 0.5}, "hard": POINTS["hard"]}}
    try:
        system = ran(recipe)
    except kdlib.RecipeError as error:
        refused = str(error)
    else:
        refused = None
        same = ran({**recipe, "points": {"soft": recipe["points"][name], "hard": POINTS["hard"]}})
        for one, other in zip(epochs_of(system, "student"), epochs_of(same, "student"), strict=True):
            assert [one[key] for key in ("epoch", "step", "lr", "total", "valid_total")] == [
                other[key] for key in ("epoch", "step", "lr", "total", "valid_total")
            ]
    assert refused is None or f"points.{name}" in refused


def test_patience_stops_a_training_early(ran):
    patient = ran(OVERFIT, "train.patience=2")
    for role in ("teacher", "student"):
        losses = [epoch["valid_total"] for epoch in epochs_of(patient, role)]
        assert len(losses) < 15
        assert int(np.argmin(losses)) == len(losses) - 3


@pytest.mark.parametrize("change", ["train.select=best", "train.patience=2", "student.train.select=best"])
def test_without_a_validation_part_there_is_no_best(ran, change):
    with pytest.raises(kdlib.KdlibError, match="validation"):
        ran(BASE, change)


def test_without_a_validation_part_the_last_epoch_is_kept(base, ran):
    assert equal(weights(ran(BASE, "train.select=last"), "with"), weights(base, "with"))


# schedules and several teachers


def test_a_schedule_is_in_force_in_training(ran):
    linear = {"kind": "linear", "start": 0.25, "end": 1.0, "epochs": 3}
    points = {"soft": {**POINTS["soft"], "weight": linear}, "hard": {**POINTS["hard"], "epochs": [1, 3]}}
    system = ran({**BASE, "points": points}, "train.epochs=4")
    for step in steps_of(system, "student"):
        epoch, terms = step["epoch"], step["terms"]
        assert ("hard" in terms) == (1 <= epoch < 3)
        expected = (0.25 + 0.25 * epoch) * terms["soft"] + 0.1 * terms.get("hard", 0.0)
        assert step["total"] == pytest.approx(expected, rel=1e-5)


def test_a_scheduled_temperature_is_in_force_in_training(ran):
    step = {"kind": "linear", "start": 2.0, "end": 8.0, "steps": 1}
    one = ran(BASE, points={"soft": {"kind": "soft_labels", "temperature": step}}, train={**BASE["train"], **STILL})
    two = ran(BASE, points={"soft": {"kind": "soft_labels", "temperature": 8.0}}, train={**BASE["train"], **STILL})
    scheduled, constant = ([step["total"] for step in steps_of(of, "student")] for of in (one, two))
    assert scheduled[0] != constant[0]
    assert scheduled[1:] == constant[1:]


def test_a_point_sees_the_teacher_it_names(ran, base):
    points = {"soft": {**POINTS["soft"], "teacher": "a"}, "hard": POINTS["hard"]}
    recipe = {**BASE, "source": {"kind": "twice", "sources": {"inner": {"kind": "same_input"}}}, "points": points}
    system = ran(recipe)
    assert equal(weights(system, "with"), weights(base, "with"))
    other = ran(recipe, "points.soft.teacher=b")
    assert not equal(weights(other, "with"), weights(base, "with"))
    with pytest.raises(kdlib.KdlibError, match="'c'"):
        ran(recipe, "points.soft.teacher=c")


def test_a_point_made_of_points_trains(ran, base):
    inner = {"a": {"kind": "soft_labels", "temperature": 2.0}}
    system = ran({**BASE, "points": {"soft": {"kind": "sum", "points": inner, "weight": 0.9}, "hard": POINTS["hard"]}})
    assert equal(weights(system, "with"), weights(base, "with"))


# live objects


def test_a_source_gets_the_frozen_teacher_and_the_training_part(ran):
    system = ran(BASE, source={"kind": "spying"})
    teacher, data = Spying.seen["teacher"], Spying.seen["data"]
    assert isinstance(teacher, kdlib.Frozen)
    assert equal(teacher.model.state_dict(), weights(system, "without"))
    assert len(data) == 100
    assert list(data.ids) == digits().train.ids
    np.testing.assert_array_equal(data.labels, digits().train.labels)
    assert len(data.groups) == 100


def test_the_training_part_knows_the_classes(ran):
    ran(BASE, source={"kind": "spying"})
    assert tuple(Spying.seen["data"].classes) == tuple("0123456789")


def test_a_source_may_ask_for_the_student(ran):
    ran(BASE, source={"kind": "with_student"})
    assert isinstance(Spying.seen["student"], nn.Module)


def test_a_point_may_ask_for_the_student_and_the_training_part(ran):
    ran(BASE, points={"mine": {"kind": "sees_both"}})
    assert isinstance(SpyingPoint.seen["student"], nn.Module)
    assert len(SpyingPoint.seen["data"]) == 100


def test_a_point_may_ask_for_the_teacher(ran):
    ran(BASE, points={"mine": {"kind": "sees_all"}})
    assert isinstance(SpyingPoint.seen["teacher"], kdlib.Frozen)


def test_what_a_check_builds_is_what_a_run_builds():
    list(check(read({**BASE, "source": {"kind": "spying"}})))
    assert isinstance(Spying.seen["teacher"], kdlib.Frozen)
    assert tuple(Spying.seen["data"].classes) == tuple("0123456789")


# faults of plugins


ODD = {
    "odd_model": {"model": {"kind": "odd_model"}},
    "odd_source": {"source": {"kind": "odd_source"}},
    "odd_point": {"points": {"mine": {"kind": "odd_point"}}},
    "odd_features": {"features": {"kind": "odd_features"}},
    "odd_fit": {"features": {"kind": "odd_fit"}},
    "odd_data": {"data": {"kind": "odd_data"}},
    "odd_scorer": {"scorer": {"kind": "odd_scorer"}},
}


@pytest.mark.parametrize("name", ODD)
def test_an_exception_inside_a_plugin_comes_out_with_the_plugins_name(ran, name):
    with pytest.raises(Odd) as caught:
        ran(BASE, **ODD[name])
    notes = " ".join(getattr(caught.value, "__notes__", []))
    assert "the dog ate it" in str(caught.value)
    assert f"'{name}' of plugin 'Mine', hook kdlib_" in notes
    assert "of plugin 'kdlib'" not in notes  # those are at work too, and have nothing to do with it


@pytest.mark.parametrize("name", ["odd_features", "odd_fit", "odd_data"])
def test_an_exception_in_a_check_comes_out_with_the_plugins_name(name):
    with pytest.raises(Odd) as caught:
        list(check(read({**BASE, **ODD[name]})))
    notes = " ".join(getattr(caught.value, "__notes__", []))
    assert f"'{name}'" in notes or "'Mine'" in notes


@pytest.mark.parametrize("name", ["odd_model", "odd_source", "odd_point"])
def test_an_exception_on_the_batch_of_a_check_is_in_its_report(name):
    ((_, report),) = check(read({**BASE, **ODD[name]}))
    assert not report
    assert "Odd: the dog ate it" in str(report)


def test_a_model_that_is_none_is_named():
    class Other:
        @kdlib.hookimpl
        def kdlib_models(self):
            return {"no_model": lambda: "a string"}

    kdlib.register(Other())
    with pytest.raises(kdlib.KdlibError, match=r"model.*'no_model'.*str"):
        list(check(read({**BASE, "model": {"kind": "no_model"}})))


# outputs


def test_outputs_are_in_the_order_of_the_part_clean_and_in_eval_mode():
    whole = digits()
    model = Steps(classes=10, norm=True).train()
    found = outputs(model, whole.test, read(BASE).systems["main"].teacher.train)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = twin(whole.test.x)
    for name, tap in expected.items():
        np.testing.assert_allclose(found[name], tap.numpy(), atol=1e-5)


def test_a_system_is_written_where_the_run_looks(base):
    assert base.name == "main"
    assert {path.name for path in Path(base).iterdir() if path.is_dir()} == {"teacher", "student"}


def test_a_teacher_is_saved_before_its_student_fails(base, tmp_path):
    points = {"odd": {"kind": "odd_point"}}
    with pytest.raises(Odd):
        run(read({**BASE, "points": points}), tmp_path / "run", progress=False)
    saved = load_file(tmp_path / "run" / "main" / "teacher.safetensors")
    assert equal(saved, weights(base, "without"))
