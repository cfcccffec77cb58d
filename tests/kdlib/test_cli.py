"""The command: what it prints, where it stops, and the code it leaves with."""

import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from kdlib.cli import main
from kdlib.errors import RankError
from kdlib.recipe import find
from kdlib.registry import registry
from kdlib.schema import schema

PACKAGES = Path(__file__).parents[1] / "plugins"
FEW = ["--set", "train.epochs=2", "--set", "student.train.epochs=2", "--set", "train.threads=1"]
"""The digits in about a second."""
HERE = """
import torch
import kdlib

class Halves(torch.nn.Module):
    time_axis = -1

    def forward(self, samples):
        return samples / 2

@kdlib.hookimpl
def kdlib_features():
    return {"halves": Halves}

@kdlib.hookimpl
def kdlib_points():
    def odd_one(*, size: int = 3):
        raise RuntimeError("the dog ate it")

    def hinted(*, size: int = 3):
        raise ValueError("sizes are even")

    return {"odd_one": odd_one, "hinted": hinted}

@kdlib.hookimpl
def kdlib_datasets():
    def odd_data(*, size: int = 3):
        raise RuntimeError("the dog ate it")

    return {"odd_data": odd_data}
"""


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """The plugin packages, each built as a wheel and unpacked into a folder of its own."""
    folders = {}
    for package in sorted(PACKAGES.iterdir()):
        folders[package.name] = tmp_path_factory.mktemp(package.name)
        wheel = next(iter(WheelBuilder(str(package)).build(directory=str(tmp_path_factory.mktemp("wheel")))))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folders[package.name])
    return folders


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module of ours in it, and a registry as a new process would fill it."""
    (tmp_path / "plugin_that_is_here.py").write_text(HERE)
    monkeypatch.chdir(tmp_path)
    for name in ("KDLIB_STRICT", "KDLIB_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    registry.cache_clear()
    yield tmp_path
    registry.cache_clear()
    for name in [name for name in sys.modules if name.endswith("_that_is_here")]:
        del sys.modules[name]


@pytest.fixture
def kdlib(here, monkeypatch, capsys):
    """Call the command in this process; returns its code, what it printed and what it complained of."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdlib", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0, *capsys.readouterr()

    return call


def spawn(*arguments, cwd, path=(), **environment):
    """Call the command in a process of its own, with more on its path."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KDLIB_")}
    folders = [*map(str, path), *filter(None, [inherited.get("PYTHONPATH")])]
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "kdlib", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=cwd, env=environment)


# processes of their own


def test_a_package_on_the_path_is_found_and_its_recipe_runs_beside_a_broken_one(sites, tmp_path):
    done = spawn("run", "digits_cosine", "--out", "here", cwd=tmp_path, path=[sites["good"], sites["broken"]])
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "here" / "result.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["without", "with"]
    for row in rows:
        assert f"{row['correct']} / {row['total']}" in done.stdout
    written = json.loads((tmp_path / "here" / "recipe.json").read_text())
    assert written["systems"]["main"]["points"]["cosine"]["kind"] == "good_cosine"
    step = json.loads((tmp_path / "here" / "main" / "student" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(step["terms"]) == {"cosine", "hard"}
    assert done.stderr.count("'broken'") == 1
    assert "Traceback" not in done.stderr


def test_a_users_error_is_one_message_and_code_2(sites, tmp_path):
    arguments = ["run", "digits", "--set", "points.hard.kind=never_there"]
    done = spawn(*arguments, cwd=tmp_path, path=[sites["broken"]])
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "error: points.hard.kind: No point named 'never_there'." in done.stderr
    assert "'broken'" in done.stderr.partition("error: ")[2]
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_a_plugin_is_code_1_with_its_traceback_and_its_name(tmp_path):
    (tmp_path / "plugin_that_is_here.py").write_text(HERE)
    arguments = ["run", "digits", "--set", "data={kind='odd_data'}", "--plugin", "plugin_that_is_here"]
    done = spawn(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "RuntimeError: the dog ate it" in done.stderr
    assert "plugin_that_is_here.py" in done.stderr
    assert "'odd_data'" in done.stderr
    assert "'plugin_that_is_here'" in done.stderr


# run


def test_a_run_shows_its_rows_and_says_where_everything_is(kdlib, here):
    code, out, complaints = kdlib("run", "digits", *FEW, "--out", "one")
    assert (code, complaints) == (0, "")
    result = json.loads((here / "one" / "result.json").read_text())
    assert [row["role"] for row in result["rows"]] == ["without", "alone", "with"]
    for row in result["rows"]:
        assert f"{row['correct']} / {row['total']}" in out
        assert f"{100 * row['accuracy']:.2f}" in out
        assert f"{100 * row['macro']:.2f}" in out
    assert "100 to train on, 1697 to test" in out
    assert "Everything is in one" in out


def test_a_quiet_run_prints_its_result_and_no_progress(kdlib, here):
    changes = [*FEW, "--plugin", "plugin_that_is_here", "--set", "features.kind=halves"]
    code, out, complaints = kdlib("run", "digits", *changes, "--out", "one", "--quiet")
    assert (code, complaints) == (0, "")
    lines = out.splitlines()
    assert "to train on" not in out
    assert lines[0].strip().startswith("digits:")
    assert "Everything is in one" in lines[-1]
    assert all(line.strip() for line in lines)


def test_the_folder_is_printed_as_it_is_called(kdlib, here):
    folder = Path(*["a_rather_long_name"] * 6) / "with [b]brackets[/b] and [/] more"
    code, out, _ = kdlib("run", "digits", *FEW, "--quiet", "--out", folder)
    assert code == 0
    assert (here / folder / "result.json").is_file()
    assert str(folder) in out


def test_a_folder_that_is_there_is_code_2_and_untouched(kdlib, here):
    (here / "one").mkdir()
    (here / "one" / "mine.txt").write_text("mine")
    code, _, complaints = kdlib("run", "digits", *FEW, "--out", "one")
    assert code == 2
    assert "is there already" in complaints
    assert [path.name for path in (here / "one").iterdir()] == ["mine.txt"]


def test_without_out_the_folder_is_made_under_runs(kdlib, here):
    assert kdlib("run", "digits", *FEW, "--quiet")[0] == 0
    (folder,) = (here / "runs" / "digits").iterdir()
    assert (folder / "result.json").is_file()


def test_a_finished_run_is_run_again_from_its_recipe(kdlib, here):
    assert kdlib("run", "digits", *FEW, "--quiet", "--out", "one")[0] == 0
    assert kdlib("run", "one/recipe.json", "--quiet", "--out", "two")[0] == 0
    assert (here / "one" / "predictions.csv").read_bytes() == (here / "two" / "predictions.csv").read_bytes()


def test_the_pictures_of_a_finished_run_are_listed_and_drawn_anew(kdlib, here):
    assert "Pictures: confusion.png, main/curves.png\n" in kdlib("run", "digits", *FEW, "--quiet", "--out", "one")[1]
    (here / "one" / "confusion.png").unlink()
    code, out, _ = kdlib("figures", "one")
    assert (code, out) == (0, "Pictures: confusion.png, main/curves.png\n")
    assert (here / "one" / "confusion.png").is_file()


# errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "digit"], "Did you mean 'digits'?"),
        (["run", "missing.toml"], "missing.toml: there is no such file."),
        (["figures", "missing"], "missing: no finished run; it has no result.json."),
        (["run", "digits", "--set", "train.epoch=3"], "Did you mean 'epochs'?"),
        (["run", "digits", "--set", "train"], "key.key=value"),
        (["run", "asc_esc10"], "--set data.root=PATH"),
        (["run", "asc_esc10", "--set", "data.root=nowhere"], "nowhere"),
        (["run", "digits", "--set", "data.train=1790"], "1790"),
        (["run", "digits", "--set", "train.select=best"], "validation"),
        (["run", "digits", "--set", "teacher.weights=missing.safetensors"], "missing.safetensors"),
        (["run", "digits", "--plugin", "module_that_is_nowhere"], "module_that_is_nowhere"),
        (["run", "digits", "--plugin", "json"], "hook"),
        (["check", "digits", "--set", "points.soft.tap=logit"], "the lines above"),
        (["check", "no_such"], "No recipe named 'no_such'"),
        (["recipes", "digit"], "Did you mean 'digits'?"),
        (["recipes", "missing.toml"], "missing.toml"),
    ],
)
def test_what_a_user_can_do_wrong_is_code_2_and_a_message(kdlib, arguments, words):
    code, _, complaints = kdlib(*arguments)
    assert code == 2
    assert complaints.startswith("error: ")
    assert complaints.count("error: ") == 1
    assert words in complaints
    assert "Traceback" not in complaints
    assert len(re.findall(r" \[errors\.html#\w+error\]$", complaints, flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("change", ["train.select=best", "train.device=nowhere"])
def test_a_users_error_is_told_in_one_line_and_accuses_no_plugin(kdlib, change):
    code, _, complaints = kdlib("run", "digits", *FEW, "--set", change, "--quiet")
    assert code == 2
    assert len(complaints.splitlines()) == 1
    assert "plugin" not in complaints


def test_a_bad_value_in_a_plugin_is_code_2_with_its_place_and_its_name(kdlib):
    code, _, complaints = kdlib(
        "check", "digits", "--plugin", "plugin_that_is_here", "--set", "points.mine.kind=hinted"
    )
    assert code == 2
    assert "error: points.mine: sizes are even" in complaints
    assert "'hinted'" in complaints
    assert "'plugin_that_is_here'" in complaints


def test_a_word_that_is_no_command_or_option_is_code_2(kdlib):
    assert kdlib("runs")[0] == 2
    assert kdlib("run", "digits", "--epochs", "3")[0] == 2
    assert kdlib("run")[0] == 2


def test_help_is_there(kdlib):
    code, out, _ = kdlib("--help")
    assert code == 0
    for command in ("run", "check", "plugins", "schema", "recipes"):
        assert command in out


def test_a_broken_package_is_code_2_in_strict_mode(kdlib, sites, monkeypatch):
    monkeypatch.syspath_prepend(sites["broken"])
    monkeypatch.setenv("KDLIB_STRICT", "1")
    code, _, complaints = kdlib("plugins")
    assert code == 2
    assert "'broken'" in complaints
    assert "a_package_that_nobody_has" in complaints


# check


def test_a_slip_in_the_students_part_is_found_before_anything_is_trained(kdlib, here):
    code, out, complaints = kdlib("run", "digits", "--set", "points.soft.tap=logit", "--out", "new")
    assert (code, out) == (2, "")
    assert "nothing was trained" in complaints
    assert "the student has no tap 'logit'. Did you mean 'logits'?" in complaints
    assert not (here / "new").exists()


def test_a_plugin_is_described_with_its_settings(kdlib):
    code, out, _ = kdlib("plugins", "soft_labels")
    assert code == 0
    for word in ("point soft_labels", "Heo et al. 2019", "temperature", "Literal['logits', 'posteriors']", "1.0"):
        assert word in out
    code, _, complaints = kdlib("plugins", "soft_label")
    assert code == 2
    assert "Did you mean 'soft_labels'" in complaints


def test_a_module_is_named_and_not_its_file(kdlib):
    code, _, complaints = kdlib("plugins", "--plugin", "mine.py")
    assert code == 2
    assert "--plugin mine" in complaints.splitlines()[-1]


def test_a_check_prints_a_report_and_writes_nothing(kdlib, here):
    before = sorted(path.name for path in here.iterdir())
    code, out, complaints = kdlib("check", "digits")
    assert (code, complaints) == (0, "")
    for words in ("main", "ok     teacher DigitsMLP", "frozen, in eval mode", "point soft", "gradient norm"):
        assert words in out
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == before


def test_a_check_that_finds_something_says_what(kdlib):
    code, out, _ = kdlib("check", "digits", "--set", "points.soft.tap=logit")
    assert code == 2
    assert "wrong  point soft" in out
    assert "Did you mean 'logits'?" in out


# lists


def test_the_list_shows_who_brings_what_and_what_is_broken(kdlib, sites, monkeypatch):
    for site in sites.values():
        monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("COLUMNS", "200")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, complaints = kdlib("plugins")
    assert code == 0
    assert complaints.count("warning:") == 2
    assert any("digits_mlp" in line and "kdlib" in line for line in out.splitlines())
    assert any("wave_cnn" in line and "asc" in line for line in out.splitlines())
    assert "clash: the point 'soft_labels' is claimed by kdlib and clash" in out
    assert "broken: broken: ModuleNotFoundError" in out
    assert "broken: typo: " in out


def test_the_list_for_programs_is_json_and_tells_who_is_broken_and_who_clashes(kdlib, sites, monkeypatch):
    for site in sites.values():
        monkeypatch.syspath_prepend(site)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, complaints = kdlib("plugins", "--json")
    assert code == 0
    listed = json.loads(out)
    by_name = {(one["kind"], one["name"]): one for one in listed["plugins"]}
    assert by_name["point", "squares"]["plugin"] == "clash"
    assert by_name["model", "digits_mlp"]["plugin"] == "kdlib"
    assert by_name["scorer", "svm"]["plugin"] == "asc"
    width = by_name["model", "digits_mlp"]["settings"]["properties"]["width"]
    assert (width["default"], width["minimum"], width["type"]) == (16, 1, "integer")
    assert ("point", "good_cosine") not in by_name
    assert set(listed["broken"]) == {"broken", "typo"}
    assert "Did you mean 'kdlib_points'?" in listed["broken"]["typo"]
    clashes = {one["name"]: set(one["plugins"]) for one in listed["clashes"]}
    assert clashes == {"soft_labels": {"kdlib", "clash"}, "good_cosine": {"good", "clash"}}
    assert complaints.count("warning:") == 2


def test_a_module_that_the_person_names_is_listed(kdlib, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = kdlib("plugins", "--plugin", "plugin_that_is_here")
    assert code == 0
    assert any("odd_one" in line and "plugin_that_is_here" in line for line in out.splitlines())
    registry.cache_clear()
    assert "odd_one" not in kdlib("plugins")[1]
    assert "" not in sys.path


def test_a_docstring_with_brackets_is_listed_as_it_is(kdlib, here, monkeypatch):
    text = 'import kdlib\nclass P:\n    """Rows [B, K] and [/closed] ones."""\n'
    text += '@kdlib.hookimpl\ndef kdlib_points():\n    return {"bracketed": P}\n'
    (here / "brackets_that_is_here.py").write_text(text)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = kdlib("plugins", "--plugin", "brackets_that_is_here")
    assert code == 0
    assert "Rows [B, K] and [/closed] ones." in out


def test_the_schema_is_json(kdlib):
    code, out, _ = kdlib("schema", "--plugin", "plugin_that_is_here")
    assert code == 0
    printed = json.loads(out)
    assert printed == schema()
    assert "point-odd_one" in printed["$defs"]


def test_the_recipes_are_listed_and_printed(kdlib, sites, monkeypatch):
    monkeypatch.syspath_prepend(sites["good"])
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = kdlib("recipes")
    assert code == 0
    for name in ("digits", "asc_esc10", "asc_quick", "digits_cosine"):
        first = find(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert any(name in line and first in line for line in out.splitlines())
    code, out, _ = kdlib("recipes", "digits")
    assert (code, out) == (0, find("digits").read_text(encoding="utf-8"))


# one of several processes


@pytest.fixture
def rank_1(monkeypatch):
    """What torchrun tells the second of two processes, but for where the first is to be found."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_another_rank_than_0_leaves_a_dry_run_to_it(kdlib, rank_1):
    assert kdlib("run", "digits", "--dry-run") == (0, "", "")


def test_errors_and_warnings_say_on_which_rank(kdlib, rank_1, monkeypatch):
    code, _, errors = kdlib("run", "digit")
    assert code == 2
    assert errors.startswith("rank 1: error: No recipe named 'digit'")
    warnings.showwarning("look", UserWarning, "file", 1)
    monkeypatch.setattr("kdlib.run.run", lambda *_, **__: 1 / 0)
    code, _, errors = kdlib("run", "digits")
    assert code == 1
    assert errors.startswith("rank 1: warning: look\nrank 1: Traceback")


def test_what_rank_0_passes_on_is_not_said_again(kdlib, rank_1, monkeypatch):
    def told(*_, **__):
        raise RankError("rank 1: DataError: clip 7 is bad")

    monkeypatch.setattr("kdlib.run.run", told)
    assert kdlib("run", "digits") == (2, "", "")
    monkeypatch.setenv("RANK", "0")
    assert kdlib("run", "digits")[2].startswith("error: rank 1: DataError: clip 7 is bad")
