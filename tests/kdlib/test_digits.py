"""The digits: a split that the seed decides, and the network that goes with it."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import kdlib
from kdlib.digits import DigitsMLP, digits


@pytest.fixture(scope="module")
def parts():
    return digits(train=100, valid=50)


def test_every_image_is_in_one_part(parts):
    ids = [*parts.train.ids, *parts.valid.ids, *parts.test.ids]
    assert len(ids) == len(set(ids)) == 1797
    assert [len(part) for part in (parts.train, parts.valid, parts.test)] == [100, 50, 1647]


def test_images_and_labels_are_scikit_learns(parts):
    data = load_digits()
    for part in (parts.train, parts.valid, parts.test):
        rows = [int(name.removeprefix("digit-")) for name in part.ids]
        np.testing.assert_array_equal(part.x.numpy(), data.data[rows].astype(np.float32) / 16)
        np.testing.assert_array_equal(part.labels, data.target[rows])
    assert parts.train.x.dtype == torch.float32
    assert parts.test.x.min() == 0
    assert parts.test.x.max() == 1
    assert parts.classes == tuple("0123456789")


@pytest.mark.parametrize("train", [10, 100, 123, 999])
def test_as_many_of_each_class_as_possible(train):
    made = digits(train=train, valid=57)
    for labels in (made.train.labels, np.concatenate([made.train.labels, made.valid.labels])):
        counts = Counter(labels.tolist())
        assert len(counts) == 10
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_split_is_a_function_of_the_seed(parts):
    again, other = digits(train=100, valid=50), digits(train=100, valid=50, seed=1)
    assert again.train.ids == parts.train.ids
    assert torch.equal(again.test.x, parts.test.x)
    assert other.train.ids != parts.train.ids
    assert set(other.train.ids) != set(parts.train.ids)


def test_random_state_outside_is_neither_used_nor_changed(parts):
    torch.manual_seed(5), np.random.seed(5)  # noqa: NPY002
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert digits(train=100, valid=50).train.ids == parts.train.ids
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_without_a_share_there_is_no_validation_part():
    assert digits(train=100).valid is None


def test_the_parts_are_parts(parts):
    for part in (parts.train, parts.valid, parts.test):
        assert isinstance(part, kdlib.DataPart)
        assert part.labels.dtype == np.int64
        assert len(part.groups) == len(part)
    item = parts.train[3, 7]
    assert item["x"].shape == (64,)
    assert (item["y"], item["index"], item["epoch"]) == (int(parts.train.labels[7]), 7, 3)
    assert torch.equal(parts.train[-1, 7]["x"], item["x"])


@pytest.mark.parametrize(("train", "valid"), [(1698, 0), (1000, 698), (1797, 0), (5000, 0)])
def test_enough_is_left_to_test_on(train, valid):
    with pytest.raises(kdlib.DataError, match="100"):
        digits(train=train, valid=valid)
    assert len(digits(train=1000, valid=697).test) == 100


def test_the_network_is_one_hidden_layer():
    network = DigitsMLP(width=5, classes=3)
    x = torch.rand(4, 64)
    taps = network(x)
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    hidden = np.maximum(x.numpy() @ weights["hidden.weight"].T + weights["hidden.bias"], 0)
    logits = hidden @ weights["output.weight"].T + weights["output.bias"]
    np.testing.assert_allclose(taps["embedding"].detach().numpy(), hidden, atol=1e-6)
    np.testing.assert_allclose(taps["logits"].detach().numpy(), logits, atol=1e-6)
    assert set(taps) == {"logits", "embedding"}


def test_the_digits_are_learnt():
    made = digits(train=200)
    network = DigitsMLP(width=32)
    distiller = kdlib.Distiller(network, hard=kdlib.HardLabels())
    kdlib.fit(distiller, made.train, epochs=30, lr=1e-2, threads=1, progress=False)
    with torch.no_grad():
        right = (network(made.test.x)["logits"].argmax(1).numpy() == made.test.labels).mean()
    assert right > 0.8
