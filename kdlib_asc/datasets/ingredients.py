"""The sounds that made scenes consist of: a table of ingredients by class, and one function an ingredient."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
from numpy.random import Generator

SCENES: dict[str, dict[str, tuple[float, float]]] = {
    # ingredient: (usual level in dB, chance to be heard in a segment); the loudest comes first
    "airport": {"babble": (0, 1.0), "ventilation": (-4, 1.0), "wheels": (-1, 0.8), "announcement": (-1, 0.7)},
    "shopping_mall": {"babble": (0, 1.0), "ventilation": (-7, 0.8), "music": (-2, 0.9), "steps": (-4, 0.7)},
    "metro_station": {"steps": (0, 1.0), "babble": (-4, 0.8), "rails": (-1, 0.8), "announcement": (-1, 0.7)},
    "street_pedestrian": {"steps": (0, 1.0), "babble": (-4, 0.8), "traffic": (-1, 0.9), "music": (-4, 0.6)},
    "metro": {"rails": (0, 1.0), "motor": (-4, 0.8), "announcement": (-2, 0.6), "doors": (-1, 0.9)},
    "tram": {"rails": (0, 1.0), "motor": (-4, 0.8), "traffic": (-2, 0.8), "bells": (-1, 0.9)},
    "bus": {"engine": (0, 1.0), "traffic": (-6, 0.6), "babble": (-2, 0.9), "doors": (-1, 0.8)},
    "street_traffic": {"engine": (0, 1.0), "traffic": (-1, 1.0), "steps": (-3, 0.7), "wind": (-3, 0.7)},
    "park": {"birds": (0, 1.0), "wind": (-1, 0.9), "steps": (-4, 0.6), "water": (-6, 0.3)},
    "public_square": {"birds": (0, 1.0), "water": (-2, 0.7), "babble": (-2, 0.9), "bells": (-1, 0.7)},
}

SHARING = frozenset(
    (one, other) for one, other in permutations(SCENES, 2) if next(iter(SCENES[one])) == next(iter(SCENES[other]))
)
"""The ordered pairs of classes with the same loudest ingredient."""


class Take:
    """What an ingredient is made with: it draws from ``place`` what a place keeps, from ``moment`` what changes.

    Args:
        place: keyed by the place and the ingredient, so that its draws are the same in all segments of a place.
        moment: keyed by the segment as well.
        samples: length.
        rate: samples a second.
    """

    def __init__(self, place: Generator, moment: Generator, samples: int, rate: int) -> None:
        self.place = place
        self.moment = moment
        self.samples = samples
        self.rate = rate

    def noise(self, low: float, high: float) -> np.ndarray:
        """Return noise of rms 1 between two frequencies in Hz, falling by 12 dB an octave beyond them."""
        bins = self.samples // 2 + 1
        phasors = self.moment.standard_normal(bins) + 1j * self.moment.standard_normal(bins)
        return unit(np.fft.irfft(phasors * band(self.samples, self.rate, low, high), self.samples))

    def filtered(self, sound: np.ndarray, low: float, high: float) -> np.ndarray:
        """Return a sound with what is outside of a band weakened, at rms 1."""
        spectrum = np.fft.rfft(sound) * band(self.samples, self.rate, low, high)
        return unit(np.fft.irfft(spectrum, self.samples))

    def drift(self, per_second: float) -> np.ndarray:
        """Return a curve that wanders between -1 and 1, with so many turns a second."""
        turns = np.arange(self.samples) * (per_second / self.rate) + self.moment.random()
        knots = self.moment.uniform(-1, 1, 2 + int(turns[-1]))
        curve: np.ndarray = np.interp(turns, np.arange(len(knots)), knots)
        return curve

    def tone(self, frequency: np.ndarray | float) -> np.ndarray:
        """Return the phase of a tone in turns, from its frequency in Hz."""
        steps = np.broadcast_to(np.asarray(frequency) / self.rate, self.samples)
        return np.cumsum(steps) + self.moment.random()

    def pulse(self, seconds: float) -> np.ndarray:
        """Return the seconds since the start of an event."""
        return np.arange(max(int(seconds * self.rate), 1)) / self.rate

    def events(self, per_second: float) -> np.ndarray:
        """Return so many moments a second in a row that is nearly regular, in seconds."""
        gaps = self.moment.uniform(0.7, 1.3, 2 + int(1.5 * per_second * self.samples / self.rate)) / per_second
        return np.cumsum(gaps) - self.moment.uniform(0, 1.3) / per_second

    def put(self, track: np.ndarray, moment: float, sound: np.ndarray) -> None:
        """Add a short sound to a track; what is beyond the ends is lost."""
        start = int(moment * self.rate)
        first, last = max(start, 0), min(start + len(sound), len(track))
        if first < last:
            track[first:last] += sound[first - start : last - start]

    def silence(self) -> np.ndarray:
        """Return a track to put events on."""
        return np.zeros(self.samples)


def unit(sound: np.ndarray) -> np.ndarray:
    """Return a sound scaled to rms 1, silence as it is."""
    rms = float(np.sqrt(np.mean(np.square(sound))))
    return sound / rms if rms > 0 else sound


def band(samples: int, rate: int, low: float, high: float) -> np.ndarray:
    """Return the gain of a band-pass by FFT bin, falling by 12 dB an octave."""
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    frequency[0] = frequency[1] / 2
    gain: np.ndarray = 1 / ((1 + (low / frequency) ** 2) * (1 + (frequency / high) ** 2))
    return gain


def babble(take: Take) -> np.ndarray:
    """Several people talk at once, none of them understood."""
    pitches = take.moment.uniform(90, 240, take.place.integers(3, 7))
    return take.filtered(np.sum([_voice(take, pitch) for pitch in pitches], axis=0), 300, 1500)


def announcement(take: Take) -> np.ndarray:
    """A chime, then one voice through a loudspeaker."""
    track = take.filtered(_voice(take, take.place.uniform(110, 230)), 500, 3000)
    start = take.moment.uniform(-2, 0.6 * take.samples / take.rate)
    track[: max(int((start + 1) * take.rate), 0)] = 0
    time = take.pulse(1.0)
    for number, pitch in enumerate(take.place.uniform(400, 1000, 2)):
        take.put(track, start + 0.45 * number, 3 * np.sin(2 * np.pi * pitch * time) * np.exp(-4 * time))
    return track


def music(take: Take) -> np.ndarray:
    """Plucked notes of a pentatonic scale on a regular beat."""
    root, beat = take.place.uniform(110, 260), take.place.uniform(0.18, 0.35)
    track, time = take.silence(), take.pulse(0.8)
    for moment in np.arange(-3 * beat + beat * take.moment.random(), take.samples / take.rate, beat):
        pitch = root * 2 ** (take.moment.choice([0, 2, 4, 7, 9, 12, 14, 16]) / 12)
        partials = np.sum([np.sin(2 * np.pi * pitch * n * time) / n for n in (1, 2, 3, 4)], axis=0)
        take.put(track, moment, partials * np.exp(-4 * time))
    return unit(track)


def ventilation(take: Take) -> np.ndarray:
    """A steady rush of air, with the hum of its fan."""
    air = take.noise(60, take.place.uniform(300, 1200))
    hum = np.sin(2 * np.pi * take.tone(take.place.choice([100.0, 150.0, 200.0, 300.0])))
    return air + take.place.uniform(0, 1) * hum


def wheels(take: Take) -> np.ndarray:
    """Suitcases rolled over tiles: a rattle that comes and goes."""
    rattle = 0.5 + 0.5 * np.sin(2 * np.pi * take.tone(take.place.uniform(12, 25) * (1 + 0.2 * take.drift(2))))
    return take.noise(400, 2500) * rattle**3 * np.clip(0.7 + take.drift(0.7), 0, None) * 2


def steps(take: Take) -> np.ndarray:
    """People walk by on hard ground."""
    track, time = take.silence(), take.pulse(0.08)
    for pace in take.place.uniform(1.6, 2.3, take.place.integers(1, 4)):
        loud, tilt = take.moment.uniform(1.5, 4), take.moment.uniform(60, 140)
        for moment in take.events(pace):
            thud = take.moment.standard_normal(len(time)) * np.exp(-tilt * time)
            take.put(track, moment, loud * thud)
    return take.filtered(track, 250, 2500) if track.any() else track


def engine(take: Take) -> np.ndarray:
    """A combustion engine: harmonics of its firing rate, which follows the load."""
    firing = take.place.uniform(22, 50) * (1 + 0.15 * take.drift(0.5))
    phase = take.tone(firing)
    body = np.sum([np.sin(2 * np.pi * n * phase + n * n) / n**0.7 for n in range(1, 9)], axis=0)
    return unit(body) * (1 + 0.3 * take.drift(6)) + 0.5 * take.noise(80, 500)


def traffic(take: Take) -> np.ndarray:
    """Vehicles pass, their tyres louder and brighter as they come near."""
    time = np.arange(take.samples) / take.rate
    far, near = take.noise(100, 500), take.noise(400, 1500)
    passing = take.silence()
    for moment in take.events(take.place.uniform(0.3, 0.9)):
        passing += np.exp(-(((time - moment) / take.moment.uniform(0.25, 0.7)) ** 2))
    track: np.ndarray = 0.5 * far + 1.2 * near * passing
    return track


def rails(take: Take) -> np.ndarray:
    """Wheels on rails: a rumble, a double beat at each joint, and now and then a squeal."""
    track = take.silence()
    speed, time = take.place.uniform(0.8, 2.0), take.pulse(0.12)
    for moment in take.events(speed):
        for axle in (0.0, 0.22 / speed):
            take.put(track, moment + axle, take.moment.standard_normal(len(time)) * np.exp(-40 * time))
    beat = take.filtered(track, 120, 900) if track.any() else track
    squeal = np.sin(2 * np.pi * take.tone(take.place.uniform(1800, 3500) * (1 + 0.06 * take.drift(1.5))))
    ride: np.ndarray = take.noise(40, 200) + 0.8 * beat + 0.4 * squeal * np.clip(take.drift(0.8), 0, None)
    return ride


def motor(take: Take) -> np.ndarray:
    """The whine of an electric drive, gliding with the speed."""
    start, glide = take.place.uniform(250, 700), take.moment.uniform(-0.35, 0.35)
    phase = take.tone(start * 2 ** (glide * np.linspace(-1, 1, take.samples)))
    return unit(np.sum([np.sin(2 * np.pi * n * phase) / n for n in (1, 2, 3, 5)], axis=0))


def doors(take: Take) -> np.ndarray:
    """A row of warning tones, then a hiss of air."""
    track, time = take.silence(), take.pulse(0.12)
    start = take.moment.uniform(-0.5, 0.7 * take.samples / take.rate)
    pitch, gap = take.place.uniform(900, 1900), take.place.uniform(0.2, 0.3)
    for number in range(4):
        take.put(track, start + gap * number, 4 * np.sin(2 * np.pi * pitch * time) * np.hanning(len(time)))
    air = take.pulse(0.6)
    take.put(track, start + 4 * gap, 1.5 * take.moment.standard_normal(len(air)) * np.exp(-5 * air))
    return track


def wind(take: Take) -> np.ndarray:
    """Gusts."""
    return take.noise(40, take.place.uniform(150, 500)) * (1 + 0.9 * take.drift(0.8))


def birds(take: Take) -> np.ndarray:
    """Birds sing: short glides, each species with its own pitch and figure."""
    track = take.silence()
    for pitch in take.place.uniform(2200, 5500, take.place.integers(1, 4)):
        length, sweep, notes = take.place.uniform(0.05, 0.15), take.place.uniform(-0.3, 0.3), take.place.integers(2, 6)
        time = take.pulse(length)
        chirp = np.sin(2 * np.pi * pitch * (time + 0.5 * sweep * time**2 / length)) * np.hanning(len(time))
        for moment in take.events(take.moment.uniform(0.4, 0.9)):
            for number in range(notes):
                take.put(track, moment + 1.4 * length * number, take.moment.uniform(1.5, 3) * chirp)
    return track


def water(take: Take) -> np.ndarray:
    """A fountain: a bright rush with drops in it."""
    return take.noise(500, take.place.uniform(2000, 5000)) * (1 + 0.5 * take.drift(25))


def bells(take: Take) -> np.ndarray:
    """A bell, struck a few times: partials that are no harmonics."""
    track, time = take.silence(), take.pulse(1.5)
    pitch, gap = take.place.uniform(500, 1300), take.place.uniform(0.3, 0.8)
    ratios = (0.5, 1.0, 1.19, 2.0, 2.74)
    struck = np.sum([np.sin(2 * np.pi * pitch * n * time) * np.exp(-(2 + n) * time) for n in ratios], axis=0)
    start = take.moment.uniform(-0.5, 0.6 * take.samples / take.rate)
    for number in range(3):
        take.put(track, start + gap * number, 1.5 * struck)
    return track


def _voice(take: Take, pitch: float) -> np.ndarray:
    """Return one voice before the mouth: pulses that glide in pitch, syllable by syllable."""
    phase = take.tone(pitch * (1 + 0.2 * take.drift(3)))
    voice: np.ndarray = (2 * (phase % 1) - 1) * np.clip(take.drift(9), 0, None)
    return voice


INGREDIENTS: dict[str, Callable[[Take], np.ndarray]] = {
    function.__name__: function
    for function in (
        babble, announcement, music, ventilation, wheels, steps, engine, traffic, rails, motor, doors, wind, birds,
        water, bells,
    )
}  # fmt: skip
"""By name. Steady ones have an rms of about 1, events peaks of a few."""
