"""Correlation congruence against kernels computed pair by pair."""

import math

import numpy as np
import pytest
import torch

import kdlib
from kdlib.points.correlation import Correlation, correlation_loss
from kdlib.testing import check_point


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(student, teacher, kernel):
    n = len(student)
    s, t = student.numpy(), teacher.numpy()
    return sum((kernel(t[i], t[j]) - kernel(s[i], s[j])) ** 2 for i in range(n) for j in range(n)) / n**2


def taylor(gamma, order):
    def kernel(x, y):
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        return math.exp(-2 * gamma) * sum((2 * gamma * cosine) ** p / math.factorial(p) for p in range(order + 1))

    return kernel


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_it_is_a_point(kernel):
    check_point(Correlation(kernel=kernel))


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (1.0, 1), (0.1, 5)])
def test_the_closed_form_of_the_gaussian(gamma, order):
    student, teacher = noise(6, 3), noise(6, 4, seed=1)
    found = correlation_loss(student, teacher, gamma=gamma, order=order)
    assert found.item() == pytest.approx(by_hand(student, teacher, taylor(gamma, order)), rel=1e-10)


def test_the_series_tends_to_the_gaussian_of_unit_rows():
    def gaussian(x, y):
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        return math.exp(-0.4 * np.sum((x - y) ** 2))

    student, teacher = noise(6, 3), noise(6, 4, seed=1)
    found = correlation_loss(student, teacher, gamma=0.4, order=12)
    assert found.item() == pytest.approx(by_hand(student, teacher, gaussian), rel=1e-10)


def test_the_closed_form_of_the_bilinear_kernel():
    student, teacher = noise(6, 3), noise(6, 4, seed=1)
    found = correlation_loss(student, teacher, kernel="bilinear")
    assert found.item() == pytest.approx(by_hand(student, teacher, lambda x, y: x @ y), rel=1e-10)


def test_one_row_of_the_bilinear_kernel_compares_lengths():
    assert correlation_loss(torch.tensor([[2.0]]), torch.tensor([[0.0, 1.0]]), kernel="bilinear").item() == 9


def test_bad_settings_are_refused():
    with pytest.raises(kdlib.KdlibError, match="kernel='rbf'"):
        correlation_loss(noise(3, 2), noise(3, 2), kernel="rbf")
    with pytest.raises(kdlib.KdlibError, match="gamma"):
        correlation_loss(noise(3, 2), noise(3, 2), gamma=0.0)
