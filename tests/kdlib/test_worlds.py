"""One training by 1, 2 and 4 processes: the same rows count the same, and all end with the same."""

import gc
import importlib.util
import math
import os
import pickle
import signal
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import kdlib
from kdlib import ranks, store
from kdlib.blocks import Train
from kdlib.cache import Cache, fit_features
from kdlib.ddp import batch_norm_synced
from kdlib.featured import Featured
from kdlib.points import FitNet, HiddenCosine
from kdlib.points.crd import Crd
from kdlib.resuming import Keeping
from kdlib.sources.class_means import ClassMeans
from kdlib.sources.ema import Ema
from kdlib.storing import build_store, store_run
from kdlib.system import outputs

WORLDS = (1, 2, 4)
ROWS, BATCH, EPOCHS = 33, 8, 4
"""20 steps; the last of an epoch has a single row."""
POINTS = {
    "logits alone": lambda: {"soft": kdlib.SoftLabels.hinton(4.0)},
    "a hidden layer alone": lambda: {"hidden": HiddenCosine()},
    "both": lambda: {
        "soft": (kdlib.Schedule(kind="linear", start=1.0, end=0.0, epochs=3), kdlib.SoftLabels.hinton(4.0)),
        "hint": (0.5, FitNet(tap="embedding")),
        "hard": (0.5, kdlib.HardLabels()),
    },
}


def network(seed, width=8, *between):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, width), *between, nn.Tanh(), nn.Linear(width, 3))
    return kdlib.Tapped(layers, logits="", embedding=str(len(layers) - 2))


def part(rows=ROWS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return kdlib.TensorPart(torch.randn(rows, 6, generator=generator), torch.arange(rows) % 3, classes=("a", "b", "c"))


def teacher():
    return kdlib.SameInput(kdlib.freeze(network(1)))


def fitted(distiller, train, **settings):
    keywords = {"epochs": EPOCHS, "batch": BATCH, "optimizer": torch.optim.SGD, "lr": 0.05, "progress": False}
    return kdlib.fit(distiller, train, **{**keywords, **settings})


def plain(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


class Heard:
    """A callback that keeps the losses of the steps."""

    def __init__(self):
        self.steps = []

    def __call__(self, event):
        if event.kind == "step":
            terms = {**event.losses.terms, "total": event.losses.total}
            self.steps.append({name: float(value) for name, value in terms.items()})


def trained(points, source=teacher, student=lambda: network(0), **settings):
    """Return what a training leaves: state, history, the losses by step, and the gradient hooks."""
    distiller, heard = kdlib.Distiller(student(), source(), **points()), Heard()
    history = fitted(distiller, part(), valid=part(11, seed=4), callbacks=[heard], **settings)
    return plain(distiller), history, heard.steps


def with_state(kind):
    """Return the state of a source or point that remembers what the student did."""
    student = network(0, 8)
    data = part()
    if kind == "crd":
        distiller = kdlib.Distiller(student, teacher(), crd=Crd(data, negatives=4, width=4))
    else:
        source = ClassMeans(data) if kind == "class means" else Ema(student, decay=0.9)
        distiller = kdlib.Distiller(student, source, soft=kdlib.SoftLabels(), hard=kdlib.HardLabels())
    fitted(distiller, data, accumulate=1)
    return plain(distiller)


def by_hand(points):
    """Train as DDP does, without it: each rank's weighted gradient, summed and divided by their number."""
    distiller, loader = (
        kdlib.Distiller(network(0), teacher(), **points()),
        kdlib.Loader(part(), batch=BATCH, shards="rows"),
    )
    distiller.prepare(next(loader.epoch(kdlib.CLEAN)))
    optimizer = distiller.attach(torch.optim.SGD(distiller.parameters(), lr=0.05))
    for epoch in range(EPOCHS):
        for batch in loader.epoch(epoch):
            optimizer.zero_grad()
            (batch["share"] * distiller(batch).total).backward()
            gradients = [value.grad for value in distiller.parameters() if value.grad is not None]
            ranks.summed(gradients)
            for gradient in gradients:
                gradient /= ranks.world()
            optimizer.step()
    return plain(distiller)


def example():
    path = Path(__file__).parents[2] / "docs" / "integrations" / "ranks_loop.py"
    spec = importlib.util.spec_from_file_location("ranks_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_loop():
    """Train by the loop of docs/scale.md, and by ``fit``."""
    states = []
    for train in (example().train, partial(fitted, optimizer="adam", lr=1e-3)):
        distiller = kdlib.Distiller(network(0), teacher(), soft=kdlib.SoftLabels(), hint=FitNet(tap="embedding"))
        train(distiller, part(), epochs=2, batch=8)
        states.append(plain(distiller))
    return states


def with_norm():
    student = network(0, 8, nn.BatchNorm1d(8))
    return kdlib.Distiller(student, Ema(student, decay=0.5), soft=kdlib.SoftLabels(), hard=kdlib.HardLabels())


def normed():
    distiller = with_norm()
    fitted(distiller, part(32), epochs=2)
    return plain(distiller)


def again():
    """Train one distiller twice: what the first training registered must be gone in the second."""
    distiller = kdlib.Distiller(network(0), teacher(), **POINTS["both"]())
    fitted(distiller, part(), epochs=2)
    fitted(distiller, part(), epochs=1, seed=1)
    return plain(distiller)


class Interrupting:
    """A callback that sends this process a SIGTERM after a step, on one rank."""

    def __init__(self, rank):
        self.rank = rank

    def __call__(self, event):
        if event.kind == "step" and event.step == 7 and ranks.rank() == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def resumed(folder):
    """Return a training that is stopped by a signal that the last rank alone gets, and goes on; and what stopped it."""
    states, stops = [], []
    last = ranks.world() - 1
    for settings in ({"callbacks": [Interrupting(last)]}, {"resume": True}):
        distiller = kdlib.Distiller(network(0), teacher(), **POINTS["both"]())
        try:
            fitted(distiller, part(), valid=part(11, seed=4), checkpoint=folder / "checkpoint.safetensors", **settings)
        except kdlib.Stopped as stop:
            stops.append((stop.signal, str(stop)))
        states.append(plain(distiller))
    return states[-1], stops


class Squares(nn.Module):
    """Features with a statistic."""

    time_axis = -1

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def fit(self, clips):
        self.mean.copy_(torch.stack(list(clips)).mean(0))
        return self

    def forward(self, samples):
        return samples.square() - self.mean


def made(folder):
    """Have features, a cache and a store made, and return what was read back; the files stand in the folder."""
    data, features = part(150), Squares()
    fit_features(features, data, None)
    kept = Featured(data, features)
    cache = Cache(folder / "cache")
    fit_features(features, data, cache)
    cached = Featured(data, features, cache=cache)
    build_store(teacher(), data, folder / "store", batch=2)
    model = network(2)
    taps = outputs(model, kept, Train(epochs=1, batch=7))
    rows = [torch.stack([one[kdlib.CLEAN, index]["x"] for index in range(150)]) for one in (kept, cached)]
    return plain(features), rows, taps


def caught(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except kdlib.KdlibError as error:
        return type(error).__name__, str(error)
    return None


class Bad(TensorDataset):
    """Its row 13 cannot be read, or holds NaN, or its label is no class."""

    def __init__(self, how):
        whole = part()
        super().__init__(whole.x.clone(), torch.as_tensor(whole.labels).clone())
        self.how = how
        if how == "nan":
            self.tensors[0][13] = math.nan

    def __getitem__(self, index):
        if index == 13 and self.how == "unreadable":
            raise kdlib.DataError("clip 13 is bad")
        return super().__getitem__(index)


def spoilt(how):
    return caught(fitted, kdlib.Distiller(network(0), hard=kdlib.HardLabels()), Bad(how))


def not_everywhere(folder):
    """Train with a checkpoint in a folder of each rank's own, go on from it, and look for what was kept there."""
    path = folder / f"rank-{ranks.rank()}" / "checkpoint.safetensors"
    settings = {"epochs": 1, "checkpoint": path}
    fitted(kdlib.Distiller(network(0), hard=kdlib.HardLabels()), part(), **settings)
    again = kdlib.Distiller(network(0), hard=kdlib.HardLabels())
    return caught(fitted, again, part(), **settings, resume=True), Keeping(folder, resumed=True).found(path) is None


def into_a_file(folder):
    """Train with logs in a folder that cannot be made."""
    folder.mkdir(exist_ok=True)
    (folder / "file").touch()
    distiller = kdlib.Distiller(network(0), hard=kdlib.HardLabels())
    return caught(fitted, distiller, part(), epochs=1, folder=folder / "file" / "logs")


def all_of_it(folder):
    """Do everything that is compared, and return it."""
    torch.set_num_threads(1)
    store.SHARD = 1 << 10  # several shards of few rows
    found = {name: trained(points) for name, points in POINTS.items()}
    found |= {kind: with_state(kind) for kind in ("class means", "crd")}
    found["made"] = made(folder / "made")
    found["errors"] = {how: spoilt(how) for how in ("unreadable", "nan")}
    found["batch norm"] = normed()
    found["not everywhere"] = not_everywhere(folder / "own")
    found["into a file"] = into_a_file(folder / "blocked")
    found["of no run"] = caught(store_run, Path("nowhere"), folder / "of no run")
    if ranks.world() <= 2:  # four processes would show no more, and take their time
        found["accumulated and clipped"] = trained(POINTS["both"], accumulate=2, clip=0.05)
        found["the best of few"] = trained(lambda: {"hard": kdlib.HardLabels()}, lr=1.0, patience=1)
        found["written"] = trained(POINTS["both"], folder=folder / "logs")
        found["by hand"] = {name: by_hand(points) for name, points in POINTS.items()}
        found["again"] = again()
        found["ema"] = with_state("ema")
        found["resumed"] = resumed(folder / "checkpoints")
        found["own loop"] = own_loop()
    return found


def work(environment, say, folder):
    os.environ |= environment
    warnings.simplefilter("error")
    gc.freeze()  # what was imported is not looked through at the end of each training
    with ranks.group():
        found = all_of_it(folder)
    say(pickle.dumps(found))  # a tensor itself would be shared, and goes with its process


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {world: tmp_path_factory.mktemp(f"world-{world}") for world in WORLDS}


@pytest.fixture(scope="module")
def found(launch, folders):
    return {world: [pickle.loads(one) for one in launch(work, world, folders[world])] for world in WORLDS}


TRAININGS = [
    *[(2, name) for name in (*POINTS, "accumulated and clipped", "the best of few", "written")],
    *[(4, name) for name in POINTS],
]


def together(found, world, *path):
    """Return what all ranks have, having seen that they have the same."""
    values = found[world]
    for key in path:
        values = [one[key] for one in values]
    for other in values[1:]:
        assert list(other) == list(values[0])
        for name, value in values[0].items():
            assert torch.equal(other[name], value), name
    return values[0]


def near(one, other, bound=1e-6):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value.double() - other[name].double()).abs().max() <= bound, name


@pytest.mark.parametrize(("world", "name"), TRAININGS)
def test_all_ranks_end_with_the_same_and_with_that_of_one_process(found, world, name):
    near(together(found, world, name, 0), together(found, 1, name, 0))


@pytest.mark.parametrize("points", POINTS)
def test_two_ranks_train_bit_for_bit_as_a_manual_all_reduce(found, points):
    by_hand, fitted = together(found, 2, "by hand", points), together(found, 2, points, 0)
    assert all(torch.equal(fitted[name], value) for name, value in by_hand.items())


@pytest.mark.parametrize("world", [1, 2])
def test_the_loop_of_the_page_on_several_processes_trains_as_fit_does(found, world):
    own, fitted = together(found, world, "own loop", 0), together(found, world, "own loop", 1)
    near(own, fitted, bound=0)


@pytest.mark.parametrize("points", POINTS)
def test_it_trains_and_a_layer_that_no_point_reaches_stays_as_it_was(found, points):
    before, after = plain(kdlib.Distiller(network(0), teacher(), **POINTS[points]())), together(found, 4, points, 0)
    assert int(after["step"]) == 20
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert same == ({"student.model.2.weight", "student.model.2.bias"} if points == "a hidden layer alone" else set())


@pytest.mark.parametrize(("world", "name"), TRAININGS)
def test_history_and_callbacks_have_the_means_over_all_ranks(found, world, name):
    _, wanted, steps_wanted = found[1][0][name]
    for one in found[world]:
        _, history, steps = one[name]
        assert history.best == wanted.best
        assert history.teacher == wanted.teacher
        for kept in history.epochs:
            kept.pop("seconds", None)
            kept.pop("waiting", None)
        for record, other in zip(history.epochs, wanted.epochs, strict=True):
            assert record == pytest.approx({name: other[name] for name in record}, rel=1e-6)
        assert history.epochs == found[world][0][name][1].epochs
        for step, other in zip(steps, steps_wanted, strict=True):
            assert step == pytest.approx(other, rel=1e-6)


def test_the_best_of_few_stops_early(found):
    assert len(found[2][0]["the best of few"][1].epochs) < EPOCHS


@pytest.mark.parametrize(
    ("world", "kind"), [*[(2, kind) for kind in ("class means", "crd", "ema", "again")], (4, "class means"), (4, "crd")]
)
def test_what_remembers_the_student_is_the_same_on_all_ranks(found, world, kind):
    state = together(found, world, kind)
    if kind != "crd":  # it takes its constant from a rank's rows
        near(state, together(found, 1, kind))


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_to_one_rank_stops_all_at_one_step_and_they_go_on_to_the_same_bits(found, world):
    assert {str(one["resumed"][1]) for one in found[world]} == {str(found[world][0]["resumed"][1])}
    ((number, text),) = found[world][0]["resumed"][1]
    assert number == signal.SIGTERM
    assert "after step 7, epoch 1" in text
    near(together(found, world, "resumed", 0), together(found, world, "both", 0), bound=0)


@pytest.mark.parametrize("world", [2, 4])
def test_features_outputs_stores_and_caches_have_the_same_bits(found, folders, world):
    state, rows, taps = found[1][0]["made"]
    one, several = (folders[ranks] / "made" for ranks in (1, world))
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors*"))
    assert len(files) >= 2 * (5 + 4)
    assert files == sorted(path.relative_to(several) for path in several.rglob("*.safetensors*"))
    for file in files:
        assert (one / file).read_bytes() == (several / file).read_bytes(), file
    for one in found[world]:
        assert torch.equal(one["made"][0]["mean"], state["mean"])
        assert all(map(torch.equal, one["made"][1], rows))
        assert all(np.array_equal(one["made"][2][name], tap) for name, tap in taps.items())


def test_logs_are_written_once(found, folders):
    names = ["metrics.csv", "metrics.jsonl", "teacher.json"]
    one, several = (folders[world] / "logs" for world in (1, 2))
    assert [path.name for path in sorted(several.iterdir())] == names
    assert len((several / "metrics.jsonl").read_text().splitlines()) == 20
    assert (several / "teacher.json").read_bytes() == (one / "teacher.json").read_bytes()


@pytest.mark.parametrize(("how", "said"), [("unreadable", "clip 13 is bad"), ("nan", "not finite: 13.")])
@pytest.mark.parametrize("world", [2, 4])
def test_an_error_on_one_rank_stops_all_with_its_reason(found, world, how, said):
    kinds, texts = zip(*[one["errors"][how] for one in found[world]], strict=True)
    assert sorted(kinds) == sorted(
        ["DataError" if how == "unreadable" else "TrainingError", *["RankError"] * (world - 1)]
    )
    (failed,) = [rank for rank, kind in enumerate(kinds) if kind != "RankError"]
    assert all(said in text for text in texts)
    assert all(text.startswith(f"rank {failed}: ") for rank, text in enumerate(texts) if rank != failed)


@pytest.mark.parametrize("world", WORLDS)
def test_what_one_rank_alone_finds_is_not_gone_on_from(found, world):
    for refused, nothing in (one["not everywhere"] for one in found[world]):
        assert (refused is not None) == nothing == (world > 1)
        if refused is not None:
            kind, text = refused
            assert kind == "TrainingError"
            assert f"do not see the same checkpoint; they would go on from the steps 5{', 0' * (world - 1)}." in text


@pytest.mark.parametrize(("what", "said"), [("into a file", "cannot be made"), ("of no run", "no finished run")])
@pytest.mark.parametrize("world", WORLDS)
def test_what_rank_0_refuses_is_its_own_error_and_stops_all_ranks(found, world, what, said):
    (kind, text), *others = [one[what] for one in found[world]]
    assert kind == "KdlibError"
    assert said in text
    assert others == [("RankError", f"rank 0: KdlibError: {text}")] * (world - 1)


@pytest.mark.parametrize("world", WORLDS)
def test_a_local_batch_norm_sees_a_ranks_rows_and_keeps_the_statistics_of_rank_0(found, world):
    distiller, loader = with_norm(), kdlib.Loader(part(32), batch=BATCH)
    optimizer = distiller.attach(torch.optim.SGD(distiller.parameters(), lr=0.05))
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            optimizer.zero_grad()
            before = [buffer.clone() for buffer in distiller.student.buffers()]
            for rank in reversed(range(world)):
                for buffer, value in zip(distiller.student.buffers(), before, strict=True):
                    buffer.data = value.clone()
                shard = {name: value.chunk(world)[rank] for name, value in batch.items()}
                (distiller(shard).total / world).backward()
            optimizer.step()
    near(together(found, world, "batch norm"), plain(distiller), bound=2e-6)


def test_a_synced_batch_norm_is_refused_without_cuda(refused):
    kinds, texts = zip(*refused[0], strict=True)
    assert kinds == ("TrainingError",) * 2
    assert all("SyncBatchNorm, which runs on CUDA, and the device is cpu: take 'local'" in text for text in texts)


def test_the_program_of_the_page_leaves_one_file(refused):
    _, folder = refused
    assert [path.name for path in folder.iterdir()] == ["student.safetensors"]
    assert network(0).model.load_state_dict(load_file(folder / "student.safetensors"))


@pytest.fixture(scope="module")
def refused(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return launch(refusing, 2, folder), folder


def refusing(environment, say, folder):
    """Run the program of docs/scale.md, and be refused in it."""
    os.environ |= environment
    os.chdir(folder)

    def made():
        say(caught(fitted, with_norm(), part(32), batch_norm="sync"))
        return kdlib.Distiller(network(0), teacher(), soft=kdlib.SoftLabels(), hint=FitNet(tap="embedding"))

    example().main(made, part(), epochs=1)


def test_one_process_has_nothing_to_sync():
    distiller = with_norm()
    fitted(distiller, part(32), epochs=1, batch_norm="sync")
    other = with_norm()
    fitted(other, part(32), epochs=1)
    near(plain(distiller), plain(other), bound=0)


def test_batch_norms_are_synced_for_a_while_with_parameters_buffers_and_hooks():
    student = kdlib.Tapped(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), logits="", normed="1").eval()
    norm, x = student.model[1], torch.randn(5, 6)
    before, names = student(x), list(student.state_dict())
    with batch_norm_synced(student):
        synced = student.model[1]
        assert type(synced) is nn.SyncBatchNorm
        assert synced.weight is norm.weight
        assert list(student.state_dict()) == names
        assert torch.equal(student(x)["normed"], before["normed"])  # of evaluation; in training it wants CUDA
        synced.register_buffer("running_mean", torch.full((4,), 5.0))  # as a move to another device does
    assert student.model[1] is norm
    assert norm.running_mean.tolist() == [5.0] * 4
