"""The training loop: what it does equals a loop by hand, and what it must not do it does not."""

import copy
import csv
import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

import kdlib
from kdlib.digits import DigitsMLP, digits


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on a busy machine take many times as long for matrices this small
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parts():
    return digits(train=100, valid=40)


@pytest.fixture(scope="module")
def teacher():
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return kdlib.freeze(DigitsMLP(width=32))


def built(seed=1, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DigitsMLP(width=width)


def distil(student, teacher):
    return kdlib.Distiller(
        student,
        kdlib.SameInput(teacher),
        soft=(0.9, kdlib.SoftLabels(temperature=4.0)),
        hard=(0.1, kdlib.HardLabels()),
    )


def alone(student):
    return kdlib.Distiller(student, hard=kdlib.HardLabels())


def fit(distiller, train, **settings):
    return kdlib.fit(distiller, train, **{"epochs": 2, "batch": 32, "progress": False, **settings})


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def apart(one, other):
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


class Net(nn.Module):
    """A network of pixels for what a part's digits do not show: norms, dropout, convolutions."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return {"logits": self.layers(x)}


def normed(dropout=0.0):
    return Net(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10))


# the loop


def test_the_loop_by_hand_gives_bit_equal_weights(parts, teacher):
    by_fit, by_hand = built(), built()
    history = fit(distil(by_fit, teacher), parts.train, epochs=3, seed=5, lr=1e-3)

    distiller = distil(by_hand, teacher)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-3)
    loader = kdlib.Loader(parts.train, batch=32, seed=5)
    for _ in range(3):
        for batch in loader:
            losses = distiller(batch)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
    assert equal(state(by_fit), state(by_hand))
    assert not equal(state(by_fit), state(built()))
    assert history.steps == 12


def test_it_trains(parts):
    student = built(width=64)
    history = fit(alone(student), parts.train, epochs=40, lr=1e-2)
    x, y = parts.test.x, torch.tensor(parts.test.labels)
    assert (student(x)["logits"].argmax(-1) == y).float().mean() > 0.75  # guessing: 0.1
    assert history.epochs[-1]["hard"] < 0.2 * history.epochs[0]["hard"]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_are_bit_equal_and_another_seed_is_not(parts, workers):
    def run(seed, workers=0):
        student = built()
        fit(alone(student), parts.train, epochs=2, seed=seed, workers=workers)
        return state(student)

    assert equal(run(3), run(3, workers))
    assert not equal(run(3), run(4))


def test_a_plain_data_set_trains_like_the_same_part(parts):
    one, other = built(), built()
    fit(alone(one), parts.train)
    fit(alone(other), TensorDataset(parts.train.x, torch.tensor(parts.train.labels)))
    assert equal(state(one), state(other))


def test_the_docstrings_example_runs():
    data = TensorDataset(torch.randn(40, 4), torch.arange(40) % 2)
    history = fit(alone(kdlib.Tapped(nn.Linear(4, 2), logits="")), data, epochs=2, batch=8)
    assert history.steps == 10


def test_the_teacher_is_bit_equal_after_it(parts):
    net = normed(0.5)
    net(parts.train.x)  # running statistics that are not the initial ones
    frozen = kdlib.freeze(net)
    before = state(net)
    fit(distil(built(), frozen), parts.train, valid=parts.valid, epochs=3)
    assert equal(state(net), before)
    assert not any(part.training for part in net.modules())


def test_a_frozen_part_of_the_student_stays_bit_equal_under_weight_decay(parts):
    student = built()
    student.hidden.requires_grad_(False)
    before = state(student)
    fit(alone(student), parts.train, optimizer="adamw")
    changed = {name for name, value in state(student).items() if not torch.equal(value, before[name])}
    assert changed == {"output.weight", "output.bias"}


def test_a_projector_is_prepared_trained_and_belongs_to_the_distiller(parts, teacher):
    class Projected(nn.Module):
        def prepare(self, student, teacher, batch):
            self.map = nn.Linear(student["embedding"].shape[-1], teacher["embedding"].shape[-1])
            self.first = self.map.weight.detach().clone()

        def forward(self, student, teacher, batch):
            return mse_loss(self.map(student["embedding"]), teacher["embedding"])

    def run(prepared):
        torch.manual_seed(7)
        point = Projected()
        distiller = kdlib.Distiller(built(), kdlib.SameInput(teacher), hidden=point)
        if prepared:
            distiller.prepare(next(iter(kdlib.Loader(parts.train, batch=4))))
            made = point.map
        fit(distiller, parts.train)
        assert not torch.equal(point.map.weight, point.first)
        if prepared:
            assert point.map is made  # not made anew: a loaded state would be lost
        return distiller

    run(prepared=True)
    torch.manual_seed(1)
    one = state(run(prepared=False))
    torch.manual_seed(2)
    assert equal(one, state(run(prepared=False)))


def test_advance_is_called_once_a_step_also_with_accumulation(parts):
    class Counting:
        calls = 0

        def __call__(self, student, teacher, batch):
            return student["logits"].square().mean()

        def advance(self, student):
            self.calls += 1

    point = Counting()
    distiller = kdlib.Distiller(built(), p=point)
    history = fit(distiller, parts.train, batch=16, accumulate=2, epochs=3)
    assert history.steps == point.calls == int(distiller.step) == 3 * 4


def test_schedules_follow_step_and_epoch(parts):
    seen = []

    def weight(step, epoch):
        seen.append((step, epoch))
        return 1.0

    fit(kdlib.Distiller(built(), hard=(weight, kdlib.HardLabels())), parts.train, epochs=2)
    check, *steps = seen
    assert check == (0, 0)
    # Asked for the loss, and for the log.
    assert list(dict.fromkeys(steps)) == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1), (7, 1)]


def test_validation_sees_the_schedules_as_they_are(parts):
    ramp = kdlib.Schedule(kind="linear", start=1.0, end=3.0, epochs=2)
    history = fit(
        kdlib.Distiller(built(), hard=(ramp, kdlib.HardLabels())), parts.train, valid=parts.valid, epochs=3, lr=0.0
    )
    weights = [record["valid_total"] / record["valid_hard"] for record in history.epochs]
    assert weights == pytest.approx([1.0, 2.0, 3.0], rel=1e-6)


def test_the_clock_of_a_second_training_goes_on_in_validation_too(parts):
    ramp = kdlib.Schedule(kind="linear", start=1.0, end=2.0, steps=8)  # twice the steps of a training
    distiller = kdlib.Distiller(built(), hard=(ramp, kdlib.HardLabels()))
    of_validation = []
    for _ in range(2):
        history = fit(distiller, parts.train, valid=parts.valid, epochs=1)
        of_validation.append(history.epochs[0]["valid_total"] / history.epochs[0]["valid_hard"])
    assert of_validation == pytest.approx([1.5, 2.0])


# modes and state of the caller


def test_train_mode_is_restored_every_epoch_after_validation(parts):
    student, seen = normed(), []

    def watching(taps, teacher, batch):
        seen.append((torch.is_grad_enabled(), student.training, student.layers[1].training))
        return cross_entropy(taps["logits"], batch["y"])

    fit(kdlib.Distiller(student, watching=watching), parts.train, valid=parts.valid, batch=50, epochs=3)
    check, last_batch_of_validation, *forwards = seen
    assert check == (True, True, True)
    assert last_batch_of_validation == (False, False, False)
    assert forwards == [(True, True, True), (True, True, True), (False, False, False)] * 3


def test_validation_leaves_running_statistics_alone(parts):
    student, saved = normed(), []

    def after_step(event):
        if event.kind in ("step", "epoch"):
            saved.append(state(student))

    fit(alone(student), parts.train, valid=parts.valid, batch=100, epochs=1, callbacks=[after_step])
    assert equal(*saved)  # between the last step and the epoch's end nothing but validation happens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_modes_are_restored_at_the_end_and_after_an_error(parts, training, fails):
    student = normed()
    student.train(training)
    student.layers[1].train(not training)
    before = [part.training for part in student.modules()]

    def stop(event):
        if fails:
            raise RuntimeError("on purpose")

    try:
        fit(alone(student), parts.train, valid=parts.valid, callbacks=[stop])
    except RuntimeError as error:
        assert str(error) == "on purpose"  # noqa: PT017
    assert [part.training for part in student.modules()] == before


class TwoNorms(nn.Module):
    """A backbone with a norm, and a head with another, behind a wrapper that is always in train mode."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 10))

    def forward(self, x):
        return self.head(self.backbone(x))


def eval_mode_of_the_norm(net):
    net.backbone[1].eval()


def eval_mode_of_the_backbone(net):
    net.backbone.eval()


def frozen_weights_of_the_norm(net):
    net.backbone[1].requires_grad_(False)


def frozen_weights_and_a_look_before(net):
    net.backbone.requires_grad_(False)
    net.eval()


@pytest.mark.parametrize(
    "freeze",
    [
        eval_mode_of_the_norm,
        eval_mode_of_the_backbone,
        frozen_weights_of_the_norm,
        frozen_weights_and_a_look_before,
    ],
)
def test_a_norm_that_the_user_froze_keeps_its_statistics_and_the_other_does_not(parts, freeze):
    net = TwoNorms()
    freeze(net)
    student, before, inside = kdlib.Tapped(net, logits=""), state(net), []

    def watch(event):
        if event.kind == "step":
            inside.append((net.backbone[1].training, net.backbone[2].training, net.head[0].training))

    modes = [part.training for part in student.modules()]
    fit(alone(student), parts.train, valid=parts.valid, epochs=2, batch=50, callbacks=[watch])
    after = state(net)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(before[f"backbone.1.{name}"], after[f"backbone.1.{name}"])
        assert not torch.equal(before[f"head.0.{name}"], after[f"head.0.{name}"])
    assert inside == [(False, freeze is not eval_mode_of_the_backbone, True)] * 4
    assert [part.training for part in student.modules()] == modes


@pytest.mark.parametrize("look", [lambda student: student.eval(), lambda student: student.model.eval()])
def test_a_student_in_eval_mode_as_a_whole_is_trained_as_a_whole(parts, look):
    student = kdlib.Tapped(TwoNorms(), logits="")
    look(student)
    before = state(student.model)
    fit(alone(student), parts.train, epochs=1, batch=50)
    for norm in ("backbone.1", "head.0"):
        assert not torch.equal(before[f"{norm}.running_mean"], state(student.model)[f"{norm}.running_mean"])


def test_a_last_batch_of_one_row_is_no_trouble_for_a_frozen_norm(parts):
    student = normed()
    with pytest.raises(kdlib.TrainingError, match="last batch"):
        fit(alone(student), parts.train, epochs=1, batch=33)
    for part in student.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.requires_grad_(False)
    fit(alone(student), parts.train, epochs=1, batch=33)


@pytest.mark.parametrize("valid", [True, False])
def test_the_callers_random_state_and_thread_count_are_unchanged(parts, valid):
    distiller = alone(normed(0.5))
    torch.manual_seed(42)
    random, threads, inside = torch.get_rng_state(), torch.get_num_threads(), []
    fit(
        distiller,
        parts.train,
        valid=parts.valid if valid else None,
        threads=threads + 1,
        callbacks=[lambda event: inside.append(torch.get_num_threads())],
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert set(inside) == {threads + 1}


def test_the_thread_count_is_given_back_after_an_error(parts):
    def stop(event):
        raise RuntimeError("on purpose")

    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(alone(built()), parts.train, threads=threads + 1, callbacks=[stop])
    assert torch.get_num_threads() == threads


def test_dropout_is_keyed_by_the_runs_seed_and_not_by_the_callers(parts):
    def run(own, seed):
        student = normed(0.5)
        student.load_state_dict(start)
        torch.manual_seed(own)
        fit(alone(student), parts.train, epochs=2, seed=seed)
        return state(student)

    start = state(normed(0.5))
    assert equal(run(1, 0), run(2, 0))
    assert not equal(run(1, 0), run(1, 1))


def test_dropout_differs_from_step_to_step():
    seen = []
    student = Net(nn.Dropout(0.5), nn.Linear(64, 10))
    student.layers[0].register_forward_hook(lambda module, args, output: seen.append(output == 0))
    fit(alone(student), TensorDataset(torch.ones(8, 64), torch.zeros(8, dtype=torch.int64)), batch=4, epochs=2)
    assert len(seen) == 1 + 4  # the check, and the steps
    assert not any(torch.equal(one, other) for place, one in enumerate(seen) for other in seen[:place])


class Noisy(TensorDataset):
    """A data set of somebody else, which draws from torch's default generator."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn_like(x), y


def test_a_data_set_that_draws_from_the_default_generator_is_keyed_too(parts):
    def run(own):
        student = built()
        torch.manual_seed(own)
        before = torch.get_rng_state()
        fit(alone(student), Noisy(parts.train.x, torch.tensor(parts.train.labels)))
        assert torch.equal(torch.get_rng_state(), before)
        return state(student)

    assert equal(run(1), run(2))


# selection


def learning(parts, **settings):
    """A run whose validation loss falls, then rises: the rate is far too high in the end."""
    student, saved = built(), []

    def save(event):
        if event.kind == "epoch":
            saved.append(state(student))

    def jumping(parameters, lr):
        optimizer = torch.optim.SGD(parameters, lr=0.3)

        def spoil(optimizer, args, kwargs):
            optimizer.steps = getattr(optimizer, "steps", 0) + 1
            if optimizer.steps > 12:  # after three epochs
                for group in optimizer.param_groups:
                    group["lr"] = -0.3

        optimizer.register_step_pre_hook(spoil)
        return optimizer

    history = fit(
        alone(student),
        parts.train,
        valid=parts.valid,
        optimizer=jumping,
        **{"epochs": 6, **settings},
        callbacks=[save],
    )
    return student, history, saved


def test_best_keeps_the_weights_of_the_lowest_validation_loss(parts):
    student, history, saved = learning(parts)
    losses = [record["valid_total"] for record in history.epochs]
    assert history.best == losses.index(min(losses)) == 2
    assert equal(state(student), saved[2])
    assert len(losses) == 6


def test_best_is_the_default_only_where_there_is_a_validation_part(parts):
    assert learning(parts)[1].best == 2
    student, saved = built(), []
    history = fit(alone(student), parts.train, callbacks=[lambda event: saved.append(state(student))])
    assert history.best == 1
    assert equal(state(student), saved[-1])


def test_last_keeps_the_last_weights(parts):
    student, history, saved = learning(parts, select="last")
    assert history.best == 5
    assert equal(state(student), saved[-1])
    assert not equal(saved[-1], saved[2])


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_stops_after_so_many_epochs_without_a_better_one(parts, patience):
    student, history, saved = learning(parts, patience=patience, epochs=20)
    assert len(history.epochs) == 3 + patience
    assert history.best == 2
    assert equal(state(student), saved[2])


def test_patience_with_last_stops_too_and_keeps_the_last(parts):
    student, history, saved = learning(parts, patience=1, select="last", epochs=20)
    assert len(history.epochs) == 4
    assert history.best == 3
    assert equal(state(student), saved[3])


def test_patience_does_not_stop_while_it_gets_better(parts):
    history = fit(alone(built()), parts.train, valid=parts.valid, patience=1, epochs=5, lr=1e-3)
    assert len(history.epochs) == 5


@pytest.mark.parametrize("settings", [{"select": "best"}, {"patience": 3}])
def test_best_and_patience_without_a_validation_part_are_errors(parts, settings):
    with pytest.raises(kdlib.TrainingError, match="validation part"):
        fit(alone(built()), parts.train, **settings)


def test_nan_in_the_validation_part_is_an_error_that_names_the_sample(parts):
    x = parts.valid.x.clone()
    x[3] = torch.nan
    spoiled = kdlib.TensorPart(x, parts.valid.labels, ids=parts.valid.ids)
    with pytest.raises(kdlib.TrainingError, match=parts.valid.ids[3]):
        fit(alone(built()), parts.train, valid=spoiled)


# history


def test_the_history_has_means_over_rows_also_of_an_uneven_last_batch(parts, teacher):
    student = built()
    history = fit(distil(student, teacher), parts.train, valid=parts.valid, lr=0.0, optimizer="sgd")  # 32+32+32+4
    for prefix, part in (("", parts.train), ("valid_", parts.valid)):
        z, soft = student(part.x)["logits"], teacher(part.x)["logits"]
        hard = cross_entropy(z, torch.tensor(part.labels)).item()
        soft = cross_entropy(z, (soft / 4).softmax(-1)).item()
        for record in history.epochs:
            assert record[f"{prefix}hard"] == pytest.approx(hard, rel=1e-5)
            assert record[f"{prefix}soft"] == pytest.approx(soft, rel=1e-5)
            assert record[f"{prefix}total"] == pytest.approx(0.9 * soft + 0.1 * hard, rel=1e-5)
    assert [(record["epoch"], record["step"], record["lr"]) for record in history.epochs] == [(0, 4, 0.0), (1, 8, 0.0)]


def test_the_history_has_the_share_of_the_steps_time_that_went_in_waiting_for_data(parts, monkeypatch):
    now = 0.0

    def took(seconds):
        nonlocal now
        now += seconds

    class Slow(kdlib.TensorPart):
        def __getitem__(self, key):
            took(0.5)
            return super().__getitem__(key)

    def computes(student, teacher, batch):
        took(10.0)
        return student["logits"].square().mean()

    monkeypatch.setattr(kdlib.training.time, "perf_counter", lambda: now)
    slow = Slow(parts.train.x[:20], parts.train.labels[:20])
    distiller = kdlib.Distiller(built(), point=computes)
    history = fit(distiller, slow, valid=slow, epochs=2, batch=10, select="last")
    assert [record["waiting"] for record in history.epochs] == [10 / 30, 10 / 30]  # 20 items, and 2 steps
    assert [record["seconds"] for record in history.epochs] == [60, 60]  # the validation is none of the steps


def test_callbacks_get_steps_epochs_and_one_end_in_order(parts):
    events = []
    distiller = alone(built())
    history = fit(distiller, parts.train, batch=50, callbacks=[events.append])
    assert [(event.kind, event.step, event.epoch) for event in events] == [
        ("step", 1, 0),
        ("step", 2, 0),
        ("epoch", 2, 0),
        ("step", 3, 1),
        ("step", 4, 1),
        ("epoch", 4, 1),
        ("end", 4, 1),
    ]
    assert all(event.distiller is distiller for event in events)
    assert events[2].record == history.epochs[0]


def test_csv_and_jsonl_have_the_numbers_of_the_run(parts, tmp_path):
    student, events = built(), []
    folder = tmp_path / "new" / "run"
    history = fit(alone(student), parts.train, valid=parts.valid, folder=folder, callbacks=[events.append])
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == history.epochs
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event.kind == "step"]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line, event in zip(lines, steps, strict=True):
        assert (line["epoch"], line["lr"]) == (event.epoch, 1e-3)
        assert line["total"] == event.losses.total.item()
        assert line["terms"] == {"hard": event.losses.terms["hard"].item()}


def test_a_point_that_starts_later_is_in_the_csv(parts, tmp_path):
    ramp = kdlib.Schedule(kind="linear", start=0.0, end=1.0, epochs=1)
    distiller = kdlib.Distiller(
        built(), hard=kdlib.HardLabels(), late=(ramp, lambda s, t, b: s["logits"].square().mean())
    )
    history = fit(distiller, parts.train, folder=tmp_path)
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].get("late", "") == ""
    assert float(rows[1]["late"]) == history.epochs[1]["late"]


def test_the_bar_changes_nothing(parts, capsys):
    one, other = built(), built()
    fit(alone(one), parts.train, progress=True)
    fit(alone(other), parts.train, progress=False)
    assert equal(state(one), state(other))
    capsys.readouterr()


# accumulation, clipping, rates


@pytest.mark.parametrize("rows", [96, 116])  # 116: the last group is 16 + 4
def test_two_batches_of_16_are_one_of_32_where_there_is_no_norm(rows):
    train = digits(train=rows).train
    one, other = built(), built()
    first = fit(alone(one), train, batch=32, optimizer="sgd", lr=0.5, epochs=3)
    second = fit(alone(other), train, batch=16, accumulate=2, optimizer="sgd", lr=0.5, epochs=3)
    assert first.steps == second.steps
    assert apart(state(one), state(built())) > 0.01
    assert apart(state(one), state(other)) < 1e-6
    assert first.epochs[-1]["hard"] == pytest.approx(second.epochs[-1]["hard"], rel=1e-5)


def steps_of(student, part, **settings):
    """The norm of each step's change of the parameters."""
    saved = [state(student)]
    fit(alone(student), part, callbacks=[lambda e: e.kind == "step" and saved.append(state(student))], **settings)
    return [
        math.sqrt(sum((after[name] - before[name]).double().square().sum().item() for name in after))
        for before, after in pairwise(saved)
    ]


def test_clipping_bounds_the_update_and_leaves_small_gradients_alone(parts):
    settings = {"optimizer": "sgd", "lr": 1.0}
    free = steps_of(built(), parts.train, **settings)
    bounded = steps_of(built(), parts.train, clip=0.01, **settings)
    assert min(free) > 0.02
    assert bounded == pytest.approx([0.01] * 8, rel=1e-3)
    assert steps_of(built(), parts.train, clip=1e6, **settings) == pytest.approx(free)


def test_clipping_looks_at_the_whole_accumulated_gradient(parts):
    changes = steps_of(built(), parts.train, clip=0.01, accumulate=2, batch=16, optimizer="sgd", lr=1.0)
    assert changes == pytest.approx([0.01] * 8, rel=1e-3)


def rates(part, **settings):
    found = []
    fit(alone(built()), part, callbacks=[lambda e: e.kind == "step" and found.append(e.record["lr"])], **settings)
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("schedule", ["constant", "one_cycle", "cosine"])
def test_rates_are_those_of_torchs_schedulers(parts, schedule, accumulate):
    found = rates(parts.train, schedule=schedule, lr=0.05, epochs=3, batch=16, accumulate=accumulate)
    steps = 3 * {1: 7, 3: 3}[accumulate]
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        "one_cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
    }[schedule]()
    expected = []
    for _ in range(steps):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_a_schedule_of_one_step_works(parts, schedule):
    student = built()
    history = fit(alone(student), parts.train, batch=100, epochs=1, schedule=schedule, lr=0.01)
    assert history.steps == 1
    assert history.epochs[0]["lr"] > 0
    assert not equal(state(student), state(built()))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_named_optimizer_is_torchs_with_its_defaults(parts, name):
    def by_hand(parameters, lr):
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name](parameters, lr=lr)

    one, other = built(), built()
    fit(alone(one), parts.train, optimizer=name, lr=0.01)
    fit(alone(other), parts.train, optimizer=by_hand, lr=0.01)
    assert equal(state(one), state(other))


# what is not finite


def spoiled(part, *rows):
    x = part.x.clone()
    for row in rows:
        x[row, 0] = torch.nan
    return kdlib.TensorPart(x, part.labels, ids=part.ids)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_input_stops_before_the_step_names_the_sample_and_leaves_the_student_as_before_it(parts, accumulate):
    student, saved = normed(), []
    saved.append(state(student))
    order = [index for batch in kdlib.Loader(parts.train, batch=16).epoch(0) for index in batch["index"].tolist()]
    row = order[3 * 16 + 5]  # in the fourth batch; with two a step the second of its group
    with pytest.raises(kdlib.TrainingError) as caught:
        fit(
            alone(student),
            spoiled(parts.train, row),
            batch=16,
            accumulate=accumulate,
            callbacks=[lambda event: saved.append(state(student))],
        )
    assert parts.train.ids[row] in str(caught.value)
    assert not any(f"'{name}'" in str(caught.value) for name in parts.train.ids if name != parts.train.ids[row])
    assert len(saved) == 1 + 3 // accumulate
    assert equal(state(student), saved[-1])
    assert not equal(saved[-1], saved[0])


def test_all_samples_that_are_not_finite_are_named_and_no_others(parts):
    data = spoiled(parts.train, 3, 8)
    with pytest.raises(kdlib.TrainingError) as caught:
        fit(alone(built()), data, batch=100)
    named = str(caught.value).replace(",", " ").replace(".", " ").split()
    assert {name for name in named if name.startswith("digit-")} == {data.ids[3], data.ids[8]}


def test_a_plain_data_sets_sample_is_named_by_its_number(parts):
    x = parts.train.x.clone()
    x[77] = torch.inf
    with pytest.raises(kdlib.TrainingError, match=r"\b77\b"):
        fit(alone(built()), TensorDataset(x, torch.tensor(parts.train.labels)))


class Named(torch.utils.data.Dataset):
    """Items whose x is a mapping of two tensors."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        wrong = torch.nan if index == 5 else 1.0
        return {"x": {"left": torch.ones(4), "right": torch.full((4,), wrong)}, "y": index % 3}


def test_a_sample_is_found_among_named_inputs_too():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, left, right):
            return {"logits": self.layer(left + right)}

    with pytest.raises(kdlib.TrainingError, match=r"Samples whose input is not finite: 5\."):
        fit(alone(Two()), Named(), batch=4)


def stopped(student, root, data, match, **settings):
    """Train with a point that goes wrong in the second epoch; return the states before and after the stop."""

    def later(taps, teacher, batch):
        return root(taps["logits"]) if batch["epoch"][0] == 1 else 0 * taps["logits"].sum()

    states = []
    distiller = kdlib.Distiller(student, hard=kdlib.HardLabels(), root=later)
    with pytest.raises(kdlib.TrainingError, match=match):
        fit(distiller, data, epochs=2, callbacks=[lambda event: states.append(state(student))], **settings)
    return states[-1], state(student)


def test_a_nan_loss_of_finite_inputs_names_the_term(parts):
    before, after = stopped(built(), lambda z: (-1 - z.square().mean()).sqrt(), parts.train, "root nan")
    assert equal(after, before)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_nan_gradient_of_a_finite_loss_stops_before_the_step_too(parts, clip):
    before, after = stopped(
        normed(), lambda z: (0 * z).square().sum().sqrt(), parts.train, "gradient is not finite", clip=clip
    )
    assert equal(after, before)


def test_what_is_wrong_from_the_start_is_found_by_the_check(parts):
    student = normed()
    distiller = kdlib.Distiller(student, root=lambda s, t, b: (0 * s["logits"]).square().sum().sqrt())
    before = state(student)
    with pytest.raises(kdlib.TrainingError, match=r"(?s)check.*wrong +point root .*gradient norm on the student nan"):
        fit(distiller, parts.train)
    assert equal(state(student), before)


def test_after_a_stop_the_random_state_is_the_callers(parts):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(kdlib.TrainingError):
        fit(alone(built()), spoiled(parts.train, 0), batch=100)
    assert torch.equal(torch.get_rng_state(), before)


# precision and layout


def convolutional():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Net(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


@pytest.fixture(scope="module")
def plain_loss(parts):
    return fit(alone(convolutional()), parts.train, valid=parts.valid, lr=1e-2, epochs=3).epochs


@pytest.mark.parametrize(
    ("settings", "close"),
    [
        ({"precision": "bf16"}, 0.1),
        ({"layout": "channels_last"}, 1e-2),
        ({"precision": "bf16", "layout": "channels_last"}, 0.1),
    ],
)
def test_bf16_and_channels_last_give_a_close_loss(parts, plain_loss, settings, close):
    student, seen = convolutional(), []
    student.layers[4].register_forward_hook(
        lambda module, args, output: seen.append(
            SimpleNamespace(
                dtype=output.dtype,
                weight=module.weight.dtype,
                last=module.weight.is_contiguous(memory_format=torch.channels_last),
            )
        )
    )
    history = fit(alone(student), parts.train, valid=parts.valid, lr=1e-2, epochs=3, **settings)
    for record, plain in zip(history.epochs, plain_loss, strict=True):
        assert record["total"] == pytest.approx(plain["total"], rel=close)
        assert record["valid_total"] == pytest.approx(plain["valid_total"], rel=2 * close)
    assert {one.dtype for one in seen} == {torch.bfloat16 if "precision" in settings else torch.float32}
    assert {one.weight for one in seen} == {torch.float32}
    assert {one.last for one in seen} == {"layout" in settings}
    assert all(parameter.is_contiguous() for parameter in student.parameters())


def test_an_image_reaches_the_student_in_the_layout(parts):
    x = parts.train.x.view(-1, 1, 8, 8).expand(-1, 3, 8, 8).contiguous()
    seen = []

    def watching(student, teacher, batch):
        seen.append(batch["x"].is_contiguous(memory_format=torch.channels_last))
        return cross_entropy(student["logits"], batch["y"])

    student = Net(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    data = kdlib.TensorPart(x, parts.train.labels)
    fit(kdlib.Distiller(student, w=watching), data, layout="channels_last", epochs=1)
    assert set(seen) == {True}


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamm"}, r"'adamm'.*Did you mean 'adam'\?.*sgd"),
        ({"precision": "bf17"}, r"'bf17'.*Did you mean 'bf16'\?"),
        ({"layout": "channel_last"}, r"Did you mean 'channels_last'\?"),
        ({"schedule": "onecycle"}, r"Did you mean 'one_cycle'\?"),
        ({"select": "beste"}, r"Did you mean 'best'\?"),
        ({"epochs": 0}, "epochs"),
        ({"accumulate": 0}, "accumulate"),
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, r"Pass torch\.optim\.Adam"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_and_impossible_settings_are_refused_with_a_suggestion(parts, settings, message):
    student = built()
    with pytest.raises(kdlib.TrainingError, match=message):
        fit(alone(student), parts.train, **settings)
    assert equal(state(student), state(built()))


def test_an_empty_training_part_and_a_batch_of_0_are_refused(parts):
    with pytest.raises(kdlib.DataError, match="empty"):
        fit(alone(built()), TensorDataset(torch.zeros(0, 64), torch.zeros(0)))
    with pytest.raises(kdlib.DataError, match="0"):
        fit(alone(built()), parts.train, batch=0)


def test_patience_below_1_is_refused(parts):
    with pytest.raises(kdlib.TrainingError, match="patience"):
        fit(alone(built()), parts.train, valid=parts.valid, patience=0)


def pairwise_differences(student, teacher, batch):
    """A point that wants more than one row."""
    if len(student["logits"]) < 2:
        raise kdlib.BatchError("One row has no difference.")
    return (student["logits"][1:] - student["logits"][:-1]).square().mean()


def test_a_last_batch_of_one_row_is_refused_before_the_first_epoch(parts):
    student, rows, steps = normed(), len(parts.train) - 1, []  # batch norm wants two
    saved = state(student)
    with pytest.raises(
        kdlib.TrainingError,
        match=r"batch=99 the last batch of the training part has 1 of its 100 rows.*more than 1 value",
    ):
        fit(alone(student), parts.train, batch=rows, callbacks=[steps.append])
    of_pairs = kdlib.Distiller(built(), pairs=pairwise_differences)
    with pytest.raises(kdlib.TrainingError, match=r"validation part has 1 of its 40 rows.*no difference"):
        fit(
            of_pairs,
            TensorDataset(parts.train.x[:78], torch.zeros(78)),
            valid=parts.valid,
            batch=39,
            callbacks=[steps.append],
        )
    assert equal(state(student), saved)
    assert not steps


def test_a_last_batch_of_one_row_will_do_for_batch_norm_in_validation(parts):
    assert fit(alone(normed()), parts.train, valid=parts.valid, batch=13, epochs=1).steps == 8  # 40 = 3 * 13 + 1


def test_a_batch_larger_than_the_part_is_one_batch(parts):
    assert fit(alone(built()), parts.train, batch=1000).steps == 2


def test_what_a_source_needs_is_added_by_its_data_set_in_training_and_validation(parts, teacher):
    class Wrapper:
        def __init__(self, part):
            self.part = part
            self.labels, self.groups, self.ids = part.labels, part.groups, part.ids

        def __len__(self):
            return len(self.part)

        def __getitem__(self, key):
            item = self.part[key]
            return {**item, "flipped": item["x"].flip(0)}

    class Flipped:
        def __init__(self, teacher):
            self.teacher = teacher

        def dataset(self, part):
            return Wrapper(part)

        def __call__(self, batch):
            assert torch.equal(batch["flipped"], batch["x"].flip(1))
            return self.teacher(batch["flipped"])

    student = built()
    fit(kdlib.Distiller(student, Flipped(teacher), soft=kdlib.SoftLabels()), parts.train, valid=parts.valid)
    assert not equal(state(student), state(built()))


def test_the_distiller_can_be_trained_on(parts):
    distiller = alone(copy.deepcopy(built()))
    first = fit(distiller, parts.train, epochs=5)
    second = fit(distiller, parts.train, epochs=5)
    assert second.epochs[0]["hard"] < first.epochs[0]["hard"]
    assert int(distiller.step) == first.steps + second.steps
