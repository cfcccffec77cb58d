"""What a dry run says of a teacher whose frames are kept."""

import pytest
import torch

from kdlib.building import facts_of
from kdlib.estimate import estimate
from kdlib.recipe import read
from kdlib.run import make_data
from kdlib_asc.backbones import SpectrogramCNNGRU
from kdlib_asc.features import Spectrogram

RECIPE = {
    "data": {"kind": "synthetic_scenes", "places": 5, "segments": 2, "rate": 16000, "seconds": 3.0},
    "train": {"epochs": 1, "batch": 8, "threads": 1},
    "features": {"kind": "spectrogram", "coefficients": 32},
    "model": {"kind": "spectrogram_cnn_gru", "width": 0.1},
    "source": {"kind": "multi_segment", "segments": 2, "view": "clean"},
    "points": {"hidden": {"kind": "hidden_mse"}},
}


@pytest.fixture(scope="module")
def kept():
    joins = ("input", "frames", "exact")
    recipes = [read({**RECIPE, "source": {**RECIPE["source"], "join": join}}) for join in joins]
    return {join: estimate(recipe).kept for join, recipe in zip(joins, recipes, strict=True)}


def test_frames_of_every_clip_are_counted_and_their_edges_for_exact(kept):
    (parts,) = make_data(read(RECIPE)).values()
    clips = len(parts.train) + len(parts.valid or ())
    network = SpectrogramCNNGRU(classes=facts_of(parts)["classes"], width=0.1).eval()
    x = Spectrogram(rate=16000, coefficients=32, standardise=False)(parts.train[-1, 0]["x"])[None]
    with torch.no_grad():
        frames, of_cut = network.encode(x), network.encode(network.junction.cut(x, -2))
    assert kept["frames"] - kept["input"] == clips * frames.nbytes
    edges = (network.junction.before + network.junction.after) * x[:, :, 0].nbytes
    assert kept["exact"] - kept["input"] == clips * (of_cut.nbytes + edges)
