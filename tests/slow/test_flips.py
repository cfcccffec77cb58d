"""Turned bits and lost ends, over every file that is read back: the public loaders refuse all of them."""

import shutil

import numpy as np
import pytest
import torch

import kdlib
from kdlib.cache import Cache, filled, fit_features, read_item
from kdlib.cli import app
from kdlib.digits import digits
from kdlib.recipe import read
from kdlib.registry import registry
from kdlib.run import run
from kdlib.sources import Stored
from kdlib.store import MANIFEST

FLIPS = 1000
"""Single bits turned in each file, or all that it has."""

RECIPE = {
    "name": "flips",
    "data": {"kind": "digits", "train": 60, "valid": 0},
    "train": {"epochs": 1, "threads": 1},
    "features": {"kind": "shift"},
    "model": {"kind": "digits_mlp", "width": 4},
    "source": {"kind": "same_input"},
    "points": {"soft": {"kind": "soft_labels"}},
    "scorer": {"kind": "svm"},
}


class Shift(torch.nn.Module):
    """Features with a statistic of the training part."""

    time_axis = -1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((64,), torch.nan))

    def fit(self, clips):
        self.mean.copy_(torch.stack(list(clips)).mean(0))
        return self

    def forward(self, samples):
        return samples - self.mean


class Mine:
    """What the recipe names."""

    @kdlib.hookimpl
    def kdlib_features(self):
        return {"shift": Shift}


class Printed(kdlib.TensorPart):
    """A part whose items are known again."""

    def fingerprint(self, index):
        return str(index)


def part_of():
    whole = digits(train=60, valid=0).train
    return Printed(whole.x, whole.labels)


def quiet(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


def read_cache(folder):
    """Open the features of the cache as a training would, where nothing may be computed."""

    def computed(_):
        pytest.fail("computed anew, and not read")

    return read_item(filled(Shift(), part_of(), Cache(folder), computed), part_of(), 0)


def read_statistics(folder):
    features = Shift()
    features.fit = lambda _: pytest.fail("computed anew, and not read")
    fit_features(features, part_of(), Cache(folder))


def read_checkpoint(place):
    """Go on, from the end, with a training whose only checkpoint this is."""
    student = kdlib.Tapped(torch.nn.Linear(64, 10), logits="")
    distiller = kdlib.Distiller(student, hard=kdlib.HardLabels())
    settings = {"epochs": 1, "batch": 32, "threads": 1, "progress": False}
    kdlib.fit(distiller, part_of(), checkpoint=place / "training.safetensors", resume=True, **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything that kdlib writes and reads back: a run, a store of its teacher's labels, a cache, a checkpoint."""
    registry.cache_clear()
    kdlib.register(Mine())
    place = tmp_path_factory.mktemp("flips")
    run(read(RECIPE), place / "run", progress=False)
    quiet("store", "build", place / "run", place / "store", "--views", "0", "--threads", "1")
    filled(Shift(), part_of(), Cache(place / "cache"), lambda i: {"x": part_of().x[i]})
    fit_features(Shift(), part_of(), Cache(place / "statistics"))
    (place / "checkpoint").mkdir()
    read_checkpoint(place / "checkpoint")
    yield place
    registry.cache_clear()


def only(place, name):
    (found,) = place.rglob(name)
    return found


LOADERS = {
    "load_run": lambda place: kdlib.load_run(place / "run"),
    "kdlib figures": lambda place: quiet("figures", place / "run"),
    "source stored": lambda place: Stored(folder=place / "store").stores[0].take([0]),
    "kdlib store verify": lambda place: quiet("store", "verify", place / "store"),
    "cache": lambda place: read_cache(place / "cache"),
    "fit, resumed": lambda place: read_checkpoint(place / "checkpoint"),
    "statistics in the cache": lambda place: read_statistics(place / "statistics"),
}
SHARD = "00000.safetensors"
FILES = [
    ("student", "run/main/student.safetensors", "load_run"),
    ("feature statistics", "run/main/features.safetensors", "load_run"),
    ("SVM", "run/main/student-scorer.safetensors", "load_run"),
    ("checkpoint", "checkpoint/training.safetensors", "fit, resumed"),
    ("recipe of a run", "run/recipe.json", "load_run"),
    ("result of a run", "run/result.json", "load_run"),
    ("checksums of a run", "run/SHA256SUMS", "load_run"),
    ("store shard", f"store/training/{SHARD}", "source stored"),
    ("store sidecar", f"store/training/{SHARD}.sha256", "kdlib store verify"),
    ("store manifest", f"store/training/{MANIFEST}", "source stored"),
    ("cache shard", f"cache/*/{SHARD}", "cache"),
    ("cache sidecar", f"cache/*/{SHARD}.sha256", "cache"),
    ("cache manifest", f"cache/*/{MANIFEST}", "cache"),
    ("cached statistics", f"statistics/*/{SHARD}", "statistics in the cache"),
]


def damages(good, seed):
    """Yield what can become of a file: single bits turned, and its ends lost at every percent."""
    draw = np.random.default_rng(seed)
    bits = draw.choice(8 * len(good), size=min(FLIPS, 8 * len(good)), replace=False)
    for bit in bits.tolist():
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(bad)
    for percent in range(100):
        yield f"cut at {percent} %", good[: len(good) * percent // 100]


def refused(load, place):
    """Tell whether damage is noticed: with an error, or, where it can be made anew, with a warning and made anew."""
    try:
        load(place)
    except kdlib.KdlibError:
        return True
    except UserWarning as warning:  # of a cache; warnings are errors here
        return "damaged" in str(warning) or "It is made anew" in str(warning)
    return False


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("what", "pattern", "loader"), FILES, ids=[what for what, *_ in FILES])
def test_every_turned_bit_and_every_lost_end_is_refused(made, tmp_path, table, what, pattern, loader):
    place = tmp_path / "copy"
    shutil.copytree(made, place)
    (path,) = place.glob(pattern)
    load, good = LOADERS[loader], path.read_bytes()
    load(place)  # the control
    taken, missed = 0, []
    for number, (name, bad) in enumerate(damages(good, len(what))):
        path.write_bytes(bad)
        if not refused(load, place):
            missed.append(name)
        taken += 1
        path.write_bytes(good)
        if number % 100 == 0:
            load(place)  # untouched again
    load(place)
    table(
        f"bits turned and ends lost: {what} ({len(good):,} bytes)", f"{taken - len(missed)} refused by {loader}", taken
    )
    assert missed == []
