"""Hard labels against torch's own cross-entropy."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

import kdlib
from kdlib.points import Dkd


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classes(*shape, k=10, seed=1):
    return torch.randint(0, k, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "k"), [(8, 10), (1, 10), (8, 2), (1, 2)])
def test_it_is_torchs_cross_entropy_also_for_one_row_and_two_classes(rows, k, smoothing):
    logits, y = noise(rows, k), classes(rows, k=k)
    point = kdlib.HardLabels(label_smoothing=smoothing)
    expected = cross_entropy(logits, y, label_smoothing=smoothing)
    torch.testing.assert_close(point({"logits": logits}, {}, {"y": y}), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_probabilities_are_a_target_too(smoothing):
    logits, target = noise(8, 10), noise(8, 10, seed=2).softmax(-1)
    loss = kdlib.hard_cross_entropy(logits, target, label_smoothing=smoothing)
    torch.testing.assert_close(loss, cross_entropy(logits, target, label_smoothing=smoothing), rtol=1e-6, atol=0)


def test_one_hot_probabilities_are_class_numbers():
    logits, y = noise(8, 10), classes(8)
    loss = kdlib.hard_cross_entropy(logits, one_hot(y, 10).float())
    torch.testing.assert_close(loss, kdlib.hard_cross_entropy(logits, y), rtol=1e-6, atol=0)


def test_it_is_a_sum_over_classes_and_a_mean_over_the_batch():
    logits, y = noise(4, 10, dtype=torch.float64).requires_grad_(), classes(4)
    kdlib.hard_cross_entropy(logits, y).backward()
    expected = (logits.detach().softmax(-1) - one_hot(y, 10)) / 4
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-7)


def test_positions_on_axis_one_and_classes_last():
    logits, y = noise(3, 5, 10), classes(3, 5)
    expected = cross_entropy(logits.reshape(15, 10), y.reshape(15))
    torch.testing.assert_close(kdlib.hard_cross_entropy(logits, y), expected, rtol=1e-6, atol=0)


def test_classes_on_axis_one_with_numbers_and_with_probabilities():
    logits, y, target = noise(3, 10, 5), classes(3, 5), noise(3, 10, 5, seed=3).softmax(1)
    torch.testing.assert_close(kdlib.hard_cross_entropy(logits, y, dim=1), cross_entropy(logits, y), rtol=1e-6, atol=0)
    loss = kdlib.hard_cross_entropy(logits, target, dim=1)
    torch.testing.assert_close(loss, cross_entropy(logits, target, reduction="sum") / 15, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [-1, 1])
def test_a_mask_leaves_the_mean_of_what_it_counts(dim):
    logits, y = noise(3, 5, 10), classes(3, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    expected = torch.stack([cross_entropy(logits[b, t], y[b, t]) for b, t in mask.nonzero()]).mean()
    point = kdlib.HardLabels(dim=dim)
    taps = {"logits": logits.movedim(-1, dim)}
    for kind in (mask, mask.bool(), mask.float()):
        torch.testing.assert_close(point(taps, {}, {"y": y, "mask": kind}), expected, rtol=1e-6, atol=0)


def test_a_mask_that_counts_nothing_gives_zero_and_no_nan_gradient():
    logits = noise(2, 3, 4).requires_grad_()
    loss = kdlib.hard_cross_entropy(logits, classes(2, 3, k=4), mask=torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_nan_under_the_mask_does_not_reach_the_loss():
    logits, y = noise(2, 3, 4), classes(2, 3, k=4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean = kdlib.hard_cross_entropy(logits, y, mask=mask)
    spoiled = logits.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(kdlib.hard_cross_entropy(spoiled, y, mask=mask), clean)


@pytest.mark.parametrize("padding", [-1, -100, 999])
def test_padded_labels_under_the_mask_may_be_any_number(padding):
    logits, y = noise(2, 3, 4), classes(2, 3, k=4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = kdlib.hard_cross_entropy(logits, y.where(mask, padding), mask=mask)
    assert torch.equal(loss, kdlib.hard_cross_entropy(logits, y, mask=mask))


@pytest.mark.parametrize("mask", [None, torch.tensor([True, True, True, False])])
def test_the_label_minus_100_does_not_count_as_in_torch(mask):
    logits, y = noise(4, 3), torch.tensor([2, -100, 0, 1])
    kept = torch.tensor([0, 2, 3] if mask is None else [0, 2])
    expected = torch.nn.functional.cross_entropy(logits[kept], y[kept])
    torch.testing.assert_close(kdlib.hard_cross_entropy(logits, y, mask=mask), expected)
    assert kdlib.hard_cross_entropy(logits, torch.full((4,), -100), mask=mask) == 0


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_class_numbers_of_any_integer_type_will_do(kind):
    logits, y = noise(4, 3), torch.tensor([2, 1, 0, 1])
    for mask in (None, torch.tensor([True, False, True, True])):
        expected = kdlib.hard_cross_entropy(logits, y, mask=mask)
        assert torch.equal(kdlib.hard_cross_entropy(logits, y.to(kind), mask=mask), expected)


def test_a_mask_of_another_shape_names_both():
    with pytest.raises(kdlib.BatchError, match=r"\(2, 4\).*\(2, 3\)"):
        kdlib.hard_cross_entropy(noise(2, 3, 4), classes(2, 3, k=4), mask=torch.ones(2, 4))


def test_labels_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(kdlib.KdlibError, match=r"(?s)\(3, 2\).*\(2, 3|\(2, 3.*\(3, 2\)"):
        kdlib.hard_cross_entropy(noise(2, 3, 4), classes(3, 2, k=4))  # as many numbers, other positions
    with pytest.raises(kdlib.KdlibError, match=r"(?s)\(5,\).*\(2|\(2.*\(5,\)"):
        kdlib.hard_cross_entropy(noise(2, 4), classes(5, k=4))


@pytest.mark.parametrize("k", [2, 10])
@pytest.mark.parametrize("scale", [1e4, -1e4, -400.0])
def test_extreme_logits_keep_loss_and_gradient_finite(scale, k):
    logits = torch.zeros(2, k)
    logits[:, 0] = scale
    logits.requires_grad_()
    loss = kdlib.hard_cross_entropy(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_the_float_loss_of_the_same_numbers(dtype):
    logits, y = noise(8, 10).to(dtype).requires_grad_(), classes(8)
    loss = kdlib.hard_cross_entropy(logits, y)
    loss.backward()
    torch.testing.assert_close(loss, cross_entropy(logits.float(), y), rtol=1e-6, atol=0)
    assert logits.grad.dtype == dtype


def test_half_precision_probabilities_are_a_target_too():
    logits, target = noise(8, 10), noise(8, 10, seed=2).softmax(-1).half()
    expected = cross_entropy(logits, target.float())
    torch.testing.assert_close(kdlib.hard_cross_entropy(logits, target), expected, rtol=1e-6, atol=0)


def test_float64_stays_float64():
    logits, y = noise(8, 10, dtype=torch.float64), classes(8)
    loss = kdlib.hard_cross_entropy(logits, y)
    torch.testing.assert_close(loss, cross_entropy(logits, y), rtol=1e-12, atol=0)


def test_gradcheck_in_float64():
    logits, y = noise(3, 4, dtype=torch.float64).requires_grad_(), classes(3, k=4)
    assert torch.autograd.gradcheck(lambda z: kdlib.hard_cross_entropy(z, y, label_smoothing=0.1), (logits,))


class Taps(nn.Module):
    """A student that returns given taps."""

    def __init__(self, **taps):
        super().__init__()
        self.taps = taps

    def forward(self, x):
        return self.taps


def test_missing_taps_and_labels_are_named_with_the_point():
    point = kdlib.HardLabels()
    with pytest.raises(kdlib.TapError, match=r"(?s)'hard'.*student.*'logits'.*embedding"):
        kdlib.Distiller(Taps(embedding=noise(2, 3)), hard=point)({"x": 0, "y": classes(2)})
    with pytest.raises(kdlib.BatchError, match=r"(?s)'hard'.*'y'.*x"):
        kdlib.Distiller(Taps(logits=noise(2, 3)), hard=point)({"x": 0})


def test_another_tap_may_be_compared():
    logits, y = noise(8, 10), classes(8)
    loss = kdlib.HardLabels(tap="auxiliary")({"auxiliary": logits, "logits": -logits}, {}, {"y": y})
    torch.testing.assert_close(loss, cross_entropy(logits, y), rtol=1e-6, atol=0)


# labels that are no class


@pytest.mark.parametrize("point", [kdlib.HardLabels(), Dkd(), kdlib.of("a", Dkd())], ids=["hard", "dkd", "of"])
@pytest.mark.parametrize(
    ("labels", "batch", "told"),
    [
        ([0, 3, 1], {"index": torch.tensor([7, 5, 9])}, "no class: 3, of the samples 5. The logits have 3 classes"),
        ([-1, 3, 1], {"index": torch.tensor([7, 5, 9])}, "no class: -1, 3, of the samples 7, 5. The logits"),
        ([0, 3, 1], {}, "no class: 3, of the rows of the batch 1. The logits have 3 classes"),
        ([3, 0, 9], {"mask": torch.tensor([0, 1, 1]), "index": torch.arange(3)}, "no class: 9, of the samples 2"),
    ],
)
def test_a_label_that_is_no_class_is_named_with_its_sample(point, labels, batch, told):
    logits = torch.zeros(3, 3, requires_grad=True)
    with pytest.raises(kdlib.BatchError) as caught:
        point({"logits": logits}, {"logits": logits, "a.logits": logits}, {"y": torch.tensor(labels), **batch})
    assert told in str(caught.value)


def test_in_a_training_a_label_that_is_no_class_is_named_with_its_point():
    part = kdlib.TensorPart(torch.zeros(8, 2), [0, 1, 0, 1, 0, 1, 0, 2])
    net = kdlib.Tapped(torch.nn.Linear(2, 2), logits="")
    with pytest.raises(
        kdlib.BatchError, match=r"Point 'hard' \(HardLabels\): labels that are no class: 2.* samples 7\."
    ):
        kdlib.fit(kdlib.Distiller(net, hard=kdlib.HardLabels()), part, epochs=1, batch=4, progress=False)


def test_what_fails_for_another_reason_is_not_blamed_on_the_labels():
    with pytest.raises(IndexError):
        kdlib.HardLabels(dim=5)({"logits": torch.zeros(2, 3)}, {}, {"y": torch.tensor([0, 1])})
