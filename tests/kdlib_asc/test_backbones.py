"""The networks against Tables 2 and 3, and against plain formulas."""

import inspect
from typing import get_type_hints

import pytest
import torch
from pydantic import ValidationError, create_model
from torch.nn.functional import batch_norm, conv1d, conv2d, leaky_relu, linear, max_pool1d

from kdlib import BatchError, KdlibError
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN

NETWORKS = [WaveCNN, SpectrogramCNNGRU]
CLIP = {WaveCNN: (2, 2, 2 * 26244), SpectrogramCNNGRU: (2, 2, 25, 32)}


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def build(network, **settings):
    torch.manual_seed(0)
    return network(**{"classes": 10, "width": 0.25, **settings}).eval()


@torch.no_grad()
def rows(network, x):
    """The output shape of every named row, without the batch."""
    shapes = {}

    def record(name):
        def hook(_module, _inputs, output):
            shapes[name] = tuple((output[0] if isinstance(output, tuple) else output).shape[1:])

        return hook

    for name, module in network.named_children():
        module.register_forward_hook(record(name))
    frames = network.encode(x)
    shapes["encode"] = tuple(frames.shape[1:])
    network.head(frames)
    return shapes


def test_wave_rows_are_those_of_table_2():
    assert rows(build(WaveCNN, width=1.0), noise(1, 2, 479999)) == {
        "conv1": (64, 39999),
        "res1": (64, 13333),
        "res2": (128, 4444),
        "res3": (128, 1481),
        "res4": (128, 493),
        "res5": (128, 164),
        "res6": (128, 54),
        "res7": (128, 18),
        "encode": (18, 128),
        "dense1": (64,),
        "output": (10,),
    }


def test_spectrogram_rows_are_those_of_table_3():
    network = build(SpectrogramCNNGRU, width=1.0)
    assert rows(network, noise(1, 2, 249, 256)) == {
        "conv1": (30, 249, 256),
        "res1": (30, 249, 256),
        "res2": (60, 125, 128),
        "res3": (120, 63, 64),
        "res4": (240, 21, 22),
        "encode": (21, 480),
        "gru_layer": (21, 480),
        "dense1": (64,),
        "output": (10,),
    }


@pytest.mark.parametrize(("network", "count"), [(WaveCNN, 613_770), (SpectrogramCNNGRU, 2_497_464)])
def test_parameter_count_at_width_1_stereo_ten_classes(network, count):
    assert sum(parameter.numel() for parameter in network(classes=10).parameters()) == count


def reference_block(block, x, conv, stride=1, pool=None):
    """A residual block as the specification words it, in evaluation mode."""

    def norm(layer, y):
        return batch_norm(y, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=1e-5)

    y = conv(x, block.conv1.weight, block.conv1.bias, stride=stride, padding=1)
    y = leaky_relu(norm(block.norm1, y), 0.3)
    y = norm(block.norm2, conv(y, block.conv2.weight, block.conv2.bias, padding=1))
    if block.conv1.in_channels != block.conv1.out_channels or stride > 1:
        x = conv(x, block.shortcut.weight, block.shortcut.bias, stride=stride)
    y = leaky_relu(y + x, 0.3)
    return y if pool is None else pool(y)


def shake_norms(network):
    """Give batch norm statistics and weights that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("row", ["res1", "res2", "res7"])
def test_wave_block_equals_the_formula_with_the_pool_last(row):
    network = build(WaveCNN)
    shake_norms(network)
    block = getattr(network, row)
    x = noise(2, block.conv1.in_channels, 50)
    assert torch.equal(block(x), reference_block(block, x, conv1d, pool=lambda y: max_pool1d(y, 3)))


@torch.no_grad()
@pytest.mark.parametrize(("row", "stride"), [("res1", 1), ("res2", 2), ("res3", 2), ("res4", 3)])
def test_spectrogram_block_equals_the_formula(row, stride):
    network = build(SpectrogramCNNGRU)
    shake_norms(network)
    block = getattr(network, row)
    x = noise(2, block.conv1.in_channels, 13, 11)
    torch.testing.assert_close(block(x), reference_block(block, x, conv2d, stride=stride))


@torch.no_grad()
def test_spectrogram_block_of_equal_channels_and_a_stride_still_has_a_shortcut_convolution():
    network = build(SpectrogramCNNGRU, width=0.01)  # every row has 4 channels
    assert network.res2.conv1.in_channels == network.res2.conv1.out_channels == 4
    assert network(noise(1, 2, 25, 32))["embedding"].shape == (1, 64)


@torch.no_grad()
def test_wave_head_is_the_maximum_over_time_then_linear_layers():
    network, frames = build(WaveCNN), noise(3, 5, 32)
    taps = network.head(frames)
    embedding = linear(frames.max(dim=1).values, network.dense1.weight, network.dense1.bias)
    torch.testing.assert_close(taps["embedding"], embedding)
    torch.testing.assert_close(taps["logits"], linear(embedding, network.output.weight, network.output.bias))


@torch.no_grad()
def test_spectrogram_head_takes_the_last_step_of_the_gru():
    network, frames = build(SpectrogramCNNGRU), noise(3, 5, 120)
    steps, _ = network.gru_layer(frames)
    torch.testing.assert_close(network.head(frames)["embedding"], network.dense1(steps[:, -1]))


@torch.no_grad()
def test_spectrogram_frames_are_mean_then_maximum_over_frequency():
    network = build(SpectrogramCNNGRU)
    seen = []
    network.res4.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    frames = network.encode(noise(2, 2, 25, 37))
    torch.testing.assert_close(frames[..., :60], seen[0].mean(dim=3).transpose(1, 2))
    assert torch.equal(frames[..., 60:], seen[0].amax(dim=3).transpose(1, 2))


@torch.no_grad()
def test_without_gru_pools_over_frequency_and_time_at_once():
    network = build(SpectrogramCNNGRU, gru=False)
    seen = []
    network.res4.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    taps = network(noise(2, 2, 41, 37))
    pooled = torch.cat((seen[0].mean(dim=(2, 3)), seen[0].amax(dim=(2, 3))), dim=1)
    assert pooled.shape == (2, 120)
    torch.testing.assert_close(taps["embedding"], network.cnn_dense1(pooled))
    torch.testing.assert_close(taps["logits"], network.cnn_output(network.cnn_dense1(pooled)))


@torch.no_grad()
def test_attaching_the_gru_carries_over_the_cnn_and_nothing_else_by_name_and_shape():
    first = build(SpectrogramCNNGRU, gru=False)
    torch.manual_seed(1)
    second = SpectrogramCNNGRU(classes=10, width=0.25).eval()
    x = noise(2, 2, 25, 32)
    assert not torch.allclose(first.encode(x), second.encode(x))
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    carried = {
        name: tensor
        for name, tensor in first.state_dict().items()
        if name in before and before[name].shape == tensor.shape
    }
    second.load_state_dict(carried, strict=False)
    assert torch.equal(first.encode(x), second.encode(x))
    assert {name.split(".")[0] for name in carried} == {"conv1", "res1", "res2", "res3", "res4"}
    assert {name.split(".")[0] for name in before.keys() - carried.keys()} == {"gru_layer", "dense1", "output"}
    assert all(torch.equal(second.state_dict()[name], before[name]) for name in before.keys() - carried.keys())


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"activate_embedding": True}])
@pytest.mark.parametrize("network", NETWORKS)
def test_forward_is_head_of_encode(network, settings):
    model, x = build(network, **settings), noise(*CLIP[network])
    taps, again = model(x), model.head(model.encode(x))
    assert list(taps) == ["logits", "embedding"]
    assert all(torch.equal(taps[name], again[name]) for name in taps)


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
def test_embedding_is_linear_unless_activated(network):
    x = noise(*CLIP[network])
    plain, activated = build(network)(x), build(network, activate_embedding=True)(x)
    assert (plain["embedding"] < 0).any()
    assert torch.equal(activated["embedding"], leaky_relu(plain["embedding"], 0.3))
    assert not torch.allclose(activated["logits"], plain["logits"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("samples", "frames"), [(26244, 1), (52487, 1), (52488, 2), (100_001, 3), (480_000, 18), (959_998, 36)]
)
def test_wave_takes_any_length_from_one_frame_up(samples, frames):
    network = build(WaveCNN, width=0.1)
    x = noise(1, 2, samples)
    assert network.encode(x).shape == (1, frames, 13)
    assert network(x)["logits"].shape == (1, 10)


def test_wave_refuses_one_sample_too_few_with_the_minimum_in_samples_and_seconds():
    with pytest.raises(BatchError, match=r"at least 26244 samples \(0\.55 s at 48 kHz\).* 26243"):
        build(WaveCNN)(torch.zeros(1, 2, 26243))


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "frames"),
    [((498, 256), 42), ((249, 255), 21), ((25, 37), 3), ((24, 64), 2), ((1, 64), 1), ((25, 1), 3), ((1, 1), 1)],
)
def test_spectrogram_takes_any_number_of_frames_and_coefficients(shape, frames):
    network = build(SpectrogramCNNGRU, width=0.1)
    x = noise(1, 2, *shape)
    assert network.encode(x).shape == (1, frames, 48)
    assert network(x)["logits"].shape == (1, 10)


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
def test_mono_and_three_classes(network):
    taps = build(network, channels=1, classes=3)(noise(*CLIP[network])[:, :1])
    assert taps["logits"].shape == (2, 3)
    assert taps["embedding"].shape == (2, 64)


def test_width_a_quarter_rounds_channels_and_gru_and_keeps_the_embedding():
    wave, spectrogram = build(WaveCNN), build(SpectrogramCNNGRU)
    assert [wave.conv1[0].out_channels, wave.res7.conv2.out_channels, wave.dense1.out_features] == [16, 32, 64]
    sizes = [getattr(spectrogram, f"res{row}").conv1.out_channels for row in (1, 2, 3, 4)]
    assert sizes == [8, 15, 30, 60]
    assert spectrogram.gru_layer.input_size == spectrogram.gru_layer.hidden_size == 120
    assert spectrogram.dense1.out_features == 64


def test_a_multiple_of_32_rounds_every_size_of_the_spectrogram_network():
    network = SpectrogramCNNGRU(classes=10, multiple=32)
    assert [getattr(network, f"res{row}").conv1.out_channels for row in (1, 2, 3, 4)] == [32, 64, 128, 256]
    assert (network.gru_layer.input_size, network.gru_layer.hidden_size) == (512, 480)
    assert SpectrogramCNNGRU(classes=2, width=1e-6, multiple=3).res1.conv1.out_channels == 6


@pytest.mark.parametrize("network", NETWORKS)
def test_width_near_zero_leaves_four_channels(network):
    assert network(classes=2, width=1e-6).conv1[0].out_channels == 4


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("network", NETWORKS)
def test_width_of_zero_less_or_nan_is_refused(network, width):
    with pytest.raises(KdlibError, match="width"):
        network(classes=2, width=width)


@pytest.mark.parametrize("network", NETWORKS)
def test_another_number_of_channels_is_refused_with_both_shapes(network):
    x = torch.zeros(*CLIP[network])[:, :1]
    with pytest.raises(BatchError, match=r"\(batch, 2, .*has 1 channels: \(2, 1, "):
        build(network)(x)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_input_without_a_batch_is_refused_with_its_shape(network):
    x = torch.zeros(*CLIP[network])[0]
    with pytest.raises(BatchError, match=rf"has {x.ndim} axes: \(2, "):
        build(network)(x)


def test_a_spectrogram_given_to_the_raw_network_is_refused():
    with pytest.raises(BatchError, match="has 4 axes"):
        build(WaveCNN)(torch.zeros(1, 2, 249, 256))


@pytest.mark.parametrize("shape", [(0, 2, 25, 32), (1, 2, 0, 32), (1, 2, 25, 0)])
def test_an_empty_spectrogram_is_refused(shape):
    with pytest.raises(BatchError, match="empty"):
        build(SpectrogramCNNGRU)(torch.zeros(shape))


@pytest.mark.parametrize("network", NETWORKS)
def test_initialisation_is_torchs(network):
    model = build(network)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


@pytest.mark.parametrize("network", [WaveCNN, SpectrogramCNNGRU])
def test_every_parameter_gets_a_gradient_in_training_mode(network):
    model = build(network).train()
    model(noise(*CLIP[network]))["logits"].square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("network", NETWORKS)
def test_every_setting_is_keyword_only_an_attribute_and_validated(network):
    parameters = {name: p for name, p in inspect.signature(network).parameters.items() if name != "self"}
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    given = {
        "classes": 3,
        "channels": 1,
        "width": 0.5,
        "activate_embedding": True,
        "gru": False,
        "multiple": 8,
        "checkpoint_activations": True,
    }
    given = {name: given[name] for name in parameters}
    model = network(**given)
    assert {name: getattr(model, name) for name in parameters} == given

    hints = get_type_hints(network.__init__, include_extras=True)
    fields = {name: (hints[name], ... if p.default is p.empty else p.default) for name, p in parameters.items()}
    schema = create_model("Settings", **fields)
    assert schema(**given).model_dump() == given
    for name, value in {"classes": 1, "channels": 0, "width": 0.0}.items():
        with pytest.raises(ValidationError, match=name):
            schema(**{**given, name: value})
