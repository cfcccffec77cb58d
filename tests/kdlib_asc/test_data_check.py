"""``kdlib data check`` on recordings: from the first try without settings to a set that is fine."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kdlib.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdlib", "data", "check", *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as left:
                main()
        out, complaints = capsys.readouterr()
        return int(left.value.code or 0), out, complaints

    return call


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of two classes in this form: 8 kHz, mono, 0.1 s."""
    for scene in ("bus", "park"):
        (tmp_path / scene).mkdir()
        for number in range(4):
            soundfile.write(tmp_path / scene / f"{scene}{number}.wav", np.full(800, 0.1), 8000)
    return tmp_path


def test_the_advice_that_is_printed_leads_to_a_set_that_is_fine(check: Command, root: Path) -> None:
    soundfile.write(root / "bus" / "bus0.wav", np.full(700, 0.1), 8000)
    code, out, _ = check(root, "--kind", "folder")
    assert code == 2
    *_, last = out.splitlines()
    before, advice = last.split(": ")
    assert before == "the settings that would read it"
    assert advice == "--set rate=8000 --set channels=1 --set seconds=0.1 --set pad=true"
    code, out, complaints = check(root, "--kind", "folder", *advice.split())
    assert (code, complaints) == (0, "")
    assert out.splitlines() == ["6 to train on, 2 to test", "8 clips, 2 classes, 4 recordings a class"]


def test_without_a_kind_a_folder_of_classes_is_recognised(check: Command, root: Path) -> None:
    code, out, _ = check(root)
    assert code == 2
    assert "no data set in the DCASE layout" in out
    assert "it is a data set of kind 'folder'" in out


def dcase_set(root: Path, train: list[str], test: list[str]) -> None:
    (root / "evaluation_setup").mkdir()
    rows = {name: f"{name}\t{name.split('/')[0]}\n" for name in train + test}
    (root / "meta.csv").write_text("filename\tscene_label\n" + "".join(rows.values()))
    (root / "evaluation_setup" / "fold1_train.txt").write_text("".join(rows[name] for name in train))
    (root / "evaluation_setup" / "fold1_evaluate.txt").write_text("".join(rows[name] for name in test))


def test_lists_and_clips_are_checked_at_once_and_a_warning_is_shown(check: Command, root: Path) -> None:
    train = [f"{scene}/{scene}{number}.wav" for scene in ("bus", "park") for number in range(3)]
    test = ["bus/bus3.wav", "park/park3.wav"]
    dcase_set(root, [*train, "bus/gone.wav"], test)
    with (root / "meta.csv").open("a") as meta:
        meta.write("bus/bus3.wav\tbus\n")
    for name in ("bus/bus1.wav", "park/park3.wav"):
        (root / name).write_bytes((root / name).read_bytes()[:-100])
    form = ["--set", "rate=8000", "--set", "channels=1", "--set", "seconds=0.1"]
    code, out, _ = check(root, *form)
    assert code == 2
    assert out.splitlines() == [
        f"{root}: 2 problems",
        "1. clip listed twice in one table (1):",
        "     bus/bus3.wav: in meta.csv",
        "2. listed file that is missing (1):",
        "     bus/gone.wav: in fold1_train.txt",
        "2 of 8 clips cannot be read:",
        "1. truncated: the header states 1600 bytes of samples, the file has 1500 (2):",
        "     bus/bus1.wav",
        "     park/park3.wav",
        "fold 1: 6 to train on, 2 to test",
        "8 clips, 2 classes, 4 recordings a class",
    ]


def test_a_place_in_both_parts_is_a_warning_and_no_problem(check: Command, root: Path) -> None:
    for scene in ("bus", "park"):
        for number in range(4):
            (root / scene / f"{scene}{number}.wav").rename(root / scene / f"{scene}-rome-1-{number}-a.wav")
    train = [f"{scene}/{scene}-rome-1-{number}-a.wav" for scene in ("bus", "park") for number in range(3)]
    dcase_set(root, train, ["bus/bus-rome-1-3-a.wav", "park/park-rome-1-3-a.wav"])
    code, _, complaints = check(root, "--set", "rate=8000", "--set", "channels=1", "--set", "seconds=0.1")
    assert code == 0
    assert "recording places in both train and test: 2" in complaints
    assert "bus-rome-1: 3 clips in train, 1 in test, fold 1" in complaints
