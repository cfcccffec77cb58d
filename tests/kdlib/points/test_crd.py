"""Contrastive distillation against numpy, step by step; its banks against what a distiller and two ranks do."""

import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib.points.crd import Crd, crd_loss, keyed_negatives
from kdlib.settings import read_signature, validated
from kdlib.testing import check_point

LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
VARIANTS = ["paper", "code"]
PATHS = {**os.environ, "PYTHONPATH": str(Path(kdlib.__file__).parents[1])}


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def part(labels=LABELS):
    return kdlib.TensorPart(torch.zeros(len(labels), 4), labels)


def batch_of(index, epoch=0, **more):
    return {"index": torch.tensor(index), "epoch": torch.full((len(index),), epoch), **more}


def prepared(rows=4, **settings):
    """Return a point in float64 and taps for it: the student's 6 wide, the teacher's 5 wide."""
    point = Crd(part(), **{"negatives": 4, "width": 3, **settings}).double()
    student, teacher = {"embedding": noise(rows, 6)}, {"embedding": noise(rows, 5, seed=1)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        point.prepare(student, teacher, {})
    return point, student, teacher


class InNumpy:
    """The same in numpy: loss of a batch, and what the banks are after it."""

    def __init__(self, point):
        self.banks = [bank.numpy().copy() for bank in (point.students, point.teachers)]
        self.z = None
        self.settings = point.variant, point.temperature, point.momentum, point.negatives, point.seed

    def step(self, heads, taps, index, epoch):
        variant, temperature, momentum, count, seed = self.settings
        anchors = []
        for (weight, bias), tap in zip(heads, taps, strict=True):
            projected = tap @ weight.T + bias
            anchors.append(projected / np.linalg.norm(projected, axis=1, keepdims=True))
        noise, scores = count / len(LABELS), []
        for side in (0, 1):
            rows = []
            for place, item in enumerate(index):
                others = np.array([other for other, label in enumerate(LABELS) if label != LABELS[item]])
                drawn = torch.randperm(len(others), generator=kdlib.keyed(seed, "crd", epoch, item))[:count]
                bank, own = self.banks[1 - side], anchors[1 - side][place]
                with_ = np.vstack([bank[item] if variant == "code" else own, bank[others[drawn.numpy()]]])
                rows.append(np.exp(with_ @ anchors[side][place] / temperature))
            scores.append(np.array(rows))
        if self.z is None:
            self.z = [len(LABELS) * p.mean() if variant == "code" else 1.0 for p in scores]
        eps, loss = 1e-7 if variant == "code" else 0.0, 0.0
        for p, z in zip(scores, self.z, strict=True):
            h = p / z / (p / z + noise + eps)
            off = noise / (p / z + noise + eps)
            loss -= (np.log(h[:, 0]) + np.log(off[:, 1:]).sum(1)).mean()
        for bank, rows in zip(self.banks, anchors, strict=True):
            mixed = momentum * bank[index] + (1 - momentum) * rows
            bank[index] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        return loss


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_three_steps_are_those_of_numpy(variant, temperature):
    point, _, _ = prepared(variant=variant, temperature=temperature, seed=3)
    reference = InNumpy(point)
    optimizer = torch.optim.SGD(point.parameters(), lr=0.1)
    for step, index in enumerate(([0, 4, 8, 1], [2, 4, 11, 0], [5, 0, 7, 3])):
        taps = noise(4, 6, seed=step), noise(4, 5, seed=10 + step)
        heads = [[p.detach().numpy().copy() for p in point.heads[side].parameters()] for side in ("student", "teacher")]
        expected = reference.step(heads, [tap.numpy() for tap in taps], index, epoch=step)
        value = point({"embedding": taps[0]}, {"embedding": taps[1]}, batch_of(index, epoch=step))
        assert value.item() == pytest.approx(expected, rel=1e-10)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        point.advance(nn.Identity())
        for bank, other in zip((point.students, point.teachers), reference.banks, strict=True):
            np.testing.assert_allclose(bank.numpy(), other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_a_point(variant):
    check_point(Crd(part([0, 1] * 8), negatives=4, variant=variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_in_float64(variant):
    point, student, teacher = prepared(variant=variant)
    batch = batch_of([0, 4, 8, 1])
    point(student, teacher, batch)  # Z is held while one input is moved
    point.advance(nn.Identity())

    def loss(rows):
        return point({"embedding": rows}, teacher, batch)

    assert torch.autograd.gradcheck(loss, (student["embedding"].requires_grad_(),))


def test_the_loss_of_given_scores():
    scores = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]], dtype=torch.float64)
    p, c = np.exp(scores.numpy()) / 7.0, 2 / 10
    expected = -(np.log(p[:, 0] / (p[:, 0] + c + 1e-3)) + np.log(c / (p[:, 1:] + c + 1e-3)).sum(1)).mean()
    found = crd_loss(scores, size=10, log_z=np.log(7.0), eps=1e-3)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e4, -1e4, -400.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_extreme_taps_equal_rows_and_zeros_stay_finite(variant, dtype, scale):
    point = Crd(part(), negatives=4, width=3, variant=variant)
    extreme, equal, zero = torch.zeros(4, 6, dtype=dtype), torch.ones(4, 6, dtype=dtype), torch.zeros(4, 6, dtype=dtype)
    extreme[:, 0] = scale
    for student in (extreme, equal, zero):
        for teacher in (extreme, equal, zero):
            rows = student.clone().requires_grad_()
            taps = {"embedding": rows}, {"embedding": teacher}, batch_of([0, 4, 8, 1])
            point.prepare(*taps)
            value = point(*taps)
            value.backward()
            assert value.dtype == torch.float32
            assert value.isfinite()
            assert rows.grad.isfinite().all()
            point.advance(nn.Identity())
            assert point.students.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_taps_and_autocast_give_the_float_loss_of_the_same_numbers(dtype):
    point, student, teacher = prepared()
    point = point.float()
    small = [{"embedding": taps["embedding"].to(dtype)} for taps in (student, teacher)]
    batch = batch_of([0, 4, 8, 1])
    expected = point.double()(*({"embedding": taps["embedding"].double()} for taps in small), batch).item()
    point = point.float()
    assert point(*small, batch).item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert point(*small, batch).item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_one_and_a_mean_over_the_batch():
    point, student, teacher = prepared(variant="paper")
    index = [0, 4, 8, 1]
    rows = [
        point({"embedding": student["embedding"][i : i + 1]}, {"embedding": teacher["embedding"][i : i + 1]}, batch)
        for i, batch in enumerate(batch_of([item]) for item in index)
    ]
    whole = point(student, teacher, batch_of(index))
    torch.testing.assert_close(whole, torch.stack(rows).mean(), rtol=1e-12, atol=0)


def test_both_heads_are_trained_the_teachers_tap_and_the_banks_not():
    point, student, teacher = prepared()
    taps = {name: side["embedding"].requires_grad_() for name, side in (("student", student), ("teacher", teacher))}
    point(student, teacher, batch_of([0, 4, 8, 1])).backward()
    assert taps["teacher"].grad is None
    assert taps["student"].grad.abs().max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in point.parameters())
    assert len(list(point.parameters())) == 4
    assert not any(bank.requires_grad for bank in (point.students, point.teachers))


# negatives


def test_negatives_are_of_other_classes_differ_and_are_keyed():
    labels, index = torch.tensor(LABELS), torch.tensor([0, 4, 8])
    settings = {"count": 6, "seed": 0}
    epoch = torch.zeros(3, dtype=torch.int64)
    drawn = keyed_negatives(labels, labels[index], index, epoch, **settings)
    assert drawn.shape == (3, 6)
    assert (labels[drawn] != labels[index][:, None]).all()
    assert all(len(set(row)) == 6 for row in drawn.tolist())
    turned = keyed_negatives(labels, labels[index].flip(0), index.flip(0), epoch, **settings)
    assert torch.equal(turned.flip(0), drawn)
    assert not torch.equal(keyed_negatives(labels, labels[index], index, epoch + 1, **settings), drawn)
    assert not torch.equal(keyed_negatives(labels, labels[index], index, epoch, count=6, seed=1), drawn)


def test_more_negatives_than_there_are_repeat():
    labels = torch.tensor(LABELS)
    one = torch.tensor([0])
    drawn = keyed_negatives(labels, labels[one], one, one, count=100, seed=0)
    assert drawn.shape == (1, 100)
    assert set(labels[drawn].flatten().tolist()) == {1, 2}


# the banks


def state(point):
    return {name: value.clone() for name, value in point.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_banks_are_a_function_of_the_seed_and_sized_by_the_data():
    banks = [Crd(part(), width=3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(banks[0].students, banks[1].students)
    assert not torch.equal(banks[0].students, banks[2].students)
    assert not torch.equal(banks[0].students, banks[0].teachers)
    assert banks[0].students.shape == banks[0].teachers.shape == (12, 3)
    wide = Crd(part(LABELS * 20), width=128).students
    assert wide.norm(dim=1).mean().item() == pytest.approx(1, abs=0.02)


def test_only_advance_changes_the_state_and_only_the_rows_that_were_seen():
    point, student, teacher = prepared()
    before = state(point)
    point(student, teacher, batch_of([0, 4, 8, 1]))
    assert same(state(point), before)
    point.advance(nn.Identity())
    changed = (point.students != before["students"]).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 1, 4, 8]
    after = state(point)
    point.advance(nn.Identity())  # nothing is left to bring in
    assert same(state(point), after)


def test_z_is_that_of_the_first_step_and_stays():
    point, student, teacher = prepared()
    assert point.log_z.isinf().all()
    point(student, teacher, batch_of([0, 4, 8, 1]))
    point.advance(nn.Identity())
    first = point.log_z.clone()
    assert first.isfinite().all()
    point(student, teacher, batch_of([0, 4, 8, 1], epoch=1))
    point.advance(nn.Identity())
    assert torch.equal(point.log_z, first)


def test_z_has_no_gradient():
    gradients = []
    for held in (False, True):
        point, student, teacher = prepared()
        if held:
            point(student, teacher, batch_of([0, 4, 8, 1]))
            point.log_z.copy_(point._seen[0][3].detach())
        point(student, teacher, batch_of([0, 4, 8, 1])).backward()
        gradients.append(point.heads["student"].weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_every_batch_of_an_accumulated_step_goes_in_and_of_a_row_the_newest():
    point, student, teacher = prepared(momentum=0.0)
    later = {"embedding": noise(4, 6, seed=5)}, {"embedding": noise(4, 5, seed=6)}
    point(student, teacher, batch_of([0, 4, 8, 1]))
    point(*later, batch_of([2, 4, 11, 3]))
    point.advance(nn.Identity())
    head = point.heads["student"]
    with torch.no_grad():
        expected = head(torch.cat([student["embedding"][[0, 2]], later[0]["embedding"]]))
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(point.students[[0, 8, 2, 4, 11, 3]], expected, rtol=1e-12, atol=1e-12)


def test_eval_mode_and_no_grad_keep_nothing():
    point, student, teacher = prepared()
    before = state(point)
    batch = batch_of([0, 4, 8, 1], y=torch.tensor([0, 1, 2, 1]))
    with torch.no_grad():
        point(student, teacher, batch)
    point.eval()
    point(student, teacher, batch)
    point.advance(nn.Identity())
    assert same(state(point), before)


def test_eval_mode_takes_the_rows_for_other_items():
    point, student, teacher = prepared()
    point.eval()
    found = point(student, teacher, batch_of([900, 901, 902, 903], epoch=-1, y=torch.tensor([0, 1, 2, 1])))
    assert found.isfinite()
    labels = torch.tensor([0, 1, 2, 1])
    index, epoch = torch.arange(900, 904), torch.full((4,), -1)
    negatives = keyed_negatives(point.labels, labels, index, epoch, count=4, seed=0)
    s, t = (
        nn.functional.normalize(point.heads[side](taps["embedding"]))
        for side, taps in (("student", student), ("teacher", teacher))
    )
    expected = 0.0
    for anchor, bank in ((s, point.teachers), (t, point.students)):
        products = torch.einsum("bd,bnd->bn", anchor, bank[negatives])
        scores = torch.cat([(s * t).sum(1, keepdim=True), products], 1) / 0.07
        z = 12 * scores.exp().mean()
        expected += crd_loss(scores, size=12, log_z=z.log().detach(), eps=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_embeddings_that_are_never_brought_in_do_not_pile_up():
    point, student, teacher = prepared()
    for step in range(20):
        point(student, teacher, batch_of([0, 4, 8, 1], epoch=step))
    assert len(point._seen) <= 4


def test_state_that_is_saved_and_loaded_goes_on_alike():
    point, student, teacher = prepared()
    batches = [batch_of([0, 4, 8, 1]), batch_of([0, 2, 8, 3], epoch=1)]
    point(student, teacher, batches[0])
    point.advance(nn.Identity())
    twin, _, _ = prepared(seed=0)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    twin.load_state_dict(point.state_dict())
    copied = copy.deepcopy(point)
    for other in (twin, copied):
        assert torch.equal(other(student, teacher, batches[1]), point(student, teacher, batches[1]))


# in a distiller


def teach(seed=0):
    torch.manual_seed(seed)
    teacher = kdlib.freeze(kdlib.Tapped(nn.Linear(4, 6), embedding=""))
    student = kdlib.Tapped(nn.Linear(4, 5), embedding="")
    x = noise(12, 4, seed=2, dtype=torch.float32)
    data = kdlib.TensorPart(x, LABELS)
    return kdlib.Distiller(student, kdlib.SameInput(teacher), crd=Crd(data, negatives=4, width=3)), data


def weights(distiller):
    return {name: value.clone() for name, value in distiller.state_dict().items()}


def test_it_trains_with_a_validation_part_whose_items_are_others():
    distiller, data = teach()
    valid = kdlib.TensorPart(noise(30, 4, seed=3, dtype=torch.float32), [0, 1, 2] * 10)
    history = kdlib.fit(distiller, data, valid=valid, epochs=8, batch=5, lr=0.05, select="last", progress=False)
    assert history.epochs[-1]["total"] < history.epochs[0]["total"]
    assert all(np.isfinite(record["valid_crd"]) for record in history.epochs)
    norms = distiller.points["crd"].students.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(12), rtol=1e-5, atol=0)  # every row was seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_look_over_a_distiller_changes_nothing(accumulate):
    found = []
    for looked in (False, True):
        distiller, data = teach()
        batches = list(kdlib.Loader(data, batch=4))
        optimizer = torch.optim.SGD(distiller.prepare(batches[0]).parameters(), lr=0.1)
        if looked:
            assert distiller.check(batches[2])
        for batch in batches[:accumulate]:
            distiller(batch).total.backward()
        if looked:
            distiller.check(batches[2])
        optimizer.step()
        optimizer.zero_grad()
        distiller.advance()
        found.append(weights(distiller))
    assert same(*found)


def test_the_state_is_saved_under_the_points_name():
    distiller, data = teach()
    distiller.prepare(next(iter(kdlib.Loader(data, batch=4))))
    own = [name.removeprefix("projectors.crd.") for name in distiller.state_dict() if name.startswith("projectors.")]
    assert sorted(own) == [
        "heads.student.bias",
        "heads.student.weight",
        "heads.teacher.bias",
        "heads.teacher.weight",
        "log_z",
        "students",
        "teachers",
    ]


# errors and settings


def test_a_point_that_was_not_prepared_says_what_to_call():
    point = Crd(part(), negatives=4)
    with pytest.raises(kdlib.KdlibError, match=r"distiller\.prepare"):
        point({"embedding": noise(2, 6)}, {"embedding": noise(2, 5)}, batch_of([0, 1]))


def test_data_of_one_class_is_refused():
    with pytest.raises(kdlib.KdlibError, match="fewer than 2 classes"):
        Crd(part([1, 1, 1]))


def test_an_index_that_does_not_go_with_rows_or_data_is_refused():
    point, student, teacher = prepared()
    with pytest.raises(kdlib.BatchError, match=r"\(3,\).*4 rows"):
        point(student, teacher, batch_of([0, 1, 2]))
    with pytest.raises(kdlib.BatchError, match=r"from 0 to 12.*from 0 to 11"):
        point(student, teacher, batch_of([0, 1, 2, 12]))
    with pytest.raises(kdlib.TapError, match="rows"):
        point(student, {"embedding": noise(3, 5)}, batch_of([0, 1, 2, 3]))


def test_a_missing_key_is_named_with_the_point():
    distiller, data = teach()
    batch = next(iter(kdlib.Loader(data, batch=4)))
    distiller.prepare(batch)
    with pytest.raises(kdlib.BatchError, match=r"'crd'.*'epoch'"):
        distiller({"x": batch["x"], "index": batch["index"]})


def test_one_epoch_for_all_rows_will_do():
    point, student, teacher = prepared()
    expected = point(student, teacher, batch_of([0, 4, 8, 1], epoch=2))
    assert point(student, teacher, {"index": torch.tensor([0, 4, 8, 1]), "epoch": 2}) == expected


def test_a_recipe_can_write_it_down():
    live, settings = read_signature("point", "crd", Crd)
    assert live == ("data",)
    point = Crd(part(), **dict(settings()))
    for setting, value in settings():
        assert getattr(point, setting) == (value if setting != "teacher_tap" else point.tap)
    for bad in ({"momentum": 1.0}, {"temperature": 0.0}, {"negatives": 0}, {"variant": "other"}):
        with pytest.raises(kdlib.RecipeError):
            validated(settings, bad, "points.p")


# two ranks

RANK = """
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

import kdlib
from kdlib.points.crd import Crd


def run(rank, folder):
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timeout)
    try:
        torch.manual_seed(0)
        point = Crd(kdlib.TensorPart(torch.zeros(12, 4), [0, 1, 2] * 4), negatives=4, width=3)
        rows = torch.arange(12 * 6).view(12, 6).cos()
        items = [[0, 4, 8], [1]][rank]
        taps = {"embedding": rows[items]}
        batch = {"index": torch.tensor(items), "epoch": torch.zeros(len(items), dtype=torch.int64)}
        point.prepare(taps, taps, batch)
        for step in range(2):
            if step == 0 or rank == 0:  # then the other rank has no batch left
                point(taps, taps, batch)
            point.advance(nn.Identity())
        torch.save(point.state_dict(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
"""


def test_the_banks_of_two_ranks_are_equal_and_hold_the_rows_of_both(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    other = subprocess.Popen([sys.executable, str(tmp_path / "rank.py"), "1", str(tmp_path)], env=PATHS)
    try:
        with torch.random.fork_rng():
            runpy.run_path(str(tmp_path / "rank.py"))["run"](0, tmp_path)
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(one, two)
    fresh = Crd(part(), negatives=4, width=3)
    changed = (one["students"] != fresh.students).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 1, 4, 8]
    assert one["log_z"].isfinite().all()
