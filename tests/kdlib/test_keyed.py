"""Randomness as a function of a key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdlib
from kdlib.keyed import keyed_seed

PART = st.one_of(st.integers(-(2**63), 2**63), st.text(max_size=8))
KEY = st.lists(PART, max_size=4)


def draw(generator):
    return torch.rand(4, generator=generator)


@settings(database=None, max_examples=60, deadline=None)
@given(st.integers(-(2**40), 2**40), KEY)
def test_the_same_key_gives_the_same_draws(seed, key):
    assert torch.equal(draw(kdlib.keyed(seed, *key)), draw(kdlib.keyed(seed, *key)))


@settings(database=None, max_examples=60, deadline=None)
@given(st.integers(-(2**40), 2**40), KEY)
def test_a_seed_has_63_bits(seed, key):
    assert 0 <= keyed_seed(seed, *key) < 2**63


@settings(database=None, max_examples=100, deadline=None)
@given(KEY, KEY)
def test_different_keys_give_different_seeds(one, other):
    assert (keyed_seed(0, *one) == keyed_seed(0, *other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 1, 2), (0, 2, 1)),
        ((0, 1, 23), (0, 12, 3)),
        ((0, "1"), (0, 1)),
        ((0, "a", "b"), (0, "ab")),
        ((0, "a, 'b"), (0, "a", "b")),
        ((0,), (1,)),
        ((0,), (0, 0)),
        ((1, "order"), (-1, "order")),
    ],
)
def test_order_grouping_type_and_sign_matter(one, other):
    assert not torch.equal(draw(kdlib.keyed(*one)), draw(kdlib.keyed(*other)))


def test_neighbouring_keys_are_not_correlated():
    rows = torch.stack([torch.randn(2000, generator=kdlib.keyed(0, 0, index, "noise")) for index in range(4)])
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert correlation.abs().max() < 0.1


def test_the_seed_of_a_key_is_the_same_in_every_process_and_release():
    assert kdlib.keyed(3, 1, "order").initial_seed() == 2255845102849848899


def test_the_global_state_is_neither_used_nor_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = draw(kdlib.keyed(0, 5, "order"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draw(kdlib.keyed(0, 5, "order")), one)


def test_each_call_makes_a_generator_of_its_own():
    first, second = kdlib.keyed(0), kdlib.keyed(0)
    draw(first)
    assert torch.equal(draw(second), draw(kdlib.keyed(0)))
