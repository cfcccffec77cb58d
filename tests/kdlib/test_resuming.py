"""A run that is killed, stopped or fails, and goes on in its folder: the same files as one that was left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdlib
from kdlib import cli
from kdlib.checkpoint import Checkpoints
from kdlib.recipe import read
from kdlib.resuming import UNFINISHED
from kdlib.run import run

FEW = {
    "name": "few",
    "data": {"kind": "digits", "train": 40, "valid": 20},
    "train": {"epochs": 2, "batch": 16, "threads": 1},
    "model": {"kind": "digits_mlp", "width": 8},
    "teacher": {"pretrain": {"train": {"epochs": 1}}},
    "student": {"control": True},
    "source": {"kind": "same_input"},
    "points": {"soft": {"kind": "soft_labels", "weight": 0.9}, "hard": {"kind": "hard_labels", "weight": 0.1}},
}
"""Five trainings of 3, 6, 3, 6 and 6 steps."""


class Killed(BaseException):
    """Ends the process for all that the program knows: nothing catches it."""


def contents(folder):
    """Return what a run left behind, by file: without times, and how often it went on."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix in (".json", ".csv", ".jsonl"):
            found[name] = timeless(path)
        elif path.name != "SHA256SUMS" and path.name != "curves.png":
            found[name] = path.read_bytes()
    return found


def timeless(path):
    text = path.read_text()
    if path.name == "metrics.csv":
        head, *lines = (line.split(",") for line in text.splitlines())
        kept = [column for column, name in enumerate(head) if name not in ("seconds", "waiting")]
        return [[line[column] for column in kept] for line in (head, *lines)]
    if path.name in ("result.json", "made_of.json"):
        return {key: value for key, value in json.loads(text).items() if key not in ("seconds", "resumed")}
    return text


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Pictures take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kdlib.figures.missing", lambda: "No pictures here.")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone."""
    return run(read(FEW), tmp_path_factory.mktemp("whole") / "run", progress=False, every=2)


def killed(folder, monkeypatch, where, count, **settings):
    """Run until something has happened so many times, and be gone."""
    owner, name = where
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying)
        with pytest.raises(Killed):
            run(read(FEW), folder, progress=False, every=2, **settings)
    return folder


STEP = (kdlib.training.Training, "take_step")
"""Called once more at the end of each epoch: 32 times in all."""


@pytest.mark.parametrize("count", [1, 6, 14, 32])
def test_killed_at_a_step_it_goes_on_to_the_same_files(tmp_path, monkeypatch, whole, count):
    folder = killed(tmp_path / "run", monkeypatch, STEP, count)
    assert not (folder / "result.json").exists()
    assert run(read(FEW), resume=folder, progress=False) == folder
    assert contents(folder) == contents(whole)
    assert json.loads((folder / "result.json").read_text())["resumed"] == 1


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (kdlib.system, "_save", 1),
        (kdlib.system, "outputs", 4),
        (kdlib.run, "_write_predictions", 1),
        (kdlib.run, "write_sums", 1),
        (kdlib.run, "end", 1),
    ],
)
def test_killed_between_trainings_it_goes_on_to_the_same_files(tmp_path, monkeypatch, whole, owner, name, count):
    folder = killed(tmp_path / "run", monkeypatch, (owner, name), count)
    run(read(FEW), resume=folder, progress=False)
    assert contents(folder) == contents(whole)


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    folder = killed(tmp_path / "run", monkeypatch, (kdlib.resuming.Keeping, "keep_scores"), 3)
    done, real, scored = [], STEP[0].take_step, []

    def counted(training, *rest):
        done.append(real(training, *rest))
        return done[-1]

    outputs = kdlib.system.outputs
    monkeypatch.setattr(STEP[0], "take_step", counted)
    monkeypatch.setattr(kdlib.system, "outputs", lambda *args: scored.append(1) or outputs(*args))
    run(read(FEW), resume=folder, progress=False)
    assert sum(done) == 0
    assert len(scored) == 2  # of the training and the test part, of the one network whose scores were not kept


def test_killed_again_and_again_it_arrives(tmp_path, monkeypatch, whole):
    folder = killed(tmp_path / "run", monkeypatch, STEP, 4)
    rounds = 0
    while not (folder / "result.json").exists():
        rounds += 1
        try:
            with monkeypatch.context() as patched:
                patched.setattr(*STEP, dying_after(STEP[0].take_step, 5))
                run(read(FEW), resume=folder, progress=False, every=1)
        except Killed:
            continue
    assert rounds > 4
    assert contents(folder) == contents(whole)
    assert json.loads((folder / "result.json").read_text())["resumed"] == rounds


def dying_after(real, count):
    calls = []

    def dying(*args):
        calls.append(1)
        if len(calls) > count:
            raise Killed
        return real(*args)

    return dying


def test_a_finished_run_has_nothing_left_to_go_on_with(tmp_path, whole):
    assert not (whole / UNFINISHED).exists()
    said = []
    before = contents(whole)
    assert run(read(FEW), resume=whole, progress=False, say=said.append) == whole
    assert said == [f"{whole}: is finished; there is nothing left to do."]
    assert contents(whole) == before
    with pytest.raises(
        kdlib.RecipeError, match=r"is finished, and its recipe is another[\s\S]*epochs: there 2, here 3"
    ):
        run(read(FEW, ["student.train.epochs=3"]), resume=whole, progress=False)


def test_a_failed_run_goes_on_when_the_reason_is_gone(tmp_path, monkeypatch, whole):
    folder = tmp_path / "run"

    def failing(*_):
        raise kdlib.KdlibError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", failing)
        with pytest.raises(kdlib.KdlibError, match="disk is full"):
            run(read(FEW), folder, progress=False)
    run(read(FEW), resume=folder, progress=False)
    assert contents(folder) == contents(whole)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    return killed(tmp_path / "run", monkeypatch, STEP, 20)


def refused(folder, recipe=FEW, changes=(), error=kdlib.RecipeError):
    with pytest.raises(error) as refusal:
        run(read(recipe, list(changes)), resume=folder, progress=False)
    return str(refusal.value)


def test_another_recipe_is_refused_with_both_sides(stopped, whole):
    text = refused(stopped, changes=["points.soft.temperature=2.0", "student.train.seed=3"])
    assert "recipe.systems.main.points.soft.temperature: there 4.0, here 2.0" in text or "temperature: there" in text
    assert "recipe.systems.main.student.train.seed: there 0, here 3" in text
    run(read(FEW), resume=stopped, progress=False)  # nothing was spoilt
    assert contents(stopped) == contents(whole)


def test_a_forced_difference_is_in_the_result(stopped):
    run(read(FEW, ["student.train.epochs=3"]), resume=stopped, progress=False, force=True)
    result = json.loads((stopped / "result.json").read_text())
    assert "recipe.systems.main.student.train.epochs: there 2, here 3" in result["forced"]
    assert json.loads((stopped / "recipe.json").read_text())["systems"]["main"]["student"]["train"]["epochs"] == 3
    assert len((stopped / "main" / "student" / "metrics.csv").read_text().splitlines()) == 4


def test_a_forced_difference_is_not_forgotten_by_the_next_process(stopped, monkeypatch):
    other = read(FEW, ["student.train.epochs=3"])
    with monkeypatch.context() as patched:
        patched.setattr(kdlib.run, "_write_predictions", dying_after(None, 0))
        with pytest.raises(Killed):
            run(other, resume=stopped, progress=False, force=True)
    run(other, resume=stopped, progress=False)
    result = json.loads((stopped / "result.json").read_text())
    assert "recipe.systems.main.student.train.epochs: there 2, here 3" in result["forced"]
    assert result["resumed"] == 2


def test_a_longer_one_cycle_is_refused_in_plain_words_even_by_force(tmp_path, monkeypatch):
    recipe = {**FEW, "train": {**FEW["train"], "schedule": "one_cycle"}}
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(*STEP, dying_after(STEP[0].take_step, 7))
        with pytest.raises(Killed):
            run(read(recipe), folder, progress=False, every=1)
    with pytest.raises(kdlib.TrainingError, match="follows a schedule over the whole training"):
        run(read(recipe, ["train.epochs=4"]), resume=folder, progress=False, force=True)


def test_the_number_of_loader_workers_is_no_difference(stopped, whole):
    run(read(FEW, ["student.train.workers=2"]), resume=stopped, progress=False)
    assert contents(stopped) == contents(whole)


def test_other_data_is_refused(stopped, monkeypatch):
    real = kdlib.TensorPart.fingerprint
    monkeypatch.setattr(kdlib.TensorPart, "fingerprint", lambda part, index: real(part, index)[::-1])
    assert "data..test.items: there" in refused(stopped)


def test_other_weights_of_a_teacher_are_refused(tmp_path, monkeypatch, whole):
    weights = shutil.copy(whole / "main" / "teacher.safetensors", tmp_path / "teacher.safetensors")
    recipe = {**FEW, "teacher": {"weights": str(weights)}}
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(*STEP, dying_after(STEP[0].take_step, 4))
        with pytest.raises(Killed):
            run(read(recipe), folder, progress=False)
    shutil.copy(whole / "main" / "student.safetensors", weights)
    assert f"weights.{weights}: there" in refused(folder, recipe)


def test_another_number_of_threads_is_refused(stopped):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert f"threads: there {threads}, here {threads + 1}" in refused(stopped)
    finally:
        torch.set_num_threads(threads)


def test_another_version_is_refused(stopped, monkeypatch):
    monkeypatch.setattr("kdlib.made_of.versions", lambda *_: {"torch": "1.0"})
    assert 'versions.torch: there "2' in refused(stopped)


def test_a_teacher_that_was_changed_in_between_is_refused(tmp_path, monkeypatch):
    folder = killed(tmp_path / "run", monkeypatch, STEP, 30)
    path = folder / UNFINISHED / "main" / "teacher.safetensors"
    tensors, notes = kdlib.files.read_tensors(path)
    name = next(name for name in tensors if name.startswith("choice/weights/student"))
    tensors[name] += 1
    kdlib.files.write_tensors(path, tensors, notes)
    assert "teachers.0.state: there" in refused(folder, error=kdlib.TrainingError)


def test_a_folder_without_a_run_is_refused(tmp_path):
    assert "there is no run to resume" in refused(tmp_path, error=kdlib.KdlibError)
    (tmp_path / "recipe.json").write_text("{}")
    assert "made_of.json: cannot be read" in refused(tmp_path, error=kdlib.KdlibError)
    for text in ("[1", "[1]", "{}", "[" * 100_000):
        (tmp_path / "made_of.json").write_text(text)
        assert "cannot be resumed" in refused(tmp_path, error=kdlib.KdlibError)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(stopped, whole):
    path = next((stopped / UNFINISHED / "main").glob("continued*.safetensors"), None) or next(
        path for path in (stopped / UNFINISHED / "main").glob("*.previous.safetensors")
    )
    path = path.with_name(path.name.replace(".previous", ""))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"damaged[\s\S]*Going on from the one before"):
        run(read(FEW), resume=stopped, progress=False)
    assert contents(stopped) == contents(whole)


def test_kept_scores_that_are_damaged_are_made_anew(tmp_path, monkeypatch, whole):
    folder = killed(tmp_path / "run", monkeypatch, (kdlib.resuming.Keeping, "keep_scores"), 3)
    path = folder / UNFINISHED / "main" / "without-scores.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="It is made anew"):
        run(read(FEW), resume=folder, progress=False)
    assert contents(folder) == contents(whole)


def test_what_is_left_half_written_goes(stopped):
    left = [stopped / f".x.{kdlib.files.HOST}.999999999", stopped / "main" / f".y.{kdlib.files.HOST}.999999999"]
    for path in left:
        path.write_text("half")
    run(read(FEW), resume=stopped, progress=False)
    assert not any(path.exists() for path in left)
    assert not list(stopped.rglob(".*"))


# the command

EPOCHS = "systems.main.student.train.epochs=3"
"""The recipe of a run has all its systems under `systems`."""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that calls the command, and returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.json").write_text(json.dumps(FEW))
    monkeypatch.setattr("warnings.showwarning", None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdlib", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code, captured.out + captured.err

    return call


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_ends_the_step_saves_and_says_how_to_go_on(command, monkeypatch, tmp_path, whole, number, code):
    real, calls = STEP[0].take_step, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(number)
        return real(*args)

    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patched:
        patched.setattr(*STEP, signalled)
        left, text = command("run", "few.json", "--out", "run", "--save-every", 2, "--quiet")
    assert left == code
    assert f"Stopped by {number.name} after step" in text
    assert "Go on with: kdlib run --resume run" in text
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    left, text = command("run", "--resume", "run", "--quiet")
    assert left == 0, text
    assert "Everything is in run" in text
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_between_trainings_leaves_with_its_code_too(command, monkeypatch, number, code):
    monkeypatch.setattr(kdlib.system, "outputs", lambda *_: signal.raise_signal(number))
    left, text = command("run", "few.json", "--out", "run", "--quiet")
    assert left == code
    assert "Stopped by" in text
    assert "Go on with: kdlib run --resume run" in text


def test_the_command_refuses_another_recipe_and_forces_it(command, monkeypatch, tmp_path):
    killed(tmp_path / "run", monkeypatch, STEP, 20)
    left, text = command("run", "few.json", "--set", "student.train.epochs=3", "--resume", "run")
    assert left == 2
    assert "epochs: there 2, here 3" in text
    left, text = command("run", "--set", EPOCHS, "--resume", "run", "--force", "--quiet")
    assert left == 0, text
    assert json.loads((tmp_path / "run" / "result.json").read_text())["forced"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run"], "Name a recipe, or a run to go on with"),
        (["run", "few.json", "--force"], "--force is for --resume"),
        (["run", "few.json", "--out", "a", "--resume", "b"], "leave out=, --out, away"),
        (["run", "--resume", "nowhere"], "nowhere"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(command, arguments, text):
    left, said = command(*arguments)
    assert left == 2
    assert text in said


def test_a_process_that_is_sent_sigterm_leaves_with_143_and_goes_on(tmp_path, whole):
    (tmp_path / "few.json").write_text(json.dumps(FEW))
    arguments = [sys.executable, "-c", SIGNALLED, "run", "few.json", "--out", "run", "--quiet", "--save-every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    run(read(FEW), resume=tmp_path / "run", progress=False)
    assert contents(tmp_path / "run") == contents(whole)


SIGNALLED = """
import os, signal, sys
from kdlib import cli
from kdlib.training import Training
real, calls = Training.take_step, []
def signalled(*args):
    calls.append(1)
    if len(calls) == 13:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
Training.take_step = signalled
cli.main()
"""


def test_a_training_that_no_checkpoint_can_hold_begins_anew_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(kdlib.system, "unsaved", lambda distiller: ["the point X has a method 'advance'"])
    with pytest.warns(UserWarning, match="has no checkpoints: the point X"):
        run(read(FEW), tmp_path / "run", progress=False)
    assert (Path(tmp_path) / "run" / "result.json").exists()
