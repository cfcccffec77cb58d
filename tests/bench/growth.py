"""Measure how a step's time and memory grow with the teacher's segments, the batch and the length of the clips.

    python tests/bench/growth.py docs/results/growth.jsonl

A student of width 1/4 in fp32 under a teacher of the same width (two segments unless they are what grows, join
"input"), clips of 10 s at 48 kHz, 8 a batch. Each size is a process of its own and a line of the file: the median
process time of a step on one thread, and the bytes by which the process grew at most, with an allocator that keeps its
memory and with one that gives it back. What is there is not measured again. At the end growth.png and growth.md are
made beside the file.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import NETWORKS, clips, network
from records import ALLOCATORS, having, machine, note, status

import kdlib
from kdlib_asc.points import HiddenMse
from kdlib_asc.sources import MultiSegment

WIDTH = 0.25
STEPS = 5
USUAL = {"segments": 2, "batch": 8, "seconds": 10}
SIZES = {"segments": (1, 2, 3, 4, 5, 6), "batch": (1, 2, 5, 10, 20, 40), "seconds": (10, 20, 30, 40, 50, 60)}


def measured(kind: str, segments: int, batch: int, seconds: int) -> dict[str, Any]:
    """Return the median seconds of a step, and by how many bytes this process grew at most."""
    x = clips(kind, batch, seconds)
    teacher = kdlib.freeze(network(kind, width=WIDTH))
    source = MultiSegment(
        teacher,
        kdlib.TensorPart(x, [0] * batch),
        segments=segments,
        join="input",
        repeat=True,
        time_axis=-1 if kind == "raw" else -2,
    )
    distiller = kdlib.Distiller(network(kind, seed=1, width=WIDTH), source, hidden=HiddenMse())
    optimizer = distiller.attach(torch.optim.Adam(distiller.parameters()))
    rows = {"x": x, "y": torch.arange(batch) % 10, "index": torch.arange(batch)}
    if segments > 1:
        rows["partners"] = torch.stack([clips(kind, batch, seconds)] * (segments - 1), dim=1)
    before, taken = status("VmRSS"), []
    for step in range(STEPS + 1):
        started = time.process_time()
        total = distiller(rows).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step:  # the first warms up
            taken.append(time.process_time() - started)
    return {"seconds": statistics.median(taken), "bytes": status("VmHWM") - before}


def measure(path: Path) -> None:
    """Measure what is missing."""
    points = ({**USUAL, what: size} for what, sizes in SIZES.items() for size in sizes)
    for point, kind, allocator in itertools.product(points, NETWORKS, ("thresholds", "glibc")):
        if having(path, network=kind, allocator=allocator, **point):
            continue
        command = [sys.executable, __file__, "--one", kind, json.dumps(point)]
        environment = {**os.environ, **ALLOCATORS[allocator]}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"{kind}, {point}: {ran.stderr}")
        note(path, network=kind, allocator=allocator, **point, cost=json.loads(ran.stdout))
        print(kind, allocator, point, ran.stdout, end="", flush=True)


def series(path: Path, kind: str, allocator: str, what: str, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the sizes in which this grows, and the costs."""
    others = {key: value for key, value in USUAL.items() if key != what}
    by_size = {one[what]: one["cost"][cost] for one in having(path, network=kind, allocator=allocator, **others)}
    return np.array(sorted(by_size), dtype=float), np.array([by_size[size] for size in sorted(by_size)])


def fitted(sizes: np.ndarray, costs: np.ndarray) -> tuple[float, float, float]:
    """Return the constant and the slope of the line through the costs, and its largest distance from one of them."""
    slope, constant = np.polyfit(sizes, costs, 1)
    return constant, slope, float(np.abs(constant + slope * sizes - costs).max() / costs.max())


def slope_of(sizes: np.ndarray, costs: np.ndarray) -> float:
    """Return the slope in logarithms: 1 is proportional, above 1 is worse than linear."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def draw(path: Path) -> None:
    """Draw time and memory over each size, and write the fits beside the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    lines = ["| network | what grows | cost | smallest | largest | slope | from a line, at most | slope, glibc |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|"]
    labels = {"segments": "segments of the teacher", "batch": "clips a batch", "seconds": "seconds a clip"}
    for column, what in enumerate(SIZES):
        for row, (cost, unit, scale) in enumerate((("seconds", "s a step", 1), ("bytes", "GB", 1e9))):
            axis = axes[row, column]
            for kind, colour in zip(NETWORKS, ("tab:blue", "tab:orange"), strict=True):
                sizes, costs = series(path, kind, "thresholds", what, cost)
                plain, dear = series(path, kind, "glibc", what, cost)
                costs, dear = costs / scale, dear / scale
                constant, slope, off = fitted(sizes, costs)
                axis.plot(sizes, costs, "o", color=colour, label=kind)
                axis.plot(sizes, constant + slope * sizes, "-", color=colour, linewidth=1, alpha=0.6)
                axis.plot(plain, dear, "o", color=colour, fillstyle="none", label=f"{kind}, glibc as it comes")
                ends = f"{labels[what]}, {sizes[0]:g} to {sizes[-1]:g} | {unit} | {costs[0]:.2f} | {costs[-1]:.2f}"
                slopes = slope_of(sizes, costs), slope_of(plain, dear)
                lines.append(f"| {kind} | {ends} | {slopes[0]:.2f} | {100 * off:.0f} % | {slopes[1]:.2f} |")
            axis.set_xlabel(labels[what])
            axis.set_ylabel(unit)
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=100)
    text = (
        f"Networks of width {WIDTH:g} in fp32, the student under a teacher of two segments with join input, 8 clips of "
        f"10 s at 48 kHz a batch, but for what grows; median process time of {STEPS} steps on one thread, and by how "
        "much the process grew at most. Full points and the first columns: glibc with both thresholds at 1 GiB, and "
        "the least-squares line. Hollow points and the last column: glibc as it comes. Slope: of the logarithms, 1 is "
        "proportional to the size, below 1 there is a part that does not grow. From a line: the largest distance from "
        f"it, of the largest cost. {machine()}.\n\n"
        "`python tests/bench/growth.py docs/results/growth.jsonl` makes this page, and goes on where it stopped."
    )
    path.with_suffix(".md").write_text("\n".join(lines) + f"\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["--one", kind, point]:
            print(json.dumps(measured(kind, **json.loads(point))))
        case [name]:
            measure(Path(name))
            draw(Path(name))
