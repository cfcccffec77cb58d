"""The command under torchrun: two processes do what one does, write it once, and do not outlive each other."""

import csv
import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from kdlib.cli import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kdlib"]
RUN = [
    "run",
    "digits",
    "--set=data={kind='digits',train=75,valid=20}",  # the last batch has 11 rows
    "--set=train={epochs=2,threads=1,batch=32}",
    "--set=student.control=false",
    "--set=student.train.epochs=2",
]
FATAL = '''
"""A point that kills its process on one rank, in the middle of a training."""
import os, signal
import kdlib

class Fatal:
    calls = 0

    def __call__(self, student, teacher, batch):
        self.calls += 1
        if self.calls == 8 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return student["logits"].square().mean()

@kdlib.hookimpl
def kdlib_points():
    return {"fatal": Fatal}
'''
RECIPE = """
[data]
kind = "digits"
[train]
epochs = 100
batch = 4
[model]
kind = "digits_mlp"
width = 4
[points.fatal]
kind = "fatal"
"""


def ran(folder, *arguments):
    """Run the command in two processes. Ranks wait for one another for an hour, so what is over in time was ended."""
    return subprocess.run([*TORCHRUN, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The run folders of one process and of two, and what the two printed."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kdlib", *RUN, "--quiet", f"--out={place / 'one'}"])
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == 0
    done = ran(place, *RUN)
    assert done.returncode == 0, done.stderr
    (two,) = (place / "runs" / "digits").iterdir()  # one name, that all ranks agreed upon
    return place / "one", two, done


def test_two_processes_write_what_one_writes_up_to_rounding(folders):
    one, two, _ = folders
    assert {path.relative_to(one) for path in one.rglob("*")} == {path.relative_to(two) for path in two.rglob("*")}
    for path in sorted(one.rglob("*.safetensors")):
        tensors, others = load_file(path), load_file(two / path.relative_to(one))
        assert tensors.keys() == others.keys()
        assert all((tensors[name] - others[name]).abs().max() < 1e-6 for name in tensors)
    assert (one / "recipe.json").read_bytes() == (two / "recipe.json").read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    assert results[0]["rows"] == results[1]["rows"]
    assert [result["environment"]["ranks"] for result in results] == [1, 2]
    for path in sorted(one.rglob("metrics.csv")):
        both = [list(csv.DictReader(file.read_text().splitlines())) for file in (path, two / path.relative_to(one))]
        for line, other in zip(*both, strict=True):
            del line["seconds"], other["seconds"], line["waiting"], other["waiting"]
            assert {name: float(value) for name, value in line.items()} == pytest.approx(
                {name: float(value) for name, value in other.items()}, rel=1e-5
            )


def test_it_prints_once(folders):
    _, two, done = folders
    for text in ("digits: 75 to train on", "student: 2 epochs, 6 steps", "digits: test part", "Everything is in"):
        assert done.stdout.count(text) == 1, done.stdout
    assert two.name in done.stdout
    assert "warning" not in (done.stdout + done.stderr).lower()


def test_a_killed_rank_ends_the_job_and_is_named(tmp_path):
    (tmp_path / "fatal_point.py").write_text(FATAL)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = ran(tmp_path, "run", "recipe.toml", "--plugin=fatal_point", "--out=run", "--set=train.threads=1")
    assert done.returncode != 0
    assert "(local_rank: 1)" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()
