"""Segments joined exactly from kept frames, against the network run on their concatenation."""

import itertools
import json
import pickle
from contextlib import nullcontext
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib.taps import teachers_in
from kdlib.testing import check_source
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN
from kdlib_asc.partners import partners
from kdlib_asc.points import HiddenMse
from kdlib_asc.sources import MultiSegment

LABELS = [0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0]  # six clips a class
AXIS = {WaveCNN: -1, SpectrogramCNNGRU: -2}
BOTH = pytest.mark.parametrize("network", list(AXIS))


class Noise:
    """A data part of noise, ``steps`` long; where it is augmented, a clip is turned round in time by the epoch."""

    def __init__(self, network, steps, *, augmented=False):
        self.labels = np.array(LABELS)
        self.ids = self.groups = [str(clip) for clip in range(len(LABELS))]
        self.classes = ("bus", "tram")
        self.augmented = augmented
        self.time_axis = AXIS[network]
        self.shape = (2, steps) if network is WaveCNN else (2, steps, 9)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        epoch, index = key
        x = torch.randn(self.shape, generator=kdlib.keyed(0, index))
        if self.augmented and epoch != kdlib.CLEAN:
            x = x.roll(1 + epoch, self.time_axis)
        return {"x": x, "y": int(self.labels[index]), "index": index, "epoch": epoch}


def built(network, **settings):
    """A network with running statistics that are not 0 and 1, so that padding with zeros is no fixed point."""
    torch.manual_seed(0)
    model = network(**{"classes": 2, "width": 0.05, **settings}).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model


def uneven(network, frames):
    """A length of so many frames of the network, and nearly one more."""
    return network.junction.stride * (frames + 1) - 1


def concatenated(part, batch, segments, stride, *, clean=True):
    """The segments of each row, each cut to whole frames, one after the other, by the table of partners."""
    epoch = int(batch["epoch"][0])
    table = partners(part.labels, part.groups, segments, 0, epoch)
    steps = part.shape[1] // stride * stride
    rows = []
    for index in batch["index"].tolist():
        clips = [part[kdlib.CLEAN if clean else epoch, clip]["x"] for clip in [index, *table[index].tolist()]]
        rows.append(torch.cat([clip[:, :steps] for clip in clips], dim=1))
    return torch.stack(rows)


def assert_exact(taps, wanted):
    assert set(taps) == set(wanted) == {"logits", "embedding"}
    for name, tap in wanted.items():
        assert (taps[name] - tap).abs().max() <= 1e-6 * tap.abs().max(), name


def first(source, part, rows=3, epoch=0):
    return next(kdlib.Loader(source.dataset(part), batch=rows).epoch(epoch))


# equal to the concatenation


@pytest.mark.parametrize("segments", [2, 3, 6])
@pytest.mark.parametrize(
    ("network", "settings"),
    [
        (WaveCNN, {}),
        (WaveCNN, {"width": 0.2}),
        (SpectrogramCNNGRU, {}),
        (SpectrogramCNNGRU, {"width": 0.2}),
        (SpectrogramCNNGRU, {"gru": False}),
    ],
)
def test_kept_frames_mended_equal_the_network_on_the_cut_segments_joined(network, settings, segments):
    teacher = kdlib.freeze(built(network, **settings))
    part = Noise(network, uneven(network, 6 if network is SpectrogramCNNGRU else 2))
    source = MultiSegment(teacher, part, segments=segments, join="exact")
    batch = first(source, part)
    assert {"frames", "windows"} <= batch.keys()
    assert not {"partners", "base"} & batch.keys()
    assert_exact(source(batch), teacher(concatenated(part, batch, segments, network.junction.stride)))


@BOTH
@pytest.mark.parametrize("short", [False, True])
def test_segments_as_long_as_a_window_or_shorter_are_exact_too(network, short):
    """At the limit windows share a segment; below it, nothing is kept and the segments are joined."""
    teacher, stride = kdlib.freeze(built(network)), network.junction.stride
    part = Noise(network, network.junction.before - short)
    source = MultiSegment(teacher, part, segments=3, join="exact")
    with pytest.warns(UserWarning, match="saves nothing here but what it cuts off") if short else nullcontext():
        batch = first(source, part)
    assert ("frames" in batch) != short
    assert_exact(source(batch), teacher(concatenated(part, batch, 3, stride)))


@BOTH
@pytest.mark.parametrize("view", ["same", "clean"])
def test_augmented_segments_are_cut_and_joined_as_the_view_says(network, view):
    teacher, stride = kdlib.freeze(built(network)), network.junction.stride
    part = Noise(network, uneven(network, 5 if network is SpectrogramCNNGRU else 2), augmented=True)
    source = MultiSegment(teacher, part, segments=2, join="exact", view=view)
    batch = first(source, part, epoch=3)
    assert ("frames" in batch) == (view == "clean")
    assert_exact(source(batch), teacher(concatenated(part, batch, 2, stride, clean=view == "clean")))


@BOTH
@pytest.mark.parametrize("augmented", [False, True])
def test_one_segment_is_the_cut_input(network, augmented):
    teacher, stride = kdlib.freeze(built(network)), network.junction.stride
    part = Noise(network, uneven(network, 5 if network is SpectrogramCNNGRU else 2), augmented=augmented)
    source = MultiSegment(teacher, part, segments=1, join="exact")
    batch = first(source, part)
    assert_exact(source(batch), teacher(concatenated(part, batch, 1, stride, clean=not augmented)))


# the window


@torch.no_grad()
def error(model, junction):
    """The largest difference of mended frames from those of three inputs joined, in float64, by the frames' size."""
    network = type(model)
    axis = AXIS[network]
    generator = torch.Generator().manual_seed(0)
    shape = Noise(network, (7 if network is SpectrogramCNNGRU else 3) * junction.stride).shape
    inputs = [torch.randn(1, *shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    alone = torch.stack([model.encode(x) for x in inputs], dim=1)
    windows = [
        torch.cat([junction.tail(one, axis), junction.head(other, axis)], dim=axis)
        for one, other in itertools.pairwise(inputs)
    ]
    mended = junction.mended(alone, torch.stack([model.encode(window) for window in windows], dim=1))
    wanted = model.encode(torch.cat(inputs, dim=axis))
    return float((mended - wanted).abs().max() / wanted.abs().max())


@BOTH
def test_the_window_is_as_small_as_it_can_be(network):
    model, junction = built(network, width=0.02).double(), network.junction
    assert error(model, junction) < 1e-14
    step = 12 if network is WaveCNN else 1  # the stem of the raw network takes 12 samples at once
    less = {"left": 1, "right": 1, "before": junction.stride, "after": step}
    assert {"stride", *less} == {field.name for field in fields(junction)}
    for name, one in less.items():
        assert error(model, replace(junction, **{name: getattr(junction, name) - one})) > 1e-12, name


# what is computed


@BOTH
def test_clips_are_encoded_once_and_then_only_windows(network):
    model, seen = built(network), []
    model.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append((len(inputs[0]), inputs[0].shape[2])))
    frames = 6 if network is SpectrogramCNNGRU else 2
    part = Noise(network, uneven(network, frames))
    source = MultiSegment(kdlib.freeze(model), part, segments=3, join="exact")
    loader = kdlib.Loader(source.dataset(part), batch=6)
    junction = network.junction
    assert seen == [(len(part), frames * junction.stride)]
    for batch in loader.epoch(0):
        source(batch)
    assert seen[1:] == 2 * [(6 * 2, junction.before + junction.after)]


@BOTH
def test_it_is_a_source_whose_data_holds_no_teacher_and_pickles(network):
    part = Noise(network, uneven(network, 5 if network is SpectrogramCNNGRU else 2))
    source = MultiSegment(kdlib.freeze(built(network)), part, segments=2, join="exact")
    data = source.dataset(part)
    assert not list(teachers_in(data))
    item, twin = data[1, 4], pickle.loads(pickle.dumps(data))[1, 4]
    assert all(torch.equal(torch.as_tensor(item[name]), torch.as_tensor(twin[name])) for name in item)
    check_source(source, first(source, part))


# errors


def test_a_teacher_that_does_not_say_how_far_a_junction_reaches_is_refused():
    part = Noise(WaveCNN, 30)
    teacher = kdlib.freeze(kdlib.Tapped(nn.Linear(30, 2), logits=""))
    with pytest.raises(kdlib.TapError, match=r"Tapped has no attribute 'junction'.*join inputs"):
        MultiSegment(teacher, part, join="exact")


@pytest.mark.parametrize("augmented", [False, True])
def test_a_segment_of_less_than_a_frame_is_refused_with_both_lengths(augmented):
    part = Noise(SpectrogramCNNGRU, 11, augmented=augmented)
    source = MultiSegment(kdlib.freeze(built(SpectrogramCNNGRU)), part, join="exact")
    with pytest.raises(kdlib.BatchError, match=r"whole frames of 12 steps.* 11"):
        source(first(source, part))


# how far from joined inputs


def test_difference_is_that_of_the_taps_on_clips_joined_both_ways():
    network = SpectrogramCNNGRU
    teacher, part = kdlib.freeze(built(network)), Noise(network, 5 * 12 + 7)
    source, whole = (MultiSegment(teacher, part, segments=3, join=join) for join in ("exact", "input"))
    batches = [next(kdlib.Loader(one.dataset(part), batch=12, shuffle=False).epoch(-1)) for one in (source, whole)]
    taps, wanted = source(batches[0]), whole(batches[1])
    p, q = (one["logits"].double().softmax(-1) for one in (wanted, taps))
    assert source.difference(source.dataset(part)) == {
        "KL": pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3, abs=1e-9),
        "same class": pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean())),
        "embedding": pytest.approx(float((taps["embedding"] - wanted["embedding"]).abs().max()), rel=1e-3),
        "cut off": 7,
        "of": 67,
    }
    assert whole.difference(whole.dataset(part)) == {}


def test_difference_of_whole_segments_is_none_where_frames_alone_differ():
    network = SpectrogramCNNGRU
    teacher, part = kdlib.freeze(built(network, gru=False)), Noise(network, 5 * 12)
    exact, frames = (
        source.difference(source.dataset(part))
        for source in (MultiSegment(teacher, part, segments=2, join=join) for join in ("exact", "frames"))
    )
    assert exact["cut off"] == 0
    assert (exact["same class"], exact["KL"]) == (1, pytest.approx(0, abs=1e-7))
    assert exact["embedding"] < 1e-6 < 1e-4 < frames["embedding"]


@pytest.mark.parametrize("join", ["exact", "input"])
def test_fit_trains_with_it_and_says_the_difference_once(join, tmp_path, capsys):
    network = SpectrogramCNNGRU
    part = Noise(network, 5 * 12 + 7)
    source = MultiSegment(kdlib.freeze(built(network)), part, join=join)
    student = built(network)
    distiller = kdlib.Distiller(student, source, hidden=HiddenMse())
    history = kdlib.fit(distiller, part, valid=part, epochs=1, batch=6, folder=tmp_path)
    kept = json.loads((tmp_path / "teacher.json").read_text())
    assert kept.pop("difference", {}) == history.difference == source.difference(source.dataset(part))
    assert kept.keys() == {"training", "validation"}
    assert capsys.readouterr().out.count("teacher's shortcut: KL ") == (join == "exact")
