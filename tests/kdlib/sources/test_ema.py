"""The mean teacher, against its recursion."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.sources.ema import Ema
from kdlib.testing import check_source

X, Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
BATCH = {"x": X, "y": Y}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network():
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))
    return kdlib.Tapped(net, logits="", hidden="2")


def distiller(**settings):
    student = network()
    return kdlib.Distiller(
        student, Ema(student, **settings), soft=kdlib.SoftLabels(temperature=2.0), hard=kdlib.HardLabels()
    )


def stepped(one, steps):
    """Take optimizer steps and return the student's state after each, the one at the start first."""
    optimizer = one.attach(torch.optim.Adam(one.parameters(), lr=0.05))
    states = [copy.deepcopy(one.student.state_dict())]
    for _ in range(steps):
        optimizer.zero_grad()
        one(BATCH).total.backward()
        optimizer.step()
        states.append(copy.deepcopy(one.student.state_dict()))
    return states


@pytest.mark.parametrize(("decay", "warm_up"), [(0.9, False), (0.9, True), (0.6, True), (0.0, False), (0.999, True)])
def test_five_steps_are_the_recursion_and_batch_norm_is_the_students(decay, warm_up):
    one = distiller(decay=decay, warm_up=warm_up)
    states = stepped(one, 5)
    weights = dict(one.student.named_parameters())
    for name, held in one.source.average.model.state_dict().items():
        if name not in weights:
            assert torch.equal(held, states[-1][name])
            continue
        expected = states[0][name].double().numpy()
        for step in range(1, 6):
            alpha = min(decay, 1 - 1 / (step + 1)) if warm_up else decay
            expected = alpha * expected + (1 - alpha) * states[step][name].double().numpy()
        np.testing.assert_allclose(held.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert int(one.student.model[1].num_batches_tracked) == 5


def test_warming_up_it_is_the_plain_mean_of_all_weights():
    one = distiller(decay=0.999)
    states = stepped(one, 5)
    for name, _ in one.student.named_parameters():
        mean = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(one.source.average.model.state_dict()[name], mean)


def test_it_is_a_source():
    source = Ema(network())
    check_source(source, BATCH)
    assert set(source(BATCH)) == {"logits", "hidden"}


def test_nothing_of_it_is_a_parameter_and_all_of_it_is_saved():
    one = distiller()
    assert [name.split(".")[0] for name, _ in one.named_parameters()] == ["student"] * 6
    own = {name.removeprefix("source.average.model.") for name in one.state_dict() if name.startswith("source.average")}
    assert own == set(one.student.state_dict())
    assert "source.steps" in one.state_dict()


def test_a_forward_changes_nothing_and_an_advance_changes_only_the_average():
    one = distiller(decay=0.5)
    stepped(one, 1)
    before = copy.deepcopy(one.source.state_dict())
    for mode in (True, False):
        one.train(mode)
        one(BATCH)
        one.source(BATCH)
    assert all(torch.equal(value, before[name]) for name, value in one.source.state_dict().items())
    student = copy.deepcopy(one.student.state_dict())
    one.advance()
    assert any(not torch.equal(value, before[name]) for name, value in one.source.state_dict().items())
    assert all(torch.equal(value, student[name]) for name, value in one.student.state_dict().items())


def test_it_stays_in_eval_mode_while_the_student_trains():
    one = distiller().train()
    assert one.student.training
    assert not any(module.training for module in one.source.average.modules())
    assert torch.equal(one.source(BATCH)["logits"], one.source(BATCH)["logits"])


def test_its_state_survives_a_round_trip():
    one = distiller(decay=0.7)
    stepped(one, 3)
    torch.manual_seed(1)
    other = distiller(decay=0.7)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(dict(other.source(BATCH)), dict(one.source(BATCH)), rtol=0, atol=0)
    one.advance()
    other.advance()
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())


def test_a_copy_of_the_distiller_has_an_average_of_its_own():
    one = distiller(decay=0.5)
    stepped(one, 2)
    twin = copy.deepcopy(one)
    before = twin.source(BATCH)["logits"]
    stepped(one, 2)
    assert torch.equal(twin.source(BATCH)["logits"], before)
    twin.advance()
    assert not torch.equal(twin.source(BATCH)["logits"], before)


def test_the_check_leaves_it_alone_and_finds_nothing_wrong():
    one = distiller().eval()
    before = copy.deepcopy(one.state_dict())
    one.attach(torch.optim.SGD(one.parameters(), lr=0.1))
    report = one.check(BATCH)
    assert report, str(report)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_a_student_that_is_frozen_in_part_is_averaged_all_the_same():
    student = network()
    student.model[0].requires_grad_(False)
    source = Ema(student, decay=0.5, warm_up=False)
    assert list(source.parameters()) == []
    source.advance(student)
    assert torch.equal(source.average.model.model[0].weight, student.model[0].weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_bounds_is_refused(decay):
    with pytest.raises(kdlib.KdlibError, match="decay"):
        Ema(network(), decay=decay)


def test_two_epochs_of_fit_on_digits():
    parts, student = digits(train=60, valid=20), DigitsMLP(width=8)
    one = kdlib.Distiller(student, Ema(student), soft=kdlib.SoftLabels(), hard=kdlib.HardLabels())
    history = kdlib.fit(one, parts.train, valid=parts.valid, epochs=2, batch=20, progress=False)
    assert history.epochs[1]["hard"] < history.epochs[0]["hard"]
    assert int(one.source.steps) == (history.best + 1) * 3
    assert not torch.equal(one.source.average.model.hidden.weight, student.hidden.weight)
