"""Soft labels from the true class alone."""

import numpy as np
import pytest
import torch

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.settings import read_signature
from kdlib.sources.classes import class_numbers, classes_of
from kdlib.sources.label_smoothing import LabelSmoothing, smoothed
from kdlib.testing import check_source


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("epsilon", [1e-6, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_closed_form(epsilon, classes):
    labels = torch.tensor([0, 1, classes - 1])
    expected = np.log((1 - epsilon) * np.eye(classes)[labels.numpy()] + epsilon / classes)
    np.testing.assert_allclose(smoothed(labels, classes, epsilon).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_its_softmax_is_the_smoothed_label_and_a_temperature_softens_it():
    logits = LabelSmoothing(None, smoothing=0.3, classes=3)({"y": torch.tensor([1])})["logits"].double()
    p = np.array([0.1, 0.8, 0.1])
    np.testing.assert_allclose(logits.softmax(-1).numpy()[0], p, rtol=1e-6)
    np.testing.assert_allclose((logits / 4).softmax(-1).numpy()[0], p**0.25 / (p**0.25).sum(), rtol=1e-6)


def test_with_soft_labels_it_is_the_hard_point_with_smoothing():
    student, batch = {"logits": noise(6, 5).requires_grad_()}, {"y": torch.tensor([0, 1, 2, 3, 4, 0])}
    taps = LabelSmoothing(None, smoothing=0.2, classes=5)(batch)
    soft, hard = kdlib.SoftLabels(), kdlib.HardLabels(label_smoothing=0.2)
    one, other = soft(student, taps, batch), hard(student, {}, batch)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, student["logits"])[0] for loss in (one, other)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_it_is_the_hand_made_teacher_of_tf_kd():
    a, classes = 0.9, 5
    epsilon = (1 - a) * classes / (classes - 1)
    logits = LabelSmoothing(None, smoothing=epsilon, classes=classes)({"y": torch.tensor([2])})
    expected = torch.full((1, classes), (1 - a) / (classes - 1))
    expected[0, 2] = a
    torch.testing.assert_close(logits["logits"].exp(), expected)


def test_labels_may_be_probabilities_or_have_more_axes():
    source = LabelSmoothing(None, smoothing=0.2, classes=4)
    p = noise(3, 4).softmax(-1)
    torch.testing.assert_close(source({"y": p})["logits"].exp(), 0.8 * p + 0.05)
    assert source({"y": torch.zeros(3, 7, dtype=torch.int64)})["logits"].shape == (3, 7, 4)


def test_what_the_mask_leaves_out_may_hold_any_number():
    source, mask = LabelSmoothing(None, classes=4), torch.tensor([[True, False]])
    assert source({"y": torch.tensor([[3, -100]]), "mask": mask})["logits"].isfinite().all()


@pytest.mark.parametrize("y", [[0, 4], [-1, 0], [-100, 0]])
def test_a_label_that_is_no_class_is_an_error(y):
    with pytest.raises(kdlib.BatchError, match="there are 4 classes"):
        LabelSmoothing(None, classes=4)({"y": torch.tensor(y)})


@pytest.mark.parametrize("smoothing", [0.0, 1.1])
def test_a_share_out_of_bounds_is_refused(smoothing):
    with pytest.raises(kdlib.KdlibError, match="smoothing"):
        LabelSmoothing(None, smoothing=smoothing, classes=3)


def test_an_empty_batch_has_no_wrong_label():
    assert class_numbers(torch.zeros(0, dtype=torch.int64), 3).shape == (0,)


class Named:
    classes = ("a", "b", "c")


def test_the_number_of_classes_is_the_datas():
    assert classes_of(Named(), None) == 3
    assert classes_of(kdlib.TensorPart(torch.zeros(3), [0, 4, 1]), None) == 5
    assert classes_of(None, 7) == classes_of(kdlib.TensorPart(torch.zeros(1), [0]), 7) == 7
    with pytest.raises(kdlib.KdlibError, match=r"classes=4.*3: a, b, c"):
        classes_of(Named(), 4)
    with pytest.raises(kdlib.KdlibError, match="not known"):
        classes_of(None, None)


def test_it_is_a_source_with_a_schema():
    check_source(LabelSmoothing(None, classes=3), {"x": torch.zeros(6, 2), "y": torch.arange(6) % 3})
    live, schema = read_signature("source", "label_smoothing", LabelSmoothing)
    assert live == ("data",)
    for wrong in ({"smoothing": 0.0}, {"smoothing": 1.5}, {"classes": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            schema(**wrong)


def test_two_epochs_of_fit_on_digits():
    parts = digits(train=60, valid=20)
    one = kdlib.Distiller(DigitsMLP(width=8), LabelSmoothing(parts.train), soft=kdlib.SoftLabels())
    history = kdlib.fit(one, parts.train, valid=parts.valid, epochs=2, batch=20, progress=False)
    assert history.epochs[1]["soft"] < history.epochs[0]["soft"]
    assert {name.split(".")[0] for name in one.state_dict()} == {"student", "step"}
