"""The four published layouts of DCASE task 1, each as a small folder made here, with the traps that each can hold."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from kdlib import CLEAN, DataError
from kdlib_asc.datasets import SceneParts, dcase

HEADER = ("filename", "scene_label", "identifier", "source_label")
SCENES = ("airport", "metro_station")
TRAIN_PLACES = (("lyon", 1), ("milan", 2), ("prague", 3))
TEST_PLACES = (("lyon", 11), ("paris", 12))
SECONDS = 0.01
"""Of a clip that stands for one of 10 s, or of 1 s."""


@dataclass(frozen=True)
class Layout:
    """What is particular to one year's set."""

    folder: str
    ending: str
    header: bool
    rate: int
    subtype: str
    channels: int
    name: Callable[[str, str, int, int, str], str]
    train_devices: tuple[str, ...] = ("a",)
    test_devices: tuple[str, ...] = ("a",)
    unused_devices: tuple[str, ...] = ()
    """Devices whose clips at training places are in no part."""


def plain(scene: str, city: str, place: int, segment: int, device: str) -> str:
    return f"audio/{scene}-{city}-{place}-{segment}-{device}.wav"


def with_part(scene: str, city: str, place: int, segment: int, device: str) -> str:
    return f"audio/{scene}-{city}-{place}-{segment // 2}-{segment % 2}-{device}.wav"


MOBILE: dict[str, Any] = {
    "ending": "csv",
    "header": True,
    "rate": 44100,
    "subtype": "PCM_24",
    "channels": 1,
    "train_devices": ("a", "b", "c", "s1", "s2", "s3"),
    "test_devices": ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6"),
    "unused_devices": ("s4", "s5", "s6"),
}
LAYOUTS = {
    "2018": Layout("TUT-urban-acoustic-scenes-2018-development", "txt", False, 48000, "PCM_24", 2, plain),
    "2019": Layout(
        "TAU-urban-acoustic-scenes-2019-development", "csv", True, 48000, "PCM_24", 2, plain, unused_devices=("a",)
    ),
    "2020": Layout("TAU-urban-acoustic-scenes-2020-mobile-development", name=plain, **MOBILE),
    "2022": Layout("TAU-urban-acoustic-scenes-2022-mobile-development", name=with_part, **MOBILE),
}


def encoded(layout: Layout, seed: int) -> bytes:
    shape = (round(SECONDS * layout.rate), layout.channels)
    samples = np.random.default_rng(seed).integers(-(2**15), 2**15, shape, np.int16)
    file = BytesIO()
    soundfile.write(file, samples, layout.rate, subtype=layout.subtype, format="WAV")
    return file.getvalue()


class Made:
    """A data set of one layout on disk."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        self.root = folder / layout.folder
        segment = iter(range(10_000))

        def clips(places: tuple[tuple[str, int], ...], devices: tuple[str, ...], each: int = 2) -> list[str]:
            return [
                layout.name(scene, city, place, number, device)
                for scene in SCENES
                for city, place in places
                for number in [next(segment) for _ in range(each)]
                for device in devices  # they recorded the same moment
            ]

        self.train = clips(TRAIN_PLACES, layout.train_devices)
        self.test = clips(TEST_PLACES, layout.test_devices)
        self.unused = clips((("lyon", 21),), layout.unused_devices)
        (self.root / "audio").mkdir(parents=True)
        (self.root / "evaluation_setup").mkdir()
        noises = [encoded(layout, seed) for seed in range(5)]
        for number, name in enumerate(self.train + self.test + self.unused):
            (self.root / name).write_bytes(noises[number % 5])
        self.write("meta.csv", [self.row(name) for name in self.train + self.test + self.unused], header=HEADER)
        header = HEADER[:2] if layout.header else ()
        self.write(self.list("train"), [self.row(name)[:2] for name in self.train], header)
        self.write(self.list("evaluate"), [self.row(name)[:2] for name in self.test], header)
        self.write(self.list("test"), [[name] for name in self.test], header[:1])

    def list(self, part: str) -> str:
        return f"evaluation_setup/fold1_{part}.{self.layout.ending}"

    def row(self, name: str) -> list[str]:
        scene, city, place, *_, device = Path(name).stem.split("-")
        return [name, scene, f"{city}-{place}", device]

    def write(self, table: str, rows: list[list[str]], header: tuple[str, ...]) -> None:
        lines = ["\t".join(row) for row in [list(header), *rows] if row]
        (self.root / table).write_text("".join(f"{line}\n" for line in lines))

    def edit(self, table: str, change: Callable[[str], str]) -> None:
        path = self.root / table
        path.write_bytes(change(path.read_text()).encode())

    def tables(self) -> list[str]:
        return ["meta.csv", *(self.list(part) for part in ("train", "test", "evaluate"))]

    def open(self, root: Path | None = None, **settings: Any) -> SceneParts:
        form = {"rate": self.layout.rate, "channels": self.layout.channels, "seconds": SECONDS}
        return dcase(root=root or self.root, **{**form, **settings})[1]

    def refusal(self) -> str:
        with pytest.raises(DataError) as caught:
            self.open()
        return str(caught.value)


@pytest.fixture(params=LAYOUTS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    return Made(tmp_path, LAYOUTS[request.param])


def test_layout_as_published(made: Made) -> None:
    parts = made.open()
    assert parts.classes == SCENES
    assert list(parts.train.ids) == made.train
    assert list(parts.test.ids) == made.test
    assert not {*parts.train.ids, *parts.test.ids} & set(made.unused)
    assert [parts.classes[label] for label in parts.test.labels] == [made.row(name)[1] for name in made.test]
    assert list(parts.train.groups) == [made.row(name)[2] for name in made.train]
    for index in (0, len(parts.train) - 1):
        expected, _ = soundfile.read(made.root / made.train[index], dtype="float32", always_2d=True)
        np.testing.assert_array_equal(parts.train[CLEAN, index]["x"], expected.T)


def test_place_is_the_first_three_parts_of_the_name_where_no_identifier_is_given(made: Made) -> None:
    made.write("meta.csv", [made.row(name)[:2] for name in made.train + made.test], header=HEADER[:2])
    expected = {f"{scene}-{city}-{place}" for scene in SCENES for city, place in TRAIN_PLACES}
    assert set(made.open().train.groups) == expected


def test_devices_that_recorded_the_same_moment_stay_on_one_side_of_the_validation_split(made: Made) -> None:
    parts = made.open(validation=0.3)
    assert parts.valid is not None
    places = {made.row(name)[2] for name in parts.valid.ids}
    assert places.isdisjoint(made.row(name)[2] for name in parts.train.ids)
    assert len(parts.valid) % len(made.layout.train_devices) == 0


def test_test_list_without_classes_and_no_evaluate_list(made: Made) -> None:
    (made.root / made.list("evaluate")).unlink()
    parts = made.open()
    assert [parts.classes[label] for label in parts.test.labels] == [made.row(name)[1] for name in made.test]


def test_lists_with_the_header_that_this_year_does_not_have_or_without_the_one_it_has(made: Made) -> None:
    header = () if made.layout.header else HEADER[:2]
    made.write(made.list("train"), [made.row(name)[:2] for name in made.train], header)
    made.write(made.list("test"), [[name] for name in made.test], header[:1])
    (made.root / made.list("evaluate")).unlink()
    parts = made.open()
    assert list(parts.train.ids) == made.train
    assert list(parts.test.ids) == made.test


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("/", "\\"),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: "\ufeff" + text.replace("/", "\\").replace("\n", "\r\n\r\n"),
    ],
    ids=["crlf", "bom", "backslashes", "blank_lines", "all_of_them"],
)
def test_tables_that_went_through_another_system(made: Made, change: Callable[[str], str]) -> None:
    for table in made.tables():
        made.edit(table, change)
    parts = made.open()
    assert list(parts.train.ids) == made.train
    assert list(parts.test.ids) == made.test


def test_root_one_level_too_high_and_one_too_deep(made: Made) -> None:
    for root in (made.root.parent, made.root / "audio", made.root / "evaluation_setup"):
        assert list(made.open(root).train.ids) == made.train


def test_unpacked_twice_into_a_folder_of_the_same_name_is_found_one_level_down(made: Made) -> None:
    twice = made.root.parent / "outer" / made.root.name
    twice.parent.mkdir()
    made.root.rename(twice)
    assert list(made.open(twice.parent).train.ids) == made.train


def test_leak_between_train_and_evaluate(made: Made) -> None:
    made.edit(made.list("evaluate"), lambda text: text + f"{made.train[0]}\t{made.row(made.train[0])[1]}\n")
    assert f"clip in both train and evaluate (1):\n     {made.train[0]}: in fold 1" in made.refusal()


def test_missing_file(made: Made) -> None:
    (made.root / made.train[1]).unlink()
    assert (
        f"listed file that is missing (1):\n     {made.train[1]}: in {Path(made.list('train')).name}" in made.refusal()
    )


def test_file_in_no_part_may_be_missing(made: Made) -> None:
    for name in made.unused:
        (made.root / name).unlink()
    assert len(made.open().train) == len(made.train)


def test_duplicate_row(made: Made) -> None:
    made.edit(made.list("train"), lambda text: text + "\t".join(made.row(made.train[0])[:2]) + "\n")
    assert f"clip listed twice in one table (1):\n     {made.train[0]}" in made.refusal()


def test_row_in_no_meta(made: Made) -> None:
    made.edit("meta.csv", lambda text: "".join(line for line in text.splitlines(True) if made.test[0] not in line))
    assert f"clip in no row of meta.csv (1):\n     {made.test[0]}" in made.refusal()


def test_every_trap_at_once_is_one_whole_report(made: Made) -> None:
    train, test = made.train, made.test
    (made.root / train[1]).unlink()
    made.edit("meta.csv", lambda text: "".join(line for line in text.splitlines(True) if test[0] not in line))
    rows = f"{train[2]}\t{made.row(train[2])[1]}\n../{train[3]}\tairport\n{test[1]}\tpark\n"
    made.edit(made.list("train"), lambda text: ("\ufeff" + text + rows).replace("\n", "\r\n"))
    kinds = (
        "clip listed twice in one table (1)",
        "path that leaves the data set's folder (1)",
        "class that disagrees with meta.csv (1)",
        "listed file that is missing (1)",
        "clip in no row of meta.csv (1)",
        "clip in both train and evaluate (1)",
    )
    message = made.refusal()
    assert message.startswith(f"{made.root}: {len(kinds)} problems\n")
    for kind in kinds:
        assert kind in message


def test_what_can_be_read_in_spite_of_the_problems_comes_with_the_error(made: Made) -> None:
    (made.root / made.train[1]).unlink()
    with pytest.raises(DataError) as caught:
        made.open(validation=0.3)
    parts = caught.value.parts[1]
    assert list(parts.train.ids) == [made.train[0], *made.train[2:]]
    assert list(parts.test.ids) == made.test


def test_the_same_lists_as_the_organisers_own_reader(made: Made) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets = pytest.importorskip("dcase_util.datasets", reason="needs dcase_util, which kdlib does not depend on")
        *_, year = re.findall(r"20\d\d", made.layout.folder)
        prefix, mobile = ("TUT" if year == "2018" else "TAU"), ("_Mobile" if "mobile" in made.layout.folder else "")
        reader = getattr(datasets, f"{prefix}UrbanAcousticScenes_{year}{mobile}_DevelopmentSet")
        theirs = reader(data_path=str(made.root.parent), included_content_types=["meta"])
        theirs.load()
    ours = made.open()
    for part, rows in ((ours.train, theirs.train(fold=1)), (ours.test, theirs.eval(fold=1))):
        assert list(part.ids) == [str(Path(row.filename).relative_to(made.root)) for row in rows]
        assert [ours.classes[label] for label in part.labels] == [row.scene_label for row in rows]
    assert list(ours.test.ids) == [str(Path(row.filename).relative_to(made.root)) for row in theirs.test(fold=1)]
    places = {str(Path(row.filename).relative_to(made.root)): row.identifier for row in theirs.meta_container}
    assert list(ours.train.groups) == [places[name] for name in ours.train.ids]
