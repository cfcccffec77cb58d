"""Files: the old one or the new one, never half of one, and a message for what cannot be read."""

import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import kdlib
from kdlib.files import (
    HOST,
    read_arrays,
    read_tensors,
    require_room,
    write_arrays,
    write_atomically,
    write_json,
    write_tensors,
)

TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "count": torch.tensor(7),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "turned": torch.arange(6.0).view(2, 3).T,
    "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "empty": torch.zeros(0, 3),
}
ARRAYS = {"vectors": np.arange(6, dtype=np.float64).reshape(2, 3).T, "classes": np.array([2, 0, 1])}
READERS = {"tensors": read_tensors, "arrays": read_arrays}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    return path


def alone(path):
    """The file stands alone in its folder: nothing is left beside it."""
    return [other.name for other in path.parent.iterdir()] == [path.name]


def test_tensors_and_notes_come_back_as_they_were(tmp_path):
    notes = {"classes": ["a", "ä", "c"], "step": 3, "none": None}
    write_tensors(tmp_path / "file", TENSORS, notes)
    tensors, read_notes = read_tensors(tmp_path / "file")
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert read_notes == notes
    assert alone(tmp_path / "file")


def test_arrays_come_back_as_they_were(tmp_path):
    write_arrays(tmp_path / "file", ARRAYS)
    arrays = read_arrays(tmp_path / "file")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


def test_notes_of_other_programs_are_read_as_text(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "file", metadata={"format": "pt"})
    assert read_tensors(tmp_path / "file")[1] == {"format": "pt"}
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "file")
    assert read_tensors(tmp_path / "file")[1] == {}


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path):
    """Tied weights: both names stand in the state dict of the bare model, and both are wanted when it loads."""
    tied = torch.nn.Linear(3, 3)
    net = torch.nn.ModuleDict({"one": tied, "two": tied})
    write_tensors(tmp_path / "file", net.state_dict())
    again = torch.nn.ModuleDict({"one": torch.nn.Linear(3, 3), "two": torch.nn.Linear(3, 3)})
    again.load_state_dict(read_tensors(tmp_path / "file")[0])
    assert torch.equal(again["one"].weight, tied.weight)
    assert torch.equal(again["two"].bias, tied.bias)


def test_the_tensors_of_the_caller_are_not_touched(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    turned = parameter.detach().T
    write_tensors(tmp_path / "file", {"a": parameter, "b": turned.clone()})
    assert parameter.requires_grad
    assert not turned.is_contiguous()


def test_json_is_written_for_people(tmp_path):
    write_json(tmp_path / "file", {"name": "ä", "list": [1, 2.5]})
    text = (tmp_path / "file").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "ä", "list": [1, 2.5]}
    assert "ä" in text
    assert text.endswith("}\n")
    assert "\n  " in text


def test_a_write_replaces_the_old_file(file):
    write_json(file, {"new": 1})
    assert json.loads(file.read_text()) == {"new": 1}
    assert alone(file)


@pytest.mark.parametrize("there", ["nothing", "file", "link that leads nowhere"])
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_write_that_does_not_replace_leaves_what_is_there(tmp_path, monkeypatch, links, there):
    asked = []

    def refuse(*names, **_):
        asked.append(names)
        raise PermissionError(1, "Operation not permitted")  # as vfat and some network disks do

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / "file"
    if there == "file":
        file.write_bytes(b"old")
    if there == "link that leads nowhere":
        file.symlink_to(tmp_path / "nowhere")
    write_atomically(file, b"new", replace=False)
    assert len(asked) == (not links)
    assert list(tmp_path.iterdir()) == [file]
    if there == "link that leads nowhere":
        assert file.is_symlink()
    else:
        assert file.read_bytes() == (b"new" if there == "nothing" else b"old")


@pytest.mark.parametrize("error", [RuntimeError("odd"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_there_and_nothing_beside_it(file, error, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr("os.fsync", fail)  # where a disk says that it is full, at the latest
    with pytest.raises((type(error), kdlib.KdlibError)) as caught:
        write_atomically(file, bytes(1234))
    assert file.read_text() == "old"
    assert alone(file)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{file}: 1,234 bytes cannot be written: No space left on device."


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(file):
    victim = file.with_name("victim")
    victim.write_text("mine")
    file.with_name(f".file.{HOST}.{os.getpid()}").symlink_to(victim)
    write_atomically(file, b"new")
    assert (file.read_text(), victim.read_text()) == ("new", "mine")
    assert not file.is_symlink()


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_made(tmp_path):
    require_room(tmp_path, 1)
    with pytest.raises(kdlib.KdlibError, match=r"1,000,000,000,000,000,000 bytes will be written, and [\d,]+ are free"):
        require_room(tmp_path, 10**18)


def test_what_is_no_tensor_or_no_json_leaves_the_old_file(file):
    for write in (lambda: write_tensors(file, {"a": 3}), lambda: write_json(file, {"a": object()})):
        with pytest.raises((AttributeError, TypeError)):
            write()
        assert file.read_text() == "old"
        assert alone(file)


WRITERS = {
    "json": lambda path: write_json(path, {"a": 1}),
    "tensors": lambda path: write_tensors(path, TENSORS),
    "arrays": lambda path: write_arrays(path, ARRAYS),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_is_not_there_is_a_message(tmp_path, kind):
    with pytest.raises(kdlib.KdlibError, match="cannot be written"):
        WRITERS[kind](tmp_path / "no" / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_is_not_written_over(tmp_path, kind):
    (tmp_path / "file").mkdir()
    with pytest.raises(kdlib.KdlibError, match="cannot be written"):
        WRITERS[kind](tmp_path / "file")
    assert alone(tmp_path / "file")
    assert (tmp_path / "file").is_dir()


@pytest.fixture
def no_room():
    """Let no file of this process grow beyond 2 MB, as on a disk that is full; a log of the tests is smaller."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


LARGE = {
    "json": lambda path: write_json(path, ["a" * 4_000_000]),
    "tensors": lambda path: write_tensors(path, {"a": torch.zeros(1_000_000)}),
    "arrays": lambda path: write_arrays(path, {"a": np.zeros(1_000_000)}),
}


@pytest.mark.parametrize("kind", LARGE)
def test_where_no_file_can_grow_the_old_one_stays_and_a_message_says_so(file, no_room, kind):
    with pytest.raises(kdlib.KdlibError, match="cannot be written") as caught:
        LARGE[kind](file)
    assert str(file) in str(caught.value)
    assert file.read_text() == "old"
    assert alone(file)


# reading


@pytest.fixture
def good(tmp_path):
    write_tensors(tmp_path / "good", {"a": torch.arange(100.0)}, {"classes": ["a"]})
    return (tmp_path / "good").read_bytes()


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:4],
        lambda good: good[:20],
        lambda good: good[:-8],
        lambda good: good + b"x",
        lambda good: b"\xff" * 8 + good[8:],
        lambda good: good[:8] + b"x" + good[9:],
        lambda good: good.replace(b"F32", b"F99"),
        lambda good: b"hello, this is no such file",
        lambda good: b"PK\x03\x04" + bytes(100),
    ],
    ids=["empty", "cut-4", "cut-head", "cut-tail", "longer", "length", "header", "type", "text", "zip"],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, good, kind, damage):
    path = tmp_path / "damaged"
    path.write_bytes(damage(good))
    with pytest.raises(kdlib.KdlibError, match="not a readable safetensors file") as caught:
        READERS[kind](path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", READERS)
def test_any_bit_that_is_turned_is_noticed(tmp_path, good, kind):
    """safetensors itself notices those of its own structure, about half of them."""
    path = tmp_path / "turned"
    header = 8 + int.from_bytes(good[:8], "little")
    draw = np.random.default_rng(0).choice(8 * len(good), 200, replace=False).tolist()
    for bit in [*range(0, 8 * header, 5), *draw]:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(kdlib.KdlibError, match=rf"{path}: (damaged|not a readable)"):
            READERS[kind](path)
    path.write_bytes(good)
    np.testing.assert_array_equal(READERS["arrays"](path)["a"], np.arange(100.0))


def test_each_bit_of_the_notes_that_tell_of_a_checksum_is_noticed(tmp_path, good):
    """A file whose checksum cannot be found any more must not pass for one of another program."""
    first, last = good.index(b'"kdlib_sha256"'), good.index(b'"classes"')
    for bit in range(8 * first, 8 * last):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / "turned").write_bytes(bad)
        with pytest.raises(kdlib.KdlibError):
            read_tensors(tmp_path / "turned")


def test_the_bytes_of_a_file_are_a_function_of_what_is_in_it(tmp_path):
    notes = {name: name for name in "gfedcba"}
    code = f"from kdlib.files import *; import torch; write_tensors(Path('b'), {{'x': torch.ones(3)}}, {notes})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    write_tensors(tmp_path / "a", {"x": torch.ones(3)}, notes)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", READERS)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(kdlib.KdlibError, match="pipe: not a file"):
        READERS[kind](tmp_path / "pipe")


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_is_not_there_is_refused_with_its_name(tmp_path, kind):
    with pytest.raises(kdlib.KdlibError, match="there is no such file") as caught:
        READERS[kind](tmp_path / "missing")
    assert str(tmp_path / "missing") in str(caught.value)
    with pytest.raises(kdlib.KdlibError):
        READERS[kind](tmp_path)


def test_notes_that_are_deep_are_text(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "file", metadata={"classes": "[" * 100_000})
    assert read_tensors(tmp_path / "file")[1] == {"classes": "[" * 100_000}


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", READERS)
def test_a_pickle_is_refused_and_not_run(tmp_path, kind):
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "model.pt")
    with pytest.raises(kdlib.KdlibError, match=r"model\.pt"):
        READERS[kind](tmp_path / "model.pt")
    assert not (tmp_path / "sprung").exists()
