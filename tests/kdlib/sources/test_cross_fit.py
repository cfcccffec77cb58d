"""Cross-fitted teachers: the split, the routing, and what each teacher gets to see."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.sources.cross_fit import CrossFit, fold_of_groups
from kdlib.sources.ensemble import Ensemble
from kdlib.sources.parts import Rows
from kdlib.taps import teachers_in
from kdlib.testing import check_source

# the split


def recordings(classes, groups, size=3, mixed=0):
    """Return labels and groups: so many recordings a class, and a few that hold two classes."""
    rows = [
        (label, f"{label}-{group}")
        for label in range(classes)
        for group in range(groups)
        for _ in range(1 + (label + group) % size)
    ]
    rows += [(label % classes, f"mixed-{label // 2}") for label in range(2 * mixed)]
    labels, names = zip(*rows, strict=True)
    return np.array(labels), list(names)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(2, 5), st.integers(0, 3), st.integers(0, 3))
def test_groups_stay_whole_parts_are_full_and_every_class_is_in_two(classes, groups, parts, mixed, seed):
    labels, names = recordings(classes, groups, mixed=mixed)
    parts = min(parts, groups * classes)
    folds = fold_of_groups(labels, names, parts, seed)
    assert folds.shape == labels.shape
    assert folds.dtype == np.int64
    assert set(folds) == set(range(parts))
    for group in set(names):
        assert len(set(folds[np.array(names) == group])) == 1
    for label in range(classes):
        assert len(set(folds[labels == label])) >= 2
        counts = np.bincount(folds[labels == label], minlength=parts)
        if not mixed:  # dealt out largest first: no part is ahead by more than one group
            assert counts.max() - counts.min() <= 3


def test_it_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    labels, names = recordings(3, 6)
    folds = fold_of_groups(labels, names, 3, seed=1)
    order = np.random.default_rng(0).permutation(len(labels))
    assert np.array_equal(fold_of_groups(labels[order], np.array(names)[order], 3, seed=1), folds[order])
    assert np.array_equal(fold_of_groups(labels, names, 3, seed=1), folds)
    assert any(not np.array_equal(fold_of_groups(labels, names, 3, seed), folds) for seed in (2, 3))


def test_labels_need_not_be_from_zero_on_nor_groups_strings():
    folds = fold_of_groups(np.array([7, 7, 3, 3]), [1, 2, 3, 4], 2)
    assert sorted(folds[:2]) == sorted(folds[2:]) == [0, 1]


def test_a_class_in_one_recording_cannot_be_cross_fitted():
    with pytest.raises(kdlib.DataError, match="Class 1 lies in one of the 2 parts"):
        fold_of_groups(np.array([0, 0, 1, 1]), ["a", "b", "c", "c"], 2)


@pytest.mark.parametrize("parts", [0, 1, 5])
def test_more_parts_than_recordings_or_fewer_than_two_are_refused(parts):
    with pytest.raises(kdlib.DataError, match=f"4 groups cannot be split into {parts} parts"):
        fold_of_groups(np.array([0, 0, 1, 1]), list("abcd"), parts)


# the routing


def numbered(rows, start=0, groups=None, classes=2):
    """A part whose x tells the row, from ``start`` on."""
    x = torch.arange(start, start + rows).float()[:, None]
    names = [f"g{start + row // 2}" for row in range(rows)] if groups is None else groups
    ids = [f"clip{start + row}" for row in range(rows)]
    return kdlib.TensorPart(x, np.arange(rows) // 2 % classes, groups=names, ids=ids)


class Teacher:
    """A source that says who it is and keeps what it saw."""

    def __init__(self, number):
        self.number = number
        self.seen = []

    def __call__(self, batch):
        x = batch["x"]
        self.seen += x[:, 0].int().tolist()
        signed = torch.cat([x, torch.full_like(x, self.number)], 1)
        return {"logits": signed, "embedding": x[:, None] * (self.number + 1)}


def made(count=3, rows=24, **keywords):
    part = numbered(rows)
    return CrossFit([Teacher(number) for number in range(count)], part, **keywords), part


@pytest.mark.parametrize("wrapped", [True, False])
def test_each_row_comes_from_the_teacher_of_its_recordings_part(wrapped):
    source, part = made()
    batch = next(iter(kdlib.Loader(source.dataset(part) if wrapped else part, batch=24)))
    taps = source(batch)
    folds = torch.from_numpy(source.folds)[batch["index"]]
    assert torch.equal(taps["logits"], torch.stack([batch["x"][:, 0], folds.float()], 1))
    assert torch.equal(taps["embedding"], batch["x"][:, None] * (folds[:, None, None] + 1))
    for number, teacher in enumerate(source.sources.values()):
        assert sorted(teacher.seen) == np.flatnonzero(source.folds == number).tolist()


def test_the_split_is_the_functions():
    source, part = made(seed=5)
    assert np.array_equal(source.folds, fold_of_groups(part.labels, part.groups, 3, seed=5))


def test_training_the_teachers_by_rows_and_the_split_keeps_every_recording_out_of_its_teacher():
    source, part = made()
    for number in range(3):
        heard = Rows(part, np.flatnonzero(source.folds != number))
        labelled = Rows(part, np.flatnonzero(source.folds == number))
        assert not set(heard.groups) & set(labelled.groups)
        assert set(heard.labels) == set(part.labels)
        assert [heard[0, index]["index"] for index in range(len(heard))] == list(range(len(heard)))


def test_every_batch_size_gives_the_same_rows():
    source, part = made()
    whole = source(next(iter(kdlib.Loader(part, batch=24, shuffle=False))))
    for size in (1, 5):
        pieces = [source(batch) for batch in kdlib.Loader(source.dataset(part), batch=size, shuffle=False)]
        for name, tap in whole.items():
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), tap)


def test_a_held_out_part_gets_the_mean_of_all_teachers():
    source, _ = made()
    other = numbered(8, start=100)
    batch = next(iter(kdlib.Loader(source.dataset(other), batch=8, shuffle=False)))
    taps = source(batch)
    assert torch.equal(taps["logits"], torch.cat([other.x, torch.ones(8, 1)], 1))
    assert torch.equal(taps["embedding"], other.x[:, None] * 2)
    assert all(sorted(teacher.seen) == list(range(100, 108)) for teacher in source.sources.values())


def test_a_batch_may_mix_both_kinds_of_rows():
    source, part = made()
    train, other = source.dataset(part), source.dataset(numbered(4, start=100))
    items = [other[0, 1], train[0, 7], other[0, 0], train[0, 2]]
    batch = torch.utils.data.default_collate(items)
    assert source(batch)["logits"][:, 0].tolist() == [101, 7, 100, 2]
    assert source(batch)["logits"][:, 1].tolist() == [1, source.folds[7], 1, source.folds[2]]


def test_the_training_part_is_known_by_what_it_holds_not_by_identity():
    source, part = made()
    again = source.dataset(pickle.loads(pickle.dumps(part)))
    assert [again[0, row]["cross_fit"] for row in range(24)] == source.folds.tolist()


def test_a_part_that_shares_recordings_and_is_another_is_refused():
    source, part = made()
    with pytest.raises(kdlib.DataError, match=r"shares 3 groups .*'g0' first"):
        source.dataset(Rows(part, range(6)))
    with pytest.raises(kdlib.DataError, match="labels, groups and ids"):
        source.dataset(torch.utils.data.TensorDataset(torch.zeros(3)))


def test_an_index_outside_of_the_training_part_is_an_error():
    source, _ = made()
    with pytest.raises(kdlib.BatchError, match="index goes to 24; the training part has 24 rows"):
        source({"x": torch.zeros(1, 1), "index": torch.tensor([24])})


def test_teachers_with_other_taps_are_an_error():
    part = numbered(8)
    batch = {"x": part.x, "index": torch.arange(8)}
    with pytest.raises(kdlib.TapError, match=r"other taps: .*logits.*hidden"):
        CrossFit([lambda b: {"logits": b["x"]}, lambda b: {"hidden": b["x"]}], part)(batch)
    with pytest.raises(kdlib.TapError, match=r"\(1,\).*\(2,\)"):
        CrossFit([lambda b: {"logits": b["x"]}, lambda b: {"logits": torch.cat([b["x"]] * 2, 1)}], part)(batch)
    with pytest.raises(kdlib.TapError, match=r"'logits' has shape \(\) for"):
        CrossFit([lambda b: {"logits": b["x"].sum()}] * 2, part)(batch)


@pytest.mark.parametrize("count", [0, 1])
def test_it_wants_two_sources(count):
    with pytest.raises(kdlib.KdlibError, match="at least 2"):
        CrossFit([Teacher(0)] * count, numbered(8))


def test_a_network_in_place_of_a_source_is_refused():
    with pytest.raises(kdlib.TapError, match=r"kdlib\.freeze"):
        CrossFit([DigitsMLP(), DigitsMLP()], numbered(8))


def test_nested_inputs_and_numbers_are_routed_too():
    part = numbered(8)
    source = CrossFit([lambda b, k=k: {"logits": b["x"]["left"] * k + b["x"]["right"][0]} for k in (1, 2)], part)
    x = {"left": part.x, "right": (10 * part.x,)}
    taps = source({"x": x, "index": torch.arange(8), "epoch": 3, "clock": lambda: (0, 0)})
    factor = torch.from_numpy(source.folds)[:, None] + 1
    assert torch.equal(taps["logits"], part.x * factor + 10 * part.x)


# sources that want more beside each item


class Neighbour:
    """A source that joins each clip with the next of its part, as a source of several segments does."""

    def __init__(self, number):
        self.number = number

    def __call__(self, batch):
        return {"logits": torch.cat([batch["x"], batch["more"], torch.full_like(batch["x"], self.number)], 1)}

    def dataset(self, part):
        return Neighbours(part, self.number)


class Neighbours:
    def __init__(self, part, number):
        self.part, self.number = part, number
        self.labels, self.groups, self.ids = part.labels, part.groups, part.ids

    def __len__(self):
        return len(self.part)

    def __getitem__(self, key):
        item = self.part[key]
        other = self.part[key[0], (key[1] + 1) % len(self.part)]
        return {**item, "more": other["x"] + 1000 * self.number}  # differs from teacher to teacher, as frames do


def test_partners_come_from_the_same_part_and_index_stays_the_whole_parts():
    part = numbered(24)
    source = CrossFit([Neighbour(number) for number in range(3)], part)
    wrapped = source.dataset(part)
    assert isinstance(wrapped, kdlib.DataPart)
    assert (wrapped.ids, wrapped.groups, wrapped.labels.tolist()) == (part.ids, part.groups, part.labels.tolist())
    for row in range(24):
        item, fold = wrapped[2, row], source.folds[row]
        rows = np.flatnonzero(source.folds == fold)
        after = rows[(rows.tolist().index(row) + 1) % len(rows)]
        assert (item["x"].item(), item["index"], item["epoch"], item["y"]) == (row, row, 2, part.labels[row])
        assert item["more"].item() == after + 1000 * fold
        assert item["cross_fit"] == fold
    batch = next(iter(kdlib.Loader(wrapped, batch=24)))
    assert torch.equal(source(batch)["logits"][:, 2], batch["cross_fit"].float())
    check_source(source, batch)


def test_a_held_out_part_brings_what_each_teacher_wants():
    source = CrossFit([Neighbour(number) for number in range(2)], numbered(24))
    other = numbered(4, start=100)
    batch = next(iter(kdlib.Loader(source.dataset(other), batch=4, shuffle=False)))
    following = torch.tensor([101.0, 102.0, 103.0, 100.0])
    expected = torch.stack([other.x[:, 0], following + 500, torch.full((4,), 0.5)], 1)
    assert torch.equal(source(batch)["logits"], expected)
    check_source(source, batch)


def test_wrapped_parts_pickle_and_hold_no_teacher():
    source = CrossFit([Neighbour(number) for number in range(2)], numbered(24))
    for part in (numbered(24), numbered(4, start=100)):
        wrapped = source.dataset(part)
        assert not list(teachers_in(wrapped))
        twin = pickle.loads(pickle.dumps(wrapped))
        assert str(twin[1, 2]) == str(wrapped[1, 2])


def test_rows_know_what_the_whole_part_knows():
    part = numbered(8)
    part.time_axis, part.classes = -1, ("a", "b")
    rows = Rows(part, [5, 2])
    assert (rows.time_axis, rows.classes) == (-1, ("a", "b"))
    assert (rows.ids, rows.labels.tolist()) == (["clip5", "clip2"], [0, 1])
    assert not rows.augmented
    assert not hasattr(rows, "windows")
    assert copy.deepcopy(rows).time_axis == pickle.loads(pickle.dumps(rows)).time_axis == -1
    assert rows[4, 0]["epoch"] == 4


# with networks


def grouped(part, size=4):
    """Give a part of digits recordings: some images of one class each."""
    seen, groups = {}, []
    for label in part.labels.tolist():
        seen[label] = seen.get(label, 0) + 1
        groups.append(f"{label}-{seen[label] // size}-{part.ids[0]}")
    return kdlib.TensorPart(part.x, part.labels, groups=groups, ids=part.ids)


def teachers(count):
    torch.manual_seed(0)
    return [kdlib.SameInput(kdlib.freeze(DigitsMLP(width=8))) for _ in range(count)]


def test_two_epochs_of_fit_on_digits():
    parts = digits(train=100, valid=20)
    train, valid = grouped(parts.train), grouped(parts.valid)
    source = CrossFit(teachers(3), train)
    one = kdlib.Distiller(DigitsMLP(width=8), source, soft=kdlib.SoftLabels(), hard=kdlib.HardLabels())
    assert all(name.startswith("student.") for name, _ in one.named_parameters())
    assert {name.split(".")[0] for name in one.state_dict()} == {"student", "step"}
    history = kdlib.fit(one, train, valid=valid, epochs=2, batch=32, progress=False)
    assert history.epochs[1]["hard"] < history.epochs[0]["hard"]
    assert one.check(next(iter(kdlib.Loader(source.dataset(train), batch=8))))


def test_workers_change_nothing():
    train, trained = grouped(digits(train=60).train), []
    for workers in (0, 2):
        torch.manual_seed(1)
        student = DigitsMLP(width=8)
        one = kdlib.Distiller(student, CrossFit(teachers(2), train), soft=kdlib.SoftLabels())
        kdlib.fit(one, train, epochs=1, batch=20, workers=workers, progress=False)
        trained.append(student.hidden.weight)
    assert torch.equal(*trained)


def test_each_part_may_have_an_ensemble_and_an_ensemble_may_hold_it():
    train = grouped(digits(train=60).train)
    a, b, c = teachers(3)
    inner = CrossFit([Ensemble({"one": a, "two": b}), Ensemble({"one": c, "two": b})], train)
    batch = next(iter(kdlib.Loader(inner.dataset(train), batch=16)))
    check_source(inner, batch)
    assert {"logits", "one.logits", "two.embedding"} <= set(inner(batch))
    outer = Ensemble({"cross": CrossFit([a, b], train), "whole": c})
    batch = next(iter(kdlib.Loader(outer.dataset(train), batch=16)))
    check_source(outer, batch)
    expected = (a({"x": batch["x"]})["logits"], b({"x": batch["x"]})["logits"])
    chosen = torch.where(batch["cross_fit"][:, None] == 0, *expected)
    torch.testing.assert_close(outer(batch)["cross.logits"], chosen)
