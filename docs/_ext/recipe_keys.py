"""Write the reference of a recipe's keys from its pydantic models: a key without a description fails the build."""

import inspect
import json
from pathlib import Path

from pydantic import BaseModel
from sphinx.errors import ExtensionError
from words import default_of, in_words

from kdlib import blocks
from kdlib.schedules import Schedule
from kdlib.settings import arguments_in

SECTIONS: list[tuple[type[BaseModel], str, str]] = [
    (blocks.RecipeBlock, "The recipe", "The keys at the top level. With `systems` a system's own keys stand there."),
    (blocks.SystemBlock, "A system", "`[systems.NAME]`, or the top level of a recipe without `systems`."),
    (blocks.TeacherBlock, "The teacher", "`[teacher]`"),
    (blocks.Inference, "A teacher at work", "`teacher.inference`"),
    (blocks.StudentBlock, "The student", "`[student]`"),
    (blocks.PointKeys, "A point", "`[points.NAME]`, beside `kind` and the settings of the point."),
    (blocks.Train, "Training", "`[train]`, `[teacher.train]`, `[student.train]`"),
    (blocks.Optimizer, "The optimizer", "`train.optimizer`; what is not given is torch's default."),
    (blocks.Pretrain, "A first training", "`[teacher.pretrain]`"),
    (Schedule, "A schedule", "Wherever a weight or a temperature stands."),
    (blocks.Fusion, "Fusion", "`[fusion]`, with several systems."),
    (blocks.CacheBlock, "Features kept on disk", "`[cache]`"),
]
KINDS = {
    "data": "dataset",
    "features": "features",
    "model": "model",
    "source": "source",
    "points": "point",
    "scorer": "scorer",
}
"""Keys that hold a plugin's block, and the kind of plugin."""
ANCHORS = {model.__name__.lower(): title for model, title, _ in SECTIONS}


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


def write(file: Path) -> None:
    """Write the reference as a fragment of a page."""
    parts = []
    for model, title, where in SECTIONS:
        parts += [f"({_slug(title)})=\n### {title}\n\n{where}\n", *entries(model)]
    missing = {name for name in vars(blocks) if _is_block(name)} - {model.__name__ for model, _, _ in SECTIONS}
    if missing:
        raise ExtensionError(f"{json.dumps(sorted(missing))} of kdlib.blocks are in no section.")
    file.write_text("\n".join(parts), encoding="utf-8")


def _is_block(name: str) -> bool:
    value = getattr(blocks, name)
    return isinstance(value, type) and issubclass(value, blocks.Written) and value is not blocks.Written
