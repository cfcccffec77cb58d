"""What goes wrong in a training stops it before a step, and leaves nothing behind; how many load it changes no bit."""

import gc
import multiprocessing
import os
import threading
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.points.fitnet import FitNet
from kdlib.recipe import read
from kdlib.run import run

GLOBAL = (
    *(f"_global_{name}_hooks" for name in ("forward", "forward_pre", "backward", "backward_pre")),
    *(f"_global_{name}_registration_hooks" for name in ("buffer", "parameter", "module")),
)


@pytest.fixture(scope="module")
def parts():
    return digits(train=60, valid=20)


# what an exception leaves


class Odd(Exception):
    """What no part of kdlib raises or expects."""


class Student(nn.Module):
    """A network whose hidden layer and logits are tapped."""

    def __init__(self):
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.norm(self.hidden(x)).relu())


class Stages:
    """A whole training in which a stage raises at one of its calls. The calls of all are counted."""

    def __init__(self, stage=None, call=0):
        self.stage, self.call, self.calls = stage, call, Counter()

    def at(self, stage):
        self.calls[stage] += 1
        if stage == self.stage and self.calls[stage] == self.call:
            raise Odd(stage)

    def fit(self, parts, student, teacher, folder):
        stages = self

        class Part(kdlib.TensorPart):
            def __getitem__(self, key):
                stages.at("item")
                return super().__getitem__(key)

        class Source:
            def __init__(self):
                self.teacher = teacher

            def __call__(self, batch):
                stages.at("source")
                return self.teacher(batch["x"])

            def dataset(self, part):
                stages.at("source.dataset")
                return part

            def advance(self, student):
                stages.at("source.advance")

            def difference(self, part):
                stages.at("source.difference")
                return {"none": 0.0}

        class Point(FitNet):
            def prepare(self, student, teacher, batch):
                stages.at("point.prepare")
                super().prepare(student, teacher, batch)

            def forward(self, student, teacher, batch):
                stages.at("point")
                return super().forward(student, teacher, batch)

        def broken_backward(student, teacher, batch):
            logits = student["logits"]
            logits.requires_grad and logits.register_hook(lambda _: stages.at("backward"))
            return logits.square().mean()

        def optimizer(parameters, lr):
            stages.at("optimizer")
            return torch.optim.SGD(parameters, lr=lr)

        train = Part(parts.train.x, parts.train.labels)
        distiller = kdlib.Distiller(student, Source(), hint=Point(tap="hidden"), last=broken_backward)
        kdlib.fit(
            distiller,
            train,
            valid=parts.valid,
            epochs=2,
            batch=30,
            optimizer=optimizer,
            folder=folder,
            callbacks=[lambda event: self.at(f"callback.{event.kind}")],
            progress=False,
        )


STAGES = (
    *("item", "source", "source.dataset", "source.advance", "source.difference", "point", "point.prepare", "backward"),
    *("optimizer", "callback.step", "callback.epoch", "callback.end"),
)


def hooks_of(*modules):
    """Count the hooks on modules, on their parameters, and on everything."""
    found = [value for name in GLOBAL if (value := getattr(nn.modules.module, name))]
    for module in modules:
        for part in module.modules():
            found += [value for name, value in vars(part).items() if name.endswith("_hooks") and value]
        for parameter in module.parameters():
            found += [parameter._backward_hooks] if parameter._backward_hooks else []
            found += [parameter._post_accumulate_grad_hooks] if parameter._post_accumulate_grad_hooks else []
    found += [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
    return sum(map(len, found))


def left(student, teacher):
    """Count what a training could leave behind."""
    gc.collect()
    return {
        "hooks": hooks_of(student, teacher.model),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "processes": len(multiprocessing.active_children()),
        "modes": [part.training for part in student.modules()],
        "random state": torch.get_rng_state().tolist(),
        "thread count": torch.get_num_threads(),
    }


def test_a_hundred_trainings_with_exceptions_at_every_stage_leave_nothing_behind(parts, tmp_path):
    student = kdlib.Tapped(Student(), hidden="hidden", logits="")
    teacher = kdlib.freeze(kdlib.Tapped(Student(), hidden="hidden", logits=""))
    whole = Stages()
    whole.fit(parts, student, teacher, tmp_path)
    assert set(whole.calls) == set(STAGES)
    before = left(student, teacher)
    assert before["hooks"] == 2  # the taps' own
    for number in range(100):
        stage = STAGES[number % len(STAGES)]
        call = 1 + number // len(STAGES) * whole.calls[stage] // 9  # from its first to its last
        with pytest.raises(Odd):
            Stages(stage, call).fit(parts, student, teacher, tmp_path)
    assert left(student, teacher) == before
    student.remove()
    teacher.model.remove()
    assert hooks_of(student, teacher.model) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl", "teacher.json"]


# what is not finite


class Poisoned(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(context, x, value):
        context.value = value
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.full_like(gradient, context.value), None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["input", "teacher", "loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step_and_names_the_samples(parts, where, value):
    victim = 41
    steps, states, student = [], [], DigitsMLP(width=8)
    net = DigitsMLP(width=8)

    def hit(batch):
        """Tell whether the victim is in the batch of the second epoch."""
        return victim in batch["index"].tolist() and int(batch["epoch"][0]) == 1

    class Part(kdlib.TensorPart):
        def __getitem__(self, key):
            item = super().__getitem__(key)
            if where == "input" and key == (1, victim):
                item["x"] = item["x"].clone().index_fill_(0, torch.tensor(3), value)
            return item

    def source(batch):
        logits = net(batch["x"])["logits"].detach()
        return {"logits": logits.fill_(value) if where == "teacher" and hit(batch) else logits}

    def point(student, teacher, batch):
        loss = (student["logits"] - teacher["logits"]).square().mean()
        if not hit(batch):
            return loss
        return loss * value if where == "loss" else Poisoned.apply(loss, value) if where == "gradient" else loss

    def seen(event):
        if event.kind == "step":
            steps.append(event)
            states.append({name: tensor.clone() for name, tensor in student.state_dict().items()})

    with pytest.raises(kdlib.TrainingError, match=r"is not finite at step \d, epoch 1") as caught:
        kdlib.fit(
            kdlib.Distiller(student, source, point=point),
            Part(parts.train.x, parts.train.labels),
            epochs=2,
            batch=20,
            callbacks=[seen],
            progress=False,
        )
    named = str(caught.value).rpartition(": ")[2].rstrip(".").split(", ")
    order = [batch["index"].tolist() for batch in kdlib.Loader(parts.train, batch=20).epoch(1)]
    batch = next(one for one in order if victim in one)
    assert sorted(map(int, named)) == sorted([victim] if where == "input" else batch)
    assert len(steps) == 3 + order.index(batch)
    for name, tensor in student.state_dict().items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, states[-1][name])


# how many load the data

SCENES = {
    "name": "scenes",
    "data": {"kind": "synthetic_scenes", "seconds": 0.5, "places": 4, "segments": 1, "test": 0.5},
    "train": {"epochs": 2, "batch": 8, "threads": 1},
    "features": {"kind": "spectrogram", "coefficients": 16, "roll": True, "time_masks": 1},
    "model": {"kind": "spectrogram_cnn_gru", "width": 0.05},
    "source": {"kind": "multi_segment", "segments": 2, "join": "input"},
    "points": {"hidden": {"kind": "hidden_mse"}},
    "scorer": {"kind": "svm"},
}


def test_the_files_of_a_run_are_the_same_for_0_1_and_3_loader_workers(tmp_path):
    """Sounds, features with augmentation, partners drawn anew each epoch, dropout, a scorer: every byte."""
    made = {}
    for workers in (0, 1, 3):
        folder = run(read(SCENES, [f"train.workers={workers}"]), tmp_path / str(workers), progress=False)
        made[workers] = {path.name: path.read_bytes() for path in sorted((folder / "main").glob("*.safetensors"))}
        made[workers]["predictions"] = (folder / "predictions.csv").read_bytes()
    assert sorted(made[0])[1:] == [
        *("predictions", "student-scorer.safetensors", "student.safetensors", "teacher-scorer.safetensors"),
        "teacher.safetensors",
    ]
    assert made[0] == made[1] == made[3]
