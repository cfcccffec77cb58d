"""Writers that are killed: started again, they leave the bytes of one that was not, and nothing beside them."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

KILLS = 24
"""Of each writer: one kill each time it is started, at a moment drawn between its first file and its usual end."""

WRITER = """
import sys
from pathlib import Path
import torch
import kdlib
from kdlib.cache import Cache, filled, fit_features
from kdlib.digits import DigitsMLP, digits
from kdlib.storing import build_store

what, folder = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)


class Known(kdlib.TensorPart):
    def fingerprint(self, index):
        return str(index)


class Blurred(torch.nn.Module):
    time_axis = -1

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(64))

    def fit(self, clips):
        self.mean.copy_(torch.stack(list(clips)).mean(0))
        return self

    def forward(self, x):
        return (x - self.mean).repeat(2000)


whole = digits(train=600, valid=0).train
part = Known(whole.x, whole.labels)
print("ready", flush=True)
if what == "store":
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 20_000), torch.nn.Unflatten(1, (20, 1000)))
    teacher = kdlib.freeze(kdlib.Tapped(net, map=""))
    build_store(kdlib.SameInput(teacher), part, folder, batch=8, threads=1)
else:
    features = Blurred()
    fit_features(features, part, Cache(folder))
    filled(features, part, Cache(folder), lambda i: {"x": features(part.x[i])})
print("done", flush=True)
"""


def started(what, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, what, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    return process


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def finish(what, folder):
    began = time.monotonic()
    process = started(what, folder)
    began = time.monotonic()
    assert process.stdout.read() == "done\n"
    assert process.wait() == 0
    return time.monotonic() - began


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["store", "cache"])
def test_after_kills_the_files_are_those_of_a_writer_that_was_not_killed(tmp_path, table, what):
    usual = finish(what, tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    assert len(wanted) > 4
    draw, kills, within, runs = random.Random(0), 0, 0, 0
    while kills < KILLS:
        folder = tmp_path / f"killed{runs}"
        runs += 1
        for _ in range(4):
            process = started(what, folder)
            time.sleep(draw.uniform(0, 0.9 * usual))
            process.send_signal(signal.SIGKILL)
            process.wait()
            if process.returncode == -signal.SIGKILL:
                kills += 1
            there = contents(folder)
            within += any(path.name.startswith(".") for path in there)
            for path in there:  # what stands under its name is whole
                assert path.name.startswith(".") or there[path] == wanted[path]
        finish(what, folder)
        assert contents(folder) == wanted
    assert kills >= 20
    table(
        f"SIGKILL while a {what} is written",
        f"same {len(wanted)} files after each of {runs} restarts to the end; {within} kills left a temporary file",
        kills,
    )
