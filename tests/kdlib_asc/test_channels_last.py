"""The raw network's layers against torch's Conv1d, BatchNorm1d and MaxPool1d with the same weights."""

import copy

import pytest
import torch
from torch import nn

import kdlib
from kdlib_asc.backbones import WaveCNN
from kdlib_asc.backbones._channels_last import Conv, Norm, Pool, Windows

OURS = (Conv, Norm, Pool, Windows)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    return WaveCNN(classes=10, width=0.25)


def plain(network):
    """The same network of torch's own layers."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, OURS):
            module.__class__ = type(module).__base__
    return network


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_training_gives_the_outputs_and_statistics_of_torchs_layers_and_in_float64_their_gradients(dtype, close):
    ours = build().to(dtype)
    theirs = plain(ours)
    assert {type(module) for module in theirs.modules()} >= {nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d}
    for step in (1, 2):
        taps, wanted = (network(step * noise(3, 2, 2 * 26244 + 7).to(dtype)) for network in (ours, theirs))
        torch.testing.assert_close(taps, wanted, rtol=close, atol=close)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=close, atol=close)
    assert ours.res3.norm2.num_batches_tracked == 2
    if dtype == torch.float64:  # a bias before a batch norm has none, and in float32 that is noise
        for network, given in ((ours, taps), (theirs, wanted)):
            (given["logits"].square().sum() + given["embedding"].sum()).backward()
            assert network.conv1[0].weight.grad.norm() > 1
        found, expected = ({name: one.grad for name, one in network.named_parameters()} for network in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("samples", [26244, 2 * 26244 + 11])
def test_weights_load_both_ways_and_give_the_same_outputs_in_eval_mode(samples):
    ours = build()
    for module in ours.modules():
        if isinstance(module, Norm):
            module.running_mean.copy_(noise(module.num_features))
            module.running_var.copy_(noise(module.num_features).abs() + 0.5)
    theirs = plain(build())
    theirs.load_state_dict(ours.state_dict())
    again = build()
    again.load_state_dict(theirs.state_dict())
    x = noise(2, 2, samples)
    wanted = theirs.eval()(x)
    torch.testing.assert_close(ours.eval()(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.eval()(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_every_row_keeps_the_channels_of_a_step_side_by_side(bf16):
    network, layouts = build(), {}
    for name, module in network.named_modules():
        if isinstance(module, (*OURS, nn.LeakyReLU)):
            module.register_forward_hook(lambda _module, _inputs, output, name=name: layouts.update({name: output}))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        network(noise(2, 2, 3 * 26244))
    assert {name for name, output in layouts.items() if output.stride(1) != 1} == set()
    assert layouts["res7.pool"].shape == (2, 32, 3)
    assert layouts["res7.conv2"].dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_statistics_without_momentum_are_means_over_the_batches():
    ours, theirs = Norm(4, momentum=None), nn.BatchNorm1d(4, momentum=None)
    for step in (1, 2, 3):
        torch.testing.assert_close(ours(step + noise(3, 4, 5)), theirs(step + noise(3, 4, 5)))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_norm_of_a_long_batch_is_that_in_float64_to_six_digits_with_its_gradients():
    ours, theirs = Norm(8), nn.BatchNorm1d(8).double()
    with torch.no_grad():
        ours.weight.copy_(0.5 + noise(8).abs())
    theirs.load_state_dict(ours.state_dict())
    x = (3 + noise(8, 40_000, 8)).transpose(1, 2).requires_grad_()
    wide = x.detach().double().requires_grad_()
    found, wanted = ours(x), theirs(wide)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-6)
    slope = noise(8, 40_000, 8).flip(1).transpose(1, 2)
    found.backward(slope)
    wanted.backward(slope.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=3e-6)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-2)  # of sums of 320,000
    torch.testing.assert_close(ours.state_dict(), theirs.float().state_dict(), rtol=1e-6, atol=1e-6)


def test_norm_of_one_step_is_refused_in_training():
    with pytest.raises(kdlib.BatchError, match="more than one step"):
        Norm(4)(noise(1, 4, 1))


@torch.no_grad()
@pytest.mark.parametrize("samples", [12, 23, 24, 40])
def test_windows_leave_out_what_fills_none(samples):
    ours = Windows(2, 5, 12, stride=12)
    theirs = nn.Conv1d(2, 5, 12, stride=12)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(noise(3, 2, samples)), theirs(noise(3, 2, samples)))


@torch.no_grad()
def test_bf16_is_near_fp32():
    network, x = build().eval(), noise(4, 2, 2 * 26244)
    wanted = network(x)["embedding"]
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x)["embedding"].float()
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.02
