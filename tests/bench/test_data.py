"""What loading, features and stores cost, and whether a training waits for its data."""

import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import kdlib
from kdlib.cache import Cache
from kdlib.featured import Featured
from kdlib.store import make_store
from kdlib_asc.backbones import SpectrogramCNNGRU
from kdlib_asc.datasets import folder
from kdlib_asc.features import Spectrogram

pytestmark = pytest.mark.timeout(3600)
RATE = 48000
TURN = 20


def test_log_mel_beside_librosas(compare):
    librosa = pytest.importorskip("librosa")
    samples = 0.1 * torch.randn(2, 10 * RATE)
    features = Spectrogram(rate=RATE, coefficients=256, standardise=False)
    window, hop = 4800, 1920
    padded = np.pad(samples.numpy(), [(0, 0), (0, window + 248 * hop - 10 * RATE)])
    settings = {"n_fft": window, "hop_length": hop, "window": "hann", "center": False}
    filters = librosa.filters.mel(sr=RATE, n_fft=window, n_mels=256, htk=True, norm=None)

    def whole():
        power = librosa.feature.melspectrogram(
            y=padded, sr=RATE, power=2.0, n_mels=256, htk=True, norm=None, **settings
        )
        return np.log(np.maximum(power, 1e-10)).swapaxes(-1, -2)

    def with_filters_made_before():
        power = np.abs(librosa.stft(padded, **settings)) ** 2
        return np.log(np.maximum(filters @ power, 1e-10)).swapaxes(-1, -2)

    ours = features(samples).numpy()
    off = max(float(np.abs(ours - theirs()).max()) for theirs in (whole, with_filters_made_before))
    assert off <= 1e-4
    parts = {
        "kdlib_asc": lambda: features(samples) is None and None,
        "librosa.feature.melspectrogram": lambda: whole() is None and None,
        "librosa.stft and filters made before": lambda: with_filters_made_before() is None and None,
    }
    repeated = {name: lambda part=part: [part() for _ in range(10)] and None for name, part in parts.items()}
    ours = {"kdlib_asc": repeated.pop("kdlib_asc")}
    what = "log-mel of 10 s of stereo at 48 kHz, 2 x 249 x 256"
    compare("log-mel", what, ours, repeated, unit=0.1, rounds=11, checked=lambda part: f"equal to {off:.0e}")


@pytest.fixture
def clips(tmp_path):
    """A folder of recordings of 10 s: 24 bits, stereo, 48 kHz, as the DCASE sets have them."""
    import soundfile

    drawn = np.random.default_rng(0)
    for scene in ("bus", "park"):
        (tmp_path / "clips" / scene).mkdir(parents=True)
        for number in range(16):
            path = tmp_path / "clips" / scene / f"{scene}{number}__0.wav"
            soundfile.write(path, 0.1 * drawn.standard_normal((10 * RATE, 2)), RATE, subtype="PCM_24")
    return folder(root=tmp_path / "clips", rate=RATE, seconds=10.0, keep_in_memory=False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cached_features_beside_decoding_and_computing(compare, clips, tmp_path, dtype):
    features = Spectrogram(rate=RATE, coefficients=256)
    features.fit(clips.train[-1, index]["x"] for index in range(4))
    cached = Featured(clips.train, features, cache=Cache(tmp_path / "cache", dtype))
    count = len(clips.train)

    def turn(read):
        def some():
            for number in range(TURN):
                read(number % count)

        return some

    worst = max(
        float((cached[0, index]["x"] - features(clips.train[-1, index]["x"])).abs().max()) for index in range(count)
    )
    assert worst <= (0 if dtype == "float32" else 0.01)
    ours = {f"cached as {dtype}": turn(lambda index: cached[0, index])}
    theirs = {"decoding 24-bit WAV and log-mel": turn(lambda index: features(clips.train[-1, index]["x"]))}
    what = "an item, 10 s of stereo at 48 kHz as 2 x 249 x 256"
    compare("cached", what, ours, theirs, unit=1 / TURN, checked=lambda part: f"differ by {worst:.1g}")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_share_of_a_training_that_waits_for_cached_features(keep, clips, tmp_path, workers):
    features = Spectrogram(rate=RATE, coefficients=256)
    features.fit(clips.train[-1, index]["x"] for index in range(4))
    cached = Featured(clips.train, features, cache=Cache(tmp_path / "cache"))
    student = kdlib.Distiller(SpectrogramCNNGRU(classes=2), hard=kdlib.HardLabels())
    history = kdlib.fit(student, cached, epochs=3, batch=8, workers=workers, threads=1, progress=False)
    shares = [100 * record["waiting"] for record in history.epochs[1:]]  # workers start in the first
    keep(
        f"waiting, {workers} workers",
        what="share of the steps' time spent waiting for cached features, full spectrogram network, batch of 8, "
        + ("a worker" if workers else "loaded between the steps"),
        value=f"{sorted(shares)[len(shares) // 2]:.2f} % (epochs: {min(shares):.2f} to {max(shares):.2f} %)",
    )


def test_a_random_batch_of_a_million_rows_beside_a_file_each(compare, tmp_path):
    rows, batch = 1_000_000, 40
    one = {"logits": np.zeros(10, np.float32), "embedding": np.zeros(64, np.float32)}
    store = make_store(tmp_path / "store", {"what": "benchmark"}, rows=rows, row=lambda: one)
    drawn = np.random.default_rng(0)
    for shard in range(store.shards):
        count = len(store.span(shard))
        arrays = {name: drawn.standard_normal((count, *array.shape), np.float32) for name, array in one.items()}
        store.write(shard, arrays)
    for shard in range(store.shards):
        store.check(shard)
    files = 4000  # fewer than there are rows, which favours them
    (tmp_path / "files").mkdir()
    for row in range(files):
        kept = {name: torch.from_numpy(array) for name, array in store[row].items()}
        torch.save(kept, tmp_path / "files" / f"{row}.pt")
    orders = [drawn.integers(rows, size=batch).tolist() for _ in range(1000)]
    few = [[row % files for row in order] for order in orders[:5]]

    def taken():
        for order in orders:
            store.take(order)

    def loaded():
        for order in few:
            items = [torch.load(tmp_path / "files" / f"{row}.pt") for row in order]
            {name: torch.stack([item[name] for item in items]) for name in one}

    ours = {"one store": lambda: timed(taken) / len(orders)}
    theirs = {"one .pt file a row": lambda: timed(loaded) / len(few)}
    what = f"a random batch of {batch} from {rows:,} rows of 10 logits and 64 dimensions, in the page cache"
    compare("store", what, ours, theirs, cheaper=True)


def timed(work):
    started = time.process_time()
    work()
    return time.process_time() - started


def test_importing_kdlib_beside_importing_torch(compare, keep):
    def importing(code):
        def run():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            times[code].append(taken)
            return taken

        return run

    codes = ("import torch, kdlib", "import torch")
    times = {code: [] for code in codes}
    ours, theirs = ({code: importing(code)} for code in codes)
    compare("import", "a process", ours, theirs, rounds=11)
    beyond = sorted(ours - alone for ours, alone in zip(*times.values(), strict=True))
    keep(
        "import beyond",
        what="`import kdlib` beyond `import torch`, CPU time of a process",
        value=f"{beyond[len(beyond) // 2]:.2f} s ({beyond[0]:.2f} to {beyond[-1]:.2f})",
    )
