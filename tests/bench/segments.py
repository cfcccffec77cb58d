"""Measure what a teacher of two segments costs by each `join`: a batch of two pairs of 10 s at 48 kHz, width 1.

    python tests/bench/segments.py

Medians of interleaved repeats of process time on one thread. A step is what is left to do once the frames are kept.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import kdlib
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN
from kdlib_asc.sources import MultiSegment

PAIRS = 2
REPEATS = 5
DRAWS = 16


def medians(parts: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float, float]]:
    """Return median, least and largest time of each part in seconds."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(REPEATS + 1):
        for name, part in parts.items():
            started = time.process_time()
            part()
            if repeat:  # the first is warming up
                times[name].append(time.process_time() - started)
    return {name: (statistics.median(all_), min(all_), max(all_)) for name, all_ in times.items()}


def measured(model: nn.Module, x: Tensor, axis: int) -> None:
    """Print a line for one network."""
    part = kdlib.TensorPart(x, [0] * len(x))
    teacher = kdlib.freeze(model)
    sources = {
        join: MultiSegment(teacher, part, segments=2, join=join, view="clean", time_axis=axis)
        for join in ("input", "frames", "exact")
    }
    stride = model.junction.stride
    whole = kdlib.TensorPart(x.narrow(axis, 0, x.shape[axis] // stride * stride), part.labels)
    batches = {
        join: next(kdlib.Loader(source.dataset(whole), batch=PAIRS, shuffle=False).epoch(0))
        for join, source in sources.items()
    }
    parts: dict[str, Callable[[], object]] = {
        join: (lambda join=join: sources[join](batches[join])) for join in sources
    }
    parts["encode"] = lambda: teacher.encode(whole.x[:PAIRS])
    taken = medians(parts)
    exact, truth = (sources[join](batches[join]) for join in ("exact", "input"))
    off = max(float((exact[name] - truth[name]).abs().max() / truth[name].abs().max()) for name in truth)
    print(f"{type(model).__name__}, {PAIRS} pairs, milliseconds (least to largest):")
    for name, (median, least, most) in taken.items():
        print(f"  {name:7} {1e3 * median:8.2f} ({1e3 * least:.2f} to {1e3 * most:.2f})")
    print(f"  exact from input: {off:.1e} of the largest value")
    for join in ("exact", "frames"):
        step, pair = taken[join][0], taken["input"][0]
        draws = DRAWS * pair / (taken["encode"][0] + DRAWS * step)
        print(f"  {join}: a step {pair / step:.2f} times cheaper, {DRAWS} draws and the encoding {draws:.1f} times")


def main() -> None:
    """Measure both networks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread")
    measured(WaveCNN(classes=10), torch.randn(PAIRS, 2, 479_999), -1)
    measured(SpectrogramCNNGRU(classes=10), torch.randn(PAIRS, 2, 249, 256), -2)


if __name__ == "__main__":
    main()
