"""What ``import kdlib`` gives, and what it leaves alone."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kdlib
from kdlib import hooks, interfaces, testing

PROMISED = Path(__file__).parents[2] / "docs" / "promised.txt"


@pytest.mark.parametrize("name", kdlib.__all__)
def test_every_public_name_is_there_and_documented(name):
    thing = getattr(kdlib, name)
    if name not in ("Batch", "Taps"):  # aliases of Mapping
        assert thing.__doc__


def signature(name, function):
    """Return a function as its author calls or writes it: no self, no quotes around annotations."""
    taken = inspect.signature(function)
    kept = [one for one in taken.parameters.values() if one.name not in ("self", "cls")]
    return f"{name}{taken.replace(parameters=kept)}".replace("'", "")


def methods(interface):
    """Yield an interface's attributes and methods, one line each."""
    for name, kind in getattr(interface, "__annotations__", {}).items():
        yield f"{interface.__name__}.{name}: {kind}"
    for name, member in vars(interface).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not inspect.isfunction(function) or name in ("__init__", "__subclasshook__") or name.startswith("_proto"):
            continue
        if isinstance(member, property):
            yield f"{interface.__name__}.{name}: {inspect.signature(function).return_annotation}"
        else:
            yield signature(f"{interface.__name__}.{name}", function)


def promised():
    """Return the public names, hooks, interfaces and the kit for plugin authors as the text that docs/ shows."""
    protocols = [getattr(interfaces, name) for name in interfaces.__all__ if name not in ("Batch", "Taps")]
    kit = [name for name, thing in vars(testing).items() if getattr(thing, "__module__", "") == testing.__name__]
    parts = {
        "names of kdlib": sorted(kdlib.__all__),
        "hooks": [signature(name, getattr(hooks, name)) for name in hooks.HOOKS.values()],
        "interfaces": [line for protocol in protocols for line in methods(protocol)],
        "kdlib.testing": [signature(name, getattr(testing, name)) for name in kit if not name.startswith("_")],
    }
    return "\n".join("\n".join([f"# {title}", *lines, ""]) for title, lines in parts.items())


def test_names_hooks_and_interfaces_are_those_that_the_page_on_stability_promises():
    """A line that is gone or changed breaks plugins. A new one is a promise: add its line."""
    assert promised() == PROMISED.read_text(encoding="utf-8")


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
