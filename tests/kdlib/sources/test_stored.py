"""Stored soft labels: those of the source that made them, for the data they were made of and for no other."""

import pickle

import pytest
import torch
from torch import nn

import kdlib
from kdlib.featured import Featured
from kdlib.sources import Ensemble, Stored
from kdlib.sources.parts import Rows
from kdlib.sources.stored import KEY
from kdlib.storing import build_store
from kdlib.testing import check_source

ROWS, CLASSES = 21, ("bus", "park", "tram")


class Noise(nn.Module):
    """Features with a view for each epoch."""

    time_axis = -1

    def __init__(self, *, strength: float = 1.0):
        super().__init__()
        self.strength = strength

    def forward(self, samples):
        return 2 * samples

    def augment(self, x, generator):
        return x.add_(self.strength * torch.randn(x.shape, generator=generator))


def part_of(rows=ROWS, *, seed=0, augment=None, strength=1.0, **more):
    x = torch.randn(rows, 6, generator=kdlib.keyed(seed, "x"))
    settings = {"ids": [f"clip-{row}" for row in range(rows)], "classes": CLASSES, **more}
    part = kdlib.TensorPart(x, settings.pop("labels", [row % 3 for row in range(rows)]), **settings)
    if augment is None:
        return part
    return Featured(part, Noise(strength=strength), classes=CLASSES, augment=augment, seed=seed)


def network(seed=0):
    generator = kdlib.keyed(seed, "net")
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return kdlib.Tapped(net, logits="", embedding="1")


def same_input(seed=0):
    return kdlib.SameInput(kdlib.freeze(network(seed)))


def built(folder, part, source=None, **more):
    build_store(source or same_input(), part, folder, **{"batch": 4, **more})
    return Stored(folder=folder)


def asked(index, epoch):
    """A batch of numbers alone, as it comes from a part that passed through the source."""
    return {"index": index, "epoch": epoch, KEY: torch.zeros_like(index)}


def batch_of(part, epoch, rows):
    return torch.utils.data.default_collate([part[epoch, row] for row in rows])


@pytest.mark.filterwarnings("ignore:.*epochs serve for all")
@pytest.mark.parametrize("augment", [None, False, True])
def test_the_taps_are_those_of_the_source_in_every_epoch_of_the_store_and_again_after_it(tmp_path, augment):
    part, online = part_of(augment=augment), same_input()
    source = built(tmp_path, part, views=3)
    data = source.dataset(part)
    for epoch in (kdlib.CLEAN, 0, 1, 2, 5):
        for rows in ([3, 0, 20], [7], [1, 1]):
            stored = source(batch_of(data, epoch, rows))
            seen = online(batch_of(part, epoch if epoch < 3 else epoch % 3, rows))
            assert stored.keys() == seen.keys() == {"logits", "embedding"}
            for name, tap in seen.items():
                torch.testing.assert_close(stored[name], tap, rtol=0, atol=1e-5)


def test_views_differ_where_the_data_is_augmented_and_rows_of_several_epochs_may_share_a_batch(tmp_path):
    part = part_of(augment=True)
    source = built(tmp_path, part, views=2)
    with pytest.warns(UserWarning, match="of 2 epochs serve for all: from epoch 2 on they are those of epochs before"):
        taps = source(asked(torch.tensor([4, 4, 4, 4]), torch.tensor([-1, 0, 1, 2])))["logits"]
    assert torch.equal(taps[1], taps[3])
    assert len(taps.unique(dim=0)) == 3


def test_where_nothing_changes_one_view_is_stored_and_serves_every_epoch(tmp_path):
    source = built(tmp_path, part_of(), views=8)
    assert len(source.stores[0]) == ROWS
    rows = asked(torch.tensor([2, 2, 2]), torch.tensor([-1, 0, 77]))
    assert len(source(rows)["logits"].unique(dim=0)) == 1


def test_it_keeps_the_rules_of_a_source(tmp_path):
    part = part_of(augment=True)
    source = built(tmp_path, part, views=2)
    check_source(source, batch_of(source.dataset(part), 1, [5, 2, 8, 0, 3]))
    check_source(pickle.loads(pickle.dumps(source)), batch_of(source.dataset(part), 0, [5, 2, 8]))


def test_the_ensembles_taps_are_stored_with_those_of_its_members(tmp_path):
    part, online = part_of(), Ensemble({"a": same_input(1), "b": same_input(2)})
    source = built(tmp_path, part, online)
    batch = batch_of(source.dataset(part), 0, [6, 1])
    taps = source(batch)
    assert sorted(taps) == sorted(online(batch))
    assert torch.allclose(taps["logits"], online(batch)["logits"], atol=1e-5)


class Held:
    """The targets of a store, held in memory."""

    def __init__(self, source):
        (store,) = source.stores
        self.taps = {name: torch.from_numpy(store.whole(name)).unflatten(0, (ROWS, -1)) for name in source_names(store)}

    def __call__(self, batch):
        views = self.taps["logits"].shape[1] - 1
        view = torch.where(batch["epoch"] < 0, 0, 1 + batch["epoch"] % views)
        return {name: tap[batch["index"], view] for name, tap in self.taps.items()}


def source_names(store):
    return list(store.manifest.arrays)


@pytest.mark.filterwarnings("ignore:.*epochs serve for all")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_equals_bit_for_bit_one_with_the_same_targets_in_memory(tmp_path, workers):
    part = part_of(augment=True)
    source = built(tmp_path, part, views=2)
    students = []
    for one in (source, Held(source)):
        student = network(9)
        points = {"soft": kdlib.SoftLabels(temperature=2.0), "hard": kdlib.HardLabels()}
        settings = {"epochs": 3, "batch": 4, "lr": 0.05, "threads": 1, "progress": False}
        kdlib.fit(kdlib.Distiller(student, one, **points), part, workers=workers, **settings)
        students.append(student.state_dict())
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())
    assert not torch.equal(students[0]["model.0.weight"], network(9).state_dict()["model.0.weight"])


def test_each_part_finds_its_own_store_in_one_folder(tmp_path):
    train, valid, online = part_of(augment=True), part_of(9, seed=5, augment=False), same_input()
    build_store(online, train, tmp_path / "training", views=2, batch=4)
    build_store(online, valid, tmp_path / "validation", views=0, batch=4)
    source = Stored(folder=tmp_path)
    for part, epoch in ((train, 1), (valid, kdlib.CLEAN)):
        batch = batch_of(source.dataset(part), epoch, [8, 2])
        assert torch.allclose(source(batch)["logits"], online(batch)["logits"], atol=1e-5)
    with pytest.raises(kdlib.BatchError, match=r"2 parts.*source\.dataset\(part\)"):
        source(batch_of(train, 0, [1]))
    student = kdlib.Distiller(network(9), source, soft=kdlib.SoftLabels())
    history = kdlib.fit(student, train, valid=valid, epochs=2, batch=4, progress=False)
    assert history.epochs[-1]["valid_total"] > 0


# what is refused


def mismatches():
    names = [f"other-{row}" for row in range(ROWS)]
    return {
        "rows": (part_of(), part_of(20), ["data rows", "there 21, here 20"]),
        "contents": (part_of(), part_of(seed=1), ["items: there "]),
        "ids": (part_of(), part_of(ids=names), ["items: there "]),
        "labels": (part_of(), part_of(labels=[0] * ROWS), ["labels: there "]),
        "groups": (part_of(), part_of(groups=names), ["groups: there "]),
        "class order": (part_of(), part_of(classes=CLASSES[::-1]), ['classes.0: there "bus", here "tram"']),
        "augmentation": (
            part_of(augment=True),
            part_of(augment=False),
            ['made_by.augmentation: there {"seed": 0}, here nothing'],
        ),
        "features": (
            part_of(augment=True),
            part_of(augment=True, strength=0.5),
            ["made_by.features.settings.strength: there 1.0, here 0.5"],
        ),
    }


@pytest.mark.parametrize("what", mismatches())
def test_data_that_differs_in_anything_is_refused_with_both_sides(tmp_path, what):
    one, other, words = mismatches()[what]
    source = built(tmp_path, one)
    with pytest.raises(kdlib.DataError) as caught:
        source.dataset(other)
    assert str(tmp_path) in str(caught.value)
    for word in words[-1:]:
        assert word in str(caught.value)


def test_the_seed_of_an_augmentation_is_told_apart(tmp_path):
    part = part_of(augment=True)
    other = Featured(part.part, Noise(), classes=CLASSES, augment=True, seed=3)
    with pytest.raises(kdlib.DataError, match=r"augmentation\.seed: there 0, here 3"):
        built(tmp_path, part).dataset(other)


def test_some_rows_of_a_part_are_not_the_part(tmp_path):
    with pytest.raises(kdlib.DataError, match="there 21, here 2"):
        built(tmp_path, part_of()).dataset(Rows(part_of(), [3, 1]))


def test_another_teacher_is_refused_with_both_sides_and_the_same_one_is_not(tmp_path):
    built(tmp_path, part_of())
    Stored(kdlib.freeze(network()), folder=tmp_path)
    other = kdlib.freeze(network(1))
    with pytest.raises(kdlib.TapError, match="another teacher") as caught:
        Stored(other, folder=tmp_path)
    for teacher in (other, kdlib.freeze(network())):
        assert teacher.made_of()["state"] in str(caught.value)


def test_a_batch_that_did_not_pass_through_it_is_looked_up_with_a_warning(tmp_path):
    part, other = part_of(), part_of(seed=7)
    source = built(tmp_path, part)
    distiller = kdlib.Distiller(network(9), source, soft=kdlib.SoftLabels())
    with pytest.warns(UserWarning, match=r"nothing has compared its data.*source\.dataset\(part\)"):
        unmarked = distiller(batch_of(other, 0, [1, 2])).total
    marked = distiller({**batch_of(source.dataset(part), 0, [1, 2]), "x": batch_of(other, 0, [1, 2])["x"]}).total
    assert unmarked == marked
    with pytest.raises(kdlib.DataError, match="of other data"):
        source.dataset(other)


@pytest.mark.parametrize("missing", ["index", "epoch"])
def test_a_batch_without_index_or_epoch_names_source_and_key(tmp_path, missing):
    part = part_of()
    source = built(tmp_path, part)
    distiller = kdlib.Distiller(network(), source, soft=kdlib.SoftLabels())
    batch = batch_of(source.dataset(part), 0, [1, 2])
    del batch[missing]
    with pytest.raises(kdlib.BatchError, match=rf"(?i)source \(Stored\).*no '{missing}'"):
        distiller(batch)


@pytest.mark.parametrize("index", [-1, ROWS])
def test_an_index_that_is_not_there_is_named(tmp_path, index):
    source = built(tmp_path, part_of())
    with pytest.raises(kdlib.BatchError, match=rf"{index}.* has 21 rows"):
        source(asked(torch.tensor([index]), torch.tensor([0])))


def test_a_store_for_validation_is_not_trained_on(tmp_path):
    source = built(tmp_path, part_of(augment=True), views=0)
    with pytest.raises(kdlib.BatchError, match="epoch 4 is asked"):
        source(asked(torch.tensor([0]), torch.tensor([4])))


def test_two_stores_of_one_part_are_named(tmp_path):
    for name in "ab":
        built(tmp_path / name, part_of())
    with pytest.raises(kdlib.DataError, match=r"a and .*b both hold"):
        Stored(folder=tmp_path).dataset(part_of())


def test_a_folder_without_a_store_says_how_to_build_one(tmp_path):
    with pytest.raises(kdlib.DataError, match="kdlib store build"):
        Stored(folder=tmp_path)


def test_a_store_that_is_not_finished_is_refused(tmp_path):
    build_store(same_input(), part_of(70), tmp_path, batch=4)
    (tmp_path / "00001.safetensors.sha256").unlink()
    with pytest.raises(kdlib.DataError, match="1 of 2 shards are missing"):
        Stored(folder=tmp_path)


def test_a_flipped_bit_is_refused_and_the_shard_named(tmp_path):
    source = built(tmp_path, part_of())
    path = tmp_path / "00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(kdlib.DataError, match=r"00000\.safetensors: damaged"):
        source(asked(torch.tensor([0]), torch.tensor([0])))
