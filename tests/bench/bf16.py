"""Measure what bf16 costs in accuracy: the systems of asc_quick trained in fp32 and in bf16 with the same seeds.

    python tests/bench/bf16.py docs/results/bf16.jsonl

Each training is a line of the file; what is there is not trained again, so a run that was stopped goes on where it was.
At the end the table is written beside it (bf16.md), and may be made at any time of what is there so far. Settings are
those of the recipe, and nothing is chosen by these figures.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from records import found, having, note
from scipy.stats import t as student_t

from kdlib.recipe import find, read
from kdlib.run import run

SEEDS = 8
MARGIN = 2.0
"""Points of accuracy within which both count as the same."""
RECIPE: dict[str, Any] = tomllib.loads(find("asc_quick").read_text(encoding="utf-8"))


def trained(system: str, precision: str, seed: int, cache: Path) -> dict[str, Any]:
    """Return the counts of correct test clips of one training of teacher and student."""
    kept = {key: RECIPE[key] for key in ("data", "train", "scorer")}
    one = {**RECIPE["systems"][system], "student": {"start": "teacher"}}
    changes = [f"data.seed={seed}", f"train.seed={seed}", f"train.precision={precision}", "train.threads=1"]
    recipe = {"name": "bf16", **kept, "cache": {"folder": str(cache)}, "systems": {system: one}}
    with tempfile.TemporaryDirectory() as folder:
        out = run(read(recipe, changes), Path(folder) / "run", progress=False)
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    rows = {row["role"]: row["correct"] for row in result["rows"]}
    cpu = round(result["seconds"]["cpu"])
    return {
        "system": system,
        "precision": precision,
        "seed": seed,
        **rows,
        "total": result["rows"][0]["total"],
        "cpu": cpu,
    }


def table(trainings: list[dict[str, Any]]) -> str:
    """Return the paired differences, bf16 minus fp32 in points, with 90 % intervals of Student's t over seeds."""
    records = {(one["system"], one["precision"], one["seed"]): one for one in trainings}
    lines = ["| system | row | fp32, % | bf16, % | bf16 - fp32, points | 90 % interval | seeds | verdict |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---|"]
    for system in RECIPE["systems"]:
        seeds = [seed for name, precision, seed in records if name == system and precision == "bf16"]
        pairs = [(records[system, "fp32", seed], records[system, "bf16", seed]) for seed in seeds]
        for role in ("without", "with") if len(pairs) > 1 else ():
            plain, short = ([100 * pair[side][role] / pair[side]["total"] for pair in pairs] for side in (0, 1))
            gaps = [low - high for low, high in zip(short, plain, strict=True)]
            half = student_t.ppf(0.95, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
            mean = statistics.mean(gaps)
            inside = mean - half > -MARGIN and mean + half < MARGIN
            verdict = f"inside ±{MARGIN:g}" if inside else "cannot be told"
            lines.append(
                f"| {system} | {role} | {statistics.mean(plain):.1f} | {statistics.mean(short):.1f} | {mean:+.2f} | "
                f"{mean - half:+.2f} to {mean + half:+.2f} | {len(gaps)} | {verdict} |"
            )
    return "\n".join(lines)


def write(path: Path) -> None:
    """Write the table of what there is beside the file."""
    text = (
        "Made scenes, the systems of `asc_quick` without fusion; 480 test clips a seed, and each seed has its own "
        "scenes, weights and order, the same for both precisions. Rows as in a run: `without` is the teacher, `with` "
        f"the student. Equal means that the whole interval is within {MARGIN:g} points; where it is not, this many "
        "seeds cannot tell. Nothing was chosen by these figures.\n\n"
        "`python tests/bench/bf16.py docs/results/bf16.jsonl` makes this page, and goes on where it was stopped."
    )
    path.with_suffix(".md").write_text(f"{table(found(path))}\n\n{text}\n", encoding="utf-8")


def main(path: Path) -> None:
    """Train what is missing, and write the table."""
    for system in sorted(RECIPE["systems"], reverse=True):  # the cheap one first
        for seed in range(SEEDS):
            with tempfile.TemporaryDirectory() as cache:
                for precision in ("fp32", "bf16"):
                    if not having(path, system=system, precision=precision, seed=seed):
                        record = trained(system, precision, seed, Path(cache))
                        note(path, **record)
                        print(record, flush=True)
        write(path)
    write(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
