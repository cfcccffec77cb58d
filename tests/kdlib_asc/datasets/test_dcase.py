"""The DCASE layout: what is read, what is accepted, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdlib import DataError, Loader
from kdlib.interfaces import DataPart
from kdlib_asc.datasets import Clips, ClipStore, SceneParts, dcase, split_groups
from kdlib_asc.datasets.clips import Problems
from kdlib_asc.datasets.dcase import COLUMNS, find_layout, parse_table

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
FORM: dict[str, Any] = {"rate": 8000, "channels": 1, "seconds": 0.01}
HEADER = "filename\tscene_label\tidentifier\tsource_label\n"
TRAIN = [
    f"audio/{scene}-{city}-{n}-{n}{k}-a.wav"
    for scene in ("bus", "park")
    for city, n in (("rome", 1), ("oslo", 2), ("bonn", 3))
    for k in (0, 1)
]
TEST = [f"audio/{scene}-kiev-{n}-{n}0-a.wav" for scene in ("bus", "park") for n in (7, 8)]


def scene(name: str) -> str:
    return name.removeprefix("audio/").split("-")[0]


def place(name: str) -> str:
    return "-".join(name.removeprefix("audio/").split("-")[:3])


def labelled(names: list[str]) -> str:
    return "".join(f"{name}\t{scene(name)}\n" for name in names)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound data set with one fold, as DCASE 2018 lays it out."""
    root = tmp_path / "set"
    (root / "audio").mkdir(parents=True)
    (root / "evaluation_setup").mkdir()
    for number, name in enumerate(TRAIN + TEST):
        soundfile.write(root / name, np.full(80, number / 1000), 8000, subtype="FLOAT")
    (root / "meta.csv").write_text(HEADER + "".join(f"{n}\t{scene(n)}\t{place(n)}\ta\n" for n in TRAIN + TEST))
    (root / "evaluation_setup/fold1_train.txt").write_text(labelled(TRAIN))
    (root / "evaluation_setup/fold1_evaluate.txt").write_text(labelled(TEST))
    (root / "evaluation_setup/fold1_test.txt").write_text("".join(f"{name}\n" for name in TEST))
    return root


def load(root: Path, **settings: Any) -> SceneParts:
    return dcase(root=root, **{**FORM, **settings})[1]


def refusal(root: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(root, **settings)
    return str(caught.value)


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_bytes(change(path.read_text()).encode())


# what is read


def test_parts_labels_groups_and_ids(root: Path) -> None:
    parts = load(root)
    assert parts.classes == ("bus", "park")
    assert (parts.rate, parts.channels, parts.valid) == (8000, 1, None)
    assert list(parts.train.ids) == TRAIN
    assert list(parts.test.ids) == TEST
    assert parts.train.labels.dtype == np.int64
    assert parts.train.labels.tolist() == [0] * 6 + [1] * 6
    assert list(parts.test.groups) == [place(name) for name in TEST]
    assert isinstance(parts.train, DataPart)


def test_item_is_samples_class_index_and_the_epoch_passed_on(root: Path) -> None:
    item = load(root).train[4, 7]
    assert {key: item[key] for key in ("y", "index", "epoch")} == {"y": 1, "index": 7, "epoch": 4}
    torch.testing.assert_close(item["x"], torch.full((1, 80), 0.007))


@pytest.mark.parametrize("index", [-1, 12])
def test_index_out_of_range(root: Path, index: int) -> None:
    with pytest.raises(IndexError, match="part of 12 clips"):
        load(root).train[0, index]


def test_parts_are_frozen(root: Path) -> None:
    with pytest.raises(FrozenInstanceError):
        load(root).rate = 1  # type: ignore[misc]


def test_without_identifier_the_place_is_the_first_three_name_parts(root: Path) -> None:
    (root / "meta.csv").write_text("filename\tscene_label\n" + labelled(TRAIN + TEST))
    assert load(root).train.groups[0] == "bus-rome-1"


def test_name_with_a_part_more_as_in_2022(root: Path) -> None:
    old, new = "bus-rome-1-10-a", "bus-rome-1-10-3-s6"
    (root / f"audio/{old}.wav").rename(root / f"audio/{new}.wav")
    for path in ("meta.csv", "evaluation_setup/fold1_train.txt"):
        edit(root / path, lambda text: text.replace(old, new))
    (root / "meta.csv").write_text((root / "meta.csv").read_text().replace("\tbus-rome-1\t", "\t\t"))
    parts = load(root)
    assert parts.train.ids[0] == f"audio/{new}.wav"
    assert parts.train.groups[0] == parts.train.groups[1] == "bus-rome-1"


def test_csv_with_header_as_since_2019(root: Path) -> None:
    for kind, names in (("train", TRAIN), ("evaluate", TEST)):
        (root / f"evaluation_setup/fold1_{kind}.txt").unlink()
        (root / f"evaluation_setup/fold1_{kind}.csv").write_text("filename\tscene_label\n" + labelled(names))
    (root / "evaluation_setup/fold1_test.txt").unlink()
    assert list(load(root).train.ids) == TRAIN


def test_evaluate_is_preferred_to_test(root: Path) -> None:
    (root / "evaluation_setup/fold1_test.txt").write_text(f"{TEST[0]}\n")
    assert len(load(root).test) == 4


@pytest.mark.parametrize("header", ["", "filename\n"])
def test_test_list_alone_gets_its_classes_from_meta(root: Path, header: str) -> None:
    (root / "evaluation_setup/fold1_evaluate.txt").unlink()
    edit(root / "evaluation_setup/fold1_test.txt", lambda text: header + text)
    assert load(root).test.labels.tolist() == [0, 0, 1, 1]


def test_rows_of_meta_in_no_part_are_left_alone(root: Path) -> None:
    edit(root / "meta.csv", lambda text: text + "audio/tram-rome-9-9-a.wav\ttram\trome-9\ta\n")
    assert load(root).classes == ("bus", "park")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\n\n \t \n"),
        lambda text: text.replace("/", "\\"),
        lambda text: text.removesuffix("\n"),
        lambda text: text.replace("audio/", "./audio//"),
    ],
    ids=["crlf", "bom", "blank_lines", "backslashes", "no_last_newline", "dots_and_double_slashes"],
)
def test_tables_edited_on_another_system(root: Path, change: Callable[[str], str]) -> None:
    for path in (root / "meta.csv", *(root / "evaluation_setup").iterdir()):
        edit(path, change)
    assert list(load(root).train.ids) == TRAIN


@pytest.mark.parametrize("where", ["set", ".", "set/audio", "set/evaluation_setup"])
def test_root_one_level_too_high_or_too_low(root: Path, where: str) -> None:
    assert list(load(root.parent / where).train.ids) == TRAIN


def test_root_relative_to_the_working_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "audio")
    assert load(Path(".")).train[0, 0]["x"].shape == (1, 80)


def second_fold(root: Path) -> None:
    """Exchange the parts of fold 1."""
    setup = root / "evaluation_setup"
    (setup / "fold2_train.txt").write_text((setup / "fold1_evaluate.txt").read_text())
    (setup / "fold2_test.txt").write_text("".join(f"{name}\n" for name in TRAIN))


@pytest.mark.parametrize(("fold", "numbers"), [("all", [1, 2]), ([2, 1], [2, 1]), ([2, 2], [2]), (2, [2])])
def test_folds_by_number_list_and_all(root: Path, fold: Any, numbers: list[int]) -> None:
    second_fold(root)
    parts = dcase(root=root, fold=fold, **FORM)
    assert list(parts) == numbers
    assert list(parts[2].test.ids) == TRAIN


def test_a_clip_is_read_once_for_all_parts_and_folds(root: Path) -> None:
    second_fold(root)
    parts = dcase(root=root, fold="all", **FORM)
    first = parts[1].train[0, 0]["x"]
    (root / TRAIN[0]).unlink()
    assert torch.equal(parts[2].test[5, 0]["x"], first)


def test_without_keep_in_memory_a_clip_is_read_each_time(root: Path) -> None:
    parts = load(root, keep_in_memory=False)
    parts.train[0, 0]
    (root / TRAIN[0]).unlink()
    with pytest.raises(DataError, match="no such file"):
        parts.train[0, 0]


def test_changing_an_item_in_place_does_not_change_what_is_kept(root: Path) -> None:
    parts = load(root)
    for _ in range(3):
        x = parts.train[0, 5]["x"]
        torch.testing.assert_close(x, torch.full((1, 80), 0.005))
        x.zero_()


def test_store_keeps_no_more_than_its_limit() -> None:
    reads: list[str] = []

    def read(path: Path) -> torch.Tensor:
        reads.append(path.name)
        return torch.zeros(1, 10)

    store = ClipStore(Path(), read, limit=80)
    for name in "abcabc":
        store(name)
    assert reads == ["a", "b", "c", "c"]


def test_pickled_store_starts_empty_and_reads() -> None:
    store = ClipStore(Path(), zeros)
    store("a")
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert pickle.loads(sent)("a").shape == (1, 10000)


def zeros(path: Path) -> torch.Tensor:
    return torch.zeros(1, 10000)


def test_damaged_clip_in_a_loader_worker_stops_the_run_and_is_named(root: Path) -> None:
    damaged = root / TRAIN[3]
    damaged.write_bytes(damaged.read_bytes()[:-8])
    part: Any = load(root).train
    with pytest.raises(DataError, match=rf"^{damaged}: truncated"):
        list(Loader(part, batch=2, workers=1))


# bad clips


def spoil(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:-8])


def test_bad_clips_are_left_out_of_every_part_before_anything_is_drawn(root: Path) -> None:
    second_fold(root)
    spoil(root, TRAIN[3], TEST[0])
    with pytest.warns(UserWarning, match=rf"2 of 16 clips are bad and left out.*\n  {TRAIN[3]}: truncated"):
        folds = dcase(root=root, fold="all", bad="skip", validation=0.3, **FORM)
    for parts in folds.values():
        assert {name for name, _ in parts.skipped} == {TRAIN[3], TEST[0]}
        assert all(reason.startswith("truncated: ") for _, reason in parts.skipped)
    parts = folds[1]
    assert parts.valid is not None
    assert sorted([*parts.train.ids, *parts.valid.ids]) == sorted(set(TRAIN) - {TRAIN[3]})
    assert list(parts.test.ids) == TEST[1:]
    for part in (parts.train, parts.valid, parts.test):
        for index in range(len(part)):
            assert part[0, index]["x"].shape == (1, 80)


def test_skip_with_nothing_bad_is_silent_and_changes_nothing(root: Path) -> None:
    parts = load(root, bad="skip")
    assert (list(parts.train.ids), list(parts.test.ids), parts.skipped) == (TRAIN, TEST, ())


def test_class_of_which_only_bad_clips_are_there_is_an_error(root: Path) -> None:
    spoil(root, *[name for name in TEST if scene(name) == "park"])
    with pytest.warns(UserWarning, match="2 of 16"):
        message = refusal(root, bad="skip")
    assert "class without a clip that can be read (1):\n     park in the test part of fold 1: all 2 are bad" in message
    assert "truncated" in message


def test_every_clip_of_another_form_is_an_error_that_says_which(root: Path) -> None:
    with pytest.warns(UserWarning, match="and 11 more"):
        message = refusal(root, bad="skip", rate=16000)
    assert "class without a clip that can be read (4):" in message
    assert "data.resample=true" in message


def test_settings_that_would_read_the_clips(root: Path) -> None:
    parts = load(root, rate=48000, channels=2, seconds=10.0)
    errors = []
    for index in range(12):
        with pytest.raises(DataError) as caught:
            parts.train[0, index]
        errors.append(caught.value)
    assert parts.advice(errors, 0) == {"rate": 8000, "channels": 1, "seconds": 0.01}
    assert parts.advice(errors[:2], 10) == {
        "rate": 48000, "channels": 1, "seconds": 10.0, "resample": True, "down_mix": True, "pad": True
    }  # fmt: skip
    assert parts.advice([DataError("truncated")], 3) == {}


# validation


def test_validation_takes_whole_places_of_each_class_off_the_training_part(root: Path) -> None:
    parts = load(root, validation=0.3)
    assert parts.valid is not None
    assert set(parts.valid.groups).isdisjoint(parts.train.groups)
    assert sorted([*parts.valid.ids, *parts.train.ids]) == sorted(TRAIN)
    assert parts.valid.labels.tolist() == [0, 0, 1, 1]
    assert list(parts.test.ids) == TEST


def test_validation_depends_on_the_seed_alone(root: Path) -> None:
    chosen = [tuple(load(root, validation=0.3, seed=seed).valid.ids) for seed in (*range(8), *range(8))]  # type: ignore[union-attr]
    assert chosen[:8] == chosen[8:]
    assert len(set(chosen)) > 1


def test_validation_without_a_place_to_spare(root: Path) -> None:
    edit(
        root / "meta.csv", lambda text: text.replace("rome-1", "x-1").replace("oslo-2", "x-1").replace("bonn-3", "x-1")
    )
    (root / "meta.csv").write_text(
        HEADER + "".join(f"{n}\t{scene(n)}\t{scene(n)}{n in TEST}\ta\n" for n in TRAIN + TEST)
    )
    assert load(root).valid is None
    assert "data.validation=0.3, but no class has two recordings" in refusal(root, validation=0.3)


groups_of = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=40)


@given(items=groups_of, share=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_split_keeps_and_takes_a_group_of_each_class_that_has_two(
    items: list[tuple[int, int]], share: float, seed: int
) -> None:
    labels = [label for label, _ in items]
    groups = [f"{label}.{group}" for label, group in items]
    out = split_groups(labels, groups, share, seed)
    went = {group for group, goes in zip(groups, out, strict=True) if goes}
    stayed = {group for group, goes in zip(groups, out, strict=True) if not goes}
    assert went.isdisjoint(stayed)
    for label in set(labels):
        mine = {group for group in groups if group.startswith(f"{label}.")}
        assert mine & stayed
        expected = 0 if share == 0 else min(max(int(share * len(mine) + 0.5), 1), len(mine) - 1)
        assert len(mine & went) == expected


@given(items=groups_of, share=st.floats(0.01, 0.99))
def test_split_of_groups_with_several_classes_never_empties_a_class(items: list[tuple[int, int]], share: float) -> None:
    labels, groups = [label for label, _ in items], [str(group) for _, group in items]
    out = split_groups(labels, groups, share, 0)
    for group in set(groups):
        assert len({bool(goes) for goes, name in zip(out, groups, strict=True) if name == group}) == 1
    assert {label for label, goes in zip(labels, out, strict=True) if not goes} == set(labels)


@given(items=groups_of, seed=st.integers(0, 3), data=st.data())
def test_split_does_not_depend_on_the_order_of_the_items(
    items: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    def chosen(rows: list[tuple[int, int]]) -> set[int]:
        out = split_groups([label for label, _ in rows], [str(group) for _, group in rows], 0.4, seed)
        return {group for (_, group), goes in zip(rows, out, strict=True) if goes}

    assert chosen(items) == chosen(data.draw(st.permutations(items)))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_split_by_a_share_out_of_bounds(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        split_groups([0, 0], ["a", "b"], share, 0)


def test_split_with_other_numbers_of_labels_and_groups() -> None:
    with pytest.raises(ValueError, match="2 labels and 1 groups"):
        split_groups([0, 0], ["a"], 0.5, 0)


def test_split_counts_a_group_once_that_went_out_for_another_class() -> None:
    labels = [0] * 4 + [1] * 6
    groups = [*"abcd", *"abcdef"]
    for seed in range(10):
        out = split_groups(labels, groups, 0.5, seed)
        assert out[4:].sum() == 3
        assert out[:4].sum() in (2, 3)


def test_split_draws_each_class_on_its_own() -> None:
    labels, groups = [0] * 4 + [1] * 4, [f"{label}.{n}" for label in (0, 1) for n in range(4)]
    chosen = [split_groups(labels, groups, 0.25, seed) for seed in range(10)]
    assert any((out[:4] != out[4:]).any() for out in chosen)


def test_split_is_drawn_anew_for_another_purpose() -> None:
    labels, groups = [0] * 40, [str(i) for i in range(40)]
    assert (split_groups(labels, groups, 0.5, 0) != split_groups(labels, groups, 0.5, 0, purpose="test")).any()


# what is refused


def test_listed_file_that_is_missing(root: Path) -> None:
    (root / TRAIN[2]).unlink()
    (root / TEST[0]).unlink()
    message = refusal(root)
    assert "2 problems\n1. listed file that is missing (2):" in message
    assert f"{TRAIN[2]}: in fold1_train.txt" in message
    assert f"{TEST[0]}: in fold1_evaluate.txt" in message


def test_the_same_problem_in_several_folds_is_one(root: Path) -> None:
    second_fold(root)
    (root / TRAIN[2]).unlink()
    with pytest.raises(DataError, match=rf"1 problem\n.*\n     {TRAIN[2]}: in fold1_train\.txt$"):
        dcase(root=root, fold="all", **FORM)


def test_more_than_twenty_of_a_kind_are_counted(root: Path) -> None:
    names = [f"audio/bus-rome-1-{k}-a.wav" for k in range(100, 125)]
    edit(root / "meta.csv", lambda text: text + "".join(f"{n}\tbus\tbus-rome-1\ta\n" for n in names))
    edit(root / "evaluation_setup/fold1_train.txt", lambda text: text + labelled(names))
    message = refusal(root)
    assert "listed file that is missing (25):" in message
    assert "and 5 more" in message
    assert names[19] in message
    assert names[20] not in message


def test_row_in_no_meta(root: Path) -> None:
    edit(root / "meta.csv", lambda text: "".join(line for line in text.splitlines(True) if TRAIN[0] not in line))
    assert f"clip in no row of meta.csv (1):\n     {TRAIN[0]}: in fold1_train.txt" in refusal(root)


@pytest.mark.parametrize("table", ["meta.csv", "evaluation_setup/fold1_train.txt"])
def test_clip_listed_twice_in_one_table_also_with_another_slash(root: Path, table: str) -> None:
    edit(root / table, lambda text: text + f"audio\\{TRAIN[1].removeprefix('audio/')}\tbus\n")
    assert f"clip listed twice in one table (1):\n     {TRAIN[1]}: in {Path(table).name}" in refusal(root)


@pytest.mark.parametrize("evaluate", [True, False])
def test_clip_in_both_parts(root: Path, evaluate: bool) -> None:
    kind = "evaluate" if evaluate else "test"
    (root / "evaluation_setup/fold1_evaluate.txt").unlink()
    (root / "evaluation_setup/fold1_test.txt").unlink()
    (root / f"evaluation_setup/fold1_{kind}.txt").write_text(labelled([*TEST, *TRAIN[:2]]))
    message = refusal(root)
    assert f"clip in both train and {kind} (2)" in message
    assert "recording place" not in message


def test_recording_place_in_both_parts_is_a_warning_for_it_may_be_meant(root: Path) -> None:
    edit(root / "meta.csv", lambda text: text.replace("\tbus-kiev-7\t", "\tbus-rome-1\t"))
    with pytest.warns(UserWarning, match=r"places in both .*: 1\n  bus-rome-1: 2 clips in train, 1 in test, fold 1$"):
        assert len(load(root).test) == 4


def test_class_that_disagrees_with_meta(root: Path) -> None:
    edit(root / "evaluation_setup/fold1_train.txt", lambda text: text.replace(f"{TRAIN[0]}\tbus", f"{TRAIN[0]}\ttram"))
    assert f"{TRAIN[0]}: 'bus' there, 'tram' in fold1_train.txt" in refusal(root)


def test_clip_without_a_class_anywhere(root: Path) -> None:
    edit(root / "meta.csv", lambda text: text.replace(f"{TEST[0]}\tbus", f"{TEST[0]}\t"))
    assert len(load(root).test) == 4  # the evaluate list has it
    (root / "evaluation_setup/fold1_evaluate.txt").unlink()
    assert f"clip without a class (1):\n     {TEST[0]}: in fold1_test.txt" in refusal(root)


def test_class_without_a_training_clip(root: Path) -> None:
    (root / "evaluation_setup/fold1_train.txt").write_text(labelled([n for n in TRAIN if scene(n) == "bus"]))
    assert "class without a training clip (1):\n     park in fold 1" in refusal(root)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_part_without_clips(root: Path, kind: str) -> None:
    (root / f"evaluation_setup/fold1_{kind}.txt").write_text("\n\n")
    assert f"part without clips (1):\n     fold1_{kind}.txt" in refusal(root)


@pytest.mark.parametrize(
    "name",
    ["/etc/a.wav", "../set/audio/a.wav", "audio/../../a.wav", "C:\\audio\\a.wav", "\\\\host\\a.wav", "..\\a.wav"],
)
def test_path_that_leaves_the_folder(root: Path, name: str) -> None:
    edit(root / "evaluation_setup/fold1_train.txt", lambda text: f"{name}\tbus\n" + text)
    assert "path that leaves the data set's folder (1):" in refusal(root)


def test_row_without_a_file_name(root: Path) -> None:
    edit(root / "evaluation_setup/fold1_train.txt", lambda text: text + "\tbus\n")
    assert "row without a file name (1):" in refusal(root)


def test_same_list_as_txt_and_csv(root: Path) -> None:
    (root / "evaluation_setup/fold1_train.csv").write_text(labelled(TRAIN[:1]))
    assert "list that is there twice (1):\n     fold1_train.txt: fold1_train.csv says" in refusal(root)


def test_problems_of_several_kinds_come_in_one_report(root: Path) -> None:
    (root / TRAIN[2]).unlink()
    edit(root / "evaluation_setup/fold1_train.txt", lambda text: text + f"{TRAIN[1]}\tbus\n/a.wav\tbus\n")
    message = refusal(root)
    assert "3 problems" in message
    assert all(f"\n{number}. " in message for number in (1, 2, 3))


def test_unknown_fold_lists_the_folds_found(root: Path) -> None:
    second_fold(root)
    (root / "evaluation_setup/fold3_train.txt").write_text(labelled(TRAIN))  # half a fold is none
    with pytest.raises(DataError, match=r"data\.fold=3: no such fold: \[3\].*: 1, 2$"):
        dcase(root=root, fold=3, **FORM)
    with pytest.raises(DataError, match=r"no such fold: \[9\]"):
        dcase(root=root, fold=[1, 9], **FORM)


def test_setup_without_folds(root: Path) -> None:
    for path in (root / "evaluation_setup").iterdir():
        path.rename(path.with_name(f"._{path.name}"))
    with pytest.raises(DataError, match=r"data\.fold=all: no such fold\. .*: none$"):
        dcase(root=root, fold="all", **FORM)


def test_missing_root(root: Path) -> None:
    assert f"data.root: no such folder: {root / 'gone'}" in refusal(root / "gone")
    assert "data.root: not a folder" in refusal(root / "meta.csv")


def test_folder_of_another_layout_says_what_was_looked_for_and_where(root: Path) -> None:
    (root / "meta.csv").rename(root / "labels.csv")
    message = refusal(root)
    for word in ("meta.csv", "evaluation_setup", str(root), str(root.parent), "labels.csv"):
        assert word in message


def test_folder_of_class_folders_is_told_to_be_of_the_other_kind(tmp_path: Path) -> None:
    for scene in ("bus", "park"):
        (tmp_path / scene).mkdir()
        assert "kind 'folder'" not in refusal(tmp_path)
        soundfile.write(tmp_path / scene / "a.flac", np.zeros(80), 8000)
    assert "If these folders are classes, it is a data set of kind 'folder'." in refusal(tmp_path)


def test_several_data_sets_in_root(root: Path) -> None:
    for name in ("a", "b"):
        (root.parent / "sets" / name / "evaluation_setup").mkdir(parents=True)
        (root.parent / "sets" / name / "meta.csv").touch()
    with pytest.raises(DataError, match=r"several data sets lie in .*: a, b"):
        find_layout(root.parent / "sets")


def test_table_with_commas(root: Path) -> None:
    edit(root / "meta.csv", lambda text: text.replace("\t", ","))
    assert "expected TAB" in refusal(root)


def test_table_in_another_encoding(root: Path) -> None:
    (root / "meta.csv").write_bytes(HEADER.encode("utf-16"))
    assert "UTF-8" in refusal(root)


def test_report_of_nothing_raises_nothing() -> None:
    Problems().check("x")


# the table parser

cell = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Z")), min_size=1, max_size=8)
safe = cell.filter(
    lambda text: text.strip() == text and "\\" not in text and "\ufeff" not in text and text != "filename"
)
name = st.lists(safe.filter(lambda text: "/" not in text and text != "."), min_size=1, max_size=3).map("/".join)
blank = st.sampled_from(["", " ", "\t", " \t "])


@given(
    rows=st.lists(st.tuples(name, safe, safe), max_size=6),
    blanks=st.lists(blank, min_size=7, max_size=7),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    bom=st.booleans(),
    header=st.booleans(),
    backslash=st.booleans(),
    last=st.booleans(),
)
def test_table_comes_back_from_any_line_end_mark_blank_line_and_slash(
    rows: list[tuple[str, str, str]],
    blanks: list[str],
    end: str,
    bom: bool,
    header: bool,
    backslash: bool,
    last: bool,
) -> None:
    written = [(first.replace("/", "\\") if backslash else first, *others) for first, *others in rows]
    lines = ["\t".join(COLUMNS[:3])] if header else []
    for row, gap in zip(written, blanks, strict=False):
        lines += [gap, "\t".join(row)]
    text = ("\ufeff" if bom else "") + end.join(lines) + (end if last else "")
    assert parse_table(text) == [dict(zip(COLUMNS, row, strict=False)) for row in rows]


@given(st.text())
def test_any_text_is_a_table_or_none_but_never_a_fault(text: str) -> None:
    for row in parse_table(text):
        assert "filename" in row
        assert "\\" not in row["filename"]


def test_header_may_order_its_further_columns_otherwise() -> None:
    assert parse_table("filename\tidentifier\tscene_label\na.wav\trome-1\tbus\n") == [
        {"filename": "a.wav", "identifier": "rome-1", "scene_label": "bus"}
    ]


# real recordings


def real(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the recordings in {SHARED / name}, which are not part of this repository")
    return SHARED / name


def test_esc10_has_five_folds_of_whole_recordings_that_cover_each_clip_once() -> None:
    folds = dcase(
        root=real("esc10"), fold="all", rate=44100, channels=1, seconds=5.0, pad=True, crop=True, validation=0.1
    )
    assert list(folds) == [1, 2, 3, 4, 5]
    tested = [name for parts in folds.values() for name in parts.test.ids]
    assert len(tested) == len(set(tested)) == 398
    assert len({group for parts in folds.values() for group in parts.test.groups}) == 302
    for parts in folds.values():
        assert parts.valid is not None
        assert len(parts.classes) == len(set(parts.train.labels)) == len(set(parts.valid.labels)) == 10
        assert len(parts.train) + len(parts.valid) + len(parts.test) == 398
    part: Clips = folds[1].test
    for index in range(0, len(part), 8):
        item = part[0, index]
        assert item["x"].shape == (1, 220500)
        assert item["y"] == folds[1].classes.index(part.ids[index].removeprefix("audio/").split("-")[0])


def test_esc10_clips_shorter_than_five_seconds_are_refused_without_pad() -> None:
    parts = dcase(root=real("esc10"), fold=1, rate=44100, channels=1, seconds=5.0, crop=True)[1]
    both = [(part, index) for part in (parts.train, parts.test) for index in range(len(part))]
    short = [key for key in both if soundfile.info(SHARED / "esc10" / key[0].ids[key[1]]).frames < 220500]
    assert len(short) == 10
    for part, index in short:
        with pytest.raises(DataError, match=r"\.ogg: too short.*data\.pad=true"):
            part[0, index]


def test_tiny_flac_set_from_a_root_one_level_too_low() -> None:
    parts = dcase(root=real("tiny_cc0") / "audio", rate=16000, channels=1, seconds=2.0)[1]
    assert parts.train[0, 0]["x"].shape == (1, 32000)
    assert len(parts.classes) == 4


# fingerprints


def test_a_fingerprint_is_of_the_bytes_and_of_how_they_are_read(root: Path) -> None:
    first = [load(root).train.fingerprint(index) for index in range(12)]
    assert len(set(first)) == 12
    assert [load(root, keep_in_memory=False, validation=0).train.fingerprint(index) for index in range(12)] == first
    assert load(root, crop=True).train.fingerprint(0) not in first
    path = root / TRAIN[3]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [index for index in range(12) if load(root).train.fingerprint(index) != first[index]] == [3]
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(DataError, match=path.name):
        load(root).train.fingerprint(3)


def test_a_file_is_hashed_once_in_a_process(root: Path) -> None:
    train = load(root).train
    first = train.fingerprint(0)
    (root / TRAIN[0]).unlink()
    assert train.fingerprint(0) == first
    assert pickle.loads(pickle.dumps(train)).fingerprint(0) == first


def test_a_clip_that_is_made_and_not_read_has_the_fingerprint_of_its_name_and_its_settings() -> None:
    def stores(**settings: int) -> ClipStore:
        return ClipStore(Path(), partial(made, **settings), made=True)

    names = {stores(seed=seed).fingerprint(name) for seed in (0, 1) for name in ("a", "b")}
    assert len(names) == 4
    assert stores(seed=0).fingerprint("a") in names


def made(path: Path, *, seed: int) -> torch.Tensor:
    return torch.full((1, 4), seed)
