"""What every point on hidden layers keeps to, whatever it computes."""

import copy
import inspect

import pytest
import torch

import kdlib
from kdlib.points.attention_transfer import AttentionTransfer
from kdlib.points.fitnet import FitNet
from kdlib.points.fsp import Fsp
from kdlib.points.hidden_cosine import HiddenCosine
from kdlib.points.nst import Nst
from kdlib.points.vid import Vid
from kdlib.settings import read_signature
from kdlib.testing import check_point

ONE, TWO = {"a": (3, 6)}, {"a": (3, 4, 6)}
OTHER_ONE, OTHER_TWO = {"a": (5, 4)}, {"a": (5, 6, 3)}
CASES = {
    "cosine, flat": (HiddenCosine, {"tap": "a"}, {"a": (6,)}, {"a": (6,)}),
    "cosine, 2-D": (HiddenCosine, {"tap": "a"}, TWO, TWO),
    "fitnet, flat": (FitNet, {"tap": "a"}, {"a": (6,)}, {"a": (9,)}),
    "fitnet, 1-D": (FitNet, {"tap": "a"}, ONE, OTHER_ONE),
    "fitnet, 2-D": (FitNet, {"tap": "a"}, TWO, OTHER_TWO),
    "fitnet, identity": (FitNet, {"tap": "a"}, ONE, ONE),
    "fitnet, paper": (FitNet, {"tap": "a", "variant": "paper", "projector": "always"}, TWO, TWO),
    "at, 1-D": (AttentionTransfer, {"tap": "a"}, ONE, OTHER_ONE),
    "at, 2-D": (AttentionTransfer, {"tap": "a", "p": 3}, TWO, OTHER_TWO),
    "at, paper": (AttentionTransfer, {"tap": "a", "variant": "paper", "p": 1}, TWO, OTHER_TWO),
    "fsp, flat": (Fsp, {"taps": ["a", "b"]}, {"a": (3,), "b": (4,)}, {"a": (3,), "b": (4,)}),
    "fsp, 1-D": (Fsp, {"taps": ["a", "b"]}, {"a": (3, 6), "b": (4, 3)}, {"a": (3, 5), "b": (4, 5)}),
    "fsp, 2-D": (Fsp, {"taps": ["a", "b"]}, {"a": (3, 4, 6), "b": (4, 2, 3)}, {"a": (3, 4, 4), "b": (4, 2, 2)}),
    "nst, 1-D": (Nst, {"tap": "a"}, ONE, OTHER_ONE),
    "nst, 2-D": (Nst, {"tap": "a", "degree": 3, "constant": 0.5}, TWO, OTHER_TWO),
    "nst, linear": (Nst, {"tap": "a", "kernel": "linear"}, TWO, OTHER_TWO),
    "nst, gaussian": (Nst, {"tap": "a", "kernel": "gaussian"}, TWO, OTHER_TWO),
    "vid, flat": (Vid, {"tap": "a"}, {"a": (6,)}, {"a": (9,)}),
    "vid, 1-D": (Vid, {"tap": "a"}, ONE, OTHER_ONE),
    "vid, 2-D": (Vid, {"tap": "a", "variant": "paper"}, TWO, OTHER_TWO),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
ROWS = 4


def drawn(shapes, rows=ROWS, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, *shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def made(case, dtype=torch.float64):
    build, settings, ours, theirs = case
    torch.manual_seed(0)
    point = build(**settings)
    if hasattr(point, "prepare"):
        point.prepare(drawn(ours, dtype=dtype), drawn(theirs, dtype=dtype), {})
    return point


def loss_and_gradients(point, student, teacher):
    leaves = {name: tap.detach().clone().requires_grad_() for name, tap in student.items()}
    loss = point(leaves, teacher, {})
    return loss, torch.autograd.grad(loss, list(leaves.values()))


@EVERY
def test_it_is_a_point(case):
    build, settings, ours, theirs = case
    student, teacher = drawn(ours, 8, dtype=torch.float32), drawn(theirs, 8, 1, dtype=torch.float32)
    check_point(build(**settings), student=student, teacher=teacher)


@EVERY
def test_gradcheck_in_float64(case):
    if case[1].get("kernel") == "gaussian":
        pytest.skip("its width is taken as a constant, which finite differences are not told")
    point, student, teacher = made(case), drawn(case[2], 3), drawn(case[3], 3, 1)
    leaves = [tap.requires_grad_() for tap in student.values()]
    assert torch.autograd.gradcheck(lambda *taps: point(dict(zip(student, taps, strict=True)), teacher, {}), leaves)


@EVERY
def test_the_loss_of_a_batch_is_the_mean_over_its_rows(case):
    point, student, teacher = made(case), drawn(case[2]), drawn(case[3], seed=1)
    rows = [
        point({n: t[row : row + 1] for n, t in student.items()}, {n: t[row : row + 1] for n, t in teacher.items()}, {})
        for row in range(ROWS)
    ]
    torch.testing.assert_close(point(student, teacher, {}), torch.stack(rows).mean(), rtol=1e-10, atol=1e-12)


@EVERY
def test_equal_rows_cost_what_one_of_them_costs(case):
    point, student, teacher = made(case), drawn(case[2], 1), drawn(case[3], 1, 1)
    many = [{name: torch.cat([tap] * 3) for name, tap in side.items()} for side in (student, teacher)]
    expected, (loss, gradients) = point(student, teacher, {}), loss_and_gradients(point, *many)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert all(gradient.isfinite().all() for gradient in gradients)


@EVERY
@pytest.mark.parametrize("zero", ["student", "teacher", "both", "row", "agree"])
def test_zero_rows_and_equal_sides_give_no_nan(case, zero):
    point, student, teacher = made(case), drawn(case[2]), drawn(case[3], seed=1)
    if zero in ("student", "both"):
        student = {name: torch.zeros_like(tap) for name, tap in student.items()}
    if zero in ("teacher", "both"):
        teacher = {name: torch.zeros_like(tap) for name, tap in teacher.items()}
    if zero == "row":
        for tap in student.values():
            tap[1] = 0
    if zero == "agree" and case[2] == case[3]:
        teacher = student
    loss, gradients = loss_and_gradients(point, student, teacher)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@EVERY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision_is_computed_in_float32(case, dtype, tolerance):
    point = made(case, torch.float32)
    student, teacher = drawn(case[2], dtype=torch.float32), drawn(case[3], seed=1, dtype=torch.float32)
    halves = [{name: tap.to(dtype) for name, tap in side.items()} for side in (student, teacher)]
    loss = point(*halves, {})
    assert loss.dtype == torch.float32
    rounded = point(*({name: tap.float() for name, tap in side.items()} for side in halves), {})
    torch.testing.assert_close(loss, rounded, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss, point(student, teacher, {}), rtol=tolerance, atol=tolerance)
    assert all(gradient.isfinite().all() for gradient in loss_and_gradients(point, *halves)[1])


@EVERY
@pytest.mark.parametrize(("ours", "theirs"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_teacher_of_another_precision_gives_the_loss_of_the_same_numbers(case, ours, theirs):
    point = made(case, ours)
    student, teacher = drawn(case[2], dtype=torch.float32), drawn(case[3], seed=1, dtype=torch.float32)
    mixed = point(
        {name: tap.to(ours) for name, tap in student.items()}, {n: t.to(theirs) for n, t in teacher.items()}, {}
    )
    alike = point(*({name: tap.to(ours) for name, tap in side.items()} for side in (student, teacher)), {})
    torch.testing.assert_close(mixed.double(), alike.double(), rtol=1e-5, atol=1e-6)


@EVERY
def test_autocast_keeps_the_loss_in_float32(case):
    point = made(case, torch.float32)
    student, teacher = drawn(case[2], dtype=torch.float32), drawn(case[3], seed=1, dtype=torch.float32)
    expected = point(student, teacher, {})
    with torch.autocast("cpu", torch.bfloat16):
        found = point(student, teacher, {})
    projects = hasattr(point, "prepare")  # the projector itself runs in bfloat16
    torch.testing.assert_close(found, expected, rtol=3e-2 if projects else 1e-6, atol=1e-6)


@EVERY
def test_a_large_scale_stays_finite(case):
    point = made(case, torch.float32)
    student, teacher = drawn(case[2], dtype=torch.float32), drawn(case[3], seed=1, dtype=torch.float32)
    loss, gradients = loss_and_gradients(
        point, *({name: 1e8 * tap for name, tap in side.items()} for side in (student, teacher))
    )
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@EVERY
def test_the_teacher_gets_no_gradient(case):
    point, student, teacher = made(case), drawn(case[2]), drawn(case[3], seed=1)
    for tap in (*student.values(), *teacher.values()):
        tap.requires_grad_()
    point(student, teacher, {}).backward()
    assert all(tap.grad is None for tap in teacher.values())
    assert all(tap.grad.abs().sum() > 0 for tap in student.values())


@EVERY
def test_unlike_shapes_are_an_error_that_names_them(case):
    point, student, teacher = made(case), drawn(case[2]), drawn(case[3], 5, 1)
    with pytest.raises(kdlib.TapError) as error:
        point(student, teacher, {})
    assert "(4, " in str(error.value)
    assert "(5, " in str(error.value)
    if case[0] is not Fsp:  # which compares matrices of channels, whatever the maps were
        longer = {name: tap[..., None] for name, tap in drawn(case[3], seed=1).items()}
        with pytest.raises(kdlib.TapError, match="shape"):
            point(student, longer, {})


@EVERY
def test_the_teachers_tap_may_have_another_name(case):
    build, settings, ours, theirs = case
    names = {"teacher_taps": ["c", "d"]} if "taps" in settings else {"teacher_tap": "c"}
    same, student, teacher = made(case), drawn(ours), drawn(theirs, seed=1)
    renamed = dict(zip("cd", teacher.values(), strict=False))
    torch.manual_seed(0)
    point = build(**settings, **names)
    if hasattr(point, "prepare"):
        point.prepare(student, renamed, {})
    assert torch.equal(point(student, renamed, {}), same(student, teacher, {}))


@EVERY
def test_settings_are_attributes_and_a_schema(case):
    build, settings, *_ = case
    point = build(**settings)
    for name in inspect.signature(build).parameters:
        assert hasattr(point, name)
    live, schema = read_signature("point", build.__name__, build)
    assert live == ()
    assert schema(**settings).model_dump().items() >= settings.items()
    with pytest.raises(ValueError, match="temprature"):
        schema(**settings, temprature=1.0)


@EVERY
def test_a_copy_is_independent_and_gives_the_same(case):
    point, student, teacher = made(case), drawn(case[2]), drawn(case[3], seed=1)
    twin = copy.deepcopy(point)
    assert torch.equal(point(student, teacher, {}), twin(student, teacher, {}))


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (AttentionTransfer, {"tap": "a", "p": 0}),
        (AttentionTransfer, {"tap": "a", "variant": "both"}),
        (Nst, {"tap": "a", "degree": 0}),
        (Nst, {"tap": "a", "constant": -1.0}),
        (Nst, {"tap": "a", "kernel": "cubic"}),
        (Vid, {"variance": 0.0}),
        (FitNet, {"projector": "never"}),
        (Fsp, {"taps": ["a"]}),
        (Fsp, {"taps": ["a", "b"], "teacher_taps": ["a", "b", "c"]}),
    ],
)
def test_settings_out_of_bounds_are_refused_in_a_recipe(build, settings):
    _, schema = read_signature("point", build.__name__, build)
    with pytest.raises(ValueError, match=next(iter(reversed(settings)))):
        schema(**settings)


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (AttentionTransfer, {"tap": "a", "variant": "papre"}),
        (FitNet, {"tap": "a", "variant": "papre"}),
        (FitNet, {"tap": "a", "projector": "never"}),
        (Vid, {"tap": "a", "variant": "papre"}),
        (Vid, {"tap": "a", "variance": 0.0}),
        (Nst, {"tap": "a", "kernel": "poly"}),
    ],
)
def test_an_unknown_choice_is_refused_not_read_as_another(build, settings):
    student, teacher = drawn(ONE), drawn(OTHER_ONE, seed=1)
    with pytest.raises(kdlib.KdlibError, match=list(settings)[-1]):
        made((build, settings, ONE, OTHER_ONE))(student, teacher, {})


@pytest.mark.parametrize("build", [AttentionTransfer, Nst])
def test_flat_taps_have_no_positions(build):
    with pytest.raises(kdlib.TapError, match=r"(?s)\(B, C, T\).*\(4, 6\)"):
        build(tap="a")(drawn({"a": (6,)}), drawn({"a": (6,)}), {})
