"""Files from others: whatever is put in the place of what a loader reads, nothing of it is run and it is refused."""

import functools
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

import kdlib
from kdlib.building import load_weights
from kdlib.cache import Cache, filled
from kdlib.cli import app
from kdlib.digits import DigitsMLP, digits
from kdlib.files import write_sums
from kdlib.recipe import read
from kdlib.run import LARGEST, run
from kdlib.sources import Stored
from kdlib.store import _beside, _seal
from kdlib.storing import build_store
from kdlib_asc.audio import read_audio
from kdlib_asc.datasets import dcase, folder

RECIPE = {
    "name": "few",
    "data": {"kind": "digits", "train": 60, "valid": 0},
    "train": {"epochs": 1, "threads": 1},
    "model": {"kind": "digits_mlp", "width": 4},
    "source": {"kind": "same_input"},
    "points": {"soft": {"kind": "soft_labels"}},
    "scorer": {"kind": "svm"},
}
TEACHER = DigitsMLP(width=4)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# what is put there: functions of the path and of where the marker would be


def a_pickle(path, marker):
    path.write_bytes(pickle.dumps({"state_dict": Trap(marker)}))


def an_old_pickle(path, marker):
    path.write_bytes(pickle.dumps([Trap(marker)], protocol=0))


def a_torch_file(path, marker):
    torch.save({"a": Trap(marker)}, path)


def an_old_torch_file(path, marker):
    torch.save({"a": Trap(marker)}, path, _use_new_zipfile_serialization=False)


def a_numpy_file(path, marker):
    np.save(kept := io.BytesIO(), np.array([Trap(marker)], dtype=object), allow_pickle=True)
    path.write_bytes(kept.getvalue())


def a_numpy_archive(path, marker):
    np.savez(kept := io.BytesIO(), a=np.array([Trap(marker)], dtype=object))
    path.write_bytes(kept.getvalue())


def a_compressed_pickle(path, marker):
    path.write_bytes(gzip.compress(pickle.dumps(Trap(marker))))


def a_zip_that_leaves_its_folder(path, marker):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../" * 9 + marker.lstrip("/"), "slipped")
        archive.writestr(marker, "slipped")


def a_tar_that_leaves_its_folder(path, marker):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo(marker))
        link = tarfile.TarInfo("x")
        link.type, link.linkname = tarfile.SYMTYPE, marker
        archive.addfile(link)


def a_program(path, marker):
    path.write_text(f"import os\nos.mkdir({marker!r})\n")


def class_paths(path, marker):
    call = {"kind": "os.mkdir", "path": marker, "_target_": "os.mkdir", "class": "os:mkdir", "__reduce__": ["os.mkdir"]}
    path.write_text(json.dumps({**RECIPE, "model": call, "data": call, "scorer": call, "plugins": ["os"], "rows": []}))


def class_paths_in_toml(path, marker):
    path.write_text(f'plugin = "os"\n[data]\nkind = "os.mkdir"\npath = "{marker}"\n[model]\nkind = "os:mkdir"\n')


def objects_in_yaml(path, marker):
    path.write_text(f"!!python/object/apply:os.mkdir ['{marker}']\n")


def deep_json(path, _):
    path.write_text('{"data":' * 100_000)


def json_at_the_limit(path, _):
    path.write_text('{"data":' * 900 + "1" + "}" * 900)


def wide_json(path, _):
    path.write_text("{" + ",".join(f'"k{number}":[]' for number in range(30_000)) + "}")


def deep_toml(path, _):
    path.write_text("a = " + "[" * 100_000)


def dotted_toml(path, _):
    path.write_text("a." * 200_000 + "a = 1")


def many_dots(path, _):
    path.write_text("\n".join(f"{'a.' * 290}k{number} = 1" for number in range(800)))


def long_number(path, _):
    path.write_text("data = " + "9" * 400_000)


def header_of_two_gigabytes(path, _):
    path.write_bytes(struct.pack("<Q", 1 << 31) + b"{" + bytes(100))


def header_of_all_there_is(path, _):
    path.write_bytes(struct.pack("<Q", (1 << 64) - 1) + b"{}")


def tensors(path, header, data=bytes(64)):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def overlapping_tensors(path, _):
    one = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    tensors(path, {"logits": one, "x": one, "layers.0.weight": {**one, "shape": [8], "data_offsets": [32, 64]}})


def tensors_beyond_the_end(path, _):
    tensors(path, {"logits": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})


def tensor_of_a_negative_place(path, _):
    tensors(path, {"logits": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}})


def tensor_whose_shape_overflows(path, _):
    tensors(path, {"logits": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 64]}})


def notes_that_are_deep(path, _):
    one = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    tensors(path, {"__metadata__": {"classes": "[" * 50_000}, "logits": one})


def a_pipe(path, _):
    os.mkfifo(path)


def an_endless_device(path, _):
    path.symlink_to("/dev/zero")


def a_link_to_itself(path, _):
    path.symlink_to(path)


def a_folder(path, _):
    path.mkdir()


def sixty_four_gigabytes(path, _):
    with path.open("wb") as file:
        file.truncate(1 << 36)


def nothing(path, _):
    path.write_bytes(b"")


KINDS = (
    *(a_pickle, an_old_pickle, a_torch_file, an_old_torch_file, a_numpy_file, a_numpy_archive, a_compressed_pickle),
    *(a_zip_that_leaves_its_folder, a_tar_that_leaves_its_folder, a_program, class_paths, class_paths_in_toml),
    *(objects_in_yaml, deep_json, json_at_the_limit, wide_json, deep_toml, dotted_toml, many_dots, long_number),
    *(header_of_two_gigabytes, header_of_all_there_is, overlapping_tensors, tensors_beyond_the_end),
    *(tensor_of_a_negative_place, tensor_whose_shape_overflows, notes_that_are_deep, a_pipe, an_endless_device),
    *(a_link_to_itself, a_folder, sixty_four_gigabytes, nothing),
)


# what reads it: where it is put, and the call. Checksums beside are forged to fit, as whoever made the file could


class Known(kdlib.TensorPart):
    """A part whose items are known again."""

    def fingerprint(self, index):
        return str(index)


@functools.cache
def part_of():
    whole = digits(train=60, valid=0).train
    return Known(whole.x, whole.labels)


def cached(place):
    kept = filled(torch.nn.Identity(), part_of(), Cache(place / "cache"), lambda i: {"x": part_of().x[i]})
    return kept.take([0])


def readable(path):
    return path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 30


def in_a_run(place):
    if all(readable(place / "run" / name) for name in LARGEST):
        write_sums(place / "run", LARGEST)
    return kdlib.load_run(place / "run")


def sealed(read, folder):
    def reading(place):
        for path in place.glob(f"{folder}/*.safetensors"):
            if readable(path):
                _beside(path).write_bytes(_seal(path, path.read_bytes()))
        return read(place)

    return reading


def stored(place):
    return Stored(folder=place / "store").stores[0].take([0])


FORM = {"rate": 8000, "channels": 1, "seconds": 1.0}
SHARD = "00000.safetensors"
LOADERS = {
    "weights of a run": ("run/main/student.safetensors", in_a_run),
    "scorer of a run": ("run/main/student-scorer.safetensors", in_a_run),
    "recipe of a run": ("run/recipe.json", in_a_run),
    "result of a run": ("run/result.json", in_a_run),
    "checksums of a run": ("run/SHA256SUMS", lambda place: kdlib.load_run(place / "run")),
    "teacher.weights": ("teacher.safetensors", lambda p: load_weights(DigitsMLP(width=4), p / "teacher.safetensors")),
    "weights named .pt": ("teacher.pt", lambda p: load_weights(DigitsMLP(width=4), p / "teacher.pt")),
    "recipe in TOML": ("own.toml", lambda place: read(place / "own.toml")),
    "recipe in JSON": ("own.json", lambda place: read(place / "own.json")),
    "store manifest": ("store/manifest.json", stored),
    "store shard": (f"store/{SHARD}", sealed(stored, "store")),
    "store sidecar": (f"store/{SHARD}.sha256", stored),
    "store verified": (
        f"store/{SHARD}",
        sealed(lambda p: app(["store", "verify", str(p / "store")], standalone_mode=False), "store"),
    ),
    "cache shard": (f"cache/*/{SHARD}", sealed(cached, "cache/*")),
    "clip": ("clip.wav", lambda place: read_audio(place / "clip.wav", pad=True, crop=True, **FORM)),
    "clip to predict": (
        "clip.flac",
        lambda p: app(["predict", str(p / "run"), str(p / "clip.flac")], standalone_mode=False),
    ),
    "meta.csv": ("set/meta.csv", lambda place: dcase(root=place / "set", **FORM)),
    "list of a fold": ("set/evaluation_setup/fold1_train.txt", lambda place: dcase(root=place / "set", **FORM)),
    "clip of a class": ("classes/bus/a.wav", lambda p: folder(root=p / "classes", test=0.5, **FORM).train[0, 0]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run, a store, a cache and data sets, as kdlib writes and reads them."""
    place = tmp_path_factory.mktemp("hostile")
    run(read(RECIPE), place / "run", progress=False)
    build_store(kdlib.SameInput(kdlib.freeze(TEACHER)), part_of(), place / "store", threads=1)
    cached(place)
    (place / "set" / "evaluation_setup").mkdir(parents=True)
    (place / "set" / "meta.csv").write_text("filename\tscene_label\n")
    for name in ("train", "test"):
        (place / "set" / "evaluation_setup" / f"fold1_{name}.txt").write_text("")
    (place / "classes" / "bus").mkdir(parents=True)
    return place


def refusal(load, place):
    """Return what a loader says against what is there, or nothing where it takes it."""
    try:
        load(place)
    except kdlib.KdlibError as error:
        return str(error)
    return ""


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*made anew:UserWarning")  # of a cache, which is made anew
@pytest.mark.parametrize("loader", LOADERS)
def test_of_any_file_nothing_is_run_and_it_is_refused(good, tmp_path, table, loader, monkeypatch):
    pattern, load = LOADERS[loader]
    marker = tmp_path / "sprung"
    monkeypatch.chdir(tmp_path)
    accepted, most = [], 0
    for kind in KINDS:
        place = tmp_path / kind.__name__
        shutil.copytree(good, place)
        path = next(place.glob(pattern), place / pattern)
        path.unlink(missing_ok=True)
        kind(path, str(marker))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = refusal(load, place)
        if not said:
            accepted.append(kind)
        assert len(said) < 20_000, kind
        most = max(most, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
        assert not marker.exists(), kind
        assert [other for other in tmp_path.iterdir() if other != place] == [], kind
        shutil.rmtree(place)
    again = " or made anew" if loader == "cache shard" else ""
    table(f"malicious file as {loader}", f"no marker; all refused{again}; {most / 1000:.0f} MB taken", len(KINDS))
    assert most < 200_000  # kB
    # What is damaged in a cache is made anew, and that is said; but nothing is written over a folder.
    assert accepted == ([kind for kind in KINDS if kind is not a_folder] if loader == "cache shard" else [])
