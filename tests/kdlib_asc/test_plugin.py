"""The door: what the package registers with kdlib, and what it takes from it."""

import ast
import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdlib
import kdlib_asc
from kdlib.registry import Registry, build
from kdlib.testing import check_model, check_point
from kdlib_asc import plugin
from kdlib_asc.points import HiddenMse

SOURCES = sorted(Path(kdlib_asc.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module")
def registry():
    return Registry(importlib.metadata.entry_points(group="kdlib"))


def brought(registry, kind):
    return {one.name for one in registry.plugins() if one.kind == kind and one.package == "asc"}


# what is registered


def test_the_package_comes_in_by_its_entry_point(registry):
    (point,) = importlib.metadata.entry_points(group="kdlib", name="asc")
    assert point.value == "kdlib_asc.plugin"
    assert registry.packages["asc"] is plugin
    assert "asc" not in registry.broken


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("model", {"wave_cnn", "spectrogram_cnn_gru"}),
        ("features", {"pre_emphasis", "spectrogram"}),
        ("source", {"multi_segment"}),
        ("point", {"hidden_mse"}),
        ("scorer", {"svm"}),
    ],
)
def test_it_registers_exactly(registry, kind, names):
    assert brought(registry, kind) == names


def test_it_registers_the_readers_of_data_sets(registry):
    assert brought(registry, "dataset") >= {"dcase", "folder"}


def test_no_name_of_it_is_claimed_twice(registry):
    assert not [clash for clash in registry.clashes() if "asc" in clash[2]]


def test_every_plugin_has_a_docstring_that_starts_with_a_sentence(registry):
    for one in registry.plugins():
        if one.package == "asc":
            assert inspect.getdoc(one.build).partition("\n")[0].endswith("."), one.name


def test_defaults_are_those_of_the_paper(registry):
    def settings(kind, name, **given):
        return registry.get(kind, name).settings(**given)

    assert settings("model", "wave_cnn").width == settings("model", "spectrogram_cnn_gru").width == 1
    assert settings("model", "spectrogram_cnn_gru").gru is True
    assert settings("features", "spectrogram").coefficients == 256
    assert (settings("source", "multi_segment").segments, settings("source", "multi_segment").join) == (2, "input")
    assert settings("point", "hidden_mse").tap == "embedding"
    data = settings("dataset", "dcase", root=Path("somewhere"))
    assert (data.rate, data.channels, data.seconds, data.fold) == (48000, 2, 10, 1)


@pytest.mark.parametrize(
    "settings", [{"segments": 0}, {"segments": 1.5}, {"join": "logits"}, {"view": "best"}, {"T": 1}]
)
def test_bad_settings_of_the_source_are_refused(registry, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        registry.get("source", "multi_segment").settings(**settings)


# what every model and point of a plugin must satisfy

CLIPS = {"wave_cnn": (2, 2, 26244 + 500), "spectrogram_cnn_gru": (2, 2, 25, 64)}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("wave_cnn", {}),
        ("wave_cnn", {"width": 0.1, "activate_embedding": True}),
        ("spectrogram_cnn_gru", {}),
        ("spectrogram_cnn_gru", {"width": 0.1, "gru": False}),
    ],
)
def test_the_networks_are_models(registry, name, settings):
    one = registry.get("model", name)
    torch.manual_seed(0)
    model = build(one, one.settings(**settings), {}, {"classes": 10, "channels": 2, "rate": 48000}, "model")
    x = torch.randn(CLIPS[name])
    check_model(model, x)
    assert {tap: tuple(value.shape) for tap, value in model(x).items()} == {"logits": (2, 10), "embedding": (2, 64)}


def test_every_model_was_checked(registry):
    assert set(CLIPS) == brought(registry, "model")


def test_the_point_is_a_point(registry):
    one = registry.get("point", "hidden_mse")
    point = build(one, one.settings(), {}, {}, "point")
    assert isinstance(point, HiddenMse)
    check_point(point)


# what is imported


def imported(tree):
    """Yield (module, name) of each import, name None for ``import module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_of_kdlib_only_what_it_exports_is_imported(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for module, name in imported(tree):
        if module.partition(".")[0] == "kdlib":
            assert module == "kdlib", f"{path.name} imports from {module}"
            assert name is None or name in kdlib.__all__, f"{path.name} imports kdlib.{name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kdlib":
            assert node.attr in kdlib.__all__, f"{path.name} uses kdlib.{node.attr}"


def test_the_door_alone_imports_no_audio_svm_or_plotting_library():
    code = "import json, sys; import kdlib_asc.plugin; print(json.dumps(sorted(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    modules = {name.partition(".")[0] for name in json.loads(printed)}
    assert modules >= {"kdlib", "kdlib_asc", "torch"}
    assert not modules & {"soundfile", "sklearn", "matplotlib", "scipy", "librosa", "torchaudio"}
