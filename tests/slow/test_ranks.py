"""Jobs of several ranks that are killed: what they wrote is whole, and one that dies takes the others along."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
KILLS = 20
WRITER = '''
"""Have features cached and soft labels stored, each in shards of few rows, by all ranks."""
import os, sys, time
from pathlib import Path
import torch
import kdlib
from kdlib import ranks, store
from kdlib.cache import Cache, fit_features
from kdlib.featured import Featured
from kdlib.storing import build_store

folder = Path(sys.argv[1])
(folder.parent / "processes").mkdir(exist_ok=True)
(folder.parent / "processes" / str(os.getpid())).touch()
torch.set_num_threads(1)
store.SHARD = 1 << 11


class Slow(torch.nn.Module):
    """Features that take as long as a clip's decoding."""

    time_axis = -1

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(64))

    def fit(self, clips):
        self.mean.copy_(torch.stack(list(clips)).mean(0))

    def forward(self, samples):
        time.sleep(0.003)
        return samples.square() - self.mean


with ranks.group():
    x = torch.randn(400, 64, generator=kdlib.keyed(0, "x"))
    part = kdlib.TensorPart(x, torch.arange(400) % 10, classes="abcdefghij")
    torch.manual_seed(0)
    teacher = kdlib.freeze(kdlib.Tapped(torch.nn.Linear(64, 10), logits=""))
    features, cache = Slow(), Cache(folder / "cache")
    fit_features(features, part, cache)
    cached = Featured(part, features, classes=part.classes, cache=cache)
    build_store(kdlib.SameInput(teacher), cached, folder / "store", batch=1)
'''


def start(world, *arguments, **settings):
    command = [*TORCHRUN, f"--nproc-per-node={world}", *map(str, arguments)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**quiet, **settings})


def contents(folder):
    """Return the files of a folder with their bytes, without what killed processes had begun."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def sealed(folder):
    return len(list(folder.rglob("*.sha256")))


def kill_all(job, processes):
    """Kill torchrun and all of its processes, which have sessions of their own."""
    for process in [job.pid, *(int(path.name) for path in processes.iterdir())]:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.communicate()
    for path in processes.iterdir():
        path.unlink()


@pytest.mark.timeout(1800)
def test_stores_and_caches_of_killed_jobs_have_the_bytes_of_an_uninterrupted_one(tmp_path, table):
    writer = tmp_path / "writer.py"
    writer.write_text(WRITER)
    first = start(1, writer, tmp_path / "whole")
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    whole = contents(tmp_path / "whole")
    assert sealed(tmp_path / "whole") == sum(path.suffix == ".sha256" for path in whole) > 70
    draw = random.Random(5)
    kills, half, rounds, worlds, world = 0, 0, 0, set(), 0
    processes = tmp_path / "processes"
    for path in processes.iterdir():
        path.unlink()
    while kills < KILLS:
        rounds += 1
        folder = tmp_path / f"round-{rounds}"
        finished = False
        while not finished:
            world = draw.choice([number for number in (1, 2, 3) if number != world])
            before, more, wait = sealed(folder), draw.randint(1, 25), draw.uniform(0, 0.03)
            job = start(world, writer, folder)
            while kills < KILLS and job.poll() is None and sealed(folder) < before + more:
                time.sleep(0.001)
            if kills < KILLS and job.poll() is None:
                time.sleep(wait)
                kill_all(job, processes)
                kills += 1
                worlds.add(world)
                written = [path for path in folder.rglob("*.safetensors") if not path.name.startswith(".")]
                half += any(folder.rglob(".*")) or len(written) > sealed(folder)
            else:
                _, errors = job.communicate(timeout=300)
                assert job.returncode == 0, errors
                finished = True
        assert contents(folder) == whole
        assert not list(folder.rglob(".*")), "what killed processes had begun is removed"
    assert worlds == {1, 2, 3}
    table(
        "store and cache SIGKILLed while written, 1 to 3 ranks mixed",
        f"same bytes as uninterrupted in {rounds} of {rounds} rounds; {half} kills in the middle of a file",
        kills,
    )


FATAL = '''
"""A point that ends its process, or raises, on one rank in the middle of a training."""
import os, signal, time
import kdlib

class Fatal:
    def __init__(self, *, how: str, rank: int):
        self.how, self.rank, self.calls = how, rank, 0

    def __call__(self, student, teacher, batch):
        self.calls += 1
        if self.calls == 20 and os.environ["RANK"] == str(self.rank):
            print(f"over at {time.time()}", flush=True)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "fault":
                raise ZeroDivisionError("the dog ate it")
            raise kdlib.DataError("clip 7 is bad")
        return student["logits"].square().mean()

@kdlib.hookimpl
def kdlib_points():
    return {"fatal": Fatal}
'''
RECIPE = """
data = { kind = "digits" }
train = { epochs = 100, batch = 6, threads = 1 }
model = { kind = "digits_mlp", width = 4 }
points = { fatal = { kind = "fatal", how = "HOW", rank = RANK } }
"""
SAID = {
    "kill": "Signal 9 (SIGKILL)",
    "fault": "ZeroDivisionError: the dog ate it",
    "error": "rank {rank}: error: Point 'fatal' (Fatal): clip 7 is bad",
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", SAID)
def test_a_rank_that_dies_ends_the_job_with_its_reason(tmp_path, table, how):
    (tmp_path / "fatal_point.py").write_text(FATAL)
    longest = 0.0
    for rank in range(3):
        (tmp_path / "recipe.toml").write_text(RECIPE.replace("HOW", how).replace("RANK", str(rank)))
        job = start(3, "-m", "kdlib", "run", "recipe.toml", "--plugin=fatal_point", f"--out=run-{rank}", cwd=tmp_path)
        out, errors = job.communicate(timeout=300)
        ended = time.time()
        (over,) = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("over at")]
        longest = max(longest, ended - over)
        assert job.returncode != 0
        assert SAID[how].format(rank=rank) in errors
        assert f"(local_rank: {rank})" in errors or how != "kill"
        assert not (tmp_path / f"run-{rank}" / "result.json").exists()
    assert longest < 30
    table(f"rank 0, 1 or 2 of 3 dies ({how})", f"named; the job ends at most {longest:.1f} s later", 3)
