"""A whole run: what it leaves behind adds up, runs again to the same bits, and loads without kdlib."""

import csv
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix
from torch import nn

import kdlib
from kdlib.building import load_weights, make_model
from kdlib.digits import digits
from kdlib.fusion import Scores, fuse
from kdlib.recipe import read
from kdlib.registry import registry
from kdlib.run import run
from kdlib.system import outputs, stem

DIGITS = {
    "name": "few",
    "data": {"kind": "digits"},
    "train": {"epochs": 2, "threads": 1},
    "teacher": {"model": {"kind": "digits_mlp", "width": 64}},
    "student": {"model": {"kind": "digits_mlp", "width": 16}, "control": True},
    "source": {"kind": "same_input"},
    "points": {
        "soft": {"kind": "soft_labels", "weight": 0.9, "temperature": 4.0, "student_temperature": 4.0},
        "hard": {"kind": "hard_labels", "weight": 0.1},
    },
}
CLASSES = ("tram", "bus", "park")


def toy_part(seed, size, name):
    """Clips around a centre a class, (2, 6) each; the classes are no numbers and the ids no indices."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 3
    centres = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(7))
    x = centres[labels] + 0.8 * torch.randn(size, 2, 6, generator=draw)
    ids = [f"{name}/{number}.wav" for number in reversed(range(size))]
    return kdlib.TensorPart(x, labels, ids=ids, groups=[f"place-{number // 3}" for number in range(size)])


def toy_folds(*, folds: int = 2):
    """Return folds by number, each with parts of its own."""
    return {
        fold: kdlib.Parts(
            train=toy_part(10 * fold, 30, f"train{fold}"),
            valid=None,
            test=toy_part(10 * fold + 1, 12 + 3 * fold, f"test{fold}"),
            classes=CLASSES,
        )
        for fold in range(1, folds + 1)
    }


class ToyScale(nn.Module):
    """Features with statistics of the training part: standardised, or the other way round in time."""

    time_axis = -1

    def __init__(self, *, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        self.register_buffer("mean", torch.full((2, 1), torch.nan))

    def fit(self, clips):
        self.mean.copy_(torch.stack(list(clips)).mean((0, 2)).unsqueeze(1))
        return self

    def forward(self, samples):
        x = samples - self.mean
        return x.flip(-1) if self.turned else x


class ToyNet(nn.Module):
    """A hidden layer with batch norm and dropout over all samples of a clip."""

    def __init__(self, *, classes: int, width: int = 8) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.Dropout(0.2))
        self.output = nn.Linear(width, classes)

    def forward(self, x):
        embedding = self.hidden(x)
        return {"logits": self.output(embedding), "embedding": embedding}


class Centroids:
    """A scorer in numpy whose columns are in an order of their own: minus the distance to each class's centre."""

    def __init__(self, *, power: float = 2.0) -> None:
        self.power = power

    def fit(self, embeddings, labels):
        self.classes_ = np.unique(labels)[::-1].copy()
        self.centres = np.stack([embeddings[labels == label].mean(0) for label in self.classes_])
        return self

    def scores(self, embeddings):
        return -(np.abs(embeddings[:, None] - self.centres) ** self.power).sum(-1)

    def state(self):
        return {"classes": self.classes_, "centres": self.centres, "power": np.array([self.power])}

    @classmethod
    def from_state(cls, state):
        made = cls(power=float(state["power"][0]))
        made.classes_, made.centres = state["classes"], state["centres"]
        return made


class Toy:
    """A data set with two folds, features, a network and a scorer."""

    @kdlib.hookimpl
    def kdlib_datasets(self):
        return {"toy": toy_folds}

    @kdlib.hookimpl
    def kdlib_features(self):
        return {"toy_scale": ToyScale}

    @kdlib.hookimpl
    def kdlib_models(self):
        return {"toy_net": ToyNet}

    @kdlib.hookimpl
    def kdlib_scorers(self):
        return {"centroids": Centroids}


def toy_system(turned):
    return {
        "features": {"kind": "toy_scale", "turned": turned},
        "model": {"kind": "toy_net"},
        "source": {"kind": "same_input"},
        "points": {"soft": {"kind": "soft_labels"}, "hard": {"kind": "hard_labels"}},
        "student": {"start": "teacher", "control": True},
    }


TOY = {
    "name": "toy",
    "data": {"kind": "toy"},
    "train": {"epochs": 3, "batch": 10, "threads": 1, "optimizer": {"lr": 0.02}},
    "systems": {"straight": toy_system(False), "turned": toy_system(True)},
    "scorer": {"kind": "centroids"},
    "fusion": {"kind": "mean", "weights": {"turned": 2.0}},
}


@pytest.fixture(scope="module", autouse=True)
def toy():
    registry.cache_clear()
    kdlib.register(Toy())
    yield
    registry.cache_clear()


@pytest.fixture(scope="module")
def few(toy, tmp_path_factory):
    """The folder of one run on the digits."""
    return run(read(DIGITS), tmp_path_factory.mktemp("few") / "run", progress=False)


@pytest.fixture(scope="module")
def folded(toy, tmp_path_factory):
    """The folder of one run with two folds, two systems, a scorer and fusion."""
    return run(read(TOY), tmp_path_factory.mktemp("folded") / "run", progress=False)


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def predictions_of(folder):
    """Return the rows of the table by (system, role)."""
    found = {}
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["system"], row["role"]), []).append(row)
    return found


def weights_of(folder):
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_equal_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other[name][key]), f"{name}: {key}"


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# the numbers


@pytest.mark.parametrize("which", ["few", "folded"])
def test_the_rows_add_up_with_the_predictions(which, request):
    folder = request.getfixturevalue(which)
    result, predictions = result_of(folder), predictions_of(folder)
    assert [(row["system"], row["role"]) for row in result["rows"]] == list(predictions)
    for row in result["rows"]:
        assert {"system", "role", "correct", "total", "accuracy", "macro", "interval"} <= set(row)
        table = predictions[row["system"], row["role"]]
        labels, predicted = ([line[key] for line in table] for key in ("label", "predicted"))
        assert row["total"] == len(table)
        assert row["correct"] == accuracy_score(labels, predicted, normalize=False)
        assert row["accuracy"] == accuracy_score(labels, predicted)
        assert row["macro"] == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
        interval = binomtest(row["correct"], row["total"]).proportion_ci(method="wilson")
        assert row["interval"] == pytest.approx([interval.low, interval.high], abs=1e-12)
        assert row["confusion"] == confusion_matrix(labels, predicted, labels=result["classes"]).tolist()


def test_the_digits_have_their_rows_and_their_clips(few):
    result, test = result_of(few), digits().test
    assert [(row["system"], row["role"]) for row in result["rows"]] == [
        ("main", "without"),
        ("main", "alone"),
        ("main", "with"),
    ]
    assert result["name"] == "few"
    assert result["classes"] == list("0123456789")
    for table in predictions_of(few).values():
        assert [line["id"] for line in table] == test.ids
        assert [line["label"] for line in table] == [str(label) for label in test.labels]


def test_a_predicted_class_is_the_largest_logit_of_the_saved_network(few):
    parts, recipe = digits(), read(few / "recipe.json")
    system = recipe.systems["main"]
    for role, network in (("without", system.teacher), ("with", system.student)):
        model = make_model(network.model, {"classes": 10}, 5, "other", "key")
        load_weights(model, few / "main" / f"{stem(role)}.safetensors")
        logits = outputs(model, parts.test, network.train)["logits"]
        expected = [str(number) for number in logits.argmax(1)]
        assert [line["predicted"] for line in predictions_of(few)["main", role]] == expected


def test_where_a_run_ran_is_on_record(few):
    result = result_of(few)
    assert result["environment"]["threads"] >= 1
    assert {"python", "torch", "numpy", "kdlib-asc"} <= set(result["environment"]["versions"])
    assert set(result["seconds"]) == {"wall", "cpu"}
    assert json.loads((few / "result.json").read_text(), parse_constant=pytest.fail)["folds"] == [""]


# folds and fusion


def test_folds_are_pooled(folded):
    result, data = result_of(folded), toy_folds()
    assert result["folds"] == ["1", "2"]
    names = [*data[1].test.ids, *data[2].test.ids]
    for row in result["rows"]:
        assert row["total"] == len(names) == 33
    for table in predictions_of(folded).values():
        assert [line["id"] for line in table] == names
        assert [line["fold"] for line in table] == ["1"] * 15 + ["2"] * 18
        labels = np.concatenate([data[1].test.labels, data[2].test.labels])
        assert [line["label"] for line in table] == [CLASSES[label] for label in labels]


def test_every_system_and_the_fusion_have_a_row_a_role(folded):
    roles = ("without", "continued", "with")
    expected = [(system, role) for system in ("straight", "turned", "fusion") for role in roles]
    assert list(predictions_of(folded)) == expected


def test_the_folds_are_trained_each_by_itself(folded):
    weights = weights_of(folded)
    for system in ("straight", "turned"):
        one, two = (weights[f"fold-{fold}/{system}/student.safetensors"] for fold in (1, 2))
        assert any(not torch.equal(one[name], two[name]) for name in one)
        features = [weights[f"fold-{fold}/{system}/features.safetensors"]["mean"] for fold in (1, 2)]
        for mean, parts in zip(features, toy_folds().values(), strict=True):
            torch.testing.assert_close(mean.flatten(), parts.train.x.mean((0, 2)))


def role_scores(folder, fold, system, role):
    """Return a role's scores on the test part of a fold, from what the run saved, and the scorer."""
    loaded = kdlib.load_run(folder, fold=fold)
    place = folder / f"fold-{fold}" / system
    model = ToyNet(classes=3)
    load_weights(model, place / f"{stem(role)}.safetensors")
    model.eval()
    scorer = Centroids.from_state(
        {k: v.numpy() for k, v in load_file(place / f"{stem(role)}-scorer.safetensors").items()}
    )
    with torch.no_grad():
        embedding = model(loaded.features[system](toy_folds()[fold].test.x))["embedding"]
    return scorer.scores(embedding.numpy()), scorer


@pytest.mark.parametrize("role", ["without", "continued", "with"])
def test_the_fusion_is_the_weighted_mean_of_the_systems_scores_by_label(folded, role):
    predicted = {key: [line["predicted"] for line in table] for key, table in predictions_of(folded).items()}
    expected = {"straight": [], "turned": [], "fusion": []}
    for fold in (1, 2):
        scores = {}
        for system in ("straight", "turned"):
            values, scorer = role_scores(folded, fold, system, role)
            assert scorer.classes_.tolist() == [2, 1, 0]  # another order than the data's
            ids = tuple(toy_folds()[fold].test.ids)
            scores[system] = Scores(ids, tuple(CLASSES[number] for number in scorer.classes_), values)
        fused = fuse(scores, weights={"turned": 2.0})
        np.testing.assert_allclose(fused.values, (scores["straight"].values + 2 * scores["turned"].values) / 3)
        for system, of in {**scores, "fusion": fused}.items():
            expected[system] += [of.classes[number] for number in of.values.argmax(1)]
    for system, labels in expected.items():
        assert predicted[system, role] == labels


def test_a_role_that_one_system_lacks_is_not_fused(tmp_path):
    systems = {"straight": toy_system(False), "turned": {**toy_system(True), "student": {"start": "teacher"}}}
    folder = run(read({**TOY, "systems": systems, "data": {"kind": "toy", "folds": 1}}), tmp_path / "r", progress=False)
    roles = {system: [role for of, role in predictions_of(folder) if of == system] for system in (*systems, "fusion")}
    assert roles["straight"] == ["without", "continued", "with"]
    assert roles["turned"] == roles["fusion"] == ["without", "with"]


@pytest.mark.parametrize("normalise", ["z", "log_softmax"])
def test_without_a_scorer_log_softmax_is_fused(tmp_path, normalise):
    recipe = {**TOY, "data": {"kind": "toy", "folds": 1}, "fusion": {"kind": "mean", "normalise": normalise}}
    del recipe["scorer"]
    folder = run(read(recipe), tmp_path / "r", progress=False)
    logs, logs_train = {}, {}
    for system in ("straight", "turned"):
        model = ToyNet(classes=3).eval()
        load_weights(model, folder / "fold-1" / system / "student.safetensors")
        features = kdlib.load_run(folder).features[system]
        for part, into in ((toy_folds()[1].test, logs), (toy_folds()[1].train, logs_train)):
            with torch.no_grad():
                into[system] = model(features(part.x))["logits"].double().log_softmax(1).numpy()
    if normalise == "z":
        logs = {name: (of - logs_train[name].mean()) / logs_train[name].std() for name, of in logs.items()}
    mean = sum(logs.values()) / 2
    predicted = [line["predicted"] for line in predictions_of(folder)["fusion", "with"]]
    assert predicted == [CLASSES[number] for number in mean.argmax(1)]


# the run again


@pytest.mark.parametrize("which", ["few", "folded"])
def test_the_recipe_in_the_folder_runs_again_to_the_same_bits(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    again = run(read(folder / "recipe.json"), tmp_path / "again", progress=False)
    assert result_of(again)["rows"] == result_of(folder)["rows"]
    assert (again / "predictions.csv").read_bytes() == (folder / "predictions.csv").read_bytes()
    assert (again / "recipe.json").read_bytes() == (folder / "recipe.json").read_bytes()
    assert_equal_bits(weights_of(again), weights_of(folder))


def test_the_recipe_in_the_folder_is_the_resolved_one(few):
    written = json.loads((few / "recipe.json").read_text())
    assert written == json.loads(json.dumps(read(DIGITS).dump()))
    assert written["systems"]["main"]["student"]["train"]["epochs"] == 2
    assert written["systems"]["main"]["student"]["train"]["precision"] == "fp32"


def test_another_seed_gives_other_bits(few, tmp_path):
    other = run(read(DIGITS, ["train.seed=1"]), tmp_path / "other", progress=False)
    one, two = (weights_of(folder)["main/student.safetensors"] for folder in (few, other))
    assert not any(torch.equal(one[name], two[name]) for name in one)


def test_a_runs_bits_do_not_depend_on_the_state_outside_nor_change_it(few, tmp_path):
    torch.manual_seed(99), random.seed(99), np.random.seed(99)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    threads = torch.get_num_threads()
    again = run(read(DIGITS), tmp_path / "again", progress=False)
    assert_equal_bits(weights_of(again), weights_of(few))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    assert torch.get_num_threads() == threads


# the folder


def test_a_folder_that_is_there_is_refused_and_untouched(few, tmp_path):
    before = contents(few)
    for recipe in (read(few / "recipe.json"), read(DIGITS, ["train.seed=1"])):
        with pytest.raises(kdlib.RecipeError, match="is there already") as caught:
            run(recipe, few, progress=False)
        assert str(few) in str(caught.value)
    assert contents(few) == before
    begun = shutil.copytree(few, tmp_path / "begun")
    (begun / "result.json").unlink()
    with pytest.raises(kdlib.RecipeError, match=r"is there already.*or take up with --resume"):
        run(read(DIGITS), begun, progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(kdlib.RecipeError, match=r"is there already.*--out\."):
        run(read(DIGITS), tmp_path / "empty", progress=False)
    assert list((tmp_path / "empty").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(kdlib.KdlibError):
        run(read(DIGITS), tmp_path / "file", progress=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(kdlib.KdlibError, match="cannot be made"):
        run(read(DIGITS), tmp_path / "file" / "run", progress=False)


def test_without_a_name_the_folder_says_when_and_what(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = read(DIGITS, ["train.epochs=1"])
    folder = run(recipe, progress=False)
    assert folder.parts[:2] == ("runs", "few")
    assert re.fullmatch(r"\d{8}T\d{6}Z-" + recipe.digest(), folder.parts[2])
    assert (tmp_path / folder / "result.json").is_file()


def test_data_that_cannot_be_read_leave_no_folder(tmp_path):
    with pytest.raises(kdlib.DataError):
        run(read(DIGITS, ["data.train=1790"]), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_told_to_be_quiet_is(tmp_path, capsys):
    said = []
    run(read({**TOY, "data": {"kind": "toy", "folds": 1}}), tmp_path / "run", progress=False, say=said.append)
    assert capsys.readouterr() == ("", "")
    assert len(said) == 2
    assert all(system in line for system, line in zip(("straight", "turned"), said, strict=True))


# the networks without kdlib

PLAIN = """
import json, sys
import numpy as np, torch
from safetensors.torch import load_file
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.hidden = nn.Linear(64, width)
        self.output = nn.Linear(width, 10)

    def forward(self, x):
        return self.output(torch.relu(self.hidden(x)))

x = torch.from_numpy(np.load(sys.argv[1]))
seen = []
for path, width in zip(sys.argv[2::2], map(int, sys.argv[3::2])):
    net = Net(width)
    net.load_state_dict(load_file(path), strict=True)
    seen.append(net(x).argmax(1).tolist())
print(json.dumps({"seen": seen, "kdlib": any(name.startswith("kdlib") for name in sys.modules)}))
"""


def test_the_networks_load_in_a_program_that_never_heard_of_kdlib(few, tmp_path):
    np.save(tmp_path / "x.npy", digits().test.x.numpy())
    files = [str(few / "main" / "student.safetensors"), "16", str(few / "main" / "teacher.safetensors"), "64"]
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "x.npy"), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert not told["kdlib"]
    for role, seen in zip(("with", "without"), told["seen"], strict=True):
        assert [line["predicted"] for line in predictions_of(few)["main", role]] == [str(number) for number in seen]


def test_the_saved_networks_have_the_bare_models_keys(few):
    for name, tensors in weights_of(few).items():
        assert set(tensors) == {"hidden.weight", "hidden.bias", "output.weight", "output.bias"}, name


def test_what_a_run_leaves_is_where_it_is_looked_for(few, folded):
    names = {str(Path(name).relative_to(few)) for name in contents(few)}
    assert {"recipe.json", "result.json", "predictions.csv"} <= names
    assert {f"main/{stem(role)}.safetensors" for role in ("without", "alone", "with")} <= names
    assert not any(name.endswith((".pt", ".pkl", ".pickle")) for name in names)
    names = {str(Path(name).relative_to(folded)) for name in contents(folded)}
    for fold in (1, 2):
        for system in ("straight", "turned"):
            for role in ("without", "continued", "with"):
                assert f"fold-{fold}/{system}/{stem(role)}.safetensors" in names
                assert f"fold-{fold}/{system}/{stem(role)}-scorer.safetensors" in names


# features kept from run to run


@pytest.fixture
def reads(monkeypatch):
    """The items that were read from data sets."""
    found = []
    read_item = kdlib.TensorPart.__getitem__

    def counting(part, key):
        found.append(key)
        return read_item(part, key)

    monkeypatch.setattr(kdlib.TensorPart, "__getitem__", counting)
    return found


def test_a_cache_changes_no_bit_and_a_second_run_reads_no_clip(folded, tmp_path, reads):
    recipe = read(TOY, [f"cache.folder={tmp_path / 'cache'}"])
    first = run(recipe, tmp_path / "first", progress=False)
    assert reads
    reads.clear()
    second = run(recipe, tmp_path / "second", progress=False)
    assert reads == []
    for other in (first, second):
        assert result_of(other)["rows"] == result_of(folded)["rows"]
        assert (other / "predictions.csv").read_bytes() == (folded / "predictions.csv").read_bytes()
        assert_equal_bits(weights_of(folded), weights_of(other))
    assert recipe.digest() == read(TOY).digest()


def test_a_float16_cache_is_another_run_but_nearly_the_same_networks(folded, tmp_path):
    recipe = read(TOY, [f"cache.folder={tmp_path / 'cache'}", "cache.dtype=float16"])
    half = weights_of(run(recipe, tmp_path / "half", progress=False))
    exact = weights_of(folded)
    name = str(Path("fold-1/straight/teacher.safetensors"))
    assert not torch.equal(half[name]["output.weight"], exact[name]["output.weight"])
    torch.testing.assert_close(half[name]["output.weight"], exact[name]["output.weight"], rtol=0, atol=0.02)
    assert recipe.digest() != read(TOY).digest()


def test_a_cache_is_of_the_settings_of_features_and_of_nothing_else(tmp_path, reads):
    alone = {"name": "alone", "data": TOY["data"], **TOY["systems"]["straight"]}
    changes = [f"cache.folder={tmp_path / 'cache'}", "train.epochs=1"]

    def read_by(name, *more):
        reads.clear()
        run(read(alone, [*changes, *more]), tmp_path / name, progress=False)
        return bool(reads)

    assert read_by("first")
    assert not read_by("network", "model.width=4", "train.seed=3", "student.control=false")
    assert read_by("settings", "features.turned=true")
    assert not read_by("again")


def test_a_loaded_run_has_the_statistics_of_a_cache(tmp_path, folded):
    recipe = read(TOY, [f"cache.folder={tmp_path / 'cache'}", "train.epochs=1"])
    for name in ("first", "second"):
        loaded = kdlib.load_run(run(recipe, tmp_path / name, progress=False), fold=1)
        assert torch.equal(loaded.features["straight"].mean, kdlib.load_run(folded, fold=1).features["straight"].mean)
