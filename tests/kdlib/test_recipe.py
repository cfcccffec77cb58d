"""Recipes: the rules of reading one, and what is said of those that cannot be read."""

import copy
import json
import re
import string
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import kdlib
from kdlib.blocks import Train
from kdlib.recipe import LARGEST, find, read, shipped
from kdlib.registry import registry

DIGITS = {
    "name": "digits",
    "data": {"kind": "digits", "train": 100},
    "train": {"epochs": 60, "batch": 32, "optimizer": {"kind": "adam", "lr": 1e-3}},
    "teacher": {"model": {"kind": "digits_mlp", "width": 256}},
    "student": {"model": {"kind": "digits_mlp", "width": 16}},
    "source": {"kind": "same_input"},
    "points": {
        "soft": {"kind": "soft_labels", "weight": 0.9, "temperature": 4.0, "student_temperature": 4.0},
        "hard": {"kind": "hard_labels", "weight": 0.1},
    },
}
SCENES = {
    "name": "scenes",
    "data": {"kind": "dcase", "root": "/nowhere", "rate": 16000, "seconds": 3.0, "validation": 0.2},
    "train": {"epochs": 25, "batch": 20, "optimizer": {"kind": "adam", "lr": 1e-3}},
    "systems": {
        "raw": {
            "features": {"kind": "pre_emphasis"},
            "model": {"kind": "wave_cnn", "width": 0.25},
            "source": {"kind": "multi_segment", "segments": 2, "join": "input"},
            "points": {"hidden": {"kind": "hidden_mse"}},
            "student": {"start": "teacher"},
        },
        "spectrogram": {
            "features": {"kind": "spectrogram", "coefficients": 64},
            "model": {"kind": "spectrogram_cnn_gru", "width": 0.25},
            "source": {"kind": "multi_segment", "segments": 2, "join": "frames"},
            "points": {"hidden": {"kind": "hidden_mse"}},
            "student": {"start": "teacher"},
            "teacher": {"pretrain": {"model": {"gru": False}, "train": {"epochs": 10}}},
        },
    },
    "scorer": {"kind": "svm"},
    "fusion": {"kind": "mean"},
}
ALONE = {"data": {"kind": "digits"}, "train": {"epochs": 1}, "model": {"kind": "digits_mlp"}}
RECIPES = {"digits": DIGITS, "scenes": SCENES, "alone": ALONE}


@pytest.fixture
def fresh():
    """A registry of its own, for tests that register."""
    registry.cache_clear()
    yield kdlib.register
    registry.cache_clear()


def changed(recipe, **at):
    """Return a copy with values put in at places, keys joined by two underscores."""
    made = copy.deepcopy(recipe)
    for place, value in at.items():
        *keys, last = place.split("__")
        table = made
        for key in keys:
            table = table.setdefault(key, {})
        table[last] = value
    return made


def without(recipe, key):
    return {name: value for name, value in recipe.items() if name != key}


def main(recipe, changes=()):
    return read(recipe, list(changes)).systems["main"]


def refused(recipe, changes=(), error=kdlib.RecipeError):
    with pytest.raises(error) as caught:
        read(recipe, list(changes))
    return str(caught.value)


# rule 1: one system, or several


def test_without_systems_the_top_level_is_the_system_main():
    own = {key: DIGITS[key] for key in ("teacher", "student", "source", "points", "train")}
    under = {"name": "digits", "data": DIGITS["data"], "systems": {"main": own}}
    assert list(read(DIGITS).systems) == ["main"]
    assert read(DIGITS).dump() == read(under).dump()


def test_several_systems_keep_their_names_and_order():
    recipe = read(SCENES)
    assert list(recipe.systems) == ["raw", "spectrogram"]
    assert recipe.systems["raw"].features.plugin.name == "pre_emphasis"
    assert recipe.systems["spectrogram"].source.settings.join == "frames"
    assert recipe.scorer.plugin.name == "svm"
    assert recipe.fusion.kind == "mean"


@pytest.mark.parametrize("key", ["features", "model", "teacher", "student", "source", "points"])
def test_a_system_does_not_stand_beside_systems(key):
    block = {"kind": "digits_mlp"} if key in ("features", "model", "source") else {}
    text = refused({**SCENES, key: block})
    assert f"'{key}'" in text
    assert "'systems'" in text


def test_defaults_for_the_training_stand_beside_systems():
    assert read(SCENES).systems["raw"].teacher.train.epochs == 25


def test_a_model_is_for_both_roles_and_each_may_change_it():
    base = without(without(DIGITS, "teacher"), "student")
    both = main({**base, "model": {"kind": "digits_mlp", "width": 8}})
    assert both.teacher.model.settings.width == both.student.model.settings.width == 8
    one = main({**base, "model": {"kind": "digits_mlp"}, "student": {"model": {"width": 4}}})
    assert (one.teacher.model.settings.width, one.student.model.settings.width) == (16, 4)
    whole = {"model": {"kind": "wave_cnn"}, "student": {"model": {"kind": "digits_mlp", "width": 4}}}
    other = main({**base, **whole, "model": {"kind": "wave_cnn", "width": 0.5}})
    assert other.teacher.model.dump() == {**other.teacher.model.dump(), "kind": "wave_cnn", "width": 0.5}
    assert other.student.model.dump() == {"kind": "digits_mlp", "width": 4, "classes": None}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_role_without_a_model_is_refused(role):
    assert refused(without(DIGITS, role)).startswith(f"{role}.model: required")


# rule 2: teacher, student, source


def test_a_student_starts_at_random_from_the_teacher_or_from_a_file(tmp_path):
    base = changed(without(DIGITS, "student"), teacher={}, model={"kind": "digits_mlp"})
    assert main(base).start == "random"
    assert main(base, ["student.start=teacher"]).start == "teacher"
    assert main({**base, "student": {"start": str(tmp_path / "a.safetensors")}}).start == tmp_path / "a.safetensors"


def test_cross_fitted_teachers_are_trained_here_and_for_a_student(tmp_path):
    base = changed(DIGITS, teacher__cross_fit=3)
    assert main(base).cross_fit == read(read(base).dump()).systems["main"].cross_fit == 3
    assert "2" in refused(base, ["teacher.cross_fit=1"])
    assert "teacher.weights" in refused(base, [f"teacher.weights={tmp_path / 'w.safetensors'}"])
    alone = {key: DIGITS[key] for key in ("data", "train", "teacher")}
    assert "cross_fit" in refused(alone, ["teacher.cross_fit=3"])


def test_how_a_teacher_runs_while_it_labels_is_resolved_and_wants_a_student():
    how = {"precision": "bf16", "layout": "channels_last", "compile": True}
    base = changed(DIGITS, teacher__inference=how)
    assert main(base).inference.model_dump() == read(read(base).dump()).systems["main"].inference.model_dump() == how
    assert main(DIGITS).inference.model_dump() == {"precision": None, "layout": None, "compile": False}
    assert "fp64" in refused(base, ["teacher.inference.precision=fp64"])
    assert "precision" in refused(base, ["teacher.inference.precison=bf16"])
    alone = {key: DIGITS[key] for key in ("data", "train", "teacher")}
    assert refused(alone, ["teacher.inference.compile=true"]).startswith("teacher.inference: ")


def test_a_student_of_another_model_cannot_start_from_the_teacher():
    text = refused(DIGITS, ["student.start=teacher"])
    assert text.startswith("student.start: ")
    assert "random" in text


def test_without_a_source_one_network_is_trained():
    alone = main(ALONE)
    assert alone.source is None
    assert alone.weights is None


@pytest.mark.parametrize("student", [{"start": "random"}, {"control": True}, {"start": "teacher"}])
def test_a_student_needs_a_source(student):
    assert refused({**ALONE, "student": student}).startswith("source: required")


def test_a_source_needs_a_point():
    text = refused(without(DIGITS, "points"))
    assert text.startswith("points: ")
    assert "soft_labels" in text


# rule 3: the settings of a training


@pytest.mark.parametrize(
    ("place", "inside"),
    [
        ("train", "teacher student"),
        ("systems.one.train", "teacher student"),
        ("systems.one.teacher.train", "teacher"),
        ("systems.one.student.train", "student"),
    ],
)
def test_an_inner_training_overrides_single_keys(place, inside):
    one = {key: DIGITS[key] for key in ("teacher", "student", "source", "points")}
    recipe = {"data": DIGITS["data"], "train": {"epochs": 60, "batch": 7}, "systems": {"one": one, "two": one}}
    systems = read(recipe, [f"{place}.epochs=3"]).systems
    for name, system in systems.items():
        for role, network in (("teacher", system.teacher), ("student", system.student)):
            reached = role in inside.split() and (name == "one" or place == "train")
            assert network.train.epochs == (3 if reached else 60)
            assert network.train.batch == 7


def test_the_innermost_wins():
    one = {key: DIGITS[key] for key in ("source", "points")}
    one |= {"model": {"kind": "digits_mlp"}, "train": {"epochs": 2, "seed": 2}, "student": {"train": {"epochs": 3}}}
    system = read({"data": DIGITS["data"], "train": {"epochs": 1, "seed": 1, "batch": 1}, "systems": {"one": one}})
    one = system.systems["one"]
    assert (one.teacher.train.epochs, one.teacher.train.seed, one.teacher.train.batch) == (2, 2, 1)
    assert (one.student.train.epochs, one.student.train.seed, one.student.train.batch) == (3, 2, 1)


def test_one_setting_of_the_optimizer_is_a_single_key_too():
    recipe = changed(DIGITS, train__optimizer={"kind": "sgd", "lr": 0.1, "momentum": 0.9})
    optimizer = main(recipe, ["student.train.optimizer.lr=0.5"]).student.train.optimizer
    assert (optimizer.lr, optimizer.kind, optimizer.momentum) == (0.5, "sgd", 0.9)


def test_another_optimizer_does_not_inherit_the_settings_of_the_first():
    recipe = changed(DIGITS, train__optimizer={"kind": "sgd", "lr": 0.1, "momentum": 0.9})
    optimizer = main(recipe, ["student.train.optimizer={kind='adamw', lr=0.5}"]).student.train.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.momentum) == ("adamw", 0.5, None)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_a_setting_that_an_optimizer_does_not_have_is_refused(kind):
    text = refused(changed(DIGITS, train__optimizer={"kind": kind, "momentum": 0.5}))
    assert "train.optimizer" in text
    assert "momentum" in text


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "'1e-3'", "true"])
def test_a_learning_rate_is_a_number_above_0(value):
    assert "train.optimizer.lr" in refused(DIGITS, [f"train.optimizer.lr={value}"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("device", "cpu"), ("precision", "bf16"), ("layout", "channels_last"), ("seed", 7), ("threads", 1)],
)
def test_how_to_compute_is_a_key_of_the_training(key, value):
    assert getattr(main(changed(DIGITS, **{f"train__{key}": value})).student.train, key) == value


@pytest.mark.parametrize(
    "place",
    [
        "train",
        "teacher.train",
        "student.train",
        "teacher.pretrain.train",
        "systems.raw.train",
        "systems.raw.teacher.train",
    ],
)
def test_a_misspelt_key_of_a_training_is_found_wherever_it_stands(place):
    recipe = SCENES if place.startswith("systems") else DIGITS
    assert f"{place}.epoch: unknown key. Did you mean 'epochs'?" in refused(recipe, [f"{place}.epoch=3"])


@pytest.mark.parametrize("key", ["epochs", "batch", "accumulate", "threads", "patience"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_counts_of_a_training_are_whole_numbers_from_1(key, value):
    assert refused(changed(DIGITS, **{f"student__train__{key}": value})).startswith(f"student.train.{key}: ")


def test_epochs_are_required_and_the_message_shows_what_to_type():
    text = refused(without(DIGITS, "train"))
    assert "train.epochs: required" in text
    assert "--set train.epochs=" in text


def test_the_resolved_recipe_has_every_value():
    dumped = read(SCENES).dump()
    settings = {name: getattr(Train(epochs=25), name) for name in Train.model_fields}
    known = {name for name, value in settings.items() if value is not None}
    for system in dumped["systems"].values():
        for role in ("teacher", "student"):
            assert known <= set(system[role]["train"])
            assert {"kind", "width", "activate_embedding"} <= set(system[role]["model"])
        assert system["student"]["start"] == "teacher"
        assert system["student"]["control"] is False
        assert {"kind", "weight", "tap"} <= set(system["points"]["hidden"])
        assert {"kind", "segments", "join", "view", "seed"} <= set(system["source"])
    assert dumped["scorer"] == {"kind": "svm", "c": 1.0, "kernel": "rbf", "gamma": "scale", "scale_features": False}
    assert dumped["fusion"] == {"kind": "mean", "weights": {}, "normalise": "none"}
    assert dumped["data"]["fold"] == 1
    assert "train" not in dumped


# rule 4: a first training


def test_a_first_training_changes_settings_of_the_model_and_of_the_training():
    teacher = read(SCENES).systems["spectrogram"].teacher
    model, train = teacher.pretrain
    assert model.settings.gru is False
    assert model.settings.width == teacher.model.settings.width == 0.25
    assert (train.epochs, train.batch) == (10, 20)
    assert teacher.model.settings.gru is True


def test_a_first_training_of_a_student_is_that_of_its_own_model():
    recipe = changed(DIGITS, teacher__pretrain={"train": {"epochs": 1}})
    system = main(recipe)
    assert system.teacher.pretrain[0].settings.width == 256
    assert system.student.pretrain[0].settings.width == 16
    assert system.student.pretrain[1].epochs == 1


def test_a_resolved_first_training_of_a_student_is_still_that_of_its_own_model():
    first = read(changed(DIGITS, teacher__pretrain={"train": {"epochs": 1}}, student__train={"batch": 5}))
    again = read(first.dump())
    (model, train), (model_again, train_again) = (one.systems["main"].student.pretrain for one in (first, again))
    assert model_again.dump() == model.dump()
    assert train_again == train


def test_an_unknown_setting_of_a_first_training_is_found():
    text = refused(changed(DIGITS, teacher__pretrain={"model": {"widht": 3}}))
    assert "teacher.pretrain.model.widht: unknown key. Did you mean 'width'?" in text


# rules 5 and 6: what is known when a recipe is read


@pytest.mark.parametrize("value", ["first", True, 1])
def test_select_is_best_or_last(value):
    assert "'best' or 'last'" in refused(changed(DIGITS, train__select=value))


def test_without_a_scorer_and_fusion_there_is_none():
    assert read(DIGITS).scorer is None
    assert read(DIGITS).fusion is None


def test_fusion_wants_two_systems():
    assert refused({**DIGITS, "fusion": {"kind": "mean"}}).startswith("fusion: ")
    one = {**SCENES, "systems": {"raw": SCENES["systems"]["raw"]}}
    assert refused(one).startswith("fusion: ")


def test_fusion_weighs_systems_that_there_are():
    assert read(changed(SCENES, fusion__weights={"raw": 2})).fusion.weights == {"raw": 2.0}
    text = refused(changed(SCENES, fusion__weights={"rav": 2.0}))
    assert text.startswith("fusion.weights.rav: ")
    assert "Did you mean 'raw'?" in text


@pytest.mark.parametrize("weight", [-1, "1", True, None])
def test_the_weights_of_a_fusion_are_numbers_from_0(weight):
    assert refused(changed(SCENES, fusion__weights={"raw": weight})).startswith("fusion.weights.raw: ")


def test_weights_of_a_fusion_that_are_all_0_are_refused_before_anything_is_trained():
    assert refused(changed(SCENES, fusion__weights={"raw": 0, "spectrogram": 0})).startswith("fusion.weights")


def test_no_system_is_called_as_the_row_of_the_fusion_is():
    system = {"model": {"kind": "digits_mlp"}}
    recipe = {"data": {"kind": "digits"}, "train": {"epochs": 1}, "systems": {"fusion": system, "other": system}}
    assert "fusion" in refused({**recipe, "fusion": {"kind": "mean"}})


# rule 7: files, paths and --set


@pytest.fixture
def written(tmp_path):
    """Write a recipe file and return its path."""

    def write(text, name="recipe.toml"):
        path = tmp_path / "recipes" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


SCENE_FILE = """
[data]
kind = "dcase"
root = "sounds/here"
[train]
epochs = 1
[model]
kind = "wave_cnn"
[teacher]
weights = "teacher.safetensors"
[source]
kind = "same_input"
[points.hidden]
kind = "hidden_mse"
"""


def test_paths_in_a_file_are_relative_to_the_file(written, monkeypatch, tmp_path):
    path = written(SCENE_FILE)
    monkeypatch.chdir(tmp_path)
    for name in (path, str(path), "recipes/recipe.toml"):
        recipe = read(name)
        assert recipe.data.settings.root == path.parent / "sounds" / "here"
        assert recipe.systems["main"].weights == path.parent / "teacher.safetensors"


def test_paths_on_the_command_line_are_relative_to_the_working_directory(written, monkeypatch, tmp_path):
    path = written(SCENE_FILE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = read(path, ["data.root=sounds", "teacher.weights='w/a.safetensors'"])
    assert recipe.data.settings.root == tmp_path / "here" / "sounds"
    assert recipe.systems["main"].weights == tmp_path / "here" / "w" / "a.safetensors"
    table = read(path, ["data={kind='dcase', root='inner'}"])
    assert table.data.settings.root == tmp_path / "here" / "inner"


def test_paths_in_a_dictionary_are_relative_to_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert read(changed(SCENES, data__root="sounds")).data.settings.root == tmp_path / "sounds"
    assert read(changed(SCENES, data__root=Path("sounds"))).data.settings.root == tmp_path / "sounds"


def test_a_resolved_recipe_means_the_same_paths_everywhere(written, monkeypatch, tmp_path):
    first = read(written(SCENE_FILE))
    (tmp_path / "elsewhere").mkdir()
    copied = tmp_path / "elsewhere" / "recipe.json"
    copied.write_text(json.dumps(first.dump()))
    monkeypatch.chdir("/")
    assert read(copied).dump() == first.dump()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("128", 128),
        ("'128'", "128"),
        ("true", True),
        ("0.5", 0.5),
        ("a b", "a b"),
        ("", ""),
        ("128 ", 128),
        ("1e-3", 1e-3),
    ],
)
def test_a_value_is_read_as_toml_else_as_a_string(fresh, text, value):
    class Mine:
        @kdlib.hookimpl
        def kdlib_points(self):
            def anything(*, it: bool | int | float | str):
                return it

            return {"anything": anything}

    fresh(Mine())
    seen = main(DIGITS, ["points.it.kind=anything", f"points.it.it={text}"]).points["it"].part.settings.it
    assert seen == value
    assert type(value) is not bool or seen is value


def test_a_value_may_be_an_array_or_a_table():
    point = main(DIGITS, ["points.soft.epochs=[1, 3]", "points.hard={kind='hard_labels', weight=2}"]).points
    assert point["soft"].weight(0, 0) == 0
    assert point["hard"].weight == 2


def test_words_of_a_list_are_typed_as_they_stand():
    recipe = read(DIGITS, ["name=typed", "train.precision=bf16", "train.device=cpu", "points.soft.form=kl"])
    assert recipe.name == "typed"
    assert recipe.systems["main"].teacher.train.precision == "bf16"
    assert read(recipe.dump()).dump() == recipe.dump()


def test_the_last_change_of_a_key_wins_and_the_file_is_not_written():
    before = find("digits").read_bytes()
    assert main("digits", ["train.batch=2", "train.batch=3"]).teacher.train.batch == 3
    assert find("digits").read_bytes() == before


@pytest.mark.parametrize("change", ["", "=", "train", "train.epochs", "=3", ".=3", "train.=3", "train..epochs=3"])
def test_a_change_is_a_key_and_a_value(change):
    assert "key.key=value" in refused(DIGITS, [change])


def test_a_change_does_not_go_through_a_value():
    assert "'train'" in refused(DIGITS, ["data.train.more=3"])


@pytest.mark.parametrize(
    ("change", "place", "meant"),
    [
        ("train.epoch=3", "train.epoch", "epochs"),
        ("trian.epochs=3", "trian", "train"),
        ("points.soft.temprature=3", "points.soft.temprature", "temperature"),
        ("points.soft.wieght=3", "points.soft.wieght", "weight"),
        ("student.strat=teacher", "student.strat", "start"),
        ("data.trian=3", "data.trian", "train"),
        ("train.optimizer.lrr=3", "train.optimizer.lrr", "lr"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(change, place, meant):
    text = refused(DIGITS, [change])
    assert text.startswith(f"{place}: unknown key.")
    assert f"Did you mean '{meant}'?" in text


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 5000, "{a=" * 5000], ids=["long", "arrays", "tables"])
def test_a_value_that_toml_cannot_read_is_a_string_and_no_crash(text):
    assert refused(DIGITS, [f"train.epochs={text}"])


def test_an_empty_required_path_shows_what_to_type():
    text = refused("asc_esc10")
    assert "data.root: a path is required here" in text
    assert "--set data.root=PATH" in text


# rule 8: folds


@pytest.mark.parametrize("fold", [1, [1, 2], "all"])
def test_a_fold_is_a_number_several_or_all(fold):
    assert read(changed(SCENES, data__fold=fold)).data.settings.fold == fold


@pytest.mark.parametrize("fold", ["al", "1", -1, 1.5, True, ["1"], {"a": 1}])
def test_other_folds_are_refused(fold):
    assert "data.fold" in refused(changed(SCENES, data__fold=fold))


# rule 9: the name of a run


@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_recipe_resolves_to_itself(name):
    first = read(RECIPES[name])
    again = read(json.loads(json.dumps(first.dump(), allow_nan=False)))
    assert again.dump() == first.dump()
    assert again.digest() == first.digest()


def test_every_shipped_recipe_resolves_to_itself():
    assert {"digits", "asc_esc10", "asc_quick"} <= set(shipped())
    for name, path in shipped().items():
        first = read(name, ["data.root=/nowhere"] if "root = " in path.read_text() else [])
        assert read(first.dump()).dump() == first.dump()


def test_the_digest_is_of_the_resolved_recipe():
    digest = read(DIGITS).digest()
    assert re.fullmatch("[0-9a-f]{8}", digest)
    assert read(dict(reversed(DIGITS.items()))).digest() == digest
    assert read(changed(DIGITS, points__soft__tap="logits", train__seed=0)).digest() == digest
    assert read(changed(DIGITS, train__seed=1)).digest() != digest
    assert read(changed(DIGITS, points__soft__weight=0.8)).digest() != digest


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "run\n", 3, "..", "ä"])
def test_a_name_that_is_no_plain_folder_is_refused(name):
    assert refused({**DIGITS, "name": name}).startswith("name: ")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "a b", "one.two"])
def test_a_system_is_named_like_a_folder(name):
    systems = {name: SCENES["systems"]["raw"], "other": SCENES["systems"]["raw"]}
    assert refused({**SCENES, "systems": systems}).startswith("systems")


def test_a_plugins_own_relative_path_means_the_same_in_the_run_folder(fresh, tmp_path, monkeypatch):
    class Mine:
        @kdlib.hookimpl
        def kdlib_datasets(self):
            def here(*, root: Path = Path("sounds")):
                return root

            return {"here": here}

    fresh(Mine())
    monkeypatch.chdir(tmp_path)
    first = read({**DIGITS, "data": {"kind": "here"}})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(first.dump()))
    assert read(tmp_path / "run" / "recipe.json").dump() == first.dump()


# rule 10: schedules


LINEAR = {"kind": "linear", "start": 0.0, "end": 1.0, "epochs": 4}


def test_a_schedule_stands_where_a_weight_stands():
    weight = main(changed(DIGITS, points__soft__weight=LINEAR)).points["soft"].weight
    assert [weight(0, epoch) for epoch in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize("name", ["temperature", "student_temperature"])
def test_a_schedule_stands_where_a_temperature_stands(name):
    block = {"kind": "cosine", "start": 4.0, "end": 1.0, "steps": 10, "begin": 5}
    value = getattr(main(changed(DIGITS, **{f"points__soft__{name}": block})).points["soft"].part.settings, name)
    assert isinstance(value, kdlib.Schedule)
    assert (value(5, 0), value(15, 0)) == (4.0, 1.0)


def test_a_schedule_resolves_to_itself():
    recipe = changed(DIGITS, points__soft__weight=LINEAR, points__soft__temperature={**LINEAR, "start": 2.0})
    first = read(changed(recipe, points__soft__epochs=[1, 3]))
    again = read(first.dump())
    assert again.dump() == first.dump()
    weights = [[one.systems["main"].points["soft"].weight(0, e) for e in range(6)] for one in (first, again)]
    assert weights[0] == weights[1] == [0.0, 0.25, 0.5, 0.0, 0.0, 0.0]


def test_epochs_limit_a_point():
    weight = main(changed(DIGITS, points__soft__epochs=[5, 20])).points["soft"].weight
    assert [weight(0, epoch) for epoch in (0, 4, 5, 19, 20)] == [0.0, 0.0, 0.9, 0.9, 0.0]


@pytest.mark.parametrize("epochs", [[5, 5], [6, 5], [5], [1, 2, 3], [], [-1, 2], ["1", "2"], [1.0, 2.0], 5, "1-2"])
def test_epochs_are_a_range(epochs):
    assert refused(changed(DIGITS, points__soft__epochs=epochs)).startswith("points.soft.epochs")


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({**LINEAR, "ende": 2.0}, "points.soft.weight.ende: unknown key. Did you mean 'end'?"),
        ({"kind": "linear", "start": 0.0, "epochs": 4}, "needs an end"),
        ({"kind": "linear", "start": 0.0, "end": 1.0}, "needs epochs or steps"),
        ({**LINEAR, "steps": 4}, "one of the two"),
        ({**LINEAR, "kind": "lin"}, "points.soft.weight.kind"),
        ({**LINEAR, "end": "1"}, "points.soft.weight.end"),
        (-0.5, "points.soft.weight: "),
        ("0.5", "points.soft.weight: "),
        (True, "points.soft.weight: "),
    ],
)
def test_a_weight_is_a_number_from_0_or_a_schedule(block, words):
    assert words in refused(changed(DIGITS, points__soft__weight=block))


def test_a_point_may_be_shown_one_of_several_teachers():
    assert main(changed(DIGITS, points__soft__teacher="a")).points["soft"].teacher == "a"
    assert refused(changed(DIGITS, points__soft__teacher=1)).startswith("points.soft.teacher")


@pytest.mark.parametrize("name", ["a.b", "a b", "", "1a", "a-b"])
def test_a_point_is_named_like_a_variable(name):
    assert refused({**DIGITS, "points": {name: {"kind": "hard_labels"}}}).startswith(f"points.{name}: ")


@pytest.mark.parametrize("name", ["keys", "train", "forward", "student", "source", "self"])
def test_a_point_may_have_any_such_name(name):
    assert list(main({**DIGITS, "points": {name: {"kind": "hard_labels"}}}).points) == [name]


# kinds


@pytest.mark.parametrize(
    ("place", "kind", "meant"),
    [
        ("data", "dataset", "digits"),
        ("teacher.model", "model", "digits_mlp"),
        ("source", "source", "same_input"),
        ("points.soft", "point", "soft_labels"),
        ("features", "features", "spectrogram"),
        ("scorer", "scorer", "svm"),
    ],
)
def test_an_unknown_kind_is_an_error_with_its_place_and_a_suggestion(place, kind, meant):
    text = refused(DIGITS, [f"{place}={{kind='{meant}s'}}"], kdlib.PluginError)
    assert text.startswith(f"{place}.kind: No {kind} named '{meant}s'. Did you mean '{meant}'?")


@pytest.mark.parametrize("value", [None, 3, True, ["digits"], {"a": 1}])
def test_a_kind_is_a_word_and_the_message_lists_those_there_are(value):
    text = refused(changed(DIGITS, data__kind=value))
    assert text.startswith("data.kind: ")
    assert "digits" in text


def test_a_kind_that_is_missing_is_required():
    assert refused({**DIGITS, "source": {}}).startswith("source.kind: required")


@pytest.mark.parametrize("place", ["teacher__model", "points__soft", "source", "data", "scorer", "features"])
@pytest.mark.parametrize("value", [3, "digits", [1], True])
def test_a_block_is_a_table(place, value):
    assert refused(changed(DIGITS, **{place: value})).startswith(place.replace("__", "."))


class Nested:
    """Sources and points that are made of others."""

    @kdlib.hookimpl
    def kdlib_sources(self):
        def both(teacher, sources, *, share: float = 0.5):
            return teacher, sources, share

        return {"both": both}

    @kdlib.hookimpl
    def kdlib_points(self):
        class Sum(nn.Module):
            def __init__(self, points) -> None:
                super().__init__()
                self.points = points

        return {"sum": Sum}


def test_sources_and_points_are_built_from_nested_blocks(fresh):
    fresh(Nested())
    inner = {"one": {"kind": "same_input"}, "two": {"kind": "both", "sources": {"three": {"kind": "same_input"}}}}
    recipe = changed(DIGITS, source={"kind": "both", "sources": inner})
    recipe["points"]["sum"] = {"kind": "sum", "weight": 2.0, "points": {"a": {"kind": "soft_labels"}}}
    first = read(recipe)
    system = first.systems["main"]
    assert list(system.source.nested["sources"]) == ["one", "two"]
    assert system.points["sum"].part.nested["points"]["a"].settings.temperature == 1.0
    assert read(first.dump()).dump() == first.dump()
    assert "share" in first.dump()["systems"]["main"]["source"]["sources"]["two"]


@pytest.mark.parametrize("inner", [None, {}, 3, [1]])
def test_nested_blocks_are_required(fresh, inner):
    fresh(Nested())
    block = {"kind": "both"} if inner is None else {"kind": "both", "sources": inner}
    assert refused(changed(DIGITS, source=block)).startswith("source.sources: required")


def test_problems_in_nested_blocks_have_their_place(fresh):
    fresh(Nested())
    block = {"kind": "both", "sources": {"one": {"kind": "same_inputs"}}}
    text = refused(changed(DIGITS, source=block), error=kdlib.PluginError)
    assert text.startswith("source.sources.one.kind: ")
    block = {"kind": "both", "sources": {"one": {"kind": "same_input", "extra": 1}}}
    assert refused(changed(DIGITS, source=block)).startswith("source.sources.one.extra: unknown key")


# files


def test_a_recipe_is_read_from_toml_and_from_json(written):
    assert read(written(SCENE_FILE)).data.plugin.name == "dcase"
    assert read(written(json.dumps(DIGITS), "recipe.json")).dump() == read(DIGITS).dump()


def test_a_shipped_recipe_is_read_by_its_name():
    assert read("digits").name == "digits"
    assert find("digits").parent.name == "recipes"


def test_an_unknown_recipe_gets_a_suggestion():
    text = refused("digit")
    assert "No recipe named 'digit'" in text
    assert "Did you mean 'digits'?" in text


@pytest.mark.parametrize(
    "name", ["no_such_file.toml", "no/such/file.json", "a\0b", "a\0b.toml", ".", "", "/", "x" * 300]
)
def test_a_file_that_is_not_there_is_a_message(name):
    assert refused(name)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "missing.toml"
    assert refused(path) == f"{path}: there is no such file."


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("name = ", "bad.toml"),
        ("[data]\nkind = 'a'\n[data]\n", "twice.toml"),
        (b"name = '\xff\xfe'", "latin.toml"),
        ("name = 'a'".encode("utf-16"), "wide.toml"),
        ("{", "bad.json"),
        ("[1, 2]", "list.json"),
        ("3", "number.json"),
        ("[" * 100_000, "deep.json"),
        ("a = " + "[" * 50_000, "deep.toml"),
        ("a = " + "9" * 5000, "long.toml"),
        ("9" * 5000, "long.json"),
        ("", "empty.json"),
        (b"\x00", "nul.toml"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(("toml", "json")) else "",
)
def test_a_file_that_is_no_recipe_is_named(written, text, name):
    path = written(text, name)
    assert refused(path).startswith(f"{path}: ")


def test_an_empty_file_lacks_its_data(written):
    assert refused(written("")).startswith("data: required")


def test_a_folder_is_no_recipe(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    assert refused(tmp_path / "folder.toml").startswith(str(tmp_path / "folder.toml"))


def test_the_size_of_a_file_is_bounded(written):
    head = SCENE_FILE.encode()
    path = written(head + b"#" * (LARGEST - len(head)))
    assert read(path).name == "run"
    path = written(head + b"#" * (LARGEST - len(head) + 1))
    assert f"{LARGEST:,}" in refused(path)


def test_a_number_that_is_none_is_refused_in_json(written):
    text = json.dumps(changed(DIGITS, points__soft__weight=float("nan")))
    assert "points.soft.weight" in refused(written(text, "recipe.json"))


# dictionaries


def test_the_dictionary_of_the_caller_is_not_changed():
    for recipe in RECIPES.values():
        before = copy.deepcopy(recipe)
        read(recipe, ["train.epochs=3", "scorer.c=2", "scorer.kind=svm"])
        assert recipe == before


def test_any_mapping_is_a_recipe():
    assert read(types.MappingProxyType(DIGITS)).dump() == read(DIGITS).dump()
    inner = {**DIGITS, "data": types.MappingProxyType(DIGITS["data"])}
    assert read(inner).dump() == read(DIGITS).dump()


@pytest.mark.parametrize("recipe", [{("a", "b"): 1}, {"data": {b"kind": "digits"}}, {1: 2}, {None: {}}])
def test_a_dictionary_with_odd_keys_is_refused(recipe):
    assert refused(recipe)


def test_a_dictionary_that_holds_itself_is_refused():
    recipe = {}
    recipe["data"] = recipe
    assert refused(recipe)


WORDS = [
    *("name", "data", "train", "systems", "teacher", "student", "source", "points", "model", "features", "scorer"),
    *("fusion", "kind", "weight", "epochs", "soft", "hidden", "raw", "main", "width", "start", "pretrain", "weights"),
    *("control", "optimizer", "lr", "temperature", "root", "segments", "sources", "select", "patience", "steps", "end"),
]
VALUES = [
    *("digits", "digits_mlp", "dcase", "same_input", "soft_labels", "hard_labels", "multi_segment", "svm", "mean", ""),
    *("linear", "cosine", "constant", "adam", "teacher", "random", "best", "all", "z", "../x", "\0", "\ud800"),
]
KEYS = st.sampled_from(WORDS) | st.text(string.printable, max_size=6)
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, 10**400, -1, 0, 1, 2])
    | st.floats()
    | st.sampled_from(VALUES)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


BUSY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
"""The machine may have other things to do."""


def places(table, at=()):
    """Return the key paths of a nested dictionary."""
    found = []
    for key, value in table.items():
        found.append((*at, key))
        if isinstance(value, dict):
            found += places(value, (*at, key))
    return found


@st.composite
def mutations(draw):
    """A good recipe with up to three values replaced, removed, renamed or put in."""
    recipe = copy.deepcopy(draw(st.sampled_from(list(RECIPES.values()))))
    for _ in range(draw(st.integers(1, 3))):
        *keys, last = draw(st.sampled_from(places(recipe) or [("data",)]))
        table = recipe
        for key in keys:
            table = table[key]
        match draw(st.sampled_from(["replace", "remove", "rename", "put in"])):
            case "replace":
                table[last] = draw(JUNK)
            case "remove":
                table.pop(last, None)
            case "rename":
                table[draw(KEYS)] = table.pop(last, None)
            case "put in":
                table[draw(KEYS)] = draw(JUNK)
    return recipe


def assert_read_or_refused(recipe, changes=()):
    """A recipe is read, and then resolves to itself, or is refused with a text; the caller's is not changed."""
    before = repr(recipe)
    text = None
    try:
        first = read(recipe, list(changes))
    except (kdlib.RecipeError, kdlib.PluginError) as error:
        text = str(error)
    else:
        again = read(json.loads(json.dumps(first.dump(), allow_nan=False)))
        assert again.dump() == first.dump()
        assert len(first.digest()) == 8
    assert text is None or text.strip()
    assert repr(recipe) == before


@settings(max_examples=100, **BUSY)
@given(st.dictionaries(KEYS, JUNK, max_size=5))
def test_junk_gives_nothing_but_our_errors(recipe):
    assert_read_or_refused(recipe)


@settings(max_examples=200, **BUSY)
@given(mutations())
def test_a_mutated_recipe_gives_nothing_but_our_errors(recipe):
    assert_read_or_refused(recipe)


@settings(max_examples=100, **BUSY)
@given(st.sampled_from(list(RECIPES)), st.data())
def test_a_random_change_gives_nothing_but_our_errors(name, data):
    key = ".".join(data.draw(st.sampled_from(places(RECIPES[name])) | st.lists(KEYS, min_size=1, max_size=3)))
    text = data.draw(st.text(max_size=8) | JUNK.map(repr) | st.sampled_from(VALUES))
    assert_read_or_refused(RECIPES[name], [f"{key}={text}"])


@settings(max_examples=60, **BUSY)
@given(st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
def test_a_file_of_junk_gives_nothing_but_our_errors(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "junk.toml"
    path.write_bytes(content)
    with pytest.raises(kdlib.RecipeError):
        read(path)


VALUES_OF_OTHER_KINDS = [float("nan"), float("inf"), -1, [], [[]], {"a": 1}, b"bytes", 10**400, -(10**30)]


@settings(max_examples=200, **BUSY)
@given(st.sampled_from(sorted(RECIPES)), st.data())
def test_a_recipe_with_one_bad_setting_is_refused_with_its_path(name, data):
    """A value that no setting of that place has, or a key that it does not have."""
    recipe = json.loads(json.dumps(read(RECIPES[name]).dump()))
    at = data.draw(st.sampled_from([key for key in places(recipe) if key[-1] != "kind"]))
    table = recipe
    for key in at[:-1]:
        table = table[key]
    if isinstance(table[at[-1]], dict) and data.draw(st.booleans()):
        at = (*at, data.draw(st.sampled_from(["wdth", "no_such_key", "Epochs"])))
        table = table[at[-2]]
        table[at[-1]] = 1
    else:
        table[at[-1]] = data.draw(st.sampled_from(VALUES_OF_OTHER_KINDS))
    try:
        read(recipe)
    except (kdlib.RecipeError, kdlib.PluginError) as error:
        said = str(error)
    else:  # some places take any number, or a table of any names
        return
    named = {line.partition(":")[0] for line in said.splitlines()} | set(re.findall(r"\w+\.[\w.]+\w", said))
    path = ".".join(at)
    assert any(path.startswith(one) or one.startswith(path) for one in named), said


BOMBS = {
    "one key of many dots": "a." * 200_000 + "a = 1",
    "one header of many dots": "[" + "a." * 200_000 + "a]",
    "dots inside a table": "data = {" + "a." * 200_000 + "a = 1}",
    "many keys of many dots": "\n".join(f"{'a.' * 290}k{number} = 1" for number in range(800)),
    "many unknown keys": "\n".join(f"k{number} = 1" for number in range(40_000)),
    "deep arrays": "data = " + "[" * 200_000,
    "deep tables, as far as the reader goes": "data = " + "{a = " * 60 + "1" + "}" * 60,
    "a long number": "data = " + "9" * 400_000,
    "too large": "#" * (LARGEST + 1),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", BOMBS)
def test_a_file_that_would_take_long_or_exhaust_the_stack_is_refused(written, kind):
    assert len(refused(written(BOMBS[kind]))) < 20_000


@pytest.mark.parametrize("depth", [60, 900, 50_000])
def test_json_that_is_deep_is_refused(written, depth):
    assert "nested too deeply" in refused(written('{"data":' * depth + "1" + "}" * depth, "recipe.json"))


@pytest.mark.parametrize(
    "kind",
    ["os.mkdir", "os:mkdir", "kdlib_asc.plugin", "builtins.eval", "__import__('os')", "/tmp/x.py", "../x", "a\0b"],
)
@pytest.mark.parametrize("place", ["data", "teacher__model", "points__soft", "source"])
def test_a_kind_is_a_registered_name_and_never_a_path_of_code(kind, place):
    with pytest.raises(kdlib.PluginError, match=r"No .* named"):
        read(changed(DIGITS, **{f"{place}__kind": kind}))


# where features are kept


def test_without_a_cache_there_is_none():
    assert read(SCENES).cache is None
    assert "cache" not in read(SCENES).dump()


def test_the_folder_of_a_cache_is_relative_to_the_file_and_on_the_command_line_to_the_working_directory(tmp_path):
    text = '[cache]\nfolder = "kept"\n[data]\nkind = "dcase"\nroot = "/nowhere"\n[features]\nkind = "pre_emphasis"\n'
    (tmp_path / "r.toml").write_text(f'{text}[model]\nkind = "wave_cnn"\n[train]\nepochs = 1\n')
    recipe = read(tmp_path / "r.toml")
    assert (recipe.cache.folder, recipe.cache.dtype) == (tmp_path / "kept", "float32")
    assert recipe.dump()["cache"] == {"folder": str(tmp_path / "kept"), "dtype": "float32"}
    assert read(recipe.dump()).dump() == recipe.dump()
    typed = read(tmp_path / "r.toml", ["cache.folder=here", "cache.dtype=float16"])
    assert (typed.cache.folder, typed.cache.dtype) == (Path.cwd() / "here", "float16")


def test_a_digest_tells_what_is_computed_and_not_where_it_is_kept():
    plain, here, there = (read({**SCENES, **block}).digest() for block in ({}, cache_of("a"), cache_of("b")))
    assert plain == here == there
    halves = {read({**SCENES, **cache_of(place, "float16")}).digest() for place in "ab"}
    assert len(halves) == 1
    assert plain not in halves


def cache_of(folder, dtype="float32"):
    return {"cache": {"folder": folder, "dtype": dtype}}


@pytest.mark.parametrize(
    ("block", "start"),
    [
        ({}, "cache.folder: required"),
        ({"folder": ""}, "cache.folder: a path is required"),
        ({"folder": "a", "dtype": "bfloat16"}, "cache.dtype: "),
        ({"folder": "a", "kind": "disk"}, "cache.kind: unknown key"),
    ],
    ids=str,
)
def test_a_cache_that_is_none_is_refused(block, start):
    assert refused({**SCENES, "cache": block}).startswith(start)


def test_a_cache_without_features_is_refused():
    assert refused({**DIGITS, **cache_of("a")}).startswith("cache: no system has features")
