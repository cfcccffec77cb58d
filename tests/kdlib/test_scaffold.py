"""A new plugin package: it passes its own tests as it is written, and nothing is written over."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from kdlib.errors import KdlibError
from kdlib.scaffold import TEMPLATE, new_plugin

ROOT = Path(__file__).parents[2]
LEFT_OVER = ("new-point", "new_point", "NewPoint")


def installed(package, tmp_path):
    """Build a package into a wheel, lay it into a folder, and return an environment that has it on its path."""
    site = tmp_path / "site"
    wheel = next(iter(WheelBuilder(str(package)).build(directory=str(tmp_path / "dist"))))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}


def call(*command, cwd, env):
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_generated_package_passes_its_own_tests_and_its_recipe_is_known(tmp_path):
    package = new_plugin("kdlib-blunt-cosine", tmp_path)
    environment = installed(package, tmp_path)
    code, said = call("pytest", "-p", "no:cacheprovider", cwd=package, env=environment)
    assert code == 0, said
    assert "4 passed" in said
    code, said = call("kdlib", "check", "digits_blunt_cosine", cwd=tmp_path, env=environment)
    assert code == 0, said


def test_a_generated_package_has_every_file_of_the_template_and_no_name_of_it(tmp_path):
    package = new_plugin("kdlib-blunt", tmp_path)
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert files == {
        ".github/workflows/test.yml",
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "src/kdlib_blunt/__init__.py",
        "src/kdlib_blunt/recipes/digits_blunt.toml",
        "tests/test_blunt.py",
    }
    for name in files:
        text = (package / name).read_text(encoding="utf-8")
        assert not [old for old in LEFT_OVER if old in text or old in name], name
    assert "class Blunt:" in (package / "src/kdlib_blunt/__init__.py").read_text(encoding="utf-8")


def test_a_name_that_holds_names_of_the_template_is_put_in_once(tmp_path):
    package = new_plugin("my-new-point", tmp_path)
    assert "class MyNewPoint:" in (package / "src/my_new_point/__init__.py").read_text(encoding="utf-8")


def test_the_template_asks_for_the_kdlib_that_it_comes_with():
    ours, theirs = (tomllib.loads((path / "pyproject.toml").read_text("utf-8")) for path in (ROOT, TEMPLATE))
    major, minor, _ = ours["project"]["version"].split(".")
    assert theirs["project"]["dependencies"] == [f"kdlib-asc>={major}.{minor},<{major}.{int(minor) + 1}"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "lower-case words"),
        ("KdlibMyLoss", "For example: kdlib-my-loss"),
        ("my_loss", "For example: my-loss"),
        ("3d-loss", "For example: d-loss"),
        ("../escape", "For example: escape"),
        ("a/b", "lower-case words"),
        ("my-loss\n", "lower-case words"),
        ("übung", "lower-case words"),
        ("-", "lower-case words"),
        ("class", "cannot be imported"),
        ("kdlib-3d", "cannot be imported"),
        ("json", "installed already"),
        ("kdlib-asc", "installed already"),
        ("kdlib", "installed already"),
        ("kdlib-hidden-cosine", "the plugin 'kdlib' has"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_and_nothing_is_written(tmp_path, name, reason):
    with pytest.raises(KdlibError, match=reason):
        new_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_what_is_there_already_is_left_alone(tmp_path, what):
    there = tmp_path / "kdlib-blunt"
    {"folder": there.mkdir, "file": there.touch, "dangling link": lambda: there.symlink_to("nowhere")}[what]()
    with pytest.raises(KdlibError, match="is there already"):
        new_plugin("kdlib-blunt", tmp_path)
    assert list(tmp_path.iterdir()) == [there]


def test_a_parent_that_is_a_file_is_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(KdlibError, match="kdlib-blunt: cannot be written: Not a directory"):
        new_plugin("kdlib-blunt", tmp_path / "notes")
