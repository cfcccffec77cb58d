"""read_audio against files made with soundfile, whole and damaged."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from kdlib import DataError, KdlibError
from kdlib_asc.audio import Form, FormError, audio_extensions, fitting, read_audio, read_windows

RATE = 8000


def noise(frames: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (frames, channels)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options: Any) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


def read(path: Path, **settings: Any) -> torch.Tensor:
    return read_audio(path, **{"rate": RATE, "channels": 1, "seconds": 0.5, **settings})


def test_samples_of_a_24_bit_stereo_file_come_out_exact_and_channels_first(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(-(2**23), 2**23, (4000, 2))
    x = read(write(tmp_path / "a.wav", (values * 256).astype(np.int32), subtype="PCM_24"), channels=2)
    assert x.shape == (2, 4000)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    np.testing.assert_array_equal(x.numpy(), (values.T / 2**23).astype(np.float32))


def test_wanted_length_is_the_rounded_product_of_seconds_and_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(3001))
    assert read(path, seconds=0.3751).shape == (1, 3001)


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    assert read_audio(str(write(tmp_path / "a.wav", noise(80))), rate=RATE, channels=1, seconds=0.01).shape == (1, 80)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.wav: no such file"):
        read(tmp_path / "gone.wav")


def test_directory_with_the_name_of_a_clip(tmp_path: Path) -> None:
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(DataError, match=r"a\.wav: not a file"):
        read(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["text.wav", "empty.wav", "raw.raw"])
def test_file_that_is_no_audio(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"" if "empty" in name else b"these are words, not samples\n" * 9)
    with pytest.raises(DataError, match=rf"{name}: not readable as audio"):
        read(tmp_path / name)


def test_header_without_samples_has_zero_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(4000))
    path.write_bytes(path.read_bytes()[:44])
    with pytest.raises(DataError, match=r"a\.wav: zero frames"):
        read(path, pad=True)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "WAV", "subtype": "PCM_24"},
        {"format": "WAV", "subtype": "FLOAT"},
        {"format": "WAV", "subtype": "PCM_16", "endian": "BIG"},
        {"format": "WAVEX", "subtype": "PCM_16"},
        {"format": "RF64", "subtype": "PCM_16"},
        {"format": "AIFF", "subtype": "PCM_16"},
        {"format": "OGG", "subtype": "VORBIS"},
    ],
    ids=lambda options: "-".join(options.values()),
)
@pytest.mark.parametrize("lost", [1, 0.5])
def test_truncated_file_that_soundfile_reads_without_an_error(
    tmp_path: Path, options: dict[str, Any], lost: float
) -> None:
    path = write(tmp_path / "clip", noise(40000), **options)
    whole = path.read_bytes()
    assert read(path, seconds=5).shape == (1, 40000)
    path.write_bytes(whole[: -int(lost * len(whole) if lost < 1 else lost)])
    soundfile.read(path)
    with pytest.raises(DataError, match=r"clip: truncated: "):
        read(path, pad=True, crop=True)


def test_ogg_cut_between_two_pages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ogg", noise(40000))
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"OggS")])
    soundfile.read(path)
    with pytest.raises(DataError, match="truncated: its last Ogg page does not end the stream"):
        read(path, pad=True, crop=True)


@pytest.mark.skipif("MP3" not in soundfile.available_formats(), reason="this libsndfile has no MP3")
def test_file_that_reads_shorter_than_its_header_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp3", noise(40000))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"truncated: the header states 40000 frames, \d+ could be read"):
        read(path, pad=True, crop=True)


def test_truncated_flac(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", noise(4000))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"a\.flac: (truncated|not readable)"):
        read(path, pad=True)


def test_header_that_promises_more_frames_than_there_is_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", noise(4000))
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F
    data[22:26] = b"\xff\xff\xff\xff"  # 2^36 - 1 samples
    path.write_bytes(data)
    assert soundfile.info(path).frames == 2**36 - 1
    with pytest.raises(DataError, match=r"a\.flac: would unpack to 274,877,906,940 bytes of samples, more than"):
        read(path, crop=True)


def with_chunk_before_data(path: Path, chunk: bytes) -> None:
    data = path.read_bytes()
    at = data.index(b"data")
    body = data[8:at] + chunk + data[at:]
    path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)


def test_chunk_of_odd_length_before_the_samples_is_padded_to_even(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(4000))
    with_chunk_before_data(path, b"junk" + (3).to_bytes(4, "little") + b"abc\0")
    assert read(path).shape == (1, 4000)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="truncated: the header states 8000 bytes of samples, the file has 7990"):
        read(path, pad=True)


def test_bytes_after_the_samples_are_no_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(4000))
    path.write_bytes(path.read_bytes() + b"LIST" + (4).to_bytes(4, "little") + b"abcd")
    assert read(path).shape == (1, 4000)


def test_wav_from_a_pipe_does_not_state_its_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(4000))
    data = path.read_bytes()
    at = data.index(b"data") + 4
    path.write_bytes(data[:at] + b"\xff" * 4 + data[at + 4 :])
    assert read(path).shape == (1, 4000)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "1 samples are NaN and 0 are Inf"), (-np.inf, "1 are Inf")])
def test_one_sample_that_is_not_finite(tmp_path: Path, value: float, message: str) -> None:
    samples = noise(4000)
    samples[1234] = value
    with pytest.raises(DataError, match=rf"a\.wav: .*{message}"):
        read(write(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_double_beyond_the_range_of_float32_is_infinite(tmp_path: Path) -> None:
    samples = noise(4000).astype(np.float64)
    samples[7] = 1e300
    with pytest.raises(DataError, match="1 are Inf"):
        read(write(tmp_path / "a.wav", samples, subtype="DOUBLE"))


@pytest.mark.parametrize(("peak", "accepted"), [(-8.0, True), (-8.1, False), (32767.0, False)])
def test_samples_beyond_eight_times_full_scale(tmp_path: Path, peak: float, accepted: bool) -> None:
    samples = noise(4000)
    samples[99] = peak
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    if accepted:
        assert read(path).abs().max() == 8
    else:
        with pytest.raises(DataError, match=r"a\.wav: samples of up to .*, expected at most 8"):
            read(path)


def test_wrong_rate_names_both_and_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.wav: sample rate 16000 Hz, expected 8000 Hz \(data\.resample=true"):
        read(write(tmp_path / "a.wav", noise(8000), rate=16000))


def test_all_that_is_wrong_with_one_clip_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "a.wav", noise(16000, 2), rate=16000))
    for word in ("data.resample=true", "data.down_mix=true", "data.crop=true"):
        assert word in str(caught.value)


def test_down_mix_is_the_mean_of_the_channels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(4000, 3), subtype="FLOAT")
    with pytest.raises(DataError, match=r"channels: 3, expected 1 \(data\.down_mix=true"):
        read(path)
    np.testing.assert_allclose(read(path, down_mix=True).numpy()[0], noise(4000, 3).mean(axis=1), atol=1e-7)


@pytest.mark.parametrize(("found", "wanted"), [(1, 2), (6, 2)])
def test_down_mix_makes_no_second_channel_and_no_two_of_six(tmp_path: Path, found: int, wanted: int) -> None:
    path = write(tmp_path / "a.wav", noise(4000, found))
    with pytest.raises(DataError, match=rf"channels: {found}, expected {wanted} \(data\.channels={found}"):
        read(path, channels=wanted, down_mix=True)


def test_one_sample_too_short_is_refused_or_padded_with_a_zero_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(3999), subtype="FLOAT")
    with pytest.raises(
        DataError, match=r"too short: 3999 samples, expected 4000 \(0\.5 s at 8000 Hz\) \(data\.pad=true"
    ):
        read(path, crop=True)
    x = read(path, pad=True)[0].numpy()
    np.testing.assert_array_equal(x[:-1], noise(3999)[:, 0])
    assert x[-1] == 0


def test_one_sample_too_long_is_refused_or_cut_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(4001), subtype="FLOAT")
    with pytest.raises(DataError, match=r"too long: 4001 samples, expected 4000 .*data\.crop=true"):
        read(path, pad=True)
    np.testing.assert_array_equal(read(path, crop=True)[0].numpy(), noise(4001)[:-1, 0])


@pytest.mark.parametrize(("found", "wanted"), [(44100, 48000), (48000, 44100), (8000, 44100), (11025, 8000)])
def test_resampled_tone_is_the_tone_at_the_other_rate(tmp_path: Path, found: int, wanted: int) -> None:
    def tone(rate: int) -> np.ndarray:
        return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(0.2 * rate)) / rate)

    path = write(tmp_path / "a.wav", tone(found), rate=found, subtype="FLOAT")
    x = read(path, rate=wanted, seconds=0.2, resample=True)[0].numpy()
    inner = slice(len(x) // 10, -len(x) // 10)  # the filter's ends see silence beyond the clip
    np.testing.assert_allclose(x[inner], tone(wanted)[inner], atol=2e-3)


@pytest.mark.parametrize(("found", "wanted"), [(44100, 48000), (48000, 44100), (8000, 44100), (44100, 16000)])
@pytest.mark.parametrize("seconds", [0.1, 0.12345, 0.33333])
def test_resampled_length_within_rounding_needs_neither_pad_nor_crop(
    tmp_path: Path, found: int, wanted: int, seconds: float
) -> None:
    path = write(tmp_path / "a.wav", noise(round(seconds * found)), rate=found)
    x = read(path, rate=wanted, seconds=seconds, resample=True)
    assert x.shape == (1, round(seconds * wanted))


@pytest.mark.parametrize(("extra", "setting"), [(-20, "pad"), (20, "crop")])
def test_resampled_length_beyond_rounding_is_refused(tmp_path: Path, extra: int, setting: str) -> None:
    path = write(tmp_path / "a.wav", noise(8820 + extra), rate=44100)
    settings: dict[str, Any] = {"rate": 48000, "seconds": 0.2, "resample": True}
    with pytest.raises(DataError, match=rf"data\.{setting}=true"):
        read(path, **settings)
    assert read(path, **settings, **{setting: True}).shape == (1, 9600)


def test_same_rate_with_resample_on_grants_no_slack(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too long"):
        read(write(tmp_path / "a.wav", noise(4001)), resample=True)


def test_length_that_rounds_to_no_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.seconds=1e-06"):
        read(tmp_path / "a.wav", seconds=1e-6)


def test_missing_soundfile_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", noise(4000))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(KdlibError, match=r"pip install 'kdlib-asc\[asc\]'"):
        read(path)


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        ([(48000, 2, 480000)] * 3, {"rate": 48000, "channels": 2, "seconds": 10.0}),
        ([(8000, 1, 1000)], {"rate": 8000, "channels": 1, "seconds": 0.125}),
        (
            [(44100, 1, 220500)] * 3 + [(44100, 2, 220500)],
            {"rate": 44100, "channels": 1, "seconds": 5.0, "down_mix": True},
        ),
        (
            [(44100, 2, 44100)] * 3 + [(48000, 2, 48000)],
            {"rate": 44100, "channels": 2, "seconds": 1.0, "resample": True},
        ),
        (
            [(100, 1, 300), (100, 1, 400), (100, 1, 500)],
            {"rate": 100, "channels": 1, "seconds": 4.0, "pad": True, "crop": True},
        ),
    ],
)
def test_settings_that_fit_clips_of_some_forms(forms: list[tuple[int, int, int]], expected: dict[str, Any]) -> None:
    assert fitting([Form(*form) for form in forms]) == expected


@pytest.mark.parametrize("seed", range(5))
def test_settings_that_fit_read_every_clip(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    forms = [
        Form(int(draw.choice([8000, 11025])), int(draw.integers(1, 3)), int(draw.integers(50, 9000))) for _ in "1234"
    ]
    paths = [
        write(tmp_path / f"{number}.wav", noise(form.frames, form.channels), form.rate)
        for number, form in enumerate(forms)
    ]
    settings = fitting(forms)
    for path in paths:
        read_audio(path, **settings)


def test_error_of_another_form_tells_both(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(100, 2), 11025)
    with pytest.raises(FormError) as caught:
        read(path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.found, again.wanted) == (Form(11025, 2, 100), Form(8000, 1, 4000))
    assert str(again) == str(caught.value)


def test_extensions_are_those_of_containers_that_tell_their_rate() -> None:
    assert {".wav", ".flac", ".ogg", ".aif", ".mp3"} <= audio_extensions()
    assert ".raw" not in audio_extensions()
    assert ".txt" not in audio_extensions()


def test_importing_the_readers_and_the_scorer_imports_no_audio_and_no_svm_library() -> None:
    code = (
        "import sys, kdlib_asc.audio, kdlib_asc.datasets, kdlib_asc.scoring\n"
        "print([name for name in ('soundfile', 'scipy', 'sklearn') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


# windows


def windows(path: Path, **settings: Any) -> torch.Tensor:
    return read_windows(path, **{"rate": RATE, "channels": 1, "seconds": 0.5, **settings})


@pytest.mark.parametrize(("frames", "starts"), [(4000, [0]), (8000, [0, 4000]), (9000, [0, 2500, 5000])])
def test_windows_cover_a_file_from_its_first_to_its_last_sample(tmp_path: Path, frames: int, starts: list[int]) -> None:
    samples = noise(frames)
    found = windows(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    assert found.shape == (len(starts), 1, 4000)
    for window, start in zip(found, starts, strict=True):
        np.testing.assert_array_equal(window[0].numpy(), samples[start : start + 4000, 0])


def test_a_file_shorter_than_a_window_ends_in_zeros(tmp_path: Path) -> None:
    samples = noise(10)
    found = windows(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    np.testing.assert_array_equal(found[0, 0, :10].numpy(), samples[:, 0])
    assert not found[0, 0, 10:].any()


def test_windows_of_another_form_are_refused_or_converted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(16000, channels=2), 2 * RATE)
    with pytest.raises(DataError, match=r"a\.wav: sample rate 16000 Hz.*channels: 2, expected 1"):
        windows(path)
    found = windows(path, resample=True, down_mix=True, seconds=1.0)
    np.testing.assert_array_equal(found[0], read(path, resample=True, down_mix=True, seconds=1.0))
