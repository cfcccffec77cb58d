"""Soft-label sources: what the teacher sees for a batch, and who the teacher is."""

from kdlib.sources.class_means import ClassMeans
from kdlib.sources.cross_fit import CrossFit, fold_of_groups
from kdlib.sources.different_view import DifferentView
from kdlib.sources.ema import Ema
from kdlib.sources.ensemble import Ensemble
from kdlib.sources.label_smoothing import LabelSmoothing
from kdlib.sources.same_input import SameInput
from kdlib.sources.self_distillation import SelfDistillation
from kdlib.sources.stored import Stored

__all__ = [
    "ClassMeans",
    "CrossFit",
    "DifferentView",
    "Ema",
    "Ensemble",
    "LabelSmoothing",
    "SameInput",
    "SelfDistillation",
    "Stored",
    "fold_of_groups",
]
