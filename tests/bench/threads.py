"""Measure what the number of threads makes of a training step, with one process on the machine and with one a core.

    python tests/bench/threads.py docs/results/threads.jsonl

Wall time, so the machine must do nothing else. The numbers of threads take turns; processes that stand side by side
start together, and each tells its median step. Each turn is a line of the file, and what is there is not measured
again. At the end the table is written beside the file (threads.md).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, clips, laid_out, network, training
from records import found, having, machine, note

CORES = len(os.sched_getaffinity(0))
WAYS = ((1, 1), (1, CORES), (1, 2 * CORES), (CORES, 1), (CORES, CORES))
"""Processes, and threads of each."""
TURNS = 5
SECONDS = 12
"""How long each process trains in a turn."""


def step(kind: str, threads: int) -> float:
    """Return the median seconds of a step in bf16, of those that begin within the time."""
    torch.set_num_threads(threads)
    once = training(*laid_out(network(kind), clips(kind)), bf16=True)
    once()
    ends, taken = time.perf_counter() + SECONDS, []
    while (started := time.perf_counter()) < ends:
        once()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def side_by_side(kind: str, processes: int, threads: int) -> float:
    """Return the median step over processes that train at the same time."""
    command = [sys.executable, __file__, "--one", kind, str(threads)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    told = [process.communicate()[0] for process in running]
    return statistics.median(map(float, told))


def measure(path: Path) -> None:
    """Measure what is missing."""
    for kind in NETWORKS:
        for turn in range(TURNS):
            for processes, threads in WAYS:
                keys = {"network": kind, "turn": turn, "processes": processes, "threads": threads}
                if not having(path, **keys):
                    note(path, **keys, seconds=side_by_side(kind, processes, threads))


def table(records: list[dict[str, Any]]) -> str:
    """Return the steps of all processes together in a second, beside those of one process with a thread a core."""
    lines = [
        "| network | processes | threads of each | a step, s | steps of all, 1/s | to one process, a thread a core |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for kind in NETWORKS:
        taken = {
            way: {
                record["turn"]: record["seconds"]
                for record in records
                if (record["network"], record["processes"], record["threads"]) == (kind, *way)
            }
            for way in WAYS
        }
        usual = taken[1, CORES]
        for (processes, threads), seconds in taken.items():
            ratios = sorted(processes * usual[turn] / seconds[turn] for turn in seconds)
            median = statistics.median(seconds.values())
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            lines.append(f"| {kind} | {processes} | {threads} | {median:.3f} | {processes / median:.2f} | {spread} |")
    return "\n".join(lines)


def write(path: Path) -> None:
    """Write the table beside the file."""
    text = (
        "Width 1, bf16 in channels_last, hard labels, Adam, 8 clips of 10 s at 48 kHz a step; wall time, the median "
        f"of {TURNS} turns of {SECONDS} s, in which the numbers of threads alternate. {machine()}.\n\n"
        "`python tests/bench/threads.py docs/results/threads.jsonl` makes this page, and goes on where it stopped."
    )
    path.with_suffix(".md").write_text(f"{table(found(path))}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--one", kind, threads]:
            print(step(kind, int(threads)))
        case [name]:
            measure(Path(name))
            write(Path(name))
