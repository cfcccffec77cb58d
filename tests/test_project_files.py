"""The files around the code say what the code says."""

import re
import tomllib
from pathlib import Path

import yaml

from kdlib.registry import registry

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_has_the_keys_that_its_format_requires_and_the_version_of_the_project():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [person["family-names"] for person in citation["references"][0]["authors"]] == ["Heo", "Jung", "Shim", "Yu"]


def test_the_changelog_begins_with_what_is_not_released_and_counts_points_and_sources():
    text = read("CHANGELOG.md")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE)[0] == "[Unreleased]"
    kinds = [one.kind for one in registry().plugins() if one.package in ("kdlib", "asc")]
    assert f"{kinds.count('point')} distillation points and {kinds.count('source')} sources" in text


def test_every_command_of_the_program_is_in_the_changelog():
    from typer.main import get_command

    from kdlib.cli import app

    names = get_command(app).commands
    assert [name for name in names if name not in read("CHANGELOG.md")] == []


def test_the_hooks_before_a_commit_run_what_ci_runs():
    (local,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert local["repo"] == "local"  # nothing is fetched
    run = read(".ci/run")
    for hook in local["hooks"]:
        assert hook["entry"].removesuffix(" --force-exclude") in run, hook["entry"]


def test_contributing_is_one_screen():
    assert len(read("CONTRIBUTING.md").splitlines()) <= 50


def test_every_version_of_an_extra_is_pinned():
    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {plain(line.split("==")[0]) for line in read("constraints.txt").splitlines() if "==" in line}
    extras = PROJECT["optional-dependencies"]
    wanted = [
        *PROJECT["dependencies"],
        *(one for extra in ("asc", "bench", "dev", "docs", "integrations") for one in extras[extra]),
    ]
    names = {plain(re.match(r"[\w.-]+", one)[0]) for one in wanted} - {"kdlib-asc"}
    assert names <= pinned
