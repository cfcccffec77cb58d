"""Runs that are killed at random moments, and go on: the same files as a run that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = 5
"""Of each of the four kinds of run."""
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ALONE = [sys.executable]
DIGITS = ["digits", "train.epochs=8", "student.train.epochs=16", "train.schedule=one_cycle"]
SCENES = [
    "asc_quick",
    "data.places=6",
    "data.segments=2",
    "data.validation=0.25",
    "data.seconds=2.0",
    "train.epochs=2",
    "train.batch=16",
    "train.threads=1",
    "systems.spectrogram.teacher.pretrain.train.epochs=1",
]
WAIT = 240


def command(recipe, workers, *more, launcher=ALONE):
    name, *changes = [*recipe, f"train.workers={workers}"]
    settings = [word for change in changes for word in ("--set", change)]
    return [*launcher, "-m", "kdlib", "run", name, *settings, "--save-every", "2", "--quiet", *map(str, more)]


def start(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, env=environment, start_new_session=True, **quiet)


def finish(arguments):
    process = start(arguments)
    said = process.communicate(timeout=WAIT)[0]
    assert process.returncode == 0, said


def times_begun(folder):
    """Return how often a process began or went on with the run of a folder."""
    try:
        return 1 + json.loads((folder / "made_of.json").read_text())["resumed"]
    except OSError:
        return 0


def begun(process, folder, before):
    """Wait until a process is at work."""
    last = time.monotonic() + WAIT
    while times_begun(folder) == before and process.poll() is None and time.monotonic() < last:
        time.sleep(0.01)


def of_job(folder):
    """Return the processes that have the folder on their command line: workers and ranks have it from their parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def alone_again(folder):
    """Wait until none of a job's processes is left; a loader's worker looks every few seconds for its parent."""
    last = time.monotonic() + 60
    while of_job(folder) and time.monotonic() < last:
        time.sleep(0.1)
    return of_job(folder)


def kill(process, folder, launcher):
    """Kill the job as a machine that is taken away does; of one process its workers must find out themselves."""
    for number in of_job(folder) if launcher is RANKS else [process.pid]:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def contents(folder):
    """Return what a run left behind, by file: without times, and how often it went on."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name == "SHA256SUMS":  # of result.json, with its times
            continue
        value = path.read_bytes()
        if path.name in ("result.json", "made_of.json"):
            value = {key: one for key, one in json.loads(value).items() if key not in ("seconds", "resumed")}
        elif path.name == "metrics.csv":
            head, *lines = (line.split(",") for line in value.decode().splitlines())
            kept = [column for column, name in enumerate(head) if name not in ("seconds", "waiting")]
            value = [[line[column] for column in kept] for line in (head, *lines)]
        found[path.relative_to(folder).as_posix()] = value
    return found


def killed_again_and_again(tmp_path, recipe, workers, kills, launcher=ALONE):
    """Return the folder of a run that was left alone, those of runs that were killed, and how far they were each."""
    draw = random.Random(f"{recipe[0]} {workers} {len(launcher)}")
    whole = tmp_path / "whole"
    process = start(command(recipe, workers, "--out", whole, launcher=launcher))
    begun(process, whole, 0)
    started = time.monotonic()
    said = process.communicate(timeout=WAIT)[0]
    assert process.returncode == 0, said
    taken = time.monotonic() - started
    done, left, moments, folders = 0, [], [], []
    while done < kills:
        folder = tmp_path / f"killed-{len(folders)}"
        folders.append(folder)
        while done < kills:
            more = ["--resume", folder] if times_begun(folder) else ["--out", folder]
            before = times_begun(folder)
            process = start(command(recipe, workers, *more, launcher=launcher))
            begun(process, folder, before)
            time.sleep(draw.uniform(0, 0.7 * taken))
            if process.poll() is not None:
                assert process.returncode == 0, process.communicate()[0]
                break
            kill(process, folder, launcher)
            done += 1
            left += alone_again(folder)
            moments.append(sum(path.read_bytes().count(b"\n") for path in folder.rglob("metrics.jsonl")))
        if not (folder / "result.json").exists() or (folder / "unfinished").exists():
            finish(command(recipe, workers, "--resume", folder, launcher=launcher))
    return whole, folders, moments, left


def compared(whole, folders):
    expected = contents(whole)
    for folder in folders:
        found = contents(folder)
        assert found.keys() == expected.keys()
        different = [name for name in expected if found[name] != expected[name]]
        assert different == [], folder
    return sum(name.endswith(".safetensors") for name in expected)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("recipe", [DIGITS, SCENES], ids=lambda recipe: recipe[0])
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_was_not(tmp_path, table, recipe, workers):
    whole, folders, moments, left = killed_again_and_again(tmp_path, recipe, workers, KILLS)
    weights = compared(whole, folders)
    assert left == []
    assert not [path for folder in folders for path in folder.rglob(".*")]
    place = f"after steps {', '.join(map(str, moments))}"
    table(f"SIGKILL, {recipe[0]}, {workers} workers", f"{weights} weight files and all others equal; {place}", KILLS)


@pytest.mark.timeout(1500)
def test_a_run_of_two_ranks_that_is_killed_ends_as_one_that_was_not(tmp_path, table):
    whole, folders, moments, left = killed_again_and_again(tmp_path, DIGITS, 0, KILLS, RANKS)
    weights = compared(whole, folders)
    assert left == []
    place = f"after steps {', '.join(map(str, moments))}"
    table("SIGKILL, digits, 2 ranks", f"{weights} weight files and all others equal; {place}", KILLS)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_saves_the_step_with_workers_too(tmp_path, table, number, code):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    finish(command(DIGITS, 2, "--out", whole))
    process = start(command(DIGITS, 2, "--out", folder))
    last = time.monotonic() + WAIT
    while not list(folder.rglob("student/metrics.jsonl")) and time.monotonic() < last:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=WAIT)[0]
    assert process.returncode == code, said
    assert "Go on with: kdlib run --resume" in said
    assert alone_again(folder) == []
    finish(command(DIGITS, 2, "--resume", folder))
    compared(whole, [folder])
    table(f"{number.name} to the whole process group, 2 workers", f"exit {code}, resumed equal", 1)
