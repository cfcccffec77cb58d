"""SIGTERM to one rank stops all of them after the same step, and they go on to the same bits."""

import os
import signal

import pytest
import torch
from torch import nn

import kdlib
from kdlib import ranks


def training(environment, say, path, stop):
    """Train with one of the ranks sent SIGTERM in a step, and say which it was and what came of it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    part = kdlib.TensorPart(torch.randn(58, 12), torch.arange(58) % 5)
    layers = nn.Sequential(nn.Linear(12, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Dropout(0.1), nn.Linear(33, 5))
    distiller = kdlib.Distiller(kdlib.Tapped(layers, logits=""), hard=kdlib.HardLabels())
    with ranks.group():
        last = ranks.world() - 1

        def send(event):
            if event.kind == "step" and event.step == stop and ranks.rank() == last:
                signal.raise_signal(signal.SIGTERM)

        found = "trained"
        try:
            kdlib.fit(
                distiller,
                part,
                valid=part,
                epochs=3,
                batch=16,
                schedule="one_cycle",
                progress=False,
                callbacks=[send],
                checkpoint=path,
                every=100,
                resume=True,
            )
        except kdlib.Stopped as stopped:
            found = f"{stopped}".partition(";")[0]
    say((found, {name: value.numpy() for name, value in distiller.state_dict().items()}))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_one_rank_is_told_and_all_stop_and_go_on_to_the_same_bits(tmp_path, table, launch, world):
    whole = launch(training, world, tmp_path / "whole.safetensors", 0)
    cut = launch(training, world, tmp_path / "cut.safetensors", 5)
    assert [found for found, _ in cut] == ["Stopped by SIGTERM after step 5, epoch 1"] * world
    resumed = launch(training, world, tmp_path / "cut.safetensors", 0)
    for rank in range(world):
        assert resumed[rank][0] == whole[rank][0] == "trained"
        different = [name for name, value in whole[0][1].items() if (resumed[rank][1][name] != value).any()]
        assert different == []
    table(f"SIGTERM to one of {world} ranks", "all stopped after the same step, resumed equal", 1)
