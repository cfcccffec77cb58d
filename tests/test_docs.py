"""What the pages show can be run, and what is registered has a page.

Blocks of ``{testcode}`` run when the pages are built, the gallery as well; here are the others.
"""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import kdlib
from kdlib import errors, hooks
from kdlib.cli import app
from kdlib.recipe import find, read, shipped
from kdlib.registry import Registry, registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
TESTED_ELSEWHERE = {"README.md"}
"""Pages whose blocks of Python have a test of their own."""
PROGRAMS = {".", "bash", "cd", "export", "pip", "pre-commit", "pytest", "python", "python3.11", "sphinx-build", "twine"}
"""What a block of commands may call beside kdlib and torchrun."""


def blocks(page, *languages):
    """Return (line, text) of the fenced blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```({'|'.join(languages)})\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start()) + 2, match.group(2)) for match in found]


def cases(*languages):
    """Return a parameter for each block."""
    return [
        pytest.param(page, text, id=f"{page.name}:{line}") for page in PAGES for line, text in blocks(page, *languages)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_a_page_run_in_their_order(page):
    names = {}
    for line, text in [] if page.name in TESTED_ELSEWHERE else blocks(page, "python"):
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)


def merged(recipe, part):
    """Return a recipe with a part of another: a block with a kind takes the place of the old one."""
    both = {
        key: merged(recipe[key], value)
        if isinstance(value, dict) and isinstance(recipe.get(key), dict) and "kind" not in value
        else value
        for key, value in part.items()
    }
    return {**recipe, **both}


@pytest.mark.parametrize(("page", "text"), cases("toml"))
def test_toml_blocks_are_parts_of_recipes_or_of_a_pyproject(page, text):
    part = tomllib.loads(text)
    if set(part) <= {"project", "tool"}:
        assert part["project"]["entry-points"]["kdlib"]
        return
    base = tomllib.loads(find("asc_quick" if {"cache", "systems"} & part.keys() else "digits").read_text("utf-8"))
    read(merged(base, part))


def commands(text):
    """Return the commands of a block as lists of words."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]  # the others are output
    for line in lines:
        yield from (shlex.split(one.split(" > ")[0]) for one in line.split(" && "))


def parse(words):
    """Let the command line parse what stands behind ``kdlib``, without running it."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words, "a command is missing"
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command.make_context(command.name, list(words)).params


PLAIN = [
    pytest.param(page, "\n".join(lines), id=f"{page.name}:{line}")
    for page in PAGES
    for line, text in blocks(page, "text")
    if (lines := re.findall(r"^(?:kdlib|torchrun) .*", text.replace("\\\n", " "), flags=re.MULTILINE))
]


@pytest.mark.parametrize(("page", "text"), [*cases("console"), *PLAIN])
def test_commands_of_a_page_exist_with_their_options_and_recipes(page, text):
    known = {*shipped(), *(path.stem for path in DOCS.glob("tutorial/*/src/*/recipes/*.toml"))}
    for words in commands(text):
        program, *rest = words
        if program == "torchrun":
            assert "kdlib" in rest
            program, rest = "kdlib", rest[rest.index("kdlib") + 1 :]
        assert program in {"kdlib"} | PROGRAMS, words
        recipe = parse(rest).get("recipe") if program == "kdlib" else None
        assert recipe is None or recipe.endswith(".toml") or recipe.isupper() or recipe in known, words


def test_a_command_option_or_argument_that_is_not_there_is_noticed():
    for words in (["walk", "digits"], ["run", "digits", "--fast"], ["check"], ["store", "verify"]):
        with pytest.raises(Exception, match=r"no command|No such option|Missing parameter"):
            parse(words)


@pytest.fixture
def extension(monkeypatch):
    """Return a function that imports a module of the pages' own Sphinx extension."""
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    yield __import__
    for name in ("catalogue", "error_pages", "plugin_reference", "recipe_keys", "words"):
        sys.modules.pop(name, None)


def test_every_error_has_a_section_with_cause_and_cure(extension):
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    assert extension("error_pages").missing(page) == []


def test_an_error_without_a_section_or_cure_is_noticed(extension):
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    missing = extension("error_pages").missing
    assert missing(page.replace("## TapError", "## Taps")) == ["TapError"]
    start = page.index("## BatchError")
    assert missing(page[:start] + page[start:].replace("\nCure\n", "\nRemedy\n", 1)) == ["BatchError"]


def subclasses(one):
    return [one, *(deeper for below in one.__subclasses__() for deeper in subclasses(below))]


def test_the_page_of_every_error_leads_to_a_section():
    sections = re.findall(r"^## (\w+)$", (DOCS / "errors.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    anchors = {f"errors.html#{section.lower()}" for section in sections}
    ours = [one for one in subclasses(kdlib.KdlibError) if one.__module__.startswith("kdlib")]
    assert {one("...").page for one in ours} <= anchors
    assert errors.RankError("...").page == "errors.html#rankerror"


def test_an_error_of_a_plugin_has_the_page_of_its_base():
    assert type("Mine", (kdlib.DataError,), {})("...").page == "errors.html#dataerror"


def test_every_plugin_of_this_distribution_is_on_the_page_of_its_kind(extension, tmp_path):
    reference = extension("plugin_reference")
    reference.write(tmp_path, registry())
    for kind in hooks.HOOKS:
        page = (tmp_path / f"{kind}.md").read_text(encoding="utf-8")
        for plugin in extension("catalogue").ours(registry(), kind):
            assert f"({kind}-{plugin.name})=" in page
    assert (tmp_path / "index.md").read_text(encoding="utf-8").count("\n: ") == len(
        [one for one in registry().plugins() if one.package in extension("catalogue").OURS]
    )


def brought(**classes):
    found = Registry()
    found.register(type("Asc", (), {"kdlib_points": kdlib.hookimpl(lambda self: classes)})(), "asc")
    return found


class Bare:
    """A point of which all but this sentence is missing."""

    def __init__(self, *, width: int = 1) -> None: ...


class Nameless:
    def __init__(self) -> None: ...


def test_a_plugin_without_documentation_fails_the_build(extension, tmp_path):
    write = extension("plugin_reference").write
    with pytest.raises(Exception, match=r"point 'bare'.* lacks the setting 'width', its formula.*paper.*an example"):
        write(tmp_path, brought(bare=Bare))
    with pytest.raises(Exception, match=r"point 'nameless'.* lacks a first sentence"):
        write(tmp_path, brought(nameless=Nameless))


def test_a_hook_without_documentation_fails_the_build(extension, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks.kdlib_points, "__doc__", None)
    with pytest.raises(Exception, match="the hook kdlib_points lacks a docstring"):
        extension("plugin_reference").write(tmp_path, registry())


def test_blocks_of_the_reference_are_recipes(extension):
    reference = extension("plugin_reference")
    base = tomllib.loads(find("asc_quick").read_text(encoding="utf-8"))
    for plugin in extension("catalogue").ours(registry(), "point"):
        block = tomllib.loads(reference.recipe_block(plugin))["points"]["mine"]
        point = merged(base, {"systems": {"raw": {"points": {"mine": block}}}})
        assert "mine" in read(point).systems["raw"].points


def test_every_key_of_a_recipe_is_explained(extension, tmp_path):
    keys = extension("recipe_keys")
    keys.write(tmp_path / "keys.md")
    text = (tmp_path / "keys.md").read_text(encoding="utf-8")
    for model in keys.sections():
        for name in model.model_fields:
            assert re.search(rf"^`{name}` -- .+; .+\n: [A-Z`].+\.$", text, flags=re.MULTILINE), (model, name)


def test_a_key_without_a_docstring_fails_the_build(extension):
    class Silent(kdlib.blocks.Written):
        width: int = 1

    with pytest.raises(Exception, match="'width' of Silent has no docstring"):
        extension("recipe_keys").entries(Silent)
