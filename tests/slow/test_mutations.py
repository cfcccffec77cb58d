"""Sound files with bytes changed, cut out and put in: no crash, no hang, and no other length without a word."""

import faulthandler
import multiprocessing
import signal
import time

import numpy as np
import pytest
import soundfile

from kdlib import DataError
from kdlib_asc.audio import _decode, read_audio

COUNT = 300
RATE, FRAMES = 16_000, 24_000
PATIENCE = 5.0
"""Seconds that a file may take."""
FORMATS = {
    "WAV": {"format": "WAV", "subtype": "PCM_16"},
    "FLAC": {"format": "FLAC", "subtype": "PCM_16"},
    "OGG": {"format": "OGG", "subtype": "VORBIS"},
}


def sound():
    draw = np.random.default_rng(0)
    time = np.arange(FRAMES) / RATE
    tones = 0.3 * np.sin(2 * np.pi * np.outer(time, [440, 554]))
    return (tones + draw.normal(0, 0.05, (FRAMES, 2))).astype(np.float32)


def mutated(good, draw):
    """Return a file with one to three changes, half of them within its first 200 bytes, where headers lie."""
    data = bytearray(good)
    for _ in range(draw.integers(1, 4)):
        end = min(200, len(data)) if draw.random() < 0.5 else len(data)
        at = int(draw.integers(0, max(1, end)))
        some = int(draw.integers(1, 64))
        match draw.choice(["bit", "byte", "number", "cut", "remove", "insert", "repeat", "zero"]):
            case "bit":
                data[at] ^= 1 << int(draw.integers(8))
            case "byte":
                data[at] = int(draw.integers(256))
            case "number":
                value = int(draw.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, int(draw.integers(1 << 32))]))
                data[at : at + 4] = value.to_bytes(4, str(draw.choice(["big", "little"])))
            case "cut":
                del data[int(draw.integers(0, len(data))) :]
            case "remove":
                del data[at : at + some]
            case "insert":
                data[at:at] = draw.bytes(some)
            case "repeat":
                data[at:at] = data[at : at + some]
            case "zero":
                data[at : at + some] = bytes(len(data[at : at + some]))
        if not data:
            break
    return bytes(data)


def look(folder, seed, name, say):
    """Read mutated files one by one, saying for each, before and after, what came of it."""
    faulthandler.enable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a decoder that hangs
    (folder / "good").write_bytes(b"")
    soundfile.write(folder / "good", sound(), RATE, **FORMATS[name])
    good = (folder / "good").read_bytes()
    draw = np.random.default_rng(seed)
    for number in range(COUNT):
        path = folder / f"{number}"
        data = mutated(good, draw)
        path.write_bytes(data)
        started = time.perf_counter()
        signal.alarm(int(2 * PATIENCE))
        try:
            read_audio(path, rate=RATE, channels=2, seconds=FRAMES / RATE, pad=True, crop=True, resample=True)
            samples, _ = _decode(path)
            outcome = "same" if data == good else "read" if len(samples) == FRAMES else f"{len(samples)} frames"
        except DataError as error:
            outcome = "refused" if str(error).startswith(f"{path}: ") else f"unnamed: {error}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        say((number, outcome, time.perf_counter() - started))
        path.unlink()
    say(None)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_sound_files(tmp_path, table, name, seed):
    context = multiprocessing.get_context("spawn")
    ear, mouth = context.Pipe(duplex=False)
    process = context.Process(target=look, args=(tmp_path, seed, name, mouth.send))
    process.start()
    mouth.close()
    heard = []
    try:
        while (one := ear.recv()) is not None:
            heard.append(one)
    except EOFError:
        pass
    process.join(60)
    assert process.exitcode == 0, f"it died at the file after {heard[-1:]}"
    outcomes = [outcome for _, outcome, _ in heard]
    slowest = max(seconds for *_, seconds in heard)
    refused, read, same = (outcomes.count(one) for one in ("refused", "read", "same"))
    figure = f"{refused} refused by name, {read} read at their length, {same} unchanged, slowest {slowest:.2f} s"
    table(f"mutated {name}, seed {seed}", figure, len(heard))
    assert len(heard) == COUNT
    assert {outcome for outcome in outcomes if outcome not in ("refused", "read", "same")} == set()
    assert slowest < PATIENCE
