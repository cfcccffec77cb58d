"""The JSON schema of recipes: it is one, and it says what the reader of recipes says."""

import copy
import json
import math
import re
import tomllib
from collections.abc import Callable

import pytest

import kdlib
from kdlib.hooks import HOOKS
from kdlib.recipe import read, shipped
from kdlib.registry import registry
from kdlib.schema import schema

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
KEYWORDS = {
    *("$ref", "$defs", "type", "properties", "required", "additionalProperties", "items", "prefixItems", "not"),
    *("oneOf", "anyOf", "allOf", "const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "patternProperties", "propertyNames"),
    *("title", "description", "default", "discriminator", "format", "$schema"),
}


@pytest.fixture
def fresh():
    """A registry of its own, for tests that register."""
    registry.cache_clear()
    yield kdlib.register
    registry.cache_clear()


@pytest.fixture(scope="module")
def whole():
    registry.cache_clear()
    return schema()


def nodes(value, at="#"):
    """Yield every schema inside of a schema, with its place."""
    if isinstance(value, bool):
        return
    assert isinstance(value, dict), at
    yield at, value
    for key in ("properties", "$defs", "patternProperties"):
        for name, inner in value.get(key, {}).items():
            yield from nodes(inner, f"{at}/{key}/{name}")
    for key in ("oneOf", "anyOf", "allOf", "prefixItems"):
        for number, inner in enumerate(value.get(key, [])):
            yield from nodes(inner, f"{at}/{key}/{number}")
    for key in ("items", "additionalProperties", "not", "propertyNames"):
        if key in value:
            yield from nodes(value[key], f"{at}/{key}")


def resolved(whole, reference):
    """Return what a reference inside of the schema points to."""
    assert reference.startswith("#/"), reference
    found = whole
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def fits(value, rule, whole):
    """Whether a value fits a schema: the keywords that ours are made of, after the standard's words."""
    if isinstance(rule, bool):
        return rule
    inside = {
        "$ref": lambda: fits(value, resolved(whole, rule["$ref"]), whole),
        "const": lambda: value == rule["const"],
        "enum": lambda: value in rule["enum"],
        "oneOf": lambda: sum(fits(value, one, whole) for one in rule["oneOf"]) == 1,
        "anyOf": lambda: any(fits(value, one, whole) for one in rule["anyOf"]),
        "allOf": lambda: all(fits(value, one, whole) for one in rule["allOf"]),
        "not": lambda: not fits(value, rule["not"], whole),
        "type": lambda: of_type(value, rule["type"]),
    }
    if not all(test() for keyword, test in inside.items() if keyword in rule):
        return False
    if isinstance(value, dict):
        own = rule.get("properties", {})
        patterns = rule.get("patternProperties", {})
        rest = {
            key: item
            for key, item in value.items()
            if key not in own and not any(re.search(pattern, key) for pattern in patterns)
        }
        return (
            all(key in value for key in rule.get("required", []))
            and all(fits(value[key], one, whole) for key, one in own.items() if key in value)
            and all(fits(v, one, whole) for p, one in patterns.items() for k, v in value.items() if re.search(p, k))
            and all(fits(item, rule.get("additionalProperties", True), whole) for item in rest.values())
            and all(fits(key, rule.get("propertyNames", True), whole) for key in value)
        )
    if isinstance(value, list):
        first = rule.get("prefixItems", [])
        return (
            rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", math.inf)
            and all(fits(item, one, whole) for item, one in zip(value, first, strict=False))
            and all(fits(item, rule.get("items", True), whole) for item in value[len(first) :])
        )
    if isinstance(value, str):
        return bool(re.search(rule.get("pattern", ""), value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, above = rule.get("minimum", -math.inf), rule.get("exclusiveMinimum", -math.inf)
        high, below = rule.get("maximum", math.inf), rule.get("exclusiveMaximum", math.inf)
        return low <= value <= high and above < value < below
    return True


def of_type(value, names):
    names = [names] if isinstance(names, str) else names
    if isinstance(value, bool):
        return "boolean" in names
    return any(isinstance(value, TYPES[name]) for name in names)


def toml(name):
    return tomllib.loads(shipped()[name].read_text(encoding="utf-8"))


# structure


def test_it_is_json_without_nan(whole):
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole


def assert_well_formed(whole):
    for at, node in nodes(whole):
        assert set(node) <= KEYWORDS, at
        if "$ref" in node:
            assert isinstance(resolved(whole, node["$ref"]), dict), at
        for key in ("oneOf", "anyOf", "allOf", "enum"):  # the standard wants an array that is not empty
            assert node.get(key, [1]), f"{at}/{key}"
        for name in [node["type"]] if isinstance(node.get("type"), str) else node.get("type", []):
            assert name in TYPES, at
        assert len(set(node.get("required", []))) == len(node.get("required", [])), at
        if "properties" in node and node.get("additionalProperties") is False:
            assert set(node.get("required", [])) <= set(node["properties"]), at
        if "pattern" in node:
            re.compile(node["pattern"])


def test_it_is_well_formed_and_its_references_resolve(whole):
    assert_well_formed(whole)


def test_it_is_well_formed_where_a_kind_has_no_plugin(monkeypatch):
    monkeypatch.setenv("KDLIB_DISABLE", "*")
    registry.cache_clear()
    try:
        core = schema()
    finally:
        registry.cache_clear()
    assert "point-hidden_mse" not in core["$defs"]
    assert_well_formed(core)


def test_everything_that_is_registered_is_in_it(whole):
    for kind in HOOKS:
        names = registry().names(kind)
        listed = [one["$ref"].rpartition("/")[2] for one in whole["$defs"][kind]["oneOf"]]
        assert listed == [f"{kind}-{name}" for name in names]
        for name in names:
            one = whole["$defs"][f"{kind}-{name}"]
            assert one["properties"]["kind"] == {"const": name}
            assert "kind" in one["required"]
            assert one["additionalProperties"] is False
            settings = registry().get(kind, name).settings.model_fields
            assert set(settings) <= set(one["properties"])


def test_a_point_has_what_every_point_has(whole):
    for name in registry().names("point"):
        assert {"weight", "epochs", "teacher"} <= set(whole["$defs"][f"point-{name}"]["properties"])
    assert "weight" not in whole["$defs"]["source-same_input"]["properties"]


def test_bounds_and_words_are_in_it(whole):
    soft = whole["$defs"]["point-soft_labels"]["properties"]
    assert soft["form"]["enum"] == ["cross_entropy", "kl"]
    assert soft["form"]["default"] == "cross_entropy"
    numbers = [one for one in soft["temperature"]["anyOf"] if one.get("type") == "number"]
    assert numbers == [{"exclusiveMinimum": 0, "type": "number"}]


def test_live_objects_are_not_settings_and_nested_blocks_are(fresh):
    class Mine:
        @kdlib.hookimpl
        def kdlib_sources(self):
            def both(teacher, data, sources, points, *, share: float = 0.5):
                return teacher, data, sources, points, share

            return {"both": both}

    fresh(Mine())
    whole = schema()
    assert_well_formed(whole)
    properties = whole["$defs"]["source-both"]["properties"]
    assert set(properties) == {"kind", "share", "sources", "points"}
    assert properties["sources"]["additionalProperties"] == {"$ref": "#/$defs/source"}
    assert properties["points"]["additionalProperties"] == {"$ref": "#/$defs/point"}


def test_one_plugin_with_an_odd_setting_does_not_take_the_schema_from_all(fresh):
    class Mine:
        @kdlib.hookimpl
        def kdlib_points(self):
            def odd(*, curve: Callable[[float], float] = abs):
                return curve

            return {"odd": odd}

    try:
        fresh(Mine())
    except kdlib.PluginError as error:
        refused = str(error)
    else:
        refused = None
    assert refused is None or "odd" in refused
    assert_well_formed(schema())


# what it says of recipes


@pytest.mark.parametrize("name", ["digits", "asc_esc10", "asc_quick"])
def test_the_shipped_recipes_fit(whole, name):
    assert fits(toml(name), whole, whole)


def test_a_resolved_recipe_fits(whole):
    assert fits(json.loads(json.dumps(read("digits").dump())), whole, whole)
    recipe = read("asc_esc10", ["data.root=/nowhere"])
    assert fits(json.loads(json.dumps(recipe.dump())), whole, whole)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("trian", {"epochs": 3}),
        ("train.epochs", 0),
        ("train.epochs", "3"),
        ("train.epoch", 3),
        ("name", "../up"),
        ("data.kind", "digit"),
        ("data.train", 3),
        ("source", {}),
        ("source.kind", "hard_labels"),
        ("points.soft.temperature", 0),
        ("points.soft.temprature", 1.0),
        ("points.soft.weight", -1),
        ("points.soft.weight", {"kind": "linear", "start": 0.0, "stop": 1.0}),
        ("points.soft.epochs", [1]),
        ("points.soft.form", "KL"),
        ("student.control", 1),
        ("fusion", {"kind": "mean", "normalise": "Z"}),
    ],
)
def test_a_recipe_that_the_reader_refuses_does_not_fit(whole, place, value):
    recipe = copy.deepcopy(toml("digits"))
    *keys, last = place.split(".")
    table = recipe
    for key in keys:
        table = table[key]
    table[last] = value
    assert not fits(recipe, whole, whole)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("train.seed", 3),
        ("points.soft.weight", {"kind": "linear", "start": 0.0, "end": 1.0, "epochs": 3}),
        ("points.soft.temperature", {"kind": "constant", "start": 2.0}),
        ("points.soft.epochs", [1, 3]),
        ("points.soft.teacher", "a"),
        ("scorer", {"kind": "svm", "gamma": 0.5}),
        ("student.start", "somewhere/a.safetensors"),
        ("teacher.weights", "a.safetensors"),
        ("teacher.pretrain", {"model": {"width": 3}, "train": {"epochs": 1}}),
        ("features", {"kind": "spectrogram", "coefficients": 3}),
    ],
)
def test_a_recipe_that_the_reader_takes_fits(whole, place, value):
    recipe = copy.deepcopy(toml("digits"))
    *keys, last = place.split(".")
    table = recipe
    for key in keys:
        table = table[key]
    table[last] = value
    assert fits(recipe, whole, whole)


def test_every_key_and_setting_that_ships_is_described():
    found = schema()
    blocks = {name: one for name, one in found["$defs"].items() if "-" not in name and "properties" in one}
    del blocks["Schedule"]  # its fields are told by its docstring
    plugins = {f"{one.kind}-{one.name}": one.settings.model_fields for one in registry().plugins()}
    for name, block in blocks.items():
        for key, one in block["properties"].items():
            reference = "$ref" in one or "$ref" in str(one.get("additionalProperties"))  # what it leads to is described
            assert reference or one["description"], (name, key)
    for name, settings in plugins.items():
        for key in settings:
            assert found["$defs"][name]["properties"][key]["description"], (name, key)
