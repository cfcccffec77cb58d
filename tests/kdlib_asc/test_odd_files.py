"""Odd files, one table: each is read as an independent reference reads it, or refused with its name."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.io.wavfile
import soundfile

from kdlib import DataError, Loader
from kdlib_asc.audio import read_audio
from kdlib_asc.datasets import SceneParts, folder

RATE, FRAMES = 8000, 4000
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, FRAMES).astype(np.float32)


def written(path: Path, samples: Any = NOISE, rate: int = RATE, **options: Any) -> None:
    soundfile.write(path, samples, rate, **options)


def cut(path: Path, share: float = 0.5, **options: Any) -> None:
    written(path, np.tile(NOISE, 10), **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def riff(path: Path, *chunks: tuple[bytes, bytes], kind: int = 1, bits: int = 16) -> None:
    """Write a mono WAV byte by byte: the chunks before and after the samples are the caller's."""
    form = struct.pack("<HHIIHH", kind, 1, RATE, RATE * bits // 8, bits // 8, bits)
    body = b"WAVE"
    for name, content in ((b"fmt ", form), *chunks):
        body += name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


PCM = (NOISE * 32768).astype("<i2")
SAMPLES = (b"data", PCM.tobytes())


def with_one(value: float) -> np.ndarray:
    samples = NOISE.copy()
    samples[1234] = value
    return samples


def mu_law(path: Path) -> None:
    riff(path, (b"data", bytes(range(256)) * 16), kind=7, bits=8)


def mu_law_values() -> np.ndarray:
    """ITU-T G.711: sign, 3 bits of exponent, 4 of mantissa, all inverted; 14 bits, here of 16."""
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4) & 7, code & 15
    magnitude = (((mantissa.astype(int) << 3) + 132) << exponent) - 132
    return np.tile(np.where(code & 128, -magnitude, magnitude) / 32768, 16)[:4096]


def eight_bit(path: Path) -> None:
    riff(path, (b"data", bytes(range(256)) * 16), bits=8)


def promises_too_many(path: Path) -> None:
    written(path)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F
    data[22:26] = b"\xff\xff\xff\xff"  # 2^36 - 1 samples
    path.write_bytes(data)


def states_no_size(path: Path) -> None:
    riff(path, SAMPLES)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"data" + struct.pack("<I", 2 * FRAMES), b"data" + b"\xff" * 4))


def link_loop(path: Path) -> None:
    path.with_name("other.wav").symlink_to(path)
    path.symlink_to(path.with_name("other.wav"))


def link(path: Path) -> None:
    written(path.with_name("elsewhere.wav"))
    path.symlink_to(path.with_name("elsewhere.wav"))


def renamed(path: Path) -> None:
    written(path.with_name("plain.wav"))
    path.with_name("plain.wav").rename(path)


def unreadable(path: Path) -> None:
    written(path)
    path.chmod(0)


class Odd(NamedTuple):
    """A kind of file: how it is made, and what should come of it."""

    make: Callable[[Path], object]
    expected: Callable[[Path], np.ndarray] | str
    """The samples by another way, or a pattern of the refusal."""
    name: str = "clip.wav"
    settings: dict[str, Any] = {}  # noqa: RUF012
    tolerance: float = 1e-7


def scipy_reads(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.io.wavfile.WavFileWarning)  # chunks that it does not know
        _, samples = scipy.io.wavfile.read(path)
    if samples.dtype == np.uint8:
        return np.asarray((samples.astype(np.float64) - 128) / 128)
    scale = -float(np.iinfo(samples.dtype).min) if samples.dtype.kind == "i" else 1.0
    return np.asarray(samples / scale)


def as_written(_: Path) -> np.ndarray:
    return NOISE


def as_16_bit(_: Path) -> np.ndarray:
    return PCM / 32768


SIX = np.random.default_rng(1).uniform(-0.5, 0.5, (FRAMES, 6)).astype(np.float32)
FAST = np.random.default_rng(2).uniform(-0.5, 0.5, 48000).astype(np.float32)
FLOAT: dict[str, Any] = {"subtype": "FLOAT"}
LOSSY = {"tolerance": 0.35}
"""Of noise through a lossy codec only the gist comes back."""

READ = {
    "8 bit": Odd(eight_bit, scipy_reads, settings={"seconds": 4096 / RATE}),
    "mu-law": Odd(mu_law, lambda _: mu_law_values(), settings={"seconds": 4096 / RATE}),
    "24 bit": Odd(lambda path: written(path, subtype="PCM_24"), scipy_reads),
    "32 bit": Odd(lambda path: written(path, subtype="PCM_32"), scipy_reads),
    "double": Odd(lambda path: written(path, subtype="DOUBLE"), scipy_reads),
    "float over full scale": Odd(lambda path: written(path, with_one(-3.5), **FLOAT), scipy_reads),
    "96 kHz": Odd(lambda path: written(path, FAST, 96000, **FLOAT), scipy_reads, settings={"rate": 96000}),
    "6 channels": Odd(lambda path: written(path, SIX, **FLOAT), scipy_reads, settings={"channels": 6}),
    "6 channels to 1": Odd(
        lambda path: written(path, SIX, **FLOAT), lambda _: SIX.mean(axis=1), settings={"down_mix": True}
    ),
    "stereo to mono": Odd(
        lambda path: written(path, SIX[:, :2], **FLOAT), lambda _: SIX[:, :2].mean(axis=1), settings={"down_mix": True}
    ),
    "RF64": Odd(lambda path: written(path, format="RF64", **FLOAT), as_written),
    "big-endian WAV": Odd(lambda path: written(path, endian="BIG", **FLOAT), scipy_reads),
    "WAVEX": Odd(lambda path: written(path, format="WAVEX"), scipy_reads),
    "W64": Odd(lambda path: written(path, format="W64", **FLOAT), as_written, "clip.w64"),
    "AIFF": Odd(lambda path: written(path, format="AIFF", **FLOAT), as_written, "clip.aiff"),
    "CAF": Odd(lambda path: written(path, format="CAF", **FLOAT), as_written, "clip.caf"),
    "AU": Odd(lambda path: written(path, format="AU", **FLOAT), as_written, "clip.au"),
    "extra chunks": Odd(lambda path: riff(path, (b"LIST", b"INFO"), SAMPLES, (b"id3 ", b"tag!")), scipy_reads),
    "chunk of odd length": Odd(lambda path: riff(path, (b"junk", b"abc"), SAMPLES), as_16_bit),
    "written to a pipe, no size": Odd(states_no_size, as_16_bit),
    "FLAC named .wav": Odd(lambda path: written(path, PCM, format="FLAC"), as_16_bit),
    "WAV named .ogg": Odd(lambda path: written(path, PCM, format="WAV"), as_16_bit, "clip.ogg"),
    "Ogg Vorbis": Odd(lambda path: written(path, format="OGG"), as_written, "clip.ogg", **LOSSY),  # type: ignore[arg-type]
    "emoji and spaces in the name": Odd(lambda path: written(path, **FLOAT), as_written, "🚋 at  night [1].wav"),
    "line end and escape in the name": Odd(lambda path: written(path, **FLOAT), as_written, "a\nb\x1b[31m.wav"),
    "link": Odd(link, as_written, tolerance=1e-4),
}
REFUSED = {
    "cut WAV": Odd(cut, "truncated: the header states"),
    "cut FLAC": Odd(cut, "not readable as audio|truncated", "clip.flac"),
    "cut Ogg": Odd(cut, "truncated: it ends within an Ogg page", "clip.ogg"),
    "cut MP3": Odd(cut, "truncated: the header states", "clip.mp3"),
    "cut AIFF": Odd(cut, "truncated: the header states", "clip.aiff"),
    "cut W64": Odd(cut, "truncated: the header states", "clip.w64"),
    "cut CAF": Odd(lambda path: cut(path, 0.99), "truncated: the header states", "clip.caf"),
    "cut AU": Odd(cut, "truncated: the header states", "clip.au"),
    "header that promises too many frames": Odd(promises_too_many, "would unpack to 274,877,906,940", "clip.flac"),
    "96 kHz where 8 is wanted": Odd(lambda path: written(path, FAST, 96000), "sample rate 96000 Hz, expected 8000 Hz"),
    "6 channels where 1 is wanted": Odd(lambda path: written(path, SIX), "channels: 6, expected 1"),
    "one NaN": Odd(lambda path: written(path, with_one(np.nan), **FLOAT), "1 samples are NaN"),
    "one Inf": Odd(lambda path: written(path, with_one(np.inf), **FLOAT), "1 are Inf"),
    "integers saved as float": Odd(lambda path: written(path, NOISE * 32768, **FLOAT), "samples of up to"),
    "header only": Odd(lambda path: riff(path, (b"data", b"")), "zero frames"),
    "no samples chunk": Odd(lambda path: riff(path, (b"LIST", b"INFO")), "not readable as audio|zero frames"),
    "empty file": Odd(lambda path: path.write_bytes(b""), "not readable as audio"),
    "text named .wav": Odd(lambda path: path.write_text("words\n" * 99), "not readable as audio"),
    "folder named .wav": Odd(lambda path: path.mkdir(), "not a file"),
    "pipe named .wav": Odd(lambda path: os.mkfifo(path), "not a file"),
    "dangling link": Odd(lambda path: path.symlink_to("gone.wav"), "a link that leads nowhere"),
    "link that leads to itself": Odd(link_loop, "a link that leads nowhere"),
    "name in another encoding": Odd(renamed, "not readable as audio", "caf\udce9.wav"),
    "no permission": Odd(unreadable, "not readable as audio"),
}


def made(odd: Odd, folder: Path) -> Path:
    path = folder / odd.name
    if odd.name.endswith(".mp3") and "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile has no MP3")
    try:
        odd.make(path)
    except OSError as error:
        pytest.skip(f"this file system has no such file: {error}")
    if odd.make is unreadable and os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    return path


@pytest.mark.parametrize("kind", READ)
def test_odd_file_that_is_read_right(tmp_path: Path, kind: str) -> None:
    odd = READ[kind]
    path = made(odd, tmp_path)
    x = read_audio(path, **{"rate": RATE, "channels": 1, "seconds": 0.5, **odd.settings}).numpy()
    assert callable(odd.expected)
    expected = odd.expected(path)
    np.testing.assert_allclose(x, expected.T if expected.ndim == 2 else expected[None], rtol=0, atol=odd.tolerance)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.timeout(20)
def test_odd_file_that_is_refused_by_name_whatever_the_settings_allow(tmp_path: Path, kind: str) -> None:
    odd = REFUSED[kind]
    path = made(odd, tmp_path)
    with pytest.raises(DataError, match=rf"^{path}: .*({odd.expected})"):
        read_audio(path, rate=RATE, channels=1, seconds=0.5, pad=True, crop=True)


# in a data set, in the middle of an epoch


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of two classes with every file of the table that is refused, and which these are."""
    root, ids = tmp_path_factory.mktemp("spoilt"), {}
    for scene in ("bus", "park"):
        (root / scene).mkdir()
        for number in range(12):
            written(root / scene / f"good{number}__1.wav")
    for number, (kind, odd) in enumerate(REFUSED.items()):
        own = root / "parts" / str(number)
        own.mkdir(parents=True)
        try:
            path = made(odd, own)
        except pytest.skip.Exception:
            continue
        if odd.make is renamed:  # which a folder refuses as a whole
            continue
        ids[kind] = f"bus/bad{number}{path.suffix}"
        path.rename(root / ids[kind])
    for leftover in sorted((root / "parts").rglob("*"), reverse=True):
        leftover.rmdir() if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    (root / "parts").rmdir()
    return root, ids


def opened(root: Path, **settings: Any) -> SceneParts:
    return folder(root=root, **{"rate": RATE, "channels": 1, "seconds": 0.5, "pad": True, "crop": True, **settings})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["cut WAV", "one NaN", "header only", "pipe named .wav", "96 kHz where 8 is wanted"])
@pytest.mark.timeout(60)
def test_bad_clip_in_the_middle_of_an_epoch_stops_it_and_is_named(
    spoilt: tuple[Path, dict[str, str]], tmp_path: Path, kind: str, workers: int
) -> None:
    for scene in ("bus", "park"):
        (tmp_path / scene).mkdir()
        for number in range(4):
            written(tmp_path / scene / f"{number}.wav")
    part: Any = opened(tmp_path).train
    victim = tmp_path / part.ids[len(part) // 2]
    victim.unlink()
    REFUSED[kind].make(victim)
    with pytest.raises(DataError, match=rf"{victim}: .*({REFUSED[kind].expected})"):
        for _ in Loader(part, batch=2, shuffle=False, workers=workers):
            pass


def test_skip_leaves_out_every_bad_clip_of_the_table_and_says_why(spoilt: tuple[Path, dict[str, str]]) -> None:
    root, ids = spoilt
    assert len(ids) >= 22 - (os.geteuid() == 0)
    with pytest.warns(UserWarning, match=rf"{len(ids)} of {24 + len(ids)} clips are bad and left out"):
        parts = opened(root, bad="skip")
    assert {name for name, _ in parts.skipped} == set(ids.values())
    assert len(parts.train) + len(parts.test) == 24
    reasons = dict(parts.skipped)
    for kind, name in ids.items():
        assert not reasons[name].startswith(str(root)), kind
    assert reasons[ids["folder named .wav"]] == "not a file"


@pytest.mark.timeout(60)
def test_skip_gives_the_same_parts_and_batches_for_any_number_of_workers(spoilt: tuple[Path, dict[str, str]]) -> None:
    root, _ = spoilt
    seen = []
    for workers in (0, 1, 2):
        with pytest.warns(UserWarning, match="left out"):
            part: Any = opened(root, bad="skip", validation=0.2).train
        seen.append(
            [[part.ids[i] for i in batch["index"].tolist()] for batch in Loader(part, batch=4, workers=workers)]
        )
    assert seen[0] == seen[1] == seen[2]
    assert sum(map(len, seen[0])) == len(part)


def test_the_split_with_skip_is_that_of_the_folder_without_the_bad_clips(
    spoilt: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    for scene in ("bus", "park"):
        (tmp_path / scene).mkdir()
        for number in range(12):
            written(tmp_path / scene / f"good{number}__1.wav")
    with pytest.warns(UserWarning, match="left out"):
        parts = opened(spoilt[0], bad="skip", validation=0.2)
    clean = opened(tmp_path, validation=0.2)
    assert (list(parts.train.ids), list(parts.test.ids)) == (list(clean.train.ids), list(clean.test.ids))
    assert clean.skipped == ()
