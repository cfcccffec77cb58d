"""A long training keeps its memory, with checkpoints and without."""

import os
import subprocess
import sys

import pytest

PER_STEP = 1024
"""Bytes by which a training may grow in a step, by least squares."""
TRAINING = """
import sys
from pathlib import Path
import numpy, torch, kdlib

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(2000, 64)
part = kdlib.TensorPart(x, torch.arange(2000) % 10)
def net(width):
    layers = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(),
                                 torch.nn.Linear(width, 10))
    return kdlib.Tapped(layers, logits="", embedding="2")
points = dict(soft=kdlib.SoftLabels(temperature=4.0), hard=kdlib.HardLabels())
distiller = kdlib.Distiller(net(32), kdlib.SameInput(kdlib.freeze(net(64))), **points)
seen = []
def look(event):
    if event.kind == "step" and 300 <= event.step <= 1300:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((event.step, pages * 4096))
folder, every = Path(sys.argv[1]), int(sys.argv[2])
saving = dict(checkpoint=folder / "checkpoint.safetensors", every=every) if every else {}
kdlib.fit(distiller, part, epochs=21, batch=32, valid=part, progress=False, folder=folder, callbacks=[look],
          schedule="one_cycle", **saving)
steps, bytes_ = numpy.array(seen, dtype=float).T
assert len(steps) == 1001
print(numpy.polyfit(steps, bytes_, 1)[0])
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "every", [0, 100, 10], ids=lambda every: f"a checkpoint each {every} steps" if every else "none"
)
def test_memory_stays_from_step_300_to_1300(tmp_path, table, every):
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", TRAINING, str(tmp_path), str(every)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    slope = float(done.stdout)
    saved = f"a checkpoint each {every} steps" if every else "no checkpoints"
    table(f"memory from step 300 to 1300, {saved}", f"{slope:+.0f} bytes a step (at most {PER_STEP})", 1001)
    assert slope <= PER_STEP
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
