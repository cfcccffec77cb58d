"""Mutual learning (Zhang et al. 2018) is no source: it is a module of two distillers that runs both students once."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

import kdlib
from kdlib.digits import DigitsMLP, digits


class Mutual(nn.Module):
    """Two students that learn from the labels and from each other."""

    def __init__(self, one, other, **points):
        super().__init__()
        points = points or {"hard": kdlib.HardLabels(), "soft": kdlib.SoftLabels(form="kl")}
        self.one = kdlib.Distiller(one, **points)
        self.other = kdlib.Distiller(other, **points)  # points without parameters may be shared

    def forward(self, batch):
        taps = [distiller.student(batch["x"]) for distiller in (self.one, self.other)]
        seen = [{name: tap.detach() for name, tap in own.items()} for own in taps]
        return self.one.losses(taps[0], seen[1], batch), self.other.losses(taps[1], seen[0], batch)

    def advance(self):
        self.one.advance()
        self.other.advance()


@pytest.fixture
def mutual():
    torch.manual_seed(0)
    return Mutual(DigitsMLP(width=8), DigitsMLP(width=12))


@pytest.fixture(scope="module")
def batch():
    return next(iter(kdlib.Loader(digits(train=100).train, batch=40)))


def total(losses):
    return sum(loss.total for loss in losses)


def test_each_students_loss_is_the_papers(mutual, batch):
    z = [distiller.student(batch["x"])["logits"] for distiller in (mutual.one, mutual.other)]
    for own, other, losses in ((z[0], z[1], mutual(batch)[0]), (z[1], z[0], mutual(batch)[1])):
        divergence = kl_div(own.log_softmax(-1), other.log_softmax(-1), reduction="batchmean", log_target=True)
        torch.testing.assert_close(losses.total, cross_entropy(own, batch["y"]) + divergence)
        assert set(losses.terms) == {"hard", "soft"}


def test_both_students_run_once_a_step(mutual, batch):
    runs = []
    for distiller in (mutual.one, mutual.other):
        distiller.student.register_forward_hook(lambda module, *_: runs.append(module))
    mutual(batch)
    assert runs == [mutual.one.student, mutual.other.student]


def test_the_gradient_of_a_student_is_that_of_its_own_loss(mutual, batch):
    total(mutual(batch)).backward()
    found = [parameter.grad.clone() for parameter in mutual.one.parameters()]
    expected = torch.autograd.grad(mutual(batch)[0].total, list(mutual.one.parameters()))
    torch.testing.assert_close(found, list(expected))
    crossed = torch.autograd.grad(mutual(batch)[1].total, list(mutual.one.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in crossed)


def trained(mutual, batch, steps=80):
    """Train both students by one optimizer and return their losses before and after."""
    optimizer, first = torch.optim.Adam(mutual.parameters(), lr=1e-2), mutual(batch)
    assert len(optimizer.param_groups[0]["params"]) == 8
    for _ in range(steps):
        optimizer.zero_grad()
        total(mutual(batch)).backward()
        optimizer.step()
        mutual.advance()
    assert int(mutual.one.step) == int(mutual.other.step) == steps
    return zip(first, mutual(batch), strict=True)


def test_one_optimizer_trains_both(mutual, batch):
    for before, after in trained(mutual, batch):
        assert after.terms["hard"] < 0.8 * before.terms["hard"]


def test_without_labels_they_come_to_agree(batch):
    torch.manual_seed(0)
    students = Mutual(DigitsMLP(width=8), DigitsMLP(width=12), soft=kdlib.SoftLabels(form="kl"))
    for before, after in trained(students, batch):
        assert after.terms["soft"] < 0.1 * before.terms["soft"]


def test_its_state_survives_a_round_trip(mutual, batch):
    mutual.advance()
    torch.manual_seed(1)
    other = Mutual(DigitsMLP(width=8), DigitsMLP(width=12))
    other.load_state_dict(mutual.state_dict())
    torch.testing.assert_close(total(other(batch)), total(mutual(batch)), rtol=0, atol=0)
    assert int(other.one.step) == 1
