"""Schedules: closed forms, bounds, and refusals."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import kdlib
from kdlib.schedules import Between, value_at, value_in

VALUES = st.floats(-1e6, 1e6)
TIMES = st.integers(0, 10**6)
REFUSED = (ValueError, kdlib.KdlibError)


@st.composite
def schedules(draw):
    unit = draw(st.sampled_from(["epochs", "steps"]))
    return kdlib.Schedule(
        kind=draw(st.sampled_from(["linear", "cosine"])),
        start=draw(VALUES),
        end=draw(VALUES),
        begin=draw(st.integers(0, 1000)),
        **{unit: draw(st.integers(1, 10**5))},
    )


def times(schedule, now):
    return (now, 0) if schedule.steps is not None else (0, now)


@settings(database=None, max_examples=300, deadline=None)
@given(schedules(), TIMES)
def test_the_value_is_always_between_start_and_end(schedule, now):
    low, high = sorted((schedule.start, schedule.end))
    assert low <= schedule(*times(schedule, now)) <= high


@settings(database=None, max_examples=300, deadline=None)
@given(schedules(), st.integers(0, 10**6))
def test_it_is_the_start_up_to_begin_and_the_end_from_begin_plus_length_on(schedule, more):
    length = schedule.steps or schedule.epochs
    assert schedule(*times(schedule, max(schedule.begin - more, 0))) == schedule.start
    assert schedule(*times(schedule, schedule.begin + length + more)) == schedule.end


@settings(database=None, max_examples=100, deadline=None)
@given(schedules(), TIMES, TIMES)
def test_it_never_turns_back(schedule, one, other):
    early, late = (schedule(*times(schedule, now)) for now in sorted((one, other)))
    slack = 1e-9 * (1 + abs(schedule.start) + abs(schedule.end))
    assert (late - early) * (schedule.end - schedule.start) >= -slack * abs(schedule.end - schedule.start)


@settings(database=None, max_examples=50, deadline=None)
@given(VALUES, TIMES, TIMES)
def test_a_constant_is_its_start_everywhere(start, step, epoch):
    assert kdlib.Schedule(kind="constant", start=start)(step, epoch) == start


def test_linear_is_a_line_between_begin_and_begin_plus_length():
    schedule = kdlib.Schedule(kind="linear", start=1.0, end=3.0, epochs=4, begin=2)
    assert [schedule(99, epoch) for epoch in range(8)] == [1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_cosine_is_half_a_cosine():
    schedule = kdlib.Schedule(kind="cosine", start=1.0, end=0.0, steps=4)
    expected = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert [schedule(step, 99) for step in range(5)] == pytest.approx(expected, abs=1e-15)


def test_cosine_equals_torchs_annealing():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    schedule = kdlib.Schedule(kind="cosine", start=0.8, end=0.1, steps=10)
    for step in range(11):
        assert schedule(step, 0) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_steps_look_at_the_step_and_epochs_at_the_epoch():
    by_step = kdlib.Schedule(kind="linear", start=0.0, end=1.0, steps=10)
    by_epoch = kdlib.Schedule(kind="linear", start=0.0, end=1.0, epochs=10)
    assert (by_step(5, 0), by_step(0, 5)) == (0.5, 0.0)
    assert (by_epoch(5, 0), by_epoch(0, 5)) == (0.0, 0.5)


def test_a_length_of_one_jumps_from_start_to_end():
    schedule = kdlib.Schedule(kind="cosine", start=2.0, end=5.0, epochs=1, begin=3)
    assert [schedule(0, epoch) for epoch in (2, 3, 4)] == [2.0, 2.0, 5.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "quadratic", "start": 0.0, "end": 1.0, "epochs": 3},
        {"kind": "linear", "start": 0.0, "epochs": 3},
        {"kind": "linear", "start": 0.0, "end": 1.0},
        {"kind": "linear", "start": 0.0, "end": 1.0, "epochs": 3, "steps": 3},
        {"kind": "linear", "start": 0.0, "end": 1.0, "epochs": 0},
        {"kind": "cosine", "start": 0.0, "end": 1.0, "steps": 0},
        {"kind": "cosine", "start": 0.0, "end": 1.0, "steps": 3, "begin": -1},
        {"kind": "constant", "start": 0.0, "end": 1.0},
        {"kind": "constant", "start": 0.0, "epochs": 3},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
@pytest.mark.parametrize("door", ["python", "recipe"])
def test_what_the_docstring_excludes_is_refused(settings, door):
    with pytest.raises(REFUSED):
        kdlib.Schedule(**settings) if door == "python" else TypeAdapter(float | kdlib.Schedule).validate_python(
            settings
        )


def test_a_recipes_block_becomes_the_same_schedule():
    block = {"kind": "linear", "start": 4.0, "end": 1.0, "epochs": 10, "begin": 2}
    assert TypeAdapter(float | kdlib.Schedule).validate_python(block) == kdlib.Schedule(**block)
    assert TypeAdapter(float | kdlib.Schedule).validate_python(2.0) == 2.0


def test_a_recipes_block_with_a_misspelt_key_or_nan_is_refused():
    block = {"kind": "linear", "start": 4.0, "end": 1.0, "epochs": 10}
    for wrong in ({"begins": 2}, {"end": math.nan}, {"start": "4"}):
        with pytest.raises(ValidationError):
            TypeAdapter(float | kdlib.Schedule).validate_python(block | wrong)


def test_it_cannot_be_changed_and_survives_copy_and_pickle():
    schedule = kdlib.Schedule(kind="linear", start=0.0, end=1.0, epochs=3)
    with pytest.raises((ValidationError, AttributeError)):
        schedule.start = 1.0
    assert copy.deepcopy(schedule) == pickle.loads(pickle.dumps(schedule)) == schedule


def test_between_holds_from_first_to_before_last():
    weight = Between(0.5, 2, 4)
    assert [weight(0, epoch) for epoch in range(6)] == [0.0, 0.0, 0.5, 0.5, 0.0, 0.0]
    ramp = Between(kdlib.Schedule(kind="linear", start=0.0, end=1.0, epochs=4), 1, 3)
    assert [ramp(0, epoch) for epoch in range(4)] == [0.0, 0.25, 0.5, 0.0]


def test_a_value_is_a_number_or_any_function_of_step_and_epoch():
    assert value_at(0.5, 3, 4) == 0.5
    assert value_at(lambda step, epoch: 10 * step + epoch, 3, 4) == 34.0


def test_a_schedule_outside_a_distiller_says_what_it_needs():
    assert value_in(2.0, {}, "temperature") == 2.0
    with pytest.raises(kdlib.BatchError, match=r"'temperature' is a schedule.*Distiller"):
        value_in(lambda step, epoch: 1.0, {"x": 0}, "temperature")
