"""The copy of the student that sources hold as a teacher."""

import copy

import pytest
import torch
from torch import nn

import kdlib
from kdlib.sources.copied import StudentCopy


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 5, batch_first=True, bidirectional=True)
        self.output = nn.Linear(10, 3)

    def forward(self, x):
        return {"logits": self.output(self.gru(x.unflatten(1, (2, 4)))[0][:, -1])}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return {"logits": self.second(torch.relu(self.first(x)))}


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
        self.scale = nn.ParameterList([torch.ones(4), torch.zeros(4)])
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    def forward(self, x):
        hidden = self.layer(x.unflatten(1, (2, 4))).mean(1)
        return {"logits": self.weighted(hidden * self.scale[0] + self.scale[1])}


def noisy():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


BUILDS = {
    "batch norm and dropout": lambda: kdlib.Tapped(noisy(), logits="", hidden="1"),
    "recurrent": Recurrent,
    "tied": Tied,
    "attention": Attentive,
}
EVERY = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def moved(student):
    """Train a student for a step, so that its weights and statistics are others."""
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    student(X)["logits"].square().sum().backward()
    optimizer.step()
    return student


def same(a, b):
    return all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@EVERY
def test_it_is_the_student_in_eval_mode_without_gradient_and_without_parameters(build):
    student = build()
    held = StudentCopy(student)
    taps = held({"x": X})
    assert not any(tap.requires_grad or tap.is_inference() for tap in taps.values())
    assert same(taps, student.eval()(X))
    assert list(held.parameters()) == []
    assert set(held.state_dict()) == {f"model.{name}" for name in student.state_dict()}
    assert len(list(student.parameters())) > 0


@EVERY
def test_nobody_puts_it_in_train_mode(build):
    held = StudentCopy(build().train())
    for trained in (held.train(), nn.Sequential(held).train()[0]):
        assert not any(module.training for module in trained.modules())
    assert same(held({"x": X}), held({"x": X}))


@EVERY
def test_it_stays_when_the_student_moves_and_follows_when_told(build):
    student = build()
    held, before = StudentCopy(student), copy.deepcopy(student).eval()
    moved(student)
    assert same(held({"x": X}), before(X))
    held.follow(student)
    assert same(held({"x": X}), student.eval()(X))
    for name, value in held.model.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])


@EVERY
def test_it_moves_a_share_of_the_way(build):
    student = build()
    held, before = StudentCopy(student), copy.deepcopy(student.state_dict())
    after = moved(student).state_dict()
    held.follow(student, 0.25)
    weights = dict(student.named_parameters(remove_duplicate=False))
    for name, value in held.model.state_dict().items():
        expected = 0.75 * before[name] + 0.25 * after[name] if name in weights else after[name]
        torch.testing.assert_close(value, expected)


@EVERY
def test_its_state_loads_into_another_and_into_a_copy_of_it(build):
    student = build()
    held = StudentCopy(student)
    held.follow(moved(student), 0.5)
    torch.manual_seed(1)
    other = StudentCopy(build())
    assert not same(other({"x": X}), held({"x": X}))
    other.load_state_dict(held.state_dict())
    twin = copy.deepcopy(held)
    expected = held({"x": X})
    held.follow(student)
    for one in (other, twin, copy.deepcopy(other)):
        assert same(one({"x": X}), expected)
        one.follow(student)
        assert same(one({"x": X}), held({"x": X}))


@EVERY
def test_it_changes_type_as_a_module_does(build):
    student = build().double()
    held = StudentCopy(student).double()
    held.follow(moved_double(student), 0.5)
    assert held({"x": X.double()})["logits"].dtype == torch.float64
    assert all(value.dtype != torch.float32 for value in held.state_dict().values())


def moved_double(student):
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    return student


def test_tied_weights_stay_tied_and_move_once():
    student = Tied()
    held, before = StudentCopy(student), student.first.weight.detach().clone()
    assert held.model.first.weight is held.model.second.weight
    moved(student)
    held.follow(student, 0.5)
    torch.testing.assert_close(held.model.first.weight, (before + student.first.weight.detach()) / 2)


def test_weights_that_do_not_move_stay_to_the_last_bit():
    student = Recurrent()
    held = StudentCopy(student)
    for _ in range(20):
        held.follow(student, 0.1)
    assert all(torch.equal(held.model.state_dict()[name], value) for name, value in student.state_dict().items())


def test_x_may_be_a_mapping():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, left, right):
            return {"logits": self.weight * (left - right)}

    taps = StudentCopy(Two())({"x": {"right": X, "left": 2 * X}})
    torch.testing.assert_close(taps["logits"], X)
