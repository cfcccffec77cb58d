"""ListMLE against the Plackett-Luce probability, counted out."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import kdlib
from kdlib.points.ranking import Ranking, list_mle
from kdlib.testing import check_point


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plackett_luce(scores, order):
    """Return the probability of drawing items in an order, one by one, in proportion to exp(score)."""
    left, probability = list(order), 1.0
    for item in order:
        probability *= math.exp(scores[item]) / sum(math.exp(scores[other]) for other in left)
        left.remove(item)
    return probability


def test_it_is_a_point():
    check_point(Ranking())
    check_point(Ranking(top=3))


def test_it_is_minus_the_log_of_the_plackett_luce_probability():
    student, teacher = noise(6, 5), noise(6, 5, seed=1)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        expected -= math.log(plackett_luce(s, sorted(range(5), key=lambda k: -t[k]))) / 6
    assert list_mle(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_the_probabilities_of_all_rankings_add_up_to_1():
    student = noise(1, 4)
    rankings = [torch.tensor([[float(place) for place in order]]) for order in itertools.permutations(range(4))]
    total = sum(math.exp(-list_mle(student, ranking).item()) for ranking in rankings)
    assert total == pytest.approx(1, rel=1e-12)


def test_of_the_teacher_only_the_order_matters():
    student, teacher = noise(6, 5), noise(6, 5, seed=1)
    assert torch.equal(list_mle(student, teacher), list_mle(student, teacher.exp() * 7 - 2))
    torch.testing.assert_close(list_mle(student + 3, teacher), list_mle(student, teacher), rtol=1e-12, atol=0)


def test_the_first_place_alone_is_cross_entropy_with_the_teachers_class():
    student, teacher = noise(6, 5), noise(6, 5, seed=1)
    expected = cross_entropy(student, teacher.argmax(-1))
    torch.testing.assert_close(list_mle(student, teacher, top=1), expected, rtol=1e-12, atol=0)


def test_more_places_cost_more_and_the_last_nothing():
    student, teacher = noise(6, 5), noise(6, 5, seed=1)
    costs = [list_mle(student, teacher, top=top).item() for top in range(1, 6)]
    assert costs[0] < costs[1] < costs[2] < costs[3] == costs[4]
    assert costs[4] == list_mle(student, teacher).item() == list_mle(student, teacher, top=99).item()


def test_the_lower_class_number_breaks_a_tie():
    student = noise(3, 200)  # an unstable sort shows from some dozens on
    flat = torch.zeros(3, 200)
    falling = -torch.arange(200.0).expand(3, 200)
    assert torch.equal(list_mle(student, flat), list_mle(student, falling))


def test_a_right_ranking_costs_less_than_a_wrong_one():
    ranked = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert list_mle(10 * ranked, ranked) < 1e-3 < list_mle(-10 * ranked, ranked)


def test_no_place_is_refused():
    with pytest.raises(kdlib.KdlibError, match="at least 1"):
        list_mle(noise(2, 3), noise(2, 3), top=0)
