"""cosine keeps kdlib's contract, gives the numbers that its docstring says, and trains."""

import doctest
import subprocess
import sys

import kdlib_cosine
import pytest
import torch
from kdlib_cosine import Cosine, cosine_gap
from torch.nn.functional import cosine_embedding_loss

import kdlib
from kdlib.testing import check_plugin, check_point, example_taps


def test_kdlib_finds_the_installed_plugin():
    check_plugin("cosine")


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_it_keeps_the_contract_of_a_point(margin):
    check_point(Cosine(margin=margin))


def test_it_keeps_the_contract_with_a_projector():
    narrow = {"embedding": example_taps(1)["embedding"][:, :16]}
    check_point(Cosine(), student=narrow)


@pytest.mark.parametrize(("margin", "loss"), [(0.0, 0.5), (0.2, 0.3), (0.7, 0.0)])
def test_an_angle_of_60_degrees(margin, loss):
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 12.0**0.5]])
    assert cosine_gap(student, teacher, margin).item() == pytest.approx(loss, abs=1e-6)


def test_without_a_margin_it_is_the_loss_that_torch_has():
    student, teacher = (example_taps(seed)["embedding"].double() for seed in (1, 2))
    expected = cosine_embedding_loss(student, teacher, torch.ones(len(student)))
    torch.testing.assert_close(cosine_gap(student, teacher), expected)


def test_the_gradient_is_that_of_the_formula():
    student, teacher = (example_taps(seed)["embedding"].double() for seed in (1, 2))
    torch.autograd.gradcheck(lambda ours: cosine_gap(ours, teacher, 0.1), student.requires_grad_())


def test_a_row_of_zeros_gets_no_large_gradient():
    student = torch.zeros(1, 4, requires_grad=True)
    cosine_gap(student, torch.ones(1, 4)).backward()
    assert student.grad.norm().item() == pytest.approx(1.0)


def test_the_example_in_the_docstring_runs():
    found = doctest.testmod(kdlib_cosine)
    assert (found.failed, found.attempted) == (0, 1)


def test_large_numbers_do_not_overflow_in_half_precision():
    large = torch.full((2, 64), 6e4, dtype=torch.float16)
    assert cosine_gap(large, -large).item() == pytest.approx(2.0)


def test_without_prepare_it_says_what_to_call():
    with pytest.raises(kdlib.KdlibError, match=r"distiller\.prepare\(batch\)"):
        Cosine()(example_taps(1), example_taps(2), {})


def test_a_narrow_student_and_the_projector_learn_from_it():
    torch.manual_seed(0)
    teacher = kdlib.freeze(kdlib.Tapped(torch.nn.Linear(4, 3), embedding=""))
    student = kdlib.Tapped(torch.nn.Linear(4, 2), embedding="")
    point = Cosine()
    distiller = kdlib.Distiller(student, kdlib.SameInput(teacher), gap=point)
    data = [(x, 0) for x in torch.randn(64, 4)]
    distiller.prepare(next(iter(kdlib.Loader(data, batch=8))))
    before = point.projector.weight.clone()
    losses = [epoch["gap"] for epoch in kdlib.fit(distiller, data, epochs=20, lr=0.01, progress=False).epochs]
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(point.projector.weight, before)


@pytest.mark.parametrize(("margin", "code"), [("0.05", 0), ("2.0", 2)])
def test_the_recipe_is_known_and_the_bound_of_the_margin_kept(margin, code, tmp_path):
    command = [sys.executable, "-m", "kdlib", "check", "digits_cosine", "--set", f"points.gap.margin={margin}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert code == 0 or "points.gap.margin" in done.stderr
