"""Variational information distillation, against scipy's normal distribution."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kdlib import KdlibError, TapError
from kdlib.points.vid import Vid, gaussian_nll

CONSTANT = 0.5 * math.log(2 * math.pi)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2), (1, 3)])
def test_closed_form(shape):
    mean, teacher, variance = noise(*shape), noise(*shape, seed=1), torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64)
    scale = np.sqrt(variance.numpy()).reshape(1, 3, *[1] * (len(shape) - 2))
    likelihood = norm.logpdf(teacher.numpy(), mean.numpy(), np.broadcast_to(scale, shape)) + CONSTANT
    code, paper = -likelihood.mean(), -likelihood.sum() / shape[0]
    assert gaussian_nll(mean, teacher, variance).item() == pytest.approx(code, rel=1e-12)
    assert gaussian_nll(mean, teacher, variance, variant="paper").item() == pytest.approx(paper, rel=1e-12)


def test_gradients_of_mean_and_variance():
    mean, variance = noise(4, 3, 2).requires_grad_(), (noise(3) ** 2 + 0.1).requires_grad_()
    teacher = noise(4, 3, 2, seed=1)
    for variant in ("paper", "code"):
        assert torch.autograd.gradcheck(
            lambda m, v, o=variant: gaussian_nll(m, teacher, v, variant=o), (mean, variance)
        )


def test_the_best_variance_is_the_mean_squared_error_of_each_channel():
    mean, teacher = noise(6, 3, 4), noise(6, 3, 4, seed=1)
    best = (mean - teacher).square().mean((0, 2)).requires_grad_()
    (gradient,) = torch.autograd.grad(gaussian_nll(mean, teacher, best), best)
    assert gradient.abs().max() < 1e-12


def prepared(student, teacher, **settings):
    torch.manual_seed(0)
    point = Vid(tap="a", **settings)
    point.prepare({"a": student}, {"a": teacher}, {})
    return point


@pytest.mark.parametrize("variance", [0.001, 0.5, 5.0, 1000.0])
def test_every_channel_starts_at_the_given_variance(variance):
    point = prepared(noise(5, 4), noise(5, 6, seed=1), variance=variance)
    torch.testing.assert_close(
        point.variances().detach(), torch.full((6,), variance, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_a_variance_never_gets_to_zero():
    point = prepared(noise(5, 4), noise(5, 6, seed=1))
    with torch.no_grad():
        point.alpha.fill_(-1e4)
    assert point({"a": noise(5, 4)}, {"a": noise(5, 6)}, {}).isfinite()
    assert point.variances().min() > 0


def test_the_point_in_closed_form():
    a, b = noise(5, 4, 8), noise(5, 6, 4, seed=1)
    point = prepared(a, b)
    weight, bias = (parameter.detach().numpy() for parameter in point.mean.parameters())
    ours = a.numpy().reshape(5, 4, 4, 2).mean(-1)
    mean = np.einsum("oc,bct->bot", weight[:, :, 0], ours) + bias[None, :, None]
    expected = -(norm.logpdf(b.numpy(), mean, math.sqrt(5.0)) + CONSTANT).mean()
    assert point({"a": a}, {"a": b}, {}).item() == pytest.approx(expected, rel=1e-10)


def test_projector_and_variances_are_trained():
    a, b = noise(64, 4), noise(64, 6, seed=1)
    point = prepared(a, b)
    optimizer = torch.optim.Adam(point.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        loss = point({"a": a}, {"a": b}, {})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    residual = (point.mean(a) - b).square().mean(0)
    torch.testing.assert_close(point.variances(), residual, rtol=0.1, atol=0)


def test_variances_of_other_channels_are_an_error():
    with pytest.raises(TapError, match=r"2 variances.*\(5, 3\)"):
        gaussian_nll(noise(5, 3), noise(5, 3), torch.ones(2))


def test_unprepared_it_has_no_variances():
    with pytest.raises(KdlibError, match=r"distiller\.prepare\(batch\)"):
        Vid().variances()
