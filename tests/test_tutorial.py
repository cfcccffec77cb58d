"""The tutorial's package is what ``kdlib new-plugin`` writes, with the edits that the page shows.

Its commands and its tests are run by .ci/packages, in a fresh environment.
"""

import importlib.util
import re
from pathlib import Path

import pytest

from kdlib.scaffold import LITTER, new_plugin
from kdlib.testing import check_point, example_taps

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "docs" / "tutorial" / "kdlib-cosine"
EDITED = {
    "README.md",
    "pyproject.toml",
    "src/kdlib_cosine/__init__.py",
    "src/kdlib_cosine/recipes/digits_cosine.toml",
    "tests/test_cosine.py",
}


def load(path):
    spec = importlib.util.spec_from_file_location(f"tutorial_{path.parent.name.strip('.')}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(folder):
    def under(one):
        names = sorted(path.name for path in one.iterdir())
        for name in sorted({*names} - LITTER(str(one), names)):
            yield from under(one / name) if (one / name).is_dir() else [one / name]

    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in under(folder)}


def test_the_package_has_the_files_of_a_new_one_and_the_page_shows_what_was_edited(tmp_path):
    generated, finished = files(new_plugin("kdlib-cosine", tmp_path)), files(PACKAGE)
    assert generated.keys() == finished.keys()
    assert {name for name, text in finished.items() if text != generated[name]} == EDITED
    shown = set(re.findall(r"literalinclude\} tutorial/kdlib-cosine/(\S+)", PAGE))
    assert shown == EDITED - {"README.md"}


def test_its_pyproject_differs_from_a_new_one_in_the_description_alone(tmp_path):
    texts = [files(folder)["pyproject.toml"] for folder in (new_plugin("kdlib-cosine", tmp_path), PACKAGE)]
    generated, finished = (re.sub(r"^description = .*$", "", text, flags=re.MULTILINE) for text in texts)
    assert generated == finished


@pytest.mark.parametrize("width", [16, 64])
def test_its_point_keeps_the_contract(width):
    point = load(PACKAGE / "src" / "kdlib_cosine" / "__init__.py").Cosine(margin=0.05)
    check_point(point, student={"embedding": example_taps(1)["embedding"][:, :width]})


def test_every_command_of_the_page_is_run_and_the_first_block_makes_the_package():
    blocks = load(ROOT / ".ci" / "tutorial.py").blocks(PAGE)
    commands = [command for block in blocks for command in block]
    assert commands == re.findall(r"^\$ (.*)$", PAGE, flags=re.MULTILINE)
    assert blocks[0][0] == "kdlib new-plugin kdlib-cosine"
    assert set(re.findall(r"^```(\w+)$", PAGE, flags=re.MULTILINE)) == {"console"}
