"""A point that is shown one of several teachers."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import kdlib


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Projected(nn.Module):
    """An MSE behind a linear map that is made by shape."""

    def __init__(self):
        super().__init__()
        self.advanced = 0

    def prepare(self, student, teacher, batch):
        self.map = nn.Linear(student["embedding"].shape[-1], teacher["embedding"].shape[-1])

    def forward(self, student, teacher, batch):
        return mse_loss(self.map(student["embedding"]), teacher["embedding"])

    def advance(self, student):
        self.advanced += 1


class TwoTeachers:
    def __init__(self, a, b):
        self.a, self.b = a, b

    def __call__(self, batch):
        parts = {"a": self.a(batch["x"]), "b": self.b(batch["x"])}
        return {f"{name}.{tap}": value for name, taps in parts.items() for tap, value in taps.items()}


@pytest.fixture
def setup():
    def tapped(width):
        net = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))
        return kdlib.Tapped(net, logits="", embedding="0")

    source = TwoTeachers(kdlib.freeze(tapped(16)), kdlib.freeze(tapped(32)))
    return tapped(8), source, {"x": torch.randn(5, 4), "y": torch.arange(5) % 3}


def test_the_point_sees_that_teachers_taps_without_the_prefix():
    seen = []
    tap = torch.ones(1)

    def point(student, teacher, batch):
        seen.append((student, dict(teacher), batch))
        return tap.sum()

    student, batch = {"logits": tap}, {"x": tap}
    assert kdlib.of("a", point)(student, {"a.logits": tap, "b.logits": 2 * tap, "logits": tap}, batch) == 1
    (got,) = seen
    assert got[0] is student
    assert got[1].keys() == {"logits"}
    assert got[1]["logits"] is tap
    assert got[2] is batch


def test_a_name_that_begins_like_another_is_not_mixed_up():
    one, other = torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 0.0]])
    taps = {"a.logits": one, "ab.logits": other}
    loss = kdlib.of("a", kdlib.SoftLabels())({"logits": one}, taps, {})
    assert loss == kdlib.soft_cross_entropy(one, one)


def test_teachers_can_be_nested():
    z, other = torch.randn(2, 3), torch.randn(2, 3)
    point = kdlib.of("site", kdlib.of("a", kdlib.SoftLabels()))
    assert point({"logits": z}, {"site.a.logits": other}, {}) == kdlib.soft_cross_entropy(z, other)


def test_an_unknown_teacher_is_named_beside_those_there_are():
    z = torch.zeros(2, 3)
    with pytest.raises(kdlib.TapError, match=r"'raww'.*'raw'.*spectrogram"):
        kdlib.of("raww", kdlib.SoftLabels())({"logits": z}, {"raw.logits": z, "spectrogram.logits": z}, {})


def test_two_teachers_give_two_terms(setup):
    student, source, batch = setup
    distiller = kdlib.Distiller(
        student, source, one=kdlib.of("a", kdlib.SoftLabels()), two=(0.5, kdlib.of("b", kdlib.SoftLabels()))
    )
    losses = distiller({**batch, "epoch": torch.zeros(5, dtype=torch.int64)})
    logits = student(batch["x"])["logits"]
    assert losses.terms["one"] == kdlib.soft_cross_entropy(logits, source.a(batch["x"])["logits"])
    assert losses.terms["two"] == kdlib.soft_cross_entropy(logits, source.b(batch["x"])["logits"])


def test_epoch_is_not_needed_where_nothing_is_scheduled(setup):
    student, source, batch = setup
    losses = kdlib.Distiller(student, source, one=kdlib.of("a", kdlib.SoftLabels()))(batch)
    assert losses.total.isfinite()


def test_a_schedule_inside_gets_the_clock(setup):
    student, source, batch = setup
    ramp = kdlib.Schedule(kind="linear", start=1.0, end=5.0, epochs=4)
    distiller = kdlib.Distiller(student, source, one=kdlib.of("a", kdlib.SoftLabels(temperature=ramp)))
    losses = distiller({**batch, "epoch": torch.full((5,), 2)})
    teacher = source.a(batch["x"])["logits"]
    assert losses.total == kdlib.soft_cross_entropy(student(batch["x"])["logits"], teacher, temperature=3.0)


def test_projectors_are_prepared_trained_saved_and_advanced(setup):
    student, source, batch = setup
    inner = Projected()
    distiller = kdlib.Distiller(student, source, hidden=kdlib.of("b", inner)).prepare(batch)
    assert inner.map.out_features == 32
    assert any(parameter is inner.map.weight for parameter in distiller.parameters())
    assert any(name.startswith("projectors.hidden") for name in distiller.state_dict())
    distiller(batch).total.backward()
    assert inner.map.weight.grad.abs().max() > 0
    distiller.advance()
    assert inner.advanced == 1
