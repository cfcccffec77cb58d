"""A run taken up again gives what the run gave."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib.digits import digits
from kdlib.files import write_sums
from kdlib.recipe import read
from kdlib.registry import registry
from kdlib.run import LARGEST, run

DIGITS = {
    "name": "few",
    "data": {"kind": "digits"},
    "train": {"epochs": 2, "threads": 1},
    "model": {"kind": "digits_mlp", "width": 12},
    "source": {"kind": "same_input"},
    "points": {"soft": {"kind": "soft_labels"}},
}


class Shift(nn.Module):
    """Features with a statistic of the training part."""

    time_axis = -1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((64,), torch.nan))

    def fit(self, clips):
        self.mean.copy_(torch.stack(list(clips)).mean(0))
        return self

    def forward(self, samples):
        return samples - self.mean


class Centroids:
    """A scorer in numpy whose columns are in an order of their own."""

    def fit(self, embeddings, labels):
        self.classes_ = np.unique(labels)[::-1].copy()
        self.centres = np.stack([embeddings[labels == label].mean(0) for label in self.classes_])
        return self

    def scores(self, embeddings):
        return -((embeddings[:, None] - self.centres) ** 2).sum(-1)

    def state(self):
        return {"classes": self.classes_, "centres": self.centres}

    @classmethod
    def from_state(cls, state):
        made = cls()
        made.classes_, made.centres = state["classes"], state["centres"]
        return made


def two_folds():
    """Two splits of some of the digits."""
    folds = {}
    for fold in (1, 2):
        whole = digits(train=50, valid=0, seed=fold)
        some = range(40)
        test = kdlib.TensorPart(whole.test.x[:40], whole.test.labels[:40], ids=[whole.test.ids[i] for i in some])
        folds[fold] = kdlib.Parts(whole.train, None, test, whole.classes)
    return folds


class Mine:
    """What the recipes here name."""

    @kdlib.hookimpl
    def kdlib_features(self):
        return {"shift": Shift}

    @kdlib.hookimpl
    def kdlib_scorers(self):
        return {"centroids": Centroids}

    @kdlib.hookimpl
    def kdlib_datasets(self):
        return {"two_folds": two_folds}


@pytest.fixture(scope="module", autouse=True)
def mine():
    registry.cache_clear()
    kdlib.register(Mine())
    yield
    registry.cache_clear()


@pytest.fixture(scope="module")
def folders(mine, tmp_path_factory):
    """Runs of several kinds."""
    scored = {**DIGITS, "features": {"kind": "shift"}, "scorer": {"kind": "centroids"}}
    alone = {key: DIGITS[key] for key in ("name", "data", "train", "model")}
    recipes = {
        "plain": DIGITS,
        "scored": scored,
        "alone": alone,
        "folds": {**scored, "data": {"kind": "two_folds"}},
        "svm": {**DIGITS, "scorer": {"kind": "svm", "c": 2.0}},
    }
    place = tmp_path_factory.mktemp("saved")
    return {name: run(read(recipe), place / name, progress=False) for name, recipe in recipes.items()}


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of a folder, to be damaged."""
    return shutil.copytree(folders["scored"], tmp_path / "run")


def predicted(folder, role="with", fold=""):
    lines = [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()[1:]]
    return [line[5] for line in lines if line[1] == role and line[2] == fold]


def outputs(loaded, test):
    """Return the predicted labels of a part, by what was loaded."""
    x = torch.stack([test[kdlib.CLEAN, index]["x"] for index in range(len(test))])
    with torch.no_grad():
        taps = loaded.students["main"](loaded.features["main"](x) if loaded.features else x)
    if not loaded.scorers:
        return [loaded.classes[number] for number in taps["logits"].argmax(1)]
    scorer = loaded.scorers["main"]
    order = [loaded.classes[number] for number in scorer.classes_]
    return [order[number] for number in scorer.scores(taps["embedding"].numpy()).argmax(1)]


@pytest.mark.parametrize("name", ["plain", "scored", "svm"])
def test_what_is_loaded_gives_what_the_run_gave(folders, name):
    loaded = kdlib.load_run(folders[name])
    assert outputs(loaded, digits().test) == predicted(folders[name])


def test_without_a_source_the_one_network_is_loaded(folders):
    loaded = kdlib.load_run(folders["alone"])
    assert outputs(loaded, digits().test) == predicted(folders["alone"], "without")


def test_a_fold_is_named_by_number_or_text(folders):
    for fold, parts in two_folds().items():
        for name in (fold, str(fold)):
            loaded = kdlib.load_run(folders["folds"], fold=name)
            assert outputs(loaded, parts.test) == predicted(folders["folds"], fold=str(fold))
    one, two = (kdlib.load_run(folders["folds"], fold=fold) for fold in (1, 2))
    assert not torch.equal(one.features["main"].mean, two.features["main"].mean)


def test_what_a_run_holds(folders):
    loaded = kdlib.load_run(str(folders["scored"]))
    assert isinstance(loaded, kdlib.Run)
    assert loaded.classes == tuple("0123456789")
    assert loaded.result == json.loads((folders["scored"] / "result.json").read_text())
    assert json.loads(json.dumps(loaded.recipe.dump())) == json.loads((folders["scored"] / "recipe.json").read_text())
    assert set(loaded.students) == set(loaded.features) == set(loaded.scorers) == {"main"}
    plain = kdlib.load_run(folders["plain"])
    assert plain.features == plain.scorers == {}


def test_a_loaded_network_is_in_eval_mode_and_can_teach(folders):
    loaded = kdlib.load_run(folders["plain"]).students["main"]
    assert not loaded.training
    source = kdlib.SameInput(kdlib.freeze(loaded))
    distiller = kdlib.Distiller(kdlib.Tapped(nn.Linear(64, 10), logits=""), source, soft=kdlib.SoftLabels())
    assert torch.isfinite(distiller({"x": torch.rand(3, 64)}).total)


def test_random_state_outside_is_neither_used_nor_changed(folders):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    kdlib.load_run(folders["scored"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_moved_folder_is_loaded_from_anywhere(folders, tmp_path, monkeypatch):
    moved = shutil.copytree(folders["scored"], tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert outputs(kdlib.load_run("elsewhere"), digits().test) == predicted(moved)


# scores


def rows_of(test):
    return torch.stack([test[kdlib.CLEAN, index]["x"] for index in range(len(test))])


@pytest.mark.parametrize("name", ["plain", "scored", "svm"])
def test_scores_are_those_that_the_run_predicted_by(folders, name):
    loaded = kdlib.load_run(folders[name])
    scores = loaded.scores(rows_of(digits().test))
    assert scores.shape == (len(digits().test), 10)
    assert [loaded.classes[number] for number in scores.argmax(1)] == predicted(folders[name])


def test_scores_of_several_systems_are_fused_as_the_run_fused_them(mine, tmp_path):
    systems = {
        name: {**{key: DIGITS[key] for key in ("source", "points")}, "model": {"kind": "digits_mlp", "width": width}}
        for name, width in (("narrow", 6), ("wide", 24))
    }
    fusion = {"weights": {"wide": 3.0}, "normalise": "z"}
    recipe = {key: DIGITS[key] for key in ("name", "data", "train")} | {"systems": systems, "fusion": fusion}
    folder = run(read({**recipe, "scorer": {"kind": "svm"}}), tmp_path / "two", progress=False)
    loaded = kdlib.load_run(folder)
    x = rows_of(digits().test)
    lines = [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()[1:]]
    for system, name in ((None, "fusion"), ("narrow", "narrow"), ("wide", "wide")):
        seen = [loaded.classes[number] for number in loaded.scores(x, system).argmax(1)]
        assert seen == [line[5] for line in lines if line[:2] == [name, "with"]]


def test_scores_of_an_unknown_system_and_of_systems_that_are_not_fused(folders, tmp_path):
    loaded = kdlib.load_run(folders["plain"])
    with pytest.raises(kdlib.KdlibError, match=r"no system 'man'.*Did you mean 'main'"):
        loaded.scores(torch.zeros(1, 64), "man")
    both = dataclasses.replace(
        loaded,
        students=dict.fromkeys("ab", loaded.students["main"]),
        spreads=dict.fromkeys("ab", loaded.spreads["main"]),
    )
    with pytest.raises(kdlib.KdlibError, match="name one of its systems: a, b"):
        both.scores(torch.zeros(1, 64))


# errors


def test_a_folder_without_a_finished_run_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(kdlib.KdlibError, match=r"no finished run") as caught:
            kdlib.load_run(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_result_that_cannot_be_read_is_a_message(copied, text):
    (copied / "result.json").write_text(text)
    with pytest.raises(kdlib.KdlibError, match=r"result\.json"):
        kdlib.load_run(copied)


@pytest.mark.parametrize("fold", [None, 3, "a", ""])
def test_one_of_several_folds_is_named(folders, fold):
    with pytest.raises(kdlib.KdlibError, match=r"fold=1 \| 2"):
        kdlib.load_run(folders["folds"], fold=fold)


def test_a_run_without_folds_has_none(folders):
    with pytest.raises(kdlib.KdlibError, match="fold"):
        kdlib.load_run(folders["plain"], fold=1)


@pytest.mark.parametrize(
    "name", ["recipe.json", "main/student.safetensors", "main/features.safetensors", "main/student-scorer.safetensors"]
)
def test_a_missing_or_damaged_file_is_named(copied, name):
    path = copied / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(kdlib.KdlibError) as caught:
        kdlib.load_run(copied)
    assert path.name in str(caught.value)
    path.unlink()
    with pytest.raises(kdlib.KdlibError) as caught:
        kdlib.load_run(copied)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("name", ["recipe.json", "result.json", "SHA256SUMS"])
def test_any_bit_of_a_runs_own_files_that_is_turned_and_any_end_that_is_lost_is_noticed(copied, name):
    path = copied / name
    good = path.read_bytes()
    draw = np.random.default_rng(0)
    bad = [good[: len(good) * percent // 100] for percent in range(0, 100, 10)]
    for bit in draw.choice(8 * len(good), 60, replace=False).tolist():
        turned = bytearray(good)
        turned[bit // 8] ^= 1 << bit % 8
        bad.append(bytes(turned))
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(kdlib.KdlibError, match="SHA256SUMS"):
            kdlib.load_run(copied)
    path.write_bytes(good)
    kdlib.load_run(copied)


def test_weights_of_another_shape_are_named(copied, folders, tmp_path):
    recipe = json.loads((copied / "recipe.json").read_text())
    recipe["systems"]["main"]["student"]["model"]["width"] = 13
    (copied / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(kdlib.KdlibError, match=r"recipe\.json: damaged, or changed by hand"):
        kdlib.load_run(copied)
    write_sums(copied, LARGEST)
    with pytest.raises(kdlib.KdlibError, match=r"student\.safetensors"):
        kdlib.load_run(copied)


def test_a_run_whose_plugin_is_gone_says_which(folders):
    registry.cache_clear()
    try:
        with pytest.raises(kdlib.PluginError, match="'shift'"):
            kdlib.load_run(folders["scored"])
    finally:
        registry.cache_clear()
        kdlib.register(Mine())
