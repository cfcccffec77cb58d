"""new_point keeps kdlib's contract, gives the numbers that its docstring says, and trains."""

import torch
from kdlib_new_point import NewPoint

import kdlib
from kdlib.testing import check_plugin, check_point


def test_kdlib_finds_the_installed_plugin():
    check_plugin("new_point")


def test_it_keeps_the_contract_of_a_point():
    check_point(NewPoint())


def test_a_known_value():
    student, teacher = {"embedding": torch.tensor([[1.0, 2.0]])}, {"embedding": torch.tensor([[0.0, 5.0]])}
    assert NewPoint()(student, teacher, {}).item() == 2.0


def test_a_student_learns_from_it():
    torch.manual_seed(0)
    teacher = kdlib.freeze(kdlib.Tapped(torch.nn.Linear(4, 3), embedding=""))
    student = kdlib.Tapped(torch.nn.Linear(4, 3), embedding="")
    distiller = kdlib.Distiller(student, kdlib.SameInput(teacher), gap=NewPoint())
    data = [(x, 0) for x in torch.randn(64, 4)]
    losses = [epoch["gap"] for epoch in kdlib.fit(distiller, data, epochs=20, lr=0.01, progress=False).epochs]
    assert losses[-1] < losses[0] / 2
