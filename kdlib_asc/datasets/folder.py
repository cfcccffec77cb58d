"""The plainest layout: one folder a class, ``class/recording__anything.ext``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from kdlib import DataError
from kdlib_asc.audio import audio_extensions, read_audio
from kdlib_asc.datasets.clips import (
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
    of_clips,
    scene_parts,
    split_groups,
    without,
)


@of_clips()
def folder(
    *,
    root: Path,
    test: Annotated[float, Field(gt=0, lt=1)] = 0.25,
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
) -> SceneParts:
    """Open a folder of class-named folders of clips and split it by recording.

    The recording of ``bus/tuesday__03.wav`` is ``tuesday``; without ``__`` it is the name without its ending. Hidden
    files, files that soundfile has no container for, and folders within a class are passed over. Clips are read when
    they are asked for, not here, except with ``bad="skip"``.

    Args:
        root: the folder with one folder for each class.
        test: share of each class's recordings in the test part, above 0 and below 1; at least one.
        rate: sample rate in Hz, at least 1.
        channels: channels of a clip, at least 1.
        seconds: length of a clip, above 0.
        resample: convert other sample rates.
        down_mix: average several channels into one, where ``channels`` is 1.
        pad: fill short clips with zeros at their end.
        crop: cut long clips at their end.
        validation: share of each class's recordings left for training to split off, 0 <= share < 1.
        seed: the key of both splits.
        bad: what to do with a clip that cannot be read as the settings say. ``"error"`` names it when it is read;
            ``"skip"`` reads every clip here, and leaves the bad ones out with a warning before anything is drawn.
        links: follow links that lead out of the data set's folder; else they are refused, for they may show what its
            maker cannot see.
        keep_in_memory: keep decoded clips, up to 2 GiB in each process.

    Raises:
        DataError: there is no such folder; or, all in one report: fewer than two classes, a class without clips or
            with fewer than two recordings, a class that the split leaves without a test clip, a file name that is
            not UTF-8, a link that leads out of the folder, a class without a clip that is not bad.

    Warns:
        UserWarning: bad clips that are left out.

    Source:
        Ours.

    Example::

        parts = folder(root=Path("my_sounds"), rate=16000, channels=1, seconds=2.0, pad=True, crop=True)
    """
    root = root.absolute()
    if not os.path.isdir(root):
        raise DataError(f"data.root: {'not a folder' if os.path.exists(root) else 'no such folder'}: {root}")
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
    store = ClipStore(root, read, keep=keep_in_memory)
    problems = Problems()
    clips = _find_clips(root, problems)
    classes = tuple(sorted({clip.label for clip in clips}))
    parts = partial(scene_parts, classes=classes, store=store, seed=seed, rate=rate, channels=channels)
    _check_recordings(clips, problems)
    if not links:
        add_links_out(problems, root, (root / clip.id for clip in clips))
    problems.check(root, lambda: parts(clips, [], validation=0))
    reasons = bad_clips(clips, store) if bad == "skip" else {}
    add_emptied(problems, clips, reasons, "the folder")
    good = without(clips, reasons)
    _check_recordings(good, problems)
    problems.check(root)
    numbers = [classes.index(clip.label) for clip in good]
    out = split_groups(numbers, [clip.group for clip in good], test, seed, purpose="test")
    kept = [clip for clip, goes in zip(good, out, strict=True) if not goes]
    tested = [clip for clip, goes in zip(good, out, strict=True) if goes]
    for label in sorted(set(classes) - {clip.label for clip in tested}):
        problems.add("class without a test clip", label, "its recordings are those of other classes; rename them")
    problems.check(root, lambda: parts(clips, [], validation=0))
    return parts(kept, tested, validation=validation, skipped=reasons)


def recording(stem: str) -> str:
    """Return the recording of a clip from its file name without ending.

    Example:
        >>> recording("tuesday__03"), recording("tuesday"), recording("__03")
        ('tuesday', 'tuesday', '__03')
    """
    return stem.partition("__")[0] or stem


def _find_clips(root: Path, problems: Problems) -> list[Clip]:
    endings = audio_extensions()
    clips: list[Clip] = []
    classes = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if len(classes) < 2:
        found = ", ".join(path.name for path in classes) or "none"
        problems.add("fewer than two class folders", str(root), f"found {found}")
    for path in classes:
        if not _utf8(path.name):
            problems.add("folder name that is not UTF-8", ascii(path.name), "rename it")
        visible = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
        mine = [file for file in visible if file.suffix.lower() in endings]
        for file in mine:
            if not _utf8(file.name):
                problems.add("file name that is not UTF-8", ascii(file.name), f"in {path.name}; rename it")
        if not mine:
            other = ", ".join(sorted({file.suffix or file.name for file in visible})) or "no files"
            problems.add(
                "class without clips", path.name, f"found {other}; expected one of {', '.join(sorted(endings))}"
            )
        clips += [Clip(f"{path.name}/{file.name}", path.name, recording(file.stem)) for file in mine]
    return clips


def _utf8(name: str) -> bool:
    """Tell whether a name can be written to a file of results."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_recordings(clips: list[Clip], problems: Problems) -> None:
    """Note the classes whose clips are all of one recording: it cannot be in both parts."""
    for label in sorted({clip.label for clip in clips}):
        groups = [clip.group for clip in clips if clip.label == label]
        if len(set(groups)) < 2:
            detail = f"{len(groups)} clips of {groups[0]!r}; one part needs another"
            problems.add("class with fewer than two recordings", label, detail)
