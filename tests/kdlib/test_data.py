"""The loader: an order keyed by (seed, epoch), the same for any number of workers."""

import multiprocessing
import signal
import subprocess
import sys
import threading
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import kdlib
from kdlib.data import to_device
from kdlib.featured import Featured


def pairs(rows=10):
    return TensorDataset(torch.arange(rows * 4.0).reshape(rows, 4), torch.arange(rows) % 3)


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


def flat(batches):
    return [index for batch in indices(batches) for index in batch]


def rows_of(part, epoch):
    """What a loader gave in an epoch, as plain numbers."""
    return [{name: value.tolist() for name, value in batch.items()} for batch in part.epoch(epoch)]


class Mappings(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": torch.full((2,), float(index)), "y": index % 3, "partners": torch.full((1, 2), float(index))}


class Views(Dataset):
    """A data part whose items depend on the epoch: another view each time."""

    labels = torch.zeros(10, dtype=torch.int64).numpy()
    groups = ids = tuple(f"clip-{index}" for index in range(10))

    def __len__(self):
        return 10

    def __getitem__(self, key):
        epoch, index = key
        noise = torch.rand(2, generator=kdlib.keyed(0, epoch, index, "view"))
        return {"x": noise, "y": 0, "index": index, "epoch": epoch}


# order


@settings(database=None, max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 15), st.integers(0, 2**40), st.integers(0, 1000), st.booleans())
def test_every_index_comes_once_an_epoch_in_batches_of_the_size_asked(rows, batch, seed, epoch, shuffle):
    loader = kdlib.Loader(pairs(rows), batch=batch, seed=seed, shuffle=shuffle)
    got = indices(loader.epoch(epoch))
    assert sorted(index for part in got for index in part) == list(range(rows))
    assert len(got) == len(loader)
    assert all(len(part) == batch for part in got[:-1])
    assert 1 <= len(got[-1]) <= batch


@settings(database=None, max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 1000))
def test_the_order_is_a_function_of_seed_and_epoch(seed, epoch):
    torch.manual_seed(epoch)
    fresh = kdlib.Loader(pairs(30), batch=7, seed=seed)
    used = kdlib.Loader(pairs(30), batch=7, seed=seed)
    for earlier in (3, 0):
        list(used.epoch(earlier))
    torch.manual_seed(epoch + 1)
    assert indices(fresh.epoch(epoch)) == indices(used.epoch(epoch))


def test_the_order_does_not_depend_on_the_batch_size():
    orders = [flat(kdlib.Loader(pairs(30), batch=batch).epoch(2)) for batch in (1, 7, 16, 30, 100)]
    assert all(order == orders[0] for order in orders)


def test_epochs_and_seeds_differ():
    loader, other = kdlib.Loader(pairs(30), batch=7, seed=0), kdlib.Loader(pairs(30), batch=7, seed=1)
    orders = [flat(source.epoch(epoch)) for source in (loader, other) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 10
    assert list(range(30)) not in orders


def test_every_for_is_the_next_epoch_from_0():
    loader = kdlib.Loader(pairs(), batch=4, seed=3)
    for epoch in range(3):
        assert [batch["epoch"].unique().tolist() for batch in loader] == [[epoch]] * 3
    assert flat(loader) == flat(kdlib.Loader(pairs(), batch=4, seed=3).epoch(3))


def test_after_a_certain_epoch_comes_the_next():
    loader = kdlib.Loader(pairs(), batch=4)
    list(loader.epoch(7))
    assert next(iter(loader))["epoch"].tolist() == [8] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_early_does_not_disturb_the_next(workers):
    loader = kdlib.Loader(pairs(30), batch=4, workers=workers)
    next(iter(loader))
    expected = kdlib.Loader(pairs(30), batch=4)
    assert rows_of(loader, 1) == rows_of(expected, 1)


def test_two_epochs_open_at_once_keep_apart():
    loader = kdlib.Loader(pairs(), batch=4)
    expected = [flat(loader.epoch(epoch)) for epoch in (0, 1)]
    both = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    for place in (0, 1):
        assert flat(batches[place] for batches in both) == expected[place]
        assert all(batches[place]["epoch"].unique().tolist() == [place] for batches in both)


def test_without_shuffling_the_order_is_the_data_sets():
    loader = kdlib.Loader(pairs(), batch=4, shuffle=False)
    assert indices(loader) == indices(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# what is in a batch


def test_pairs_become_mappings_with_index_and_epoch():
    data = pairs()
    for batch in kdlib.Loader(data, batch=4).epoch(5):
        assert set(batch) == {"x", "y", "index", "epoch"}
        assert torch.equal(batch["x"], data.tensors[0][batch["index"]])
        assert torch.equal(batch["y"], data.tensors[1][batch["index"]])
        assert batch["epoch"].tolist() == [5] * len(batch["index"])
        assert batch["index"].dtype == batch["epoch"].dtype == batch["y"].dtype == torch.int64


def test_mappings_keep_what_they_have():
    for batch in kdlib.Loader(Mappings(), batch=4):
        assert set(batch) == {"x", "y", "partners", "index", "epoch"}
        assert torch.equal(batch["partners"][:, 0, 0], batch["index"].float())


def test_a_data_part_is_asked_by_epoch_and_index():
    loader, part = kdlib.Loader(Views(), batch=4), Views()
    for epoch in (0, 1):
        for batch in loader.epoch(epoch):
            for index, x in zip(batch["index"].tolist(), batch["x"], strict=True):
                assert torch.equal(x, part[(epoch, index)]["x"])
    assert not torch.equal(part[(0, 0)]["x"], part[(1, 0)]["x"])


def test_a_loader_may_be_made_of_another_loaders_data_set():
    loader = kdlib.Loader(pairs(), batch=4)
    assert rows_of(kdlib.Loader(loader.dataset, batch=4), 2) == rows_of(loader, 2)


def test_a_wrapper_that_only_takes_epoch_and_index_is_enough():
    """What a source's ``dataset(part)`` returns: items by (epoch, index), and a length."""

    class Wrapper:
        def __init__(self, part):
            self.part = part

        def __len__(self):
            return len(self.part)

        def __getitem__(self, key):
            epoch, index = key
            return {**self.part[key], "partners": 100 * epoch + index}

    class Source:
        def dataset(self, part):
            return Wrapper(part)

        def __call__(self, batch):
            assert torch.equal(batch["partners"], 100 * batch["epoch"] + batch["index"])
            return {}

    for data in (Views(), pairs()):
        width = 2 if isinstance(data, Views) else 4
        student = kdlib.Tapped(torch.nn.Linear(width, 3), logits="")
        history = kdlib.fit(
            kdlib.Distiller(student, Source(), h=kdlib.HardLabels()), data, epochs=2, batch=4, progress=False
        )
        assert history.steps == 6


@pytest.mark.parametrize(("rows", "batch", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (1, 1, [1])])
def test_the_last_batch_may_be_smaller(rows, batch, sizes):
    loader = kdlib.Loader(pairs(rows), batch=batch)
    assert [len(part["x"]) for part in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("data", [pairs(), Mappings(), Views()], ids=["pairs", "mappings", "part"])
def test_two_workers_give_the_same_batches_as_none_in_every_epoch(data):
    alone, helped = kdlib.Loader(data, batch=4, seed=1), kdlib.Loader(data, batch=4, seed=1, workers=2)
    for epoch in (0, 1, 5):
        assert rows_of(helped, epoch) == rows_of(alone, epoch)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_state_is_untouched(workers):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    loader = kdlib.Loader(pairs(), batch=4, workers=workers)
    for _ in range(2):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


# refusals


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pairs())


def test_a_data_set_without_items_by_number_is_refused():
    with pytest.raises(kdlib.DataError, match="Stream"):
        kdlib.Loader(Stream(), batch=2)


def test_an_empty_data_set_is_refused():
    with pytest.raises(kdlib.DataError, match="empty"):
        kdlib.Loader(TensorDataset(torch.zeros(0, 4), torch.zeros(0)), batch=4)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_no_rows_is_refused(batch):
    with pytest.raises(kdlib.DataError, match=f"{batch}"):
        kdlib.Loader(pairs(), batch=batch)


def test_items_that_are_neither_pairs_nor_mappings_are_refused():
    data = TensorDataset(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3))
    with pytest.raises(kdlib.BatchError, match="tuple"):
        next(iter(kdlib.Loader(data, batch=2)))


# items that cannot be read


class Spoilt(Views):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, key):
        if key[1] == 5:
            raise self.error()
        return super().__getitem__(key)


class Unsendable(kdlib.DataError):
    def __init__(self):
        super().__init__("clip-5: no pickle takes this")
        self.lock = threading.Lock()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.timeout(30)
def test_an_error_of_the_middle_of_an_epoch_comes_out_as_it_was(workers):
    loader = kdlib.Loader(Spoilt(lambda: kdlib.DataError("clip-5: cut")), batch=2, shuffle=False, workers=workers)
    batches = iter(loader)
    assert indices([next(batches), next(batches)]) == [[0, 1], [2, 3]]
    with pytest.raises(kdlib.DataError, match=r"^clip-5: cut$"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.timeout(30)
def test_an_error_that_cannot_be_sent_from_a_worker_does_not_hang(workers):
    loader = kdlib.Loader(Spoilt(Unsendable), batch=2, shuffle=False, workers=workers)
    with pytest.raises(kdlib.KdlibError, match=r"^clip-5: no pickle takes this$"):
        list(loader)


@pytest.mark.timeout(30)
def test_the_workers_are_gone_after_an_error():
    before = set(multiprocessing.active_children())
    loader = kdlib.Loader(Spoilt(lambda: kdlib.DataError("clip-5: cut")), batch=2, shuffle=False, workers=2)
    with pytest.raises(kdlib.DataError):
        list(loader)
    assert len(set(multiprocessing.active_children()) - before) == 2  # for another epoch
    del loader
    assert set(multiprocessing.active_children()) <= before


def test_a_fault_of_a_data_set_is_raised_where_it_is():
    def fault():
        return RuntimeError("the dog ate it")

    with pytest.raises(RuntimeError, match="the dog ate it"):
        list(kdlib.Loader(Spoilt(fault), batch=2, shuffle=False))


# data parts and devices


def test_a_tensor_part_gives_items_by_epoch_and_index_and_knows_labels_ids_and_groups():
    part = kdlib.TensorPart(torch.arange(6.0).reshape(3, 2), [2, 0, 1], ids=["a", "b", "c"], groups=["p", "p", "q"])
    assert isinstance(part, kdlib.DataPart)
    item = part[(4, 1)]
    assert item["x"].tolist() == [2.0, 3.0]
    assert (item["y"], item["index"], item["epoch"]) == (0, 1, 4)
    assert part.labels.tolist() == [2, 0, 1]
    assert (list(part.ids), list(part.groups)) == (["a", "b", "c"], ["p", "p", "q"])


def test_a_tensor_part_of_unequal_lengths_is_refused():
    for wrong in ({"labels": [0, 1]}, {"labels": [0, 1, 2], "ids": ["a"]}, {"labels": [0, 1, 2], "groups": ["a"]}):
        with pytest.raises(kdlib.DataError, match="length"):
            kdlib.TensorPart(torch.zeros(3, 2), **wrong)


Pair = namedtuple("Pair", ["left", "right"])


def test_moving_a_batch_changes_the_layout_of_images_alone_and_keeps_nests():
    image, line = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5)
    index = torch.arange(2)
    batch = {"x": (image, {"a": line}), "pair": Pair(image, line), "index": index, "epoch": index, "names": ["u", "v"]}
    moved = to_device(batch, torch.device("cpu"), torch.channels_last)
    assert moved["x"][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved["x"][1]["a"], line)
    assert moved["pair"].left.is_contiguous(memory_format=torch.channels_last)
    assert moved["index"] is index
    assert moved["names"] == ["u", "v"]
    assert image.is_contiguous()


# fingerprints


def test_a_fingerprint_of_a_tensor_is_of_its_values_type_and_shape():
    x = torch.arange(24.0).view(4, 2, 3)
    other = x.clone()
    other[2, 0, 0] = -0.0
    part, changed = (kdlib.TensorPart(values, [0] * 4, ids=list("abcd")) for values in (x, other))
    prints = [part.fingerprint(index) for index in range(4)]
    assert len(set(prints)) == 4
    assert [changed.fingerprint(index) == prints[index] for index in range(4)] == [True, True, False, True]
    twice = kdlib.TensorPart(torch.cat([x, x]).transpose(1, 2).contiguous().transpose(1, 2), [0] * 8)
    assert [twice.fingerprint(index) for index in range(8)] == prints * 2
    for same_bytes in (x.view(4, 3, 2), x.view(torch.int32), x.view(4, 6)):
        assert kdlib.TensorPart(same_bytes, [0] * 4).fingerprint(1) not in prints
    assert len(kdlib.TensorPart(torch.tensor([True, False]), [0, 1]).fingerprint(0)) == 64


def test_an_iterator_that_was_not_drawn_from_counts_as_no_epoch():
    loader = kdlib.Loader(pairs(), batch=4)
    iter(loader)
    assert next(iter(loader))["epoch"].tolist() == [0] * 4
    loader.epoch(7)
    assert next(iter(loader))["epoch"].tolist() == [7] * 4
    assert next(iter(loader))["epoch"].tolist() == [8] * 4


class Plain(torch.nn.Module):
    """Features that are the samples."""

    time_axis = -1

    def forward(self, samples):
        return samples


def test_a_part_that_torchs_loader_asks_by_number_names_the_loader_that_knows_how():
    part = kdlib.TensorPart(torch.zeros(4, 2), [0, 1, 0, 1])
    for one in (part, Featured(part, Plain())):
        with pytest.raises(kdlib.DataError, match=r"asked by a number alone.*kdlib\.Loader\(part\)"):
            next(iter(torch.utils.data.DataLoader(one, batch_size=2)))


ORPHAN = """
import multiprocessing, os, signal, sys, time
from kdlib.signals import left_to_parent

def work():
    while os.getppid() == parent:  # its parent is killed before it begins, as a whole machine may be
        time.sleep(0.01)
    left_to_parent()
    time.sleep(120)

parent = os.getpid()
process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
process.start()
print(process.pid, flush=True)
os.kill(parent, signal.SIGKILL)
"""


def test_a_worker_whose_parent_was_killed_before_it_began_ends():
    """It has the parent's standard output, which would stay open as long as it lives."""
    ran = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=60)
    assert ran.returncode == -signal.SIGKILL
    assert int(ran.stdout) > 0
