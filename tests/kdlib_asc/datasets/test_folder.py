"""Folders of class-named folders, split by recording."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from kdlib import DataError
from kdlib.interfaces import DataPart
from kdlib_asc.datasets import SceneParts, folder

FORM: dict[str, Any] = {"rate": 8000, "channels": 1, "seconds": 0.01}


def clip(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(80, 0.25), 8000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, four recordings of two clips each."""
    for name in ("bus", "park"):
        for recording in ("mon", "tue", "wed", "thu"):
            for take in (1, 2):
                clip(tmp_path / name / f"{name}_{recording}__{take}.wav")
    return tmp_path


def load(root: Path, **settings: Any) -> SceneParts:
    return folder(root=root, **{**FORM, **settings})


def refusal(root: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(root, **settings)
    return str(caught.value)


def test_recordings_are_whole_in_one_part_and_classes_in_both(root: Path) -> None:
    parts = load(root, test=0.25)
    assert parts.classes == ("bus", "park")
    assert parts.valid is None
    assert set(parts.train.groups).isdisjoint(parts.test.groups)
    assert np.bincount(parts.test.labels).tolist() == [2, 2]
    assert np.bincount(parts.train.labels).tolist() == [6, 6]
    assert isinstance(parts.test, DataPart)


@pytest.mark.parametrize(("test", "clips"), [(0.01, 2), (0.5, 4), (0.99, 6)])
def test_share_of_the_recordings_leaves_one_in_either_part(root: Path, test: float, clips: int) -> None:
    assert np.bincount(load(root, test=test).test.labels).tolist() == [clips, clips]


def test_ids_are_relative_with_forward_slashes_and_read(root: Path) -> None:
    parts = load(root)
    assert "bus/bus_mon__1.wav" in {*parts.train.ids, *parts.test.ids}
    item = parts.train[3, 0]
    assert item["x"].shape == (1, 80)
    assert (item["index"], item["epoch"]) == (0, 3)


def test_validation_is_split_off_the_training_part(root: Path) -> None:
    parts = load(root, validation=0.3)
    assert parts.valid is not None
    groups = [set(part.groups) for part in (parts.train, parts.valid, parts.test)]
    assert [len(group) for group in groups] == [4, 2, 2]
    assert len(set.union(*groups)) == 8


def test_test_part_is_a_function_of_the_seed_and_untouched_by_validation(root: Path) -> None:
    chosen = [tuple(load(root, seed=seed, validation=0.3 * (seed % 2)).test.ids) for seed in range(6)]
    assert chosen == [tuple(load(root, seed=seed).test.ids) for seed in range(6)]
    assert len(set(chosen)) > 1


def test_name_without_two_underscores_is_a_recording_of_its_own(tmp_path: Path) -> None:
    for name in ("bus/a.wav", "bus/b_1.flac", "park/c.wav", "park/d.wav"):
        clip(tmp_path / name)
    parts = load(tmp_path, test=0.5)
    assert {*parts.train.groups, *parts.test.groups} == {"a", "b_1", "c", "d"}


def test_same_stem_in_two_containers_is_one_recording(tmp_path: Path) -> None:
    for name in ("bus/a.wav", "bus/a.flac", "bus/b.wav", "park/c.wav", "park/d.wav"):
        clip(tmp_path / name)
    parts = load(tmp_path, test=0.5)
    assert set(parts.train.groups).isdisjoint(parts.test.groups)


def test_only_what_follows_the_first_two_underscores_is_dropped(tmp_path: Path) -> None:
    for name in ("bus/a__1__x.wav", "bus/a__2.wav", "bus/__odd.wav", "park/c.wav", "park/d.wav"):
        clip(tmp_path / name)
    parts = load(tmp_path, test=0.5)
    assert {*parts.train.groups, *parts.test.groups} == {"a", "__odd", "c", "d"}


def test_hidden_files_other_files_and_nested_folders_are_passed_over(root: Path) -> None:
    clip(root / ".git/x.wav")
    clip(root / "bus/.hidden__1.wav")
    clip(root / "bus/old/kept__1.wav")
    (root / "bus/notes.txt").write_text("no audio")
    (root / "bus/desktop.ini").write_text("no audio")
    (root / "loose.wav").write_bytes(b"")
    parts = load(root)
    assert parts.classes == ("bus", "park")
    assert len(parts.train) + len(parts.test) == 16


def test_ending_in_capitals_is_audio(root: Path) -> None:
    clip(root / "bus/fri__1.wav")
    (root / "bus/fri__1.wav").rename(root / "bus/fri__1.WAV")
    parts = load(root)
    assert len(parts.train) + len(parts.test) == 17


def test_all_problems_come_in_one_report(root: Path) -> None:
    clip(root / "tram/only__1.wav")
    clip(root / "tram/only__2.wav")
    (root / "metro").mkdir()
    (root / "metro/notes.txt").touch()
    message = refusal(root)
    assert "2 problems" in message
    assert "class with fewer than two recordings (1):\n     tram: 2 clips of 'only'" in message
    assert "class without clips (1):\n     metro: found .txt" in message
    assert ".flac" in message


def test_one_class_folder_is_no_data_set(tmp_path: Path) -> None:
    for name in ("bus/a.wav", "bus/b.wav"):
        clip(tmp_path / name)
    assert "fewer than two class folders" in refusal(tmp_path)
    assert "found bus" in refusal(tmp_path)


def test_recordings_that_hold_several_classes_go_whole_to_one_part(tmp_path: Path) -> None:
    for name in ("bus", "park"):
        for number in range(6):
            clip(tmp_path / name / f"{number}.wav")
    parts = load(tmp_path, test=0.3)
    assert set(parts.train.groups).isdisjoint(parts.test.groups)
    assert len(parts.test) == 4


def test_recordings_so_entangled_that_a_class_cannot_be_tested(tmp_path: Path) -> None:
    for name in ("bus/1.wav", "bus/2.wav", "park/2.wav", "park/3.wav", "tram/1.wav", "tram/3.wav"):
        clip(tmp_path / name)
    assert "class without a test clip (1):" in refusal(tmp_path, test=0.5)


def test_missing_root(tmp_path: Path) -> None:
    assert "data.root: no such folder" in refusal(tmp_path / "gone")


def test_clip_of_another_form_is_refused_on_reading(root: Path) -> None:
    parts = load(root, rate=16000)
    with pytest.raises(DataError, match=r"\.wav: sample rate 8000 Hz, expected 16000 Hz \(data\.resample=true"):
        parts.train[0, 0]
    assert load(root, rate=16000, resample=True).train[0, 0]["x"].shape == (1, 160)


# bad clips


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def test_skip_that_leaves_one_recording_of_a_class_is_an_error(root: Path) -> None:
    for recording in ("mon", "tue", "wed"):
        for take in (1, 2):
            spoil(root / f"bus/bus_{recording}__{take}.wav")
    assert len(load(root).train) == 12
    with pytest.warns(UserWarning, match="6 of 16 clips are bad"):
        message = refusal(root, bad="skip")
    assert "class with fewer than two recordings (1):\n     bus: 2 clips of 'bus_thu'" in message


def test_skip_that_leaves_no_clip_of_a_class_is_an_error(root: Path) -> None:
    for path in (root / "park").iterdir():
        spoil(path)
    with pytest.warns(UserWarning, match="8 of 16 clips are bad"):
        message = refusal(root, bad="skip")
    assert "class without a clip that can be read (1):\n     park in the folder: all 8 are bad, the first: " in message


@pytest.mark.parametrize(
    "make", [Path.mkdir, lambda path: path.symlink_to("gone.wav")], ids=["folder", "dangling_link"]
)
def test_what_has_the_name_of_a_clip_and_is_none_is_a_bad_clip(root: Path, make: Callable[[Path], object]) -> None:
    make(root / "bus/bus_fri__1.wav")
    with pytest.warns(UserWarning, match=r"1 of 17 clips are bad.*\n  bus/bus_fri__1\.wav: (not a file|a link that)"):
        parts = load(root, bad="skip")
    assert len(parts.train) + len(parts.test) == 16


def test_name_that_no_result_could_hold(root: Path) -> None:
    try:
        (root / "bus/bus_mon__1.wav").rename(root / "bus/caf\udce9__1.wav")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    assert r"file name that is not UTF-8 (1):" in refusal(root)
    assert r"caf\udce9__1.wav" in refusal(root)


def test_what_can_be_read_in_spite_of_the_problems_comes_with_the_error(root: Path) -> None:
    clip(root / "tram/only__1.wav")
    with pytest.raises(DataError) as caught:
        load(root)
    assert len(caught.value.parts.train) == 17
