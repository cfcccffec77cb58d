"""What ``import kdlib`` gives, and what it leaves alone."""

import json
import subprocess
import sys

import pytest

import kdlib

# the short list that design.md, the docstrings and plugins name
PROMISED = [
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
    "KdlibError",
    "Loader",
    "Losses",
    "PluginError",
    "RecipeError",
    "Report",
    "SameInput",
    "Schedule",
    "Scorer",
    "SoftLabelSource",
    "SoftLabels",
    "Student",
    "TapError",
    "Tapped",
    "Taps",
    "Teacher",
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
    "soft_cross_entropy",
    "track",
    "unreadable",
]


@pytest.mark.parametrize("name", kdlib.__all__)
def test_every_public_name_is_there_and_documented(name):
    thing = getattr(kdlib, name)
    if name not in ("Batch", "Taps"):  # aliases of Mapping
        assert thing.__doc__


@pytest.mark.parametrize("name", PROMISED)
def test_what_the_documents_call_by_kdlib_is_public(name):
    assert name in kdlib.__all__


def test_no_public_name_is_listed_twice():
    assert len(kdlib.__all__) == len(set(kdlib.__all__))


IMPORT = """
import importlib.metadata, json, random, sys
import numpy, torch

torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
scanned, sockets = [], []
ours = importlib.metadata.entry_points

def entry_points(**chosen):
    if chosen.get("group", "kdlib") == "kdlib":  # pydantic looks for its own
        scanned.append(chosen)
    return ours(**chosen)

importlib.metadata.entry_points = entry_points
sys.addaudithook(lambda event, arguments: event.startswith("socket.") and sockets.append(event))

def state():
    return {
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": numpy.random.get_state()[1].tolist(),
        "python random state": repr(random.getstate()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "defaults": (str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
                     torch.are_deterministic_algorithms_enabled()),
    }

before = state()
import kdlib
after = state()
print(json.dumps({
    "modules": [name for name in sys.modules if "." not in name],
    "changed": [name for name in before if before[name] != after[name]],
    "scanned": scanned,
    "sockets": sockets,
}))
"""


@pytest.fixture(scope="module")
def imported():
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["soundfile", "sklearn", "matplotlib", "scipy", "librosa", "kdlib_asc"])
def test_import_brings_in_no_audio_svm_or_plotting_library(imported, name):
    assert name not in imported["modules"]


def test_import_changes_no_random_state_and_no_thread_setting(imported):
    assert imported["changed"] == []


def test_import_scans_no_plugins_and_opens_no_socket(imported):
    assert imported["scanned"] == []
    assert imported["sockets"] == []
