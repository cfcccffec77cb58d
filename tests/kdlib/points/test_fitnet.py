"""The hint of FitNets, against numpy."""

import numpy as np
import pytest
import torch

from kdlib import TapError
from kdlib.points.fitnet import FitNet, hint_loss


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 4), (5, 3, 4, 2), (1, 6)])
def test_closed_form(shape):
    a, b = noise(*shape), noise(*shape, seed=1)
    squares = 0.5 * (a.numpy() - b.numpy()) ** 2
    positions = np.prod(shape[2:])
    assert hint_loss(a, b, variant="paper").item() == pytest.approx(squares.sum() / shape[0], rel=1e-12)
    assert hint_loss(a, b, variant="code").item() == pytest.approx(squares.sum() / shape[0] / positions, rel=1e-12)


def test_it_is_a_multiple_of_the_mean_squared_error():
    a, b = noise(5, 3, 4), noise(5, 3, 4, seed=1)
    torch.testing.assert_close(2 / 3 * hint_loss(a, b), torch.nn.functional.mse_loss(a, b), rtol=1e-12, atol=0)


def test_flat_taps_through_the_projector():
    torch.manual_seed(0)
    a, b = noise(5, 4), noise(5, 6, seed=1)
    point = FitNet(tap="a")
    point.prepare({"a": a}, {"a": b}, {})
    weight, bias = (parameter.detach().numpy() for parameter in point.regressor.parameters())
    expected = 0.5 * ((a.numpy() @ weight.T + bias - b.numpy()) ** 2).sum() / 5
    assert point({"a": a}, {"a": b}, {}).item() == pytest.approx(expected, rel=1e-12)


def test_maps_of_two_sizes_through_the_projector():
    torch.manual_seed(0)
    a, b = noise(5, 4, 2, 6), noise(5, 6, 4, 3, seed=1)
    point = FitNet(tap="a")
    point.prepare({"a": a}, {"a": b}, {})
    weight, bias = (parameter.detach().numpy() for parameter in point.regressor.parameters())
    ours = a.numpy().reshape(5, 4, 2, 3, 2).mean(-1)
    theirs = b.numpy().reshape(5, 6, 2, 2, 3).mean(3)
    projected = np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], ours) + bias[None, :, None, None]
    expected = 0.5 * ((projected - theirs) ** 2).sum(1).mean()
    assert point({"a": a}, {"a": b}, {}).item() == pytest.approx(expected, rel=1e-12)


def test_pooling_before_and_after_the_projector_is_the_same():
    torch.manual_seed(0)
    a, b = noise(5, 4, 8), noise(5, 6, 4, seed=1)
    point = FitNet(tap="a")
    point.prepare({"a": a}, {"a": b}, {})
    after = torch.nn.functional.adaptive_avg_pool1d(point.regressor(a), 4)
    torch.testing.assert_close(point({"a": a}, {"a": b}, {}), hint_loss(after, b), rtol=1e-12, atol=0)


def test_without_a_projector_channels_must_agree():
    with pytest.raises(TapError, match=r"\(5, 3\).*\(5, 4\)"):
        hint_loss(noise(5, 3), noise(5, 4))
