"""One minus the cosine of a hidden layer, against numpy."""

import numpy as np
import pytest
import torch

from kdlib.points.hidden_cosine import HiddenCosine, cosine_distance


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 4), (5, 3, 4, 2), (1, 6)])
def test_closed_form(shape):
    a, b = noise(*shape), noise(*shape, seed=1)
    rows = [
        1 - np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y))
        for x, y in zip(a.numpy().reshape(len(a), -1), b.numpy().reshape(len(b), -1), strict=True)
    ]
    assert cosine_distance(a, b).item() == pytest.approx(np.mean(rows), rel=1e-12)


def test_only_directions_count():
    a, b = noise(4, 6), noise(4, 6, seed=1)
    scales = torch.tensor([[1e-6], [1.0], [7.0], [1e9]], dtype=torch.float64)
    torch.testing.assert_close(cosine_distance(scales * a, b / scales), cosine_distance(a, b), rtol=1e-12, atol=0)
    turn, _ = torch.linalg.qr(noise(6, 6, seed=2))
    torch.testing.assert_close(cosine_distance(a @ turn, b @ turn), cosine_distance(a, b), rtol=1e-12, atol=0)


def test_its_range():
    a = noise(4, 6)
    assert cosine_distance(a, 3 * a).item() == pytest.approx(0, abs=1e-12)
    assert cosine_distance(a, -a).item() == pytest.approx(2, abs=1e-12)


def test_a_zero_row_costs_one():
    a, b = noise(2, 6), noise(2, 6, seed=1)
    a[0] = 0
    expected = (1 + cosine_distance(a[1:], b[1:]).item()) / 2
    assert cosine_distance(a, b).item() == pytest.approx(expected, rel=1e-12)


def test_the_class_is_the_function():
    a, b = noise(4, 6), noise(4, 6, seed=1)
    assert HiddenCosine(tap="a", teacher_tap="b")({"a": a}, {"b": b}, {}) == cosine_distance(a, b)
