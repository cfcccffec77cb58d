"""Files through a finished run, from Python and from the command line."""

import json
import sys

import numpy as np
import pytest
import torch

import kdlib
from kdlib import cli
from kdlib.digits import digits
from kdlib.predict import predict
from kdlib.recipe import read
from kdlib.registry import registry
from kdlib.run import run


def numbered(*, scale: float = 1.0, train: int = 50):
    """The digits; a file of numbers is windows of 64 of them."""
    return digits(train=train)


def windows(path, settings):
    try:
        numbers = np.loadtxt(path, ndmin=1)
    except (OSError, ValueError) as error:
        raise kdlib.DataError(f"{path}: no numbers") from error
    return torch.tensor(numbers.reshape(-1, 64) * settings.scale, dtype=torch.float32)


numbered.windows = windows


class Mine:
    @kdlib.hookimpl
    def kdlib_datasets(self):
        return {"numbered": numbered}


@pytest.fixture(scope="module", autouse=True)
def mine():
    registry.cache_clear()
    kdlib.register(Mine())
    yield
    registry.cache_clear()


@pytest.fixture(scope="module")
def folder(mine, tmp_path_factory):
    recipe = {
        "data": {"kind": "numbered"},
        "train": {"epochs": 5, "threads": 1},
        "model": {"kind": "digits_mlp", "width": 12},
    }
    return run(read(recipe), tmp_path_factory.mktemp("predict") / "run", progress=False)


@pytest.fixture
def files(tmp_path):
    """One window, three windows, and no numbers."""
    x = digits(train=50).test.x.numpy()
    np.savetxt(tmp_path / "one.txt", x[:1])
    np.savetxt(tmp_path / "three [b].txt", x[:3])
    (tmp_path / "bad.txt").write_text("nothing")
    return [tmp_path / name for name in ("one.txt", "three [b].txt", "bad.txt")]


def test_scores_are_means_over_the_windows_the_highest_first(folder, files):
    loaded = kdlib.load_run(folder)
    for file, scores in predict(folder, files[:2]):
        values = loaded.scores(windows(file, read(folder / "recipe.json").data.settings)).mean(0)
        assert list(scores) == [loaded.classes[place] for place in np.argsort(-values, kind="stable")]
        assert list(scores.values()) == sorted(values.tolist(), reverse=True)


def test_a_bad_file_does_not_keep_the_others_from_their_scores(folder, files):
    found = dict(predict(folder, [files[2], files[0]]))
    assert isinstance(found[files[2]], kdlib.DataError)
    assert len(found[files[0]]) == 10


def test_reading_can_be_changed(folder, files):
    plain, scaled = (dict(predict(folder, files[:1], changes=change)) for change in ([], ["data.scale=0.1"]))
    assert plain != scaled


def test_a_data_set_that_reads_no_files_says_so(mine, tmp_path):
    recipe = {"data": {"kind": "digits"}, "train": {"epochs": 1}, "model": {"kind": "digits_mlp"}}
    folder = run(read(recipe), tmp_path / "run", progress=False)
    with pytest.raises(kdlib.KdlibError, match=r"'digits' of this run reads no single files.*load_run"):
        list(predict(folder, []))


# the command


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["kdlib", "predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_shows_a_line_a_file_and_names_the_bad_ones(folder, files, monkeypatch, capsys):
    assert command(monkeypatch, folder, *files) == 2
    seen = capsys.readouterr()
    lines = seen.out.splitlines()
    best = dict(predict(folder, files[:2]))
    assert [line.split(": ")[1].split("  ")[0] for line in lines] == [next(iter(best[file])) for file in files[:2]]
    assert "three [b].txt: " in lines[1]
    assert "bad.txt: no numbers" in seen.err


def test_the_command_tells_many_bad_files_by_reason(folder, files, tmp_path, monkeypatch, capsys):
    bad = [tmp_path / f"bad{number}.txt" for number in range(7)]
    for path in bad:
        path.write_text("nothing")
    assert command(monkeypatch, folder, files[0], *bad) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["error: 7 of 8 files cannot be read:", "1. no numbers (7):"]
    assert told[2:] == [*(f"     {path}" for path in bad[:5]), "     and 2 more", "[errors.html#kdliberror]"]


def test_for_programs_there_is_a_line_of_json_a_file(folder, files, monkeypatch, capsys):
    assert command(monkeypatch, folder, files[0], "--json") == 0
    line = json.loads(capsys.readouterr().out)
    assert line == {"file": str(files[0]), "class": next(iter(line["scores"])), "scores": line["scores"]}
    assert line["scores"] == dict(predict(folder, files[:1]))[files[0]]
