"""Taps and points under DistributedDataParallel, which wraps the distiller: two processes on this machine."""

import gc
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kdlib
from kdlib.points import HiddenCosine, Rkd

POINTS = {
    "logits alone": lambda: {"soft": kdlib.SoftLabels.hinton(4.0)},
    "a hidden layer alone": lambda: {"hidden": HiddenCosine()},
    "both, and hard labels": lambda: {"hidden": (0.5, HiddenCosine()), "hard": kdlib.HardLabels(), "rkd": Rkd()},
}


def network(seed):
    torch.manual_seed(seed)
    return kdlib.Tapped(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), logits="", embedding="1")


def distiller_of(points):
    return kdlib.Distiller(network(0), kdlib.SameInput(kdlib.freeze(network(1))), **POINTS[points]())


def batch_of(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {"x": torch.randn(6, 4, generator=generator), "y": torch.randint(3, (6,), generator=generator)}


def work(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        queue.put((rank, {points: trained(rank, points) for points in POINTS}))
    finally:
        # The wrapper is part of a reference cycle. One that lives on to the end of the interpreter holds gloo's
        # threads, and torch then aborts the process every few runs.
        gc.collect()
        dist.destroy_process_group()


def trained(rank, points):
    distiller = distiller_of(points)
    unused = "hidden" in points and "both" not in points  # the output layer gets no gradient
    wrapped = DistributedDataParallel(distiller, find_unused_parameters=unused)
    optimizer = distiller.attach(torch.optim.SGD(distiller.parameters(), lr=0.1))
    for step in range(5):
        optimizer.zero_grad()
        wrapped(batch_of(rank, step)).total.backward()
        optimizer.step()
    return int(distiller.step), [parameter.detach().numpy() for parameter in distiller.parameters()]


def by_hand(points):
    """The same training in one process: the mean of the two ranks' gradients."""
    distiller = distiller_of(points)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        for rank in range(2):
            (distiller(batch_of(rank, step)).total / 2).backward()
        optimizer.step()
    return [parameter.detach() for parameter in distiller.parameters()]


@pytest.fixture(scope="module")
def ranks():
    """What two processes found, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(work, args=(port, queue), nprocs=2)
    return dict(queue.get() for _ in range(2))


@pytest.mark.parametrize("points", POINTS)
def test_ddp_around_the_distiller_equals_the_mean_of_the_ranks_gradients(ranks, points):
    (steps, first), (others, second) = ranks[0][points], ranks[1][points]
    assert steps == others == 5
    for mine, other, wanted in zip(first, second, by_hand(points), strict=True):
        assert (mine == other).all()
        torch.testing.assert_close(torch.from_numpy(mine), wanted, rtol=1e-6, atol=1e-7)
