"""Reading one clip: everything that a decoder lets through and a network must not see is an error naming the file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from math import ceil, gcd
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdlib import DataError, KdlibError
from kdlib_asc.containers import FlacSum, damage

FLAC = {"PCM_S8": 8, "PCM_16": 16, "PCM_24": 24}
"""Bits of the samples of a FLAC file, by libsndfile's names."""
LOUDEST = 8.0
"""Full scale is 1, and lossy codecs overshoot it a little. Larger values are integers saved as floating point."""

UNPACKED = 1 << 30
"""Bytes of float32 samples that a file may unpack to, or ``RATIO`` times its own bytes if that is more."""
RATIO = 32
FINEST = 10**6
"""Of the two whole numbers in whose ratio a sample rate is converted, the largest: the filter grows with it."""

_BLOCK = 1 << 18


class Form(NamedTuple):
    """What a clip is like beside its sound."""

    rate: int
    channels: int
    frames: int


class FormError(DataError):
    """A sound file of another rate, number of channels or length than was wanted."""

    found: Form
    wanted: Form


def read_audio(
    path: str | Path,
    *,
    rate: int,
    channels: int,
    seconds: float,
    resample: bool = False,
    down_mix: bool = False,
    pad: bool = False,
    crop: bool = False,
) -> Tensor:
    """Read one clip in exactly the wanted form, or say what is wrong with it.

    Args:
        path: a file in any container that soundfile reads.
        rate: wanted sample rate in Hz, at least 1.
        channels: wanted number of channels, at least 1.
        seconds: wanted length; ``round(seconds * rate)`` samples, at least 1.
        resample: convert another sample rate (polyphase filter). A length that is off by no more than the rounding of
            the conversion, one sample at the lower of the two rates, is then put right without ``pad`` or ``crop``.
        down_mix: average several channels into one, where ``channels`` is 1.
        pad: fill a clip that is too short with zeros at its end.
        crop: cut a clip that is too long at its end.

    Returns:
        Samples of full scale 1, (channels, samples) float32.

    Raises:
        DataError: the file is missing, not readable, truncated, damaged (as far as its container has checksums) or
            empty, would unpack to more than ``UNPACKED``, holds NaN, infinity or samples beyond ``LOUDEST``, or has
            another rate, channel count or length than wanted and no setting that allows it. The
            text names the file, what was found, what was expected, and the setting (a key of a recipe's ``[data]``).

    Source:
        Ours. The paper's clips (section 4.1) are 10 s, 48 kHz, stereo; it resamples and pads nothing.

    Example::

        x = read_audio("audio/bus-lyon-1001-40001-a.wav", rate=48000, channels=2, seconds=10.0)  # (2, 480000)
    """
    wanted = round(seconds * rate)
    if wanted < 1:
        raise DataError(f"data.seconds={seconds} at data.rate={rate} is a clip without samples")
    path = Path(path)
    samples, found_rate = _decode(path)
    frames, found_channels = samples.shape
    got, slack = _length_at(rate, frames, found_rate)

    problems = _unlike(found_rate, found_channels, rate, channels, resample=resample, down_mix=down_mix)
    expected = f"expected {wanted} ({seconds:g} s at {rate} Hz)"
    if got < wanted - slack and not pad:
        problems.append(f"too short: {got} samples, {expected} (data.pad=true adds zeros at the end)")
    if got > wanted + slack and not crop:
        problems.append(f"too long: {got} samples, {expected} (data.crop=true cuts the end)")
    if problems:
        error = FormError(f"{path}: {'; '.join(problems)}")  # of one argument: a loader makes it anew from its text
        error.found, error.wanted = Form(found_rate, found_channels, frames), Form(rate, channels, wanted)
        raise error

    samples = _converted(path, samples, found_rate, rate, channels)
    out = np.zeros((channels, wanted), dtype=np.float32)
    kept = min(wanted, len(samples))
    out[:, :kept] = samples[:kept].T
    return torch.from_numpy(out)


def read_windows(
    path: str | Path, *, rate: int, channels: int, seconds: float, resample: bool = False, down_mix: bool = False
) -> Tensor:
    """Read a file of any length as windows of ``seconds`` that cover it, (windows, channels, samples) float32.

    There are as few windows as cover the file; they begin evenly spaced, the first with the file, and the last ends
    with it, so that neighbours overlap rather than leave a gap. A file shorter than one window is filled with zeros at
    its end.

    Args:
        path: a file in any container that soundfile reads.
        rate: wanted sample rate in Hz, at least 1.
        channels: wanted number of channels, at least 1.
        seconds: length of a window, above 0.
        resample: convert another sample rate.
        down_mix: average several channels into one, where ``channels`` is 1.

    Raises:
        DataError: as :func:`read_audio`, except for the length.

    Source:
        Ours: every clip of the paper has one length.
    """
    wanted = max(1, round(seconds * rate))
    samples, found_rate = _decode(Path(path))
    problems = _unlike(found_rate, samples.shape[1], rate, channels, resample=resample, down_mix=down_mix)
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}")
    samples = _converted(Path(path), samples, found_rate, rate, channels)
    missing = max(0, wanted - len(samples))
    whole = np.pad(samples, ((0, missing), (0, 0)))
    starts = np.linspace(0, len(whole) - wanted, ceil(len(whole) / wanted)).round().astype(int)
    return torch.from_numpy(np.stack([np.ascontiguousarray(whole[at : at + wanted].T) for at in starts]))


def fitting(forms: Sequence[Form]) -> dict[str, Any]:
    """Return the settings under which clips of these forms can be read, with as little conversion as there can be.

    The rate is the most common one, the channels are those of all or else 1, the length is the median.

    Args:
        forms: of at least one clip.

    Example:
        >>> fitting([Form(44100, 1, 220500), Form(44100, 1, 220500), Form(44100, 1, 160000)])
        {'rate': 44100, 'channels': 1, 'seconds': 5.0, 'pad': True}
    """
    rates, channels = Counter(form.rate for form in forms), {form.channels for form in forms}
    rate = rates.most_common(1)[0][0]
    lengths = [form.frames / form.rate for form in forms]
    seconds = round(median_low(lengths), 6 if len(set(lengths)) == 1 else 2) or 0.01
    wanted = round(seconds * rate)
    samples = [_length_at(rate, form.frames, form.rate) for form in forms]
    conversions = {
        "resample": len(rates) > 1,
        "down_mix": len(channels) > 1,
        "pad": any(got < wanted - slack for got, slack in samples),
        "crop": any(got > wanted + slack for got, slack in samples),
    }
    one = next(iter(channels)) if len(channels) == 1 else 1
    settings = {"rate": rate, "channels": one, "seconds": seconds}
    return settings | {name: True for name, needed in conversions.items() if needed}


def audio_extensions() -> frozenset[str]:
    """Return the file name endings of the containers that soundfile reads, lower case, with their dot.

    Header-less files (``.raw``) are not among them: nothing in them tells their rate.

    Raises:
        KdlibError: soundfile is not installed.

    Example:
        >>> {".wav", ".flac", ".ogg"} <= audio_extensions(), ".raw" in audio_extensions()
        (True, False)
    """
    formats = {f".{name.lower()}" for name in _soundfile().available_formats()}
    return frozenset(formats | {".aif", ".aifc", ".oga", ".opus", ".snd"}) - {".raw"}


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, libsndfile is not
        raise KdlibError(f"reading audio needs soundfile: pip install 'kdlib-asc[asc]' ({error})") from error
    return soundfile


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """Return all samples (frames, channels) float32 and their rate, having refused what is damaged."""
    soundfile = _soundfile()
    if not os.path.isfile(path):
        absent = "a link that leads nowhere" if os.path.islink(path) else "no such file"
        raise DataError(f"{path}: {'not a file' if os.path.exists(path) else absent}")
    blocks = []
    try:
        with soundfile.SoundFile(path) as file:
            frames, rate = int(file.frames), int(file.samplerate)
            _refuse_bomb(path, 4 * frames * file.channels)
            flac = FlacSum(path, FLAC[file.subtype]) if file.format == "FLAC" and file.subtype in FLAC else None
            # Block by block: a damaged header may promise more frames than there are.
            rows = max(1, _BLOCK // file.channels)
            while len(block := file.read(rows, dtype="int32" if flac else "float32", always_2d=True)):
                if flac:
                    flac.add(block)
                    block = block.astype(np.float32) / np.float32(1 << 31)  # what libsndfile would have given
                blocks.append(block)
        broken = damage(path)
    except (RuntimeError, TypeError, ValueError, OSError, OverflowError) as error:
        raise DataError(f"{path}: not readable as audio: {error}") from error
    read = sum(map(len, blocks))
    if frames == 0:
        raise DataError(f"{path}: zero frames: the file has a header and no samples")
    if broken or read != frames:
        raise DataError(f"{path}: {broken or f'truncated: the header states {frames} frames, {read} could be read'}")
    if flac and not flac.agrees():
        raise DataError(f"{path}: damaged: its samples are not those that its header has the checksum of")
    samples = np.concatenate(blocks)
    peak = float(np.abs(samples).max())  # NaN where any sample is
    if not np.isfinite(peak):
        nans, infs = int(np.isnan(samples).sum()), int(np.isinf(samples).sum())
        raise DataError(f"{path}: {nans} samples are NaN and {infs} are Inf, expected finite samples")
    if peak > LOUDEST:
        raise DataError(f"{path}: samples of up to {peak:g}, expected at most {LOUDEST:g} (full scale is 1)")
    return samples, rate


def _refuse_bomb(path: Path, unpacked: int) -> None:
    """Refuse a file that would fill the memory, by what it says of itself, before there is room made for it."""
    allowed = max(UNPACKED, RATIO * path.stat().st_size)
    if unpacked > allowed:
        raise DataError(f"{path}: would unpack to {unpacked:,} bytes of samples, more than {allowed:,}; cut it first")


def _unlike(
    found_rate: int, found_channels: int, rate: int, channels: int, *, resample: bool, down_mix: bool
) -> list[str]:
    """Say where a file's form is not the wanted one and no setting allows it."""
    problems = []
    if found_rate != rate and not resample:
        problems.append(f"sample rate {found_rate} Hz, expected {rate} Hz (data.resample=true converts it)")
    if found_channels != channels and not (channels == 1 and down_mix):
        hint = "data.down_mix=true averages them" if channels == 1 else f"data.channels={found_channels} accepts it"
        problems.append(f"channels: {found_channels}, expected {channels} ({hint})")
    return problems


def _converted(path: Path, samples: np.ndarray, found_rate: int, rate: int, channels: int) -> np.ndarray:
    """Return samples (frames, channels) with the wanted number of channels at the wanted rate."""
    if samples.shape[1] != channels:
        samples = samples.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    if found_rate == rate:
        return samples
    common = gcd(found_rate, rate)
    if max(found_rate, rate) // common > FINEST:
        raise DataError(f"{path}: sample rate {found_rate} Hz, which cannot be converted to {rate} Hz")
    _refuse_bomb(path, 8 * ceil(len(samples) * rate / found_rate) * channels)
    return _resample(samples, rate // common, found_rate // common)


def _length_at(rate: int, frames: int, found_rate: int) -> tuple[int, int]:
    """Return how many samples a clip has at another rate, and by how many the conversion may miss."""
    slack = 0 if found_rate == rate else max(1, ceil(rate / found_rate))
    return ceil(frames * rate / found_rate), slack


def _resample(samples: np.ndarray, up: int, down: int) -> np.ndarray:
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise KdlibError("data.resample=true needs scipy: pip install 'kdlib-asc[asc]'") from error
    return np.asarray(resample_poly(samples.astype(np.float64), up, down), dtype=np.float32)
