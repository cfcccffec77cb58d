"""Measure what precision, layout and compilation make of a step's time and memory: width 1, clips of 10 s at 48 kHz.

    python tests/bench/precision.py docs/results/precision.jsonl

Times are process time on one thread, batch 8. The ways of one figure take turns in one process, which is new for each
figure and each allocator: what a large tensor costs depends on what the process freed before. Each repeat is a line of
the file, and what is there is not measured again, so a run that was stopped goes on where it was. Memory is the peak of
a process of its own. At the end the table is written beside the file (precision.md), of what there is.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import BATCH, clips, laid_out, network, training
from records import ALLOCATORS, found, having, machine, note, status
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

import kdlib
from kdlib_asc.points import HiddenMse
from kdlib_asc.sources import MultiSegment

REPEATS = 7
Ways = dict[str, Callable[[], object]]


class BareBlock(nn.Module):
    """A row Res1 to Res7 of Table 2 in torch's own layers, as one would write it."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(before, after, 3, padding=1), nn.BatchNorm1d(after)
        self.conv2, self.norm2 = nn.Conv1d(after, after, 3, padding=1), nn.BatchNorm1d(after)
        self.shortcut = nn.Identity() if before == after else nn.Conv1d(before, after, 1)
        self.pool = nn.MaxPool1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = leaky_relu(self.norm1(self.conv1(x)), 0.3)
        return self.pool(leaky_relu(self.norm2(self.conv2(y)) + self.shortcut(x), 0.3))


class BareWave(nn.Module):
    """Table 2 in torch's own layers; its weights have the names and shapes of WaveCNN's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv1d(2, 64, 12, stride=12), nn.BatchNorm1d(64), nn.LeakyReLU(0.3))
        for row, (before, after) in enumerate([(64, 64), (64, 128), *[(128, 128)] * 5], start=1):
            self.add_module(f"res{row}", BareBlock(before, after))
        self.dense1, self.output = nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for name, row in self.named_children():
            if name not in ("dense1", "output"):
                x = row(x)
        embedding = self.dense1(x.amax(dim=-1))
        return {"logits": self.output(embedding), "embedding": embedding}


def spectrogram_training() -> Ways:
    """Both settings, alone and together, and channels in multiples of 32."""
    x = clips("spectrogram")
    wide = network("spectrogram", multiple=32)
    return {
        "fp32": training(network("spectrogram"), x, False),
        "fp32, channels_last": training(*laid_out(network("spectrogram"), x), False),
        "bf16": training(network("spectrogram"), x, True),
        "bf16, channels_last": training(*laid_out(network("spectrogram"), x), True),
        "bf16, channels_last, multiple = 32": training(*laid_out(wide, x), True),
    }


def checkpointed(kind: str) -> Ways:
    """A tuned step, and the same with what is inside the rows computed again."""
    x = clips(kind)
    return {
        "plain": training(*laid_out(network(kind), x), True),
        "checkpoint_activations": training(*laid_out(network(kind, checkpoint_activations=True), x), True),
    }


def raw_training() -> Ways:
    """Torch's layers and ours, with the same weights."""
    x, bare, ours = clips("raw"), BareWave(), network("raw")
    bare.load_state_dict(ours.state_dict())
    return {
        "Conv1d, fp32": training(bare, x, False),
        "Conv1d, bf16": training(bare_like(bare), x, True),
        "fp32": training(ours, x, False),
        "bf16": training(network("raw"), x, True),
    }


def bare_like(model: nn.Module) -> nn.Module:
    """Return a further network in torch's own layers with these weights."""
    bare = BareWave()
    bare.load_state_dict(model.state_dict())
    return bare


def inference(first: nn.Module, first_name: str, kind: str) -> Ways:
    """Eager in fp32 first, then the settings of a teacher, alone and together."""
    x = clips(kind)

    def teacher(model: nn.Module, **settings: Any) -> Callable[[], object]:
        frozen = kdlib.freeze(model, **settings)
        return lambda: frozen(x)

    under = teacher(network(kind), layout="channels_last")

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            under()

    bf16: Any = {"dtype": torch.bfloat16}
    both: Any = {**bf16, "layout": "channels_last"}
    return {
        first_name: teacher(first),
        "fp32, channels_last": teacher(network(kind), layout="channels_last"),
        "fp32, channels_last, compiled": teacher(network(kind), layout="channels_last", compile=True),
        "bf16": teacher(network(kind), **bf16),
        "bf16, channels_last": teacher(network(kind), **both),
        "bf16, channels_last, compiled": teacher(network(kind), **both, compile=True),
        "under autocast to bf16, channels_last": autocast,
    }


def spectrogram_inference() -> Ways:
    return inference(network("spectrogram"), "fp32", "spectrogram")


def raw_inference() -> Ways:
    return inference(bare_like(network("raw")), "Conv1d, fp32", "raw")


def online_teacher() -> Ways:
    """A student's step in bf16 and channels_last, alone and with a teacher of two segments at work in each."""
    last = torch.channels_last
    x, others = (clip.contiguous(memory_format=last) for clip in clips("spectrogram", 2 * BATCH).split(BATCH))
    part = kdlib.TensorPart(x, [0] * BATCH)
    batch = {"x": x, "y": torch.arange(BATCH) % 10, "index": torch.arange(BATCH), "partners": others.unsqueeze(1)}

    def step(**settings: Any) -> Callable[[], object]:
        source, points = None, {"hard": kdlib.HardLabels()}
        if settings:
            teacher = kdlib.freeze(network("spectrogram"), **settings)
            source = MultiSegment(teacher, part, segments=2, join="input", time_axis=-2)
            points = {"hidden": HiddenMse()}
        distiller = kdlib.Distiller(laid_out(network("spectrogram"), x)[0], source, **points)
        optimizer = distiller.attach(torch.optim.Adam(distiller.parameters(), lr=1e-4))

        def once() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                total = distiller(batch).total
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

        return once

    tuned: Any = {"dtype": torch.bfloat16, "layout": "channels_last"}
    return {
        "no teacher": step(),
        "teacher in fp32": step(dtype=torch.float32, layout="contiguous"),
        "teacher in bf16, channels_last": step(**tuned),
        "teacher in bf16, channels_last, compiled": step(**tuned, compile=True),
        "teacher as the student: autocast, channels_last": step(layout="channels_last"),
    }


def peak(kind: str, way: str, out: str) -> None:
    """Take three steps with 40 clips, print the peak of this process in bytes, and save the state."""
    model = network(kind, checkpoint_activations=CHECKPOINTS in way)
    x = clips(kind, 40)
    bf16 = "bf16" in way
    if bf16:
        model, x = laid_out(model, x)
    step = training(model, x, bf16)
    for _ in range(3):
        step()
    torch.save(model.state_dict(), out)
    print(status("VmHWM"))


FIGURES: dict[str, Callable[[], Ways]] = {
    "spectrogram, training": spectrogram_training,
    "raw, training": raw_training,
    "spectrogram, inference": lambda: inference(network("spectrogram"), "fp32", "spectrogram"),
    "raw, inference": lambda: inference(bare_like(network("raw")), "Conv1d, fp32", "raw"),
    "spectrogram, training under a teacher of 20 s": online_teacher,
    "spectrogram, a step in bf16, channels_last": lambda: checkpointed("spectrogram"),
    "raw, a step in bf16": lambda: checkpointed("raw"),
}
CHECKPOINTS = ", checkpoint_activations"
PEAKS = [way + more for way in ("fp32", "bf16") for more in ("", CHECKPOINTS)]


def timed(way: Callable[[], object]) -> float:
    """Return the process time of a call in seconds."""
    started = time.process_time()
    way()
    return time.process_time() - started


def child(*arguments: str, **variables: str) -> str:
    """Return what this script prints in a process of its own."""
    environment = {**os.environ, **variables}
    ran = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{arguments}: {ran.stderr}")
    return ran.stdout.strip()


def refuse_missing(variables: dict[str, str]) -> None:
    """Stop where an allocator is not there: a process would run without it, and only say so."""
    said = subprocess.run(["true"], env={**os.environ, **variables}, capture_output=True, text=True).stderr
    if said:
        raise SystemExit(said)


def turns(path: Path, figure: str, allocator: str) -> None:
    """Measure what is missing of a figure, with the allocator that this process has."""
    done = len(having(path, figure=figure, allocator=allocator))
    ways = FIGURES[figure]()
    for repeat in range(done - 1, REPEATS):
        seconds = {name: timed(way) for name, way in ways.items()}
        if repeat >= done:  # the one before warms up
            note(path, figure=figure, allocator=allocator, repeat=repeat, seconds=seconds)


def measure(path: Path) -> None:
    """Measure what is missing."""
    if not having(path, figure="raw, outputs"):
        bare, ours, x = bare_like(network("raw")), network("raw"), clips("raw")
        gaps = {}
        with torch.no_grad():
            for mode in ("training", "eval"):  # in this order: the first sets the running statistics
                pairs = list(
                    zip(
                        bare.train(mode == "training")(x).items(),
                        ours.train(mode == "training")(x).values(),
                        strict=True,
                    )
                )
                gaps[mode] = max(float((tap - other).abs().max() / tap.abs().max()) for (_, tap), other in pairs)
        note(path, figure="raw, outputs", **gaps)
    for figure in FIGURES:
        for allocator, variables in ALLOCATORS.items():
            wanted = "training" in figure or allocator != "tcmalloc"
            if wanted and len(having(path, figure=figure, allocator=allocator)) < REPEATS:
                refuse_missing(variables)
                child("--figure", str(path), figure, allocator, **variables)
                print(figure, allocator, flush=True)
    for kind in ("spectrogram", "raw"):
        with tempfile.TemporaryDirectory() as folder:
            for way in PEAKS:
                if not having(path, figure=f"{kind}, peak", way=way):
                    size = int(child("--peak", kind, way, f"{folder}/{way}"))
                    gap = apart(Path(folder, way), Path(folder, way.removesuffix(CHECKPOINTS)))
                    note(path, figure=f"{kind}, peak", way=way, bytes=size, difference=gap)


def apart(one: Path, other: Path) -> float | None:
    """Return the largest difference of two saved states, None where there are not two."""
    if one == other or not other.exists():
        return None
    states = [torch.load(path) for path in (one, other)]
    return max(float((states[0][name].double() - states[1][name].double()).abs().max()) for name in states[0])


def table(records: list[dict[str, Any]]) -> str:
    """Return a table for each figure, with ratios to its first way, median and range over repeats; and the peaks."""
    lines: list[str] = []
    for figure in FIGURES:
        by = {
            name: [one["seconds"] for one in records if one.get("allocator") == name and one["figure"] == figure]
            for name in ALLOCATORS
        }
        if not (by["glibc"] and by["thresholds"]):
            continue
        first, slowest = next(iter(by["glibc"][0])), typical(by["glibc"])
        heads = ["glibc, s", "ratio (range)", "thresholds, s", "ratio (range)", "thresholds, to the first of glibc"]
        heads = [*heads, "tcmalloc, s"] if by["tcmalloc"] else heads
        lines += [f"**{figure}**", "", f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
        for way in by["glibc"][0]:
            cells = []
            for name in ("glibc", "thresholds"):
                ratios = sorted(one[way] / one[first] for one in by[name])
                spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                cells += [f"{typical(by[name])[way]:.3f}", "1" if way == first else spread]
            cells.append(f"{typical(by['thresholds'])[way] / slowest[first]:.2f}")
            if by["tcmalloc"]:
                cells.append(f"{typical(by['tcmalloc'])[way]:.3f}")
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "**peak memory, 40 clips**",
        "",
        "| network | way | GB | ratio | from the plain run after 3 steps |",
        "|---|---|---:|---:|---:|",
    ]
    firsts: dict[str, int] = {}
    for record in sorted(records, key=lambda record: str(record["figure"])):
        if "bytes" in record:
            first_size = firsts.setdefault(record["figure"], record["bytes"])
            gap = "" if record["difference"] is None else f"{record['difference']:.1g}"
            size = f"{record['bytes'] / 1e9:.2f} | {record['bytes'] / first_size:.2f}"
            lines.append(f"| {record['figure'].removesuffix(', peak')} | {record['way']} | {size} | {gap} |")
    return "\n".join(lines)


def typical(repeats: list[dict[str, float]]) -> dict[str, float]:
    """Return the median seconds of each way."""
    return {way: statistics.median(one[way] for one in repeats) for way in repeats[0]}


def write(path: Path) -> None:
    """Write the tables of what there is beside the file."""
    records = found(path)
    gap = next(record for record in records if record["figure"] == "raw, outputs")
    text = (
        f"Width 1, clips of 10 s at 48 kHz, 8 a batch; process time on one thread, {REPEATS} repeats in which the ways "
        "of a figure take turns; a ratio is taken within its repeat. Thresholds: glibc with MALLOC_MMAP_THRESHOLD_ and "
        "MALLOC_TRIM_THRESHOLD_ of 1 GiB. Training: hard labels, Adam; under a teacher: hidden_mse, the student in "
        "bf16, channels_last. A peak is all that a process holds that takes three steps with 40 clips; there bf16 of "
        "the spectrogram is in channels_last. Conv1d is the same network in torch's own layers; in fp32 its outputs "
        f"differ from ours by {gap['eval']:.1g} of the largest value in eval mode, {gap['training']:.1g} in training. "
        f"{machine()}.\n\n"
        "`python tests/bench/precision.py docs/results/precision.jsonl` makes this page, and goes on where it stopped."
    )
    path.with_suffix(".md").write_text(f"{table(records)}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["--peak", kind, way, out]:
            peak(kind, way, out)
        case ["--figure", name, figure, allocator]:
            turns(Path(name), figure, allocator)
        case [name]:
            measure(Path(name))
            write(Path(name))
