"""Self-distillation: the teacher is a snapshot of the student."""

import copy

import pytest
import torch
from torch import nn

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.sources.self_distillation import SelfDistillation
from kdlib.testing import check_source

X, Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
BATCH = {"x": X, "y": Y}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def distiller(every):
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))
    student = kdlib.Tapped(net, logits="")
    return kdlib.Distiller(
        student, SelfDistillation(student, every=every), soft=kdlib.SoftLabels(), hard=kdlib.HardLabels()
    )


def steps(one, count):
    """Yield the student's state after each of some optimizer steps."""
    optimizer = torch.optim.Adam(one.parameters(), lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        one(BATCH).total.backward()
        optimizer.step()
        one.advance()
        yield copy.deepcopy(one.student.state_dict())


def test_the_snapshot_is_the_student_at_the_last_multiple_of_every():
    one = distiller(every=3)
    states = [copy.deepcopy(one.student.state_dict())]
    for number, state in enumerate(steps(one, 8), 1):
        states.append(state)
        held = one.source.snapshot.model.state_dict()
        assert all(torch.equal(value, states[number // 3 * 3][name]) for name, value in held.items())
    assert int(one.source.steps) == 8


def test_every_step_the_teacher_is_the_student_of_the_step_before():
    one = distiller(every=1)
    for state in steps(one, 3):
        held = one.source.snapshot.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in held.items())


def test_it_is_a_source():
    check_source(distiller(2).source, BATCH)


def test_nothing_of_it_is_a_parameter_and_it_changes_only_in_advance():
    one = distiller(every=1)
    assert all(name.startswith("student.") for name, _ in one.named_parameters())
    before = copy.deepcopy(one.source.state_dict())
    one.train()(BATCH)
    one.eval()(BATCH)
    assert all(torch.equal(value, before[name]) for name, value in one.source.state_dict().items())
    assert not any(module.training for module in one.train().source.snapshot.modules())


def test_its_state_survives_a_round_trip_in_the_middle_of_a_period():
    one = distiller(every=3)
    list(steps(one, 4))
    other = distiller(every=3)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(dict(other.source(BATCH)), dict(one.source(BATCH)), rtol=0, atol=0)
    for both in (one, other):
        both.advance()
    assert torch.equal(other.source(BATCH)["logits"], one.source(BATCH)["logits"])
    for both in (one, other):
        both.advance()  # the sixth: both take a snapshot
    assert torch.equal(other.source(BATCH)["logits"], one.student.eval()(X)["logits"])


def test_snapshots_are_at_least_a_step_apart():
    with pytest.raises(kdlib.KdlibError, match="every"):
        distiller(every=0)


def test_two_epochs_of_fit_on_digits():
    parts, student = digits(train=60), DigitsMLP(width=8)
    soft = (kdlib.Schedule(kind="linear", start=0.0, end=1.0, epochs=1), kdlib.SoftLabels())
    one = kdlib.Distiller(student, SelfDistillation(student, every=3), soft=soft, hard=kdlib.HardLabels())
    history = kdlib.fit(one, parts.train, epochs=2, batch=20, progress=False)
    assert "soft" not in history.epochs[0]
    assert history.epochs[1]["hard"] < history.epochs[0]["hard"]
    assert torch.equal(one.source.snapshot.model.hidden.weight, student.hidden.weight)
