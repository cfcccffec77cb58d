"""Acoustic scenes that need no download: made of overlapping ingredients, each place with its own mixture and room."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.random import Generator
from pydantic import Field
from torch import Tensor

from kdlib import DataError, KdlibError, keyed, track
from kdlib_asc.datasets.clips import Clip, Clips, ClipStore, SceneParts, Share, of_clips, scene_parts, split_groups
from kdlib_asc.datasets.dcase import COLUMNS
from kdlib_asc.datasets.ingredients import INGREDIENTS, SCENES, Take

SPREAD = 2.0
"""Standard deviation of the level of an ingredient from place to place, in dB."""
CHANGE = 2.0
"""The same from segment to segment of a place."""
BACKGROUND = (-20.0, -8.0)
"""Range of the level of the noise that every place has, in dB."""
COLOUR = 4.0
"""Standard deviation of the colouration by a room, in dB, at each of ``KNOTS``."""
KNOTS = (60.0, 200.0, 600.0, 1800.0, 5400.0, 16200.0)
"""Frequencies in Hz between which the colouration is interpolated."""
LEVEL = (-56.0, -42.0)
"""Range of the overall level of a place, in dB: so quiet are the recordings of DCASE."""
PEAK = 0.9
"""A clip with a higher peak is made quieter; full scale is 1."""
STEPS = 1 << 23
"""Values between 0 and full scale: 24 bits."""


class SyntheticScenes(SceneParts):
    """The parts of a made data set, which can also be written as a folder."""

    def write(self, folder: Path) -> None:
        """Write the set in the layout of DCASE 2018, as one fold: :func:`kdlib_asc.datasets.dcase` reads it back equal.

        ``audio/<scene>-synthetic-<place>-<segment>-a.wav`` in 24 bits, ``evaluation_setup/fold1_{train,test,evaluate}
        .txt``, and ``meta.csv`` at the very end: what an interrupted writing leaves is not taken for a data set.
        Validation clips are written to the training part, which the reader splits as here.

        Args:
            folder: where to; it does not exist yet, or is empty.

        Raises:
            DataError: the folder is not empty.
            KdlibError: it cannot be written, or soundfile is not installed.
        """
        if os.path.lexists(folder) and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            raise DataError(f"{folder}: is there already and is no empty folder; name another one.")
        train = sorted(_clips(self.train) + (_clips(self.valid) if self.valid else []), key=_order)
        test = sorted(_clips(self.test), key=_order)
        try:
            for name in ("audio", "evaluation_setup"):
                (folder / name).mkdir(parents=True)
            for clip in track([*train, *test], "writing clips"):
                _write_clip(folder / clip.id, self.train.store.read(Path(clip.id)), self.rate)
            lists = folder / "evaluation_setup"
            _write_table(lists / "fold1_train.txt", ((clip.id, clip.label) for clip in train))
            _write_table(lists / "fold1_test.txt", ((clip.id,) for clip in test))
            _write_table(lists / "fold1_evaluate.txt", ((clip.id, clip.label) for clip in test))
            beside = folder / ".meta.csv"
            _write_table(beside, [COLUMNS, *((clip.id, clip.label, clip.group, "a") for clip in [*train, *test])])
            beside.replace(folder / "meta.csv")
        except (OSError, RuntimeError) as error:  # RuntimeError: libsndfile's
            raise KdlibError(f"{folder}: cannot be written: {error}.") from error


@of_clips(rate=48000, seconds=10.0)
def synthetic_scenes(
    *,
    rate: Annotated[int, Field(ge=16000)] = 16000,
    channels: Literal[1, 2] = 2,
    seconds: Annotated[float, Field(ge=0.5)] = 3.0,
    places: Annotated[int, Field(ge=2)] = 20,
    segments: Annotated[int, Field(ge=1)] = 4,
    test: Annotated[float, Field(gt=0, lt=1)] = 0.4,
    validation: Share = 0.0,
    seed: int = 0,
) -> SyntheticScenes:
    """Make a data set of ten acoustic scenes, named as those of DCASE 2018, that needs no download.

    A scene is a mixture of the ingredients of its class, by the table ``SCENES`` of
    ``kdlib_asc.datasets.ingredients``; pairs of classes (``SHARING``) have the loudest ingredient in common. Each place
    has its own levels of the ingredients and their own character, directions, background noise, room (reverberation
    and colouration) and overall level; from segment to segment of a place the course of the sounds changes, their
    levels a little, and which of the sporadic ones are heard. No place is split between parts.

    A clip is a function of (seed, rate, seconds, channels, class, place, segment) alone and is made when it is asked
    for; up to 2 GiB of them are kept in memory. Samples are multiples of 2^-23, so that 24 bits hold them exactly.

    Args:
        rate: sample rate in Hz, at least 16000.
        channels: 2, or 1 for the mean of both.
        seconds: length of a clip, at least 0.5.
        places: recording places of each class, at least 2.
        segments: clips of each place, at least 1.
        test: share of the places in the test part, above 0 and below 1; at least one.
        validation: share of the places left for training to split off, 0 <= share < 1.
        seed: the key of everything.

    Raises:
        DataError: ``validation`` is above 0 and a single place is left.

    Source:
        Ours. That classes share a sound (babble in airport and shopping mall) follows Heo et al. (2019), section 1, the
        classes section 4.1. They are no recordings: results on them say nothing of any city.

    Example:
        >>> parts = synthetic_scenes(places=2, segments=1, seconds=0.5)
        >>> len(parts.train), parts.train.ids[0], tuple(parts.train[0, 0]["x"].shape)
        (10, 'audio/airport-synthetic-0-0-a.wav', (2, 8000))
    """
    classes = tuple(sorted(SCENES))
    clips = [
        Clip(f"audio/{label}-synthetic-{place}-{segment}-a.wav", label, f"{label}-synthetic-{place}")
        for label in classes
        for place in range(places)
        for segment in range(segments)
    ]
    labels = [classes.index(clip.label) for clip in clips]
    out = split_groups(labels, [clip.group for clip in clips], test, seed, purpose="test")
    make = partial(_make, seed=seed, rate=rate, samples=round(seconds * rate), channels=channels)
    parts = scene_parts(
        [clip for clip, goes in zip(clips, out, strict=True) if not goes],
        [clip for clip, goes in zip(clips, out, strict=True) if goes],
        classes=classes,
        store=ClipStore(Path(), make, made=True),
        validation=validation,
        seed=seed,
        rate=rate,
        channels=channels,
    )
    return SyntheticScenes(**vars(parts))


def scene(label: str, place: int, segment: int, *, seed: int, rate: int, samples: int) -> np.ndarray:
    """Return one clip in stereo, (2, samples) float64: ingredients and background, in their directions, in the room."""
    at = (seed, "scene", label, place)
    here, now = _generator(*at), _generator(*at, segment)
    background = Take(here, now, samples, rate)
    edge, loud = 100 * 30 ** here.random(), _factor(here.uniform(*BACKGROUND))
    mixture = loud * np.stack([background.noise(50, edge), background.noise(50, edge)])
    for name, (level, chance) in SCENES[label].items():
        site, moment = _generator(*at, name), _generator(*at, name, segment)
        usual, angle = level + SPREAD * site.standard_normal(), site.uniform(0.1, 0.9) * np.pi / 2
        if moment.random() < chance:
            gain = _factor(usual + CHANGE * moment.standard_normal())
            sound = INGREDIENTS[name](Take(site, moment, samples, rate))
            mixture += gain * np.outer((np.cos(angle), np.sin(angle)), sound)
    overall = _factor(here.uniform(*LEVEL))
    # A product of spectra is a cyclic convolution: the tail of the end is heard at the beginning, as if it went on.
    heard: np.ndarray = overall * np.fft.irfft(np.fft.rfft(mixture) * room(here, samples, rate), samples)
    return heard * min(1.0, PEAK / float(np.abs(heard).max()))


def room(place: Generator, samples: int, rate: int) -> np.ndarray:
    """Return the transfer function of a place, (2, bins): direct sound, a reverberant tail, colouration."""
    reverberation = 0.05 * 20 ** place.random()  # 0.05 to 1 s until the tail has fallen by 60 dB
    time = np.arange(min(samples, int(reverberation * rate))) / rate
    tail = place.standard_normal((2, len(time))) * np.exp(-np.log(1000) * time / reverberation)
    tail *= place.uniform(0.3, 1.0) / np.linalg.norm(tail, axis=1, keepdims=True)
    tail[:, 0] += 1
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    gains = COLOUR * place.standard_normal(len(KNOTS))
    colour = np.interp(np.log(np.maximum(frequency, 1)), np.log(KNOTS), gains)
    transfer: np.ndarray = np.fft.rfft(tail, samples) * 10 ** (colour / 20)
    return transfer


def _make(name: PurePath, *, seed: int, rate: int, samples: int, channels: int) -> Tensor:
    """Return the clip of a file name, (channels, samples) float32."""
    stereo = scene(*_parsed(name), seed=seed, rate=rate, samples=samples)
    made = stereo if channels == 2 else stereo.mean(axis=0, keepdims=True)
    return torch.from_numpy((np.round(made * STEPS) / STEPS).astype(np.float32))


def _parsed(name: PurePath) -> tuple[str, int, int]:
    """Return class, place and segment."""
    label, _, place, segment, _ = name.stem.split("-")
    return label, int(place), int(segment)


def _order(clip: Clip) -> tuple[str, int, int]:
    return _parsed(PurePath(clip.id))


def _factor(decibels: float) -> float:
    return float(10 ** (decibels / 20))


def _generator(seed: int, *key: int | str) -> Generator:
    """Return numpy's counterpart of :func:`kdlib.keyed`."""
    return np.random.default_rng(keyed(seed, *key).initial_seed())


def _clips(part: Clips) -> list[Clip]:
    return [
        Clip(name, part.classes[label], group)
        for name, label, group in zip(part.ids, part.labels, part.groups, strict=True)
    ]


def _write_clip(path: Path, samples: Tensor, rate: int) -> None:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise KdlibError(f"writing audio needs soundfile: pip install 'kdlib-asc[asc]' ({error})") from error
    steps = (samples.T.double() * STEPS).int().numpy()
    soundfile.write(path, steps << 8, rate, subtype="PCM_24")  # the upper 24 of 32 bits, exactly


def _write_table(path: Path, rows: Iterable[Sequence[str]]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
