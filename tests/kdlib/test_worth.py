"""The teacher's accuracy, through its source and on the student's input alone, in checks and before a training."""

import json

import pytest
import torch
from torch import nn

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.sources.different_view import DifferentView
from kdlib.sources.ema import Ema
from kdlib.sources.ensemble import Ensemble
from kdlib.worth import hits

ALONE = "on the student's input alone"
THROUGH = "through the source"


def echo():
    """A teacher whose logits are its input."""
    return kdlib.freeze(kdlib.Tapped(nn.Identity(), logits=""))


def one_hot(labels, classes=3):
    return nn.functional.one_hot(torch.tensor(labels), classes).float()


BATCH = {"x": one_hot([0, 1, 1, 1]), "clean": one_hot([0, 1, 2, 0]), "y": torch.tensor([0, 1, 2, 0])}


def of(source, batch=BATCH):
    return hits(source, source(batch), batch)


def test_the_same_input_is_counted_once():
    assert of(kdlib.SameInput(echo())) == {THROUGH: (2, 4)}


def test_another_input_is_counted_beside_the_students():
    assert of(DifferentView(echo(), key="clean")) == {THROUGH: (4, 4), ALONE: (2, 4)}


def test_several_teachers_are_counted_by_number():
    source = Ensemble({"a": DifferentView(echo(), key="clean"), "b": kdlib.SameInput(echo())}, mix="logits")
    found = of(source)
    assert found[f"teacher 1 {ALONE}"] == found[f"teacher 2 {ALONE}"] == (2, 4)


def test_positions_of_a_sequence_count_one_by_one():
    batch = {"x": one_hot([[0, 1], [2, 2]]), "y": torch.tensor([[0, 0], [2, 2]])}
    assert of(kdlib.SameInput(echo()), batch) == {THROUGH: (3, 4)}


@pytest.mark.parametrize("labels", [None, torch.rand(4), torch.rand(4, 3).round(), torch.zeros(4, 2).long()])
def test_labels_that_are_no_class_numbers_of_the_rows_say_nothing(labels):
    assert of(kdlib.SameInput(echo()), {**BATCH, "y": labels}) == {}


def test_a_teacher_without_logits_says_nothing():
    teacher = kdlib.freeze(kdlib.Tapped(nn.Identity(), embedding=""))
    assert of(kdlib.SameInput(teacher)) == {}


def test_a_teacher_that_does_not_take_the_students_input_is_judged_through_the_source_only():
    teacher = kdlib.freeze(kdlib.Tapped(nn.Linear(5, 3), logits=""))
    assert list(of(DifferentView(teacher, key="wide"), {**BATCH, "wide": torch.rand(4, 5)})) == [THROUGH]


def test_a_source_without_a_frozen_teacher_is_judged_through_itself():
    student = kdlib.Tapped(nn.Linear(3, 3), logits="")
    assert list(of(Ema(student))) == [THROUGH]


def test_check_shows_both():
    student = kdlib.Tapped(nn.Linear(3, 3), logits="")
    report = kdlib.Distiller(student, DifferentView(echo(), key="clean"), soft=kdlib.SoftLabels()).check(BATCH)
    assert f"4 of 4 {THROUGH}, 2 of 4 {ALONE}, in this batch" in str(report)


# before a training


@pytest.fixture(scope="module")
def parts():
    return digits(train=100, valid=50)


@pytest.fixture
def teacher(parts):
    torch.manual_seed(3)
    net = DigitsMLP(width=32)
    kdlib.fit(kdlib.Distiller(net, hard=kdlib.HardLabels()), parts.train, epochs=5, progress=False)
    return kdlib.freeze(net)


def counted(teacher, part):
    return int((teacher(part.x)["logits"].argmax(-1).numpy() == part.labels).sum())


def trained(teacher, parts, **settings):
    torch.manual_seed(4)
    distiller = kdlib.Distiller(DigitsMLP(width=8), kdlib.SameInput(teacher), soft=kdlib.SoftLabels())
    return kdlib.fit(distiller, parts.train, epochs=1, **{"batch": 25, "progress": False, **settings})


def test_fit_counts_the_teacher_on_both_parts_before_the_first_step(parts, teacher, tmp_path):
    history = trained(teacher, parts, valid=parts.valid, folder=tmp_path)
    expected = {
        "training": {THROUGH: (counted(teacher, parts.train), 100)},
        "validation": {THROUGH: (counted(teacher, parts.valid), 50)},
    }
    assert history.teacher == expected
    assert json.loads((tmp_path / "teacher.json").read_text()) == json.loads(json.dumps(expected))


def test_of_a_large_part_it_takes_some_rows_whatever_their_order(parts, teacher):
    by_class = parts.test.labels.argsort(kind="stable")
    ordered = kdlib.TensorPart(parts.test.x[by_class], parts.test.labels[by_class])
    right, rows = trained(teacher, parts, valid=ordered).teacher["validation"][THROUGH]
    assert rows == 200
    assert abs(right / rows - counted(teacher, ordered) / len(ordered)) < 0.1


def test_it_is_said_with_progress_and_not_without(parts, teacher, capsys):
    trained(teacher, parts)
    assert capsys.readouterr().out == ""
    trained(teacher, parts, progress=True)
    assert f"teacher on training: {counted(teacher, parts.train)} of 100 {THROUGH}" in capsys.readouterr().out


def test_one_network_by_itself_has_no_teacher(parts):
    history = kdlib.fit(
        kdlib.Distiller(DigitsMLP(width=8), hard=kdlib.HardLabels()), parts.train, epochs=1, progress=False
    )
    assert history.teacher == {}
