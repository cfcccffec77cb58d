"""What a machine has for training, and what to do where something is left lying: one line each to copy."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdlib.errors import KdlibError

UNITS = {"amx_bf16": "AMX with bf16", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Flags of a processor, the strongest first, in words."""
ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")
THRESHOLD = 1 << 30
"""Bytes from which on glibc should map and unmap a block of its own: more than a tensor of a usual step."""
PEAK = 7_300_000_000
"""Bytes that a training of the raw network holds at most with 40 clips of 10 s in fp32; it was measured."""
CACHE = 8640 * 2 * (249 * 256 + 479_999) * 4
"""Bytes of disk that the features of DCASE 2018 take for both systems, spectrograms and waveforms in float32."""
SOUND_THRESHOLDS = f"MALLOC_MMAP_THRESHOLD_={THRESHOLD} MALLOC_TRIM_THRESHOLD_={THRESHOLD}"
SET = "kdlib run RECIPE --set"


class Finding(NamedTuple):
    """One thing that a machine has, and what to do about it."""

    about: str
    found: str
    why: str = ""
    """What could be better, and by how much; empty where nothing is to do."""
    line: str = ""
    """What to type, or to change in a recipe."""


def describe(folder: Path | str = ".", *, root: Path | str = "/") -> dict[str, Any]:
    """Describe this machine and process as plain data. What the system does not tell is None.

    Args:
        folder: where a cache of features would lie.
        root: of the file system that tells of processor, memory and limits.

    Raises:
        KdlibError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise KdlibError(f"{folder}: there is no such folder.")
    files = Path(root)
    processor = _read(files / "proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)", processor, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)", processor, re.MULTILINE)
    memory = dict(re.findall(r"^(\w+): +(\d+) kB", _read(files / "proc/meminfo"), re.MULTILINE))
    loaded = _read(files / "proc/self/maps")
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": model.group(1).strip() if model else platform.processor() or platform.machine(),
        "units": [unit for unit in UNITS if flags and unit in flags.group(1).split()],
        "cores": len(affinity),
        "quota": _quota(files),
        "threads": torch.get_num_threads(),
        "allocator": next((name for name in ALLOCATORS if name in loaded), platform.libc_ver()[0] or None),
        "mmap_threshold": _threshold("mmap_threshold", "MALLOC_MMAP_THRESHOLD_"),
        "trim_threshold": _threshold("trim_threshold", "MALLOC_TRIM_THRESHOLD_"),
        "memory": _bytes(memory.get("MemTotal")),
        "available": _bytes(memory.get("MemAvailable")),
        "limit": _limit(files),
        "disk": shutil.disk_usage(folder).free,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "driver": (files / "proc/driver/nvidia/version").exists(),
        "compiler": os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None),
    }


def advise(machine: Mapping[str, Any]) -> list[Finding]:
    """Say of a machine, as :func:`describe` describes it, what it has and what to do.

    Example:
        >>> machine = describe() | {"cores": 2, "quota": None, "threads": 16}
        >>> next(one.line for one in advise(machine) if one.about == "threads")
        'export OMP_NUM_THREADS=2'
    """
    parts = (_processor, _threads, _allocator, _memory, _disk, _gpu, _compiler)
    versions = Finding("versions", f"torch {machine['torch']}, Python {machine['python']}")
    return [versions, *(part(machine) for part in parts)]


def _processor(machine: Mapping[str, Any]) -> Finding:
    units = machine["units"]
    found = f"{machine['processor']}, {', '.join(UNITS[unit] for unit in units[:1]) or 'no vector unit known'}"
    if machine["gpus"]:  # trainings run there
        return Finding("processor", found)
    if units and units[0].endswith("bf16"):
        why = "a training step in bf16 takes 0.3 to 0.5 of the time in fp32 (AVX-512 with bf16)"
        return Finding("processor", found, why, f"{SET} train.precision=bf16 --set train.layout=channels_last")
    lacks = "it has no unit for bf16" if units else "whether it has a unit for bf16 is not known"
    why = f"{lacks}; the layout alone leaves 0.7 of a step in fp32 (spectrogram network)"
    return Finding("processor", found, why, f"{SET} train.precision=fp32 --set train.layout=channels_last")


def _threads(machine: Mapping[str, Any]) -> Finding:
    quota, threads = machine["quota"], machine["threads"]
    usable = machine["cores"] if quota is None else max(1, min(machine["cores"], int(quota)))
    limited = "" if quota is None else f", of which a limit leaves the time of {quota:g}"
    found = f"{threads} of torch on {machine['cores']} cores{limited}"
    line = f"export OMP_NUM_THREADS={usable}"
    if threads > usable:
        return Finding(
            "threads",
            found,
            "threads that share a core wait for each other at the end of every layer: with twice as many as cores a "
            "training step took 1.5 to 1.75 times as long",
            line,
        )
    if threads < usable:
        why = "right for as many processes side by side; one process alone leaves cores idle"
        return Finding("threads", found, why, line)
    return Finding("threads", found)


def _allocator(machine: Mapping[str, Any]) -> Finding:
    name, thresholds = machine["allocator"], [machine["mmap_threshold"], machine["trim_threshold"]]
    if name != "glibc" or machine["gpus"]:
        return Finding("allocator", name or "not known")
    if all(value is not None and value >= THRESHOLD for value in thresholds):
        return Finding("allocator", "glibc, which keeps large blocks")
    why = (
        "it takes large tensors from the system and gives them back in each step; set before the program starts, this "
        "leaves 0.3 to 0.8 of a teacher's time, 0.6 to 0.8 of a training step of the raw network, and of the "
        "spectrogram network's 0.6 in fp32 and 1.0 in bf16"
    )
    return Finding("allocator", "glibc as it comes", why, f"export {SOUND_THRESHOLDS}")


def _memory(machine: Mapping[str, Any]) -> Finding:
    total, available, limit = machine["memory"], machine["available"], machine["limit"]
    if total is None:
        return Finding("memory", "not known")
    usable = min(one for one in (available, limit, total) if one is not None)
    free = "" if available is None else f", {available / 1e9:.1f} GB of it free"
    limited = f", and a limit of {limit / 1e9:.1f} GB" if limit is not None and limit < total else ""
    found = f"{total / 1e9:.1f} GB{free}{limited}"
    if usable >= PEAK:
        return Finding("memory", found)
    why = f"40 clips of 10 s in fp32 take the raw network {PEAK / 1e9:.1f} GB; 4.3 GB where the backward computes again"
    return Finding("memory", found, why, f"{SET} systems.raw.model.checkpoint_activations=true")


def _disk(machine: Mapping[str, Any]) -> Finding:
    found = f"{machine['disk'] / 1e9:.1f} GB free"
    if machine["disk"] >= CACHE:
        return Finding("disk", found)
    why = f"a cache of DCASE 2018 takes {CACHE / 1e9:.0f} GB, nearly all of it waveforms; rounded half of it"
    return Finding("disk", found, why, f"{SET} cache.folder=features --set cache.dtype=float16")


def _gpu(machine: Mapping[str, Any]) -> Finding:
    if machine["gpus"]:
        return Finding("GPU", f'{", ".join(machine["gpus"])}; trainings take the first (device = "auto")')
    if machine["driver"]:
        why = f"there is a driver, and torch {machine['torch']} cannot use it"
        return Finding("GPU", "none that torch sees", why, "pip install --force-reinstall torch")
    return Finding("GPU", "none")


def _compiler(machine: Mapping[str, Any]) -> Finding:
    if machine["compiler"]:
        return Finding("C++ compiler", machine["compiler"])
    why = "teacher.inference.compile wants one; a compiled spectrogram network labels in 0.6 to 0.98 of the time"
    return Finding("C++ compiler", "none", why, "apt-get install g++")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _bytes(kibibytes: str | None) -> int | None:
    return None if kibibytes is None else 1024 * int(kibibytes)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders that may tell a limit of this process: its group's and those above, in both versions."""
    top = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        group = path.strip("/")  # a container may not see it, but its own group as the top
        for mounted in (top / names, top / controller) if names else (top,):
            yield from (mounted / above for above in (Path(group), *Path(group).parents))


def _quota(root: Path) -> float | None:
    """Return of how many cores the narrowest limit leaves the time."""
    quotas = []
    for group in _groups(root, "cpu"):
        both = _read(group / "cpu.max").split() or [
            _read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(both) == 2 and all(one.isdigit() for one in both) and int(both[1]):
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def _limit(root: Path) -> int | None:
    """Return the bytes that the narrowest limit leaves."""
    files = ("memory.max", "memory.limit_in_bytes")
    texts = [_read(group / file).strip() for group in _groups(root, "memory") for file in files]
    limits = [int(text) for text in texts if text.isdigit()]
    return min((one for one in limits if one < 1 << 60), default=None)  # the first version writes a huge one for none


def _threshold(tunable: str, variable: str) -> int | None:
    """Return what the environment sets of glibc's allocator."""
    tuned = re.search(rf"glibc\.malloc\.{tunable}=(\w+)", os.environ.get("GLIBC_TUNABLES", ""))
    text = tuned.group(1) if tuned else os.environ.get(variable, "")
    try:
        return int(text, 0)
    except ValueError:
        return None
