"""The Jensen-Shannon divergence against scipy."""

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon

import kdlib
from kdlib.points.js import JensenShannon, js_loss
from kdlib.testing import check_point


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_a_point():
    check_point(JensenShannon())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_the_square_of_scipys_distance(temperature):
    student, teacher = noise(8, 10), 2 * noise(8, 10, seed=1)
    p, q = ((z / temperature).softmax(-1).numpy() for z in (teacher, student))
    expected = temperature**2 * (jensenshannon(p, q, axis=-1) ** 2).mean()
    assert js_loss(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-10)


def test_it_is_symmetric_from_0_to_log_2():
    one, other = noise(4, 5), noise(4, 5, seed=1)
    torch.testing.assert_close(js_loss(one, other), js_loss(other, one), rtol=1e-12, atol=0)
    assert abs(js_loss(one, one + 3.0).item()) < 1e-15
    apart = torch.tensor([[1e4, 0.0], [1e4, 0.0]], dtype=torch.float64)
    assert js_loss(apart, apart.flip(1)).item() == pytest.approx(math.log(2), rel=1e-12)


def test_at_a_high_temperature_it_is_a_quarter_of_the_kl_divergence():
    student, teacher = noise(8, 10), noise(8, 10, seed=1)
    kl = kdlib.soft_cross_entropy(student, teacher, temperature=1e3, student_temperature=1e3, form="kl")
    assert js_loss(student, teacher, temperature=1e3).item() == pytest.approx(kl.item() / 4, rel=1e-2)
