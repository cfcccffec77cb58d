"""Acoustic scenes that need no download: made of overlapping ingredients, place by place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.random import Generator
from pydantic import Field
from torch import Tensor

from kdlib import CLEAN, DataError, KdlibError, keyed
from kdlib_asc.datasets.clips import Clip, Clips, ClipStore, Rate, SceneParts, Seconds, Share, scene_parts, split_groups
from kdlib_asc.datasets.ingredients import INGREDIENTS, SCENES, Take

SPREAD = 2.0
"""Standard deviation of the level of an ingredient from place to place, in dB."""
CHANGE = 2.0
"""The same from segment to segment of a place."""
COLOUR = 4.0
"""Standard deviation of the colouration by a room, in dB, at each of ``KNOTS``."""
KNOTS = (60.0, 200.0, 600.0, 1800.0, 5400.0, 16200.0)
"""Frequencies in Hz between which the colouration is interpolated."""
BACKGROUND = (-20.0, -8.0)
"""Range of the level of the noise that every place has, in dB."""
LEVEL = (-56.0, -42.0)
"""Range of the overall level of a place, in dB: DCASE's clips are as quiet."""
PEAK = 0.9
"""A clip that would be louder is made quieter."""


class SyntheticScenes(SceneParts):
    """The parts of made scenes, which can be written as a folder (:class:`kdlib_asc.datasets.SceneParts`)."""


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
    clips = [
        Clip(f"audio/{label}-{CITY}-{place}-{segment}-a.wav", label, f"{label}-{CITY}-{place}")
        for label in SCENES
        for place in range(places)
        for segment in range(segments)
    ]
    classes = tuple(sorted(SCENES))
    out = split_groups([classes.index(clip.label) for clip in clips], [clip.group for clip in clips], test, seed, purpose="test")
    read = partial(_read, seed=seed, rate=rate, samples=round(seconds * rate), channels=channels)
    parts = scene_parts(
        [clip for clip, goes in zip(clips, out, strict=True) if not goes],
        [clip for clip, goes in zip(clips, out, strict=True) if goes],
        classes=classes, store=ClipStore(Path(), read), validation=validation, seed=seed, rate=rate, channels=channels)
    return SyntheticScenes(**vars(parts))

CITY = "synthetic"


def _read(path: Path, *, seed: int, rate: int, samples: int, channels: int) -> Tensor:
    label, _, place, segment, _ = path.stem.split("-")
    made = scene(label, int(place), int(segment), seed=seed, rate=rate, samples=samples)
    return torch.from_numpy(made if channels == 2 else made.mean(axis=0, keepdims=True)).float()


def scene(label: str, place: int, segment: int, *, seed: int, rate: int, samples: int) -> np.ndarray:
    at = (seed, "scene", label, place)
    here, now = generator(*at), generator(*at, segment)
    background = Take(here, now, samples, rate)
    edge, loud = 100 * 30 ** here.random(), decibels(here.uniform(*BACKGROUND))
    mixture = loud * np.stack([background.noise(50, edge), background.noise(50, edge)])
    for name, (level, chance) in SCENES[label].items():
        site, moment = generator(*at, name), generator(*at, name, segment)
        usual, angle = level + SPREAD * site.standard_normal(), site.uniform(0.1, 0.9) * np.pi / 2
        if moment.random() < chance:
            gain = decibels(usual + CHANGE * moment.standard_normal())
            sound = INGREDIENTS[name](Take(site, moment, samples, rate))
            mixture += gain * np.outer((np.cos(angle), np.sin(angle)), sound)
    overall = decibels(here.uniform(*LEVEL))
    out = overall * np.fft.irfft(np.fft.rfft(mixture) * room(here, samples, rate), samples)
    return out * min(1.0, PEAK / np.abs(out).max())


def room(place: Generator, samples: int, rate: int) -> np.ndarray:
    """Return the transfer function of a place, (2, bins): direct sound, a reverberant tail, colouration."""
    reverberation = 0.05 * 20 ** place.random()  # seconds until the tail has fallen by 60 dB
    time = np.arange(min(samples, int(reverberation * rate))) / rate
    tail = place.standard_normal((2, len(time))) * np.exp(-np.log(1000) * time / reverberation)
    tail *= place.uniform(0.3, 1.0) / np.linalg.norm(tail, axis=1, keepdims=True)
    tail[:, 0] += 1
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    gains = COLOUR * place.standard_normal(len(KNOTS))
    colour = np.interp(np.log(np.maximum(frequency, 1)), np.log(KNOTS), gains)
    return np.fft.rfft(tail, samples) * decibels(colour)


def decibels(level):
    return 10 ** (level / 20)


def generator(seed: int, *key: int | str) -> Generator:
    """Return a numpy generator keyed as :func:`kdlib.keyed`."""
    return np.random.default_rng(keyed(seed, *key).initial_seed())
