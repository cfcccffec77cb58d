"""What a distiller's step costs beside the same loop written by hand, and what a teacher adds to a student's step."""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.data import TensorPart
from kdlib.distiller import Distiller
from kdlib.interfaces import SoftLabelSource
from kdlib.keyed import keyed
from kdlib.place import threads_set
from kdlib.points import FitNet, SoftLabels
from kdlib.progress import track
from kdlib.sources import SameInput, Stored
from kdlib.sources.stored import KEY
from kdlib.storing import build_store
from kdlib.taps import Tapped, freeze

TEMPERATURE = 4.0
HINT = 0.1
"""Weight of the mean squared error of the embeddings, beside 0.9 of the soft labels."""
WARM = 10
"""Steps of each round that are not timed."""
ROWS = 32
"""Rows of a batch."""


class Batches:
    """Batches for a training loop, with a clock of process time that starts when the loop has taken ``warm`` steps.

    It stops when the last batch is asked for, and again when the loop asks for one more, as not every trainer does.

    Args:
        batches: what the loop gets, with a length.
        warm: steps that are not timed.
    """

    def __init__(self, batches: Any, warm: int = WARM) -> None:
        self.batches = batches
        self.warm = warm
        self.steps = 0
        """Steps that were timed."""
        self.seconds = 0.0
        """What they took together."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        started = 0.0 if self.warm else time.process_time()  # with no step to warm up loading the first one counts
        for number, batch in enumerate(self.batches):
            if number == self.warm and self.warm:
                started = time.process_time()
            elif number == len(self) - 1:
                self.steps, self.seconds = number - self.warm, time.process_time() - started
            yield batch
        self.steps, self.seconds = len(self) - self.warm, time.process_time() - started


class Ratio(NamedTuple):
    """How many times as long one thing takes as another, measured in turn: median, least and largest of the rounds."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, ours: Sequence[float], others: Sequence[float]) -> Ratio:
        """Return the ratio of two series of times, round by round."""
        ratios = [one / other for one, other in zip(ours, others, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.largest:.3f})"


Loop = Callable[[Any, nn.Module, Iterable[Any]], None]
"""A training of a student under a teacher, one pass over batches."""


def loss_by_hand(teacher: nn.Module, student: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss of a distillation as one writes it without a library: two taps, two points."""
    with torch.no_grad():
        wanted = teacher(batch["x"])
    taps = student(batch["x"])
    p = F.softmax(wanted["logits"] / TEMPERATURE, -1)
    log_p = F.log_softmax(taps["logits"] / TEMPERATURE, -1)
    soft = -(TEMPERATURE**2) * (p * log_p).sum(-1).mean()
    hint = F.mse_loss(taps["embedding"], wanted["embedding"], reduction="sum") / (2 * len(batch["x"]))
    return (1 - HINT) * soft + HINT * hint


def by_hand(teacher: nn.Module, student: nn.Module, batches: Iterable[Any]) -> None:
    """Distil without a library."""
    optimizer = torch.optim.Adam(student.parameters())
    for batch in batches:
        loss = loss_by_hand(teacher, student, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def alone_by_hand(teacher: object, student: nn.Module, batches: Iterable[Any]) -> None:
    """Train the student on hard labels, without a teacher and without a library."""
    optimizer = torch.optim.Adam(student.parameters())
    for batch in batches:
        loss = F.cross_entropy(student(batch["x"])["logits"], batch["y"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def by_distiller(source: SoftLabelSource, student: nn.Module, batches: Iterable[Any]) -> None:
    """Do what :func:`by_hand` does by a distiller, for a student that returns its taps."""
    distiller = Distiller(
        student,
        source,
        soft=(1 - HINT, SoftLabels.hinton(TEMPERATURE)),
        hint=(HINT, FitNet()),
    )
    distiller.prepare(next(iter(batches)))
    optimizer = distiller.attach(torch.optim.Adam(distiller.parameters()))
    for batch in batches:
        losses = distiller(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()


def distilled(source: SoftLabelSource, student: nn.Module, batches: Iterable[Any]) -> None:
    """Do the same by Tapped: where the student has a module of a tap's name, by a hook, else from its output."""
    with Tapped(student, logits="logits", embedding="embedding") as taps:
        by_distiller(source, taps, batches)


def alternated(loops: Mapping[str, Callable[[], float]], rounds: int, title: str = "rounds") -> dict[str, list[float]]:
    """Return the times of each loop, which take turns; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in track(range(rounds + 1), title):
        gc.collect()
        for name, loop in loops.items():
            taken = loop()
            if number:
                times[name].append(taken)
    return times


class Trained:
    """A loop over the same batches from the same weights each time: the seconds of a step, and where it ends.

    Args:
        loop: the training.
        teacher: what it gets as teacher.
        student: trained from the weights that it has now, each time.
        batches: one pass, in the same order each time.
        warm: steps that are not timed.
    """

    def __init__(self, loop: Loop, teacher: object, student: nn.Module, batches: Any, warm: int = WARM) -> None:
        self.loop = loop
        self.teacher = teacher
        self.student = student
        self.batches = batches
        self.warm = warm
        self.start = copy.deepcopy(student.state_dict())
        self.end: dict[str, Tensor] = {}

    def __call__(self) -> float:
        """Train, and return the process time of a step in seconds."""
        self.student.load_state_dict(self.start)
        batches = Batches(self.batches, self.warm)
        self.loop(self.teacher, self.student, batches)
        self.end = copy.deepcopy(self.student.state_dict())
        return batches.seconds / batches.steps

    def differs(self, other: Trained) -> float:
        """Return the largest difference between the weights at the end and those of another loop."""
        return max(float((value - other.end[name]).abs().max()) for name, value in self.end.items())


class Net(nn.Module):
    """Linear layers, wide enough for a step of about 0.4 ms: ``(B, 64) -> logits (B, 10), embedding (B, 64)``.

    Of its taps ``embedding`` is a module, too.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, width)
        self.embedding = nn.Linear(width, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the taps."""
        embedding = self.embedding(self.hidden(x).relu())
        return {"logits": self.output(embedding.relu()), "embedding": embedding}


class Images(nn.Module):
    """The same end behind three convolutions, for a step of about 20 ms: ``x`` are 64 pixels, enlarged to 32 x 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (1, width // 2, width, width)
        self.layers = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(sizes))
        self.embedding = nn.Linear(width, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the taps."""
        image = F.interpolate(x.view(-1, 1, 8, 8), scale_factor=4)
        for layer in self.layers:
            image = F.max_pool2d(layer(image).relu(), 2)
        embedding = self.embedding(image.mean((2, 3)))
        return {"logits": self.output(embedding.relu()), "embedding": embedding}


class Size(NamedTuple):
    """A network to measure with, and how many steps a round has."""

    network: Callable[[int], nn.Module]
    teacher: int
    student: int
    warm: int
    steps: int


SIZES = {"tiny": Size(Net, 512, 128, WARM, 60), "images": Size(Images, 64, 32, 2, 5)}
COMPARED = (("online", "by hand"), ("online", "alone"), ("stored", "alone"))
TITLES = {
    "online": "teacher online",
    "stored": "stored labels",
    "by hand": "same by hand",
    "alone": "student alone",
}


class Figure(NamedTuple):
    """A line of the table."""

    network: str
    what: str
    beside: str
    ratio: Ratio
    step: float
    """Seconds of a step of what it stands beside."""
    difference: float
    """Largest difference of the final weights from those of the distillation by hand."""


def bench(rounds: int = 15) -> Iterator[Figure]:
    """Measure on one thread, on made data; each network's figures come when all of its rounds are over.

    It is process time, which another program on the machine disturbs little; the least and the largest ratio say how
    much.

    Args:
        rounds: how often the loops take turns, at least 1.
    """
    for name, size in SIZES.items():
        with threads_set(1), tempfile.TemporaryDirectory() as folder:
            loops = _loops(size, folder)
            times = alternated(loops, rounds, name)
        for ours, beside in COMPARED:
            ratio = Ratio.of(times[ours], times[beside])
            difference = loops[ours].differs(loops["by hand"])
            yield Figure(name, TITLES[ours], TITLES[beside], ratio, statistics.median(times[beside]), difference)


def made(size: Size, seed: int = 0) -> tuple[nn.Module, nn.Module, TensorPart, list[dict[str, Tensor]]]:
    """Return a teacher that is in eval mode, a student, and made data as a part and as the batches of a round."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher, student = size.network(size.teacher), size.network(size.student)
    count = size.warm + size.steps
    drawn = keyed(seed, "bench")
    part = TensorPart(torch.randn(count * ROWS, 64, generator=drawn), torch.arange(count * ROWS) % 10)
    rows = torch.split(torch.arange(count * ROWS), ROWS)
    labels = torch.as_tensor(part.labels)
    batches = [{"x": part.x[i], "y": labels[i], "index": i, "epoch": torch.zeros_like(i)} for i in rows]
    return teacher.eval().requires_grad_(False), student, part, batches


def tapped(teacher: nn.Module) -> SameInput:
    """Return a copy of a teacher as a source, its taps read off as :func:`distilled` does it."""
    return SameInput(freeze(Tapped(copy.deepcopy(teacher), logits="logits", embedding="embedding")))


def marked(batches: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return batches as they come from ``source.dataset(part)`` of stored soft labels."""
    return [{**batch, KEY: torch.zeros_like(batch["index"])} for batch in batches]


def _loops(size: Size, folder: str) -> dict[str, Trained]:
    teacher, student, part, batches = made(size)
    online = tapped(teacher)
    build_store(online, part, folder, batch=ROWS)
    return {
        "by hand": Trained(by_hand, teacher, student, batches, size.warm),
        "online": Trained(distilled, online, student, batches, size.warm),
        "alone": Trained(alone_by_hand, None, student, batches, size.warm),
        "stored": Trained(distilled, Stored(folder=Path(folder)), student, marked(batches), size.warm),
    }
