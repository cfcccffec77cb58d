"""What a container says against itself: lengths, page numbers, checksums, and what a file would unpack to."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from kdlib import DataError
from kdlib_asc import audio
from kdlib_asc.audio import read_audio, read_windows
from kdlib_asc.containers import damage

RATE, FRAMES = 8000, 40_000
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
NOISE = np.random.default_rng(0).integers(-(2**23), 2**23, (FRAMES, 2)).astype(np.int32) << 8


def written(path: Path, samples: np.ndarray = NOISE, **options: Any) -> bytes:
    soundfile.write(path, samples, RATE, **options)
    return path.read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_audio(path, rate=RATE, channels=2, seconds=FRAMES / RATE, pad=True, crop=True)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("channels", [1, 2])
def test_flac_comes_out_as_libsndfile_gives_it_bit_for_bit(tmp_path: Path, subtype: str, channels: int) -> None:
    written(tmp_path / "a.flac", NOISE[:, :channels], subtype=subtype)
    own = read_audio(tmp_path / "a.flac", rate=RATE, channels=channels, seconds=FRAMES / RATE).numpy()
    np.testing.assert_array_equal(own, soundfile.read(tmp_path / "a.flac", dtype="float32", always_2d=True)[0].T)


def test_flac_that_states_fewer_frames_than_it_holds_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    data = bytearray(written(path))
    assert int.from_bytes(data[22:26], "big") == FRAMES
    data[22:26] = (FRAMES - 4096).to_bytes(4, "big")
    path.write_bytes(data)
    assert soundfile.info(path).frames == len(soundfile.read(path)[0]) == FRAMES - 4096  # without a word
    assert refusal(path).startswith("damaged: its samples are not those")


def test_flac_without_a_checksum_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    data = written(path)
    path.write_bytes(data[:26] + bytes(16) + data[42:])
    assert read_audio(path, rate=RATE, channels=2, seconds=FRAMES / RATE).abs().max() > 0.9


@pytest.mark.parametrize("name", ["a.wav", "b.rf64", "c.wavex"])
@pytest.mark.parametrize("lost", [6, 600])
def test_wav_that_states_fewer_bytes_than_it_holds_goes_on_with_no_chunk(tmp_path: Path, name: str, lost: int) -> None:
    path = tmp_path / name
    data = written(path, format={"a": "WAV", "b": "RF64", "c": "WAVEX"}[name[0]], subtype="PCM_24")
    size = (6 * FRAMES).to_bytes(8, "little")
    where = data.index(b"ds64") + 16 if name[0] == "b" else data.index(b"data") + 4
    if data[where : where + 4] != size[:4]:  # RF64 that fits into WAV is written as WAV, with its size in both
        where = data.index(b"data") + 4
    assert data[where : where + 4] == size[:4]
    path.write_bytes(data[:where] + (6 * FRAMES - lost).to_bytes(4, "little") + data[where + 4 :])
    assert refusal(path) == f"damaged: it goes on behind its {6 * FRAMES - lost} bytes of samples, and with no chunk"


def test_wav_whose_bytes_are_no_whole_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    data = written(path, subtype="PCM_16")
    at = data.index(b"data") + 4
    path.write_bytes(data[:at] + (4 * FRAMES - 3).to_bytes(4, "little") + data[at + 4 :])
    assert refusal(path) == f"damaged: {4 * FRAMES - 3} bytes of samples are no whole frames of 4 bytes"


@pytest.mark.parametrize(("field", "value"), [(22, 1), (22, 4), (34, 8), (32, 2)], ids=str)
def test_wav_whose_header_contradicts_itself(tmp_path: Path, field: int, value: int) -> None:
    path = tmp_path / "a.wav"
    data = bytearray(written(path, subtype="PCM_16"))
    data[field : field + 2] = struct.pack("<H", value)
    path.write_bytes(data)
    assert "are no frames of" in str(damage(path))
    refusal(path)


def test_chunks_behind_the_samples_are_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    data = written(path, subtype="PCM_16")
    path.write_bytes(data + b"LIST\x04\0\0\0INFO" + b"id3 \x03\0\0\0abc\0")
    assert damage(path) is None
    path.write_bytes(data + b"LIST\x04\0\0\0INFO" + bytes(12))
    assert "goes on" in str(damage(path))


def pages(data: bytes) -> list[bytes]:
    return [b"OggS" + page for page in data.split(b"OggS")[1:]]


def test_ogg_pages_are_looked_at_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.ogg"
    data = written(path, format="OGG", subtype="VORBIS")
    assert damage(path) is None
    whole = pages(data)
    assert len(whole) > 5
    for name, bad, reason in (
        ("byte", data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "and its checksum do not agree"),
        ("page lost", b"".join(whole[:3] + whole[4:]), "pages are missing"),
        ("page twice", b"".join([*whole[:4], *whole[3:]]), "pages are missing"),
        ("last lost", b"".join(whole[:-1]), "does not end the stream"),
        ("within", data[:-100], "ends within an Ogg page"),
        ("junk behind", data + b"junk", "no Ogg page"),
        ("junk between", b"".join([*whole[:3], b"\0", *whole[3:]]), "no Ogg page"),
    ):
        path.write_bytes(bad)
        assert reason in str(damage(path)), name
        refusal(path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
def test_recordings_as_they_are_found_have_no_damage() -> None:
    files = [path for path in SHARED.rglob("*") if path.suffix in (".ogg", ".wav", ".flac")]
    assert len(files) > 100
    assert {path: damage(path) for path in files if damage(path)} == {}


# what a file would unpack to


def test_a_small_file_that_would_fill_the_memory_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence is next to nothing in FLAC: here 40 bytes of samples for each byte of the file."""
    path = tmp_path / "a.flac"
    size = len(written(path, np.zeros((1 << 20, 2), np.int16)))
    assert 32 * size < 8 << 20
    monkeypatch.setattr(audio, "UNPACKED", 4 << 20)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(DataError, match="would unpack to 8,388,608 bytes of samples, more than 4,194,304"):
        read_windows(path, rate=RATE, channels=2, seconds=1.0)


def test_what_is_as_large_on_disk_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "UNPACKED", 1000)
    written(tmp_path / "a.wav", subtype="PCM_16")
    assert read_windows(tmp_path / "a.wav", rate=RATE, channels=2, seconds=5.0).shape == (1, 2, FRAMES)


@pytest.mark.parametrize("rate", [1, 3, 2_147_483_646])
def test_a_sample_rate_that_makes_much_of_little_is_refused(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "a.wav"
    data = bytearray(written(path, subtype="PCM_16"))
    data[24:28] = struct.pack("<I", rate)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.wav: (would unpack|sample rate \d+ Hz, which cannot be converted)"):
        read_audio(path, rate=48_001, channels=2, seconds=1.0, resample=True, pad=True, crop=True)
