"""Relational distillation against loops over pairs and triplets, and values on which implementations agree."""

import itertools

import numpy as np
import pytest
import torch

import kdlib
from kdlib.points.rkd import Rkd, rkd_loss
from kdlib.testing import check_point


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def drawn():
    """Embeddings of a student and a teacher (8, 64), float64, as drawn by other implementations."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        torch.randn(8, 10, generator=generator, dtype=torch.float64)
    torch.randint(0, 10, (8,), generator=generator)
    return [torch.randn(8, 64, generator=generator, dtype=torch.float64) for _ in range(2)]


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def relations(rows):
    """Return (distances over their mean, cosines) of all pairs and triplets of different rows."""
    rows = rows.numpy()
    pairs = list(itertools.permutations(range(len(rows)), 2))
    distances = np.array([np.linalg.norm(rows[i] - rows[j]) for i, j in pairs])
    cosines = []
    for i, j, k in itertools.permutations(range(len(rows)), 3):
        one, other = rows[i] - rows[j], rows[k] - rows[j]
        cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    return distances / distances.mean(), np.array(cosines)


def by_hand(student, teacher, distance, angle):
    n = len(student)
    of_student, of_teacher = relations(student), relations(teacher)
    sums = [sum(huber(x) for x in s - t) for s, t in zip(of_student, of_teacher, strict=True)]
    return distance * sums[0] / n**2 + angle * sums[1] / n**3


def test_it_is_a_point():
    check_point(Rkd())


def test_the_values_that_implementations_agree_on(drawn):
    assert rkd_loss(*drawn).item() == pytest.approx(0.2080785068, abs=1e-9)
    assert rkd_loss(*drawn, normalise=True).item() == pytest.approx(0.1520, abs=5e-5)
    student, teacher = drawn
    point = Rkd(distance=25.0, angle=50.0)
    assert point({"embedding": student}, {"embedding": teacher}, {}).item() == pytest.approx(0.2080785068, abs=1e-9)


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_closed_form(distance, angle):
    student, teacher = noise(6, 3), noise(6, 4, seed=1) ** 3  # cubed, so that some distances lie beyond Huber's 1
    found = rkd_loss(student, teacher, distance=distance, angle=angle)
    assert found.item() == pytest.approx(by_hand(student, teacher, distance, angle), rel=1e-10)


def test_normalised_rows_are_the_loss_of_unit_rows():
    student, teacher = noise(6, 3), noise(6, 4, seed=1)
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (student, teacher)]
    torch.testing.assert_close(rkd_loss(student, teacher, normalise=True), rkd_loss(*unit), rtol=1e-12, atol=0)


def test_a_batch_of_1_is_refused():
    with pytest.raises(kdlib.KdlibError, match=r"at least 3 rows.*has 1"):
        rkd_loss(noise(1, 4), noise(1, 4))
    with pytest.raises(kdlib.KdlibError, match=r"at least 2 rows.*has 1"):
        rkd_loss(noise(1, 4), noise(1, 4), angle=0.0)


def test_a_batch_of_2_has_distances_but_no_angles():
    student, teacher = noise(2, 4).requires_grad_(), noise(2, 4, seed=1)
    value = rkd_loss(student, teacher, angle=0.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)  # one distance, which is its own mean
    assert student.grad.abs().max() < 1e-12
    with pytest.raises(kdlib.KdlibError, match=r"angles.*has 2"):
        rkd_loss(student, teacher)


def test_no_weight_is_refused():
    with pytest.raises(kdlib.KdlibError, match=r"distance=0.0 and angle=0.0"):
        rkd_loss(noise(4, 3), noise(4, 3), distance=0.0, angle=0.0)


def test_equal_rows_have_no_gradient_at_their_distance():
    student = torch.zeros(3, 2, requires_grad=True)
    rkd_loss(student, noise(3, 2).float()).backward()
    assert torch.equal(student.grad, torch.zeros(3, 2))


def test_a_weight_of_zero_is_not_computed_and_a_weight_may_be_a_schedule(drawn):
    student, teacher = drawn
    ramp = kdlib.Schedule(kind="linear", start=0.0, end=50.0, epochs=2)
    batch = {"clock": lambda: (0, 1)}
    found = Rkd(angle=ramp)({"embedding": student}, {"embedding": teacher}, batch)
    assert found == rkd_loss(student, teacher, angle=25.0)
    batch = {"clock": lambda: (0, 0)}
    found = Rkd(angle=ramp)({"embedding": student[:2]}, {"embedding": teacher[:2]}, batch)
    assert found.item() == pytest.approx(0, abs=1e-12)
