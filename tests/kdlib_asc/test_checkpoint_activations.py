"""Activations computed again in the backward: the same training, and what is kept meanwhile."""

import gc

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import kdlib
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN

CLIP = {WaveCNN: (4, 2, 26244), SpectrogramCNNGRU: (4, 2, 25, 16)}
NETWORKS = list(CLIP)
ROWS = {WaveCNN: 8, SpectrogramCNNGRU: 5}


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(network, checkpoint_activations, **settings):
    torch.manual_seed(0)
    return network(classes=3, width=0.1, checkpoint_activations=checkpoint_activations, **settings)


def batch_of(network, step):
    return {"x": noise(step, *CLIP[network]), "y": torch.tensor([0, 1, 2, 0])}


def trained(network, distiller, wrapped=None, bf16=False):
    """State and losses after three steps."""
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-3)
    losses = []
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = (wrapped or distiller)(batch_of(network, step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return distiller.state_dict(), losses


def of_hard_labels(network, checkpoint_activations):
    return kdlib.Distiller(build(network, checkpoint_activations), hard=kdlib.HardLabels())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_three_steps_leave_parameters_and_running_statistics_of_the_plain_run(network, bf16):
    plain, losses = trained(network, of_hard_labels(network, False), bf16=bf16)
    again, same = trained(network, of_hard_labels(network, True), bf16=bf16)
    assert losses == same
    assert again["student.res3.norm1.num_batches_tracked"] == 3
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_buffers_are_the_same_objects_after_the_backward(network):
    model = build(network, True)
    before = {name: id(buffer) for name, buffer in model.named_buffers()}
    model(batch_of(network, 0)["x"])["logits"].sum().backward()
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == before


@pytest.mark.parametrize("network", NETWORKS)
def test_taps_inside_of_a_row_train_as_in_the_plain_run(network):
    def distiller(checkpoint_activations):
        student = build(network, checkpoint_activations)
        teacher = kdlib.freeze(kdlib.Tapped(build(network, False), embedding="res2.norm2"))
        tapped = kdlib.Tapped(student, embedding="res2.norm2", logits="logits")
        return kdlib.Distiller(tapped, kdlib.SameInput(teacher), hidden=kdlib.points.FitNet(), hard=kdlib.HardLabels())

    found = [trained(network, distiller(again).prepare(batch_of(network, 0))) for again in (False, True)]
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # the wrapper is part of a reference cycle and holds gloo's threads
    dist.destroy_process_group()


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_under_ddp_three_steps_are_those_of_the_plain_run(network, unused, group):
    plain, _ = trained(network, of_hard_labels(network, False))
    distiller = of_hard_labels(network, True)
    again, _ = trained(network, distiller, DistributedDataParallel(distiller, find_unused_parameters=unused))
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_inside_of_the_rows_nothing_is_kept_for_the_backward(network):
    def kept(checkpoint_activations):
        """Bytes of the activations that the backward holds, each once."""
        model = build(network, checkpoint_activations)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            taps = model(batch_of(network, 0)["x"])
        return sum(sizes.values()), taps

    (plain, _), (again, _) = kept(False), kept(True)
    assert again < plain / 3


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
def test_without_gradients_each_row_runs_once(network):
    model, rows = build(network, True), []
    for name, row in model.named_children():
        row.register_forward_hook(lambda *_, name=name: rows.append(name))
    model(batch_of(network, 0)["x"])
    assert len(rows) == len(set(rows)) >= ROWS[network]
