"""Writing files so that a reader finds the old one or the new one, never half of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping
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
CHECKSUM = "kdlib_sha256"
"""The note of a safetensors file that holds the sha256 of the file, taken with this in its place."""
BLANK = "0" * 64
WRITER = {"written_by": "kdlib"}
"""A second note, so that a file whose first is damaged does not pass for one of another program."""
SUMS = "SHA256SUMS"
"""The checksums of the files of a folder, as ``sha256sum -c`` reads them."""
DEEPEST = 50
"""Tables and lists inside one another in a file that is read; no file of ours comes near."""


def reason(error: OSError | ValueError) -> str:
    """Return what the system says against a path, without the path; a ValueError is of one with a NUL."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def make_folder(folder: Path) -> None:
    """Make a folder where it is missing, and see that files can be made in it.

    Raises:
        KdlibError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise KdlibError(f"{folder}: cannot be made: {reason(error)}.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise KdlibError(f"{folder}: no files can be made there; it is read-only, or somebody else's.")


def require_room(folder: Path, size: int) -> None:
    """Refuse to begin what will not fit on the disk (KdlibError)."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise KdlibError(f"{folder}: {size:,} bytes will be written, and {free:,} are free there.")


def write_atomically(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write beside the path, flush to disk, and rename over it.

    Args:
        path: of the file.
        data: all of it.
        replace: whether to replace a file that is there. Else it stays as it is, without an error.

    Raises:
        KdlibError: it cannot be written; what was there is as it was.
    """
    beside = path.with_name(f".{path.name}.{HOST}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)  # left by a killed process of this number, or a link that leads elsewhere
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            beside.replace(path)
        else:
            _link(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise KdlibError(f"{path}: {len(data):,} bytes cannot be written: {reason(error)}.") from error
    finally:
        beside.unlink(missing_ok=True)


def _link(beside: Path, path: Path) -> None:
    """Give a file a second name, if nothing has it: of several processes at once, one does."""
    try:
        os.link(beside, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links, where who comes between the two lines is replaced
        if not os.path.lexists(path):
            beside.replace(path)


def append(path: Path, data: bytes) -> None:
    """Write at the end of a file.

    Raises:
        KdlibError: it cannot be written; the file is as it was.
    """
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise KdlibError(f"{path}: {len(data):,} bytes cannot be written: {reason(error)}.") from error


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
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; one that is no JSON, or too deep, is a ValueError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    refuse_deep(value)
    return value


def refuse_deep(value: Any) -> None:
    """Refuse a value that would exhaust the stack of whatever walks through it (ValueError)."""
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _values(one)]
    if level:
        raise ValueError("nested too deeply")


def _values(table: dict[str, Any] | list[Any]) -> Collection[Any]:
    return table.values() if isinstance(table, dict) else table


def read_bounded(path: Path, largest: int) -> bytes:
    """Return the contents of a file of at most so many bytes.

    Raises:
        KdlibError: it is larger, cannot be read, or is no file.
    """
    try:
        _require_file(path)
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as error:
        raise KdlibError(f"{path}: cannot be read: {reason(error)}.") from None
    if len(data) > largest:
        raise KdlibError(f"{path}: larger than {largest:,} bytes, and not what it should be.")
    return data


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of some files of a folder beside them."""
    lines = [_sum_line(name, (folder / name).read_bytes()) for name in names]
    write_atomically(folder / SUMS, b"".join(lines))


def read_checked(folder: Path, largest: Mapping[str, int]) -> dict[str, bytes]:
    """Return the contents of the files of a folder that ``SHA256SUMS`` is of.

    Args:
        folder: of the files.
        largest: by name in their order there, how many bytes a file has at most.

    Raises:
        KdlibError: a file cannot be read, or it and its checksum do not agree.
    """
    found = {name: read_bounded(folder / name, size) for name, size in largest.items()}
    lines = {name: _sum_line(name, data) for name, data in found.items()}
    stated = read_bounded(folder / SUMS, 1 << 16)
    if stated != b"".join(lines.values()):
        changed = next((name for name, line in lines.items() if line not in stated), SUMS)
        raise KdlibError(
            f"{folder / changed}: damaged, or changed by hand: {SUMS} is not that of {' and '.join(lines)}. Copy the "
            "folder again."
        )
    return found


def _sum_line(name: str, data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors, with metadata as JSON strings and a checksum among them."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # shared ones too
    write_atomically(path, _with_checksum(safetensors.torch.save(plain), metadata or {}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a safetensors file, after a look at its checksum if it has one.

    Raises:
        KdlibError: there is no such file, or it is damaged.
    """
    notes = _checked(path)
    return safetensors.torch.load_file(path), {name: _parsed(text) for name, text in notes.items()}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write numpy arrays as safetensors, with a checksum."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, _with_checksum(safetensors.numpy.save(plain), {}))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file, after a look at its checksum if it has one.

    Raises:
        KdlibError: there is no such file, or it is damaged.
    """
    _checked(path)
    return safetensors.numpy.load_file(path)


def _with_checksum(data: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Return a safetensors file with metadata, in their order (the library's is any), and its checksum before them."""
    start = 8 + int.from_bytes(data[:8], "little")
    notes = {CHECKSUM: BLANK, **WRITER, **{name: json.dumps(value) for name, value in metadata.items()}}
    header = json.dumps({"__metadata__": notes, **json.loads(data[8:start])}).encode()
    header += b" " * (-len(header) % 8)
    blank = len(header).to_bytes(8, "little") + header + data[start:]
    return blank.replace(BLANK.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def _require_file(path: Path) -> None:
    if not os.path.isfile(path):  # a pipe would be waited for; and pathlib raises where a name is too long for any file
        raise KdlibError(f"{path}: {'not a file' if os.path.exists(path) else 'there is no such file'}.")


def _checked(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; refuse one that kdlib wrote and that is not as it was written."""
    _require_file(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            notes: dict[str, str] = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise KdlibError(f"{path}: not a readable safetensors file: {error}.") from None
    if CHECKSUM not in notes and not WRITER.items() <= notes.items():
        return notes  # of another program
    stated = notes.pop(CHECKSUM, "")
    with path.open("rb") as file:
        start = int.from_bytes(file.read(8), "little")
        file.seek(0)
        digest = hashlib.sha256(file.read(8 + start).replace(stated.encode(), BLANK.encode(), 1))
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != stated:
        raise KdlibError(f"{path}: damaged: it and its checksum do not agree. Make it anew, or copy it again.")
    return {name: text for name, text in notes.items() if name not in WRITER}


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text
