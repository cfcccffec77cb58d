"""Accelerate."""

import copy

import pytest
import torch

accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is not installed: pip install 'kdlib-asc[integrations]'"
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_trains_as_fit_does(case, example):
    example("accelerate_loop").train(case.distiller, case.loader, case.epochs)
    assert case.same_as_fit()


def test_with_accumulation_the_clock_moves_with_the_steps_of_the_optimizer(case):
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    optimizer = case.distiller.attach(torch.optim.Adam(case.distiller.parameters()))
    model, optimizer = accelerator.prepare(case.distiller, optimizer)
    for batch in [*case.loader, *case.loader]:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).total)
            optimizer.step()
            optimizer.zero_grad()
    assert int(case.distiller.step) == len(case.loader)


def test_what_accelerate_saves_gives_back_student_projector_and_clock(case, example, tmp_path):
    untrained = copy.deepcopy(case.distiller)
    accelerator = accelerate.Accelerator()
    example("accelerate_loop").train(accelerator.prepare(case.distiller), case.loader, case.epochs)
    accelerator.save_state(tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    again = accelerate.Accelerator()
    case.distiller = again.prepare(untrained)
    again.load_state(tmp_path)
    assert case.same_as_fit()
