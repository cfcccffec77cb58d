"""Sigmoid labels against their closed form."""

import numpy as np
import pytest
import torch

import kdlib
from kdlib.points.sigmoid_labels import SigmoidLabels, sigmoid_cross_entropy
from kdlib.testing import check_point


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entropies(student, teacher, temperature):
    p, q = (1 / (1 + np.exp(-z.numpy() / temperature)) for z in (teacher, student))
    cross = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    own = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    return cross.sum(-1).mean(), own.sum(-1).mean()


def gradient(student, teacher, **settings):
    student = student.detach().clone().requires_grad_()
    sigmoid_cross_entropy(student, teacher, **settings).backward()
    return student.grad


@pytest.mark.parametrize("form", ["cross_entropy", "kl"])
def test_it_is_a_point(form):
    check_point(SigmoidLabels(form=form))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_closed_form(temperature):
    student, teacher = noise(8, 10), 2 * noise(8, 10, seed=1)
    cross, own = entropies(student, teacher, temperature)
    found = sigmoid_cross_entropy(student, teacher, temperature=temperature)
    assert found.item() == pytest.approx(temperature**2 * cross, rel=1e-12)
    found = sigmoid_cross_entropy(student, teacher, temperature=temperature, form="kl")
    assert found.item() == pytest.approx(temperature**2 * (cross - own), rel=1e-12)


def test_the_gradient_is_the_difference_of_the_sigmoids_in_both_forms():
    student, teacher = noise(8, 10), 2 * noise(8, 10, seed=1)
    expected = 3 * ((student / 3).sigmoid() - (teacher / 3).sigmoid()) / 8
    for form in ("cross_entropy", "kl"):
        found = gradient(student, teacher, temperature=3.0, form=form)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_beyond_a_logit_of_18_there_is_still_a_gradient():
    assert gradient(torch.tensor([[400.0]]), torch.tensor([[0.0]])).item() == pytest.approx(0.5)


def test_kl_is_zero_where_both_agree_and_sees_a_shift():
    z = noise(4, 5)
    assert abs(sigmoid_cross_entropy(z, z, form="kl").item()) < 1e-15
    assert sigmoid_cross_entropy(z, z + 1, form="kl").item() > 0.1


def test_each_label_is_by_itself():
    student, teacher = noise(4, 3), noise(4, 3, seed=1)
    alone = [sigmoid_cross_entropy(student[:, k : k + 1], teacher[:, k : k + 1]) for k in range(3)]
    torch.testing.assert_close(sigmoid_cross_entropy(student, teacher), sum(alone), rtol=1e-12, atol=0)


def test_an_unknown_form_is_refused():
    with pytest.raises(kdlib.KdlibError, match="form='bce'"):
        sigmoid_cross_entropy(noise(2, 3), noise(2, 3), form="bce")
