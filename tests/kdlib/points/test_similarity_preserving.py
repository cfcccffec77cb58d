"""Similarity-preserving distillation against numpy, and a value on which implementations agree."""

import numpy as np
import pytest
import torch

from kdlib.points.similarity_preserving import SimilarityPreserving, similarity_preserving_loss
from kdlib.testing import check_point


@pytest.fixture
def drawn():
    """Feature maps of a student and a teacher (8, 6, 5, 5), float64, as drawn by other implementations."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        torch.randn(8, 10, generator=generator, dtype=torch.float64)
    torch.randint(0, 10, (8,), generator=generator)
    for _ in range(2):
        torch.randn(8, 64, generator=generator, dtype=torch.float64)
    return [torch.randn(8, 6, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2)]


def by_hand(student, teacher, norm):
    similarities = []
    for tap in (student, teacher):
        rows = tap.numpy().reshape(len(tap), -1)
        products = rows @ rows.T
        similarities.append(products / np.linalg.norm(products, ord=norm, axis=1, keepdims=True))
    return np.sum((similarities[1] - similarities[0]) ** 2) / len(student) ** 2


def test_it_is_a_point():
    check_point(SimilarityPreserving())


def test_the_value_that_implementations_agree_on(drawn):
    student, teacher = drawn
    assert similarity_preserving_loss(*drawn).item() == pytest.approx(0.0151447146, abs=1e-9)
    found = SimilarityPreserving(tap="map")({"map": student}, {"map": teacher}, {})
    assert found.item() == pytest.approx(0.0151447146, abs=1e-9)


def test_rows_are_scaled_to_l2_length_not_l1(drawn):
    assert similarity_preserving_loss(*drawn).item() == pytest.approx(by_hand(*drawn, norm=2), rel=1e-12)
    assert by_hand(*drawn, norm=1) == pytest.approx(0.00757, abs=5e-6)  # the known slip


def test_a_value_done_by_hand():
    student, teacher = torch.eye(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    expected = 2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 4
    assert similarity_preserving_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
