"""``kdlib data check`` and ``kdlib data make`` on data sets made here: what they print, count and leave behind."""

import json
import sys
import threading
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import kdlib
from kdlib.cli import main
from kdlib.registry import registry
from kdlib.survey import grouped, survey


class Lists(kdlib.TensorPart):
    """A part whose items are read from a table of problems."""

    problems: ClassVar = {}
    reads: ClassVar = Counter()
    lock = threading.Lock()

    def __getitem__(self, key):
        name = self.ids[key[1]]
        with self.lock:
            self.reads[name] += 1
        assert key[0] == kdlib.CLEAN
        if name in self.problems:
            raise self.problems[name]
        return super().__getitem__(key)


@dataclass
class Parts:
    train: Lists
    valid: object
    test: Lists
    classes: tuple
    skipped: tuple = ()

    def advice(self, errors, fine):
        return {"size": fine, "deep": True, "fold": "all"} if any("small" in str(error) for error in errors) else {}

    def write(self, folder):
        if self.problems:
            raise OSError(28, "No space left on device")
        (folder / "one.txt").write_text(" ".join(self.train.ids))

    problems = ()


def part(names):
    labels = [number % 2 for number in range(len(names))]
    return Lists(torch.zeros(len(names), 2), labels, ids=list(names), groups=[name[0] for name in names])


class Plugin:
    @kdlib.hookimpl
    def kdlib_datasets(self):
        def letters(*, root: str = "", fold: int | str = 1, keep_in_memory: bool = True, size: int = 3):
            Plugin.opened = {"root": root, "fold": fold, "keep_in_memory": keep_in_memory}
            a, b = part(["a1", "a2", "b1", "b2", "c1", "c2"]), part(["d1", "d2"])
            folds = {1: Parts(a, None, b, ("x", "y"))}
            if fold == "all":
                folds[2] = Parts(b, part(["e1"]), a, ("x", "y"))
            return folds

        def refused(*, root: str):
            error = kdlib.DataError("the set: 1 problem\n1. a file is missing (1):\n     z1: in a list")
            error.parts = {1: Parts(part(["a1", "a2"]), None, part(["b1", "b2"]), ("x", "y"))}
            raise error

        def full(*, size: int = 3):
            parts = Parts(part(["a1"]), None, part(["b1"]), ("x", "y"))
            parts.problems = ("full",)
            return parts

        return {"letters": letters, "refused": refused, "full": full}


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(Lists, "problems", {})
    monkeypatch.setattr(Lists, "reads", Counter())
    registry.cache_clear()
    kdlib.register(Plugin(), "letters")
    yield
    registry.cache_clear()


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdlib", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0, *capsys.readouterr()

    return call


def test_every_item_of_every_fold_is_read_once_as_it_is(command, tmp_path):
    code, out, complaints = command("data", "check", tmp_path, "--kind", "letters")
    assert (code, complaints) == (0, "")
    assert Lists.reads == Counter(["a1", "a2", "b1", "b2", "c1", "c2", "d1", "d2", "e1"])
    assert Plugin.opened == {"root": str(tmp_path), "fold": "all", "keep_in_memory": False}
    assert out.splitlines() == [
        "fold 1: 6 to train on, 2 to test",
        "fold 2: 2 to train on, 6 to test, 1 to validate",
        "9 clips, 2 classes, 4 to 5 recordings a class",
    ]


def test_settings_that_are_given_win(command, tmp_path):
    assert command("data", "check", tmp_path, "--kind", "letters", "--set", "fold=1")[0] == 0
    assert Plugin.opened["fold"] == 1
    assert command("data", "check", tmp_path, "--kind", "letters", "--set", "data.fold=2")[0] == 0
    assert Plugin.opened["fold"] == 2


def test_the_same_reason_is_one_line_with_its_number_and_a_few_names(command, tmp_path, monkeypatch):
    names = [f"t{number}" for number in range(300)]
    whole = Parts(part(names), None, part(["d1"]), ("x", "y"))
    monkeypatch.setattr("kdlib.survey.open_data", lambda _: {"": whole})
    problems = {name: kdlib.DataError(f"/far/{name}: too small: {number} of 400") for number, name in enumerate(names)}
    Lists.problems = {**problems, "d1": RuntimeError("[red]odd[/red]")}
    code, out, complaints = command("data", "check", tmp_path, "--kind", "letters")
    assert code == 2
    assert complaints == "error: Something is wrong; see the lines above. [errors.html#kdliberror]\n"
    assert out.splitlines() == [
        "301 of 301 clips cannot be read:",
        "1. too small: ... of 400 (300):",
        *(f"     {name}" for name in names[:5]),
        "     and 295 more",
        "2. RuntimeError: [red]odd[/red] (1):",
        "     d1",
        "300 to train on, 1 to test",
        "301 clips, 2 classes, 1 to 2 recordings a class",
        "the settings that would read it: --set size=0 --set deep=true",
    ]


def test_what_is_wrong_with_the_layout_and_with_the_clips_is_told_at_once(command, tmp_path):
    Lists.problems = {"b1": kdlib.DataError("b1: cut")}
    code, out, _ = command("data", "check", tmp_path, "--kind", "refused")
    assert code == 2
    assert out.splitlines() == [
        "the set: 1 problem",
        "1. a file is missing (1):",
        "     z1: in a list",
        "1 of 4 clips cannot be read:",
        "1. cut (1):",
        "     b1",
        "fold 1: 2 to train on, 2 to test",
        "4 clips, 2 classes, 2 recordings a class",
    ]


def test_skipped_items_are_counted_as_bad(monkeypatch):
    whole = Parts(part(["a1"]), None, part(["b1"]), ("x", "y"), (("c1", "cut"),))
    monkeypatch.setattr("kdlib.survey.open_data", lambda _: {"": whole})
    found = survey("letters", {})
    assert not found
    assert (found.read, found.bad) == (3, {"c1": "cut"})


def test_names_that_a_terminal_would_act_on_are_shown_as_escapes(command, tmp_path, monkeypatch):
    name = "a\n\x1b[2Jb\udcff [bold]é🚋"
    monkeypatch.setattr("kdlib.survey.open_data", lambda _: {"": Parts(part([name]), None, part(["d"]), ("x", "y"))})
    Lists.problems = {name: kdlib.DataError(f"/{name}: cut")}
    code, out, _ = command("data", "check", tmp_path, "--kind", "letters")
    assert code == 2
    assert "     a\\n\\x1b[2Jb\\udcff [bold]é🚋\n" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "digits"], "data.root: unknown key"),
        (["--kind", "lettres"], "Did you mean 'letters'?"),
        (["--kind", "letters", "--set", "sise=4"], "Did you mean 'size'?"),
        (["--kind", "letters", "--set", "size"], "key.key=value"),
    ],
)
def test_what_a_user_can_do_wrong_is_code_2_and_a_message(command, tmp_path, arguments, words):
    code, _, complaints = command("data", "check", tmp_path, *arguments)
    assert code == 2
    assert words in complaints
    assert "Traceback" not in complaints


def test_reasons_that_differ_in_more_than_numbers_are_kept_apart():
    reasons = {"a": "rate 8, not 16", "b": "rate 9.5, not 16", "c": "cut at 8", "d": "rate 8, not 16"}
    assert grouped(reasons) == [("rate ..., not 16", ["a", "b", "d"]), ("cut at 8", ["c"])]


# make


def test_a_data_set_is_written_by_its_plugin_into_a_new_folder(command, tmp_path):
    code, out, complaints = command("data", "make", tmp_path / "new" / "set", "--kind", "letters")
    assert (code, complaints) == (0, "")
    assert (tmp_path / "new" / "set" / "one.txt").read_text() == "a1 a2 b1 b2 c1 c2"
    assert f"Everything is in {tmp_path / 'new' / 'set'}" in out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set"]


def test_a_folder_that_is_there_is_left_alone(command, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, complaints = command("data", "make", tmp_path, "--kind", "letters")
    assert code == 2
    assert "is there already" in complaints
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_data_set_that_cannot_be_written_says_so(command, tmp_path):
    code, _, complaints = command("data", "make", tmp_path / "new", "--kind", "digits")
    assert code == 2
    assert "'digits' cannot be made" in complaints


def test_a_full_disk_leaves_nothing_behind(command, tmp_path):
    code, _, complaints = command("data", "make", tmp_path / "new", "--kind", "full")
    assert code == 2
    assert "new: cannot be written: No space left on device" in complaints
    assert list(tmp_path.iterdir()) == []


# a run


def test_a_run_writes_what_was_skipped_into_its_result(tmp_path, monkeypatch):
    from kdlib.recipe import read
    from kdlib.run import make_data, run

    recipe = read("digits", ["train.epochs=1", "student.train.epochs=1", "train.threads=1"])
    (parts,) = make_data(recipe).values()
    with_skipped = Parts(parts.train, parts.valid, parts.test, parts.classes, (("17", "cut"), ("4", "NaN")))
    monkeypatch.setattr("kdlib.run.make_data", lambda _: {"": with_skipped})
    folder = run(recipe, tmp_path / "one", progress=False)
    assert json.loads((folder / "result.json").read_text())["skipped"] == {"17": "cut", "4": "NaN"}
