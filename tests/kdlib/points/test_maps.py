"""What the points on hidden layers share."""

import numpy as np
import pytest
import torch

from kdlib import TapError
from kdlib.points.maps import by_largest, length, refuse_shapes, same_size, unit
from kdlib.points.reduction import widened


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_unit_vectors_against_numpy():
    x = noise(3, 4, 5)
    expected = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(unit(x, 1).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 1e38])
def test_no_scale_of_float32_overflows_or_vanishes(scale):
    x = torch.tensor([[0.75, -0.25]]) * scale
    found = unit(x.requires_grad_())
    torch.testing.assert_close(found, torch.tensor([[0.9486833, -0.3162278]]), rtol=1e-5, atol=0)
    found.sum().backward()
    assert not x.grad.isnan().any()


def test_gradients_of_unit_and_length():
    x = noise(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(unit, (x,))
    assert torch.autograd.gradcheck(length, (x,))
    assert torch.autograd.gradcheck(lambda z: unit(by_largest(z).flatten(1)), (noise(2, 3, 4).requires_grad_(),))


def test_zero_vectors_stay_zero_with_a_finite_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    (unit(x).sum() + length(x).sum() + by_largest(x).sum()).backward()
    assert torch.equal(unit(x), torch.zeros(2, 3))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype):
    assert widened(torch.ones(2, dtype=dtype)).dtype == torch.float32
    assert widened(noise(2)).dtype == torch.float64


def test_pooling_averages_the_larger_map_axis_by_axis():
    wide, tall = noise(2, 3, 2, 6), noise(2, 5, 4, 3, seed=1)
    a, b = same_size(wide, tall)
    np.testing.assert_allclose(a.numpy(), wide.numpy().reshape(2, 3, 2, 3, 2).mean(-1), rtol=1e-12)
    np.testing.assert_allclose(b.numpy(), tall.numpy().reshape(2, 5, 2, 2, 3).mean(3), rtol=1e-12)
    assert a.shape[2:] == b.shape[2:] == (2, 3)


def test_taps_of_one_size_are_left_as_they_are():
    for shape in [(2, 3), (2, 3, 4), (2, 3, 4, 5)]:
        a, b = noise(*shape), noise(*shape, seed=1)
        assert same_size(a, b) == (a, b)


@pytest.mark.parametrize(
    ("a", "b"), [((2, 3, 4), (2, 3, 4, 5)), ((2, 3, 4), (3, 3, 4)), ((2, 3), (2, 3, 4)), ((2,), (2,))]
)
def test_taps_that_do_not_go_together_are_named(a, b):
    with pytest.raises(TapError) as error:
        same_size(torch.zeros(a), torch.zeros(b))
    assert str(a) in str(error.value)
    assert str(b) in str(error.value)


def test_a_number_without_axes_is_refused():
    with pytest.raises(TapError, match=r"\(\) and \(2, 3, 4\)"):
        refuse_shapes("maps are wanted", torch.tensor(1.0), torch.zeros(2, 3, 4))
