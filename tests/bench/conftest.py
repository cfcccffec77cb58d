"""Ratios that are measured in alternation, by pytest-benchmark, and kept in a file as soon as each is there.

    pytest tests/bench --figures docs/results/benchmarks.json

The table is written beside the file. Figures that are in the file and are not measured now stay as they are, so a run
that was stopped goes on with ``-k``. Times are process times on one thread; with ``--threads 2`` they are wall times,
for a file of their own. No test here fails on a time.
"""

import gc
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

from kdlib.bench import Ratio
from kdlib.doctor import describe

sys.path.append(str(Path(__file__).parent))  # for the scripts, which pytest imports to look for doctests

ROUNDS = 9
SAME = ("", "final weights differ by 0")
"""What the page says of all loops at once."""
GROUPS = {
    "A distiller's step": ("tiny", "spectrogram"),
    "What a teacher adds": ("stored", "epoch", "1 draws", "16 draws", "frames"),
    "Data and the rest": ("log-mel", "cached", "store:", "import", "waiting"),
}
"""Of the page: titles, and what a figure's name begins with, in order."""


def pytest_addoption(parser):
    parser.addoption("--figures", type=Path, help="the JSON file that the figures are put in")
    parser.addoption("--threads", type=int, default=1, help="of torch; with more than one, times are wall times")


@pytest.fixture(autouse=True)
def threads(request, monkeypatch):
    count = request.config.getoption("threads")
    torch.set_num_threads(count)
    torch.manual_seed(0)
    if count > 1:  # a thread that waits for another takes process time, too
        monkeypatch.setattr(time, "process_time", time.perf_counter)


@pytest.fixture
def keep(request):
    """Return a function that puts a figure into the file, under a name."""

    def kept(name, **figure):
        print(f"\n{name}: {figure}")
        path = request.config.getoption("figures")
        if path is None:
            return
        figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        figures[name] = {**figure, "machine": machine()}
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(figures), encoding="utf-8")

    return kept


@pytest.fixture
def compare(benchmark, keep):
    """Return a function that measures parts in turn and keeps the ratio of each of ours to each of the others.

    A part is a function without arguments; where it returns a number, that is its time, else the process time of the
    call is. With ``cheaper`` the ratio is turned round: how many times our time the others' is.
    """

    def compared(name, what, ours, others, *, rounds=ROUNDS, cheaper=False, unit=1.0, checked=None):
        parts = {**ours, **others}
        times = {part: [] for part in parts}

        def timed(part):
            started = time.process_time()
            taken = parts[part]()
            taken = time.process_time() - started if taken is None else taken
            times[part].append(taken)

        first, *rest = parts

        def before():
            gc.collect()
            for part in rest:
                timed(part)

        benchmark.pedantic(timed, args=(first,), setup=before, rounds=rounds + 1)
        counted = {part: [taken * unit for taken in all_[1:]] for part, all_ in times.items()}
        for one, other in itertools.product(ours, others):
            ratio = Ratio.of(counted[other], counted[one]) if cheaper else Ratio.of(counted[one], counted[other])
            benchmark.extra_info[f"{one} / {other}"] = str(ratio)
            keep(
                f"{name}: {one} / {other}",
                what=what,
                ours=one,
                beside=other,
                ratio=list(ratio),
                cheaper=cheaper,
                rounds=rounds,
                seconds=[statistics.median(counted[one]), statistics.median(counted[other])],
                checked=checked(other) if checked else "",
            )

    return compared


def machine():
    has = describe()
    wide = ", AVX-512" if "avx512f" in has["units"] else ""
    return f"{os.cpu_count()} cores of {has['processor']}{wide}, torch {has['torch']}, Python {has['python']}"


def table(figures):
    """Return the figures as a page in groups: what is measured in turn first, then what stands by itself."""
    parts = []
    for title, begins in GROUPS.items():
        own = [(name, figure) for begin in begins for name, figure in sorted(figures.items()) if name.startswith(begin)]
        ratios = {name: figure for name, figure in own if "ratio" in figure}
        several = {}  # comparisons of more than one of ours with more than one other
        for name, figure in ratios.items():
            several.setdefault(name.partition(":")[0], {}).setdefault(figure["ours"], {})[figure["beside"]] = figure
        several = {name: ours for name, ours in several.items() if min(len(ours), *map(len, ours.values())) > 1}
        if not own:
            continue
        parts.append(f"### {title}")
        parts += map(beside_each_other, several.values())
        rest = [figure for name, figure in ratios.items() if name.partition(":")[0] not in several]
        if rest:
            parts.append(one_a_row(rest))
        single = [figure for _, figure in own if "value" in figure]
        if single:
            lines = ["| what | measured |", "|---|---|"]
            parts.append("\n".join(lines + [f"| {figure['what']} | {figure['value']} |" for figure in single]))
    machines = " / ".join(dict.fromkeys(figure["machine"] for figure in figures.values()))
    return "\n\n".join([*parts, f"Measured on {machines}.", ""])


def one_a_row(figures):
    """Return a table of comparisons, a row each."""
    lines = ["| what | beside | ratio | least to largest | rounds |", "|---|---|---:|---:|---:|"]
    for figure in figures:
        ratio, spread = cells(figure)
        ours, theirs = map(readable, figure["seconds"])
        checked = "" if figure["checked"] in SAME else f"; {figure['checked']}"
        lines.append(
            f"| {figure['what']}: {figure['ours']} ({ours}){checked} | {figure['beside']} ({theirs}) | {ratio} | "
            f"{spread} | {figure['rounds']} |"
        )
    return "\n".join(lines)


def beside_each_other(by_ours):
    """Return a table of several of ours beside the same others, a column each."""
    first = next(iter(by_ours.values()))
    heads = [f"{ours} ({readable(next(iter(own.values()))['seconds'][0])})" for ours, own in by_ours.items()]
    some = next(iter(first.values()))
    lines = [f"| {some['what']}, {some['rounds']} rounds | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for beside, figure in sorted(first.items(), key=lambda item: item[1]["seconds"][1]):
        row = [" ".join((ratio, f"({spread})")) for ratio, spread in (cells(own[beside]) for own in by_ours.values())]
        lines.append(f"| {beside} ({readable(figure['seconds'][1])}) | {' | '.join(row)} |")
    return "\n".join(lines)


def cells(figure):
    """Return a ratio and its range in words."""
    median, least, largest = map(written, figure["ratio"])
    return f"**{median}**{' times cheaper' if figure['cheaper'] else ''}", f"{least} to {largest}"


def written(ratio):
    digits = next((form for above, form in ((100, ",.0f"), (10, ".1f"), (0.1, ".3f")) if ratio >= above), ".4f")
    return f"{ratio:{digits}}"


def readable(seconds):
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
