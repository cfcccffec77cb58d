"""DistributedDataParallel around a distiller: what it has to be told, and what two processes of this machine train."""

import os

import pytest
import torch
from torch import nn

import kdlib
from kdlib import ranks
from kdlib.points import FitNet, HiddenCosine, Rkd

POINTS = {
    "logits alone": lambda: {"soft": kdlib.SoftLabels.hinton(4.0)},
    "a hidden layer alone": lambda: {"hidden": HiddenCosine()},
    "both, and hard labels": lambda: {"hidden": (0.5, HiddenCosine()), "hard": kdlib.HardLabels(), "rkd": Rkd()},
}
SIZES = [5, 3]
"""Rows of the two ranks."""


def network(seed, width=8):
    torch.manual_seed(seed)
    return kdlib.Tapped(nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)), logits="", embedding="1")


def distiller_of(points):
    return kdlib.Distiller(network(0), kdlib.SameInput(kdlib.freeze(network(1))), **points)


def batch_of(step):
    rows = sum(SIZES)
    generator = torch.Generator().manual_seed(step)
    return {
        "x": torch.randn(rows, 4, generator=generator),
        "y": torch.randint(3, (rows,), generator=generator),
        "index": torch.arange(rows),
        "epoch": torch.zeros(rows, dtype=torch.int64),
    }


def shard_of(step):
    return {name: values.split(SIZES)[ranks.rank()] for name, values in batch_of(step).items()}


def weights_of(module):
    return {name: value.tolist() for name, value in module.state_dict().items()}


def trained(points, weighted):
    """Train with uneven shards: each rank's loss as it is, or by its share of the rows."""
    distiller = distiller_of(points)
    wrapped = kdlib.ddp(distiller, shard_of(0))
    optimizer = distiller.attach(torch.optim.SGD(distiller.parameters(), lr=0.1, weight_decay=0.1))
    for step in range(5):
        optimizer.zero_grad()
        shard = shard_of(step)
        share = ranks.world() * len(shard["y"]) / sum(SIZES) if weighted else 1
        (share * wrapped(shard).total).backward()
        optimizer.step()
    return wrapped.find_unused_parameters, weights_of(distiller)


def told(points, batch=None):
    """Say what DDP is told, with whether looking for it changed anything."""
    torch.manual_seed(5)
    net = kdlib.Tapped(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)), logits="", embedding="1"
    )
    distiller = kdlib.Distiller(net, kdlib.SameInput(kdlib.freeze(network(1))), **points).eval()
    for parameter in distiller.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, state = weights_of(distiller), torch.get_rng_state()
    batch = shard_of(0) if batch is None else batch
    wrapped = kdlib.ddp(distiller, batch)
    assert weights_of(distiller) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(part.training for part in distiller.modules())
    assert all((parameter.grad == 7).all() for parameter in distiller.parameters())
    return wrapped.find_unused_parameters


def projected():
    """Return a projector's weights from ranks that draw different ones."""
    student = network(0, width=6)
    torch.manual_seed(100 + ranks.rank())
    distiller = kdlib.Distiller(student, kdlib.SameInput(kdlib.freeze(network(1))), hidden=FitNet(tap="embedding"))
    wrapped = kdlib.ddp(distiller, shard_of(0))
    wrapped(shard_of(0)).total.backward()
    return weights_of(distiller.projectors), [p.grad.tolist() for p in distiller.projectors.parameters()]


class SometimesHidden:
    """Compares the logits on rank 0 alone."""

    def __call__(self, student, teacher, batch):
        return student["embedding" if ranks.rank() else "logits"].square().mean()


def work(environment, say):
    os.environ |= environment
    torch.set_num_threads(1)
    ramp = kdlib.Schedule(kind="linear", start=1.0, end=0.0, epochs=3)
    with ranks.group():
        say(
            {
                "mean": {name: trained(points(), weighted=False) for name, points in POINTS.items()},
                "weighted": {name: trained(points(), weighted=True) for name, points in list(POINTS.items())[:2]},
                "told": {
                    "all are reached": told({"soft": kdlib.SoftLabels()}),
                    "a schedule": told({"soft": (ramp, kdlib.SoftLabels()), "hard": kdlib.HardLabels()}),
                    "one rank only": told({"some": SometimesHidden()}),
                },
                "projected": projected(),
            }
        )


@pytest.fixture(scope="module")
def found(launch):
    return launch(work, 2)


def by_hand(points, gradients_of):
    distiller = distiller_of(points)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(5):
        optimizer.zero_grad()
        gradients_of(distiller, batch_of(step))
        optimizer.step()
    return distiller.state_dict()


def mean_of_ranks(distiller, batch):
    shards = [{name: values.split(SIZES)[rank] for name, values in batch.items()} for rank in range(2)]
    for shard in shards:
        (distiller(shard).total / 2).backward()


def one_batch(distiller, batch):
    distiller(batch).total.backward()


@pytest.mark.parametrize("points", POINTS)
def test_gradients_are_the_mean_of_the_ranks(found, points):
    (unused, first), (_, second) = (one["mean"][points] for one in found)
    assert unused == (points == "a hidden layer alone")  # the output layer gets no gradient
    assert first == second
    for name, wanted in by_hand(POINTS[points](), mean_of_ranks).items():
        if name != "step":
            torch.testing.assert_close(torch.tensor(first[name]), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("points", list(POINTS)[:2])
def test_losses_weighted_by_uneven_shards_give_the_gradient_of_the_whole_batch(found, points):
    (_, first), (_, second) = (one["weighted"][points] for one in found)
    assert first == second
    for name, wanted in by_hand(POINTS[points](), one_batch).items():
        if name != "step":
            torch.testing.assert_close(torch.tensor(first[name]), wanted, rtol=1e-6, atol=1e-7)


def test_a_layer_that_no_point_reaches_is_as_it_was_under_weight_decay(found):
    before = distiller_of(POINTS["a hidden layer alone"]()).state_dict()
    _, after = found[0]["mean"]["a hidden layer alone"]
    assert torch.equal(torch.tensor(after["student.model.2.weight"]), before["student.model.2.weight"])
    assert not torch.equal(torch.tensor(after["student.model.0.weight"]), before["student.model.0.weight"])


def test_it_is_told_of_parameters_that_are_not_reached_now_later_or_on_one_rank(found):
    for one in found:
        assert one["told"] == {"all are reached": False, "a schedule": True, "one rank only": True}


def test_projectors_are_made_before_and_are_the_same_on_all_ranks(found):
    (first, gradients), (second, others) = (one["projected"] for one in found)
    assert first
    assert first == second
    assert gradients == others
    assert any(any(map(any, gradient)) for gradient in gradients if isinstance(gradient[0], list))


def test_a_static_graph_is_refused_with_the_reason():
    with pytest.raises(kdlib.TrainingError, match=r"static_graph is refused: .* part without an error"):
        kdlib.ddp(distiller_of(POINTS["logits alone"]()), batch_of(0), static_graph=True)


def test_without_a_process_group_the_error_says_how_to_get_one():
    with pytest.raises(kdlib.TrainingError, match=r"no process group: .*torchrun"):
        kdlib.ddp(distiller_of(POINTS["logits alone"]()), batch_of(0))
