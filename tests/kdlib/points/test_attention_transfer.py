"""Attention transfer, against numpy."""

import numpy as np
import pytest
import torch

from kdlib.points.attention_transfer import AttentionTransfer, attention_loss

VARIANTS = pytest.mark.parametrize("variant", ["paper", "code"])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(tap, p=2):
    q = (np.abs(tap) ** p).sum(1).reshape(len(tap), -1)
    return q / np.sqrt((q**2).sum(1, keepdims=True))


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"), [((5, 3, 4), (5, 6, 4)), ((5, 3, 4, 2), (5, 2, 4, 2)), ((1, 1, 3), (1, 2, 3))]
)
def test_closed_form(ours, theirs, p):
    a, b = noise(*ours), noise(*theirs, seed=1)
    difference = maps(a.numpy(), p) - maps(b.numpy(), p)
    code, paper = (difference**2).mean(), np.sqrt((difference**2).sum(1)).mean()
    assert attention_loss(a, b, p=p).item() == pytest.approx(code, rel=1e-12)
    assert attention_loss(a, b, p=p, variant="paper").item() == pytest.approx(paper, rel=1e-12)


@VARIANTS
def test_no_scale_and_no_order_or_sign_of_channels_matters(variant):
    a, b = noise(5, 3, 4, 4), noise(5, 6, 4, 4, seed=1)
    expected = attention_loss(a, b, variant=variant)
    scales = torch.tensor([1e-7, 1.0, 3.0, 1e5, 1e9], dtype=torch.float64).view(5, 1, 1, 1)
    for changed in (scales * a, a.flip(1), -a, torch.cat([a, torch.zeros_like(a)], 1), torch.cat([a, a], 1)):
        torch.testing.assert_close(attention_loss(changed, b, variant=variant), expected, rtol=1e-10, atol=0)


@VARIANTS
def test_equal_attention_is_zero_with_a_zero_gradient(variant):
    a = noise(5, 3, 4).requires_grad_()
    loss = attention_loss(a, a.detach().clone(), variant=variant)
    loss.backward()
    assert loss.item() == 0
    assert a.grad.abs().max() < 1e-12


@VARIANTS
def test_the_larger_attention_map_is_averaged(variant):
    a, b = noise(5, 3, 8), noise(5, 2, 4, seed=1)
    pooled = (a.numpy() ** 2).sum(1).reshape(5, 4, 2).mean(-1)
    difference = pooled / np.sqrt((pooled**2).sum(1, keepdims=True)) - maps(b.numpy())
    expected = np.sqrt((difference**2).sum(1)).mean() if variant == "paper" else (difference**2).mean()
    assert attention_loss(a, b, variant=variant).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_powers_of_extreme_float32_neither_vanish_nor_overflow(scale):
    a, b = noise(5, 3, 4).float(), noise(5, 3, 4, seed=1).float()
    expected = attention_loss(a, b, p=4)
    torch.testing.assert_close(attention_loss(scale * a, b, p=4), expected, rtol=1e-4, atol=0)


def test_the_class_is_the_function():
    a, b = noise(4, 3, 6), noise(4, 2, 6, seed=1)
    point = AttentionTransfer(tap="a", teacher_tap="b", p=3, variant="paper")
    assert point({"a": a}, {"b": b}, {}) == attention_loss(a, b, p=3, variant="paper")
