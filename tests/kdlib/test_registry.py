"""The registry: who brings which plugin, and what is said of those that do not work."""

import importlib
import sys
import warnings
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hatchling.builders.wheel import WheelBuilder
from torch import nn

import kdlib
from kdlib import hooks
from kdlib.digits import DigitsMLP
from kdlib.errors import did_you_mean
from kdlib.recipe import read, shipped
from kdlib.registry import PluginWarning, Registry, build, registry
from kdlib.testing import check_point

PACKAGES = Path(__file__).parents[1] / "plugins"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A registry of its own for every test, filled on first use."""
    for name in ("KDLIB_STRICT", "KDLIB_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """The plugin packages, each built as a wheel and unpacked into a folder of its own."""
    folders = {}
    for package in sorted(PACKAGES.iterdir()):
        folders[package.name] = tmp_path_factory.mktemp(package.name)
        wheel = next(iter(WheelBuilder(str(package)).build(directory=str(tmp_path_factory.mktemp("wheel")))))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folders[package.name])
    return folders


@pytest.fixture
def installed(sites, monkeypatch):
    """Put packages on the path and return the registry of the process, as a new process would fill it."""

    def put(*names):
        for name in names:
            monkeypatch.syspath_prepend(sites[name])
        return registry()

    return put


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module and return an entry point to it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text, entry=None):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        return EntryPoint(entry or name, name, "kdlib")

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def brings(*names):
    """The text of a module that brings points of these names."""
    return (
        f"import kdlib\n@kdlib.hookimpl\ndef kdlib_points():\n    return dict.fromkeys({names!r}, kdlib.HardLabels)\n"
    )


def plugin(hook="kdlib_points", **builders):
    """An object with one hook."""

    def implementation(self):
        return builders

    implementation.__name__ = hook
    return type("Mine", (), {hook: kdlib.hookimpl(implementation)})()


def all_names(plugins):
    return {kind: plugins.names(kind) for kind in hooks.HOOKS}


def core():
    """What there is without any package."""
    return all_names(Registry())


# the hooks


def test_there_is_one_hook_a_kind_and_none_takes_an_argument_or_stops_at_the_first():
    assert sorted(hooks.HOOKS.values()) == [
        "kdlib_datasets",
        "kdlib_features",
        "kdlib_models",
        "kdlib_points",
        "kdlib_scorers",
        "kdlib_sources",
    ]
    plugins = Registry()
    for hook in hooks.HOOKS.values():
        caller = getattr(plugins._manager.hook, hook)
        assert caller.spec.argnames == ()
        assert not caller.spec.opts.get("firstresult")
        assert getattr(hooks, hook).__doc__


def test_the_core_comes_in_by_the_same_hooks():
    plugins = Registry()
    assert plugins.names("model") == ["digits_mlp"]
    assert plugins.names("dataset") == ["digits"]
    assert "same_input" in plugins.names("source")
    assert {"hard_labels", "soft_labels"} <= set(plugins.names("point"))
    assert {one.package for one in plugins.plugins()} == {"kdlib"}


@pytest.mark.parametrize("kind", hooks.HOOKS)
def test_each_hook_brings_its_kind(kind):
    def mine(*, width: int = 3):
        return width

    kdlib.register(plugin(hooks.HOOKS[kind], mine=mine))
    assert registry().get(kind, "mine").build is mine
    assert [other for other in hooks.HOOKS if "mine" in registry().names(other)] == [kind]


# packages on the path


def test_a_package_is_found_by_its_entry_point_and_its_point_trains(installed):
    plugins = installed("good")
    point = plugins.get("point", "good_cosine")
    assert point.package == "good"
    assert point in plugins.plugins()
    check_point(build(point, point.settings(), {}, {}, "points.p"))
    assert "digits_cosine" in shipped()


def test_the_package_of_the_scenes_comes_in_by_an_entry_point_too(installed):
    assert installed().get("scorer", "svm").package == "asc"


def test_the_registry_is_filled_on_first_use_and_once(installed):
    assert installed("good") is registry()
    assert registry().plugins() == registry().plugins()


def test_a_broken_package_is_one_warning_and_the_host_goes_on(installed):
    with pytest.warns(PluginWarning) as seen:
        plugins = installed("broken", "good")
    assert len(seen) == 1
    assert "'broken'" in str(seen[0].message)
    assert "a_package_that_nobody_has" in str(seen[0].message)
    assert list(plugins.broken) == ["broken"]
    assert "ModuleNotFoundError" in plugins.broken["broken"]
    assert plugins.get("point", "good_cosine").package == "good"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry() is plugins
        assert "never_there" not in registry().names("point")


@pytest.mark.parametrize("kind", hooks.HOOKS)
def test_a_broken_package_is_named_wherever_a_name_is_not_found(installed, kind):
    with pytest.warns(PluginWarning):
        plugins = installed("broken", "typo")
    with pytest.raises(kdlib.PluginError, match=f"No {kind} named 'never_there'") as caught:
        plugins.get(kind, "never_there")
    assert "'broken'" in str(caught.value)
    assert "a_package_that_nobody_has" in str(caught.value)
    assert "'typo'" in str(caught.value)


def test_a_recipe_that_wants_a_broken_plugin_says_so_with_the_place(installed):
    with pytest.warns(PluginWarning):
        installed("broken")
    with pytest.raises(kdlib.PluginError, match=r"^points\.hard\.kind: (.|\n)*'broken'(.|\n)*nobody_has"):
        read("digits", ["points.hard.kind=never_there"])


def test_strict_mode_raises_and_keeps_the_cause(installed, monkeypatch):
    monkeypatch.setenv("KDLIB_STRICT", "1")
    with pytest.raises(kdlib.PluginError, match=r"'broken'.*a_package_that_nobody_has") as caught:
        installed("broken", "good")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("value", ["0", ""])
def test_strict_mode_is_off_unless_it_is_1(installed, monkeypatch, value):
    monkeypatch.setenv("KDLIB_STRICT", value)
    with pytest.warns(PluginWarning):
        assert "broken" in installed("broken").broken


def test_a_misspelt_hook_is_a_broken_plugin_and_nothing_of_it_stays(installed):
    with pytest.warns(PluginWarning, match="'kdlib_point'.*Did you mean 'kdlib_points'"):
        plugins = installed("typo")
    assert "Did you mean 'kdlib_points'" in plugins.broken["typo"]
    assert "typo_mlp" not in plugins.names("model")
    assert "typo" not in plugins.packages


# names that two packages claim


@pytest.mark.parametrize(("name", "other"), [("soft_labels", "kdlib"), ("good_cosine", "good")])
def test_of_two_claims_neither_wins_and_using_the_name_says_whose_they_are(installed, name, other):
    plugins = installed("good", "clash")
    assert name not in plugins.names("point")
    assert "squares" in plugins.names("point")
    with pytest.raises(kdlib.PluginError) as caught:
        plugins.get("point", name)
    assert f"'{other}'" in str(caught.value)
    assert "'clash'" in str(caught.value)
    assert "KDLIB_DISABLE" in str(caught.value)
    assert ("point", name, {other, "clash"}) in [(kind, claimed, set(by)) for kind, claimed, by in plugins.clashes()]


def test_a_clash_stops_nobody_who_does_not_use_the_name(installed):
    installed("clash")
    assert read("digits", ["points={hard={kind='hard_labels'}}"]).name == "digits"
    with pytest.raises(kdlib.PluginError, match=r"points\.soft\.kind: .*'kdlib' and 'clash'"):
        read("digits")


def test_the_order_of_the_packages_does_not_decide_a_clash(module):
    found = [module("first_one", brings("both", "one")), module("second_one", brings("both"))]
    for order in (found, found[::-1]):
        plugins = Registry(order)
        assert plugins.clashes() == [("point", "both", ["first_one", "second_one"])]
        assert plugins.get("point", "one").package == "first_one"


def test_one_name_of_two_kinds_is_no_clash():
    kdlib.register(plugin("kdlib_sources", hard_labels=kdlib.SameInput))
    assert registry().clashes() == []
    assert registry().get("source", "hard_labels").package == "Mine"


def test_disabling_one_side_heals_a_clash(installed, monkeypatch):
    monkeypatch.setenv("KDLIB_DISABLE", "clash")
    plugins = installed("good", "clash")
    assert plugins.clashes() == []
    assert plugins.get("point", "soft_labels").build is kdlib.SoftLabels
    assert plugins.get("point", "good_cosine").package == "good"
    with pytest.raises(kdlib.PluginError, match="No point named 'squares'"):
        plugins.get("point", "squares")


def test_several_are_disabled_by_a_list(installed, monkeypatch):
    monkeypatch.setenv("KDLIB_DISABLE", "clash, broken,typo")
    plugins = installed("good", "clash", "broken", "typo")
    assert plugins.broken == {}
    assert set(plugins.packages) == {"kdlib", "asc", "good"}


def test_a_star_leaves_the_core_and_imports_nothing_else(installed, monkeypatch):
    monkeypatch.setenv("KDLIB_DISABLE", "*")
    sys.modules.pop("kdlib_clash", None)
    plugins = installed("good", "clash", "broken", "typo")
    assert all_names(plugins) == core()
    assert plugins.broken == {}
    assert "kdlib_clash" not in sys.modules


def test_entry_points_are_taken_by_name(module):
    names = ["zeta", "alpha", "mid"]
    found = [module(f"order_{name}", brings(f"point_{name}"), entry=name) for name in names]
    assert list(Registry(found).packages) == ["kdlib", "alpha", "mid", "zeta"]


@pytest.fixture
def namesakes(module):
    return [module("same_one", brings("of_one"), entry="same"), module("same_two", brings("of_two"), entry="same")]


def test_two_packages_with_one_entry_point_name_are_one_warning_in_any_order(namesakes):
    seen_in_both = []
    for found in (namesakes, namesakes[::-1]):
        with pytest.warns(PluginWarning, match="'same'") as seen:
            plugins = Registry(found)
        assert len(seen) == 1
        assert "same" in plugins.broken
        seen_in_both.append((str(seen[0].message), all_names(plugins)))
    assert seen_in_both[0] == seen_in_both[1]


def test_two_packages_with_one_entry_point_name_are_both_named(namesakes):
    with pytest.warns(PluginWarning):
        plugins = Registry(namesakes)
    assert "same_one" in plugins.broken["same"]
    assert "same_two" in plugins.broken["same"]


def test_of_two_packages_with_one_entry_point_name_neither_wins(namesakes):
    with pytest.warns(PluginWarning):
        plugins = Registry(namesakes)
    assert not {"of_one", "of_two"} & set(plugins.names("point"))


def test_two_packages_with_one_entry_point_name_raise_in_strict_mode(namesakes, monkeypatch):
    monkeypatch.setenv("KDLIB_STRICT", "1")
    with pytest.raises(kdlib.PluginError, match="'same'"):
        Registry(namesakes)


@pytest.mark.parametrize(
    "statement",
    ["1 / 0", "raise SystemExit(3)", "def broken(:", "raise NotImplementedError", "raise kdlib.DataError('x')"],
)
def test_whatever_an_import_raises_the_host_goes_on(module, statement):
    point = module("bad_import", f"import kdlib\n{statement}\n")
    with pytest.warns(PluginWarning, match="bad_import"):
        plugins = Registry([point])
    assert list(plugins.broken) == ["bad_import"]
    assert all_names(plugins) == core()


def test_an_entry_point_to_nothing_is_a_broken_plugin():
    with pytest.warns(PluginWarning, match="nowhere"):
        plugins = Registry([EntryPoint("nowhere", "a_module_that_is_nowhere:thing", "kdlib")])
    assert all_names(plugins) == core()


# register


def test_a_module_is_registered_under_its_name():
    module = ModuleType("my_module")
    module.kdlib_points = kdlib.hookimpl(
        type("F", (), {"kdlib_points": lambda: {"mine": kdlib.HardLabels}}).kdlib_points
    )
    kdlib.register(module)
    assert registry().get("point", "mine").package == "my_module"


def test_an_object_is_registered_under_its_class_or_a_given_name():
    kdlib.register(plugin(mine=kdlib.HardLabels))
    kdlib.register(plugin(other=kdlib.HardLabels), "chosen")
    assert registry().get("point", "mine").package == "Mine"
    assert registry().get("point", "other").package == "chosen"


def test_a_registered_point_stands_in_a_recipe_at_once():
    kdlib.register(plugin(mine=kdlib.HardLabels))
    recipe = read("digits", ["points.hard.kind=mine"])
    assert recipe.systems["main"].points["hard"].part.plugin.name == "mine"


def test_the_same_is_not_registered_twice():
    mine = plugin(mine=kdlib.HardLabels)
    kdlib.register(mine)
    with pytest.raises(kdlib.PluginError, match="'Mine'"):
        kdlib.register(mine)
    with pytest.raises(kdlib.PluginError):
        kdlib.register(mine, "under_another_name")
    with pytest.raises(kdlib.PluginError, match="'Mine'"):
        kdlib.register(plugin(other=kdlib.HardLabels))
    assert registry().get("point", "mine").package == "Mine"
    assert "other" not in registry().names("point")


def test_the_name_of_an_installed_package_is_taken():
    with pytest.raises(kdlib.PluginError, match="'asc'"):
        kdlib.register(plugin(mine=kdlib.HardLabels), "asc")


@pytest.mark.parametrize("thing", [object(), ModuleType("empty"), {"kdlib_points": dict}, 3, None, "kdlib"])
def test_what_has_no_hook_is_refused_and_the_hooks_are_listed(thing):
    with pytest.raises(kdlib.PluginError, match="hook") as caught:
        kdlib.register(thing)
    for hook in hooks.HOOKS.values():
        assert hook in str(caught.value)


def test_an_unmarked_function_is_no_hook():
    class Unmarked:
        def kdlib_points(self):
            return {"mine": kdlib.HardLabels}

    with pytest.raises(kdlib.PluginError, match="@kdlib\\.hookimpl"):
        kdlib.register(Unmarked())


def test_register_raises_at_once_leaves_nothing_and_can_be_tried_again():
    before = registry().plugins()
    with pytest.raises(kdlib.PluginError, match="strength"):
        kdlib.register(plugin(good_one=kdlib.HardLabels, bad_one=lambda strength: None))
    assert registry().plugins() == before
    kdlib.register(plugin(good_one=kdlib.HardLabels))
    assert registry().get("point", "good_one").package == "Mine"


# what makes a plugin broken


def by_position(strength):
    return strength


def by_position_with_default(teacher, tap="embedding"):
    return tap


def unannotated(*, tap="embedding"):
    return tap


def keywords(**settings):
    return settings


def positions(*settings):
    return settings


def unresolved(*, tap: "NotThere" = None):  # noqa: F821
    return tap


def unvalidated(*, lock: nn.Linear = None):
    return lock


def reserved(name):
    scope = {}
    exec(f"def build(*, {name}: int = 1):\n    return {name}", scope)
    return scope["build"]


BROKEN = {
    "a positional setting": (by_position, ["mine", "'strength'", "teacher, student, data, sources, points"]),
    "a positional setting with a default": (by_position_with_default, ["'tap'"]),
    "no annotation": (unannotated, ["mine", "'tap'", "annotation"]),
    "keywords": (keywords, ["mine", "settings"]),
    "positions": (positions, ["mine", "settings"]),
    "an annotation that names nothing": (unresolved, ["mine", "NotThere"]),
    "a type that no recipe can hold": (unvalidated, ["mine", "Linear"]),
    "kind": (reserved("kind"), ["mine", "'kind'"]),
    "weight": (reserved("weight"), ["mine", "'weight'"]),
    "epochs": (reserved("epochs"), ["mine", "'epochs'"]),
    "teacher as a setting": (reserved("teacher"), ["mine", "'teacher'"]),
    "no function": (3, ["mine", "int"]),
    "an object": (kdlib.HardLabels(), ["mine"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_signature_that_is_no_schema_is_refused_with_a_message(what):
    builder, words = BROKEN[what]
    with pytest.raises(kdlib.PluginError) as caught:
        kdlib.register(plugin(mine=builder))
    for word in words:
        assert word in str(caught.value)


def test_only_points_keep_names_of_their_own_for_themselves():
    kdlib.register(plugin("kdlib_scorers", mine=reserved("weight")))
    with pytest.raises(kdlib.PluginError, match="'kind'"):
        kdlib.register(plugin("kdlib_scorers", other=reserved("kind")), "second")


def test_the_live_objects_are_read_by_name_in_the_order_of_the_signature():
    def build(data, teacher, *, width: int):
        return data, teacher, width

    kdlib.register(plugin("kdlib_sources", mine=build))
    mine = registry().get("source", "mine")
    assert mine.live == ("data", "teacher")
    assert build_of(mine, {"width": 4}, {"teacher": "T", "data": "D", "student": "S"}) == ("D", "T", 4)


def build_of(one, settings, live=None, facts=None):
    return build(one, one.settings(**settings), live or {}, facts or {}, "here")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, ["kdlib_points", "NoneType", "mapping"]),
        ([kdlib.HardLabels], ["kdlib_points", "list", "mapping"]),
        ({1: kdlib.HardLabels}, ["kdlib_points", "mapping"]),
    ],
)
def test_a_hook_that_returns_no_mapping_is_refused(returned, words):
    class Mine:
        @kdlib.hookimpl
        def kdlib_points(self):
            return returned

    with pytest.raises(kdlib.PluginError) as caught:
        kdlib.register(Mine())
    for word in words:
        assert word in str(caught.value)


def test_a_hook_that_raises_is_refused_with_its_words():
    class Mine:
        @kdlib.hookimpl
        def kdlib_points(self):
            raise RuntimeError("the licence server sleeps")

    with pytest.raises(kdlib.PluginError, match="kdlib_points: RuntimeError: the licence server sleeps") as caught:
        kdlib.register(Mine())
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_hook_that_takes_an_argument_is_refused():
    class Mine:
        @kdlib.hookimpl
        def kdlib_points(self, config):
            return {}

    with pytest.raises(kdlib.PluginError, match="config"):
        kdlib.register(Mine())


@pytest.mark.parametrize("what", BROKEN)
def test_the_same_in_a_package_is_a_broken_plugin(what, monkeypatch):
    holder = ModuleType("holder_of_broken")
    holder.mine = plugin(mine=BROKEN[what][0])
    monkeypatch.setitem(sys.modules, "holder_of_broken", holder)
    with pytest.warns(PluginWarning) as seen:
        plugins = Registry([EntryPoint("package", "holder_of_broken:mine", "kdlib")])
    assert len(seen) == 1
    for word in BROKEN[what][1]:
        assert word in plugins.broken["package"]
    assert all_names(plugins) == core()


# names


def test_an_unknown_name_gets_a_suggestion_and_the_list():
    with pytest.raises(kdlib.PluginError, match=r"No point named 'soft_label'\. Did you mean 'soft_labels'") as caught:
        Registry().get("point", "soft_label")
    assert "Known: " in str(caught.value)


def test_without_anything_near_there_is_the_list_alone():
    assert did_you_mean("zzz", ["b", "a"]) == " Known: a, b."
    assert did_you_mean("zzz", []) == " Known: none."
    assert did_you_mean("zzz", [f"name{number}" for number in range(30)]).endswith("and 10 more.")


# building


def model_of(builder):
    kdlib.register(plugin("kdlib_models", mine=builder))
    return registry().get("model", "mine")


def test_classes_channels_and_rate_are_filled_from_the_data():
    def model(*, classes: int, channels: int = 2, rate: int = 8000, width: int = 1):
        return classes, channels, rate, width

    mine = model_of(model)
    facts = {"classes": 10, "channels": 1, "rate": 16000}
    assert build_of(mine, {}, facts=facts) == (10, 1, 16000, 1)
    assert build_of(mine, {"classes": 10, "channels": 1}, facts=facts) == (10, 1, 16000, 1)
    assert build_of(mine, {}, facts={"classes": 10, "channels": None, "rate": None}) == (10, 2, 8000, 1)
    assert build_of(mine, {"channels": 4}, facts={"classes": 10, "channels": None}) == (10, 4, 8000, 1)


@pytest.mark.parametrize("name", ["classes", "channels", "rate"])
def test_a_recipe_that_disagrees_with_the_data_is_refused(name):
    def model(*, classes: int, channels: int = 2, rate: int = 8000):
        return classes

    mine = model_of(model)
    with pytest.raises(kdlib.RecipeError, match=rf"^here\.{name}: .*12.*10"):
        build_of(mine, {name: 12}, facts={"classes": 10, "channels": 10, "rate": 10})


def test_features_get_the_rate_of_the_data():
    def features(*, rate: int):
        return rate

    kdlib.register(plugin("kdlib_features", mine=features))
    assert build_of(registry().get("features", "mine"), {}, facts={"rate": 16000}) == 16000


def test_a_fact_is_no_fact_in_a_point():
    def point(*, classes: int = 3):
        return classes

    kdlib.register(plugin(mine=point))
    assert build_of(registry().get("point", "mine"), {}, facts={"classes": 10}) == 3


def test_a_live_object_that_is_not_there_is_said_by_name():
    source = registry().get("source", "same_input")
    with pytest.raises(kdlib.RecipeError, match="here: the source 'same_input' needs 'teacher'"):
        build_of(source, {})


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), KeyError("odd"), TypeError("odd"), ValueError("odd"), kdlib.DataError("odd")]
)
def test_an_exception_in_a_constructor_carries_the_plugins_name(error):
    def model():
        raise error

    mine = model_of(model)
    with pytest.raises((type(error), kdlib.RecipeError)) as caught:
        build_of(mine, {})
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))  # what the command line prints
    assert "odd" in told
    assert "'mine'" in told
    assert "'Mine'" in told
    assert "kdlib_models" in told


def test_a_bad_value_in_a_constructor_is_the_users_error_with_its_place():
    def model():
        raise ValueError("widths are even")

    with pytest.raises(kdlib.RecipeError, match="here: widths are even"):
        build_of(model_of(model), {})


# no hook in the loop, no code in a file


def test_a_hook_is_called_once_and_never_in_training(tmp_path):
    from kdlib.run import run

    calls = []

    class Counting:
        @kdlib.hookimpl
        def kdlib_models(self):
            calls.append(torch.is_grad_enabled())
            return {"counted": DigitsMLP}

    kdlib.register(Counting())
    recipe = {
        "data": {"kind": "digits"},
        "train": {"epochs": 1, "threads": 1},
        "model": {"kind": "counted", "width": 4},
        "source": {"kind": "same_input"},
        "points": {"soft": {"kind": "soft_labels"}},
    }
    run(read(recipe), tmp_path / "out", progress=False)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["os.system", "kdlib.digits.DigitsMLP", "kdlib.digits:DigitsMLP", "this", ""])
def test_a_recipe_names_registered_plugins_only(kind, capsys):
    with pytest.raises(kdlib.PluginError, match=r"teacher\.model\.kind: No model named"):
        read("digits", [f"teacher.model={{kind={kind!r}}}"])
    assert capsys.readouterr().out == ""
    assert "this" not in sys.modules
