"""What every point at the output layer has to keep: masks, extreme logits, half precision, the teacher left alone."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn

import kdlib
from kdlib.points.dist import Dist
from kdlib.points.dkd import Dkd
from kdlib.points.js import JensenShannon
from kdlib.points.logit_mse import LogitMse
from kdlib.points.logit_standardised import LogitStandardised
from kdlib.points.ranking import Ranking
from kdlib.points.sigmoid_labels import SigmoidLabels
from kdlib.registry import Registry
from kdlib.settings import read_signature, validated
from kdlib.testing import check_point

KINDS = {
    "dkd": Dkd,
    "dist": Dist,
    "logit_mse": LogitMse,
    "js": JensenShannon,
    "logit_standardised": LogitStandardised,
    "sigmoid_labels": SigmoidLabels,
    "ranking": Ranking,
}
POINTS = {
    **KINDS,
    "dist at 4": partial(Dist, temperature=4.0),
    "logit_mse of the paper": partial(LogitMse, variant="paper"),
    "js at 4": partial(JensenShannon, temperature=4.0),
    "logit_standardised of the paper": partial(LogitStandardised, variant="paper"),
    "sigmoid_labels by kl": partial(SigmoidLabels, form="kl", temperature=3.0),
    "ranking of 2": partial(Ranking, top=2),
}
SOFTENED = ["dkd", "dist", "js", "logit_standardised", "sigmoid_labels"]
MEANS = [name for name in POINTS if "dist" not in name]  # a mean over rows; DIST relates them

every_point = pytest.mark.parametrize("name", POINTS)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(*shape, k=3):
    return torch.arange(torch.Size(shape).numel()).view(shape) % k


def loss(name, student, teacher, mask=None, y=None, **settings):
    dim = settings.get("dim", -1)
    shape = student.movedim(dim, -1).shape[:-1]
    batch = {"y": labels(*shape) if y is None else y}
    if mask is not None:
        batch["mask"] = mask
    return POINTS[name](**settings)({"logits": student}, {"logits": teacher}, batch)


def gradient(name, student, teacher, **settings):
    student = student.detach().clone().requires_grad_()
    loss(name, student, teacher, **settings).backward()
    return student.grad


@every_point
def test_it_is_a_point(name):
    check_point(POINTS[name]())


@every_point
def test_gradcheck_in_float64(name):
    teacher = 2 * noise(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda z: loss(name, z, teacher), (noise(4, 5).requires_grad_(),))


@every_point
def test_the_order_of_the_rows_does_not_matter(name):
    student, teacher, y = noise(6, 5), noise(6, 5, seed=1), labels(6)
    turned = loss(name, student.flip(0), teacher.flip(0), y=y.flip(0))
    torch.testing.assert_close(turned, loss(name, student, teacher, y=y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e4, -1e4, -400.0])
@pytest.mark.parametrize("k", [2, 10])
@every_point
def test_extreme_logits_keep_loss_and_gradient_finite(name, k, scale, dtype):
    k = max(k, 3) if name == "dkd" else k
    extreme, other, plain = (torch.zeros(3, k, dtype=dtype) for _ in range(3))
    extreme[:, 0] = scale
    other[:, 1] = scale
    for student, teacher in (
        (extreme, other),
        (other, extreme),
        (extreme, extreme),
        (extreme, plain),
        (plain, extreme),
    ):
        value = loss(name, student, teacher, y=labels(3, k=k))
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert gradient(name, student, teacher, y=labels(3, k=k)).isfinite().all()


@every_point
def test_extreme_logits_of_both_signs_in_one_row(name):
    row = torch.tensor([[1e4, -1e4, -400.0, 0.0]]).expand(4, 4)
    for student, teacher in ((row, row.flip(1)), (row, row), (row, noise(4, 4).float())):
        assert loss(name, student, teacher).isfinite()
        assert gradient(name, student, teacher).isfinite().all()


@every_point
def test_equal_rows_and_equal_classes_give_no_nan(name):
    row = noise(1, 7, dtype=torch.float32).expand(5, 7)
    flat = torch.full((5, 7), 0.1)
    for student, teacher in ((row, row), (row, flat), (flat, row), (flat, flat)):
        assert loss(name, student, teacher).isfinite()
        assert gradient(name, student, teacher).isfinite().all()


@every_point
def test_a_batch_of_one(name):
    student, teacher = noise(1, 5), noise(1, 5, seed=1)
    assert loss(name, student, teacher).isfinite()
    assert gradient(name, student, teacher).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_point
def test_half_precision_logits_give_the_float_loss_of_the_same_numbers(name, dtype):
    student, teacher = noise(8, 10).to(dtype), 2 * noise(8, 10, seed=1).to(dtype)
    expected = loss(name, student.double(), teacher.double()).item()
    assert loss(name, student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert gradient(name, student, teacher).dtype == dtype


@every_point
def test_autocast_changes_nothing(name):
    student, teacher = noise(8, 10).float(), noise(8, 10, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(name, student, teacher)
    assert torch.equal(inside, loss(name, student, teacher))


@every_point
def test_the_teacher_gets_no_gradient(name):
    student, teacher = noise(4, 5).requires_grad_(), noise(4, 5, seed=1).requires_grad_()
    loss(name, student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["dkd", "logit_standardised", "sigmoid_labels", "sigmoid_labels by kl", "ranking"])
def test_swapped_roles_are_not_the_same_loss(name):
    one, other = noise(4, 5), 3 * noise(4, 5, seed=1)
    assert loss(name, one, other) != loss(name, other, one)


# masks and axes


@pytest.mark.parametrize("dim", [-1, 1])
@every_point
def test_a_mask_leaves_the_loss_of_what_it_counts(name, dim):
    student, teacher, y = noise(3, 5, 4), noise(3, 5, 4, seed=1), labels(3, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    counted = mask.bool()
    expected = loss(name, student[counted], teacher[counted], y=y[counted])
    y = y.where(counted, -100)
    for kind in (mask, counted, mask.double()):
        moved = [z.movedim(-1, dim) for z in (student, teacher)]
        torch.testing.assert_close(loss(name, *moved, mask=kind, y=y, dim=dim), expected, rtol=1e-12, atol=1e-12)


@every_point
def test_without_a_mask_every_position_is_a_row(name):
    student, teacher = noise(3, 5, 4), noise(3, 5, 4, seed=1)
    expected = loss(name, student.reshape(15, 4), teacher.reshape(15, 4))
    torch.testing.assert_close(loss(name, student, teacher), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MEANS)
def test_it_is_a_mean_over_the_batch(name):
    student, teacher, y = noise(6, 5), noise(6, 5, seed=1), labels(6)
    rows = [loss(name, student[i : i + 1], teacher[i : i + 1], y=y[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(loss(name, student, teacher, y=y), torch.stack(rows).mean(), rtol=1e-12, atol=1e-12)


@every_point
def test_nan_under_the_mask_reaches_neither_loss_nor_gradient(name):
    student, teacher = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    spoiled = [z.masked_fill(~mask[..., None], torch.nan) for z in (student, teacher)]
    assert torch.equal(loss(name, *spoiled, mask=mask), loss(name, student, teacher, mask=mask))
    assert gradient(name, *spoiled, mask=mask).isfinite().all()


@every_point
def test_a_mask_that_counts_nothing_gives_zero(name):
    student, teacher, mask = noise(2, 3, 4), noise(2, 3, 4, seed=1), torch.zeros(2, 3)
    assert loss(name, student, teacher, mask=mask).item() == 0
    assert torch.equal(gradient(name, student, teacher, mask=mask), torch.zeros_like(student))


@every_point
def test_a_mask_of_another_shape_names_both(name):
    with pytest.raises(kdlib.BatchError, match=r"\(2, 4\).*\(2, 3\)"):
        loss(name, noise(2, 3, 4), noise(2, 3, 4), mask=torch.ones(2, 4))


@every_point
def test_unequal_shapes_name_both(name):
    with pytest.raises(kdlib.TapError, match=r"\(2, 3\).*\(2, 4\)"):
        loss(name, noise(2, 3), noise(2, 4))
    with pytest.raises(kdlib.TapError):  # would broadcast
        loss(name, noise(2, 3), noise(1, 3))


# settings


@every_point
def test_the_teachers_tap_is_the_students_unless_named(name):
    student, teacher, batch = noise(3, 4), noise(3, 4, seed=1), {"y": labels(3)}
    expected = loss(name, student, teacher)
    point = POINTS[name](tap="a")
    assert point({"a": student, "logits": teacher}, {"a": teacher}, batch) == expected
    point = POINTS[name](tap="a", teacher_tap="b")
    assert point({"a": student}, {"a": student, "b": teacher}, batch) == expected


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", SOFTENED)
def test_a_temperature_that_is_not_above_zero_is_refused(name, temperature):
    with pytest.raises(kdlib.KdlibError, match="temperature"):
        loss(name, noise(2, 3), noise(2, 3), temperature=temperature)


class Taps(nn.Module):
    """A student that returns given taps."""

    def __init__(self, **taps):
        super().__init__()
        self.taps = taps

    def forward(self, x):
        return self.taps


@pytest.mark.parametrize("name", SOFTENED)
def test_a_temperature_may_be_a_schedule(name):
    student, teacher = noise(4, 5), noise(4, 5, seed=1)
    ramp = kdlib.Schedule(kind="linear", start=1.0, end=5.0, epochs=4)
    distiller = kdlib.Distiller(
        Taps(logits=student), lambda batch: {"logits": teacher}, soft=POINTS[name](temperature=ramp)
    )
    found = distiller({"x": 0, "y": labels(4), "epoch": torch.full((4,), 2)})
    assert found.total == loss(name, student, teacher, temperature=3.0)
    with pytest.raises(kdlib.BatchError, match=r"temperature.*clock"):
        POINTS[name](temperature=ramp)({"logits": student}, {"logits": teacher}, {"y": labels(4)})


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_can_write_it_down(name):
    live, settings = read_signature("point", name, KINDS[name])
    assert live == ()
    point = KINDS[name]()
    for setting, value in settings():
        assert getattr(point, setting) == (value if setting != "teacher_tap" else point.tap)
    for setting in settings.model_fields:
        assert inspect.signature(KINDS[name]).parameters[setting].kind is inspect.Parameter.KEYWORD_ONLY
    for bad in ({"temperature": 0.0}, {"alpha": -1.0}, {"top": 0}, {"variant": "other"}, {"form": "kld"}, {"dims": 1}):
        with pytest.raises(kdlib.RecipeError):
            validated(settings, bad, "points.p")
    if name in SOFTENED:
        ramp = {"kind": "linear", "start": 1.0, "end": 5.0, "epochs": 4}
        assert isinstance(validated(settings, {"temperature": ramp}, "points.p").temperature, kdlib.Schedule)


def test_no_name_is_taken():
    registered = {plugin.name: plugin.build for plugin in Registry().plugins() if plugin.kind == "point"}
    assert all(registered.get(name, kind) is kind for name, kind in KINDS.items())
