"""The source in which the teacher sees another key of the batch."""

import pytest
import torch
from torch import nn

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.settings import read_signature
from kdlib.sources.different_view import DifferentView
from kdlib.testing import check_source


class Difference(nn.Module):
    def forward(self, left, right):
        return {"logits": left - right}


def test_the_taps_are_the_teachers_for_its_own_view():
    net = nn.Linear(4, 3)
    source = DifferentView(kdlib.freeze(kdlib.Tapped(net, logits="")), key="long")
    x, long = torch.randn(5, 4), torch.randn(5, 4)
    taps = source({"x": x, "long": long})
    assert torch.equal(taps["logits"], long @ net.weight.T + net.bias)
    assert not taps["logits"].requires_grad


@pytest.mark.parametrize("make", [lambda a, b: (a, b), lambda a, b: {"right": b, "left": a}])
def test_a_view_may_be_a_tuple_or_a_mapping(make):
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    taps = DifferentView(kdlib.freeze(Difference()))({"x": None, "teacher_x": make(a, b)})
    assert torch.equal(taps["logits"], a - b)


def test_a_batch_without_the_view_names_source_and_key():
    source = DifferentView(lambda x: {"logits": x}, key="clean")
    one = kdlib.Distiller(kdlib.Tapped(nn.Linear(4, 3), logits=""), source, soft=kdlib.SoftLabels())
    with pytest.raises(kdlib.BatchError, match=r"(?i)source \(DifferentView\).*no 'clean'"):
        one({"x": torch.zeros(2, 4)})


def test_a_teacher_that_is_not_frozen_is_refused_and_says_how():
    with pytest.raises(kdlib.TapError, match=r"kdlib\.freeze"):
        DifferentView(nn.Linear(4, 3))


def test_it_is_a_source_with_a_schema():
    source = DifferentView(kdlib.freeze(DigitsMLP(width=4)))
    check_source(source, {"x": torch.zeros(6, 64), "teacher_x": torch.rand(6, 64)})
    live, schema = read_signature("source", "different_view", DifferentView)
    assert (live, schema().model_dump()) == (("teacher",), {"key": "teacher_x"})


class Noisy:
    """Digits whose student sees noise and whose teacher does not."""

    def __init__(self, part):
        self.part = part
        self.labels, self.groups, self.ids = part.labels, part.groups, part.ids

    def __len__(self):
        return len(self.part)

    def __getitem__(self, key):
        item = self.part[key]
        noise = torch.randn(64, generator=kdlib.keyed(0, *key))
        return {**item, "x": item["x"] + 0.1 * noise, "teacher_x": item["x"]}


def test_two_epochs_of_fit_on_digits():
    part, seen = Noisy(digits(train=60).train), []
    teacher = kdlib.freeze(DigitsMLP(width=16))
    source = DifferentView(lambda x: seen.append(x) or teacher(x))
    one = kdlib.Distiller(DigitsMLP(width=8), source, soft=kdlib.SoftLabels(), hard=kdlib.HardLabels())
    history = kdlib.fit(one, part, epochs=2, batch=20, progress=False)
    assert history.epochs[1]["hard"] < history.epochs[0]["hard"]
    clean = torch.stack([part.part[0, index]["x"] for index in range(60)])
    assert all((view[:, None] == clean[None]).all(-1).any(1).all() for view in seen)
