"""Disks that are full or read-only, and odd paths: one message with the file, the old one as it was, nothing beside."""

import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import kdlib
from kdlib.cache import Cache, filled
from kdlib.cli import app
from kdlib.data import CLEAN
from kdlib.digits import DigitsMLP, digits
from kdlib.files import make_folder, write_arrays, write_json, write_sums, write_tensors
from kdlib.making import make
from kdlib.recipe import read
from kdlib.run import run
from kdlib.sources import Stored
from kdlib.store import make_store
from kdlib.storing import build_store
from kdlib_asc.datasets import dcase, folder
from kdlib_asc.scoring import Svm

RECIPE = {
    "name": "few",
    "data": {"kind": "digits", "train": 60, "valid": 0},
    "train": {"epochs": 1, "threads": 1},
    "model": {"kind": "digits_mlp", "width": 4},
    "source": {"kind": "same_input"},
    "points": {"soft": {"kind": "soft_labels"}},
}


@pytest.fixture(scope="module")
def parts():
    return digits(train=60, valid=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    return run(read(RECIPE), tmp_path_factory.mktemp("disks") / "ä 🚋\n%s" / "run", progress=False)


@contextmanager
def full(size):
    """Let no file of this process grow beyond a size: a write fails as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def contents(place):
    return {path.relative_to(place): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


# what is written, by one call that goes well and one for which there is no room


def tensors(place, size):
    write_tensors(place / "student.safetensors", DigitsMLP(width=size).state_dict(), {"classes": ["a"]})


def scorer(place, size):
    x = np.random.default_rng(0).normal(size=(40, size))
    write_arrays(place / "student-scorer.safetensors", Svm().fit(x, np.arange(40) % 2).state())


def statistics(place, size):
    write_tensors(place / "features.safetensors", {"mean": torch.zeros(size)})


def result(place, size):
    write_json(place / "result.json", {"rows": ["row"] * size})


def sums(place, size):
    for number in range(size):
        (place / f"{number}").touch()
    write_sums(place, [f"{number}" for number in range(size)])


def store(place, size):
    made = make_store(place, {}, rows=2, row=lambda: {"a": np.zeros(600)}, shard_rows=1)
    if size == LITTLE:
        made.write(0, {"a": np.zeros((1, 600))})
    else:
        made.write(1, {"a": np.ones((1, 600))})


def manifest(place, size):
    make_store(place / str(size), {"labels": ["label"] * size}, rows=2, row=lambda: {"a": np.zeros(2)}, shard_rows=1)


def cache(place, size):
    part = digits(train=60, valid=0).train
    items = {name: getattr(part, name)[: 2 * size] for name in ("x", "labels")}
    filled(torch.nn.Identity(), kdlib.TensorPart(**items), Cache(place), lambda i: {"x": items["x"][i].repeat(3)})


def trained(place, size, kind):
    """Train for two epochs; in the second of the large one there is no room."""
    limits = []

    def later(event):
        if size == LARGE and event.kind == kind and event.epoch == 1 and not limits:
            limits.append(full(40))
            limits[0].__enter__()

    part = kdlib.TensorPart(torch.rand(20, 64), torch.arange(20) % 10)
    distiller = kdlib.Distiller(DigitsMLP(width=4), hard=kdlib.HardLabels())
    try:
        kdlib.fit(distiller, part, epochs=2, batch=10, folder=place, callbacks=[later], progress=False, threads=1)
    finally:
        for limit in limits:
            limit.__exit__(None, None, None)


def csv(place, size):
    trained(place, size, "epoch")


def jsonl(place, size):
    trained(place, size, "step")


def teacher(place, size):
    part = kdlib.TensorPart(torch.rand(20, 64), torch.arange(20) % 10)
    source = kdlib.SameInput(kdlib.freeze(DigitsMLP(width=4)))
    distiller = kdlib.Distiller(DigitsMLP(width=4), source, soft=kdlib.SoftLabels())
    kdlib.fit(distiller, part, epochs=1, batch=20, folder=place, progress=False, threads=1)


def recipe(place, size):
    if size == LARGE:
        run(read(RECIPE), place / "run", progress=False)


LITTLE, LARGE = 3, 300
WRITES = [
    (tensors, "student.safetensors", 5000),
    (scorer, "student-scorer.safetensors", 5000),
    (statistics, "features.safetensors", 1000),
    (result, "result.json", 1000),
    (sums, "SHA256SUMS", 1000),
    (store, "00001.safetensors", 4000),
    (manifest, f"{LARGE}/manifest.json", 1000),
    (cache, "00000.safetensors", 4000),
    (csv, "metrics.csv", 1 << 20),
    (jsonl, "metrics.jsonl", 1 << 20),
    (teacher, "teacher.json", 40),
    (recipe, "run/made_of.json", 40),
]
"""Who writes what, and the bytes that a file may have when much is written."""


@pytest.mark.parametrize(("write", "name", "room"), WRITES, ids=[name for _, name, _ in WRITES])
def test_where_the_disk_is_full_the_message_names_the_file_and_the_old_one_is_as_it_was(tmp_path, write, name, room):
    write(tmp_path, LITTLE)
    before = contents(tmp_path)
    message = rf"{tmp_path}.*/{name}: [\d,]+ bytes cannot be written: File too large"
    with full(room), pytest.raises(kdlib.KdlibError, match=message):
        write(tmp_path, LARGE)
    after = contents(tmp_path)
    assert not [path for path in after if path.name.startswith(".")]
    if write in (csv, jsonl):  # the limit came in the midst of it; what was written before is whole
        lines = after[Path(name)].decode().splitlines()
        assert len(lines) == 2
    else:
        changed = {path for path in before if after[path] != before[path]}
        assert changed <= ({Path("metrics.csv"), Path("metrics.jsonl")} if write is teacher else set())
        assert not [path for path in after if path not in before and path.match(name)]


def mounted(place, options):
    """Mount a file system in memory, or skip where this user may not."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"this user cannot mount: {done.stderr.decode().strip()}")
    return place


@pytest.fixture
def small(tmp_path):
    """A disk of 128 KiB."""
    place = mounted(tmp_path / "small", "size=128k")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def read_only(tmp_path):
    """A disk that nobody can write to."""
    place = mounted(tmp_path / "fixed", "size=8m,ro")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_store_that_will_not_fit_is_refused_before_the_teacher_labels(small, parts):
    calls = []

    class Counting(kdlib.SameInput):
        def __call__(self, batch):
            calls.append(len(batch["index"]))
            return {"wide": torch.zeros(len(batch["index"]), 4000)}

    source = Counting(kdlib.freeze(DigitsMLP()))
    with pytest.raises(kdlib.KdlibError, match=r"small: 960,000 bytes will be written, and [\d,]+ are free there"):
        build_store(source, parts.train, small, batch=4)
    assert calls == [4]  # for names and shapes


def test_a_cache_that_will_not_fit_is_refused_before_the_second_item(small, parts):
    calls = []

    def compute(index):
        calls.append(index)
        return {"x": torch.zeros(4000)}

    with pytest.raises(kdlib.KdlibError, match=r"960,000 bytes will be written, and [\d,]+ are free there"):
        filled(torch.nn.Identity(), parts.train, Cache(small), compute)
    assert calls == [0]


def test_networks_that_will_not_fit_are_refused_before_they_are_trained(small):
    wide = {**RECIPE, "model": {"kind": "digits_mlp", "width": 1000}}
    with pytest.raises(kdlib.KdlibError, match=r"main: 300,040 bytes will be written, and [\d,]+ are free there"):
        run(read(wide), small / "run", progress=False)
    assert [path.name for path in contents(small)] == ["made_of.json", "recipe.json"]


def test_on_a_full_disk_a_shard_is_named_and_earlier_ones_can_be_read(small):
    made = make_store(small / "store", {}, rows=8, row=lambda: {"a": np.zeros(1000)}, shard_rows=1)
    (small / "other").write_bytes(bytes(60_000))

    def fill():
        for shard in range(8):
            made.write(shard, {"a": np.full((1, 1000), float(shard))})

    with pytest.raises(kdlib.KdlibError, match=r"0000\d\.safetensors: [\d,]+ bytes cannot be written: No space left"):
        fill()
    assert 0 < len(made.finished()) < 8
    for shard in made.finished():
        assert made[shard]["a"][0] == shard
    assert not [path for path in (small / "store").iterdir() if path.name.startswith(".")]


REFUSED = {
    "run": lambda place, _: run(read(RECIPE), place / "run", progress=False),
    "fit": lambda place, parts: kdlib.fit(
        kdlib.Distiller(DigitsMLP(width=4), hard=kdlib.HardLabels()),
        parts.train,
        epochs=1,
        folder=place,
        callbacks=[lambda _: pytest.fail("trained")],
        progress=False,
    ),
    "store": lambda place, parts: build_store(
        kdlib.SameInput(kdlib.freeze(DigitsMLP(width=4))), parts.train, place / "store", threads=1
    ),
    "cache": lambda place, parts: filled(
        torch.nn.Identity(), parts.train, Cache(place / "cache"), lambda _: {"x": torch.zeros(1)}
    ),
    "folder": lambda place, _: make_folder(place),
    "data made": lambda place, _: app(["data", "make", str(place / "made")], standalone_mode=False),
    "plugin made": lambda place, _: app(["new-plugin", "kdlib-x", "--parent", str(place)], standalone_mode=False),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_disk_that_is_read_only_is_refused_before_anything_is_trained_or_made(read_only, parts, what):
    with pytest.raises(kdlib.KdlibError, match=rf"{read_only}.*([Rr]ead-only)"):
        REFUSED[what](read_only, parts)


def test_a_store_and_a_run_on_a_read_only_disk_can_be_read(tmp_path, parts, finished):
    place = mounted(tmp_path / "fixed", "size=8m")
    try:
        shutil.copytree(finished, place / "run")
        frozen = kdlib.freeze(DigitsMLP(width=4))
        build_store(kdlib.SameInput(frozen), parts.train, place / "store", threads=1)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert kdlib.load_run(place / "run").classes == tuple("0123456789")
        assert len(build_store(kdlib.SameInput(frozen), parts.train, place / "store", threads=1)) == 60
        assert Stored(folder=place / "store").stores
    finally:
        subprocess.run(["umount", place], check=True)


# paths

ODD = ["with spaces", "ä-Ω-🚋", "line\nbreak", "tab\tand\x1b[31m", "-dash", "%s {} $HOME", "#", "a" * 200, "e\u0301"]


@pytest.mark.parametrize("name", ODD)
def test_runs_stores_and_caches_lie_under_any_name(tmp_path, parts, finished, name):
    place = tmp_path / name
    shutil.copytree(finished, place / "run")
    frozen = kdlib.freeze(kdlib.load_run(place / "run").students["main"])
    distiller = kdlib.Distiller(DigitsMLP(width=4), hard=kdlib.HardLabels())
    kdlib.fit(distiller, parts.train, epochs=1, folder=place / "fit", progress=False)
    assert len((place / "fit" / "metrics.csv").read_text().splitlines()) == 2
    build_store(kdlib.SameInput(frozen), parts.train, place / "store", threads=1)
    stored = Stored(folder=place / "store")
    batch = next(kdlib.Loader(stored.dataset(parts.train), batch=3, shuffle=False).epoch(CLEAN))
    torch.testing.assert_close(stored(batch)["logits"], frozen(parts.train.x[:3])["logits"])
    kept = filled(torch.nn.Identity(), parts.train, Cache(place / "cache"), lambda i: {"x": parts.train.x[i]})
    assert len(kept) == 60


def test_a_run_is_made_under_an_odd_name(finished):
    assert finished.parent.name == "ä 🚋\n%s"
    assert kdlib.load_run(finished).classes == tuple("0123456789")


TOO_LONG = {"name": "a" * 300, "path": "/".join(["a" * 200] * 30), "NUL": "a\0b"}


@pytest.mark.parametrize("kind", TOO_LONG)
def test_a_path_that_no_file_can_have_is_a_message(tmp_path, parts, kind):
    path = tmp_path / TOO_LONG[kind]
    form = {"rate": 8000, "channels": 1, "seconds": 1.0}
    for use in (
        lambda: run(read(RECIPE), path, progress=False),
        lambda: kdlib.load_run(path),
        lambda: REFUSED["fit"](path, parts),
        lambda: REFUSED["store"](path, parts),
        lambda: REFUSED["cache"](path, parts),
        lambda: Stored(folder=path),
        lambda: read(path / "recipe.toml"),
        lambda: (
            read({**RECIPE, "teacher": {"weights": str(path)}})
            and run(read({**RECIPE, "teacher": {"weights": str(path)}}), tmp_path / "run", progress=False)
        ),
        lambda: dcase(root=path, **form),
        lambda: folder(root=path, **form),
        lambda: make(path, "synthetic_scenes"),
    ):
        with pytest.raises(kdlib.KdlibError):
            use()
