"""The JSON schema of a recipe, made of the blocks and of everything that is registered."""

from __future__ import annotations

from pydantic.errors import PydanticInvalidForJsonSchema

from kdlib.blocks import Block, PointKeys, RecipeBlock, SystemBlock, Train
from kdlib.hooks import HOOKS
from kdlib.registry import Plugin, registry
from kdlib.settings import Strict

REFERENCE = "#/$defs/{model}"


def schema() -> Block:
    """Return the JSON schema of a recipe: each block with a ``kind`` is one of the registered plugins.

    Example:
        >>> from kdlib.schema import schema
        >>> "point-soft_labels" in schema()["$defs"]
        True
    """
    definitions: Block = {}
    plugins = registry()
    for kind in HOOKS:
        names = plugins.names(kind)
        for name in names:
            definitions[f"{kind}-{name}"] = _of_plugin(plugins.get(kind, name), definitions)
        options = [{"$ref": f"#/$defs/{kind}-{name}"} for name in names]
        definitions[kind] = {"oneOf": options, "discriminator": {"propertyName": "kind"}} if options else {"not": {}}
    one = {kind: {"$ref": f"#/$defs/{kind}"} for kind in HOOKS}
    definitions["Train"] = {**_inlined(Train, definitions), "required": []}
    shared = {
        "features": one["features"],
        "model": one["model"],
        "source": one["source"],
        "points": {"type": "object", "additionalProperties": one["point"]},
        "train": {"$ref": "#/$defs/Train"},
    }
    system, whole = _inlined(SystemBlock, definitions), _inlined(RecipeBlock, definitions)
    system["properties"] |= shared
    whole["properties"] |= shared | {
        "data": one["dataset"],
        "scorer": one["scorer"],
        "systems": {"type": "object", "additionalProperties": {"$ref": "#/$defs/SystemBlock"}},
    }
    definitions["SystemBlock"] = system
    return {**whole, "$defs": definitions}


def _of_plugin(plugin: Plugin, definitions: Block) -> Block:
    one = _inlined(plugin.settings, definitions)
    properties = {"kind": {"const": plugin.name}, **one.get("properties", {})}
    if plugin.kind == "point":
        properties |= _inlined(PointKeys, definitions)["properties"]
    for nested, kind in (("sources", "source"), ("points", "point")):
        if nested in plugin.live:
            properties[nested] = {"type": "object", "additionalProperties": {"$ref": f"#/$defs/{kind}"}}
    title = f"{plugin.kind} {plugin.name}"
    live = [nested for nested in ("sources", "points") if nested in plugin.live]
    return {**one, "title": title, "properties": properties, "required": ["kind", *live, *one.get("required", [])]}


def _inlined(model: type[Strict], definitions: Block) -> Block:
    """Return a model's schema, its inner definitions moved to the common ones."""
    try:
        one: Block = model.model_json_schema(ref_template=REFERENCE)
    except PydanticInvalidForJsonSchema:  # a setting of a type that JSON does not have: only its name is known
        return {"type": "object", "properties": {name: {} for name in model.model_fields}}
    definitions |= {name: inner for name, inner in one.pop("$defs", {}).items() if name not in definitions}
    return one
