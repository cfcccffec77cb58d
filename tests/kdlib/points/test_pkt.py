"""Probabilistic knowledge transfer against loops, and a value on which implementations agree."""

import math

import numpy as np
import pytest
import torch

import kdlib
from kdlib.points.pkt import Pkt, pkt_loss
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


def by_hand(student, teacher, variant):
    total, n = 0.0, len(student)

    def kernel(rows, i, j):
        cosine = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
        return (cosine + 1) / 2

    for i in range(n):
        near = [j for j in range(n) if variant == "code" or j != i]
        p, q = ([kernel(rows.numpy(), i, j) for j in near] for rows in (teacher, student))
        total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return total / n**2 if variant == "code" else total


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_it_is_a_point(variant):
    check_point(Pkt(variant=variant))


def test_the_value_that_implementations_agree_on(drawn):
    student, teacher = drawn
    assert pkt_loss(student, teacher).item() == pytest.approx(0.0009353041, abs=1e-9)
    assert Pkt()({"embedding": student}, {"embedding": teacher}, {}).item() == pytest.approx(0.0009353041, abs=1e-9)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_closed_form(variant):
    student, teacher = noise(6, 3), noise(6, 4, seed=1)
    found = pkt_loss(student, teacher, variant=variant)
    assert found.item() == pytest.approx(by_hand(student, teacher, variant), rel=1e-5)  # 1e-7 inside the logarithm


def test_two_rows_of_the_paper_have_one_neighbour_each():
    assert pkt_loss(noise(2, 3), noise(2, 4, seed=1), variant="paper").item() == pytest.approx(0, abs=1e-12)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # no neighbour at all
    assert pkt_loss(opposite, noise(2, 4), variant="paper").isfinite()


def test_an_unknown_variant_is_refused():
    with pytest.raises(kdlib.KdlibError, match="variant"):
        pkt_loss(noise(3, 2), noise(3, 2), variant="")
