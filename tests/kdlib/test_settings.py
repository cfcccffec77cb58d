"""A plugin's signature as its schema: what a recipe may say, and what it is told where it may not."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field
from torch import nn

import kdlib
from kdlib.blocks import RecipeBlock
from kdlib.settings import LIVE, CommandLineText, arguments_in, read_signature, validated


def model_of(build, kind="source"):
    return read_signature(kind, "mine", build)[1]


def checked(build, base=None, **block):
    """Return the settings as plain values."""
    settings = validated(model_of(build), block, "here", base)
    return {name: getattr(settings, name) for name in type(settings).model_fields}


def refused(build, **block):
    with pytest.raises(kdlib.RecipeError) as caught:
        checked(build, **block)
    return str(caught.value)


# from the signature


def bounded(*, share: Annotated[float, Field(gt=0, le=1)] = 0.5, count: Annotated[int, Field(ge=1)] = 2):
    return share, count


def test_defaults_stand_where_nothing_is_written():
    assert checked(bounded) == {"share": 0.5, "count": 2}


def test_bounds_of_the_annotation_hold():
    assert checked(bounded, share=1, count=1) == {"share": 1.0, "count": 1}
    assert isinstance(checked(bounded, share=1)["share"], float)
    assert refused(bounded, share=0).startswith("here.share: ")
    assert "1.5" in refused(bounded, share=1.5)
    assert refused(bounded, count=0).startswith("here.count: ")


def test_every_problem_is_told_with_its_place():
    lines = refused(bounded, share=2.0, count=0, shar=1).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["here.count", "here.shar", "here.share"]


def test_a_literal_is_one_of_its_words():
    def build(*, join: Literal["input", "frames"] = "input"):
        return join

    assert checked(build, join="frames") == {"join": "frames"}
    text = refused(build, join="frame")
    assert "'input' or 'frames'" in text
    assert "'frame'" in text


def test_what_may_be_left_out_may_be_left_out():
    def build(*, limit: Annotated[int, Field(ge=1)] | None = None, axis: int | None = 3):
        return limit, axis

    assert checked(build) == {"limit": None, "axis": 3}
    assert checked(build, limit=2, axis=None) == {"limit": 2, "axis": None}
    assert refused(build, limit=0).startswith("here.limit: ")
    assert refused(build, limit="2").startswith("here.limit: ")


def test_what_is_required_and_missing_shows_what_to_type():
    def build(*, width: int, root: Path):
        return width, root

    lines = refused(build, width=3).splitlines()
    assert lines == ["here.root: required, and not given. On the command line: --set here.root=VALUE"]


def test_annotations_may_be_strings_and_defaults_stay_what_they_are():
    def build(*, width: "int" = 3, names: "list[str] | None" = None):
        return width, names

    assert checked(build, names=["a"]) == {"width": 3, "names": ["a"]}


def test_the_settings_become_the_arguments_whatever_their_names_are():
    def build(*, copy: bool = False, schema: str = "x", json: int = 1, model_name: str = "y"):
        return copy, schema, json, model_name

    assert checked(build, copy=True, json=2) == {"copy": True, "schema": "x", "json": 2, "model_name": "y"}


@pytest.mark.parametrize("name", LIVE)
def test_positional_arguments_are_live_objects_and_no_settings(name):
    scope = {}
    exec(f"def build({name}, *, width: int = 1):\n    return {name}, width", scope)
    live, model = read_signature("source", "mine", scope["build"])
    assert live == (name,)
    assert list(model.model_fields) == ["width"]


def test_functions_and_classes_are_read_alike():
    class Point:
        def __init__(self, teacher, *, tap: str = "embedding") -> None:
            self.tap = tap

    class Heir(Point):
        pass

    @dataclass(kw_only=True)
    class Data:
        tap: str = "embedding"

    for build in (Point, Heir, Data):
        assert list(model_of(build).model_fields) == ["tap"]
        assert checked(build, tap="logits") == {"tap": "logits"}


def test_a_class_without_a_constructor_has_no_settings():
    class Point:
        def __call__(self, student, teacher, batch):
            return student["logits"].mean()

    class Net(nn.Module):
        pass

    for build in (Point, Net, lambda: None):
        assert read_signature("point", "mine", build)[0] == ()
        assert checked(build) == {}
        assert "here.width: unknown key" in refused(build, width=3)


def test_a_class_that_names_its_protocol_and_has_no_constructor_has_no_settings():
    class Point(kdlib.DistillPoint):
        def __call__(self, student, teacher, batch):
            return student["logits"].mean()

    assert read_signature("point", "mine", Point)[0] == ()
    assert checked(Point) == {}


@pytest.mark.parametrize("name", ["classes", "channels", "rate"])
@pytest.mark.parametrize("kind", ["model", "features"])
def test_what_is_filled_from_the_data_may_be_left_out_of_the_recipe(kind, name):
    scope = {}
    exec(f"def build(*, {name}: int):\n    return {name}", scope)
    model = model_of(scope["build"], kind)
    assert getattr(validated(model, {}, "here"), name) is None
    assert getattr(validated(model, {name: 3}, "here"), name) == 3
    with pytest.raises(kdlib.RecipeError, match=rf"here\.{name}: required"):
        validated(model_of(scope["build"], "dataset"), {}, "here")


# strict values


def kinds(
    *, number: float = 0.0, count: int = 0, flag: bool = False, text: str = "", numbers: list[float] | None = None
):
    return number


@pytest.mark.parametrize("value", ["3", "", True, math.nan, math.inf, -math.inf, None, [1.0], {"value": 1.0}])
def test_a_number_is_a_number(value):
    assert refused(kinds, number=value).startswith("here.number: ")


@pytest.mark.parametrize("value", ["3", True, 2.0, 2.5, math.nan, math.inf, None, [1]])
def test_a_count_is_a_whole_number(value):
    assert refused(kinds, count=value).startswith("here.count: ")


@pytest.mark.parametrize(
    ("name", "value"), [("flag", 1), ("flag", "true"), ("text", 3), ("text", True), ("text", ["a"])]
)
def test_nothing_is_turned_into_something_else(name, value):
    assert refused(kinds, **{name: value}).startswith(f"here.{name}: ")


def test_the_place_in_an_array_is_told():
    assert refused(kinds, numbers=[1.0, "2"]).startswith("here.numbers.1: ")


@pytest.mark.parametrize("block", [3, "kind", None, [1], True])
def test_a_block_is_a_table(block):
    with pytest.raises(kdlib.RecipeError, match="here: expected a table"):
        validated(model_of(kinds), block, "here")


def test_settings_cannot_be_changed_and_the_block_is_not():
    block = {"numbers": [1.0]}
    settings = validated(model_of(kinds), block, "here")
    assert block == {"numbers": [1.0]}
    with pytest.raises(ValueError, match="frozen"):
        settings.count = 3


# tuples from arrays


def tuples(
    *,
    size: tuple[int, int] = (1, 2),
    sizes: tuple[float, ...] = (),
    maybe: tuple[int, int] | None = None,
    few: Annotated[tuple[int, ...], Field(max_length=2)] = (),
):
    return size, sizes, maybe, few


def test_a_tuple_is_written_as_an_array():
    given = checked(tuples, size=[3, 4], sizes=[1, 2.5, 3], maybe=[5, 6], few=[1])
    assert given == {"size": (3, 4), "sizes": (1.0, 2.5, 3.0), "maybe": (5, 6), "few": (1,)}
    assert checked(tuples) == {"size": (1, 2), "sizes": (), "maybe": None, "few": ()}


@pytest.mark.parametrize("value", [[1], [], [1, 2, 3], 3, "ab", {"a": 1}, None])
def test_an_array_of_the_wrong_length_is_refused(value):
    assert refused(tuples, size=value).startswith("here.size")


def test_the_elements_of_a_tuple_are_strict_too():
    assert refused(tuples, size=[1, "2"]).startswith("here.size.1: ")
    assert refused(tuples, sizes=[1.0, math.nan]).startswith("here.sizes.1: ")
    assert refused(tuples, few=[1, 2, 3]).startswith("here.few: ")


def test_tuples_stand_inside_of_tuples_and_arrays():
    def build(*, pairs: tuple[tuple[int, int], ...] = (), listed: list[tuple[int, int]] | None = None):
        return pairs, listed

    assert checked(build, pairs=[[1, 2], [3, 4]]) == {"pairs": ((1, 2), (3, 4)), "listed": None}
    assert checked(build, listed=[[1, 2]]) == {"pairs": (), "listed": [(1, 2)]}


# paths


def paths(*, root: Path, other: Path | None = None, third: Annotated[Path, Field()] = Path("/there")):
    return root, other, third


def test_a_path_is_relative_to_the_recipe(tmp_path):
    given = checked(paths, base=tmp_path, root="a/b", other="c", third="d")
    assert given == {"root": tmp_path / "a" / "b", "other": tmp_path / "c", "third": tmp_path / "d"}


def test_a_full_path_stays_as_it_is(tmp_path):
    assert checked(paths, base=tmp_path, root="/somewhere")["root"] == Path("/somewhere")
    assert checked(paths, base=tmp_path, root=Path("/somewhere"))["root"] == Path("/somewhere")


def test_a_path_that_was_typed_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = checked(paths, base=tmp_path, root=CommandLineText("a"), other="a")
    assert given["root"] == tmp_path / "here" / "a"
    assert given["other"] == tmp_path / "a"


def test_paths_stand_in_arrays(tmp_path):
    def build(*, files: list[Path], more: tuple[Path, ...] = ()):
        return files, more

    given = checked(build, base=tmp_path, files=["a"], more=["b", "c"])
    assert given == {"files": [tmp_path / "a"], "more": (tmp_path / "b", tmp_path / "c")}


def test_an_empty_path_shows_what_to_type():
    assert refused(paths, root="") == "here.root: a path is required here. On the command line: --set here.root=PATH"


@pytest.mark.parametrize("value", [3, True, ["a"], {"a": "b"}])
def test_a_path_is_a_string(value):
    assert "here.root: a path is a string; put it in quotes" in refused(paths, root=value)


# unknown keys


def test_an_unknown_key_gets_a_suggestion_and_the_list():
    text = refused(bounded, shares=0.5)
    assert text == "here.shares: unknown key. Did you mean 'share'? Known: count, share."
    assert refused(bounded, zzz=0.5) == "here.zzz: unknown key. Known: count, share."


def test_an_unknown_key_further_in_gets_one_too():
    def build(*, temperature: Annotated[float, Field(gt=0)] | kdlib.Schedule = 1.0):
        return temperature

    text = refused(build, temperature={"kind": "linear", "start": 1.0, "end": 2.0, "epoch": 3})
    assert text.startswith("here.temperature.epoch: unknown key. Did you mean 'epochs'?")
    given = checked(build, temperature={"kind": "linear", "start": 1.0, "end": 2.0, "epochs": 3})
    assert given["temperature"](0, 3) == 2.0


@pytest.mark.parametrize(
    ("block", "place", "meant"),
    [
        ({"trian": {}}, "trian", "train"),
        ({"teacher": {"modle": {}}}, "teacher.modle", "model"),
        ({"teacher": {"pretrain": {"modle": {}}}}, "teacher.pretrain.modle", "model"),
        ({"student": {"controll": True}}, "student.controll", "control"),
        ({"fusion": {"normalize": "z"}}, "fusion.normalize", "normalise"),
    ],
)
def test_an_unknown_key_of_a_recipe_gets_one_at_every_depth(block, place, meant):
    with pytest.raises(kdlib.RecipeError, match=f"{re.escape(place)}: unknown key. Did you mean '{meant}'"):
        validated(RecipeBlock, {"data": {"kind": "digits"}, **block}, "")


def test_a_value_that_fits_no_member_of_a_union_is_one_line():
    def build(*, gamma: Literal["scale", "auto"] | Annotated[float, Field(gt=0)] = "scale"):
        return gamma

    assert checked(build, gamma=2) == {"gamma": 2.0}
    lines = refused(build, gamma=-1.0).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("here.gamma: ")
    assert "'scale' or 'auto'" in lines[0]
    assert "greater than 0" in lines[0]


def test_nothing_of_torch_is_touched():
    before = torch.get_rng_state()
    model_of(bounded)
    assert torch.equal(before, torch.get_rng_state())


def test_the_arguments_of_a_docstring_explain_settings():
    def build(*, width: int = 1, depth: int = 2) -> None:
        """A thing.

        Args:
            width: how wide,
                in units.
            depth: how deep (from 1): no more.

        Raises:
            height: never.
        """

    _, settings = read_signature("model", "thing", build)
    said = {name: field.description for name, field in settings.model_fields.items()}
    assert said == {"width": "how wide, in units.", "depth": "how deep (from 1): no more."}


@pytest.mark.parametrize("docstring", ["", "No arguments.", "Args:", "Args:\n", "Arguments:\n    width: how wide."])
def test_a_docstring_without_arguments_explains_nothing(docstring):
    assert arguments_in(docstring) == {}
