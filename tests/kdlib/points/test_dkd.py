"""Decoupled knowledge distillation against its closed form and a value on which implementations agree."""

import numpy as np
import pytest
import torch

import kdlib
from kdlib.points.dkd import Dkd, dkd_loss
from kdlib.testing import check_point


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(student, teacher, y, alpha, beta, temperature):
    total = 0.0
    for s, t, true in zip(student.numpy(), teacher.numpy(), y.tolist(), strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        tckd = p[true] * np.log(p[true] / q[true]) + (1 - p[true]) * np.log((1 - p[true]) / (1 - q[true]))
        p_others, q_others = np.delete(p, true) / (1 - p[true]), np.delete(q, true) / (1 - q[true])
        total += alpha * tckd + beta * np.sum(p_others * np.log(p_others / q_others))
    return temperature**2 * total / len(y)


@pytest.fixture
def drawn():
    """Logits of a student and a teacher (8, 10) and labels, float64, as drawn by other implementations."""
    generator = torch.Generator().manual_seed(7)
    student = torch.randn(8, 10, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(8, 10, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, 10, (8,), generator=generator)


def test_it_is_a_point():
    check_point(Dkd())


def test_the_value_that_implementations_agree_on(drawn):
    assert dkd_loss(*drawn, alpha=1.0, beta=8.0, temperature=4.0).item() == pytest.approx(25.9522168725, abs=1e-9)
    student, teacher, y = drawn
    assert Dkd()({"logits": student}, {"logits": teacher}, {"y": y}).item() == pytest.approx(25.9522168725, abs=1e-9)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 1.0, 1.0), (2.0, 0.0, 0.5)])
def test_the_closed_form(drawn, alpha, beta, temperature):
    found = dkd_loss(*drawn, alpha=alpha, beta=beta, temperature=temperature)
    assert found.item() == pytest.approx(by_hand(*drawn, alpha, beta, temperature), rel=1e-12)


def test_with_the_teachers_own_weight_it_is_ordinary_kl(drawn):
    student, teacher, y = (one[:1] for one in drawn)
    p_true = softmax(teacher.numpy())[0, y.item()]
    found = dkd_loss(student, teacher, y, alpha=1.0, beta=1 - p_true, temperature=1.0)
    expected = kdlib.soft_cross_entropy(student, teacher, form="kl")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_equal_logits_up_to_a_shift_cost_nothing(drawn):
    student, _, y = drawn
    assert abs(dkd_loss(student, student + 3, y).item()) < 1e-12


def test_a_logit_of_minus_400_costs_what_the_closed_form_says():
    student, y = torch.tensor([[-400.0, 0.0, 0.0]]), torch.tensor([0])
    found = dkd_loss(student, torch.zeros(1, 3), y, beta=0.0, temperature=1.0)
    q = np.exp(-400.0) / 2  # of the true class
    assert found.item() == pytest.approx(np.log(1 / 3 / q) / 3 + 2 / 3 * np.log(2 / 3), rel=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_fewer_than_3_classes_are_refused(k):
    with pytest.raises(kdlib.KdlibError, match=f"at least 3.*{k}"):
        dkd_loss(torch.zeros(4, k), torch.zeros(4, k), torch.zeros(4, dtype=torch.int64))


def test_labels_that_are_no_class_numbers_are_refused():
    z = torch.zeros(4, 3)
    with pytest.raises(kdlib.BatchError, match=r"\(3,\).*\(4,\)"):
        dkd_loss(z, z, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(kdlib.BatchError, match="float"):
        dkd_loss(z, z, torch.zeros(4, 3))


def test_a_batch_without_labels_is_named(drawn):
    student, teacher, _ = drawn
    distiller = kdlib.Distiller(
        kdlib.Tapped(torch.nn.Linear(10, 10).double(), logits=""), lambda batch: {"logits": teacher}, soft=Dkd()
    )
    with pytest.raises(kdlib.BatchError, match=r"'soft'.*'y'"):
        distiller({"x": student})


def test_the_weights_may_be_schedules():
    ramp = kdlib.Schedule(kind="linear", start=0.0, end=8.0, epochs=4)
    student, teacher, y = torch.eye(3), torch.eye(3).flip(0), torch.tensor([0, 1, 2])
    batch = {"y": y, "clock": lambda: (0, 2)}
    found = Dkd(alpha=ramp, beta=ramp)({"logits": student}, {"logits": teacher}, batch)
    assert found == dkd_loss(student, teacher, y, alpha=4.0, beta=4.0)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_class_numbers_of_any_integer_type_will_do(kind):
    student, teacher, y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    assert torch.equal(dkd_loss(student, teacher, y.to(kind)), dkd_loss(student, teacher, y))
