"""Stores: what goes in comes out, whoever wrote it, after whatever happened; and no damage goes unnoticed."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, from_dtype
from safetensors import safe_open
from safetensors.numpy import load_file, save

import kdlib
from kdlib.files import HOST
from kdlib.store import LARGEST, MANIFEST, Store, make_store, require_same, rounded

MADE_OF = {"teacher": "sha256 of something", "classes": ["bus", "tram"], "views": 2, "deep": {"a": 1.5, "ü": None}}
ROWS, SHARD_ROWS = 11, 4
FORK = multiprocessing.get_context("fork")


def row_of(number):
    """One row, a function of its number."""
    draw = np.random.default_rng(number)
    return {
        "logits": draw.normal(size=10).astype(np.float32),
        "embedding": draw.normal(size=(2, 3)).astype(np.float16),
        "count": np.asarray(number),
    }


def stacked(rows):
    made = [row_of(number) for number in rows]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def begun(folder, made_of=MADE_OF, rows=ROWS, shard_rows=SHARD_ROWS):
    return make_store(folder, made_of, rows=rows, row=lambda: row_of(0), shard_rows=shard_rows)


def finished(folder, **more):
    store = begun(folder, **more)
    for shard in range(store.shards):
        if not store.intact(shard):
            store.write(shard, stacked(store.span(shard)))
    return store


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(one, other):
    assert set(one) == set(other)
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
        assert array.dtype == other[name].dtype


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished store; tests read it and change nothing."""
    return finished(tmp_path_factory.mktemp("store") / "made")


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


# reading


def test_rows_come_out_as_they_went_in(made):
    assert len(made) == ROWS
    for number in range(ROWS):
        same(made[number], row_of(number))
        assert all(isinstance(array, np.ndarray) for array in made[number].values())
    same(made.take(range(ROWS)), stacked(range(ROWS)))
    for name, array in stacked(range(ROWS)).items():
        np.testing.assert_array_equal(made.whole(name), array)


@pytest.mark.parametrize(
    "rows", [[10, 0, 5, 5, 4, 3], [7], [], np.array([3, 8], np.int32), torch.tensor([9, 1])], ids=str
)
def test_a_batch_is_in_the_order_that_was_asked_for(made, rows):
    taken = made.take(rows)
    for place, number in enumerate(rows):
        same({name: array[place] for name, array in taken.items()}, row_of(int(number)))
    assert {name: array.shape for name, array in taken.items()} == {
        "logits": (len(rows), 10),
        "embedding": (len(rows), 2, 3),
        "count": (len(rows),),
    }


@pytest.mark.parametrize("rows", [[-1], [0, ROWS], [10**12], [-ROWS]])
def test_a_row_that_there_is_not_is_an_index_error(made, rows):
    with pytest.raises(IndexError, match="11 rows"):
        made.take(rows)
    with pytest.raises(IndexError):
        made[rows[-1]]


@pytest.mark.parametrize("rows", [[0.5], [True, False], [[0, 1]], 3, np.zeros((2, 2), int)], ids=str)
def test_what_is_no_list_of_whole_numbers_is_refused(made, rows):
    with pytest.raises(ValueError, match="whole numbers"):
        made.take(rows)


def test_what_is_read_is_the_callers(copy):
    store = Store(copy)
    before = bytes_in(copy)
    for taken in (store[2], store.take([2, 3])):
        for array in taken.values():
            torch.from_numpy(array)  # which warns where an array is read-only
            array += 1
    store.whole("count")[:] = 0
    same(store[2], row_of(2))
    assert bytes_in(copy) == before


def test_a_pickled_store_opens_its_shards_anew(made):
    made.take(range(ROWS))
    data = pickle.dumps(made)
    assert len(data) < 5000
    same(pickle.loads(data).take([0, 10]), stacked([0, 10]))


def test_open_shards_hold_no_file_descriptors(tmp_path):
    store = make_store(tmp_path, {}, rows=40, row=lambda: {"a": np.zeros(2)}, shard_rows=1)
    for shard in range(40):
        store.write(shard, {"a": np.full((1, 2), shard, float)})
    before = len(os.listdir("/proc/self/fd"))
    np.testing.assert_array_equal(store.take(range(40))["a"][:, 0], np.arange(40))
    assert len(os.listdir("/proc/self/fd")) == before


DTYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
FORMS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from([*DTYPES, "float16", "float32", "float64"]),
        st.one_of(st.just(()), array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=3)),
    ),
    max_size=4,
)


@given(data=st.data(), forms=FORMS, rows=st.integers(0, 12), shard_rows=st.integers(1, 13))
@settings(max_examples=30, deadline=None)
def test_any_arrays_come_out_as_they_went_in_bit_for_bit(data, forms, rows, shard_rows):
    whole = {
        name: data.draw(arrays(dtype, (rows, *shape), elements=from_dtype(np.dtype(dtype)), fill=st.nothing()))
        for name, (dtype, shape) in forms.items()
    }
    row = {name: np.zeros(shape, dtype) for name, (dtype, shape) in forms.items()}
    with tempfile.TemporaryDirectory() as place:
        store = make_store(Path(place), {"any": 1}, rows=rows, row=lambda: row, shard_rows=shard_rows)
        for shard in reversed(range(store.shards)):
            span = store.span(shard)
            store.write(shard, {name: array[span.start : span.stop] for name, array in whole.items()})
        store = Store(Path(place))
        order = data.draw(st.lists(st.integers(0, rows - 1), max_size=20)) if rows else []
        taken = store.take(order)
        assert set(taken) == set(whole)
        for name, array in whole.items():
            assert taken[name].tobytes() == array[order].tobytes()
            assert store.whole(name).tobytes() == array.tobytes()
            assert taken[name].dtype == array.dtype
            assert store.whole(name).shape == array.shape


# what lies on disk


def test_the_files_are_those_that_other_programs_read(made):
    shards = [f"{shard:05}.safetensors" for shard in range(3)]
    assert sorted(bytes_in(made.folder)) == sorted([*shards, *(f"{name}.sha256" for name in shards), MANIFEST])
    for shard, name in enumerate(shards):
        same(load_file(made.folder / name), stacked(made.span(shard)))
        with safe_open(made.folder / name, "np") as file:
            assert file.metadata() == {"manifest": json.loads((made.folder / MANIFEST).read_text())["sha256"]}
    checked = subprocess.run(["sha256sum", "-c", *(f"{name}.sha256" for name in shards)], cwd=made.folder, check=False)
    assert checked.returncode == 0
    manifest = json.loads((made.folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["made_of"] == MADE_OF
    assert (manifest["rows"], manifest["shard_rows"]) == (ROWS, SHARD_ROWS)
    assert manifest["arrays"]["embedding"] == {"dtype": "float16", "shape": [2, 3]}
    plain = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert manifest["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_the_order_of_writing_leaves_no_trace(made, tmp_path):
    store = begun(tmp_path)
    for shard in (2, 0, 1, 0):
        given = stacked(store.span(shard))
        store.write(shard, {name: given[name] for name in reversed(given)})
    assert bytes_in(tmp_path) == bytes_in(made.folder)


def test_without_a_number_of_rows_a_shard_has_32_mib(tmp_path):
    store = make_store(tmp_path, {}, rows=10**6, row=lambda: {"a": np.zeros((2, 1024), np.float32)})
    assert store.manifest.shard_rows == 4096
    large = make_store(tmp_path / "large", {}, rows=3, row=lambda: {"a": np.zeros((9, 1 << 20), np.float32)})
    assert large.manifest.shard_rows == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {**arrays, "logits": arrays["logits"][:-1]},
        lambda arrays: {**arrays, "logits": arrays["logits"].astype(np.float64)},
        lambda arrays: {**arrays, "more": arrays["count"]},
        lambda arrays: {"logits": arrays["logits"]},
    ],
    ids=["rows", "type", "more", "fewer"],
)
def test_arrays_that_are_not_those_of_the_manifest_are_not_written(tmp_path, change):
    store = begun(tmp_path)
    with pytest.raises(ValueError, match=r"00001\.safetensors takes"):
        store.write(1, change(stacked(store.span(1))))
    assert list(bytes_in(tmp_path)) == [MANIFEST]


@pytest.mark.parametrize(
    "array", [np.zeros(2, complex), np.array(["a"]), np.array([None]), np.zeros(1, "M8[s]")], ids=str
)
def test_an_array_of_a_type_that_has_no_place_is_refused(tmp_path, array):
    with pytest.raises(kdlib.DataError, match=r"'odd' is .*; a store keeps bool, uint8"):
        make_store(tmp_path, {}, rows=1, row=lambda: {"odd": array})
    assert list(tmp_path.iterdir()) == []


# resuming


def test_what_is_there_is_not_asked_for_again(made, copy):
    def never():
        raise AssertionError

    store = make_store(copy, MADE_OF, rows=ROWS, row=never)
    assert [store.intact(shard) for shard in range(3)] == [True] * 3


@pytest.mark.parametrize("left", ["nothing", "shard", "both", "old sidecar"])
def test_what_is_missing_is_written_without_a_word(made, copy, left):
    """A writer that was killed leaves a shard without its sidecar; a shard that was deleted leaves the sidecar."""
    path = copy / "00001.safetensors"
    if left in ("nothing", "old sidecar"):
        path.unlink()
    if left in ("nothing", "shard"):
        path.with_name(f"{path.name}.sha256").unlink()
    if left == "old sidecar":
        with pytest.warns(match="there is no such file"):
            finished(copy)
    else:
        finished(copy)
    assert bytes_in(copy) == bytes_in(made.folder)


def test_what_is_damaged_is_written_again_and_said(made, copy):
    for name in ("00000.safetensors", "00002.safetensors.sha256"):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    with pytest.warns(match="damaged") as caught:
        finished(copy)
    assert ["00000" in str(caught[0].message), "00002" in str(caught[1].message)] == [True, True]
    assert bytes_in(copy) == bytes_in(made.folder)
    same(Store(copy).take(range(ROWS)), stacked(range(ROWS)))


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(copy):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine, theirs = f".00000.safetensors.{HOST}.", ".00000.safetensors.ffffffff."
    names = [f"{mine}{ended.pid}", f"{mine}{10**30}", f"{mine}{os.getpid()}", f"{mine}1", f"{theirs}{ended.pid}", ".x"]
    for name in names:
        (copy / name).write_bytes(b"half")
    begun(copy)
    assert [(copy / name).exists() for name in names] == [False, False, True, True, True, True]


def writer(folder, rows, start):
    start.wait()
    finished(folder, rows=rows)


def started(folder, rows, count):
    """Return processes that write one store, all set off at once."""
    start = FORK.Event()
    processes = [FORK.Process(target=writer, args=(folder, rows, start)) for _ in range(count)]
    for process in processes:
        process.start()
    start.set()
    return processes


def test_three_who_write_at_once_write_the_same(tmp_path):
    expected = finished(tmp_path / "alone", rows=200)
    processes = started(tmp_path / "all", 200, 3)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert bytes_in(tmp_path / "all") == bytes_in(expected.folder)


def test_after_kills_the_rest_is_written_and_the_bytes_are_those_of_an_uninterrupted_writer(tmp_path):
    expected = bytes_in(finished(tmp_path / "alone", rows=300).folder)
    folder, returned = tmp_path / "killed", []
    for wanted in (1, 12, 24, 36, 48):
        (process,) = started(folder, 300, 1)
        while len(list(folder.glob("*.sha256"))) < wanted and process.is_alive():
            time.sleep(0.0005)
        process.kill()
        process.join()
        returned.append(process.exitcode)
    assert returned == [-signal.SIGKILL] * 5
    assert 48 <= sum(name.endswith(".sha256") for name in bytes_in(folder)) < 75
    finished(folder, rows=300)
    assert bytes_in(folder) == expected


# damage


def flips(size, count, seed):
    """Bits to turn: the first and last of a file, and others all over it."""
    draw = np.random.default_rng(seed)
    return sorted({0, 1, 7, 8 * size - 1, *draw.choice(8 * size, size=min(count, 8 * size), replace=False).tolist()})


@pytest.mark.parametrize(
    ("name", "count"), [("00001.safetensors", 400), ("00001.safetensors.sha256", 250), (MANIFEST, 400)]
)
def test_any_bit_that_is_turned_is_noticed(copy, name, count):
    path = copy / name
    good = path.read_bytes()
    turned = flips(len(good), count, len(name))
    assert len(turned) >= 250
    for bit in turned:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(kdlib.DataError) as caught:
            Store(copy).take([4])
        assert str(copy / name.removesuffix(".sha256")) in str(caught.value)
        assert "anew" in str(caught.value)
        path.write_bytes(good)
    same(Store(copy).take(range(ROWS)), stacked(range(ROWS)))


@pytest.mark.parametrize("name", ["00001.safetensors", "00001.safetensors.sha256", MANIFEST])
def test_any_file_that_is_cut_or_longer_is_noticed(copy, name):
    path = copy / name
    good = path.read_bytes()
    for bad in [good[: len(good) * part // 25] for part in range(25)] + [
        good[:-1],
        good + b"\0",
        good + b"\n",
        good * 2,
    ]:
        path.write_bytes(bad)
        with pytest.raises(kdlib.DataError, match=r"00001\.safetensors|manifest\.json"):
            Store(copy).take([4])
    path.write_bytes(good)
    same(Store(copy).take([4]), stacked([4]))


@pytest.mark.parametrize("name", ["00001.safetensors", "00001.safetensors.sha256", MANIFEST])
@pytest.mark.parametrize("what", ["missing", "folder", "dangling link"])
def test_a_file_that_is_none_is_named(copy, name, what):
    (copy / name).unlink()
    if what == "folder":
        (copy / name).mkdir()
    if what == "dangling link":
        (copy / name).symlink_to(copy / "nowhere")
    with pytest.raises(kdlib.DataError, match=r"00001\.safetensors|manifest\.json"):
        Store(copy).take([4])


def test_a_shard_in_the_place_of_another_is_noticed(copy):
    for end in ("", ".sha256"):
        shutil.copy(copy / f"00000.safetensors{end}", copy / f"00001.safetensors{end}")
    with pytest.raises(kdlib.DataError, match=r"00001\.safetensors: damaged"):
        Store(copy)[4]


def test_other_shards_can_be_read_beside_a_damaged_one(copy):
    (copy / "00001.safetensors").write_bytes(b"")
    store = Store(copy)
    same(store.take([0, 10]), stacked([0, 10]))
    with pytest.raises(kdlib.DataError):
        store.take([0, 5])


def sealed(manifest):
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    whole = {**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    "change",
    [
        {"store": 1},
        {"made_with": []},
        {"rows": -1},
        {"rows": 1e3},
        {"shard_rows": 0},
        {"arrays": {"logits": {"dtype": "object", "shape": [10]}}},
        {"arrays": {"logits": {"dtype": "float32", "shape": [-10]}}},
        {"arrays": {"logits": {"dtype": "float32", "shape": [10], "file": "/etc/passwd"}}},
        {"arrays": []},
        {"shards": ["../../elsewhere.safetensors"]},
    ],
    ids=str,
)
def test_a_manifest_with_a_true_checksum_and_other_contents_is_refused(copy, change):
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    del manifest["sha256"]
    (copy / MANIFEST).write_text(sealed(manifest), encoding="utf-8")
    Store(copy)[0]  # the control
    (copy / MANIFEST).write_text(sealed({**manifest, **change}), encoding="utf-8")
    with pytest.raises(kdlib.DataError, match=r"manifest\.json: damaged, or not a store's"):
        Store(copy)


def test_a_store_of_the_form_before_says_what_to_do(copy):
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    del manifest["sha256"], manifest["made_with"]
    (copy / MANIFEST).write_text(sealed({**manifest, "store": 1}), encoding="utf-8")
    with pytest.raises(kdlib.DataError, match=r"store: Input should be 2\. Delete the folder and make it anew"):
        Store(copy)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"sha256"',
        b"[" * 10**5,
        b'{"sha256": NaN}',
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
        b"PK\3\4",
    ],
    ids=[*"abcdefghij"],
)
def test_a_manifest_that_is_none_is_refused(copy, text):
    (copy / MANIFEST).write_bytes(text)
    with pytest.raises(kdlib.DataError, match=r"manifest\.json: damaged, or not a store's"):
        Store(copy)


def test_a_manifest_is_of_bounded_size(tmp_path):
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(kdlib.DataError, match=r"manifest\.json"):
        Store(tmp_path)
    with pytest.raises(kdlib.DataError, match=f"at most {LARGEST} bytes"):
        begun(tmp_path / "new", made_of={"long": "a" * LARGEST})
    assert not (tmp_path / "new" / MANIFEST).exists()


def put_first(folder, data):
    """Put bytes in the place of the first shard, with a true checksum."""
    (folder / "00000.safetensors").write_bytes(data)
    seal = f"{hashlib.sha256(data).hexdigest()}  00000.safetensors\n"
    (folder / "00000.safetensors.sha256").write_text(seal)


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        {"logits": 3},
        {"logits": {"data_offsets": 3}},
        {"logits": {"data_offsets": [0]}},
        {"logits": {"data_offsets": [0, 10**20]}},
        {"logits": {"data_offsets": [-160, 0]}},
        {"logits": {"data_offsets": ["0", "160"]}},
        {"logits": {"data_offsets": [0, 156]}},
        {"__metadata__": []},
        {"__metadata__": {}},
    ],
    ids=str,
)
def test_a_shard_with_a_true_checksum_and_other_contents_is_refused(tmp_path, header):
    store = make_store(tmp_path, {}, rows=4, row=lambda: {"logits": np.zeros(10, np.float32)})
    if isinstance(header, dict) and header:
        header = {"__metadata__": {"manifest": store.manifest.sha256()}} | header
    text = json.dumps(header).encode()
    put_first(tmp_path, len(text).to_bytes(8, "little") + text + bytes(160))
    with pytest.raises(kdlib.DataError, match=r"00000\.safetensors: holds something else than manifest\.json says"):
        store[0]


def test_a_manifest_that_tells_of_more_shards_than_any_disk_has_costs_nothing(copy):
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    del manifest["sha256"]
    (copy / MANIFEST).write_text(sealed({**manifest, "rows": 10**18, "shard_rows": 4}), encoding="utf-8")
    store = Store(copy)
    assert store.finished() == [0, 1, 2]
    with pytest.raises(kdlib.DataError, match="not finished"):
        store.whole("logits")
    (copy / MANIFEST).write_text(sealed({**manifest, "rows": 10**18, "shard_rows": 10**18}), encoding="utf-8")
    owner = {"manifest": Store(copy).manifest.sha256()}
    put_first(copy, save(load_file(copy / "00000.safetensors"), metadata=owner))
    with pytest.raises(kdlib.DataError, match="holds something else"):
        Store(copy).whole("logits")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["00001.safetensors", "00001.safetensors.sha256", MANIFEST])
def test_a_pipe_or_a_device_is_not_waited_for(copy, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (copy / name).unlink()
        make(copy / name)
        with pytest.raises(kdlib.DataError, match=f"{name}: not a file"):
            Store(copy).take([4])


def test_a_shard_far_larger_than_its_rows_is_refused_without_a_look_at_its_checksum(copy):
    with (copy / "00001.safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(kdlib.DataError, match=r"1,099,511,627,776 bytes, more than manifest\.json says"):
        Store(copy).take([4])


# made of something else


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"made_of": {**MADE_OF, "teacher": "other"}}, ['made_of.teacher: there "sha256 of something", here "other"']),
        (
            {"made_of": {**MADE_OF, "classes": ["tram", "bus"]}},
            ['classes.0: there "bus", here "tram"', 'classes.1: there "tram", here "bus"'],
        ),
        ({"made_of": {**MADE_OF, "classes": ["bus"]}}, ['made_of.classes.1: there "tram", here nothing']),
        (
            {"made_of": {**MADE_OF, "deep": {"a": 2}, "new": True}},
            ["deep.a: there 1.5, here 2", "new: there nothing, here true"],
        ),
        ({"made_of": {**MADE_OF, "views": 2.0}}, ["made_of.views: there 2, here 2.0"]),
        ({"rows": 12}, ["rows: there 11, here 12"]),
        ({"shard_rows": 5}, ["shard_rows: there 4, here 5"]),
    ],
    ids=["value", "order", "fewer", "several", "type", "rows", "shard rows"],
)
def test_a_store_of_something_else_is_refused_and_both_sides_are_named(copy, change, lines):
    before = bytes_in(copy)
    with pytest.raises(kdlib.DataError, match="was made of something else") as caught:
        begun(copy, **change)
    assert str(copy) in str(caught.value)
    for line in lines:
        assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 + len(lines)
    assert bytes_in(copy) == before


def test_of_many_differences_some_are_spelt_out(copy):
    with pytest.raises(kdlib.DataError) as caught:
        begun(copy, made_of={**MADE_OF, "classes": [f"class {number}" for number in range(1000)]})
    assert len(str(caught.value)) < 2000
    assert "and 990 more" in str(caught.value)


# another manifest


@pytest.fixture
def orphans(copy):
    """The shards of a store whose manifest was deleted."""
    (copy / MANIFEST).unlink()
    return copy


def test_shards_that_another_manifest_left_are_not_read(made, orphans):
    store = begun(orphans, made_of={**MADE_OF, "teacher": "other"})
    reads = (store.__getitem__, store.check, lambda _: store.whole("logits"), lambda _: store.take([10]))
    for read in reads:
        with pytest.raises(kdlib.DataError, match=r"0000\d\.safetensors: belongs to another store") as caught:
            read(0)
        for one in (made, store):
            assert one.manifest.sha256() in str(caught.value)
        assert "Build this store again" in str(caught.value)


def test_shards_that_another_manifest_left_are_written_again_and_said(orphans, tmp_path):
    other = {**MADE_OF, "teacher": "other"}
    expected = bytes_in(finished(tmp_path / "alone", made_of=other).folder)
    with pytest.warns(match=r"belongs to another store.*made anew") as caught:
        finished(orphans, made_of=other)
    assert len(caught) == 3
    assert bytes_in(orphans) == expected


def test_shards_are_found_again_by_the_same_manifest(made, orphans):
    store = begun(orphans)
    assert [store.intact(shard) for shard in range(3)] == [True] * 3
    assert bytes_in(orphans) == bytes_in(made.folder)


def test_a_shard_that_names_no_manifest_is_not_read(copy):
    put_first(copy, save(stacked(range(4))))
    with pytest.raises(kdlib.DataError, match=r"00000\.safetensors: holds something else than manifest\.json says"):
        Store(copy)[0]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_a_manifest_that_somebody_else_made_meanwhile_stays_and_is_compared(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)

    def overtaken():
        begun(tmp_path, made_of={**MADE_OF, "teacher": "first"})
        return row_of(0)

    with pytest.raises(kdlib.DataError, match=r'made_of\.teacher: there "first", here "sha256 of something"'):
        make_store(tmp_path, MADE_OF, rows=ROWS, row=overtaken)
    assert Store(tmp_path).manifest.made_of["teacher"] == "first"
    assert list(bytes_in(tmp_path)) == [MANIFEST]


def refuse_links(*_, **__):
    raise PermissionError(errno.EPERM, "Operation not permitted")  # as vfat and some network disks do


def maker(folder, number, start, told):
    start.wait()
    try:
        begun(folder, made_of={**MADE_OF, "teacher": number})
        told.put("made")
    except kdlib.DataError as error:
        told.put(str(error))


def test_of_several_who_make_different_stores_at_once_one_does(tmp_path):
    for attempt in range(5):
        folder, start, told = tmp_path / str(attempt), FORK.Barrier(4), FORK.Queue()
        processes = [FORK.Process(target=maker, args=(folder, number, start, told)) for number in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        there = Store(folder).manifest.made_of["teacher"]
        found = sorted((told.get(timeout=10) for _ in processes), key=len)
        assert found[0] == "made"
        assert all(f"made_of.teacher: there {there}, here" in text for text in found[1:])


def test_what_it_was_made_with_is_kept_and_compared_by_who_asks(tmp_path):
    for number in (1, 2):
        store = make_store(tmp_path, {}, rows=1, row=lambda: {"a": np.zeros(1)}, made_with={"versions": {"n": number}})
    require_same(store, made_with={"versions": {"n": 1}})
    with pytest.raises(kdlib.DataError, match=r"made_with\.versions\.n: there 1, here 2"):
        require_same(store, made_with={"versions": {"n": 2}})


@pytest.mark.parametrize("size", [65504, 65519.996, -65519.996])
def test_what_rounds_to_the_largest_float16_is_kept(size):
    kept, error = rounded(np.float32([[size]]))
    assert kept.tolist() == [[np.copysign(65504, size)]]
    assert error <= abs(size) * 2**-11


@pytest.mark.parametrize("size", [65520, -65520, np.inf, np.nan])
def test_what_rounds_beyond_the_largest_float16_has_no_finite_error(size):
    _, error = rounded(np.float32([[0, size]]))
    assert not np.isfinite(error).any()


# disks


FULL = """
import resource, signal, sys
sys.path[:0] = [{tests!r}]
import numpy as np
import kdlib
from kdlib.store import make_store
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = make_store(Path(sys.argv[1]), {{}}, rows=20_000, row=lambda: {{"a": np.zeros(4)}}, shard_rows=2_000)
for shard in range(store.shards):
    wide = store.span(shard)
    if shard == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 100_000))
    try:
        store.write(shard, {{"a": np.full((len(wide), 4), shard, float)}})
    except kdlib.KdlibError as error:
        print(error)
        break
"""


def test_where_the_disk_is_full_a_message_names_the_file_and_earlier_shards_stay(tmp_path):
    code = FULL.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == f"{tmp_path / '00004.safetensors'}: 64,168 bytes cannot be written: File too large.\n"
    shards = [f"{shard:05}.safetensors" for shard in range(4)]
    assert sorted(bytes_in(tmp_path)) == sorted([*shards, *(f"{name}.sha256" for name in shards), MANIFEST])
    np.testing.assert_array_equal(Store(tmp_path).take(range(8000))["a"][:, 0], np.arange(8000) // 2000)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(kdlib.KdlibError, match=r"file/store: cannot be made: Not a directory"):
        begun(tmp_path / "file" / "store")


@pytest.mark.parametrize("name", ["with spaces", "ä-Ω-🚋", "line\nbreak", "%s", "a" * 200])
def test_odd_names_of_folders_are_folders(tmp_path, name):
    same(finished(tmp_path / name)[10], row_of(10))
    same(Store(tmp_path / name)[10], row_of(10))


def test_a_folder_that_is_read_only_can_be_read(copy):
    for path in (*copy.iterdir(), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        same(Store(copy).take(range(ROWS)), stacked(range(ROWS)))
        assert begun(copy).intact(1)
    finally:
        copy.chmod(0o755)
