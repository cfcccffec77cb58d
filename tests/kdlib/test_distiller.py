"""The distiller: losses, weights, schedules, projectors, the clock, and what it refuses."""

import copy
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import kdlib


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tapped(width=8, norm=False):
    middle = nn.BatchNorm1d(width) if norm else nn.ReLU()
    net = nn.Sequential(nn.Linear(4, width), middle, nn.Dropout(0.5 if norm else 0.0), nn.Linear(width, 3))
    return kdlib.Tapped(net, logits="", embedding="1")


def source_of(width=16):
    return kdlib.SameInput(kdlib.freeze(tapped(width)))


def batch_of(rows=6, epoch=None):
    batch = {"x": torch.randn(rows, 4), "y": torch.arange(rows) % 3, "index": torch.arange(rows)}
    return batch if epoch is None else {**batch, "epoch": torch.full((rows,), epoch)}


class Projected(nn.Module):
    """An MSE behind a linear map that is made by shape, whenever it is asked to."""

    def __init__(self):
        super().__init__()
        self.prepared = 0
        self.advanced = []

    def prepare(self, student, teacher, batch):
        self.prepared += 1
        self.map = nn.Linear(student["embedding"].shape[-1], teacher["embedding"].shape[-1])

    def forward(self, student, teacher, batch):
        return mse_loss(self.map(student["embedding"]), teacher["embedding"])

    def advance(self, student):
        self.advanced.append(student)


def number(value):
    """A point that is a number times something to train."""
    return lambda student, teacher, batch: value * student["logits"].square().mean()


# losses


def test_the_total_is_the_weighted_sum_and_the_terms_are_unweighted():
    student, source, batch = tapped(), source_of(), batch_of()
    distiller = kdlib.Distiller(
        student, source, soft=(0.9, kdlib.SoftLabels.hinton(4.0)), hard=(0.1, kdlib.HardLabels())
    )
    losses = distiller(batch)
    z, teacher = student(batch["x"])["logits"], source.teacher(batch["x"])["logits"]
    soft = 16 * cross_entropy(z / 4, (teacher / 4).softmax(-1))
    hard = cross_entropy(z, batch["y"])
    assert list(losses.terms) == ["soft", "hard"]
    torch.testing.assert_close(losses.terms["soft"], soft.detach())
    torch.testing.assert_close(losses.terms["hard"], hard.detach())
    torch.testing.assert_close(losses.total, 0.9 * soft + 0.1 * hard)


def test_the_total_comes_first_and_has_a_gradient_and_the_terms_have_none():
    total, terms = kdlib.Distiller(tapped(), hard=kdlib.HardLabels())(batch_of())
    assert total.shape == ()
    assert total.requires_grad
    assert not terms["hard"].requires_grad


@settings(database=None, max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 100), st.floats(-10, 10)), min_size=1, max_size=4))
def test_any_weights_sum_up(entries):
    taps = {"logits": torch.ones(2, 3)}
    points = {f"p{place}": (weight, number(value)) for place, (weight, value) in enumerate(entries)}
    total, terms = kdlib.Distiller(tapped(), **points).losses(taps, {}, {"x": None})
    assert total.item() == pytest.approx(sum(weight * value for weight, value in entries), rel=1e-4, abs=1e-4)
    assert [term.item() for term in terms.values()] == pytest.approx([value for _, value in entries], rel=1e-5)


@pytest.mark.parametrize("weight", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), Fraction(1, 2)])
def test_a_number_of_any_library_is_a_weight(weight):
    distiller = kdlib.Distiller(tapped(), hard=(weight, kdlib.HardLabels()))
    losses = distiller(batch_of())
    assert losses.total == 0.5 * losses.terms["hard"]
    assert json.loads(json.dumps(distiller.weights)) == {"hard": 0.5}


def test_a_point_without_a_weight_has_weight_one():
    losses = kdlib.Distiller(tapped(), hard=kdlib.HardLabels())(batch_of())
    assert losses.total == losses.terms["hard"]


def test_a_network_alone_needs_no_source_and_its_points_see_no_teacher_taps():
    seen = []

    def point(student, teacher, batch):
        seen.append(dict(teacher))
        return student["logits"].sum()

    kdlib.Distiller(tapped(), point=point)(batch_of())
    assert seen == [{}]


def test_losses_can_be_asked_for_taps_that_are_there_already():
    student, source, batch = tapped(), source_of(), batch_of()
    distiller = kdlib.Distiller(student, source, soft=kdlib.SoftLabels(), hard=(0.5, kdlib.HardLabels()))
    again = distiller.losses(student(batch["x"]), source(batch), batch)
    assert again.total == distiller(batch).total


def test_mutual_learning_is_two_distillers_with_each_others_detached_taps():
    one, other, batch = tapped(), tapped(), batch_of()
    first, second = (kdlib.Distiller(net, soft=kdlib.SoftLabels()) for net in (one, other))
    a, b = one(batch["x"]), other(batch["x"])
    quiet = [{name: tap.detach() for name, tap in taps.items()} for taps in (a, b)]
    total = first.losses(a, quiet[1], batch).total + second.losses(b, quiet[0], batch).total
    total.backward()
    expected = (a["logits"].softmax(-1) - b["logits"].softmax(-1)).detach().sum(0) / 6
    torch.testing.assert_close(one.model[3].bias.grad, expected)
    torch.testing.assert_close(other.model[3].bias.grad, -expected)


def test_the_points_get_the_batch_with_what_the_source_wants_in_it():
    batch = {**batch_of(), "partners": torch.ones(2)}
    seen = []
    kdlib.Distiller(
        tapped(), lambda b: seen.append(b["partners"]) or {}, p=lambda s, t, b: b["partners"].sum() * s["logits"].sum()
    )(batch)
    assert seen[0] is batch["partners"]


def test_x_may_be_a_tuple_or_a_mapping():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, left, right):
            return {"logits": self.layer(left - right)}

    student = Two()
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    distiller = kdlib.Distiller(
        student, kdlib.SameInput(kdlib.freeze(Two())), h=kdlib.HardLabels(), s=kdlib.SoftLabels()
    )
    expected = cross_entropy(student.layer(x - 1), y).detach()
    for arguments in ((x, torch.ones(6, 4)), {"right": torch.ones(6, 4), "left": x}):
        assert distiller({"x": arguments, "y": y}).terms["h"] == expected


def test_the_batch_is_not_changed():
    batch = batch_of(epoch=0)
    before = dict(batch)
    ramp = kdlib.Schedule(kind="linear", start=1.0, end=2.0, epochs=2)
    distiller = kdlib.Distiller(tapped(), source_of(), soft=(ramp, kdlib.SoftLabels(temperature=ramp)))
    distiller.prepare(batch)
    distiller(batch)
    distiller.check(batch)
    assert batch.keys() == before.keys()
    assert all(batch[name] is value for name, value in before.items())


# weights, schedules, the clock


def explode(student, teacher, batch):
    raise AssertionError("computed")


def test_a_point_of_weight_0_is_not_computed_and_not_among_the_terms():
    losses = kdlib.Distiller(tapped(), never=(0, explode), hard=kdlib.HardLabels())(batch_of())
    assert list(losses.terms) == ["hard"]
    assert losses.total == losses.terms["hard"]


def test_all_weights_0_is_an_error_that_says_when():
    with pytest.raises(kdlib.KdlibError, match="No point has a weight above 0"):
        kdlib.Distiller(tapped(), never=(0.0, explode))(batch_of())


def test_a_weight_scheduled_by_epoch_looks_at_the_batch():
    ramp = kdlib.Schedule(kind="linear", start=0.0, end=1.0, epochs=4)
    distiller = kdlib.Distiller(tapped(), ramp=(ramp, kdlib.HardLabels()), hard=kdlib.HardLabels())
    for epoch, weight in ((1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)):
        total, terms = distiller(batch_of(epoch=epoch))
        torch.testing.assert_close(total.detach(), (1 + weight) * terms["hard"])
    assert list(distiller(batch_of(epoch=0)).terms) == ["hard"]  # its weight is 0 at epoch 0


def test_the_epoch_may_be_one_number():
    ramp = kdlib.Schedule(kind="linear", start=0.0, end=1.0, epochs=4)
    total, terms = kdlib.Distiller(tapped(), hard=(ramp, kdlib.HardLabels()))({**batch_of(), "epoch": 2})
    torch.testing.assert_close(total.detach(), 0.5 * terms["hard"])


def test_a_weight_scheduled_by_step_follows_the_optimizers_steps():
    ramp = kdlib.Schedule(kind="linear", start=1.0, end=3.0, steps=4)
    distiller = kdlib.Distiller(tapped(), hard=(ramp, kdlib.HardLabels()))
    optimizer = distiller.attach(torch.optim.SGD(distiller.parameters(), lr=0.1))
    found = []
    for _ in range(6):
        losses = distiller(batch_of(epoch=0))
        found.append((losses.total / losses.terms["hard"]).item())
        optimizer.step()
    assert found == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0, 3.0])


def test_any_function_of_step_and_epoch_is_a_weight():
    distiller = kdlib.Distiller(tapped(), hard=(lambda step, epoch: 10 * step + epoch, kdlib.HardLabels()))
    distiller.advance()
    losses = distiller(batch_of(epoch=3))
    torch.testing.assert_close(losses.total.detach(), 13 * losses.terms["hard"])


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_a_scheduled_temperature_softens_by_step_or_epoch(unit):
    ramp = kdlib.Schedule(kind="linear", start=1.0, end=5.0, **{unit: 4})
    student, source = tapped(), source_of()
    point = kdlib.SoftLabels(temperature=ramp, student_temperature=ramp)
    distiller = kdlib.Distiller(student, source, soft=point)
    for now, temperature in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 5.0]):
        batch = batch_of(epoch=now if unit == "epochs" else 0)
        z, teacher = student(batch["x"])["logits"], source(batch)["logits"]
        expected = kdlib.soft_cross_entropy(z, teacher, temperature=temperature, student_temperature=temperature)
        torch.testing.assert_close(distiller(batch).total, expected)
        distiller.advance()


def test_a_schedule_without_an_epoch_in_the_batch_says_what_is_missing():
    ramp = kdlib.Schedule(kind="linear", start=0.0, end=1.0, epochs=4)
    with pytest.raises(kdlib.BatchError, match="'epoch'"):
        kdlib.Distiller(tapped(), hard=(ramp, kdlib.HardLabels()))(batch_of())


def test_a_point_that_holds_a_function_needs_no_epoch():
    class Any:
        def __init__(self):
            self.loss = mse_loss

        def __call__(self, student, teacher, batch):
            return self.loss(student["logits"], teacher["logits"])

    assert kdlib.Distiller(tapped(), source_of(), any=Any())(batch_of()).total.isfinite()


def test_a_schedule_in_a_point_inside_a_point_gets_the_clock():
    class Twice(nn.Module):
        def __init__(self, point):
            super().__init__()
            self.inner = nn.ModuleList()
            self.points = [point]

        def forward(self, student, teacher, batch):
            return 2 * self.points[0](student, teacher, batch)

    ramp = kdlib.Schedule(kind="linear", start=1.0, end=5.0, epochs=4)
    student, source, batch = tapped(), source_of(), batch_of(epoch=2)
    losses = kdlib.Distiller(student, source, twice=Twice(kdlib.SoftLabels(temperature=ramp)))(batch)
    expected = kdlib.soft_cross_entropy(student(batch["x"])["logits"], source(batch)["logits"], temperature=3.0)
    torch.testing.assert_close(losses.total, 2 * expected)


def test_the_step_is_saved_and_loaded():
    one, other = (kdlib.Distiller(tapped(), hard=kdlib.HardLabels()) for _ in range(2))
    for _ in range(3):
        one.advance()
    other.load_state_dict(one.state_dict())
    assert int(other.step) == 3


def test_attach_calls_advance_once_per_step_of_the_optimizer():
    class Source:
        advanced = 0

        def __call__(self, batch):
            return {"embedding": torch.zeros(6, 5)}

        def advance(self, student):
            self.advanced += 1

    point, source, student = Projected(), Source(), tapped()
    distiller = kdlib.Distiller(student, source, hidden=point).prepare(batch_of())
    optimizer = torch.optim.Adam(distiller.parameters())
    assert distiller.attach(optimizer) is optimizer
    for step in range(1, 4):
        distiller(batch_of()).total.backward()
        distiller(batch_of()).total.backward()  # two batches a step
        assert int(distiller.step) == step - 1
        optimizer.step()
        assert int(distiller.step) == len(point.advanced) == source.advanced == step
        assert point.advanced[-1] is student


def test_with_two_optimizers_the_clock_moves_once_after_the_last_one():
    point = Projected()
    distiller = kdlib.Distiller(tapped(), source_of(), hidden=point).prepare(batch_of())
    for_student = distiller.attach(torch.optim.Adam(distiller.student.parameters()))
    for_projector = distiller.attach(torch.optim.SGD(distiller.projectors.parameters()))
    distiller(batch_of()).total.backward()
    for_student.step()
    assert int(distiller.step) == 0
    for_projector.step()
    assert int(distiller.step) == len(point.advanced) == 1
    assert "not in the optimizer" not in str(distiller.check(batch_of()))


@pytest.mark.parametrize("prepared", [True, False])
def test_an_optimizer_that_lacks_a_projector_is_refused_before_its_first_step(prepared):
    distiller = kdlib.Distiller(tapped(), source_of(), hidden=Projected())
    if prepared:
        distiller.prepare(batch_of())
    optimizer = distiller.attach(torch.optim.SGD(distiller.student.parameters(), lr=1.0))
    distiller.prepare(batch_of())(batch_of()).total.backward()
    before = copy.deepcopy(distiller.state_dict())
    with pytest.raises(kdlib.KdlibError, match=r"lacks \d parameters of projectors: hidden.*distiller\.parameters\(\)"):
        optimizer.step()
    for name, value in distiller.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_prepared_and_checked_under_autocast_the_student_still_gets_its_gradients():
    distiller = kdlib.Distiller(tapped(), source_of(), hidden=Projected(), hard=kdlib.HardLabels())
    with torch.autocast("cpu", torch.bfloat16):
        assert distiller.prepare(batch_of()).check(batch_of())
        total = distiller(batch_of()).total
    total.backward()
    assert all(parameter.grad is not None for parameter in distiller.student.parameters())


@pytest.mark.parametrize("kept", [True, False])
def test_an_optimizer_of_an_earlier_stage_trains_no_projector_of_the_next(kept):
    distiller = kdlib.Distiller(tapped(), source_of(), hidden=Projected()).prepare(batch_of())
    first = distiller.attach(torch.optim.Adam(distiller.parameters()))
    distiller(batch_of()).total.backward()
    first.step()
    second = distiller.attach(torch.optim.SGD(distiller.student.parameters()))
    if not kept:
        del first
    assert not distiller.check(batch_of())
    with pytest.raises(kdlib.KdlibError, match="lacks 2 parameters of projectors: hidden"):
        second.step()


def test_an_optimizer_that_another_took_the_place_of_does_not_step_unless_both_are_attached_again():
    distiller = kdlib.Distiller(tapped(), source_of(), hidden=Projected()).prepare(batch_of())
    first = distiller.attach(torch.optim.SGD(distiller.student.parameters(), lr=0.1))
    for_projector = distiller.attach(torch.optim.SGD(distiller.projectors.parameters(), lr=0.1))
    distiller(batch_of()).total.backward()
    first.step()
    for_projector.step()
    second = distiller.attach(torch.optim.Adam(distiller.parameters()))
    second.step()
    before = copy.deepcopy(distiller.state_dict())
    with pytest.raises(kdlib.KdlibError, match="took its place"):
        first.step()
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())
    for optimizer in (distiller.attach(first), distiller.attach(second)):
        optimizer.step()
    assert int(distiller.step) == 3


def test_a_copy_has_no_optimizer_and_its_own_clock():
    distiller = kdlib.Distiller(tapped(), hard=kdlib.HardLabels())
    optimizer = distiller.attach(torch.optim.Adam(distiller.parameters()))
    twin = copy.deepcopy(distiller)
    assert "none attached" in str(twin.check(batch_of()))
    other = twin.attach(torch.optim.Adam(twin.parameters()))
    for one, at_work in ((distiller, optimizer), (twin, other)):
        one(batch_of()).total.backward()
        at_work.step()
        assert int(one.step) == 1


def test_attaching_an_optimizer_again_counts_its_steps_once():
    distiller = kdlib.Distiller(tapped(), hard=kdlib.HardLabels())
    optimizer = torch.optim.Adam(distiller.parameters())
    distiller.attach(distiller.attach(optimizer))
    distiller(batch_of()).total.backward()
    optimizer.step()
    assert int(distiller.step) == 1


class Output(nn.Module):
    """A model whose output is a mapping with more in it than tensors, as large libraries return."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return {"loss": None, "logits": self.layer(x), "hidden_states": (x, x)}


def test_what_is_no_tensor_in_a_models_output_is_no_tap():
    teacher = kdlib.freeze(Output())
    assert list(teacher(torch.zeros(2, 4))) == ["logits"]
    distiller = kdlib.Distiller(Output(), kdlib.SameInput(teacher), soft=kdlib.SoftLabels())
    assert distiller.check(batch_of())
    with pytest.raises(kdlib.TapError, match="no tap 'hidden_states'"):
        kdlib.Distiller(Output(), hard=kdlib.HardLabels(tap="hidden_states"))(batch_of())


def test_forward_changes_nothing_that_is_saved_but_running_statistics():
    distiller = kdlib.Distiller(tapped(), source_of(), hidden=Projected(), hard=kdlib.HardLabels()).prepare(batch_of())
    before = copy.deepcopy(distiller.state_dict())
    distiller(batch_of()).total.backward()
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())


# names


@pytest.mark.parametrize("name", ["keys", "train", "forward", "type", "step", "student", "self", "source"])
def test_a_point_may_have_the_name_of_a_method_or_attribute(name):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, student, teacher, batch):
            return self.scale * student["logits"].square().mean()

    point = Scaled()
    distiller = kdlib.Distiller(tapped(), **{name: point})
    losses = distiller(batch_of())
    assert list(losses.terms) == [name]
    losses.total.backward()
    assert point.scale.grad is not None
    saved = distiller.state_dict()
    (key,) = [key for key in saved if key.endswith("scale")]
    assert name in key.split(".")
    distiller.train().eval()
    assert not point.training
    assert list(distiller.points) == [name]
    saved[key] = torch.tensor(7.0)
    distiller.load_state_dict(saved)
    assert point.scale.item() == 7.0


def test_projectors_of_two_points_are_saved_under_their_own_names():
    distiller = kdlib.Distiller(tapped(), source_of(), a=Projected(), b=Projected()).prepare(batch_of())
    weights = [name for name in distiller.state_dict() if name.endswith("map.weight")]
    assert len(weights) == 2
    other = kdlib.Distiller(tapped(), source_of(), b=Projected(), a=Projected()).prepare(batch_of())
    other.load_state_dict(distiller.state_dict())  # in another order: by name, not by place
    for name in "ab":
        assert torch.equal(other.points[name].map.weight, distiller.points[name].map.weight)


# what it refuses


def test_no_point_is_refused():
    with pytest.raises(kdlib.KdlibError, match="at least one point"):
        kdlib.Distiller(tapped())


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_is_no_number_from_0_up_is_refused_by_name(weight):
    with pytest.raises(kdlib.KdlibError, match="'hard'"):
        kdlib.Distiller(tapped(), hard=(weight, kdlib.HardLabels()))


def test_a_point_that_cannot_be_called_is_refused_by_name():
    with pytest.raises(kdlib.KdlibError, match="'hard'"):
        kdlib.Distiller(tapped(), hard=(0.5, "hard_labels"))


def test_a_point_that_returns_a_vector_is_refused_by_name_and_shape():
    with pytest.raises(kdlib.KdlibError, match=r"'rows'.*\(6,\)"):
        kdlib.Distiller(tapped(), rows=lambda s, t, b: s["logits"].sum(-1))(batch_of())


def test_a_point_that_returns_no_tensor_is_refused_by_name_and_type():
    with pytest.raises(kdlib.KdlibError, match=r"'rows'.*float"):
        kdlib.Distiller(tapped(), rows=lambda s, t, b: 0.5)(batch_of())


def test_an_error_inside_a_point_names_it_and_keeps_its_type():
    def broken(student, teacher, batch):
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside") as caught:
        kdlib.Distiller(tapped(), pull=broken)(batch_of())
    assert any("'pull'" in note for note in caught.value.__notes__)


def test_a_student_that_returns_a_bare_tensor_says_how_to_wrap_it():
    with pytest.raises(kdlib.TapError, match=r"student returned a Tensor.*kdlib\.Tapped"):
        kdlib.Distiller(nn.Linear(4, 3), hard=kdlib.HardLabels())(batch_of())


def test_a_frozen_student_is_refused():
    with pytest.raises(kdlib.KdlibError, match="swapped"):
        kdlib.Distiller(kdlib.freeze(tapped()), hard=kdlib.HardLabels())


def test_a_teacher_in_place_of_a_source_says_how_to_make_one_of_it():
    with pytest.raises(kdlib.KdlibError, match=r"kdlib\.SameInput"):
        kdlib.Distiller(tapped(), kdlib.freeze(tapped()), soft=kdlib.SoftLabels())


def test_the_one_name_that_a_point_with_a_projector_cannot_have_is_refused():
    with pytest.raises(kdlib.KdlibError, match="'training'"):
        kdlib.Distiller(tapped(), source_of(), training=Projected())


def test_a_student_that_is_no_module_is_refused():
    with pytest.raises(kdlib.KdlibError, match="function"):
        kdlib.Distiller(lambda x: {"logits": x}, hard=kdlib.HardLabels())


class ModuleSource(nn.Module):
    """A source with state of its own, which is a module."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, batch):
        return self.teacher(batch["x"])


class Nested:
    def __init__(self, teacher):
        self.sources = {"a": [kdlib.SameInput(teacher)]}

    def __call__(self, batch):
        return self.sources["a"][0](batch)


@pytest.mark.parametrize("wrap", [kdlib.SameInput, Nested, ModuleSource])
def test_a_student_that_is_the_teacher_is_refused(wrap):
    net = tapped()
    with pytest.raises(kdlib.KdlibError, match=r"(?i)share|same"):
        kdlib.Distiller(net, wrap(kdlib.freeze(net)), soft=kdlib.SoftLabels())


def test_one_shared_parameter_is_refused_by_name():
    big, small = tapped(), tapped()
    small.model[3].bias = big.model[3].bias
    with pytest.raises(kdlib.KdlibError, match=r"model\.3\.bias"):
        kdlib.Distiller(small, kdlib.SameInput(kdlib.freeze(big)), soft=kdlib.SoftLabels())


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (kdlib.SoftLabels, r"'soft' is the class SoftLabels; make one: SoftLabels\(\)"),
        ((0.5, kdlib.SoftLabels), r"'soft' is the class SoftLabels"),
        ((kdlib.SoftLabels(), 0.5), r"'soft' is no point and no \(weight, point\)"),
        (("a", kdlib.SoftLabels()), r"'soft' is no point and no \(weight, point\)"),
        ((0.5, kdlib.SoftLabels(), 4.0), r"'soft' is no point and no \(weight, point\)"),
        ((kdlib.SoftLabels(),), r"'soft' is no point and no \(weight, point\)"),
        ((), r"'soft' is no point and no \(weight, point\)"),
        ((torch.tensor([0.5]), kdlib.SoftLabels()), r"'soft' is no point and no \(weight, point\)"),
        ((nn.Parameter(torch.tensor(0.5)), kdlib.SoftLabels()), r"a weight is a number or a schedule"),
        ((np.float32(-0.5), kdlib.SoftLabels()), "from 0 up, not -0.5"),
    ],
)
def test_what_is_no_point_is_refused_when_the_distiller_is_made(entry, words):
    with pytest.raises(kdlib.KdlibError, match=words):
        kdlib.Distiller(tapped(), soft=entry)


@pytest.mark.parametrize("batch", [(torch.zeros(2, 4), torch.tensor([0, 1])), torch.zeros(2, 4)])
def test_a_batch_that_is_no_mapping_says_how_to_make_one(batch):
    distiller = kdlib.Distiller(tapped(), hard=kdlib.HardLabels())
    for call in (distiller, distiller.check):
        with pytest.raises(kdlib.BatchError, match=r"kdlib\.as_batch\(\(x, y\)\)"):
            call(batch)


def test_a_batch_without_labels_names_what_a_user_put_there():
    with pytest.raises(kdlib.BatchError, match=r"no 'y'.* Known: x\."):
        kdlib.Distiller(tapped(), hard=kdlib.HardLabels())({"x": torch.zeros(2, 4)})


def test_a_copy_of_the_teacher_is_a_good_student():
    net = tapped()
    distiller = kdlib.Distiller(copy.deepcopy(net), kdlib.SameInput(kdlib.freeze(net)), soft=kdlib.SoftLabels())
    assert len(list(distiller.parameters())) == 4


# the teacher


@pytest.mark.parametrize("wrap", [kdlib.SameInput, Nested, ModuleSource])
def test_the_teacher_is_in_no_parameters_state_dict_or_train(wrap):
    net, student = tapped(norm=True), tapped()
    distiller = kdlib.Distiller(student, wrap(kdlib.freeze(net)), soft=kdlib.SoftLabels())
    teachers = {id(parameter) for parameter in net.parameters()}
    assert not any(id(parameter) in teachers for parameter in distiller.parameters())
    assert {name for name in distiller.state_dict() if not name.startswith("student.")} == {"step"}
    distiller.train()
    assert not any(part.training for part in net.modules())


def test_the_students_backward_reaches_no_teacher():
    net = tapped(16, norm=True)
    distiller = kdlib.Distiller(
        tapped(16), kdlib.SameInput(kdlib.freeze(net)), h=lambda s, t, b: mse_loss(s["embedding"], t["embedding"])
    )
    distiller(batch_of()).total.backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert distiller.student.model[0].weight.grad.abs().max() > 0


def test_a_copied_and_a_pickled_distiller_give_the_same_losses():
    batch = batch_of(epoch=1)
    ramp = kdlib.Schedule(kind="linear", start=1.0, end=2.0, epochs=4)
    distiller = kdlib.Distiller(tapped(), source_of(), soft=(ramp, kdlib.SoftLabels()), hard=kdlib.HardLabels())
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert twin(batch).total == distiller(batch).total
        twin.advance()
        assert int(twin.step) == 1
    assert int(distiller.step) == 0


# prepare


def everything(distiller, *others):
    modules = [distiller, *others]
    return {
        "random": torch.get_rng_state(),
        "modes": [part.training for module in modules for part in module.modules()],
        "tensors": [tensor.clone() for module in modules for tensor in module.state_dict().values()],
        "gradients": [None if p.grad is None else p.grad.clone() for module in modules for p in module.parameters()],
    }


def assert_same(one, other):
    assert torch.equal(one["random"], other["random"])
    assert one["modes"] == other["modes"]
    torch.testing.assert_close(one["tensors"], other["tensors"], rtol=0, atol=0)
    torch.testing.assert_close(one["gradients"], other["gradients"], rtol=0, atol=0)


def test_prepare_makes_a_projector_that_trains_and_is_saved():
    distiller = kdlib.Distiller(tapped(8), source_of(16), hidden=Projected(), hard=kdlib.HardLabels())
    names = set(distiller.state_dict())
    assert distiller.prepare(batch_of()) is distiller
    point = distiller.points["hidden"]
    assert (point.map.in_features, point.map.out_features) == (8, 16)
    new = set(distiller.state_dict()) - names
    assert len(new) == 2
    assert all("hidden" in name.split(".") for name in new)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    before = point.map.weight.detach().clone()
    distiller(batch_of()).total.backward()
    optimizer.step()
    assert not torch.equal(point.map.weight, before)


@pytest.mark.parametrize("training", [True, False])
def test_prepare_changes_nothing_else(training):
    student, teacher, batch = tapped(8, norm=True), tapped(16, norm=True), batch_of()
    distiller = kdlib.Distiller(student, kdlib.SameInput(kdlib.freeze(teacher)), hidden=Projected())
    student.train(training)
    student.model[2].train(not training)
    student(batch["x"])["logits"].sum().backward()
    before = everything(student, teacher)
    distiller.prepare(batch)
    assert_same(everything(student, teacher), before)


def test_prepare_called_twice_makes_one_projector():
    batch = batch_of()
    distiller = kdlib.Distiller(tapped(8), source_of(16), hidden=Projected()).prepare(batch)
    projector = distiller.points["hidden"].map
    distiller.prepare(batch)
    assert distiller.points["hidden"].map is projector


def test_prepare_without_anything_to_prepare_does_not_run_the_networks():
    distiller = kdlib.Distiller(tapped(), lambda batch: explode(0, 0, 0), hard=kdlib.HardLabels())
    distiller.prepare(batch_of())


def test_a_tap_missing_in_prepare_names_the_point():
    class Wrong(Projected):
        def prepare(self, student, teacher, batch):
            self.map = nn.Linear(student["embeding"].shape[-1], 2)

    with pytest.raises(kdlib.TapError, match=r"(?s)'hidden'.*'embeding'.*'embedding'"):
        kdlib.Distiller(tapped(8), source_of(16), hidden=Wrong()).prepare(batch_of())


# what is trained


@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
def test_with_a_hidden_layer_point_alone_the_output_layer_stays_bit_equal_under_weight_decay(schedule):
    student, source = tapped(16), source_of(16)
    before = copy.deepcopy(student.state_dict())
    data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)
    distiller = kdlib.Distiller(student, source, hidden=lambda s, t, b: mse_loss(s["embedding"], t["embedding"]))
    kdlib.fit(
        distiller,
        data,
        epochs=3,
        batch=8,
        lr=0.01,
        optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.5),
        schedule=schedule,
        clip=1.0,
        progress=False,
    )
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.0.weight", "model.0.bias"}
