"""The door: what this package registers with kdlib."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdlib import hookimpl
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN
from kdlib_asc.datasets import dcase, folder, synthetic_scenes
from kdlib_asc.features import PreEmphasis, Spectrogram
from kdlib_asc.points import HiddenMse
from kdlib_asc.scoring import Svm
from kdlib_asc.sources import MultiSegment


@hookimpl
def kdlib_models() -> dict[str, Callable[..., Any]]:
    """Return the two networks."""
    return {"wave_cnn": WaveCNN, "spectrogram_cnn_gru": SpectrogramCNNGRU}


@hookimpl
def kdlib_datasets() -> dict[str, Callable[..., Any]]:
    """Return the readers, and the scenes that are made."""
    return {"dcase": dcase, "folder": folder, "synthetic_scenes": synthetic_scenes}


@hookimpl
def kdlib_features() -> dict[str, Callable[..., Any]]:
    """Return the features."""
    return {"pre_emphasis": PreEmphasis, "spectrogram": Spectrogram}


@hookimpl
def kdlib_sources() -> dict[str, Callable[..., Any]]:
    """Return the source of soft labels."""
    return {"multi_segment": MultiSegment}


@hookimpl
def kdlib_points() -> dict[str, Callable[..., Any]]:
    """Return the point of distillation."""
    return {"hidden_mse": HiddenMse}


@hookimpl
def kdlib_scorers() -> dict[str, Callable[..., Any]]:
    """Return the scorer."""
    return {"svm": Svm}
