"""Write the reference of a recipe's keys from its pydantic models: a key without a description fails the build."""

import inspect
import re
from pathlib import Path

from pydantic import BaseModel
from sphinx.errors import ExtensionError
from words import default_of, in_words

from kdlib import blocks
from kdlib.blocks import Written
from kdlib.schedules import Schedule
from kdlib.settings import arguments_in

PLACES = {
    "RecipeBlock": ("The recipe", "the top level"),
    "SystemBlock": ("A system", "`[systems.NAME]`, or the top level of a recipe without `systems`"),
    "TeacherBlock": ("The teacher", "`[teacher]`"),
    "StudentBlock": ("The student", "`[student]`"),
    "PointKeys": ("A point", "`[points.NAME]`"),
    "Train": ("Training", "`[train]`, `[teacher.train]`, `[student.train]`"),
    "Optimizer": ("The optimizer", "`train.optimizer`"),
    "Pretrain": ("A first training", "`[teacher.pretrain]`"),
    "Inference": ("The teacher at work", "`[teacher.inference]`"),
    "Schedule": ("A schedule", "wherever a weight or a temperature stands"),
    "Fusion": ("Fusion", "`[fusion]`"),
    "CacheBlock": ("Features kept on disk", "`[cache]`"),
}
"""Title and place of the blocks, in the order of the page; any other comes behind them under its own name."""
KINDS = {
    "data": "dataset",
    "features": "features",
    "model": "model",
    "source": "source",
    "points": "point",
    "scorer": "scorer",
}
"""Keys that hold a plugin's block, and the kind of plugin."""
ANCHORS = {name.lower(): title for name, (title, _) in PLACES.items()}


def _slug(title: str) -> str:
    return f"recipe-{title.lower().replace(' ', '-')}"


def _type(key: str, schema: dict) -> str:
    """Say the type of a key, with links to the sections of other blocks and to plugins."""
    words = in_words(schema)
    if key in KINDS and "table" in words:
        link = f"[{KINDS[key]} plugin](reference/{KINDS[key]}.md)"
        return f"table of {link}s by name" if key == "points" else link
    if words in ANCHORS:
        return f"[table](#{_slug(ANCHORS[words])})"
    return words.replace(" or schedule", f" or [schedule](#{_slug('A schedule')})").replace("|", "\\|")


def entries(model: type[BaseModel]) -> list[str]:
    """Return a definition for each key of a model."""
    schema = model.model_json_schema()
    explained = arguments_in(inspect.getdoc(model) or "")
    found = []
    for key, one in schema["properties"].items():
        text = one.get("description") or explained.get(key)
        if not text:
            raise ExtensionError(f"The key '{key}' of {model.__name__} has no docstring below it.")
        table = isinstance(one.get("default"), dict)
        default = "none by default" if table else default_of(one, key in schema.get("required", ()))
        sentence = text[0].upper() + text[1:].replace("``", "`")
        found.append(f"`{key}` -- {_type(key, one)}; {default}\n: {sentence}\n")
    return found


def sections() -> list[type[BaseModel]]:
    """Return every block, in the order of the page."""
    found = [Schedule, *(one for one in vars(blocks).values() if isinstance(one, type) and issubclass(one, Written))]
    order = list(PLACES)
    return sorted(
        (one for one in found if one is not Written),
        key=lambda one: order.index(one.__name__) if one.__name__ in order else len(order),
    )


def write(file: Path) -> None:
    """Write the reference as a fragment of a page."""
    parts = []
    for model in sections():
        title, place = PLACES.get(model.__name__, (model.__name__, ""))
        said = (inspect.getdoc(model) or "").partition("\n\n")[0].replace("``", "`")
        said = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", said)
        parts += [f"({_slug(title)})=\n### {title}\n\n{said}{f' Place: {place}.' if place else ''}\n", *entries(model)]
    file.write_text("\n".join(parts), encoding="utf-8")
