"""Say in words what a JSON schema allows: ``number above 0 or schedule``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SIMPLE = {"boolean": "true or false", "string": "string", "object": "table"}


def in_words(schema: Mapping[str, Any]) -> str:
    """Return a type and its bounds, of one key of a pydantic model.

    Raises:
        ValueError: there are no words for such a schema.

    Example:
        >>> in_words({"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 2}, {"type": "null"}]})
        'number from 0 below 2'
    """
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2].lower()
    if "anyOf" in schema:
        return " or ".join(in_words(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "integer" | "number" as kind:
            return " ".join([kind, *_bounds(schema)])
        case "string" if schema.get("format") == "path":
            return "path"
        case "string" if "pattern" in schema:
            return f"string that matches {schema['pattern']}"
        case "array":
            least, most = schema.get("minItems"), schema.get("maxItems")
            count = f"{least} " if least is not None and least == most else ""
            inner = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
            return f"list of {count}{_plural(in_words(inner))}"
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"table of {_plural(in_words(schema['additionalProperties']))} by name"
        case "object" if "propertyNames" in schema:
            return "table of tables by name"
        case kind if kind in SIMPLE:
            return SIMPLE[kind]
    raise ValueError(f"no words for {schema}")


def default_of(schema: Mapping[str, Any], required: bool) -> str:
    """Return "required", or the default as TOML would have it."""
    if required:
        return "required"
    value = schema.get("default")
    return "none by default" if value is None or value == {} else f"default {json.dumps(value)}"


def _bounds(schema: Mapping[str, Any]) -> list[str]:
    names = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return [f"{word} {schema[key]:g}" for key, word in names.items() if key in schema]


def _plural(words: str) -> str:
    first, _, rest = words.partition(" ")
    return f"{first}s {rest}".strip()
