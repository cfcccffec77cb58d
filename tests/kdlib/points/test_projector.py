"""Projectors: made by shape, owned by the distiller, saved by the point's name, dropped with it."""

import copy

import pytest
import torch
from torch import nn

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.points.fitnet import FitNet
from kdlib.points.projector import make_projector, projected
from kdlib.points.vid import Vid

POINTS = pytest.mark.parametrize("build", [FitNet, Vid])
SHAPES = {(2, 3): (2, 5), (2, 3, 4): (2, 5, 7), (2, 3, 4, 5): (2, 5, 7, 2)}


def of_kind(layer):
    return {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4}[type(layer)]


@pytest.mark.parametrize(("ours", "theirs"), SHAPES.items())
def test_the_shapes_say_which_layer(ours, theirs):
    layer = make_projector(torch.zeros(ours), torch.zeros(theirs))
    assert of_kind(layer) == len(ours)
    assert layer(torch.zeros(ours)).shape == (2, 5, *ours[2:])
    assert layer.bias is not None


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_that_agree_need_none_unless_asked(shape):
    tap = torch.randn(shape)
    assert isinstance(make_projector(tap, tap), nn.Identity)
    assert of_kind(make_projector(tap, tap, "always")) == len(shape)
    assert projected(make_projector(tap, tap), tap) is tap


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_weights_are_float32_or_better(dtype, expected):
    tap = torch.zeros(2, 3, dtype=dtype)
    layer = make_projector(tap, torch.zeros(2, 5))
    assert layer.weight.dtype == expected
    assert projected(layer, tap).dtype == expected


@pytest.mark.parametrize(
    ("ours", "theirs"), [((2, 3), (2, 3, 4)), ((2,), (2,)), ((2, 3, 4, 5, 6), (2, 3, 4, 5, 6)), ((2, 3), (4, 3))]
)
def test_taps_without_a_projector_are_named(ours, theirs):
    with pytest.raises(kdlib.TapError) as error:
        make_projector(torch.zeros(ours), torch.zeros(theirs))
    assert str(ours) in str(error.value)
    assert str(theirs) in str(error.value)


def test_a_tap_of_other_channels_than_at_first_is_named():
    layer = make_projector(torch.zeros(2, 3), torch.zeros(2, 5))
    with pytest.raises(kdlib.TapError, match=r"\(2, 4\).*3 channels"):
        projected(layer, torch.zeros(2, 4))


BATCH = {
    "x": torch.rand(4, 64, generator=torch.Generator().manual_seed(0)),
    "y": torch.arange(4),
    "index": torch.arange(4),
    "epoch": torch.zeros(4, dtype=torch.int64),
}


def distiller(point, seed=0):
    torch.manual_seed(seed)
    teacher = kdlib.freeze(DigitsMLP(width=24))
    return kdlib.Distiller(
        DigitsMLP(width=8), kdlib.SameInput(teacher), hint=(0.5, point), hard=(0.5, kdlib.HardLabels())
    )


@POINTS
def test_unprepared_it_says_what_to_call_and_who_it_is(build):
    with pytest.raises(kdlib.KdlibError, match=r"(?s)Point 'hint'.*distiller\.prepare\(batch\) before the optimizer"):
        distiller(build())(BATCH)


@POINTS
def test_the_distiller_owns_and_saves_the_projector_by_the_points_name(build):
    one = distiller(build()).prepare(BATCH)
    own = {name for name, _ in one.named_parameters() if not name.startswith("student.")}
    assert own == {f"projectors.hint.{name}" for name, _ in one.points["hint"].named_parameters()} != set()
    assert own <= set(one.state_dict())
    assert all(name.split(".")[0] in ("hidden", "output") for name in one.student.state_dict())
    one(BATCH).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in one.points["hint"].parameters())


@POINTS
def test_preparing_changes_nothing_else_and_happens_once(build):
    one = distiller(build())
    before, state = copy.deepcopy(one.student.state_dict()), torch.get_rng_state()
    one.prepare(BATCH)
    made = list(one.points["hint"].parameters())
    one.prepare(BATCH)
    one.points["hint"].prepare(one.student(BATCH["x"]), one.source(BATCH), BATCH)
    assert all(a is b for a, b in zip(made, one.points["hint"].parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in one.student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert one.training


@POINTS
def test_a_fresh_distiller_loads_the_state_after_prepare(build):
    one, other = distiller(build()).prepare(BATCH), distiller(build(), seed=1)
    with pytest.raises(kdlib.KdlibError, match=r"no 'projectors\.hint.*call prepare\(batch\) before load_state_dict"):
        other.load_state_dict(one.state_dict())
    other.prepare(BATCH).load_state_dict(one.state_dict())
    other.source = one.source
    torch.testing.assert_close(other(BATCH).terms, one(BATCH).terms, rtol=0, atol=0)


@POINTS
def test_the_check_sees_the_projector_in_the_optimizer(build):
    one = distiller(build()).prepare(BATCH)
    left_out = torch.optim.SGD(one.student.parameters(), lr=0.1)
    one.attach(left_out)
    assert "projector parameters" in str(one.check(BATCH))
    assert not one.check(BATCH)
    two = distiller(build()).prepare(BATCH)
    two.attach(torch.optim.SGD(two.parameters(), lr=0.1))
    assert two.check(BATCH)


@POINTS
def test_a_point_of_one_of_several_teachers_keeps_its_projector(build):
    torch.manual_seed(0)
    teacher = kdlib.freeze(DigitsMLP(width=24))
    source = lambda batch: {f"a.{name}": tap for name, tap in teacher(batch["x"]).items()}  # noqa: E731
    one = kdlib.Distiller(DigitsMLP(width=8), source, hint=kdlib.of("a", build())).prepare(BATCH)
    assert any(name.startswith("projectors.hint.point.") for name, _ in one.named_parameters())
    assert one(BATCH).total.isfinite()


@POINTS
def test_fit_prepares_and_trains_it(build):
    one = distiller(build())
    parts = digits(train=60)
    history = kdlib.fit(one, parts.train, epochs=6, batch=20, lr=1e-2, progress=False)
    assert history.epochs[-1]["hint"] < history.epochs[0]["hint"]
    assert any(name.startswith("projectors.hint") for name in one.state_dict())


@POINTS
def test_a_copy_has_a_projector_of_its_own(build):
    one = distiller(build()).prepare(BATCH)
    twin = copy.deepcopy(one)
    assert torch.equal(twin(BATCH).total, one(BATCH).total)
    with torch.no_grad():
        for parameter in one.points["hint"].parameters():
            parameter.add_(1)
    assert not torch.equal(twin(BATCH).total, one(BATCH).total)
    names = [name for name, _ in one.named_parameters()]
    assert names == [name for name, _ in twin.named_parameters()]
