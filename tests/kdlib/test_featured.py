"""Data through features: kept, computed anew, augmented by key, clean where it is asked for."""

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib import featured
from kdlib.featured import Featured


class Halves(nn.Module):
    """Samples (channels, time) to half of their values; a view is noise on top."""

    time_axis = -1

    def __init__(self, augments=None):
        super().__init__()
        self.calls = 0
        if augments is not None:
            self.augments = augments

    def forward(self, samples):
        self.calls += 1
        return samples / 2

    def augment(self, x, generator):
        return x + torch.rand(x.shape, generator=generator)


class Plain(nn.Module):
    time_axis = -2

    def forward(self, samples):
        return samples * 3


@pytest.fixture
def part():
    x = torch.arange(5 * 2 * 3, dtype=torch.float32).view(5, 2, 3)
    return kdlib.TensorPart(x, [0, 1, 2, 0, 1], ids=list("abcde"), groups=list("ppqqr"))


@pytest.fixture(params=["kept", "computed"])
def memory(request, monkeypatch):
    """The same with features in memory and with none: the limit is below one item."""
    if request.param == "computed":
        monkeypatch.setattr(featured, "MEMORY", 8)
    return request.param


def test_an_item_is_that_of_the_part_with_its_features(part, memory):
    made = Featured(part, Halves(), augment=False)
    assert len(made) == 5
    for index in range(5):
        item = made[2, index]
        assert torch.equal(item.pop("x"), part.x[index] / 2)
        assert item == {"y": int(part.labels[index]), "index": index, "epoch": 2}


def test_whatever_else_an_item_holds_is_still_there(memory):
    class Masked(kdlib.TensorPart):
        def __getitem__(self, key):
            return {**super().__getitem__(key), "mask": torch.tensor([1, key[1]])}

    made = Featured(Masked(torch.zeros(3, 2, 3), [0, 1, 2]), Halves(), augment=False)
    assert torch.equal(made[0, 2]["mask"], torch.tensor([1, 2]))


def test_it_is_a_data_part_with_what_sources_ask_for(part):
    made = Featured(part, Plain(), augment=False)
    assert isinstance(made, kdlib.DataPart)
    assert made.ids == list("abcde")
    assert made.groups == list("ppqqr")
    np.testing.assert_array_equal(made.labels, part.labels)
    assert made.time_axis == -2
    assert Featured(part, Halves(), augment=False).time_axis == -1


def test_features_in_memory_are_computed_once(part, memory):
    features = Halves()
    made = Featured(part, features, augment=True)
    before = features.calls
    for epoch in range(3):
        for index in range(5):
            made[epoch, index]
    assert features.calls - before == (0 if memory == "kept" else 15)


def test_the_limit_counts_all_items(part, monkeypatch):
    size = part.x[0].nbytes
    for limit, kept in ((5 * size, True), (5 * size - 1, False)):
        monkeypatch.setattr(featured, "MEMORY", limit)
        features = Halves()
        made = Featured(part, features, augment=False)
        before = features.calls
        made[0, 0]
        assert (features.calls == before) is kept


def test_items_are_equal_in_memory_and_beyond_it(part, monkeypatch):
    kept = Featured(part, Halves(), augment=True, seed=3)
    monkeypatch.setattr(featured, "MEMORY", 0)
    computed = Featured(part, Halves(), augment=True, seed=3)
    for epoch in (kdlib.CLEAN, 0, 4):
        for index in range(5):
            assert torch.equal(kept[epoch, index]["x"], computed[epoch, index]["x"])


def test_a_view_is_a_function_of_seed_epoch_and_index(part, memory):
    one, same, other = (Featured(part, Halves(), augment=True, seed=seed) for seed in (0, 0, 1))
    for index in (4, 0, 4):  # in any order, as often as it is asked for
        assert torch.equal(one[1, index]["x"], same[1, index]["x"])
    noise = {
        (seed, epoch, index): tuple((made[epoch, index]["x"] - part.x[index] / 2).flatten().tolist())
        for seed, made in ((0, one), (1, other))
        for epoch in range(3)
        for index in range(5)
    }
    assert len(set(noise.values())) == len(noise)


def test_random_state_outside_is_neither_used_nor_changed(part):
    made = Featured(part, Halves(), augment=True)
    first = made[0, 0]["x"]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(made[0, 0]["x"], first)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_clean_epoch_is_clean(part, memory):
    made = Featured(part, Halves(), augment=True)
    for index in range(5):
        assert torch.equal(made[kdlib.CLEAN, index]["x"], part.x[index] / 2)
        assert made[kdlib.CLEAN, index]["epoch"] == kdlib.CLEAN


def test_an_augmentation_that_works_in_place_does_not_change_what_is_kept(part, memory):
    class InPlace(Halves):
        def augment(self, x, generator):
            return x.add_(1)

    made = Featured(part, InPlace(), augment=True)
    for epoch in (0, 1):
        assert torch.equal(made[epoch, 0]["x"], part.x[0] / 2 + 1)
    assert torch.equal(made[kdlib.CLEAN, 0]["x"], part.x[0] / 2)


@pytest.mark.parametrize("features", [Plain(), Halves(augments=False)])
def test_without_anything_to_draw_every_epoch_is_clean(part, features):
    made = Featured(part, features, augment=True)
    assert not made.augmented
    assert torch.equal(made[0, 1]["x"], made[kdlib.CLEAN, 1]["x"])


def test_augmentation_is_asked_for(part):
    assert not Featured(part, Halves(), augment=False).augmented
    assert Featured(part, Halves(), augment=True).augmented
    assert Featured(part, Halves(augments=True), augment=True).augmented
    made = Featured(part, Halves(), augment=False)
    assert torch.equal(made[0, 1]["x"], made[kdlib.CLEAN, 1]["x"])


class Shifted(kdlib.TensorPart):
    """Samples that are another number each epoch."""

    def __getitem__(self, key):
        item = super().__getitem__(key)
        return item if key[0] == kdlib.CLEAN else {**item, "x": item["x"] + 1 + key[0]}


def test_samples_that_change_by_themselves_go_through_the_features_in_every_epoch(part, memory):
    made, drawn = (Featured(Shifted(part.x, part.labels), Halves(), augment=augment) for augment in (False, True))
    assert made.augmented
    for epoch in (0, 1):
        shifted = (part.x[2] + 1 + epoch) / 2
        assert torch.equal(made[epoch, 2]["x"], shifted)
        assert made[epoch, 2]["epoch"] == epoch
        noise = drawn[epoch, 2]["x"] - shifted
        assert 0 <= noise.min() < noise.max() < 1
    for one in (made, drawn):
        assert torch.equal(one[kdlib.CLEAN, 2]["x"], part.x[2] / 2)


def test_without_features_a_part_says_itself_whether_it_changes(part):
    assert not Featured(part, None).augmented
    assert Featured(Shifted(part.x, part.labels), None).augmented


def test_features_carry_no_gradient(part, memory):
    class Learnt(Plain):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, samples):
            return samples * self.scale

    assert not Featured(part, Learnt(), augment=False)[0, 0]["x"].requires_grad


def test_a_loader_with_workers_gives_the_same_batches(part):
    made = Featured(part, Halves(), augment=True)
    batches = [list(kdlib.Loader(made, batch=2, workers=workers).epoch(1)) for workers in (0, 1)]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["x"], other["x"])
        assert torch.equal(one["index"], other["index"])
