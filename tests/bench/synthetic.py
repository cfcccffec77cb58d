"""Measure what the made scenes are like, before anything is distilled on them.

    python tests/bench/synthetic.py docs/results/synthetic_scenes.md

On the data of the recipe asc_quick, with five seeds for data, weights and order: (a) a linear classifier on the mean
log-mel spectrum of each clip; (b) the recipe's spectrogram network trained on hard labels, scored as in the recipe; and
(c) the rates of confusion inside of the pairs of classes that share their loudest ingredient, and outside. The
constants of the data were set by these figures alone; no student was trained for it.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kdlib.metrics import confusion_matrix
from kdlib.recipe import find, read
from kdlib.run import run
from kdlib_asc.datasets import synthetic_scenes
from kdlib_asc.datasets.ingredients import SHARING
from kdlib_asc.features import Spectrogram

SEEDS = 5
RECIPE: dict[str, Any] = tomllib.loads(find("asc_quick").read_text(encoding="utf-8"))


def linear(seed: int) -> tuple[np.ndarray, float]:
    """Return the confusion of the linear classifier, and the CPU milliseconds that making a clip took."""
    parts = synthetic_scenes(**{key: value for key, value in RECIPE["data"].items() if key != "kind"}, seed=seed)
    features = Spectrogram(rate=parts.rate, coefficients=64, standardise=False)
    started = time.process_time()
    clips = {part: [part[-1, index]["x"] for index in range(len(part))] for part in (parts.train, parts.test)}
    cost = 1000 * (time.process_time() - started) / sum(map(len, clips.values()))
    seen, unseen = (np.stack([features(x).mean(dim=(0, 1)).numpy() for x in of]) for of in clips.values())
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(seen, parts.train.labels)
    return confusion_matrix(parts.test.labels, model.predict(unseen), len(parts.classes)), cost


def network(seed: int) -> tuple[np.ndarray, list[str]]:
    """Return the confusion of the spectrogram network trained on hard labels, and the classes."""
    system = {key: RECIPE["systems"]["spectrogram"][key] for key in ("features", "model", "teacher")}
    alone = {key: RECIPE[key] for key in ("data", "train", "scorer")} | {"systems": {"spectrogram": system}}
    changes = [f"data.seed={seed}", f"train.seed={seed}", "train.threads=1"]
    with tempfile.TemporaryDirectory() as folder:
        out = run(read({"name": "alone", **alone}, changes), Path(folder) / "run", progress=False)
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return np.array(result["rows"][0]["confusion"]), result["classes"]


def confusions(confusion: np.ndarray, classes: list[str]) -> tuple[float, float]:
    """Return the mean rate of confusion, %, over ordered pairs of classes: of those that share, and of the others."""
    rates = 100 * confusion / confusion.sum(axis=1, keepdims=True)
    inside = np.zeros(rates.shape, dtype=bool)
    for true, taken in SHARING:
        inside[classes.index(true), classes.index(taken)] = True
    return float(rates[inside].mean()), float(rates[~inside & ~np.eye(len(classes), dtype=bool)].mean())


def main(path: Path) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    lines = ["| seed | linear on mean log-mel, % | network, % | sharing pairs, % | other pairs, % | ratio |"]
    lines += ["|---:|---:|---:|---:|---:|---:|"]
    table, costs, total = [], [], np.zeros(1)
    for seed in range(SEEDS):
        plain, cost = linear(seed)
        total, classes = network(seed)
        within, beyond = confusions(total, classes)
        table.append([*(100 * of.trace() / of.sum() for of in (plain, total)), within, beyond, within / beyond])
        costs.append(cost)
        lines.append(f"| {seed} | {' | '.join(f'{value:.1f}' for value in table[-1])} |")
        print(lines[-1], flush=True)
    columns = list(zip(*table, strict=True))
    for name, of in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        lines.append(f"| {name} | {' | '.join(f'{of(column):.1f}' for column in columns)} |")
    ordered = len(classes) * (len(classes) - 1)
    note = (
        f"The data of `asc_quick`, {int(total.sum())} test clips a seed; the seed is that of the data, the weights and "
        "the order, and the constants of the data were set on seed 0. Linear: scikit-learn's logistic regression on "
        "the standardised mean of 64 bands over channels and frames. Network: the recipe's spectrogram network trained "
        "on hard labels, the row `without`. Pairs: mean rate of one class being taken for the other, over the "
        f"{len(SHARING)} ordered pairs that share their loudest ingredient and the {ordered - len(SHARING)} others. "
        f"Making a clip took {statistics.mean(costs):.0f} ms of CPU time on one thread ({platform.machine()}, torch "
        f"{torch.__version__}, numpy {np.__version__})."
    )
    made = "`python tests/bench/synthetic.py docs/results/synthetic_scenes.md` makes this page."
    path.write_text("\n".join([*lines, "", note, "", made, ""]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
