"""Online label smoothing: class means of the student's right predictions."""

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib import ranks
from kdlib.digits import DigitsMLP, digits
from kdlib.settings import read_signature
from kdlib.sources.class_means import ClassMeans, class_means
from kdlib.testing import check_source

K = 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """A student whose logits are its input times a weight, noisy in train mode."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm1d(K, affine=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return {"logits": self.scale * self.drop(x), "hidden": self.norm(x)}


def batch(epoch, seed=0, rows=12):
    x = 2 * torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": torch.arange(rows) % K, "epoch": torch.full((rows,), epoch), "index": torch.arange(rows)}


def means_of(*batches, scale=1.0):
    """The class means in plain numpy."""
    sums, counts = np.zeros((K, K)), np.zeros(K)
    for one in batches:
        z = scale * one["x"].double().numpy()
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        for row, label in zip(p, one["y"].numpy(), strict=True):
            if row.argmax() == label:
                sums[label] += row
                counts[label] += 1
    return np.stack([sums[k] / counts[k] if counts[k] else np.full(K, 1 / K) for k in range(K)])


def labels(source, one):
    return source(one)["logits"].exp().double().numpy()


def test_two_epochs_by_hand():
    source, net = ClassMeans(None, classes=K), Net()
    first, second = [batch(0, 1), batch(0, 2)], [batch(1, 3), batch(1, 4)]
    for one in first:
        np.testing.assert_allclose(labels(source, one), 1 / K, rtol=1e-6)
        source.advance(net)
    expected = means_of(*first)
    for one in second:  # from the first batch of the epoch on
        np.testing.assert_allclose(labels(source, one), expected[one["y"].numpy()], rtol=1e-5)
        source.advance(net)
    np.testing.assert_allclose(source.means.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(labels(source, batch(2)), means_of(*second)[batch(2)["y"].numpy()], rtol=1e-5)


def test_it_sees_the_weights_after_the_step():
    source, net, one = ClassMeans(None, classes=K), Net(), batch(0)
    source(one)
    with torch.no_grad():
        net.scale.fill_(3.0)
    source.advance(net)
    np.testing.assert_allclose(class_means(source.sums).numpy(), means_of(one, scale=3.0), rtol=1e-5)


def test_a_class_that_is_never_right_has_a_uniform_label():
    source, one = ClassMeans(None, classes=K), batch(0)
    one["x"] = nn.functional.one_hot((one["y"] + (one["y"] == 2)) % K, K).float()  # class 2 is taken for class 0
    source(one)
    source.advance(Net())
    means = class_means(source.sums)
    np.testing.assert_allclose(means[2].numpy(), 1 / K, rtol=1e-6)
    assert means[0, 0] > 0.5
    assert source.sums[:, -1].tolist() == [4, 4, 0]


def test_looking_leaves_the_student_and_the_random_state_as_they_were():
    source, net, one = ClassMeans(None, classes=K), Net().train(), batch(0)
    net.norm.eval()
    source(one)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    source.advance(net)
    assert (net.training, net.drop.training, net.norm.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.scale.grad is None


def test_a_forward_changes_no_state_and_validation_is_not_remembered():
    source, net = ClassMeans(None, classes=K), Net()
    before = copy.deepcopy(source.state_dict())
    source.eval()
    source(batch(-1))
    source.advance(net)
    source.train()
    source(batch(0))
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    source.advance(net)
    assert source.sums.sum() > 0
    after = copy.deepcopy(source.state_dict())
    source.advance(net)  # nothing new was seen
    assert all(torch.equal(value, after[name]) for name, value in source.state_dict().items())


def test_validation_uses_the_labels_of_the_epoch_just_past():
    source, net = ClassMeans(None, classes=K), Net()
    for epoch in (0, 1):
        source(batch(epoch, epoch))
        source.advance(net)
    source.eval()
    one = batch(-1, 9)
    np.testing.assert_allclose(labels(source, one), means_of(batch(0, 0))[one["y"].numpy()], rtol=1e-5)


def test_another_training_begins_with_what_the_last_one_saw():
    source, net = ClassMeans(None, classes=K), Net()
    for epoch in (0, 1):
        source(batch(epoch, epoch))
        source.advance(net)
    again = batch(0, 5)
    np.testing.assert_allclose(labels(source, again), means_of(batch(1, 1))[again["y"].numpy()], rtol=1e-5)


def test_its_state_survives_a_round_trip_in_the_middle_of_an_epoch():
    one, net = ClassMeans(None, classes=K), Net()
    for epoch, seed in ((0, 1), (0, 2), (1, 3)):
        one(batch(epoch, seed))
        one.advance(net)
    other = ClassMeans(None, classes=K)
    other.load_state_dict(one.state_dict())
    for source in (one, other):
        source(batch(1, 4))
        source.advance(net)
    assert np.array_equal(labels(one, batch(2)), labels(other, batch(2)))


def as_rank(environment, say):
    os.environ |= environment
    torch.set_num_threads(1)
    with ranks.group():
        source = ClassMeans(None, classes=K)
        for step in range(3):
            if ranks.rank() == 0 or step < 2:  # then the other rank has no batch left
                source(batch(step, 2 * step + ranks.rank()))
            source.advance(Net())
        say({name: value.numpy() for name, value in source.state_dict().items()})


def test_sums_are_taken_over_ranks_also_where_one_has_no_batch_left(launch):
    one, other = launch(as_rank, 2)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert int(one["epoch"]) == 2
    np.testing.assert_allclose(one["means"], means_of(batch(1, 2), batch(1, 3)), rtol=1e-5)
    np.testing.assert_allclose(class_means(torch.from_numpy(one["sums"])), means_of(batch(2, 4)), rtol=1e-5)


def test_it_is_a_source_with_a_schema():
    source, net = ClassMeans(None, classes=K), Net()
    for epoch in (0, 1):
        source(batch(epoch, epoch))
        source.advance(net)
    check_source(source, batch(1))
    check_source(source, batch(2))
    assert list(source.parameters()) == []
    live, schema = read_signature("source", "class_means", ClassMeans)
    assert (live, schema().model_dump()) == (("data",), {"classes": None, "tap": "logits"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.rand(12, K)}, r"one class number a row.*\(12, 3\)"),
        ({"y": torch.zeros(12, 2, dtype=torch.int64)}, r"one class number a row.*\(12, 2\)"),
        ({"y": torch.full((12,), K)}, "there are 3 classes"),
    ],
)
def test_labels_that_are_not_class_numbers_are_an_error(change, message):
    with pytest.raises(kdlib.BatchError, match=message):
        ClassMeans(None, classes=K)({**batch(0), **change})


def test_a_student_with_other_classes_is_an_error():
    source = ClassMeans(None, classes=K + 1)
    source(batch(0))
    with pytest.raises(kdlib.BatchError, match=r"'logits' has shape \(12, 3\).*\(12, 4\)"):
        source.advance(Net())


def test_without_an_epoch_the_source_is_named():
    one = kdlib.Distiller(Net(), ClassMeans(None, classes=K), soft=kdlib.SoftLabels())
    with pytest.raises(kdlib.BatchError, match=r"(?i)source \(ClassMeans\).*no 'epoch'"):
        one({"x": torch.zeros(2, K), "y": torch.tensor([0, 1])})


def test_epochs_of_fit_on_digits_move_the_labels_towards_the_classes():
    parts = digits(train=100, valid=20)
    one = kdlib.Distiller(
        DigitsMLP(width=16), ClassMeans(parts.train), soft=(0.5, kdlib.SoftLabels()), hard=(0.5, kdlib.HardLabels())
    )
    kdlib.fit(one, parts.train, valid=parts.valid, select="last", epochs=6, batch=20, lr=1e-2, progress=False)
    assert one.source.means.shape == (10, 10)
    torch.testing.assert_close(one.source.means.sum(1), torch.ones(10))
    assert one.source.means.diagonal().mean() > 0.15
    assert one.source.sums[:, -1].sum() > 40
    assert {name for name in one.state_dict() if name.startswith("source")} == {
        "source.means",
        "source.sums",
        "source.epoch",
    }
