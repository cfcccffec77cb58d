"""Knowledge distillation as plugins for PyTorch: taps, sources, points, and the distiller that joins them."""

from kdlib.batch import as_batch, same_shape
from kdlib.data import CLEAN, Loader, Parts, TensorPart
from kdlib.ddp import ddp
from kdlib.distiller import Distiller, Losses
from kdlib.errors import BatchError, DataError, KdlibError, PluginError, RecipeError, TapError, TrainingError
from kdlib.fit import fit
from kdlib.hooks import hookimpl
from kdlib.interfaces import (
    Batch,
    DataPart,
    DataParts,
    DistillPoint,
    Features,
    Scorer,
    SoftLabelSource,
    Student,
    Taps,
    Teacher,
)
from kdlib.keyed import keyed
from kdlib.log import Event
from kdlib.points import HardLabels, SoftLabels, hard_cross_entropy, of, soft_cross_entropy
from kdlib.progress import track
from kdlib.reading import unreadable
from kdlib.registry import register
from kdlib.report import Report
from kdlib.saved import Run, load_run
from kdlib.schedules import Schedule
from kdlib.signals import Stopped
from kdlib.sources import SameInput
from kdlib.taps import Frozen, Tapped, freeze
from kdlib.training import History

__all__ = [
    "CLEAN",
    "Batch",
    "BatchError",
    "DataError",
    "DataPart",
    "DataParts",
    "DistillPoint",
    "Distiller",
    "Event",
    "Features",
    "Frozen",
    "HardLabels",
    "History",
    "KdlibError",
    "Loader",
    "Losses",
    "Parts",
    "PluginError",
    "RecipeError",
    "Report",
    "Run",
    "SameInput",
    "Schedule",
    "Scorer",
    "SoftLabelSource",
    "SoftLabels",
    "Stopped",
    "Student",
    "TapError",
    "Tapped",
    "Taps",
    "Teacher",
    "TensorPart",
    "TrainingError",
    "as_batch",
    "ddp",
    "fit",
    "freeze",
    "hard_cross_entropy",
    "hookimpl",
    "keyed",
    "load_run",
    "of",
    "register",
    "same_shape",
    "soft_cross_entropy",
    "track",
    "unreadable",
]
