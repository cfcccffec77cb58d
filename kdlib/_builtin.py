"""What kdlib itself registers, through the same hooks as everybody."""

from __future__ import annotations

from kdlib import digits, points, sources
from kdlib.hooks import Builders, hookimpl


@hookimpl
def kdlib_models() -> Builders:
    """Return the models."""
    return {"digits_mlp": digits.DigitsMLP}


@hookimpl
def kdlib_datasets() -> Builders:
    """Return the data sets."""
    return {"digits": digits.digits}


@hookimpl
def kdlib_sources() -> Builders:
    """Return the sources."""
    return {
        "class_means": sources.ClassMeans,
        "different_view": sources.DifferentView,
        "ema": sources.Ema,
        "ensemble": sources.Ensemble,
        "label_smoothing": sources.LabelSmoothing,
        "same_input": sources.SameInput,
        "self_distillation": sources.SelfDistillation,
        "stored": sources.Stored,
    }


@hookimpl
def kdlib_points() -> Builders:
    """Return the points."""
    return {
        "attention_transfer": points.AttentionTransfer,
        "correlation": points.Correlation,
        "crd": points.Crd,
        "dist": points.Dist,
        "dkd": points.Dkd,
        "fitnet": points.FitNet,
        "fsp": points.Fsp,
        "hard_labels": points.HardLabels,
        "hidden_cosine": points.HiddenCosine,
        "js": points.JensenShannon,
        "logit_mse": points.LogitMse,
        "logit_standardised": points.LogitStandardised,
        "nst": points.Nst,
        "pkt": points.Pkt,
        "ranking": points.Ranking,
        "rkd": points.Rkd,
        "sigmoid_labels": points.SigmoidLabels,
        "similarity_preserving": points.SimilarityPreserving,
        "soft_labels": points.SoftLabels,
        "vid": points.Vid,
    }
