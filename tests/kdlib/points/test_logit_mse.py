"""Logit matching against numpy."""

import numpy as np
import pytest
import torch

import kdlib
from kdlib.points.logit_mse import LogitMse, logit_mse_loss
from kdlib.testing import check_point


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_a_point():
    check_point(LogitMse())
    check_point(LogitMse(variant="paper"))


def test_the_closed_form():
    student, teacher = noise(8, 10), noise(8, 10, seed=1)
    squares = (student.numpy() - teacher.numpy()) ** 2
    assert logit_mse_loss(student, teacher).item() == pytest.approx(np.sum(squares) / 80, rel=1e-12)
    assert logit_mse_loss(student, teacher, variant="paper").item() == pytest.approx(np.sum(squares) / 8, rel=1e-12)


def test_a_value_done_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert logit_mse_loss(student, teacher).item() == 14 / 4
    assert logit_mse_loss(student, teacher, variant="paper").item() == 14 / 2


def test_the_kl_divergence_at_a_high_temperature_tends_to_it():
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (noise(8, 10), noise(8, 10, seed=1)))
    hot = kdlib.soft_cross_entropy(student, teacher, temperature=1e3, student_temperature=1e3, form="kl")
    assert hot.item() == pytest.approx(logit_mse_loss(student, teacher).item() / 2, rel=1e-2)


def test_an_unknown_variant_is_refused():
    with pytest.raises(kdlib.KdlibError, match=r"variant='papr'.*Did you mean 'paper'"):
        logit_mse_loss(noise(2, 3), noise(2, 3), variant="papr")
