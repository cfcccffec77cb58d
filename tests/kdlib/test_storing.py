"""Building soft labels: from any source or run, by any number of processes, after any kill; and what is refused."""

import io
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib import storing
from kdlib.checking import check
from kdlib.cli import main
from kdlib.estimate import estimate
from kdlib.recipe import read
from kdlib.run import run
from kdlib.sources import Ema, Ensemble, Stored
from kdlib.store import Store
from kdlib.storing import build_store, rounding

FORK = multiprocessing.get_context("fork")
ROWS = 50


def part_of(rows=ROWS, scale=1.0, kind=kdlib.TensorPart):
    return kind(scale * torch.randn(rows, 6, generator=kdlib.keyed(0, "x")), [row % 3 for row in range(rows)])


def teacher(seed=0):
    net = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.randn(3, 6, generator=kdlib.keyed(seed, "net")))
    return kdlib.freeze(kdlib.Tapped(net, logits=""))


class Doubled:
    """The teacher sees the input twice as large, or so."""

    def __init__(self, teacher, *, factor: float = 2.0):
        self.teacher = teacher
        self.factor = factor

    def __call__(self, batch):
        return self.teacher(self.factor * batch["x"])


class Slow(Doubled):
    def __call__(self, batch):
        time.sleep(0.002)
        return super().__call__(batch)


class Noisy(Doubled):
    """Noise of its own in every epoch."""

    augmented = True

    def __call__(self, batch):
        clean = batch["epoch"].view(-1, 1) == kdlib.CLEAN
        return self.teacher(batch["x"] + torch.randn_like(batch["x"]).masked_fill(clean, 0))


def first_epoch(rows):
    """What else a batch that passed through the source tells of its rows."""
    return {name: torch.zeros(rows, dtype=torch.int64) for name in ("epoch", "stored")}


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# by whom, and after what


def test_a_source_that_says_that_it_changes_by_itself_has_a_view_of_each_epoch(tmp_path):
    assert len(build_store(Doubled(teacher()), part_of(), tmp_path / "still", views=3)) == ROWS
    store = build_store(Noisy(teacher()), part_of(), tmp_path / "noisy", views=3)
    assert len(store) == 4 * ROWS
    source = Stored(folder=tmp_path / "noisy")
    rows = {"index": torch.zeros(4, dtype=torch.int64), "epoch": torch.tensor([kdlib.CLEAN, 0, 1, 2])}
    rows["stored"] = torch.zeros_like(rows["index"])
    assert len(source(rows)["logits"].unique(dim=0)) == 4


def as_rank(folder, rank, world):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    build_store(Doubled(teacher()), part_of(), folder, batch=1)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_bytes_of_one(tmp_path, world):
    store = build_store(Doubled(teacher()), part_of(), tmp_path / "one", batch=1)
    assert store.shards == 4
    processes = [FORK.Process(target=as_rank, args=(tmp_path / "some", rank, world)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
    assert bytes_in(tmp_path / "some") == bytes_in(tmp_path / "one")


def test_a_rank_writes_its_share_alone_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    said = []
    for rank in (1, 0, 2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        store = build_store(Doubled(teacher()), part_of(), tmp_path, batch=1)
        said.append((store.finished(), capsys.readouterr().out))
    assert [shards for shards, _ in said] == [[1], [0, 1, 3], [0, 1, 2, 3]]
    first, second, last = (text for _, text in said)
    assert first == (
        "soft labels: rank 1 of 3 has written its share; 3 of 4 shards are missing, which other ranks write. "
        f"'kdlib store info {tmp_path}' tells how many there are, and 'kdlib store verify' whether they are whole.\n"
    )
    assert "rank 0 of 3 has written its share; 1 of 4 shards are missing" in second
    assert last == ""  # nothing is missing, and nothing is said


def test_ranks_of_a_process_group_wait_and_say_nothing_of_missing_shards(tmp_path):
    said = FORK.Queue()
    processes = [FORK.Process(target=in_group, args=(tmp_path, rank, said)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [said.get(timeout=10) for _ in processes] == [(4, ""), (4, "")]


def in_group(folder, rank, said):
    address = f"file://{folder}/rendezvous"
    with redirect_stdout(io.StringIO()) as out:
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
        store = build_store(Doubled(teacher()), part_of(), folder / "store", batch=1)
        torch.distributed.destroy_process_group()
    said.put((len(store.finished()), out.getvalue()))


def test_after_kills_the_rest_is_computed_and_the_bytes_are_those_of_an_uninterrupted_build(tmp_path):
    def build(folder):
        build_store(Slow(teacher()), part_of(160), folder, batch=1)

    build(tmp_path / "whole")
    exits = []
    for wanted in (1, 3, 6):
        process = FORK.Process(target=build, args=(tmp_path / "killed",))
        process.start()
        while len(list((tmp_path / "killed").glob("*.sha256"))) < wanted and process.is_alive():
            time.sleep(0.0005)
        process.kill()
        process.join()
        exits.append(process.exitcode)
    assert exits == [-signal.SIGKILL] * 3
    assert len(list((tmp_path / "killed").glob("*.sha256"))) < 10
    build(tmp_path / "killed")
    assert bytes_in(tmp_path / "killed") == bytes_in(tmp_path / "whole")


def test_a_finished_store_is_opened_and_not_written_again(tmp_path):
    build_store(Doubled(teacher()), part_of(), tmp_path, batch=4)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    build_store(Doubled(teacher()), part_of(), tmp_path, batch=4)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_damaged_shard_is_made_anew(tmp_path):
    build_store(Doubled(teacher()), part_of(), tmp_path, batch=4)
    before, path = bytes_in(tmp_path), tmp_path / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="damaged.*made anew"):
        build_store(Doubled(teacher()), part_of(), tmp_path, batch=4)
    assert bytes_in(tmp_path) == before


def test_the_callers_random_state_and_threads_are_left_alone(tmp_path):
    source, state, threads = Doubled(teacher()), torch.get_rng_state(), torch.get_num_threads()
    build_store(source, part_of(), tmp_path, threads=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# what it is made of


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"source": Doubled(teacher(), factor=3.0)}, r"source\.settings\.factor: there 2\.0, here 3\.0"),
        ({"source": Doubled(teacher(1))}, r"source\.teacher\.state: there \"\w+\", here \"\w+\""),
        ({"source": kdlib.SameInput(teacher())}, r"source\.class: there .*Doubled\", here .*SameInput\""),
        ({"part": part_of(49)}, "rows: there 50, here 49"),
        ({"dtype": "float16"}, 'dtype: there "float32", here "float16"'),
        ({"batch": 5}, "block: there 4, here 5"),
        ({"seed": 1}, "seed: there 0, here 1"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused_with_both_sides(tmp_path, more, words):
    arguments = {"source": Doubled(teacher()), "part": part_of(), "batch": 4, "threads": 1}
    for index, one in enumerate((arguments, {**arguments, **more})):
        source, part, *_ = one.pop("source"), one.pop("part")
        if index == 0:
            build_store(source, part, tmp_path, **one)
            arguments |= {"source": source, "part": part}
            continue
        with pytest.raises(kdlib.DataError, match=words):
            build_store(source, part, tmp_path, **one)


def made_elsewhere(monkeypatch, change):
    """Be another machine for the build: its versions, its threads, or its kind of device."""
    if change == "versions":
        monkeypatch.setattr(storing, "versions", lambda *names: dict.fromkeys(names, "2.99.0"))
    if change == "device":
        monkeypatch.setattr(storing, "device_of", lambda _: SimpleNamespace(type="cuda"))
    return {"threads": 2 if change == "threads" else 1}


@pytest.mark.parametrize("change", ["versions", "threads", "device"])
def test_a_finished_store_is_opened_with_other_versions_threads_and_device(tmp_path, monkeypatch, change):
    build_store(Doubled(teacher()), part_of(), tmp_path, batch=1, threads=1)
    before = bytes_in(tmp_path)
    more = made_elsewhere(monkeypatch, change)
    store = build_store(Doubled(teacher()), part_of(), tmp_path, batch=1, **more)
    assert store.manifest.made_with["threads"] == 1
    assert bytes_in(tmp_path) == before


@pytest.mark.parametrize("left", ["missing", "damaged"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("versions", r'made_with\.versions\.torch: there ".*", here "2\.99\.0"'),
        ("threads", r"made_with\.threads: there 1, here 2"),
        ("device", r'made_with\.device: there "cpu", here "cuda"'),
    ],
)
@pytest.mark.filterwarnings("ignore:.*damaged")
def test_a_store_that_lacks_a_shard_is_not_finished_elsewhere(tmp_path, monkeypatch, change, words, left):
    whole = build_store(Doubled(teacher()), part_of(), tmp_path, batch=1, threads=1)
    if left == "missing":
        (tmp_path / "00002.safetensors.sha256").unlink()
    else:
        whole.path(2).write_bytes(whole.path(2).read_bytes()[:-1] + b"?")
    before = bytes_in(tmp_path)
    with monkeypatch.context() as elsewhere, pytest.raises(kdlib.DataError, match=words):
        build_store(Doubled(teacher()), part_of(), tmp_path, batch=1, **made_elsewhere(elsewhere, change))
    assert bytes_in(tmp_path) == before
    build_store(Doubled(teacher()), part_of(), tmp_path, batch=1, threads=1)
    assert np.array_equal(Store(tmp_path).whole("logits"), whole.whole("logits"))


def test_shards_of_another_teacher_whose_manifest_was_deleted_are_not_served(tmp_path):
    build_store(Doubled(teacher()), part_of(), tmp_path / "store", batch=1)
    alone = build_store(Doubled(teacher(1)), part_of(), tmp_path / "alone", batch=1)
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="belongs to another store.*made anew") as caught:
        build_store(Doubled(teacher(1)), part_of(), tmp_path / "store", batch=1)
    assert len(caught) == alone.shards
    assert bytes_in(tmp_path / "store") == bytes_in(tmp_path / "alone")


def test_verify_names_shards_of_another_teacher_whose_manifest_was_deleted(tmp_path, capsys):
    for seed in (0, 1):
        build_store(Doubled(teacher(seed)), part_of(), tmp_path / str(seed), batch=1)
    (tmp_path / "1" / "manifest.json").replace(tmp_path / "0" / "manifest.json")
    with pytest.raises(kdlib.DataError, match=r"00000\.safetensors: belongs to another store"):
        Stored(folder=tmp_path / "0")({"index": torch.arange(3), **first_epoch(3)})
    assert command("store", "verify", tmp_path / "0") == 2
    assert "4 of 4 shards" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "half", "", torch.float16, np.float16, None])
def test_another_type_than_the_two_is_refused(tmp_path, dtype):
    with pytest.raises(kdlib.KdlibError, match=r"dtype=.* is unknown\..*Known: float16, float32"):
        build_store(Doubled(teacher()), part_of(), tmp_path / "store", dtype=dtype)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("size", "kept"), [(65504.0, True), (65519.996, True), (65520.0, False)])
def test_float16_keeps_what_rounds_to_its_largest_and_refuses_what_rounds_beyond(tmp_path, size, kept):
    one = kdlib.TensorPart(torch.tensor([[size / 2]]), [0])
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    source = Doubled(kdlib.freeze(kdlib.Tapped(net, logits="")))
    if kept:
        store = build_store(source, one, tmp_path, dtype="float16")
        assert store.whole("logits").tolist() == [[65504.0]]
        assert rounding(store)["logits"] == np.float32(size) - np.float32(65504)
    else:
        with pytest.raises(kdlib.DataError, match=r"'logits' goes to 65520; float16 ends at 65504"):
            build_store(source, one, tmp_path, dtype="float16")


def test_float16_takes_half_the_room_and_its_error_is_kept_and_told(tmp_path, capsys):
    part = part_of()
    exact = build_store(Doubled(teacher()), part, tmp_path / "exact")
    half = build_store(Doubled(teacher()), part, tmp_path / "half", dtype="float16")
    assert "'logits' kept as float16, at most" in capsys.readouterr().out.replace("\n", " ")
    truth = exact.whole("logits")
    error = np.abs(truth - half.whole("logits").astype(np.float32)).max()
    assert rounding(half) == {"logits": pytest.approx(float(error))}
    assert 0 < error <= np.abs(truth).max() * 2**-11
    assert rounding(exact) == {}
    taps = Stored(folder=tmp_path / "half")({"index": torch.arange(ROWS), **first_epoch(ROWS)})
    assert taps.keys() == {"logits"}
    assert taps["logits"].dtype == torch.float32
    assert np.abs(taps["logits"].numpy() - truth).max() == error


class Marked(Doubled):
    def __call__(self, batch):
        taps = super().__call__(batch)
        return {**taps, "sure": taps["logits"].amax(-1) > 1, "class": taps["logits"].argmax(-1)}


def test_float16_leaves_taps_that_are_no_fractions_as_they_are(tmp_path):
    exact = build_store(Marked(teacher()), part_of(), tmp_path / "whole")
    half = build_store(Marked(teacher()), part_of(), tmp_path / "half", dtype="float16")
    for name, dtype in (("sure", "bool"), ("class", "int64")):
        assert half.manifest.arrays[name].dtype == dtype
        assert np.array_equal(half.whole(name), exact.whole(name))
        assert rounding(half)[name] == 0
    assert rounding(half)["logits"] > 0


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(kdlib.DataError, match=r"'logits' goes to .*65504"):
        build_store(Doubled(teacher()), part_of(scale=1e6), tmp_path, dtype="float16")


class Restless(kdlib.TensorPart):
    """A part that changes from epoch to epoch and does not say how."""

    def __getitem__(self, key):
        return {**super().__getitem__(key), "x": self.x[key[1]] + key[0]}


def test_data_whose_changes_are_not_known_is_refused(tmp_path):
    with pytest.raises(kdlib.DataError, match=r"Restless does not say how its items change.*made_by"):
        build_store(Doubled(teacher()), part_of(kind=Restless), tmp_path)
    assert not list(tmp_path.iterdir())


def test_data_without_fingerprints_is_refused(tmp_path):
    part = part_of()

    class Nameless:
        made_by = {"augmentation": None}  # noqa: RUF012
        labels, groups, ids = part.labels, part.groups, part.ids

        def __len__(self):
            return len(part)

        def __getitem__(self, key):
            return part[key]

    with pytest.raises(kdlib.DataError, match=r"Nameless lacks fingerprint\. "):
        build_store(Doubled(teacher()), Nameless(), tmp_path)


class Forgetful:
    def __init__(self, teacher, *, factor: float = 2.0):
        self.teacher = teacher

    def __call__(self, batch):
        return self.teacher(batch["x"])


class Odd(Doubled):
    def __call__(self, batch):
        return {"logits": super().__call__(batch)["logits"].mean()}


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (lambda batch: {"logits": batch["x"]}, kdlib.DataError, "is a function"),
        (Forgetful(teacher()), kdlib.DataError, "Forgetful does not keep its setting 'factor'"),
        (Doubled(lambda x: {"logits": x}), kdlib.TapError, "The teacher of Doubled is a function"),
        (Ema(kdlib.Tapped(nn.Linear(6, 3), logits="")), kdlib.TapError, "Ema follows the student"),
        (Ensemble({"a": Ema(kdlib.Tapped(nn.Linear(6, 3), logits=""))}), kdlib.TapError, "Ema follows the student"),
        (Odd(teacher()), kdlib.TapError, r"'logits' has shape \(\) for \d+ rows"),
    ],
)
def test_a_source_that_cannot_be_stored_says_why(tmp_path, source, error, words):
    with pytest.raises(error, match=words):
        build_store(source, part_of(), tmp_path)


# from a run, into a recipe


DIGITS = {
    "name": "few",
    "data": {"kind": "digits", "train": 60, "valid": 40},
    "train": {"epochs": 2, "threads": 1},
    "teacher": {"model": {"kind": "digits_mlp", "width": 12}},
    "student": {"model": {"kind": "digits_mlp", "width": 4}},
    "source": {"kind": "same_input"},
    "points": {"soft": {"kind": "soft_labels"}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, and the store of its teacher's soft labels, by the command."""
    place = tmp_path_factory.mktemp("storing")
    run(read(DIGITS), place / "run", progress=False)
    assert command("store", "build", place / "run", place / "store") == 0
    return place


def command(*arguments):
    """Run the command and return its code."""
    before, sys.argv = sys.argv, ["kdlib", *map(str, arguments)]
    shown = warnings.showwarning
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv, warnings.showwarning = before, shown
    return 0


def stored(place, **more):
    weights = str(place / "run" / "main" / "teacher.safetensors")
    source = {"kind": "stored", "folder": str(place / "store")}
    return {**DIGITS, "teacher": {**DIGITS["teacher"], "weights": weights}, "source": source, **more}


def test_a_run_with_stored_soft_labels_has_the_rows_of_the_run_that_they_came_from(finished, tmp_path):
    folder = run(read(stored(finished)), tmp_path / "again", progress=False)
    rows = [json.loads((place / "result.json").read_text())["rows"] for place in (finished / "run", folder)]
    assert [row["role"] for row in rows[1]] == ["without", "with"]
    assert rows[1][0] == rows[0][0]
    weights = [
        torch.cat([value.flatten() for value in kdlib.load_run(place).students["main"].state_dict().values()])
        for place in (finished / "run", folder)
    ]
    assert torch.allclose(*weights, atol=1e-4)


def test_a_check_and_an_estimate_look_a_recipe_with_stored_soft_labels_over(finished):
    recipe = read(stored(finished))
    (_, report), *_ = check(recipe)
    assert report, str(report)
    assert estimate(recipe).costs[-1].training == "student"


def test_a_check_refuses_other_data_before_anything_is_trained(finished):
    other = stored(finished, data={"kind": "digits", "train": 70, "valid": 40})
    with pytest.raises(kdlib.DataError, match="rows: there 60, here 70"):
        list(check(read(other)))


def test_a_run_refuses_other_data_before_its_control_is_trained(finished, tmp_path):
    other = stored(finished, data={"kind": "digits", "train": 70, "valid": 40})
    other["student"] = {**DIGITS["student"], "control": True}
    with pytest.raises(kdlib.DataError, match="rows: there 60, here 70"):
        run(read(other), tmp_path / "refused", progress=False)
    assert not list((tmp_path / "refused").rglob("metrics.jsonl"))


def test_a_recipe_with_stored_soft_labels_wants_their_teacher(finished, tmp_path):
    with pytest.raises(kdlib.RecipeError, match=r"teacher\.weights: required.*teacher\.safetensors"):
        read(stored(finished, teacher=DIGITS["teacher"]))
    other = stored(finished)
    run(read({**DIGITS, "train": {"epochs": 1, "threads": 1}}), tmp_path / "other", progress=False)
    other["teacher"] = {**other["teacher"], "weights": str(tmp_path / "other" / "main" / "teacher.safetensors")}
    with pytest.raises(kdlib.TapError, match=r"of another teacher\. There .*, here "):
        run(read(other), tmp_path / "refused", progress=False)


def test_a_recipe_does_not_mix_stored_soft_labels_with_others(finished):
    recipe = stored(finished)
    inner = {"a": {"kind": "same_input"}, "b": recipe["source"]}
    with pytest.raises(kdlib.RecipeError, match=r"source\.sources\.b: stored soft labels stand alone"):
        read({**recipe, "source": {"kind": "ensemble", "sources": inner}})


def test_info_says_what_a_store_is(finished, capsys):
    assert command("store", "info", finished / "store") == 0
    shown = capsys.readouterr().out
    for words in ("SameInput", "DigitsMLP", "60 rows", "40 rows", "10 classes", "tap logits: float32 [10]", "1 of 1"):
        assert words in shown
    assert command("store", "info", "--json", finished / "store") == 0
    one = json.loads(capsys.readouterr().out)[str(finished / "store" / "training")]
    assert one["made_of"]["data"]["classes"] == list("0123456789")


def test_verify_names_what_is_damaged_with_code_2(finished, tmp_path, capsys):
    assert command("store", "verify", finished / "store") == 0
    assert "2 shards, all as they were written" in capsys.readouterr().out
    for name in ("a", "b"):
        build_store(Doubled(teacher()), part_of(), tmp_path / name)
    path = tmp_path / "b" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert command("store", "verify", tmp_path) == 2
    told = capsys.readouterr().err
    assert "1 of 2 shards" in told
    assert f"{path}: damaged" in told
    assert command("store", "verify", tmp_path / "nowhere") == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--system", "mian"], "Did you mean 'main'"),
        (["--set", "systems.main.teacher.cross_fit=3"], "3 cross-fitted teachers"),
        (["--views", "-1"], "views"),
    ],
)
def test_what_a_run_cannot_give_is_code_2(finished, tmp_path, capsys, more, words):
    assert command("store", "build", finished / "run", tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err


def test_the_teacher_of_a_run_without_a_source_labels_what_it_sees(tmp_path, capsys):
    alone = {name: DIGITS[name] for name in ("name", "data", "train")} | {"model": DIGITS["teacher"]["model"]}
    run(read(alone), tmp_path / "run", progress=False)
    assert command("store", "build", tmp_path / "run", tmp_path / "store", "--dtype", "float16") == 0
    assert "SameInput" in capsys.readouterr().out
