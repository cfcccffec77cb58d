"""Soft labels against closed forms and against values on which independent implementations agree."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import kdlib

FORMS = ["cross_entropy", "kl"]
CAP = math.e / (math.e + 9)  # 0.23197


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient(student, teacher, **settings):
    student = student.detach().clone().requires_grad_()
    kdlib.soft_cross_entropy(student, teacher, **settings).backward()
    return student.grad


@pytest.fixture(scope="module")
def agreed():
    generator = torch.Generator().manual_seed(7)
    student = torch.randn(8, 10, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(8, 10, generator=generator, dtype=torch.float64)
    return student, teacher


def test_the_cross_entropy_that_implementations_agree_on(agreed):
    assert kdlib.soft_cross_entropy(*agreed).item() == pytest.approx(3.2136323929, abs=1e-9)


def test_the_kl_form_that_implementations_agree_on(agreed):
    settings = {"temperature": 4.0, "student_temperature": 4.0, "form": "kl"}
    assert kdlib.soft_cross_entropy(*agreed, **settings).item() == pytest.approx(3.3553419185, abs=1e-9)


def test_kl_is_torchs_batchmean_times_the_square(agreed):
    student, teacher = agreed
    expected = 9 * kl_div(log_softmax(student / 3, -1), log_softmax(teacher / 3, -1), None, None, "batchmean", True)
    loss = kdlib.soft_cross_entropy(student, teacher, temperature=3.0, student_temperature=3.0, form="kl")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_cross_entropy_is_torchs_with_probabilities(agreed):
    student, teacher = agreed
    expected = cross_entropy(student, (teacher / 5).softmax(-1))
    torch.testing.assert_close(
        kdlib.soft_cross_entropy(student, teacher, temperature=5.0), expected, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0, 10.0])
@pytest.mark.parametrize("rows", [1, 8])
def test_equation_2_only_the_teacher_is_softened_and_nothing_is_rescaled(rows, temperature, form):
    student, teacher = noise(rows, 10), 3 * noise(rows, 10, seed=1)
    expected = (student.softmax(-1) - (teacher / temperature).softmax(-1)) / rows
    torch.testing.assert_close(
        gradient(student, teacher, temperature=temperature, form=form), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 4.0, "student_temperature": 4.0}, {"soften": "posteriors"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_and_cross_entropy_have_the_same_gradient(settings, dtype):
    student, teacher = noise(8, 10, dtype=dtype), 3 * noise(8, 10, seed=1, dtype=dtype)
    one, other = (gradient(student, teacher, form=form, **settings) for form in FORMS)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_kl_is_zero_where_both_agree_and_above_elsewhere():
    z = noise(8, 10)
    same = kdlib.soft_cross_entropy(z, z + 3.0, temperature=2.0, student_temperature=2.0, form="kl")
    assert abs(same.item()) < 1e-12
    assert kdlib.soft_cross_entropy(z, -z, form="kl").item() > 0.1


def test_hinton_at_a_high_temperature_matches_logits():
    rows, k = 8, 10
    student, teacher = noise(rows, k), noise(rows, k, seed=1)
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    limit = (student - teacher) / (k * rows)
    found = gradient(student, teacher, temperature=100.0, student_temperature=100.0)
    assert (found - limit).norm() < 0.02 * limit.norm()


def test_hintons_preset_softens_both_sides_and_multiplies_by_the_square():
    point = kdlib.SoftLabels.hinton(4.0)
    student, teacher = noise(8, 10), noise(8, 10, seed=1)
    expected = 16 * cross_entropy(student / 4, (teacher / 4).softmax(-1))
    torch.testing.assert_close(point({"logits": student}, {"logits": teacher}, {}), expected, rtol=1e-12, atol=0)


def test_posteriors_to_the_letter_cap_the_teachers_top_probability():
    teacher = torch.zeros(1, 10, dtype=torch.float64)
    teacher[0, 0] = 50.0
    student = torch.zeros(1, 10, dtype=torch.float64)  # p_S = 0.1 everywhere: target = 0.1 - gradient
    assert 0.1 - gradient(student, teacher, soften="posteriors")[0, 0].item() == pytest.approx(CAP, abs=1e-9)
    assert round(CAP, 5) == 0.23197
    assert 0.1 - gradient(student, teacher, soften="logits")[0, 0].item() == pytest.approx(1.0, abs=1e-9)


def test_posteriors_are_divided_by_the_temperature():
    student, teacher = noise(4, 10), noise(4, 10, seed=1)
    expected = (student.softmax(-1) - (teacher.softmax(-1) / 5).softmax(-1)) / 4
    found = gradient(student, teacher, soften="posteriors", temperature=5.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("soften", ["logits", "posteriors"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e4, -1e4, -400.0])
@pytest.mark.parametrize("k", [2, 10])
def test_extreme_logits_keep_loss_and_gradient_finite(k, scale, dtype, temperature, form, soften):
    extreme, other = torch.zeros(2, k, dtype=dtype), torch.zeros(2, k, dtype=dtype)
    extreme[:, 0] = scale
    other[:, 1] = scale
    settings = {"temperature": temperature, "student_temperature": temperature, "form": form, "soften": soften}
    for student, teacher in ((extreme, other), (other, extreme), (extreme, extreme)):
        assert kdlib.soft_cross_entropy(student, teacher, **settings).isfinite()
        assert gradient(student, teacher, **settings).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_class_that_the_teacher_excludes_counts_nothing(form):
    student, teacher = noise(4, 6), noise(4, 5, seed=1)
    excluded = torch.cat([teacher, torch.full((4, 1), -math.inf, dtype=teacher.dtype)], -1)
    target = teacher.softmax(-1)
    expected = -(target * student.log_softmax(-1)[:, :5]).sum(-1).mean()
    if form == "kl":
        expected += (target * target.log()).sum(-1).mean()
    found = kdlib.soft_cross_entropy(student, excluded, form=form)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert gradient(student, excluded, form=form).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_the_float_loss_of_the_same_numbers(dtype):
    student, teacher = noise(8, 10).to(dtype), 2 * noise(8, 10, seed=1).to(dtype)
    loss = kdlib.soft_cross_entropy(student, teacher, temperature=4.0, student_temperature=4.0)
    expected = kdlib.soft_cross_entropy(student.double(), teacher.double(), temperature=4.0, student_temperature=4.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient(student, teacher).dtype == dtype


def test_half_precision_teacher_and_float_student():
    student, teacher = noise(4, 3, dtype=torch.float32), noise(4, 3, seed=1).bfloat16()
    expected = kdlib.soft_cross_entropy(student, teacher.float())
    torch.testing.assert_close(kdlib.soft_cross_entropy(student, teacher), expected, rtol=1e-6, atol=0)


def test_a_batch_of_one_and_two_classes_in_closed_form():
    z = math.log(3.0)  # softmax of (log 3, 0) is (3/4, 1/4)
    taps = {"logits": torch.tensor([[z, 0.0]], dtype=torch.float64)}
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert kdlib.SoftLabels()(taps, taps, {}).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("form", FORMS)
def test_a_mask_leaves_the_mean_of_what_it_counts(form, dim):
    student, teacher = noise(3, 5, 4), noise(3, 5, 4, seed=1)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    settings = {"temperature": 2.0, "student_temperature": 2.0, "form": form}
    rows = [kdlib.soft_cross_entropy(student[b, t][None], teacher[b, t][None], **settings) for b, t in mask.nonzero()]
    point = kdlib.SoftLabels(dim=dim, **settings)
    for kind in (mask, mask.bool(), mask.double()):
        taps = ({"logits": z.movedim(-1, dim)} for z in (student, teacher))
        torch.testing.assert_close(point(*taps, {"mask": kind}), torch.stack(rows).mean(), rtol=1e-12, atol=0)


def test_without_a_mask_it_is_a_mean_over_all_positions():
    student, teacher = noise(3, 5, 4), noise(3, 5, 4, seed=1)
    expected = kdlib.soft_cross_entropy(student.reshape(15, 4), teacher.reshape(15, 4))
    torch.testing.assert_close(kdlib.soft_cross_entropy(student, teacher), expected, rtol=1e-12, atol=0)
    moved = kdlib.soft_cross_entropy(student.movedim(-1, 1), teacher.movedim(-1, 1), dim=1)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


def test_nan_under_the_mask_reaches_neither_loss_nor_gradient():
    student, teacher = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    spoiled = teacher.masked_fill(~mask[..., None], torch.nan)
    expected = kdlib.soft_cross_entropy(student, teacher, mask=mask)
    assert torch.equal(kdlib.soft_cross_entropy(student, spoiled, mask=mask), expected)
    assert gradient(student, spoiled, mask=mask).isfinite().all()


def test_a_mask_that_counts_nothing_gives_zero():
    student, teacher = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    assert kdlib.soft_cross_entropy(student, teacher, mask=torch.zeros(2, 3)).item() == 0
    assert torch.equal(gradient(student, teacher, mask=torch.zeros(2, 3)), torch.zeros_like(student))


def test_a_mask_of_another_shape_names_both():
    with pytest.raises(kdlib.BatchError, match=r"\(2, 4\).*\(2, 3\)"):
        kdlib.soft_cross_entropy(noise(2, 3, 4), noise(2, 3, 4), mask=torch.ones(2, 4))


@pytest.mark.parametrize("soften", ["logits", "posteriors"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_float64(form, soften):
    student, teacher = noise(3, 4).requires_grad_(), 2 * noise(3, 4, seed=1)

    def loss(z):
        settings = {"temperature": 3.0, "student_temperature": 2.0, "form": form, "soften": soften}
        return kdlib.soft_cross_entropy(z, teacher, **settings)

    assert torch.autograd.gradcheck(loss, (student,))


def test_the_teacher_gets_no_gradient():
    student, teacher = noise(3, 4).requires_grad_(), noise(3, 4, seed=1).requires_grad_()
    for form in FORMS:
        kdlib.soft_cross_entropy(student, teacher, temperature=2.0, form=form).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def test_swapped_roles_are_not_the_same_loss():
    one, other = noise(3, 4), 3 * noise(3, 4, seed=1)
    assert kdlib.soft_cross_entropy(one, other) != kdlib.soft_cross_entropy(other, one)


class Taps(nn.Module):
    """A student that returns given taps."""

    def __init__(self, **taps):
        super().__init__()
        self.taps = taps

    def forward(self, x):
        return self.taps


def distill(student, teacher, **settings):
    return kdlib.Distiller(Taps(**student), lambda batch: teacher, soft=kdlib.SoftLabels(**settings))({"x": 0})


def test_a_missing_tap_names_the_point_its_side_and_what_there_is():
    z = noise(2, 3)
    with pytest.raises(kdlib.TapError, match=r"(?s)'soft'.*student.*'logits'.*embedding"):
        distill({"embedding": z}, {"logits": z})
    with pytest.raises(kdlib.TapError, match=r"(?s)'soft'.*teacher.*'logits'.*hidden"):
        distill({"logits": z}, {"hidden": z})
    with pytest.raises(kdlib.TapError, match=r"(?s)'soft'.*teacher.*'big'.*logits"):
        distill({"logits": z}, {"logits": z}, teacher_tap="big")


def test_unequal_shapes_name_the_point_and_both_sides():
    with pytest.raises(kdlib.TapError, match=r"(?s)'soft'.*student.*\(2, 3\).*teacher.*\(2, 4\)"):
        distill({"logits": noise(2, 3)}, {"logits": noise(2, 4)})
    with pytest.raises(kdlib.TapError):  # would broadcast
        distill({"logits": noise(2, 3)}, {"logits": noise(1, 3)})


def test_the_teachers_tap_is_the_students_unless_named():
    student, teacher = noise(2, 3), noise(2, 3, seed=1)
    expected = kdlib.soft_cross_entropy(student, teacher)
    assert kdlib.SoftLabels(tap="a")({"a": student, "logits": teacher}, {"a": teacher}, {}) == expected
    assert kdlib.SoftLabels(tap="a", teacher_tap="b")({"a": student}, {"a": student, "b": teacher}, {}) == expected


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": -1.0}, {"student_temperature": 0.0}])
def test_a_temperature_that_is_not_above_zero_is_refused(settings):
    with pytest.raises(kdlib.KdlibError, match="temperature"):
        kdlib.soft_cross_entropy(noise(2, 3), noise(2, 3), **settings)


@pytest.mark.parametrize("settings", [{"soften": "logit"}, {"form": "kld"}])
def test_an_unknown_form_is_refused_not_read_as_the_other(settings):
    with pytest.raises((kdlib.KdlibError, ValueError)):
        kdlib.SoftLabels(**settings)({"logits": noise(2, 3)}, {"logits": noise(2, 3)}, {})
