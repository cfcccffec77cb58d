"""The source in which the teacher sees what the student sees."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import kdlib


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Difference(nn.Module):
    def forward(self, left, right):
        return {"logits": left - right}


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def test_the_taps_are_the_teachers_for_x():
    net = nn.Linear(4, 3)
    source = kdlib.SameInput(kdlib.freeze(kdlib.Tapped(net, logits="")))
    x = torch.randn(5, 4)
    taps = source({"x": x, "y": None})
    assert torch.equal(taps["logits"], x @ net.weight.T + net.bias)
    assert not taps["logits"].requires_grad


@pytest.mark.parametrize("make", [lambda a, b: (a, b), lambda a, b: {"right": b, "left": a}, Pair])
def test_x_may_be_a_tuple_a_mapping_or_a_named_tuple(make):
    source = kdlib.SameInput(kdlib.freeze(Difference()))
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(source({"x": make(a, b)})["logits"], a - b)


def test_any_function_is_a_teacher():
    source = kdlib.SameInput(lambda x: {"logits": 2 * x})
    assert torch.equal(source({"x": torch.ones(2)})["logits"], torch.full((2,), 2.0))


def test_a_teacher_that_is_not_frozen_is_refused_and_says_how():
    with pytest.raises(kdlib.TapError, match=r"Tapped.*kdlib\.freeze"):
        kdlib.SameInput(kdlib.Tapped(nn.Linear(4, 3), logits=""))


def test_a_teacher_that_returns_a_bare_tensor_says_how_to_name_it():
    source = kdlib.SameInput(kdlib.freeze(nn.Linear(4, 3)))
    with pytest.raises(kdlib.TapError, match=r"teacher returned a Tensor.*Tapped"):
        source({"x": torch.zeros(2, 4)})
