"""Logit standardisation against numpy's z-scores."""

import numpy as np
import pytest
import torch

import kdlib
from kdlib.points.logit_standardised import LogitStandardised, standardised_kl
from kdlib.testing import check_point

VARIANTS = {"paper": 0, "code": 1}  # numpy's ddof


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_a_point(variant):
    check_point(LogitStandardised(variant=variant))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_closed_form(variant, temperature):
    student, teacher = noise(8, 10), 3 * noise(8, 10, seed=1) + 1

    def soft(z):
        z = z.numpy()
        deviation = z.std(-1, ddof=VARIANTS[variant], keepdims=True) + 1e-7
        return softmax((z - z.mean(-1, keepdims=True)) / deviation / temperature)

    p, q = soft(teacher), soft(student)
    expected = temperature**2 * np.mean(np.sum(p * np.log(p / q), -1))
    found = standardised_kl(student, teacher, temperature=temperature, variant=variant)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_variants_differ_as_two_temperatures_do():
    student, teacher, factor = noise(8, 10), noise(8, 10, seed=1), (10 / 9) ** 0.5
    paper = standardised_kl(student, teacher, temperature=2.0, variant="paper")
    code = standardised_kl(student, teacher, temperature=2.0 / factor, variant="code")
    torch.testing.assert_close(code * factor**2, paper, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_and_shift_of_a_row_do_not_matter(variant):
    student, teacher, scales = noise(8, 10), noise(8, 10, seed=1), torch.arange(1.0, 9.0)[:, None]
    expected = standardised_kl(student, teacher, variant=variant)
    for one, other in ((scales * student + 5, teacher), (student, scales * teacher - scales)):
        torch.testing.assert_close(standardised_kl(one, other, variant=variant), expected, rtol=1e-6, atol=0)
    assert abs(standardised_kl(student, scales * student, variant=variant).item()) < 1e-9


@pytest.mark.parametrize("level", [0.0, 0.1, 10.1])
def test_a_head_of_equal_logits_gets_a_gradient_of_ordinary_size(level):
    student, teacher = torch.full((4, 7), level, requires_grad=True), noise(4, 7).float()
    standardised_kl(student, teacher).backward()
    assert 0 < student.grad.abs().max() < 10


def test_logits_of_almost_no_spread_get_one_too():
    student, teacher = (1e-9 * noise(4, 7, seed=1)).requires_grad_(), noise(4, 7)
    standardised_kl(student, teacher).backward()
    assert 0 < student.grad.abs().max() < 10


def test_two_classes_have_one_z_score():
    student, teacher = noise(4, 2).abs() * torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 1.0]]).expand(4, 2)
    student.requires_grad_()
    value = standardised_kl(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-5


def test_an_unknown_variant_is_refused():
    with pytest.raises(kdlib.KdlibError, match="variant"):
        standardised_kl(noise(2, 3), noise(2, 3), variant="theirs")
