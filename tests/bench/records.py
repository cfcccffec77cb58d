"""Measurements as lines of a file, each there as soon as it is made, and the machine they were made on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kdlib.doctor import describe

ALLOCATORS = {
    "glibc": {},
    "thresholds": {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)},
    "tcmalloc": {"LD_PRELOAD": "libtcmalloc_minimal.so.4"},
}
"""The thresholds are those from which on glibc gives a block back at once."""


def found(path: Path) -> list[dict[str, Any]]:
    """Return the records that the file holds; a line that was cut off is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def having(path: Path, **keys: Any) -> list[dict[str, Any]]:
    """Return the records with these values."""
    return [record for record in found(path) if all(record.get(key) == value for key, value in keys.items())]


def note(path: Path, **record: Any) -> None:
    """Add a record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def machine() -> str:
    """Return the machine in words."""
    has = describe()
    units = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 with bf16")) if flag in has["units"]]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    parts = [has["processor"], f"{os.cpu_count()} cores", *units, f"{memory:.0f} GiB"]
    return ", ".join([*parts, f"torch {has['torch']}", f"Python {has['python']}"])


def status(name: str) -> int:
    """Return what the system says of this process, in bytes; unlike getrusage it does not tell of the parent."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))
