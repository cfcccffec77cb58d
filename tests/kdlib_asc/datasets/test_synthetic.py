"""Made scenes: keyed, place by place, hard for a linear classifier, and equal when read back from a folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from kdlib import CLEAN, DataError, KdlibError, Loader
from kdlib.interfaces import DataPart
from kdlib.recipe import read
from kdlib.run import run
from kdlib_asc.datasets import Clips, SceneParts, SyntheticScenes, dcase, synthetic_scenes
from kdlib_asc.datasets import synthetic as module
from kdlib_asc.datasets.ingredients import INGREDIENTS, SCENES, SHARING, Take
from kdlib_asc.features import Spectrogram

SHORT: dict[str, Any] = {"seconds": 0.5, "places": 3, "segments": 2}
DCASE = (
    "airport", "bus", "metro", "metro_station", "park", "public_square", "shopping_mall", "street_pedestrian",
    "street_traffic", "tram",
)  # fmt: skip


def short(**settings: Any) -> SyntheticScenes:
    return synthetic_scenes(**{**SHORT, **settings})


def clips(part: Clips) -> Tensor:
    return torch.stack([part[CLEAN, index]["x"] for index in range(len(part))])


def by_name(*parts: Clips | None) -> dict[str, Tensor]:
    return {name: part.store(name) for part in parts if part is not None for name in part.ids}


@pytest.fixture(scope="module")
def made() -> SyntheticScenes:
    """Enough places for statistics; tests change nothing."""
    return synthetic_scenes(seconds=1.5, places=10, segments=3, seed=1)


# parts


def test_parts_satisfy_the_interface_and_know_their_form() -> None:
    parts = short(validation=0.4)
    assert isinstance(parts, SceneParts)
    assert parts.valid is not None
    for part in (parts.train, parts.valid, parts.test):
        assert isinstance(part, DataPart)
    assert parts.classes == DCASE
    assert (parts.rate, parts.channels) == (16000, 2)
    item = parts.train[3, 4]
    assert (item["x"].shape, item["x"].dtype) == ((2, 8000), torch.float32)
    assert {key: item[key] for key in ("y", "index", "epoch")} == {"y": parts.train.labels[4], "index": 4, "epoch": 3}


def test_split_is_by_place_and_each_class_has_its_share() -> None:
    parts = short(places=10, segments=2, test=0.3, validation=0.2)
    assert parts.valid is not None
    groups = [set(part.groups) for part in (parts.train, parts.valid, parts.test)]
    assert [len(of) for of in groups] == [60, 10, 30]  # of each class 7 places are left, and round(0.2 * 7) = 1 goes
    assert len(set.union(*groups)) == 100
    for part, count in ((parts.train, 12), (parts.valid, 2), (parts.test, 6)):
        assert np.bincount(part.labels).tolist() == [count] * 10


def test_names_tell_class_place_and_segment() -> None:
    part = short().train
    for name, label, group in zip(part.ids, part.labels, part.groups, strict=True):
        assert name.startswith(f"audio/{group}-")
        assert group.startswith(f"{DCASE[label]}-synthetic-")


@pytest.mark.parametrize(
    "settings",
    ["rate=8000", "channels=3", "seconds=0.1", "places=1", "segments=0", "test=0.0", "test=1.0", "validation=1.0"],
)
def test_settings_out_of_bounds_are_refused_in_a_recipe(settings: str) -> None:
    key = settings.partition("=")[0]
    with pytest.raises(KdlibError, match=rf"data\.{key}"):
        read("asc_quick", [f"data.{settings}"])


def test_validation_with_one_place_left_is_refused() -> None:
    with pytest.raises(DataError, match="validation"):
        short(places=2, validation=0.2)


# keyed


def test_item_is_the_same_in_any_order_and_in_loader_workers() -> None:
    forward = clips(short().train)
    backward = short().train
    for index in reversed(range(len(backward))):
        assert torch.equal(backward[5, index]["x"], forward[index])
    loader = Loader(short().train, batch=7, shuffle=False, workers=2)
    assert torch.equal(torch.cat([batch["x"] for batch in loader]), forward)


def test_item_is_the_same_in_another_process() -> None:
    code = """
import hashlib, random, torch, numpy
from kdlib_asc.datasets import synthetic_scenes
torch.manual_seed(7); numpy.random.seed(7)
print(hashlib.sha256(synthetic_scenes(seconds=0.5, places=3, segments=2).test[0, 8]["x"].numpy().tobytes()).hexdigest())
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert printed.strip() == hashlib.sha256(short().test[0, 8]["x"].numpy().tobytes()).hexdigest()


def test_number_of_places_and_segments_and_the_split_do_not_change_a_clip() -> None:
    few = short(places=3, segments=1)
    many = short(places=6, segments=2, test=0.5, validation=0.3)
    common = by_name(many.train, many.valid, many.test)
    for name, samples in by_name(few.train, few.test).items():
        assert torch.equal(samples, common[name])


def test_random_state_of_the_caller_is_left_alone() -> None:
    before, numpys = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    clips(short().test)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002


def test_seeds_places_and_segments_differ() -> None:
    everything = {**by_name(short().train, short().test)}
    other = by_name(short(seed=1).train, short(seed=1).test)
    assert everything.keys() == other.keys()
    prints = [samples.numpy().tobytes() for samples in (*everything.values(), *other.values())]
    assert len(set(prints)) == 2 * 60


# what is heard


def test_clips_are_finite_and_below_full_scale_and_no_channel_is_silent(made: SyntheticScenes) -> None:
    samples = torch.cat([clips(made.train), clips(made.test)])
    assert samples.isfinite().all()
    assert float(samples.abs().max()) <= module.PEAK + 1e-6
    assert float(samples.square().mean(dim=-1).sqrt().min()) > 1e-4


def test_too_loud_a_clip_is_made_quieter_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = module.scene("tram", 0, 0, seed=0, rate=16000, samples=8000)
    monkeypatch.setattr(module, "LEVEL", (20.0, 20.0))
    loud = module.scene("tram", 0, 0, seed=0, rate=16000, samples=8000)
    assert np.abs(loud).max() == pytest.approx(module.PEAK)
    assert np.allclose(loud / np.abs(loud).max(), quiet / np.abs(quiet).max())


def spread(part: Clips, measure: np.ndarray) -> float:
    """Return the variance of the places' means over the mean variance within places, class by class."""
    ratios = []
    for label in range(10):
        groups = np.array(part.groups)[part.labels == label]
        values = [measure[part.labels == label][groups == group] for group in dict.fromkeys(groups)]
        ratios.append(np.var([value.mean() for value in values]) / np.mean([value.var() for value in values]))
    return float(np.median(ratios))


def test_level_stereo_image_and_colour_belong_to_the_place(made: SyntheticScenes) -> None:
    power = clips(made.train).square()
    loudness = power.mean(dim=(1, 2)).log().numpy()
    image = (power[:, 0].mean(dim=1) / power[:, 1].mean(dim=1)).log().numpy()
    spectra = torch.fft.rfft(clips(made.train)).abs().square().mean(dim=1)
    tilt = (spectra[:, 6000:].mean(dim=1) / spectra[:, 300:3000].mean(dim=1)).log().numpy()
    # Were segments no more alike in a place than across places, this would be 1/3: the variance of a mean of three.
    assert spread(made.train, loudness) > 1
    assert spread(made.train, image) > 1
    assert spread(made.train, tilt) > 1


def test_room_has_a_direct_sound_and_a_tail_of_its_own_a_channel() -> None:
    transfer = module.room(np.random.default_rng(0), 8000, 16000)
    assert transfer.shape == (2, 4001)
    assert not np.allclose(transfer[0], transfer[1])
    other = module.room(np.random.default_rng(1), 8000, 16000)
    assert not np.allclose(np.abs(transfer), np.abs(other), rtol=0.1)


def test_one_channel_is_the_mean_of_two() -> None:
    stereo, mono = short().test[0, 0]["x"], short(channels=1).test[0, 0]["x"]
    torch.testing.assert_close(mono, stereo.mean(dim=0, keepdim=True), atol=2**-22, rtol=0)


def test_rate_and_length_are_settings() -> None:
    assert short(rate=48000, seconds=1.25).test[0, 0]["x"].shape == (2, 60000)
    assert short(rate=22050, seconds=0.7001).test[0, 0]["x"].shape == (2, 15437)


# ingredients


@pytest.mark.parametrize("name", sorted(INGREDIENTS))
@pytest.mark.parametrize(("rate", "samples"), [(16000, 8000), (48000, 24001)])
def test_ingredient_is_finite_and_of_moderate_loudness(name: str, rate: int, samples: int) -> None:
    loudness = []
    for key in range(8):
        random = np.random.default_rng(key)
        sound = INGREDIENTS[name](Take(random, random, samples, rate))
        assert sound.shape == (samples,)
        assert np.isfinite(sound).all()
        loudness.append(np.sqrt(np.mean(sound**2)))
    assert 0.1 < max(loudness) < 2.5


def test_table_is_of_the_classes_of_dcase_and_uses_every_ingredient() -> None:
    assert sorted(SCENES) == list(DCASE)
    assert {name for scene in SCENES.values() for name in scene} == set(INGREDIENTS)
    for scene in SCENES.values():
        levels = [level for level, _ in scene.values()]
        assert levels[0] == max(levels)
        assert all(0 < chance <= 1 for _, chance in scene.values())


def test_sharing_is_mutual_and_gives_each_class_one_sibling() -> None:
    assert {("airport", "shopping_mall"), ("metro", "tram"), ("tram", "metro")} <= SHARING
    assert sorted(one for one, _ in SHARING) == list(DCASE)
    for one, other in SHARING:
        assert (other, one) in SHARING
        assert set(SCENES[one]) & set(SCENES[other])


@pytest.mark.parametrize("name", ["birds", "motor", "bells"])
def test_place_keeps_its_character_while_the_moment_changes(name: str) -> None:
    def spectrum(place: int, moment: int) -> np.ndarray:
        take = Take(np.random.default_rng(place), np.random.default_rng(100 + moment), 48000, 16000)
        power = np.abs(np.fft.rfft(INGREDIENTS[name](take))) ** 2
        return np.log(power[:24000].reshape(240, 100).mean(axis=1) + 1e-3)

    own = [np.corrcoef(spectrum(place, 0), spectrum(place, 1))[0, 1] for place in range(8)]
    strangers = [np.corrcoef(spectrum(place, 0), spectrum(place + 1, 1))[0, 1] for place in range(8)]
    assert np.mean(own) > np.mean(strangers) + 0.01


# the figure that fits into a test; the others are in docs/results/synthetic_scenes.md


def test_linear_classifier_on_mean_log_mel_is_above_chance_and_below_60_percent(made: SyntheticScenes) -> None:
    features = Spectrogram(rate=made.rate, coefficients=64, standardise=False)
    seen, unseen = (features(clips(part)).mean(dim=(1, 2)).numpy() for part in (made.train, made.test))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(seen, made.train.labels)
    assert 0.15 < model.score(unseen, made.test.labels) < 0.6


# the folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[SyntheticScenes, Path]:
    root = tmp_path_factory.mktemp("made") / "new" / "set"
    parts = short(places=12, segments=1, rate=48000, validation=0.3, seed=3)  # place 10 is not between 1 and 2
    parts.write(root)
    return parts, root


def test_folder_is_read_back_by_the_dcase_reader_to_the_bit(written: tuple[SyntheticScenes, Path]) -> None:
    parts, root = written
    back = dcase(root=root, rate=48000, channels=2, seconds=0.5, validation=0.3, seed=3)[1]
    assert back.classes == parts.classes
    for name in ("train", "valid", "test"):
        own, other = getattr(parts, name), getattr(back, name)
        assert list(own.ids) == list(other.ids)
        assert list(own.groups) == list(other.groups)
        assert own.labels.tolist() == other.labels.tolist()
        assert torch.equal(clips(own), clips(other))


def test_files_are_those_of_dcase_2018(written: tuple[SyntheticScenes, Path]) -> None:
    _, root = written
    info = soundfile.info(root / "audio/tram-synthetic-10-0-a.wav")
    assert (info.samplerate, info.channels, info.subtype, info.format) == (48000, 2, "PCM_24", "WAV")
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix != ".wav")
    lists = [f"evaluation_setup/fold1_{kind}.txt" for kind in ("evaluate", "test", "train")]
    assert names == ["audio", "evaluation_setup", *lists, "meta.csv"]
    header, first = (root / "meta.csv").read_text().splitlines()[:2]
    assert header.split("\t") == ["filename", "scene_label", "identifier", "source_label"]
    assert first.split("\t")[1:] == ["airport", "-".join(first.split("-")[:3]).removeprefix("audio/"), "a"]
    train, test, evaluate = (
        (root / f"evaluation_setup/fold1_{k}.txt").read_text() for k in ("train", "test", "evaluate")
    )
    assert [line.split("\t")[0] for line in evaluate.splitlines()] == test.splitlines()
    assert len(train.splitlines()) + len(test.splitlines()) == 120


def test_one_channel_is_written_as_one(tmp_path: Path) -> None:
    parts = short(channels=1, places=2, segments=1)
    parts.write(tmp_path / "mono")
    back = dcase(root=tmp_path / "mono", rate=16000, channels=1, seconds=0.5)[1]
    assert torch.equal(clips(back.test), clips(parts.test))


def test_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for where in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DataError, match="is there already"):
            short().write(where)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    short(places=2, segments=1).write(tmp_path)
    assert (tmp_path / "meta.csv").is_file()


def test_interrupted_writing_is_not_taken_for_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def interrupted(path: Path, *_: Any, **__: Any) -> None:
        nonlocal count
        count += 1
        if count == 15:
            raise KeyboardInterrupt
        path.touch()

    monkeypatch.setattr(soundfile, "write", interrupted)
    root = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        short(places=2).write(root)
    with pytest.raises(DataError, match="no data set in the DCASE layout"):
        dcase(root=root)


def test_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise soundfile.LibsndfileError(2, "Error in writing: ")

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(KdlibError, match=r"set: cannot be written"):
        short(places=2).write(tmp_path / "set")


# the recipe

SMALL = (
    "data.places=4", "data.segments=2", "data.test=0.5", "data.seconds=1.7",
    "train.epochs=1", "systems.spectrogram.teacher.pretrain.train.epochs=1", "train.threads=1",
)  # fmt: skip


def test_asc_quick_gives_nine_rows(tmp_path: Path) -> None:
    folder = run(read("asc_quick", list(SMALL)), tmp_path / "run", progress=False)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows = [(row["system"], row["role"]) for row in result["rows"]]
    assert rows == [(s, role) for s in ("raw", "spectrogram", "fusion") for role in ("without", "continued", "with")]
    assert {row["total"] for row in result["rows"]} == {40}
    assert result["facts"] == {"classes": 10, "channels": 2, "rate": 16000}
