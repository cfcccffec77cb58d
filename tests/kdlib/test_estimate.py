"""What a dry run says beside what the run then does."""

import sys

import pytest
import torch

import kdlib
from kdlib import cli
from kdlib.digits import DigitsMLP
from kdlib.estimate import COPIES, estimate
from kdlib.recipe import read
from kdlib.run import run

DIGITS = {
    "name": "tried",
    "data": {"kind": "digits", "train": 50, "valid": 30},
    "train": {"epochs": 3, "batch": 20, "threads": 1},
    "model": {"kind": "digits_mlp", "width": 12},
    "source": {"kind": "same_input"},
    "points": {"soft": {"kind": "soft_labels"}, "hard": {"kind": "hard_labels"}},
}
RECIPES = {
    "plain": {},
    "control from the teacher": {"student": {"start": "teacher", "control": True, "train": {"epochs": 5}}},
    "a first training of both": {"teacher": {"pretrain": {"model": {"width": 6}, "train": {"epochs": 2}}}},
    "accumulation": {"train": {"epochs": 2, "batch": 7, "accumulate": 3}},
    "cross-fitting": {"teacher": {"cross_fit": 2}},
}
FOLDERS = {
    "teacher": "teacher",
    "teacher, first step": "pretrain",
    "student": "student",
    "student, first step": "student-pretrain",
    "control": "continued",
    "teacher without part 0": "teacher-without-0",
    "teacher without part 1": "teacher-without-1",
}


def steps_of(folder):
    return len((folder / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("name", RECIPES)
def test_each_training_and_its_steps_are_those_of_the_run(name, tmp_path):
    recipe = read({**DIGITS, **RECIPES[name]})
    cost = estimate(recipe)
    folder = run(recipe, tmp_path / "run", progress=False) / "main"
    logs = {path.parent.name for path in folder.rglob("metrics.jsonl")}
    assert {FOLDERS[one.training] for one in cost.costs} == logs
    for one in cost.costs:
        assert one.steps == steps_of(folder / FOLDERS[one.training])


def test_one_network_without_a_source(tmp_path):
    cost = estimate(read({key: DIGITS[key] for key in ("data", "train", "model")}))
    assert [one.training for one in cost.costs] == ["teacher"]


def test_a_teacher_that_is_loaded_is_not_trained(tmp_path):
    folder = run(read(DIGITS), tmp_path / "run", progress=False)
    weights = {"teacher": {"weights": str(folder / "main" / "teacher.safetensors")}}
    assert [one.training for one in estimate(read({**DIGITS, **weights})).costs] == ["student"]


def test_memory_is_what_a_backward_pass_of_the_whole_batch_keeps():
    """Linear, ReLU, Linear, log-softmax, each on 40 rows: input, two outputs of the hidden layer's size at most, and
    the labels."""
    width, rows = 4000, 40
    recipe = {key: DIGITS[key] for key in ("data", "model")} | {"train": {"epochs": 1, "batch": rows, "threads": 1}}
    (one,) = estimate(read(recipe | {"model": {"kind": "digits_mlp", "width": width}})).costs
    weights = COPIES * sum(parameter.nbytes for parameter in DigitsMLP(width=width).parameters())
    kept = 4 * rows * (64 + width + 10)
    assert weights + kept <= one.memory <= weights + kept + 4 * rows * (width + 20)


def test_folds_are_added_up():
    cost = estimate(read(DIGITS))
    assert cost.seconds == pytest.approx(cost.other + sum(one.seconds for one in cost.costs))
    assert cost.memory >= cost.program + max(one.memory for one in cost.costs)
    several = type(cost)(cost.costs, 5, cost.other, cost.kept, cost.program)
    assert several.seconds == pytest.approx(5 * cost.seconds)


def test_it_changes_no_random_state_and_no_thread_count():
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    estimate(read(DIGITS))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_command_says_it_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kdlib", "run", "digits", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("teacher", "control", "student", "240", "800", "in all", "this machine has"):
        assert word in text
    assert list(tmp_path.iterdir()) == []


def test_a_part_may_tell_what_it_keeps():
    class Telling(kdlib.TensorPart):
        def memory(self):
            return 12345

    class Mine:
        @kdlib.hookimpl
        def kdlib_datasets(self):
            return {"telling": telling}

    def telling():
        part = Telling(torch.rand(40, 64), torch.arange(40) % 10)
        return kdlib.Parts(part, None, part, tuple("0123456789"))

    kdlib.register(Mine(), "telling")
    assert estimate(read({**DIGITS, "data": {"kind": "telling"}})).kept == 12345


class Halves(torch.nn.Module):
    """Features without statistics."""

    time_axis = -1

    def forward(self, samples):
        return samples / 2


def test_features_that_are_kept_on_disk_take_no_memory(tmp_path):
    class Mine:
        @kdlib.hookimpl
        def kdlib_features(self):
            return {"halves": Halves}

    kdlib.register(Mine(), "halves")
    with_features = {**DIGITS, "features": {"kind": "halves"}}
    items = 1797 * 64 * 4  # all parts, float32
    assert estimate(read(with_features)).kept == items
    assert estimate(read({**with_features, "cache": {"folder": str(tmp_path / "cache")}})).kept == 0
    assert list(tmp_path.iterdir()) == []
