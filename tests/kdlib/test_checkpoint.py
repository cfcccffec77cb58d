"""A training that goes on from a checkpoint: bit-equal to one that was never interrupted, or refused with a reason."""

import csv
import functools
import json
import multiprocessing
import operator
import os
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib.checkpoint import apart, joined, unsaved
from kdlib.digits import digits
from kdlib.files import read_tensors
from kdlib.points import Crd, FitNet
from kdlib.signals import raised
from kdlib.sources import ClassMeans, Ema, SelfDistillation
from kdlib.sources.ensemble import Ensemble


@pytest.fixture(scope="module")
def parts():
    return digits(train=44, valid=20)


def net(seed=1, width=8):
    """A network with batch norm and dropout, and a buffer that no state dict holds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(width)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
        self.output = nn.Linear(width, 10)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        embedding = self.hidden(x)
        if self.training:
            self.seen += x.mean()
        return {"logits": self.output(embedding) + 0 * self.seen, "embedding": embedding}


def teacher(seed=9):
    return kdlib.freeze(net(seed, 12))


def distil(part, seed=9):
    soft = kdlib.SoftLabels(temperature=kdlib.Schedule(kind="linear", start=1.0, end=4.0, steps=8))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kdlib.Distiller(
            net(), kdlib.SameInput(teacher(seed)), soft=soft, fit=(0.5, FitNet()), hard=(0.1, kdlib.HardLabels())
        )


def crd(part):
    return kdlib.Distiller(net(), kdlib.SameInput(teacher()), crd=Crd(part, width=4, negatives=8))


def ema(part):
    student = net()
    return kdlib.Distiller(student, Ema(student, decay=0.9), soft=kdlib.SoftLabels(), hard=kdlib.HardLabels())


def snapshots(part):
    student = net()
    source = SelfDistillation(student, every=2)
    return kdlib.Distiller(student, source, soft=kdlib.SoftLabels(), hard=kdlib.HardLabels())


def means(part):
    source = ClassMeans(part, classes=10)
    return kdlib.Distiller(net(), source, soft=kdlib.SoftLabels(), hard=kdlib.HardLabels())


def ensemble(part):
    student = net()
    sources = {"a": kdlib.SameInput(teacher()), "b": Ema(student)}
    of_a = kdlib.of("a", Crd(part, width=4, negatives=8))
    return kdlib.Distiller(student, Ensemble(sources), soft=kdlib.SoftLabels(), a=of_a)


class Cut(Exception):
    """A process that ends in the middle."""


class Watch:
    """Notes the rows of every step, and ends the process after one of them."""

    def __init__(self, part, end=None):
        self.part = part
        self.end = end
        self.ids = []

    def __len__(self):
        return len(self.part)

    def __call__(self, event):
        if event.kind == "step" and event.step == self.end:
            raise Cut


def fit(distiller, parts, folder, **settings):
    given = {
        "epochs": 3,
        "batch": 16,
        "optimizer": functools.partial(torch.optim.Adam, weight_decay=1e-3),
        "schedule": "one_cycle",
        "lr": 1e-2,
        "clip": 1.0,
        "valid": parts.valid,
        "progress": False,
        "folder": folder,
        "checkpoint": folder / "checkpoint.safetensors",
        **settings,
    }
    return kdlib.fit(distiller, parts.train, **given)


def bits(distiller):
    tensors = {**dict(distiller.named_parameters()), **dict(distiller.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(history):
    return [{name: record[name] for name in record.keys() - {"seconds", "waiting"}} for record in history.epochs]


def logs(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        table = [{name: line[name] for name in line.keys() - {"seconds", "waiting"}} for line in csv.DictReader(file)]
    return table, (folder / "metrics.jsonl").read_text()


def interrupted(make, parts, folder, step, **settings):
    """Train up to a step, and go on in a new distiller with nothing left of the first."""
    with pytest.raises(Cut):
        fit(make(parts.train), parts, folder, callbacks=[Watch(parts.train, step)], **settings)
    distiller = make(parts.train)
    heard = []
    history = fit(distiller, parts, folder, resume=True, callbacks=[heard.append], **settings)
    return distiller, history, heard


# the same bits


class Listed(torch.utils.data.Dataset):
    """Notes which rows are asked for; in epochs, not in looking things over."""

    def __init__(self, part):
        self.part = part
        self.labels, self.groups, self.ids = part.labels, part.groups, part.ids
        self.asked = []

    def __len__(self):
        return len(self.part)

    def __getitem__(self, key):
        if key[0] >= 0:
            self.asked.append(key)
        return self.part[key]


@pytest.mark.parametrize("step", range(1, 9))
def test_from_every_batch_index_of_three_epochs_the_same_ids_weights_history_and_logs(tmp_path, parts, step):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    straight = Listed(parts.train)
    uninterrupted = distil(straight)
    history = kdlib_fit(uninterrupted, straight, parts, whole, every=1)
    first, second = Listed(parts.train), Listed(parts.train)
    with pytest.raises(Cut):
        kdlib_fit(distil(first), first, parts, cut, every=1, callbacks=[Watch(first, step + 1)])
    resumed = distil(second)
    again = kdlib_fit(resumed, second, parts, cut, every=1, resume=True)
    done = [key for batch in batches(first.asked)[:step] for key in batch]
    assert done + second.asked == straight.asked
    assert same(bits(resumed), bits(uninterrupted))
    assert timeless(again) == timeless(history)
    assert (again.best, again.teacher, again.forced) == (history.best, history.teacher, [])
    assert logs(cut) == logs(whole)


def kdlib_fit(distiller, train, parts, folder, **settings):
    return fit(distiller, kdlib.Parts(train, parts.valid, parts.test, parts.classes), folder, **settings)


def batches(keys):
    """Return the keys batch by batch: 16, 16 and 12 an epoch."""
    found = []
    for start in range(0, len(keys), 44):
        epoch = keys[start : start + 44]
        found += [epoch[:16], epoch[16:32], epoch[32:]]
    return found


@pytest.mark.parametrize("make", [crd, ema, snapshots, means, ensemble])
@pytest.mark.parametrize("step", [2, 5])
def test_state_that_points_and_sources_keep_goes_on(tmp_path, parts, make, step):
    straight = make(parts.train)
    history = fit(straight, parts, tmp_path / "whole", every=1)
    resumed, again, _ = interrupted(make, parts, tmp_path / "cut", step, every=1)
    assert same(bits(resumed), bits(straight))
    assert timeless(again) == timeless(history)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": functools.partial(torch.optim.SGD, momentum=0.9), "schedule": "cosine"},
        {"optimizer": "adamw", "schedule": "constant", "accumulate": 2},
        {"optimizer": torch.optim.RMSprop, "schedule": "one_cycle", "patience": 1, "every": 2},
        {"optimizer": functools.partial(torch.optim.Adam, amsgrad=True), "precision": "bf16", "every": 4},
        {"select": "last", "workers": 2, "every": 1},
        {"valid": None, "layout": "channels_last", "every": 3},
    ],
    ids=lambda settings: " ".join(map(str, settings)),
)
def test_whatever_the_settings_are(tmp_path, parts, settings):
    straight = distil(parts.train)
    history = fit(straight, parts, tmp_path / "whole", **settings)
    resumed, again, _ = interrupted(distil, parts, tmp_path / "cut", min(4, history.steps), **settings)
    assert same(bits(resumed), bits(straight))
    assert timeless(again) == timeless(history)
    assert logs(tmp_path / "cut") == logs(tmp_path / "whole")


def test_channels_last_convolutions_keep_their_layout_in_the_optimizer(tmp_path):
    draw = torch.Generator().manual_seed(0)
    part = kdlib.TensorPart(torch.randn(24, 3, 8, 8, generator=draw), torch.arange(24) % 2)
    parts = kdlib.Parts(part, None, part, ("a", "b"))

    def make(_):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        return kdlib.Distiller(kdlib.Tapped(layers, logits=""), hard=kdlib.HardLabels())

    settings = {"layout": "channels_last", "valid": None, "batch": 8}
    straight = make(part)
    fit(straight, parts, tmp_path / "whole", **settings)
    resumed, _, _ = interrupted(make, parts, tmp_path / "cut", 5, **settings)
    assert same(bits(resumed), bits(straight))


def test_the_callbacks_go_on_with_the_step_that_was_next(tmp_path, parts):
    _, _, heard = interrupted(distil, parts, tmp_path, 5, every=2)
    assert [event.step for event in heard if event.kind == "step"] == [5, 6, 7, 8, 9]
    assert [event.epoch for event in heard if event.kind == "epoch"] == [1, 2]


def test_a_training_that_is_over_is_not_done_again(tmp_path, parts):
    straight, again, heard = distil(parts.train), distil(parts.train), []
    history = fit(straight, parts, tmp_path)
    assert fit(again, parts, tmp_path, resume=True, callbacks=[heard.append]).epochs == history.epochs
    assert [event.kind for event in heard] == ["end"]
    assert same(bits(again), bits(straight))


def test_with_nothing_saved_yet_resume_begins_at_the_beginning(tmp_path, parts):
    straight, resumed = distil(parts.train), distil(parts.train)
    fit(straight, parts, tmp_path / "whole")
    fit(resumed, parts, tmp_path / "cut", resume=True)
    assert same(bits(resumed), bits(straight))


def test_without_every_there_is_one_at_the_end_of_each_epoch(tmp_path, parts):
    places = []

    def look(event):
        path = tmp_path / "checkpoint.safetensors"
        places.append(step_of(path) if path.exists() else 0)

    fit(distil(parts.train), parts, tmp_path, callbacks=[look])
    assert places == [0, 0, 0, 0, 3, 3, 3, 3, 6, 6, 6, 6, 9]


def step_of(path):
    tensors, note = read_tensors(path)
    return joined(note["checkpoint"]["state"], tensors)["place"]["step"]


# the file


def test_the_file_holds_tensors_and_plain_data_and_no_pickle(tmp_path, parts):
    fit(distil(parts.train), parts, tmp_path)
    data = (tmp_path / "checkpoint.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    own = [name for name in header if name != "__metadata__"]
    assert sum(header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in own) + 8 + int.from_bytes(
        data[:8], "little"
    ) == len(data)
    assert {
        "distiller/student.seen",
        "optimizer/state/0/exp_avg",
        "choice/weights/student.output.bias",
    } <= header.keys()
    assert json.loads(header["__metadata__"]["checkpoint"])["format"] == 1


def test_two_generations_are_kept_and_no_temporary_file(tmp_path, parts):
    fit(distil(parts.train), parts, tmp_path, every=2)
    assert sorted(path.name for path in tmp_path.glob("*check*")) == [
        "checkpoint.previous.safetensors",
        "checkpoint.safetensors",
    ]
    assert not list(tmp_path.glob(".*"))
    assert (step_of(tmp_path / "checkpoint.safetensors"), step_of(tmp_path / "checkpoint.previous.safetensors")) == (
        9,
        8,
    )


def stopped(parts, folder, step=6, **settings):
    with pytest.raises(Cut):
        fit(distil(parts.train), parts, folder, every=1, callbacks=[Watch(parts.train, step)], **settings)
    return folder / "checkpoint.safetensors", folder / "checkpoint.previous.safetensors"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("harm", ["a bit of the header", "a bit of a tensor", "cut", "empty", "other", "gone"])
def test_a_damaged_one_is_named_and_the_one_before_taken(tmp_path, parts, harm):
    straight, resumed = distil(parts.train), distil(parts.train)
    fit(straight, parts, tmp_path / "whole")
    last, previous = stopped(parts, tmp_path / "cut")
    before = previous.read_bytes()
    match harm:
        case "a bit of the header":
            flip(last, 400)
        case "a bit of a tensor":
            flip(last, -9)
        case "cut":
            last.write_bytes(last.read_bytes()[:-100])
        case "empty":
            last.write_bytes(b"")
        case "other":
            kdlib.files.write_tensors(last, {"a": torch.zeros(1)})
        case "gone":  # killed between the two renames
            last.unlink()
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        with pytest.raises(Cut):
            fit(resumed, parts, tmp_path / "cut", resume=True, every=1, callbacks=[Watch(parts.train, 5)])
    if harm == "gone":
        assert noted == []
    else:
        (warning,) = noted
        assert str(last) in str(warning.message)
        assert f"the one before, {previous}" in str(warning.message)
    assert previous.read_bytes() == before  # what is damaged takes no place of what is whole
    resumed = distil(parts.train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, parts, tmp_path / "cut", resume=True, every=1)
    assert same(bits(resumed), bits(straight))
    assert logs(tmp_path / "cut") == logs(tmp_path / "whole")


def test_two_damaged_ones_are_an_error_that_names_both(tmp_path, parts):
    last, previous = stopped(parts, tmp_path)
    flip(last, -9)
    flip(previous, -9)
    with pytest.raises(kdlib.TrainingError, match="no checkpoint left") as error:
        fit(distil(parts.train), parts, tmp_path, resume=True)
    assert str(last) in str(error.value)
    assert str(previous) in str(error.value)


def test_one_of_another_format_is_refused(tmp_path, parts):
    last, previous = stopped(parts, tmp_path)
    tensors, note = read_tensors(last)
    kdlib.files.write_tensors(last, tensors, {"checkpoint": {**note["checkpoint"], "format": 2}})
    previous.unlink()
    with pytest.raises(kdlib.TrainingError, match="format 2; this version of kdlib reads 1"):
        fit(distil(parts.train), parts, tmp_path, resume=True)


@pytest.mark.parametrize("state", [None, {"mapping": []}, {"mapping": [["distiller", {"mapping": []}]]}, [1], "x"])
def test_one_that_holds_something_else_is_refused(tmp_path, parts, state):
    last, _ = stopped(parts, tmp_path)
    tensors, note = read_tensors(last)
    kdlib.files.write_tensors(last, tensors, {"checkpoint": {**note["checkpoint"], "state": state}})
    with pytest.raises(kdlib.TrainingError, match=r"checkpoint\.safetensors: (cannot be taken up|the tensors are not)"):
        fit(distil(parts.train), parts, tmp_path, resume=True)


def test_one_that_is_there_is_not_written_over(tmp_path, parts):
    last, _ = stopped(parts, tmp_path)
    before = last.read_bytes()
    with pytest.raises(kdlib.TrainingError, match="there is a checkpoint already"):
        fit(distil(parts.train), parts, tmp_path)
    assert last.read_bytes() == before


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, parts):
    stopped(parts, tmp_path)
    left = tmp_path / f".checkpoint.safetensors.{kdlib.files.HOST}.999999999"
    left.write_bytes(b"half")
    fit(distil(parts.train), parts, tmp_path, resume=True)
    assert not left.exists()


def test_a_full_disk_leaves_the_one_before(tmp_path, parts, monkeypatch):
    straight, resumed, real, calls = distil(parts.train), distil(parts.train), os.fsync, []
    fit(straight, parts, tmp_path / "whole")

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            kdlib.KdlibError, match=r"checkpoint\.safetensors: [\d,]+ bytes cannot be written: No space"
        ):
            fit(distil(parts.train), parts, tmp_path / "cut", every=1)
    assert not list((tmp_path / "cut").glob(".*"))
    fit(resumed, parts, tmp_path / "cut", resume=True, every=1)
    assert same(bits(resumed), bits(straight))


def test_a_nest_comes_back_as_it_was():
    nest = {"a": [1, (2.5, None)], 3: {"b": torch.arange(2)}, "c/d": torch.ones(1), "c": {"d": torch.zeros(1)}}
    tensors = {}
    back = joined(json.loads(json.dumps(apart(nest, tensors))), tensors)
    assert back["a"] == [1, (2.5, None)]
    assert (back[3]["b"].tolist(), back["c/d"].item(), back["c"]["d"].item()) == ([0, 1], 1.0, 0.0)


def test_what_is_no_plain_data_is_refused_by_its_place():
    with pytest.raises(kdlib.TrainingError, match="state/0/f is a function"):
        apart({"state": [{"f": lambda: None}]}, {})


# what is refused


def refused(parts, folder, make=distil, **settings):
    """Return the message with which a checkpoint of `distil` is refused, and that it goes on by force."""
    stopped(parts, folder)
    with pytest.raises(kdlib.TrainingError) as error:
        fit(make(parts.train), parts, folder, resume=True, every=1, **settings)
    return str(error.value)


def test_other_settings_are_refused_with_both_sides_and_forced_ones_are_noted(tmp_path, parts):
    settings = {"schedule": "constant", "optimizer": "adam", "lr": 1e-3}
    stopped(parts, tmp_path, **settings)
    other = {**settings, "lr": 2e-3, "epochs": 4, "seed": 5}
    with pytest.raises(kdlib.TrainingError, match="is of another training") as error:
        fit(distil(parts.train), parts, tmp_path, resume=True, **other)
    for line in ("settings.epochs: there 3, here 4", "settings.lr: there 0.001, here 0.002", "seed: there 0, here 5"):
        assert line in str(error.value)
    heard = []
    history = fit(distil(parts.train), parts, tmp_path, resume=True, force=True, callbacks=[heard.append], **other)
    assert "settings.epochs: there 3, here 4" in history.forced
    assert {event.record["lr"] for event in heard if event.kind == "step"} == {2e-3}
    assert history.steps == 12
    again = fit(distil(parts.train), parts, tmp_path, resume=True, **other)
    assert again.forced == history.forced  # it is kept


def test_other_data_is_refused(tmp_path, parts):
    x = parts.train.x.clone()
    x[7] += 1e-3
    changed = kdlib.TensorPart(x, parts.train.labels, ids=parts.train.ids, classes=parts.classes)
    stopped(parts, tmp_path)
    with pytest.raises(kdlib.TrainingError, match=r"data\.training\.items: there \"\w+\", here"):
        kdlib_fit(distil(changed), changed, parts, tmp_path, resume=True, every=1)


def test_other_validation_data_is_refused(tmp_path, parts):
    assert "data.validation" in refused(parts, tmp_path, valid=parts.test)


def test_another_order_of_classes_is_refused(tmp_path, parts):
    def part(classes):
        return kdlib.TensorPart(parts.train.x, parts.train.labels, classes=classes)

    names = [str(number) for number in range(10)]
    with pytest.raises(Cut):
        kdlib_fit(distil(None), part(names), parts, tmp_path, every=1, callbacks=[Watch(parts.train, 4)])
    with pytest.raises(kdlib.TrainingError, match=r'data\.training\.classes\.0: there "0", here "9"'):
        kdlib_fit(distil(None), part(names[::-1]), parts, tmp_path, every=1, resume=True)


def test_a_plain_data_set_of_tensors_is_known_by_its_values(tmp_path):
    def data(value):
        return torch.utils.data.TensorDataset(torch.full((8, 4), value), torch.arange(8) % 2)

    def train(value, **more):
        distiller = kdlib.Distiller(kdlib.Tapped(nn.Linear(4, 2), logits=""), hard=kdlib.HardLabels())
        path = tmp_path / "c.safetensors"
        return kdlib.fit(distiller, data(value), epochs=1, batch=4, progress=False, checkpoint=path, **more)

    train(0.0)
    with pytest.raises(kdlib.TrainingError, match=r"data\.training\.items"):
        train(1.0, resume=True)
    assert train(0.0, resume=True).steps == 2


def test_another_teacher_is_refused(tmp_path, parts):
    assert "teachers.0.state: there" in refused(parts, tmp_path, lambda part: distil(part, seed=10))


def test_another_point_or_weight_is_refused(tmp_path, parts):
    def other(part):
        distiller = distil(part)
        distiller.weights["hard"] = 0.2
        distiller.points["soft"].temperature = 3.0
        return distiller

    text = refused(parts, tmp_path, other)
    assert "points.hard.weight: there 0.1, here 0.2" in text
    assert "points.soft.temperature" in text


def test_another_structure_of_the_student_is_refused_even_by_force(tmp_path, parts):
    def wider(part):
        return kdlib.Distiller(net(width=9), kdlib.SameInput(teacher()), soft=kdlib.SoftLabels(), fit=FitNet())

    assert "student.structure" in refused(parts, tmp_path, wider)
    with pytest.raises(
        kdlib.TrainingError, match=r"not those of this distiller[\s\S]*student\.hidden\.0\.weight: there"
    ):
        fit(wider(None), parts, tmp_path, resume=True, force=True)


def test_other_frozen_layers_are_refused_even_by_force(tmp_path, parts):
    def frozen(part):
        distiller = distil(part)
        distiller.student.hidden[0].requires_grad_(False)
        return distiller

    assert 'frozen.0: there nothing, here "student.hidden.0.weight"' in refused(parts, tmp_path, frozen)
    with pytest.raises(kdlib.TrainingError, match="had other parameters"):
        fit(frozen(None), parts, tmp_path, resume=True, force=True)


def test_another_number_of_threads_is_refused(tmp_path, parts):
    assert "threads: there 1, here 2" in refused(parts, tmp_path, threads=2)


def test_another_version_is_refused(tmp_path, parts, monkeypatch):
    stopped(parts, tmp_path)
    monkeypatch.setattr("kdlib.made_of.versions", lambda *_: {"torch": "9.9"})
    with pytest.raises(kdlib.TrainingError, match=r'versions\.torch: there "2[^"]*", here "9\.9"'):
        fit(distil(parts.train), parts, tmp_path, resume=True)


def test_another_number_of_processes_is_refused(tmp_path, parts, monkeypatch):
    stopped(parts, tmp_path)
    monkeypatch.setattr("kdlib.ranks.launched", lambda: (0, 2))
    with pytest.raises(kdlib.TrainingError, match="world: there 1, here 2"):
        fit(distil(parts.train), parts, tmp_path, resume=True)


@pytest.mark.parametrize("change", [{"epochs": 5}, {"schedule": "constant"}, {"lr": 1e-3}])
def test_a_schedule_is_not_changed_on_the_way_and_the_message_is_ours(tmp_path, parts, change):
    stopped(parts, tmp_path)
    with pytest.raises(kdlib.TrainingError, match=r"follows a schedule over the whole training[\s\S]*there .*, here"):
        fit(distil(parts.train), parts, tmp_path, resume=True, force=True, **change)


def test_another_optimizer_is_refused_even_by_force(tmp_path, parts):
    stopped(parts, tmp_path, schedule="constant")
    with pytest.raises(kdlib.TrainingError, match=r"was torch\.optim\.adam\.Adam and is torch\.optim\.sgd\.SGD now"):
        fit(distil(parts.train), parts, tmp_path, resume=True, force=True, schedule="constant", optimizer="sgd")


def test_state_that_no_module_holds_is_refused_before_the_first_step(tmp_path, parts):
    class Counting:
        def __call__(self, student, teacher, batch):
            return student["logits"].square().mean()

        def advance(self, student):
            self.count = getattr(self, "count", 0) + 1

    distiller = kdlib.Distiller(net(), count=Counting())
    with pytest.raises(kdlib.TrainingError, match="Counting has a method 'advance' and is no module"):
        fit(distiller, parts, tmp_path)
    assert fit(distiller, parts, tmp_path, checkpoint=None).steps == 9
    assert unsaved(kdlib.Distiller(net(), a=kdlib.of("a", Counting())))
    assert not unsaved(ensemble(parts.train))


def test_a_source_that_keeps_a_callable_without_attributes_is_told_too(tmp_path, parts):
    class Rooted(kdlib.SameInput):
        def __init__(self, teacher):
            super().__init__(teacher)
            self.root, self.input = np.sqrt, operator.itemgetter("x")

    distiller = kdlib.Distiller(net(), Rooted(teacher()), soft=kdlib.SoftLabels())
    assert fit(distiller, parts, tmp_path).steps == 9
    again = kdlib.Distiller(net(), Rooted(teacher()), soft=kdlib.SoftLabels())
    assert fit(again, parts, tmp_path, resume=True).steps == 9


@pytest.mark.parametrize("settings", [{"every": 3}, {"resume": True}, {"force": True}])
def test_settings_of_a_checkpoint_without_one_are_refused(tmp_path, parts, settings):
    with pytest.raises(kdlib.TrainingError, match="checkpoint=PATH"):
        fit(distil(parts.train), parts, tmp_path, checkpoint=None, **settings)


@pytest.mark.parametrize(
    ("settings", "text"), [({"every": 0}, "at least 1"), ({"checkpoint": Path("a.pt")}, "ends in")]
)
def test_settings_out_of_bounds_are_refused(tmp_path, parts, settings, text):
    with pytest.raises(kdlib.TrainingError, match=text):
        fit(distil(parts.train), parts, tmp_path, **settings)


# signals


def sending(number, step, times=1):
    def send(event):
        if event.kind == "step" and event.step == step:
            for _ in range(times):
                signal.raise_signal(number)

    return send


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_raises_and_the_handlers_are_as_before(tmp_path, parts, number):
    straight, resumed = distil(parts.train), distil(parts.train)
    fit(straight, parts, tmp_path / "whole")
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    cut = tmp_path / "cut"
    with pytest.raises(kdlib.Stopped, match=f"{number.name} after step 5, epoch 1; the checkpoint is") as stopped:
        fit(distil(parts.train), parts, cut, callbacks=[sending(number, 5)])
    assert stopped.value.signal == number
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    assert step_of(cut / "checkpoint.safetensors") == 5
    fit(resumed, parts, cut, resume=True)
    assert same(bits(resumed), bits(straight))
    assert logs(cut) == logs(tmp_path / "whole")


def test_a_signal_in_a_validation_does_not_wait_for_its_end(tmp_path, parts):
    class Slow(Listed):
        """Sends the signal with the first row of the first validation after the training began."""

        def __getitem__(self, key):
            self.asked.append(key)
            if began and len(began) == 3 and not sent:
                sent.append(key)
                signal.raise_signal(signal.SIGTERM)
            return self.part[key]

    began, sent = [], []
    straight, resumed = distil(parts.train), distil(parts.train)
    history = fit(straight, parts, tmp_path / "whole", valid=Slow(parts.valid))
    valid = Slow(parts.valid)
    with pytest.raises(kdlib.Stopped, match="after step 3, epoch 0"):
        fit(distil(parts.train), parts, tmp_path / "cut", valid=valid, callbacks=[began.append])
    assert len(sent) == 1
    again = fit(resumed, parts, tmp_path / "cut", valid=valid, resume=True)
    assert same(bits(resumed), bits(straight))
    assert timeless(again) == timeless(history)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_checkpoint_is_not_lost(tmp_path, parts, number):
    def late(event):
        if event.kind == "end":
            signal.raise_signal(number)

    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with raised(), pytest.raises(KeyboardInterrupt):
        fit(distil(parts.train), parts, tmp_path, callbacks=[late])
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    assert step_of(tmp_path / "checkpoint.safetensors") == 9


def test_a_second_interrupt_stops_at_once(tmp_path, parts):
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(distil(parts.train), parts, tmp_path, callbacks=[sending(signal.SIGINT, 5, times=2)])
    assert not isinstance(stopped.value, kdlib.Stopped)
    assert step_of(tmp_path / "checkpoint.safetensors") == 3


def test_a_signal_during_the_last_step_saves_what_is_done(tmp_path, parts):
    with pytest.raises(kdlib.Stopped):
        fit(distil(parts.train), parts, tmp_path, callbacks=[sending(signal.SIGTERM, 9)])
    assert fit(distil(parts.train), parts, tmp_path, resume=True).steps == 9


def test_a_stopped_training_leaves_no_process(tmp_path, parts):
    with pytest.raises(kdlib.Stopped):
        fit(distil(parts.train), parts, tmp_path, workers=2, callbacks=[sending(signal.SIGTERM, 2)])
    assert multiprocessing.active_children() == []


def test_in_another_thread_there_is_no_handler(tmp_path, parts):
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(distil(parts.train), parts, tmp_path).steps))
    thread.start()
    thread.join()
    assert found == [9]


def hooks_of(module):
    return [len(one._forward_hooks) + len(one._backward_hooks) for one in module.modules()]


def test_no_hook_and_no_handler_is_left_after_interruptions_at_every_step(tmp_path, parts):
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    distiller = distil(parts.train)
    hooks = hooks_of(distiller.student)
    for step in range(1, 10):
        with pytest.raises(kdlib.Stopped):
            fit(distiller, parts, tmp_path, resume=True, callbacks=[sending(signal.SIGTERM, step)])
    assert hooks_of(distiller.student) == hooks
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
