"""The mean squared error of the last hidden layer against its closed form."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import kdlib
from kdlib.testing import check_point
from kdlib_asc.points import HiddenMse


@pytest.fixture
def taps():
    """The embeddings of a student and of a teacher, (8, 64) float64, of different scales."""
    generator = torch.Generator().manual_seed(7)
    student = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    return student, 3 * torch.randn(8, 64, generator=generator, dtype=torch.float64) + 1


def loss(student, teacher, **settings):
    return HiddenMse(**settings)({"embedding": student}, {"embedding": teacher}, {})


# the value


def test_the_closed_form_in_float64(taps):
    student, teacher = (tap.numpy() for tap in taps)
    expected = np.sum((teacher - student) ** 2) / (8 * 64)
    value = loss(*taps)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_torchs_mse(taps):
    student, teacher = (tap.float() for tap in taps)
    assert torch.equal(loss(student, teacher), mse_loss(student, teacher))


def test_a_value_done_by_hand():
    assert loss(torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])).item() == 14 / 4


def test_equal_embeddings_cost_nothing(taps):
    assert loss(taps[0], taps[0].clone()).item() == 0


def test_a_batch_of_one(taps):
    student, teacher = (tap[:1] for tap in taps)
    assert loss(student, teacher).item() == pytest.approx(((student - teacher) ** 2).sum().item() / 64)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 64), (40, 2)])
def test_mean_over_batch_and_dimensions_keeps_the_scale_at_any_size(rows, width):
    assert loss(torch.zeros(rows, width), torch.full((rows, width), 2.0)).item() == 4


def test_frames_and_maps_will_do_as_well(taps):
    student, teacher = (tap.reshape(2, 4, 8, 8) for tap in taps)
    assert loss(student, teacher).item() == pytest.approx(((student - teacher) ** 2).mean().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(taps, dtype):
    student, teacher = (tap.to(dtype) for tap in taps)
    assert torch.equal(loss(student, teacher), mse_loss(student.float(), teacher.float()))


def test_a_difference_beyond_half_precision_is_finite():
    far = torch.full((2, 64), 3e4, dtype=torch.float16)
    assert loss(far, -far).item() == pytest.approx((2 * far[0, 0].item()) ** 2, rel=1e-6)


# the gradient


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_gradient_on_the_student(taps, dtype, accuracy):
    student, teacher = (tap.to(dtype) for tap in taps)
    student.requires_grad_()
    loss(student, teacher).backward()
    expected = 2 * (student.detach() - teacher) / (8 * 64)
    torch.testing.assert_close(student.grad, expected, rtol=accuracy, atol=accuracy / 100)


def test_the_gradient_by_finite_differences(taps):
    student, teacher = (tap[:2, :3] for tap in taps)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda student: loss(student, teacher), student, raise_exception=False)


def test_the_teachers_side_is_detached(taps):
    student, teacher = (tap.requires_grad_() for tap in taps)
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


# which taps


def test_it_is_a_point():
    check_point(HiddenMse())


def test_other_taps_may_be_named(taps):
    student, teacher = taps
    value = HiddenMse(tap="mine", teacher_tap="yours")({"mine": student}, {"yours": teacher}, {})
    assert torch.equal(value, loss(student, teacher))


def test_the_teachers_tap_is_that_of_the_student_unless_named(taps):
    student, teacher = taps
    value = HiddenMse(tap="conv5")({"conv5": student}, {"conv5": teacher, "embedding": student}, {})
    assert torch.equal(value, loss(student, teacher))


def test_a_difference_of_shapes_is_an_error_with_both():
    with pytest.raises(kdlib.TapError, match=r"\(4, 64\).*\(4, 32\)"):
        loss(torch.zeros(4, 64), torch.zeros(4, 32))


def test_shapes_that_would_broadcast_are_refused_too():
    with pytest.raises(kdlib.TapError, match=r"\(4, 64\).*\(1, 64\)"):
        loss(torch.zeros(4, 64), torch.zeros(1, 64))


# under a distiller


def tapped(**taps):
    torch.manual_seed(0)
    return kdlib.Tapped(nn.Sequential(nn.Linear(5, 64), nn.Linear(64, 3)), **taps)


def distiller(student, teacher, **settings):
    return kdlib.Distiller(student, kdlib.SameInput(kdlib.freeze(teacher)), hidden=HiddenMse(**settings))


def test_the_distillers_loss_is_that_of_the_two_embeddings():
    student, teacher = tapped(embedding="0"), tapped(embedding="0")
    with torch.no_grad():
        teacher.model[0].bias += 1
    losses = distiller(student, teacher)({"x": torch.randn(4, 5)})
    assert losses.total.item() == pytest.approx(1, rel=1e-5)
    assert losses.terms["hidden"].item() == losses.total.item()


def test_a_tap_that_the_student_lacks_names_the_side_and_suggests():
    with pytest.raises(kdlib.TapError, match=r"(?i)point 'hidden'.*student has no tap 'embedding'.*mean 'embeding'"):
        distiller(tapped(embeding="0"), tapped(embedding="0"))({"x": torch.zeros(2, 5)})


def test_a_tap_that_the_teacher_lacks_names_the_side_and_suggests():
    with pytest.raises(kdlib.TapError, match=r"(?i)point 'hidden'.*teacher has no tap 'embedding'.*mean 'embeddings'"):
        distiller(tapped(embedding="0"), tapped(embeddings="0"))({"x": torch.zeros(2, 5)})


def test_a_difference_of_shapes_under_a_distiller_says_which_point():
    with pytest.raises(kdlib.TapError, match=r"(?i)point 'hidden'.*\(2, 64\).*\(2, 3\)"):
        distiller(tapped(embedding="0"), tapped(embedding="1"))({"x": torch.zeros(2, 5)})


def test_the_output_layer_of_the_student_gets_no_gradient():
    student = tapped(logits="", embedding="0")
    distiller(student, tapped(embedding="0"), tap="embedding")({"x": torch.randn(2, 5)}).total.backward()
    assert [student.model[1].weight.grad, student.model[1].bias.grad] == [None, None]
