"""FSP matrices, against numpy."""

import numpy as np
import pytest
import torch

from kdlib import KdlibError, TapError
from kdlib.points.fsp import Fsp, fsp_loss, fsp_matrix


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(), (4,), (4, 3)])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_matrix_in_closed_form(size, rows):
    a, b = noise(rows, 2, *size), noise(rows, 3, *size, seed=1)
    expected = np.einsum("bip,bjp->bij", a.numpy().reshape(rows, 2, -1), b.numpy().reshape(rows, 3, -1))
    np.testing.assert_allclose(fsp_matrix(a, b).numpy(), expected / max(np.prod(size), 1), rtol=1e-12)


def test_the_larger_layer_of_a_network_is_brought_to_the_smaller_by_maximum_pooling():
    a, b = noise(5, 2, 4, 6), noise(5, 3, 2, 3, seed=1)
    pooled = a.numpy().reshape(5, 2, 2, 2, 3, 2).max((3, 5))
    expected = np.einsum("bihw,bjhw->bij", pooled, b.numpy()) / 6
    np.testing.assert_allclose(fsp_matrix(a, b).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(fsp_matrix(b, a).numpy(), expected.transpose(0, 2, 1), rtol=1e-12)
    np.testing.assert_allclose(
        fsp_matrix(a[..., 0], b[..., 0]).numpy(),
        np.einsum("bip,bjp->bij", a[..., 0].numpy().reshape(5, 2, 2, 2).max(-1), b[..., 0].numpy()) / 2,
        rtol=1e-12,
    )


def test_the_loss_in_closed_form():
    student = noise(5, 2, 4), noise(5, 3, 4, seed=1)
    teacher = noise(5, 2, 6, seed=2), noise(5, 3, 6, seed=3)
    g_s, g_t = (np.einsum("bip,bjp->bij", a.numpy(), b.numpy()) / a.shape[2] for a, b in (student, teacher))
    expected = np.mean([((g_t[row] - g_s[row]) ** 2).sum() for row in range(5)])
    assert fsp_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert fsp_loss(student, student).item() == 0


def test_the_order_of_the_positions_does_not_matter():
    student = noise(5, 2, 4), noise(5, 3, 4, seed=1)
    teacher = noise(5, 2, 6, seed=2), noise(5, 3, 6, seed=3)
    shuffled = student[0].flip(2), student[1].flip(2)
    torch.testing.assert_close(fsp_loss(shuffled, teacher), fsp_loss(student, teacher), rtol=1e-12, atol=0)


def test_other_channels_are_an_error_that_names_both_matrices():
    with pytest.raises(TapError, match=r"\(5, 2, 3\).*\(5, 2, 4\)"):
        fsp_loss((noise(5, 2, 4), noise(5, 3, 4)), (noise(5, 2, 4), noise(5, 4, 4)))


def test_layers_of_other_axes_are_an_error():
    with pytest.raises(TapError, match=r"\(5, 2, 4\) and \(5, 3\)"):
        fsp_matrix(noise(5, 2, 4), noise(5, 3))


@pytest.mark.parametrize("taps", [[], ["a"], ["a", "b", "c"]])
def test_it_wants_two_taps(taps):
    with pytest.raises(KdlibError, match="two taps"):
        Fsp(taps=taps)


def test_the_class_is_the_function():
    student = {"a": noise(5, 2, 4), "b": noise(5, 3, 4, seed=1)}
    teacher = {"c": noise(5, 2, 6, seed=2), "d": noise(5, 3, 6, seed=3)}
    expected = fsp_loss(tuple(student.values()), tuple(teacher.values()))
    assert Fsp(taps=["a", "b"], teacher_taps=["c", "d"])(student, teacher, {}) == expected
