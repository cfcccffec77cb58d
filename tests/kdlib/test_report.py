"""``distiller.check``: true on a good setup, false with the reason on a bad one, and without effect."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import kdlib


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tapped(width=8, inplace=False):
    net = nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(inplace), nn.Dropout(0.5), nn.Linear(width, 3)
    )
    return kdlib.Tapped(net, logits="", embedding="1")


class Projected(nn.Module):
    """An MSE behind a linear map that is made by shape."""

    def prepare(self, student, teacher, batch):
        self.map = nn.Linear(student["embedding"].shape[-1], teacher["embedding"].shape[-1])

    def forward(self, student, teacher, batch):
        return mse_loss(self.map(student["embedding"]), teacher["embedding"])


class Setup:
    """A setup with nothing wrong."""

    def __init__(self, **points):
        self.batch = {"x": torch.randn(6, 4), "y": torch.arange(6) % 3}
        self.net, self.student = tapped(16), tapped(8)
        self.teacher = kdlib.freeze(self.net)
        points = points or {"soft": (0.9, kdlib.SoftLabels()), "hard": (0.1, kdlib.HardLabels()), "hidden": Projected()}
        self.distiller = kdlib.Distiller(self.student, kdlib.SameInput(self.teacher), **points).prepare(self.batch)
        self.optimizer = self.distiller.attach(torch.optim.Adam(self.distiller.parameters()))

    def check(self):
        return self.distiller.check(self.batch)


@pytest.fixture
def setup():
    return Setup()


def wrong(report):
    assert not report
    return "\n".join(f"{what}: {seen}" for mark, what, seen in report.rows if mark == "wrong")


def state(setup):
    modules = (setup.distiller, setup.net)
    return {
        "random": [torch.get_rng_state()],
        "modes": [part.training for module in modules for part in module.modules()],
        "tensors": [tensor.clone() for module in modules for tensor in module.state_dict().values()],
        "gradients": [None if p.grad is None else p.grad.clone() for module in modules for p in module.parameters()],
        "wants": [p.requires_grad for module in modules for p in module.parameters()],
        "optimizer": copy.deepcopy(setup.optimizer.state_dict()),
    }


def assert_same(one, other):
    assert one["modes"] == other["modes"]
    assert one["wants"] == other["wants"]
    for part in ("random", "tensors", "gradients", "optimizer"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0, equal_nan=True)


def test_a_good_setup_is_true_and_prints_as_one_table(setup):
    report = setup.check()
    assert report, str(report)
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows)
    for (mark, what, seen), line in zip(report.rows, lines, strict=True):
        assert line.startswith(mark)
        assert what in line
        assert line.endswith(seen)


def test_the_table_lists_taps_with_shapes_points_with_gradient_norms_and_the_teachers_accuracy(setup):
    table = str(setup.check())
    for text in ("(6, 8)", "(6, 16)", "(6, 3)", "point soft", "point hard", "point hidden", "gradient norm"):
        assert text in table
    right = int((setup.teacher(setup.batch["x"])["logits"].argmax(-1) == setup.batch["y"]).sum())
    assert f"{right} of 6" in table


def test_each_points_gradient_norm_is_the_students():
    setup = Setup(soft=(0.9, kdlib.SoftLabels()))
    setup.distiller.eval()  # no dropout
    (row,) = [seen for _, what, seen in setup.check().rows if what == "point soft"]
    losses = setup.distiller(setup.batch)
    losses.terms["soft"]
    (losses.total / 0.9).backward()
    norm = sum(p.grad.square().sum() for p in setup.student.parameters()).sqrt().item()
    assert f"{norm:.3g}" in row
    assert f"{losses.terms['soft'].item():.6g}" in row


@pytest.mark.parametrize("training", [True, False])
def test_it_changes_no_buffer_random_state_gradient_or_mode(setup, training):
    setup.distiller.train(training)
    setup.student.model[3].train(not training)
    setup.distiller(setup.batch).total.backward()
    before = state(setup)
    assert setup.check()
    assert_same(state(setup), before)


@pytest.mark.parametrize("part", ["outer", "inner"])
def test_a_teacher_in_train_mode_is_wrong_and_left_as_it_is(setup, part):
    (setup.net if part == "outer" else setup.net.model).train()
    before = state(setup)
    assert "train mode" in wrong(setup.check())
    assert_same(state(setup), before)


def test_it_changes_nothing_where_something_is_wrong():
    setup = Setup(bad=lambda s, t, b: s["logits"].mean() * float("nan"), hard=kdlib.HardLabels())
    setup.distiller(setup.batch).total.backward()
    before = state(setup)
    assert not setup.check()
    assert_same(state(setup), before)


def test_it_changes_nothing_where_a_point_raises():
    def broken(student, teacher, batch):
        raise kdlib.TapError("on purpose")

    setup = Setup(broken=broken, hard=kdlib.HardLabels())
    before = state(setup)
    assert "on purpose" in wrong(setup.check())
    assert_same(state(setup), before)


class Raw(nn.Module):
    """A source that is a module and holds its teacher as one."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    @torch.no_grad()
    def forward(self, batch):
        return self.net(batch["x"])


def test_a_teacher_that_is_a_module_in_a_source_that_is_one_is_wrong():
    distiller = kdlib.Distiller(tapped(), Raw(tapped(16)), soft=kdlib.SoftLabels())
    assert "kdlib.freeze" in wrong(distiller.check({"x": torch.randn(6, 4)}))


@pytest.mark.parametrize("side", [0, 1])
def test_a_point_that_changes_a_tap_in_place_is_wrong_by_name(side):
    def doubling(*taps_and_batch):
        taps_and_batch[side]["logits"].mul_(2)
        return mse_loss(taps_and_batch[0]["logits"], taps_and_batch[1]["logits"])

    assert "point doubling: changed a tap in place" in wrong(Setup(soft=kdlib.SoftLabels(), doubling=doubling).check())


class Broken(torch.autograd.Function):
    """Its backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("no way back")


def test_a_backward_that_raises_is_wrong_by_name_and_not_a_crash():
    report = Setup(broken=lambda s, t, b: Broken.apply(s["logits"])).check()
    assert "point broken: ArithmeticError: no way back" in wrong(report)
    assert isinstance(report.fault, ArithmeticError)


def test_a_teacher_whose_parameters_want_gradients_is_wrong(setup):
    setup.net.requires_grad_(True)
    assert "gradient" in wrong(setup.check())


def test_a_teacher_in_the_optimizer_is_wrong(setup):
    setup.optimizer.add_param_group({"params": list(setup.net.parameters())})
    assert "optimizer" in wrong(setup.check())


def test_a_nan_in_a_students_tap_is_wrong_by_name(setup):
    with torch.no_grad():
        setup.student.model[4].bias[0] = torch.nan
    assert "student tap logits" in wrong(setup.check())


def test_a_nan_in_a_teachers_tap_is_wrong_by_name(setup):
    with torch.no_grad():
        setup.net.model[0].weight[0, 0] = torch.inf
    assert "teacher tap embedding" in wrong(setup.check())


def test_a_nan_that_only_a_point_makes_is_wrong_by_name():
    setup = Setup(root=lambda s, t, b: (-s["embedding"].square().mean() - 1).sqrt(), hard=kdlib.HardLabels())
    text = wrong(setup.check())
    assert "point root" in text
    assert "nan" in text
    assert "point hard" not in text


def test_a_gradient_that_is_not_finite_is_wrong_by_name():
    setup = Setup(root=lambda s, t, b: (0 * s["embedding"]).sum().sqrt())
    assert "point root" in wrong(setup.check())


def test_a_detached_point_is_wrong_by_name():
    setup = Setup(cut=lambda s, t, b: s["logits"].detach().mean(), hard=kdlib.HardLabels())
    text = wrong(setup.check())
    assert "point cut" in text
    assert "gradient" in text


def test_a_projector_that_is_not_in_the_optimizer_is_wrong(setup):
    distiller = kdlib.Distiller(setup.student, kdlib.SameInput(setup.teacher), hidden=Projected()).prepare(setup.batch)
    _optimizer = distiller.attach(torch.optim.Adam(setup.student.parameters()))
    text = wrong(distiller.check(setup.batch))
    assert "projector" in text
    assert "hidden.map.weight" in text


def test_student_parameters_outside_the_optimizer_are_listed(setup):
    distiller = kdlib.Distiller(setup.student, hard=kdlib.HardLabels())
    _optimizer = distiller.attach(torch.optim.Adam(setup.student.model[0].parameters()))
    assert "model.4.weight" in str(distiller.check(setup.batch))


def test_student_parameters_that_no_point_reaches_are_listed():
    setup = Setup(hidden=Projected())
    report = setup.check()
    assert report
    assert "model.4.weight" in str(report)


def test_unequal_shapes_are_wrong_with_both():
    setup = Setup(pull=lambda s, t, b: kdlib.same_shape(s["embedding"], t["embedding"]), hard=kdlib.HardLabels())
    text = wrong(setup.check())
    assert "point pull" in text
    assert "(6, 8)" in text
    assert "(6, 16)" in text


def test_unequal_shapes_that_torch_refuses_are_wrong_and_not_a_crash():
    setup = Setup(pull=lambda s, t, b: (s["embedding"] - t["embedding"]).square().mean(), hard=kdlib.HardLabels())
    assert "point pull" in wrong(setup.check())


@pytest.mark.parametrize(
    "point",
    [lambda s, t, b: s["logits"].sum(-1), lambda s, t, b: 0.5, lambda s, t, b: None],
    ids=["vector", "float", "nothing"],
)
def test_a_point_that_returns_no_scalar_tensor_is_wrong_and_not_a_crash(point):
    setup = Setup(rows=point, hard=kdlib.HardLabels())
    assert "point rows" in wrong(setup.check())


def test_a_missing_tap_and_a_missing_key_are_wrong():
    setup = Setup(soft=kdlib.SoftLabels(tap="logit"), hard=kdlib.HardLabels())
    assert "'logit'" in wrong(setup.check())
    setup = Setup(hard=kdlib.HardLabels())
    del setup.batch["y"]
    assert "'y'" in wrong(setup.check())


def test_a_tap_changed_in_place_is_wrong():
    distiller = kdlib.Distiller(tapped(inplace=True), hard=kdlib.HardLabels())
    assert "changed in place" in wrong(distiller.check({"x": torch.randn(6, 4), "y": torch.arange(6) % 3}))


def test_a_tap_that_did_not_fire_is_wrong():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    distiller = kdlib.Distiller(kdlib.Tapped(Lazy(), logits="", late="unused"), hard=kdlib.HardLabels())
    assert "did not fire" in wrong(distiller.check({"x": torch.randn(6, 4), "y": torch.arange(6) % 3}))


def test_swapped_roles_are_wrong(setup):
    swapped = kdlib.Distiller(setup.net, lambda batch: setup.student(batch["x"]), soft=kdlib.SoftLabels())
    assert "swapped" in wrong(swapped.check(setup.batch))


def test_rows_that_are_not_aligned_are_wrong(setup):
    source = kdlib.SameInput(setup.teacher)
    point = {"mean": lambda s, t, b: (s["logits"].mean(0) - t["logits"].mean(0)).square().mean()}
    distiller = kdlib.Distiller(setup.student, lambda b: source({"x": b["x"][:4]}), **point)
    assert "[4, 6]" in wrong(distiller.check(setup.batch))


def test_a_point_of_weight_0_is_noted_and_not_computed():
    def explode(student, teacher, batch):
        raise AssertionError("computed")

    report = Setup(never=(0, explode), hard=kdlib.HardLabels()).check()
    assert report
    assert "point never" in str(report)


def test_weights_of_0_everywhere_are_wrong():
    assert "points: none has a weight above 0" in wrong(Setup(never=(0, kdlib.HardLabels())).check())


def test_without_an_optimizer_it_says_how_to_have_it_looked_at(setup):
    report = kdlib.Distiller(setup.student, hard=kdlib.HardLabels()).check(setup.batch)
    assert report
    assert "attach" in str(report)


def test_a_report_is_true_without_findings_and_with_notes_and_false_with_one_wrong():
    report = kdlib.Report()
    assert report
    assert str(report) == ""
    report.add("note", "a", "b")
    report.add("ok", "longer", "c")
    assert report
    report.add("wrong", "a", "d")
    assert not report
    assert [line.index(seen) for line, seen in zip(str(report).splitlines(), "bcd", strict=True)] == [15, 15, 15]
