"""The whole job on made sounds: two systems, two folds, and what one of them leaves behind."""

import copy
import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import kdlib
from kdlib.checking import check
from kdlib.featured import Featured
from kdlib.fusion import Scores, fuse
from kdlib.recipe import read
from kdlib.run import run
from kdlib.system import stem
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN
from kdlib_asc.datasets import dcase
from kdlib_asc.features import PreEmphasis, Spectrogram
from kdlib_asc.points import HiddenMse
from kdlib_asc.sources import MultiSegment

RATE, SECONDS = 16000, 1.7  # 27200 samples; the raw network takes 26244 or more
CLASSES = ("hiss", "hum", "whistle")
RECORDINGS = 8
TESTED = {1: range(3), 2: range(3, 8)}  # recordings of each class in the test part of a fold
KINDS = ("train", "test", "evaluate")
FORM = {"rate": RATE, "channels": 1, "seconds": SECONDS}
SYSTEMS = ("raw", "spectrogram")
ROLES = ("without", "continued", "with")


def sound(scene, recording):
    random = np.random.default_rng([CLASSES.index(scene), recording])
    time = np.arange(round(RATE * SECONDS)) / RATE
    noise = random.normal(size=len(time))
    if scene == "hiss":
        return 0.1 * noise
    pitch = 150 + 5 * recording if scene == "hum" else 3000 + 50 * recording
    return 0.2 * np.sin(2 * np.pi * pitch * time) + 0.01 * noise


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set in the layout of DCASE 2018, with two folds that test each clip once."""
    root = tmp_path_factory.mktemp("made")
    (root / "audio").mkdir()
    (root / "evaluation_setup").mkdir()
    clips = [(f"audio/{scene}-oslo-{n}-0-a.wav", scene, n) for scene in CLASSES for n in range(RECORDINGS)]
    for name, scene, n in clips:
        soundfile.write(root / name, sound(scene, n), RATE, subtype="PCM_24")
    rows = [f"{name}\t{scene}\t{scene}-oslo-{n}\ta\n" for name, scene, n in clips]
    (root / "meta.csv").write_text("filename\tscene_label\tidentifier\tsource_label\n" + "".join(rows))
    for fold, tested in TESTED.items():
        lists = {kind: [clip for clip in clips if (clip[2] in tested) == (kind != "train")] for kind in KINDS}
        for kind, of in lists.items():
            lines = [f"{name}\n" if kind == "test" else f"{name}\t{scene}\n" for name, scene, _ in of]
            (root / f"evaluation_setup/fold{fold}_{kind}.txt").write_text("".join(lines))
    return root


def system(features, model, join, view, **more):
    return {
        "features": features,
        "model": {**model, "width": 0.1},
        "source": {"kind": "multi_segment", "segments": 2, "join": join, "view": view},
        "points": {"hidden": {"kind": "hidden_mse"}},
        "student": {"start": "teacher", "control": True},
        **more,
    }


def written_for(root):
    """The paper's two systems, narrow and short."""
    pretrain = {"model": {"gru": False}, "train": {"epochs": 1}}
    return {
        "name": "first-light",
        "data": {"kind": "dcase", "root": str(root), "fold": "all", **FORM},
        "train": {"epochs": 2, "batch": 8, "optimizer": {"kind": "adam", "lr": 1e-3}},
        "systems": {
            "raw": system({"kind": "pre_emphasis", "roll": True}, {"kind": "wave_cnn"}, "input", "same"),
            "spectrogram": system(
                {"kind": "spectrogram", "coefficients": 32, "roll": True, "time_masks": 1},
                {"kind": "spectrogram_cnn_gru"},
                "frames",
                "clean",
                teacher={"pretrain": pretrain},
            ),
        },
        "scorer": {"kind": "svm"},
        "fusion": {"kind": "mean"},
    }


def recipe_of(root, *changes):
    return read(written_for(root), list(changes))


@pytest.fixture(scope="module")
def recipe(root):
    return recipe_of(root)


@pytest.fixture(scope="module")
def folder(recipe, tmp_path_factory):
    """The folder of the finished run; tests read it and change nothing."""
    return run(recipe, tmp_path_factory.mktemp("runs") / "first", progress=False)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def predictions_of(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(folder, role, system="raw", fold=1):
    return load_file(folder / f"fold-{fold}" / system / f"{stem(role)}.safetensors")


# what comes out


def test_there_are_nine_rows(folder):
    rows = [(row["system"], row["role"]) for row in result_of(folder)["rows"]]
    assert sorted(rows) == sorted((system, role) for system in (*SYSTEMS, "fusion") for role in ROLES)


def test_totals_add_up_over_the_folds(folder, root):
    result, predictions = result_of(folder), predictions_of(folder)
    tested = {fold: list(parts.test.ids) for fold, parts in dcase(root=root, fold="all", **FORM).items()}
    assert [len(ids) for ids in tested.values()] == [9, 15]
    assert result["folds"] == ["1", "2"]
    assert result["classes"] == list(CLASSES)
    for row in result["rows"]:
        mine = [line for line in predictions if (line["system"], line["role"]) == (row["system"], row["role"])]
        assert {fold: [line["id"] for line in mine if line["fold"] == str(fold)] for fold in tested} == tested
        pairs = Counter((line["label"], line["predicted"]) for line in mine)
        assert row["confusion"] == [[pairs[true, said] for said in CLASSES] for true in CLASSES]
        assert row["correct"] == sum(pairs[name, name] for name in CLASSES)
        assert row["total"] == len(mine) == 24
        assert row["accuracy"] == row["correct"] / 24
        assert row["macro"] == pytest.approx(row["accuracy"])  # eight clips a class
        assert row["interval"][0] < row["accuracy"] <= row["interval"][1]


def test_labels_of_the_predictions_are_those_of_the_clips(folder):
    lines = predictions_of(folder)
    assert len(lines) == 9 * 24
    assert all(line["id"].startswith(f"audio/{line['label']}-") for line in lines)


def test_sounds_so_different_are_told_apart(folder):
    for row in result_of(folder)["rows"]:
        assert row["accuracy"] > 0.5, (row["system"], row["role"])  # by chance: 0.33


def test_the_files_are_there(folder):
    systems = {
        name: {
            *(f"{stem(role)}.safetensors" for role in ROLES),
            *(f"{stem(role)}-scorer.safetensors" for role in ROLES),
            *(f"{training}/metrics.csv" for training in trainings),
            *(f"{training}/metrics.jsonl" for training in trainings),
            "features.safetensors",
        }
        for name, trainings in (
            ("raw", ("teacher", "continued", "student")),
            ("spectrogram", ("pretrain", "teacher", "continued", "student")),
        )
    }
    expected = {f"fold-{fold}/{name}/{file}" for fold in TESTED for name, files in systems.items() for file in files}
    expected |= {"recipe.json", "result.json", "predictions.csv"}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there >= expected
    assert not [path for path in there if Path(path).name.startswith(".")]  # nothing half-written


def test_every_training_logs_its_epochs(folder):
    for path in folder.rglob("metrics.csv"):
        epochs = 1 if path.parent.name == "pretrain" else 2
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [line["epoch"] for line in lines] == [str(epoch) for epoch in range(epochs)]
        term = "hidden" if path.parent.name == "student" else "hard"
        assert all(float(line["total"]) == float(line[term]) > 0 for line in lines)


def test_the_kept_recipe_resolves_to_itself(folder, recipe):
    assert read(folder / "recipe.json").dump() == recipe.dump()


def test_nothing_is_printed_with_progress_false(root, tmp_path, capsys):
    run(recipe_of(root, "data.fold=1", "train.epochs=1"), tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")


# what was learned


@pytest.mark.parametrize("fold", TESTED)
@pytest.mark.parametrize("system", SYSTEMS)
def test_hidden_layer_distillation_leaves_the_output_layer_the_teachers(folder, system, fold):
    teacher, student, control = (weights(folder, role, system, fold) for role in ("without", "with", "continued"))
    for name in ("output.weight", "output.bias"):
        assert torch.equal(student[name], teacher[name])
        assert not torch.equal(control[name], teacher[name])
    for name in ("dense1.weight", "dense1.bias", "conv1.0.weight", "conv1.1.running_mean"):
        assert not torch.equal(student[name], teacher[name])
        assert not torch.equal(student[name], control[name])


def test_the_saved_teacher_is_the_one_that_is_trained_without_any_student(folder, root, tmp_path):
    written = written_for(root)
    del written["fusion"]
    for block in written["systems"].values():
        del block["source"], block["points"], block["student"]
    alone = run(read(written, ["data.fold=1"]), tmp_path / "alone", progress=False)
    assert [row["role"] for row in result_of(alone)["rows"]] == ["without"] * 2
    for name in SYSTEMS:
        before, after = weights(alone, "without", name), weights(folder, "without", name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_pretrained_part_is_carried_over_and_the_rest_is_new(folder):
    text = (folder / "fold-1/spectrogram/pretrain/not_carried_over.txt").read_text()
    modules = {name.partition(".")[0] for name in text.split()}
    assert modules == {"gru_layer", "dense1", "output"}


@pytest.mark.parametrize(
    ("network", "features", "join"),
    [(WaveCNN, PreEmphasis(), "input"), (SpectrogramCNNGRU, Spectrogram(rate=RATE, coefficients=32), "frames")],
    ids=SYSTEMS,
)
@pytest.mark.parametrize("view", ["same", "clean"])
def test_the_teacher_is_bit_equal_after_the_students_training(root, network, features, join, view):
    parts, features = dcase(root=root, validation=0.4, **FORM)[1], copy.deepcopy(features)
    if join == "frames":
        features.time_masks = 1  # augmented: frames are made online with view = "same"
        features.fit(parts.train[kdlib.CLEAN, index]["x"] for index in range(len(parts.train)))
    train, valid = (Featured(part, features, augment=part is parts.train) for part in (parts.train, parts.valid))
    torch.manual_seed(0)
    teacher = network(classes=3, channels=1, width=0.1)
    student = copy.deepcopy(teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    source = MultiSegment(kdlib.freeze(teacher), train, join=join, view=view)
    distiller = kdlib.Distiller(student, source, hidden=HiddenMse())
    states = []

    def look(event):
        states.append((teacher.training, event.distiller.student.training))

    kdlib.fit(distiller, train, valid=valid, epochs=2, batch=8, callbacks=[look], progress=False)
    assert (False, True) in states
    assert not any(training for training, _ in states)
    after = teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == before.keys() - {"output.weight", "output.bias"}


# the run taken up again


@pytest.mark.parametrize("fold", TESTED)
def test_a_loaded_run_scores_clips_as_the_run_did(folder, root, fold):
    loaded = kdlib.load_run(folder, fold=fold)
    assert loaded.classes == CLASSES
    assert list(loaded.students) == list(loaded.features) == list(loaded.scorers) == list(SYSTEMS)
    test = dcase(root=root, fold=fold, **FORM)[fold].test
    scores = {}
    for name in SYSTEMS:
        student, features, scorer = loaded.students[name], loaded.features[name], loaded.scorers[name]
        assert not student.training
        with torch.no_grad():
            x = torch.stack([features(test[kdlib.CLEAN, index]["x"]) for index in range(len(test))])
            embeddings = torch.cat([student(rows)["embedding"] for rows in x.split(8)]).numpy()
        columns = tuple(loaded.classes[number] for number in scorer.classes_)
        scores[name] = Scores(tuple(test.ids), columns, scorer.scores(embeddings))
    scores["fusion"] = fuse(scores)
    for name, of in scores.items():
        said = {
            line["id"]: line["predicted"]
            for line in predictions_of(folder)
            if (line["system"], line["role"], line["fold"]) == (name, "with", str(fold))
        }
        assert {clip: of.classes[best] for clip, best in zip(of.ids, of.values.argmax(axis=1), strict=True)} == said


def test_a_loaded_run_of_two_folds_asks_which(folder):
    with pytest.raises(kdlib.KdlibError, match=r"fold=1 \| 2"):
        kdlib.load_run(folder)


def test_the_saved_student_loads_into_the_bare_network(folder):
    network = WaveCNN(classes=3, channels=1, width=0.1)
    network.load_state_dict(weights(folder, "with"))


# the same once more


def assert_same_tensors(one, other):
    files = {path.relative_to(one) for path in one.rglob("*.safetensors")}
    files -= {Path("raw/features.safetensors")}  # without statistics
    assert len(files) == 13
    for file in files:
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert first.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file


def test_a_second_run_gives_the_same_rows_and_bits(folder, root, tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    again = run(recipe_of(root), tmp_path / "again", progress=False)
    assert result_of(again)["rows"] == result_of(folder)["rows"]
    assert predictions_of(again) == predictions_of(folder)
    for fold in TESTED:
        assert_same_tensors(folder / f"fold-{fold}", again / f"fold-{fold}")


def test_loader_workers_and_the_choice_of_folds_change_no_bit(folder, root, tmp_path):
    again = run(recipe_of(root, "train.workers=2", "data.fold=1"), tmp_path / "again", progress=False)
    assert predictions_of(again) == [line for line in predictions_of(folder) if line["fold"] == "1"]
    assert_same_tensors(folder / "fold-1", again / "fold-1")


def test_another_seed_gives_other_weights(folder, root, tmp_path):
    other = run(recipe_of(root, "data.fold=1", "train.epochs=1", "train.seed=1"), tmp_path / "other", progress=False)
    assert not torch.equal(weights(other, "with")["dense1.weight"], weights(folder, "with")["dense1.weight"])


# the recipe looked over


def test_a_check_of_the_recipe_finds_nothing_wrong(recipe):
    reports = dict(check(recipe))
    assert list(reports) == list(SYSTEMS)
    for report in reports.values():
        assert report, str(report)


def test_a_check_reads_some_clips_and_still_finds_partners_elsewhere(tmp_path):
    written = {
        "name": "elsewhere",
        "data": {"kind": "folder", "root": str(tmp_path), "rate": 8000, "channels": 1, "seconds": 0.3},
        "train": {"epochs": 1, "batch": 8},
        "features": {"kind": "spectrogram", "coefficients": 16, "standardise": False},
        "model": {"kind": "spectrogram_cnn_gru", "width": 0.1},
        "source": {"kind": "multi_segment", "elsewhere": True},
        "points": {"hidden": {"kind": "hidden_mse"}},
    }
    for scene in ("bus", "park"):
        (tmp_path / scene).mkdir()
        for place, clips in (("a", 40), ("b", 40), ("c", 40)):  # a check looks at 32 clips a class
            for clip in range(clips):
                noise = np.random.default_rng(clip).normal(size=2400) / 10
                soundfile.write(tmp_path / scene / f"{place}-{scene}__{clip:02}.wav", noise, 8000)
    for _, report in check(read(written)):
        assert report, str(report)


# features kept on disk


def test_with_a_cache_the_bits_are_the_same_and_a_second_run_decodes_nothing(folder, root, tmp_path, monkeypatch):
    recipe = recipe_of(root, f"cache.folder={tmp_path / 'cache'}")
    first = run(recipe, tmp_path / "first", progress=False)

    def never(path):
        raise AssertionError(path)

    monkeypatch.setattr("kdlib_asc.audio._decode", never)
    second = run(recipe, tmp_path / "second", progress=False)
    for other in (first, second):
        assert result_of(other)["rows"] == result_of(folder)["rows"]
        assert predictions_of(other) == predictions_of(folder)
        for fold in TESTED:
            assert_same_tensors(folder / f"fold-{fold}", other / f"fold-{fold}")
