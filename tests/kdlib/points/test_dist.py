"""DIST against numpy's correlation coefficients."""

import numpy as np
import pytest
import torch

from kdlib.points.dist import Dist, dist_loss
from kdlib.testing import check_point


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def correlations(one, other):
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)])


def test_it_is_a_point():
    check_point(Dist())


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.0, 4.0), (0.0, 3.0, 0.5)])
def test_the_closed_form(beta, gamma, temperature):
    student, teacher = noise(8, 10), 2 * noise(8, 10, seed=1)
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    expected = beta * (1 - correlations(p, q).mean()) + gamma * (1 - correlations(p.T, q.T).mean())
    found = dist_loss(student, teacher, beta=beta, gamma=gamma, temperature=temperature)
    # 1e-8 beside a product of norms of about 0.01
    assert found.item() == pytest.approx(temperature**2 * expected, rel=1e-5)


def test_a_value_done_by_hand():
    log3 = float(np.log(3.0))
    student = torch.tensor([[log3, 0.0], [0.0, log3], [0.0, 0.0]], dtype=torch.float64)  # p = 3/4, 1/4, 1/2
    teacher = torch.tensor([[log3, 0.0], [0.0, 0.0], [0.0, log3]], dtype=torch.float64)  # p = 3/4, 1/2, 1/4
    # rows: 1, 0 (the teacher's is flat), 0 (the student's is); classes: (1/4, -1/4, 0) with (1/4, 0, -1/4) = 1/2
    assert dist_loss(student, teacher, gamma=0.0).item() == pytest.approx(2 / 3, abs=1e-6)
    assert dist_loss(student, teacher, beta=0.0).item() == pytest.approx(1 / 2, abs=1e-6)


def test_equal_logits_cost_nothing_and_opposite_ones_2():
    z = noise(8, 2)
    assert dist_loss(z, z + 3.0, gamma=0.0).item() == pytest.approx(0, abs=1e-5)
    assert dist_loss(z, -z, gamma=0.0).item() == pytest.approx(2, abs=1e-5)
    assert dist_loss(z, z + 3.0, beta=0.0).item() == pytest.approx(0, abs=1e-5)


def test_a_linear_map_of_the_probabilities_does_not_matter():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], dtype=torch.float64)
    milder = 0.5 * p + 0.5 / 3
    assert dist_loss(milder.log(), p.log(), gamma=0.0).item() == pytest.approx(0, abs=1e-6)


def test_a_batch_of_one_has_only_the_relation_between_classes():
    student, teacher = noise(1, 5).requires_grad_(), noise(1, 5, seed=1)
    inside = dist_loss(student, teacher, beta=0.0)
    assert inside.item() == 1
    inside.backward()
    assert student.grad.abs().max() == 0
    assert dist_loss(student, teacher, gamma=0.0).item() != 1


def test_a_head_of_zeros_gets_a_gradient_of_ordinary_size():
    student, teacher = torch.zeros(4, 5, dtype=torch.float16, requires_grad=True), noise(4, 5)
    dist_loss(student, teacher).backward()
    assert 0 < student.grad.abs().max() < 1
