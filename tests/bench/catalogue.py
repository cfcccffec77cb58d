"""Measure every point and source on the digits: accuracy over seeds, and the cost of a step.

    python tests/bench/catalogue.py docs/results/catalogue_digits.md

Each method is trained as hard labels + weight x method, the weight being such that both have the same gradient norm on
the student at the first step (1 where the method has next to none there: a teacher that is the student itself). No
weight is chosen by a result, so the table ranks nothing: it shows that each method trains, and at what cost.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import kdlib
from kdlib import points, sources
from kdlib.digits import digits
from kdlib.sources.parts import Rows

SEEDS = 5
EPOCHS = 100
BATCH = 25
TRAIN = 100


class Images:
    """The digits as images (1, 8, 8), and a noisy view of them for the student of `different_view`."""

    def __init__(self, part: Any, noise: float = 0.0) -> None:
        self.part, self.noise = part, noise
        self.labels, self.groups, self.ids, self.classes = part.labels, part.groups, part.ids, part.classes

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        item = dict(self.part[key])
        clean = item["x"].view(1, 8, 8)
        drawn = torch.randn(clean.shape, generator=kdlib.keyed(0, epoch, index, "noise"))
        return {**item, "x": clean + self.noise * drawn, "teacher_x": clean}


class Net(nn.Module):
    """Two stages of convolutions: `depth` in each, and an embedding of `width`."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()

        def stage(before: int, after: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for place in range(depth):
                layers += [nn.Conv2d(after if place else before, after, 3, padding=1), nn.ReLU()]
            return nn.Sequential(*layers)

        self.one, self.two, self.pool = stage(1, 8), stage(8, 16), nn.MaxPool2d(2)
        self.embed, self.output = nn.Linear(16 * 4, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        one = self.one(x)
        two = self.two(self.pool(one))
        embedding = self.embed(self.pool(two).flatten(1)).relu()
        return {"logits": self.output(embedding), "embedding": embedding, "one": one, "two": two}


def made(seed: int, depth: int, width: int) -> Net:
    torch.manual_seed(seed)
    return Net(depth, width)


def fit(distiller: kdlib.Distiller, part: Any, seed: int) -> None:
    kdlib.fit(distiller, part, epochs=EPOCHS, batch=BATCH, lr=2e-3, seed=seed, threads=1, progress=False)


def teacher_of(seed: int, part: Any) -> kdlib.Frozen:
    net = made(100 + seed, 3, 128)
    fit(kdlib.Distiller(net, hard=kdlib.HardLabels()), part, seed)
    return kdlib.freeze(net)


POINTS: dict[str, Callable[[Any], Any]] = {
    "soft_labels (T = 1)": lambda data: points.SoftLabels(),
    "soft_labels (Hinton, T = 4)": lambda data: points.SoftLabels.hinton(4.0),
    "dkd": lambda data: points.Dkd(),
    "dist": lambda data: points.Dist(),
    "logit_mse": lambda data: points.LogitMse(),
    "js": lambda data: points.JensenShannon(temperature=4.0),
    "logit_standardised": lambda data: points.LogitStandardised(),
    "sigmoid_labels": lambda data: points.SigmoidLabels(),
    "ranking": lambda data: points.Ranking(),
    "hidden_cosine": lambda data: points.HiddenCosine(tap="two"),
    "fitnet": lambda data: points.FitNet(tap="embedding"),
    "attention_transfer": lambda data: points.AttentionTransfer(tap="two"),
    "fsp": lambda data: points.Fsp(taps=["one", "two"]),
    "nst": lambda data: points.Nst(tap="two"),
    "vid": lambda data: points.Vid(tap="two"),
    "similarity_preserving": lambda data: points.SimilarityPreserving(),
    "rkd": lambda data: points.Rkd(),
    "pkt": lambda data: points.Pkt(),
    "correlation": lambda data: points.Correlation(),
    "crd": lambda data: points.Crd(data),
}


def sources_for(seed: int, train: Any, teacher: kdlib.Frozen, student: nn.Module) -> dict[str, Callable[[], Any]]:
    folds = sources.fold_of_groups(train.labels, train.groups, 3, seed)

    def crossed() -> Any:
        inner = [sources.SameInput(teacher_of(seed, Rows(train, np.flatnonzero(folds != part)))) for part in range(3)]
        return sources.CrossFit(inner, train, seed=seed)

    def several() -> Any:
        return sources.Ensemble({str(n): sources.SameInput(teacher_of(seed + 10 * n, train)) for n in range(3)})

    return {
        "ensemble (3 teachers)": several,
        "ema": lambda: sources.Ema(student, decay=0.99),
        "self_distillation": lambda: sources.SelfDistillation(student, every=100),
        "label_smoothing": lambda: sources.LabelSmoothing(train, smoothing=0.1),
        "class_means": lambda: sources.ClassMeans(train),
        "different_view (student: noise 0.3)": lambda: sources.DifferentView(teacher),
        "cross_fit (3 teachers)": crossed,
    }


def balanced(student: nn.Module, source: Any, point: Any, part: Any, seed: int) -> kdlib.Distiller:
    """Return hard labels + weight x point, both with the same gradient norm on the student at the first step."""
    batch = next(kdlib.Loader(part, batch=BATCH, seed=seed).epoch(0))
    trial = kdlib.Distiller(student, source, hard=kdlib.HardLabels(), point=point).prepare(batch)
    norms = []
    taps, given = student(batch["x"]), source(batch)
    for one in (kdlib.HardLabels(), trial.points["point"]):
        loss = one(taps, given, batch)
        grads = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True, allow_unused=True)
        norms.append(sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5)
    weight = norms[0] / norms[1] if norms[1] > 1e-3 * norms[0] else 1.0
    return kdlib.Distiller(student, source, hard=kdlib.HardLabels(), point=(weight, point))


def accuracy(net: nn.Module, part: Any) -> float:
    net.eval()
    right = 0
    with torch.no_grad():
        for batch in kdlib.Loader(part, batch=256, shuffle=False).epoch(-1):
            right += int((net(batch["x"])["logits"].argmax(1) == batch["y"]).sum())
    return 100 * right / len(part)


def cost(point: Any, train: Any, teacher: kdlib.Frozen) -> float:
    """Return the time of a step with the point and taps of the teacher that are there, over one with hard labels."""
    student = made(0, 1, 32)
    batch = next(kdlib.Loader(train, batch=BATCH).epoch(0))
    given = dict(teacher(batch["x"]))
    alone = kdlib.Distiller(student, hard=kdlib.HardLabels())
    both = kdlib.Distiller(student, lambda batch: given, hard=kdlib.HardLabels(), point=point).prepare(batch)
    times: dict[str, list[float]] = {"alone": [], "both": []}
    for _ in range(60):
        for name, distiller in (("alone", alone), ("both", both)):
            started = time.process_time()
            torch.autograd.backward(distiller(batch).total)
            times[name].append(time.process_time() - started)
    return statistics.median(times["both"][10:]) / statistics.median(times["alone"][10:])


def main(path: Path) -> None:
    """Train everything, and write the table."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        data = digits(train=TRAIN, seed=seed)
        train, test = Images(data.train), Images(data.test)
        teacher = teacher_of(seed, train)
        found.setdefault("teacher", []).append(accuracy(teacher.model, test))
        student = made(seed, 1, 32)
        fit(kdlib.Distiller(student, hard=kdlib.HardLabels()), train, seed)
        found.setdefault("student alone", []).append(accuracy(student, test))
        for name, build in POINTS.items():
            student = made(seed, 1, 32)
            fit(balanced(student, sources.SameInput(teacher), build(train), train, seed), train, seed)
            found.setdefault(name, []).append(accuracy(student, test))
        for name in sources_for(seed, train, teacher, student):
            student = made(seed, 1, 32)
            source = sources_for(seed, train, teacher, student)[name]()
            part = Images(data.train, 0.3) if name.startswith("different_view") else train
            soft = points.SoftLabels() if name in ("label_smoothing", "class_means") else points.SoftLabels.hinton(4.0)
            fit(balanced(student, source, soft, part, seed), part, seed)
            found.setdefault(name, []).append(accuracy(student, test))
        print(f"seed {seed}", {name: round(values[-1], 1) for name, values in found.items()}, flush=True)
    costs = {name: cost(build(train), train, teacher) for name, build in POINTS.items()}

    base = found["student alone"]
    lines = ["| method | accuracy %: mean, standard deviation | minus alone, paired | step / student's |"]
    lines += ["|---|---:|---:|---:|"]
    for name, values in found.items():
        gaps = [value - other for value, other in zip(values, base, strict=True)]
        gap = f"{statistics.mean(gaps):+.1f} ± {statistics.stdev(gaps) / SEEDS**0.5:.1f}" if values is not base else ""
        step = f"{costs[name]:.2f}" if name in costs else ""
        lines.append(f"| {name} | {statistics.mean(values):.1f}, {statistics.stdev(values):.1f} | {gap} | {step} |")
    note = (
        f"{TRAIN} training images, {len(test)} test images, {SEEDS} seeds (split and weights), {EPOCHS} epochs of "
        f"batches of {BATCH}, Adam at 2e-3. Teacher: 2 x 3 convolutions and 128 hidden units; student: 2 x 1 and 32. "
        "After ± the standard error over seeds. Step: forward, points and backward with the teacher's taps at hand, "
        f"over the same with hard labels alone: medians of 50 interleaved repeats of process time on one thread "
        f"({platform.machine()}, torch {torch.__version__})."
    )
    path.write_text("\n".join([*lines, "", note, ""]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
