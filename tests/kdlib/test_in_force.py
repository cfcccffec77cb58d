"""What schedules give is in the log, step by step."""

import json

import pytest

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.recipe import read
from kdlib.run import run


def test_a_scheduled_weight_and_temperature_are_in_the_log_of_each_step(tmp_path):
    teacher = kdlib.freeze(DigitsMLP(width=8))
    cooling = kdlib.Schedule(kind="linear", start=4.0, end=1.0, steps=3)
    warm_up = kdlib.Schedule(kind="linear", start=0.5, end=1.0, epochs=1)
    distiller = kdlib.Distiller(
        DigitsMLP(width=4), kdlib.SameInput(teacher), soft=(warm_up, kdlib.SoftLabels(temperature=cooling))
    )
    kdlib.fit(distiller, digits(train=20).train, epochs=2, batch=10, folder=tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["soft.temperature"] for line in lines] == pytest.approx([4.0, 3.0, 2.0, 1.0])
    assert [line["soft.weight"] for line in lines] == [0.5, 0.5, 1.0, 1.0]


def test_constant_settings_are_not_repeated_in_the_log():
    distiller = kdlib.Distiller(DigitsMLP(width=4), hard=(0.5, kdlib.HardLabels()))
    assert distiller.in_force(0) == {}


def test_a_schedule_in_a_point_of_one_of_several_teachers_is_logged_as_any_other():
    cooling = kdlib.Schedule(kind="linear", start=4.0, end=1.0, epochs=3)
    point = kdlib.of("a", kdlib.of("b", kdlib.SoftLabels(temperature=cooling)))
    assert kdlib.Distiller(DigitsMLP(width=4), soft=point).in_force(3) == {"soft.temperature": 1.0}


def test_a_point_that_a_recipe_limits_to_epochs_trains_and_is_logged_there_alone(tmp_path):
    changes = ["train.epochs=3", "student.train.epochs=3", "student.control=false", "points.soft.epochs=[1, 2]"]
    folder = run(read("digits", changes), tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (folder / "main/student/metrics.jsonl").read_text().splitlines()]
    assert {(line["epoch"], line["soft.weight"], "soft" in line["terms"]) for line in lines} == {
        (0, 0.0, False),
        (1, 0.9, True),
        (2, 0.0, False),
    }
