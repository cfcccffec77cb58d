"""One distiller for every loop, with all that a loop could get wrong, and the weights that ``kdlib.fit`` gives it."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import kdlib
from kdlib.digits import digits
from kdlib.points import FitNet

EXAMPLES = Path(__file__).parents[2] / "docs" / "integrations"


class Case:
    """A distiller that was not trained yet, its data, and the state after ``kdlib.fit``."""

    epochs = 3
    batch = 32

    def __init__(self):
        def network(width):
            return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))

        with torch.random.fork_rng():
            torch.manual_seed(0)
            teacher = kdlib.freeze(kdlib.Tapped(network(32), logits="", hidden="2"))
            self.distiller = kdlib.Distiller(
                kdlib.Tapped(network(8), logits="", hidden="2"),
                kdlib.SameInput(teacher),
                soft=(kdlib.Schedule(kind="linear", start=1.0, end=0.1, steps=6), kdlib.SoftLabels.hinton(4.0)),
                hint=(kdlib.Schedule(kind="linear", start=0.0, end=0.5, epochs=2), FitNet(tap="hidden")),
                hard=(0.1, kdlib.HardLabels()),
            )
            self.loader = kdlib.Loader(digits(train=100).train, batch=self.batch)
            self.distiller.prepare(next(self.loader.epoch(kdlib.CLEAN)))
        self.steps = self.epochs * len(self.loader)
        fitted = copy.deepcopy(self.distiller)
        kdlib.fit(fitted, self.loader.dataset, epochs=self.epochs, batch=self.batch, device="cpu", progress=False)
        self.expected = fitted.state_dict()
        self.loader = kdlib.Loader(self.loader.dataset, batch=self.batch)

    def same_as_fit(self):
        """Say whether student, projector and clock are, bit for bit, what ``fit`` makes of them."""
        found = self.distiller.state_dict()
        assert list(found) == list(self.expected)
        different = [name for name, value in self.expected.items() if not torch.equal(found[name], value)]
        assert not different, different
        assert int(self.distiller.step) == self.steps
        return True


@pytest.fixture
def case():
    return Case()


@pytest.fixture
def example():
    """Load an example of docs/integrations by its name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
