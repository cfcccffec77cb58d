"""Neuron selectivity transfer, against numpy."""

import numpy as np
import pytest
import torch

from kdlib.points.nst import Nst, selectivity_mmd

KERNELS = pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patterns(tap):
    flat = tap.reshape(*tap.shape[:2], -1)
    return flat / np.sqrt((flat**2).sum(-1, keepdims=True))


def mmd(student, teacher, kernel, degree=2, constant=0.0, spreads=None):
    """The definition, pair by pair."""
    rows = []
    for row, (s, t) in enumerate(zip(patterns(student), patterns(teacher), strict=True)):
        spread = np.mean([[((x - y) ** 2).sum() for y in t] for x in s]) if spreads is None else spreads[row]
        k = {
            "polynomial": lambda x, y: (x @ y + constant) ** degree,
            "linear": lambda x, y: x @ y,
            "gaussian": lambda x, y, spread=spread: np.exp(-((x - y) ** 2).sum() / (2 * spread)),
        }[kernel]
        means = [np.mean([[k(x, y) for y in b] for x in a]) for a, b in ((t, t), (s, s), (s, t))]
        rows.append(means[0] + means[1] - 2 * means[2])
    return np.mean(rows)


@KERNELS
@pytest.mark.parametrize(
    ("ours", "theirs"), [((3, 2, 4), (3, 5, 4)), ((2, 3, 2, 3), (2, 2, 2, 3)), ((1, 1, 3), (1, 2, 3))]
)
def test_closed_form(ours, theirs, kernel):
    a, b = noise(*ours), noise(*theirs, seed=1)
    assert selectivity_mmd(a, b, kernel=kernel).item() == pytest.approx(mmd(a.numpy(), b.numpy(), kernel), rel=1e-10)


@pytest.mark.parametrize(("degree", "constant"), [(1, 0.0), (2, 1.0), (3, 0.5)])
def test_the_polynomials_settings(degree, constant):
    a, b = noise(3, 2, 4), noise(3, 5, 4, seed=1)
    expected = mmd(a.numpy(), b.numpy(), "polynomial", degree, constant)
    assert selectivity_mmd(a, b, degree=degree, constant=constant).item() == pytest.approx(expected, rel=1e-10)


def test_the_linear_kernel_compares_mean_patterns():
    a, b = noise(3, 2, 4), noise(3, 5, 4, seed=1)
    expected = np.mean(((patterns(a.numpy()).mean(1) - patterns(b.numpy()).mean(1)) ** 2).sum(-1))
    assert selectivity_mmd(a, b, kernel="linear").item() == pytest.approx(expected, rel=1e-10)


@KERNELS
def test_the_same_channels_in_any_order_number_and_scale_are_zero(kernel):
    a = noise(3, 4, 5)
    other = torch.cat([2 * a.flip(1), 1e-5 * a], 1)
    assert abs(selectivity_mmd(a, other, kernel=kernel).item()) < 1e-12
    assert selectivity_mmd(a, noise(3, 4, 5, seed=1), kernel=kernel).item() > 1e-3


def test_a_sign_is_lost_on_the_second_power_and_not_on_the_first():
    a, b = noise(3, 2, 4), noise(3, 5, 4, seed=1)
    torch.testing.assert_close(selectivity_mmd(-a, b), selectivity_mmd(a, b), rtol=1e-12, atol=0)
    assert abs(selectivity_mmd(-a, b, degree=1) - selectivity_mmd(a, b, degree=1)) > 1e-3


def test_the_larger_map_is_averaged():
    a, b = noise(3, 2, 8), noise(3, 5, 4, seed=1)
    expected = mmd(a.numpy().reshape(3, 2, 4, 2).mean(-1), b.numpy(), "polynomial")
    assert selectivity_mmd(a, b).item() == pytest.approx(expected, rel=1e-10)


def test_the_gaussians_gradient_takes_its_width_as_a_constant():
    a, b = noise(2, 2, 3).requires_grad_(), noise(2, 3, 3, seed=1)
    (found,) = torch.autograd.grad(selectivity_mmd(a, b, kernel="gaussian"), a)
    values, theirs = a.detach().numpy(), b.numpy()
    spreads = [
        np.mean([[((x - y) ** 2).sum() for y in t] for x in s])
        for s, t in zip(*map(patterns, (values, theirs)), strict=True)
    ]
    for place in np.ndindex(values.shape):
        step = np.zeros_like(values)
        step[place] = 1e-6
        above, below = (mmd(values + sign * step, theirs, "gaussian", spreads=spreads) for sign in (1, -1))
        assert found[place].item() == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-8)


def test_identical_channels_everywhere_have_no_width_and_no_nan():
    a = torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True)
    loss = selectivity_mmd(a, torch.ones(2, 2, 4, dtype=torch.float64), kernel="gaussian")
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert a.grad.isfinite().all()


def test_the_class_is_the_function():
    a, b = noise(3, 2, 4), noise(3, 5, 4, seed=1)
    point = Nst(tap="a", teacher_tap="b", degree=3, constant=0.5)
    assert point({"a": a}, {"b": b}, {}) == selectivity_mmd(a, b, degree=3, constant=0.5)
