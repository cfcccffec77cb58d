"""Writing files so that a reader finds the old one or the new one, never half of it."""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
from torch import Tensor

from kdlib.errors import KdlibError

HOST = f"{zlib.crc32(platform.node().encode()):08x}"
"""This machine in the names of temporary files: processes of two machines may have one number."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the path, flush to disk, and rename over it.

    Raises:
        KdlibError: it cannot be written; what was there is as it was.
    """
    beside = path.with_name(f".{path.name}.{HOST}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise KdlibError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def remove_left_over(folder: Path) -> None:
    """Remove what processes of this machine that were killed had begun to write into a folder."""
    for beside in folder.glob(f".*.{HOST}.*"):
        number = beside.name.rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            with suppress(OSError):
                beside.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, as somebody else's
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors, with metadata as JSON strings."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # shared ones too
    notes = {name: json.dumps(value) for name, value in (metadata or {}).items()}
    write_atomically(path, lambda beside: beside.write_bytes(safetensors.torch.save(plain, notes or None)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        KdlibError: there is no such file, or it is damaged.
    """
    try:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
    except FileNotFoundError:
        raise KdlibError(f"{path}: there is no such file.") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise KdlibError(f"{path}: not a readable safetensors file: {error}.") from None
    return tensors, {name: _parsed(text) for name, text in notes.items()}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write numpy arrays as safetensors."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, lambda beside: beside.write_bytes(safetensors.numpy.save(plain)))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file.

    Raises:
        KdlibError: there is no such file, or it is damaged.
    """
    try:
        return safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise KdlibError(f"{path}: there is no such file.") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise KdlibError(f"{path}: not a readable safetensors file: {error}.") from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
