"""Write the plugin reference from the registry: what is not documented fails the build.

Of every plugin of this distribution: what it is in one sentence, a block for a recipe, and its docstring, in which each
setting has the type, the bounds and the default that a recipe's block is checked by.
"""

import inspect
import json
import re
from importlib import import_module
from pathlib import Path

from catalogue import POINTS, needs, ours
from sphinx.errors import ExtensionError
from words import default_of, in_words

from kdlib import hooks
from kdlib.registry import Plugin, Registry
from kdlib.settings import LIVE, validated

TITLES = {
    "point": "Points",
    "source": "Sources",
    "model": "Models",
    "dataset": "Data sets",
    "features": "Features",
    "scorer": "Scorers",
}
PLACES = {
    "point": "points.mine",
    "source": "source",
    "model": "model",
    "dataset": "data",
    "features": "features",
    "scorer": "scorer",
}
"""Where a block of the kind stands in a recipe."""
REQUIRED = {"tap": "hidden", "taps": ["first", "second"], "root": "PATH", "folder": "labels"}
"""What the examples have for settings without a default."""
NESTED = '[source.sources.one]\nkind = "same_input"'
UNCITED = ("hard_labels",)
"""Points that are nobody's."""
CITED = re.compile(r"\b(19|20)\d\d\b")


def lacking(plugin: Plugin) -> list[str]:
    """Return what the documentation of a plugin lacks."""
    text = inspect.getdoc(plugin.build) or ""
    missing = [] if re.match(r"\S.*\.", " ".join(text.split("\n\n")[0].split())) else ["a first sentence"]
    fields = plugin.settings.model_fields.items()
    missing += [f"the setting '{name}'" for name, field in fields if not field.description]
    if plugin.kind == "point":
        missing += [] if plugin.name in POINTS else ["its formula in docs/_ext/catalogue.py"]
        missing += [] if CITED.search(text) or plugin.name in UNCITED else ["a paper with its year"]
    return missing + ([] if "Example:" in text else ["an example"])


def target(plugin: Plugin) -> str:
    """Return the shortest name by which a plugin's class can be imported."""
    build, parts = plugin.build, plugin.build.__module__.split(".")
    for length in range(1, len(parts) + 1):
        module = ".".join(parts[:length])
        if getattr(import_module(module), build.__name__, None) is build:
            return f"{module}.{build.__name__}"
    raise ExtensionError(f"{plugin.label} cannot be imported by its name")


def recipe_block(plugin: Plugin) -> str:
    """Return a block for a recipe with every setting at its default, after having it checked."""
    block = {
        name: REQUIRED[name] if field.is_required() else field.default
        for name, field in plugin.settings.model_fields.items()
        if field.is_required() or field.default is not None
    }
    validated(plugin.settings, block, plugin.name)
    lines = [f"{name} = {json.dumps(value)}" for name, value in block.items()]
    nested = [NESTED] if "sources" in plugin.live else []
    return "\n".join([f"[{PLACES[plugin.kind]}]", f'kind = "{plugin.name}"', *lines, *nested])


def section(plugin: Plugin, elsewhere: str) -> str:
    """Return the section of one plugin."""
    path = target(plugin)
    directive = "autoclass" if inspect.isclass(plugin.build) else "autofunction"
    option = "\n   :no-index:" if re.search(rf":: {re.escape(path)}$", elsewhere, flags=re.MULTILINE) else ""
    facts = []
    if plugin.kind == "point":
        level, formula = POINTS[plugin.name]
        facts = [f"{level} level", f"needs {needs(plugin)}" if needs(plugin) != "-" else "", f"`{formula}`"]
    elif plugin.live:
        facts = [f"is given {', '.join(plugin.live)}"]
    facts.append(f"of plugin `{plugin.package}`")
    return (
        f"({plugin.kind}-{plugin.name})=\n## `{plugin.name}`\n\n{'; '.join(fact for fact in facts if fact)}\n\n"
        f"```toml\n{recipe_block(plugin)}\n```\n\n```{{eval-rst}}\n.. {directive}:: {path}{option}\n```\n"
    )


def write(folder: Path, registry: Registry, elsewhere: str = "") -> None:
    """Write one page a kind, and the page that lists them.

    Args:
        folder: where to.
        registry: what to describe.
        elsewhere: text of the written pages; what they describe is described here without an index entry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wrong, listed = [], []
    for kind, hook in hooks.HOOKS.items():
        said = inspect.getdoc(getattr(hooks, hook)) or ""
        wrong += [] if said and kind in TITLES else [f"the hook {hook} lacks a docstring or a title"]
        plugins = ours(registry, kind)
        wrong += [f"{plugin.label} lacks {', '.join(lacking(plugin))}" for plugin in plugins if lacking(plugin)]
        if wrong:
            continue
        words = said.replace("``", "`").removeprefix("Return ")
        words = words[0].upper() + words[1:]
        head = f"# {TITLES[kind]}\n\n{words} The hook is `{hook}`.\n\n"
        (folder / f"{kind}.md").write_text(
            head + "\n".join(section(plugin, elsewhere) for plugin in plugins), encoding="utf-8"
        )
        listed += [f"\n## [{TITLES[kind]}]({kind}.md)\n\n{words}\n"]
        listed += [f"[`{plugin.name}`](#{kind}-{plugin.name})\n: {_first_sentence(plugin)}\n" for plugin in plugins]
    if wrong:
        raise ExtensionError("What is registered is documented: " + "; ".join(wrong))
    pages = "\n".join(hooks.HOOKS)
    (folder / "index.md").write_text(
        "# Plugin reference\n\nMade from the registry when these pages are built. `kdlib plugins` lists what is "
        "registered where you work, `kdlib plugins NAME` shows one with its settings.\n"
        + "\n".join(listed)
        + f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n",
        encoding="utf-8",
    )


def _first_sentence(plugin: Plugin) -> str:
    return " ".join((inspect.getdoc(plugin.build) or "").split("\n\n")[0].split()).replace("``", "`")


def with_types(plugins: dict[object, Plugin]):
    """Return a handler that writes type, bounds and default of each setting into a plugin's docstring."""

    def handle(_app, _what, _name, thing, _options, lines: list[str]) -> None:
        plugin = plugins.get(thing) if callable(thing) else None
        if plugin is None:
            return
        schema = plugin.settings.model_json_schema()
        for number, line in enumerate(lines):
            found = re.match(r"^    (\w+): ", line)
            if found and found.group(1) in schema.get("properties", {}):
                name = found.group(1)
                one = schema["properties"][name]
                said = f"{in_words(one)}; {default_of(one, name in schema.get('required', ()))}"
                lines[number] = f"    {name} ({said}): {line[found.end() :]}"
            elif found and found.group(1) in LIVE:
                lines[number] = f"    {found.group(1)} (live object): {line[found.end() :]}"

    return handle
