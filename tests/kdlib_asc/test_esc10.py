"""The shipped ESC-10 recipe on a few real recordings in the same layout."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import kdlib
from kdlib.checking import check
from kdlib.predict import predict
from kdlib.recipe import find, read
from kdlib.run import run
from kdlib_asc.datasets import dcase
from kdlib_asc.partners import partners

TINY = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tiny_cc0"
pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason=f"the recordings are not there: {TINY}")

FORM = {"rate": 16000, "channels": 1, "seconds": 2.0}
CLASSES = ("clock_tick", "fire_crackling", "helicopter", "rain")


def one_epoch(block):
    """A recipe with every training cut to one epoch."""
    return {
        key: 1 if key == "epochs" else one_epoch(value) if isinstance(value, dict) else value
        for key, value in block.items()
    }


def recipe():
    written = one_epoch(tomllib.loads(find("asc_esc10").read_text(encoding="utf-8")))
    return read(written, [f"data.root={TINY}", "data.seconds=2.0", "data.rate=16000", "train.batch=10"])


@pytest.fixture(scope="module")
def folds():
    return dcase(root=TINY, fold="all", **FORM)


# the reader


def test_five_folds_test_every_clip_once(folds):
    assert sorted(folds) == [1, 2, 3, 4, 5]
    tested = [clip for parts in folds.values() for clip in parts.test.ids]
    assert len(tested) == len(set(tested)) == 40
    for parts in folds.values():
        assert parts.classes == CLASSES
        assert len(parts.train) + len(parts.test) == 40
        assert not set(parts.train.groups) & set(parts.test.groups)


def test_every_clip_is_read_whole_and_as_its_name_says(folds):
    part = folds[1].train
    for index, name in enumerate(part.ids):
        item = part[0, index]
        assert item["x"].shape == (1, 32000)
        assert item["x"].dtype == torch.float32
        assert 0 < item["x"].abs().max() <= 1
        assert CLASSES[item["y"]] == Path(name).name.partition("-")[0]


def test_partners_of_real_clips_from_elsewhere(folds):
    part = folds[1].train
    table = partners(part.labels, part.groups, 3, 0, 0, other_group=True, classes=part.classes)
    groups = np.array(part.groups)
    assert (part.labels[table] == part.labels[:, None]).all()
    assert (groups[table] != groups[:, None]).all()


def test_other_settings_than_the_files_have_are_refused():
    with pytest.raises(kdlib.DataError, match=r"clock_tick-.*\.flac.*16000"):
        dcase(root=TINY, **{**FORM, "rate": 44100})[1].train[0, 0]


# the recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run(recipe(), tmp_path_factory.mktemp("runs") / "tiny", progress=False)


def test_the_recipe_wants_to_be_told_where_the_data_is():
    with pytest.raises(kdlib.RecipeError, match=r"data\.root: .*--set data\.root=PATH"):
        read("asc_esc10")


def test_a_check_finds_nothing_wrong():
    for name, report in check(recipe()):
        assert report, f"{name}\n{report}"


def test_the_paper_s_table_of_two_systems_and_their_fusion(folder):
    result = json.loads((folder / "result.json").read_text())
    assert result["classes"] == list(CLASSES)
    assert result["folds"] == ["1"]
    systems, roles = ("raw", "spectrogram", "fusion"), ("without", "continued", "with")
    assert sorted((row["system"], row["role"]) for row in result["rows"]) == sorted(
        (system, role) for system in systems for role in roles
    )
    for row in result["rows"]:
        assert row["total"] == 7
        assert np.sum(row["confusion"], axis=1).tolist() == [2, 1, 2, 2]


def test_losses_of_real_recordings_are_finite(folder):
    logs = sorted(folder.rglob("metrics.jsonl"))
    assert len(logs) == 7  # pre-training, two teachers, two controls, two students
    for log in logs:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(lines) == 4  # 33 clips, 10 a batch
        assert all(np.isfinite(line["total"]) for line in lines)


def test_the_students_embed_a_clip_of_their_own_accord(folder, folds):
    loaded = kdlib.load_run(folder)
    clip = folds[1].test[kdlib.CLEAN, 0]["x"]
    for name, student in loaded.students.items():
        with torch.no_grad():
            taps = student(loaded.features[name](clip)[None])
        scores = loaded.scorers[name].scores(taps["embedding"].numpy())
        assert scores.shape == (1, 4)
        assert np.isfinite(scores).all()


def test_the_clips_as_files_get_the_classes_that_the_run_gave_them(folder):
    lines = [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()[1:]]
    of_run = {TINY / line[3]: line[5] for line in lines if line[:2] == ["fusion", "with"]}
    assert {file: next(iter(scores)) for file, scores in predict(folder, list(of_run))} == of_run
