"""The layout of the DCASE task 1 data sets: ``audio/``, ``meta.csv`` and ``evaluation_setup/fold<k>_*``."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from kdlib import DataError
from kdlib_asc.audio import audio_extensions, read_audio
from kdlib_asc.datasets.clips import (
    SHOWN,
    Bad,
    Channels,
    Clip,
    ClipStore,
    Problems,
    Rate,
    SceneParts,
    Seconds,
    Share,
    add_emptied,
    add_links_out,
    bad_clips,
    listed,
    of_clips,
    scene_parts,
    without,
)

COLUMNS = ("filename", "scene_label", "identifier", "source_label")
"""The columns of a table without a header."""
TABLE = 1 << 28
"""Bytes of a table; that of the largest set has 20 million."""

_FOLD_FILE = re.compile(r"fold(\d+)_(train|test|evaluate)\.(txt|csv)")

FoldFiles = dict[int, dict[str, Path]]


@of_clips()
def dcase(
    *,
    root: Path,
    fold: Annotated[int, Field(ge=0)] | list[int] | Literal["all"] = 1,
    rate: Rate = 48000,
    channels: Channels = 2,
    seconds: Seconds = 10.0,
    resample: bool = False,
    down_mix: bool = False,
    pad: bool = False,
    crop: bool = False,
    validation: Share = 0.0,
    seed: int = 0,
    bad: Bad = "error",
    links: bool = False,
    keep_in_memory: bool = True,
) -> dict[int, SceneParts]:
    """Open a data set in the DCASE task 1 layout of 2018 to 2022: any folds, rate, channel count and container.

    ``meta.csv`` (TAB, header) gives each clip its class and, in its ``identifier`` column, its recording place; where
    that is empty the place is the first three dash-separated parts of the file name. ``fold<k>_train`` and
    ``fold<k>_evaluate`` (else ``fold<k>_test``, joined with the classes of ``meta.csv``) list the parts, as ``.txt`` or
    ``.csv``, with or without a header. Windows line ends and slashes, byte-order marks, blank lines, and a root one
    folder too high or too low are accepted. Rows of ``meta.csv`` in no part are left alone. Clips are read when they
    are asked for, not here, except with ``bad="skip"``.

    Args:
        root: the folder that holds ``meta.csv`` and ``evaluation_setup``.
        fold: a fold's number, several, or ``"all"``.
        rate: sample rate in Hz, at least 1.
        channels: channels of a clip, at least 1.
        seconds: length of a clip, above 0.
        resample: convert other sample rates.
        down_mix: average several channels into one, where ``channels`` is 1.
        pad: fill short clips with zeros at their end.
        crop: cut long clips at their end.
        validation: share of each class's recording places in the training part to split off, 0 <= share < 1.
        seed: the key of that split.
        bad: what to do with a clip that cannot be read as the settings say. ``"error"`` names it when it is read;
            ``"skip"`` reads every clip here, and leaves the bad ones out of all parts with a warning.
        links: follow links that lead out of the data set's folder; else they are refused, for they may show what its
            maker cannot see.
        keep_in_memory: keep decoded clips, up to 2 GiB in each process.

    Returns:
        The parts of each fold asked for, by its number.

    Raises:
        DataError: there is no such layout or fold; or, all in one report: a listed file that is missing, a clip in no
            row of ``meta.csv``, listed twice, in both parts or without a class, a class that disagrees with
            ``meta.csv`` or has no training clip, a path or a link that leaves the folder, a part of a class without a
            clip that is not bad.

    Warns:
        UserWarning: a recording place in both parts, or bad clips that are left out. The published lists keep places
            apart; in one's own lists it says that the test is easier than one at new places.

    Source:
        The paper's section 4.1 for the defaults (10 s, 48 kHz, stereo, fold 1). The checks and the validation split
        are ours.

    Example::

        parts = dcase(root=Path("TUT-urban-acoustic-scenes-2018-development"), validation=0.1)[1]
        samples = parts.train[0, 0]["x"]  # (2, 480000)
    """
    base = find_layout(root)
    problems = Problems()
    files = _fold_files(base, problems)
    numbers = _chosen(base, fold, files)
    meta = _read_meta(base, problems)
    chosen = {number: _read_fold(base, number, files[number], meta, problems) for number in numbers}
    classes = tuple(sorted({clip.label for parts in chosen.values() for part in parts for clip in part}))
    for number, (train, _) in chosen.items():
        for label in sorted(set(classes) - {clip.label for clip in train}):
            problems.add("class without a training clip", f"{label} in fold {number}", "it is in another part")
    read = partial(
        read_audio,
        rate=rate,
        channels=channels,
        seconds=seconds,
        resample=resample,
        down_mix=down_mix,
        pad=pad,
        crop=crop,
    )
    store = ClipStore(base, read, keep=keep_in_memory)
    parts = partial(scene_parts, classes=classes, store=store, seed=seed, rate=rate, channels=channels)

    def in_spite_of_the_problems() -> dict[int, SceneParts]:
        there = {number: [_there(base, part) for part in both] for number, both in chosen.items()}
        return {number: parts(train, test, validation=0) for number, (train, test) in there.items()}

    if not links:
        tables = [base / "meta.csv", *(path for kinds in files.values() for path in kinds.values())]
        listed_clips = (base / clip.id for parts in chosen.values() for part in parts for clip in part)
        add_links_out(problems, base, [*tables, *dict.fromkeys(listed_clips)])
    _warn_of_shared_places(base, chosen)
    problems.check(base, in_spite_of_the_problems)
    clips = {clip.id: clip for both in chosen.values() for part in both for clip in part}
    reasons = bad_clips(list(clips.values()), store) if bad == "skip" else {}
    for number, (train, test) in chosen.items():
        add_emptied(problems, train, reasons, f"the training part of fold {number}")
        add_emptied(problems, test, reasons, f"the test part of fold {number}")
    problems.check(base)

    def of_good_clips(train: list[Clip], test: list[Clip]) -> SceneParts:
        skipped = {clip.id: reasons[clip.id] for clip in (*train, *test) if clip.id in reasons}
        return parts(without(train, reasons), without(test, reasons), validation=validation, skipped=skipped)

    return {number: of_good_clips(train, test) for number, (train, test) in chosen.items()}


def parse_table(text: str) -> list[dict[str, str]]:
    r"""Return the rows of a TAB-separated table, blank lines dropped, each cell stripped, file names with "/".

    A first row whose first cell is ``filename`` is the header; without one the columns are ``COLUMNS``.

    Example:
        >>> parse_table("\ufeffaudio\\a.wav\tbus\r\n\r\n")
        [{'filename': 'audio/a.wav', 'scene_label': 'bus'}]
    """
    lines = re.split(r"\r\n|\n|\r", text.lstrip("\ufeff"))
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines if line.strip()]
    columns: tuple[str, ...] = COLUMNS
    if rows and rows[0][0] == "filename":
        columns, rows = tuple(rows[0]), rows[1:]
    tables = [dict(zip(columns, row, strict=False)) for row in rows]
    return [{**row, "filename": _clip_name(row["filename"])} for row in tables]


def find_layout(root: Path) -> Path:
    """Return the folder with ``meta.csv`` and ``evaluation_setup``: root, else one folder in it, else the one above.

    Raises:
        DataError: there is none, or several lie in root.
    """
    root = root.absolute()
    if not os.path.isdir(root):
        raise DataError(f"data.root: {'not a folder' if os.path.exists(root) else 'no such folder'}: {root}")
    if _is_layout(root):
        return root
    below = sorted(path for path in root.iterdir() if path.is_dir() and _is_layout(path))
    if len(below) > 1:
        names = ", ".join(path.name for path in below)
        raise DataError(f"data.root: several data sets lie in {root}: {names}. Name one of them.")
    if below or _is_layout(root.parent):
        return below[0] if below else root.parent
    inside = sorted(root.iterdir())
    there = ", ".join(path.name for path in inside[:SHOWN]) or "nothing"
    of_clips = [path for path in inside if path.is_dir() and _holds_clips(path)]
    other = " If these folders are classes, it is a data set of kind 'folder'." if len(of_clips) > 1 else ""
    raise DataError(
        f"data.root: no data set in the DCASE layout: looked for a file meta.csv beside a folder evaluation_setup "
        f"in {root}, in the folders in it, and in {root.parent}. {root} holds: {there}.{other}"
    )


def _is_layout(folder: Path) -> bool:
    return (folder / "meta.csv").is_file() and (folder / "evaluation_setup").is_dir()


def _holds_clips(folder: Path) -> bool:
    endings = audio_extensions()
    try:
        return any(file.suffix.lower() in endings for file in folder.iterdir())
    except OSError:  # not ours to look into
        return False


def _clip_name(cell: str) -> str:
    return str(PurePosixPath(cell.replace("\\", "/"))) if cell else ""


def _refused(name: str) -> str | None:
    if not name:
        return "row without a file name"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        return "path that leaves the data set's folder"
    if "\0" in name:
        return "name that no file can have"
    return None


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        if not path.is_file():
            raise DataError(f"{path}: not a file")  # a pipe would be waited for
        if path.stat().st_size > TABLE:
            raise DataError(f"{path}: a table has at most {TABLE:,} bytes")
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as a table in UTF-8: {error}") from error
    if re.match(r"\ufeff?filename\s*[,;]", text):
        raise DataError(f"{path}: columns are separated by commas or semicolons, expected TAB")
    return parse_table(text)


def _fold_files(base: Path, problems: Problems) -> FoldFiles:
    files: FoldFiles = {}
    for path in sorted((base / "evaluation_setup").iterdir()):
        if match := _FOLD_FILE.fullmatch(path.name):
            kinds = files.setdefault(int(match[1]), {})
            first = kinds.setdefault(match[2], path)
            if first != path:
                problems.add("list that is there twice", path.name, f"{first.name} says what is in the same part")
    return files


def _chosen(base: Path, fold: int | list[int] | Literal["all"], files: FoldFiles) -> list[int]:
    complete = [number for number, kinds in sorted(files.items()) if "train" in kinds and len(kinds) > 1]
    asked = complete if fold == "all" else fold if isinstance(fold, list) else [fold]
    unknown = [number for number in asked if number not in complete]
    if unknown or not asked:
        raise DataError(
            f"{base}: data.fold={fold}: no such fold{f': {unknown}' if unknown else ''}. Folds found (a list "
            f"fold<k>_train and fold<k>_evaluate or fold<k>_test, .txt or .csv, in evaluation_setup): "
            f"{', '.join(map(str, complete)) or 'none'}"
        )
    return asked


def _read_meta(base: Path, problems: Problems) -> dict[str, Clip]:
    meta: dict[str, Clip] = {}
    for row in _read_table(base / "meta.csv"):
        name = row["filename"]
        if kind := _refused(name):
            problems.add(kind, repr(name), "in meta.csv")
        elif name in meta:
            problems.add("clip listed twice in one table", name, "in meta.csv")
        else:
            place = row.get("identifier") or "-".join(PurePosixPath(name).stem.split("-")[:3])
            meta[name] = Clip(name, row.get("scene_label", ""), place)
    return meta


def _read_fold(
    base: Path, number: int, files: dict[str, Path], meta: dict[str, Clip], problems: Problems
) -> tuple[list[Clip], list[Clip]]:
    other = "evaluate" if "evaluate" in files else "test"
    train = _read_part(base, files["train"], meta, problems)
    test = _read_part(base, files[other], meta, problems)
    for name in sorted(train.keys() & test.keys()):
        problems.add(f"clip in both train and {other}", name, f"in fold {number}")
    return list(train.values()), list(test.values())


def _warn_of_shared_places(base: Path, chosen: Mapping[int, tuple[list[Clip], list[Clip]]]) -> None:
    """Warn of recording places on both sides: sound from a place that was trained on is easier to tell."""
    shared = []
    for number, parts in chosen.items():
        refused = set(parts[0]) & set(parts[1])  # a clip in both parts, which says the same of its place
        train, test = (Counter(clip.group for clip in part if clip not in refused) for part in parts)
        places = sorted(train.keys() & test.keys())
        shared += [f"{place}: {train[place]} clips in train, {test[place]} in test, fold {number}" for place in places]
    if shared:
        warnings.warn(f"{base}: recording places in both train and test: {len(shared)}{listed(shared)}", stacklevel=3)


def _there(base: Path, clips: list[Clip]) -> list[Clip]:
    return [clip for clip in clips if os.path.isfile(base / clip.id)]


def _read_part(base: Path, path: Path, meta: dict[str, Clip], problems: Problems) -> dict[str, Clip]:
    clips: dict[str, Clip] = {}
    where = f"in {path.name}"
    for row in _read_table(path):
        name, label = row["filename"], row.get("scene_label", "")
        if kind := _refused(name):
            problems.add(kind, repr(name), where)
            continue
        if name in clips:
            problems.add("clip listed twice in one table", name, where)
            continue
        known = meta.get(name)
        clip = clips[name] = Clip(name, (known.label if known else "") or label, known.group if known else name)
        if known is None:
            problems.add("clip in no row of meta.csv", name, where)
        elif not clip.label:
            problems.add("clip without a class", name, where)
        elif label and label != clip.label:
            problems.add("class that disagrees with meta.csv", name, f"{clip.label!r} there, {label!r} {where}")
        if not os.path.isfile(base / name):
            problems.add("listed file that is missing", name, where)
    if not clips:
        problems.add("part without clips", path.name, "no rows")
    return clips
