"""Callbacks of a training: functions of an event. The bar, the table and the step log are three of them."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from kdlib.distiller import Distiller, Losses
from kdlib.files import append, write_atomically


class Event(NamedTuple):
    """Something that happened in a training."""

    kind: Literal["step", "epoch", "end"]
    step: int
    """Optimizer steps done."""
    epoch: int
    losses: Losses
    """Of the last batch."""
    distiller: Distiller
    record: Mapping[str, float]
    """Of a step its ``lr`` and what schedules gave (``soft.temperature``); of an epoch its line in the history."""


Callback = Callable[[Event], None]


@contextmanager
def progress_bar(steps: int, title: str = "training") -> Iterator[Callback]:
    """Show steps, loss terms, learning rate and remaining time on the terminal, and leave one line at the end."""
    from rich import get_console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[terms]}"),
        TimeRemainingColumn(),
    )
    console, started = get_console(), time.perf_counter()
    with Progress(*columns, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=steps, terms="")
        means: Mapping[str, float] = {}
        waiting = 0.0

        def show(event: Event) -> None:
            nonlocal means, waiting
            if event.kind == "step" and console.is_terminal and not bar.finished:
                terms = " ".join(f"{name} {float(value):.4g}" for name, value in event.losses.terms.items())
                text = f"epoch {event.epoch + 1}  {terms}  lr {event.record['lr']:.2g}"
                bar.update(task, completed=event.step, terms=text)
            elif event.kind == "epoch":
                means = {name: value for name, value in event.record.items() if name in event.losses.terms}
                waiting = event.record["waiting"]
            elif event.kind == "end":
                terms = " ".join(f"{name} {value:.4g}" for name, value in means.items())
                taken = f"{event.epoch + 1} epochs, {event.step} steps, {time.perf_counter() - started:.1f} s"
                last = f", {terms} in the last, {100 * waiting:.0f} % of it waiting for data" if means else ""
                line = f"{title}: {taken}{last}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield show


def csv_log(folder: Path, before: Sequence[Mapping[str, float]] = ()) -> Callback:
    """Keep ``metrics.csv``, one line an epoch, written anew each time: a term that comes later has its column too.

    Args:
        folder: where the file goes.
        before: the lines of the epochs before those that will come.
    """
    path = folder / "metrics.csv"
    records = list(before)

    def keep() -> None:
        columns = list(dict.fromkeys(name for record in records for name in record))
        writer = csv.DictWriter(text := io.StringIO(newline=""), columns)
        if records:
            writer.writeheader()
            writer.writerows(records)
        write_atomically(path, text.getvalue().encode())

    def write(event: Event) -> None:
        if event.kind == "epoch":
            records.append(event.record)
            keep()

    keep()
    return write


def jsonl_log(folder: Path, before: int = 0) -> Callback:
    """Write one line a step to ``metrics.jsonl``.

    Args:
        folder: where the file goes.
        before: steps whose lines are kept; what a process that is gone wrote after them is cut off.
    """
    path = folder / "metrics.jsonl"
    size = _size_of(path, before)
    if size:
        os.truncate(path, size)
    else:
        write_atomically(path, b"")

    def write(event: Event) -> None:
        if event.kind == "step":
            terms = {name: float(value) for name, value in event.losses.terms.items()}
            line = {"step": event.step, "epoch": event.epoch, **event.record, "total": event.losses.total.item()}
            append(path, (json.dumps({**line, "terms": terms}) + "\n").encode())

    return write


def _size_of(path: Path, steps: int) -> int:
    """Return how many bytes the lines of the first steps take that are there."""
    size = 0
    if steps and path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):  # half a line
                    break
                if step > steps or not line.endswith(b"\n"):
                    break
                size += len(line)
    return size
