"""Rows of named arrays on disk, in shards that any number of processes write and read without locks."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import safetensors.numpy
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from kdlib.errors import DataError
from kdlib.files import make_folder, parse_json, remove_left_over, require_room, write_atomically
from kdlib.settings import Strict

MANIFEST = "manifest.json"
LARGEST = 1 << 20
"""Bytes of a manifest, and of the header of a shard."""
SHARD = 32 << 20
"""Bytes of a shard where its maker does not say how many rows."""
SEAL = re.compile(r"(\d{5}|[1-9]\d{5,})\.safetensors\.sha256")
"""The name of what is written last of a shard."""
SHOWN = 10
"""Differences between two manifests that a message spells out."""
OWNER = "manifest"
"""The note of a shard that holds the sha256 of the manifest that it was written under."""

Whole = Annotated[int, Field(ge=0)]
Dtype = Literal[
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"
]


class Form(Strict):
    """What an array holds of one row."""

    dtype: Dtype
    shape: list[Whole]


class Manifest(Strict):
    """What a store is: what its maker says that it was made of, and how it lies on disk."""

    store: Literal[2] = 2
    made_of: dict[str, Any]
    made_with: dict[str, Any] = {}  # noqa: RUF012
    rows: Whole
    shard_rows: Annotated[int, Field(ge=1)]
    arrays: dict[str, Form]

    def sha256(self) -> str:
        """Return the checksum that is written into it."""
        return hashlib.sha256(_json(self.model_dump()).encode()).hexdigest()

    def text(self) -> str:
        """Return the manifest as it is written, with its own checksum: there is one text for one manifest."""
        return _json({**self.model_dump(), "sha256": self.sha256()})


class Store:
    """An opened store. Rows are read from a memory map; a shard is checked once, when a row of it is first wanted.

    In the folder are ``manifest.json``, which holds its own checksum, and the shards ``00000.safetensors``, ...: row
    ``r`` is in shard ``r // shard_rows``. A shard counts once ``00000.safetensors.sha256`` (as ``sha256sum -c`` reads
    it) stands beside it, which is written last. A shard names the sha256 of its manifest: one that was left by another
    store is not taken. Since the shard follows from the row, and its bytes from its rows, all who write a shard write
    the same.

    A copy that was pickled, for a loader's worker, opens the shards anew.

    Args:
        folder: made by ``make_store``.

    Attributes:
        manifest: what the store is.

    Raises:
        DataError: there is no store, or its manifest is damaged. On reading: a shard is missing, damaged, or of another
            manifest.
        IndexError: on reading a row that there is not.

    Example:
        >>> import tempfile
        >>> row = {"logits": np.zeros(3, np.float32)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = make_store(Path(folder), {"teacher": "a"}, rows=5, row=lambda: row, shard_rows=2)
        ...     for shard in range(store.shards):
        ...         rows = store.span(shard)
        ...         store.write(shard, {"logits": np.full((len(rows), 3), shard, np.float32)})
        ...     store[4]["logits"].tolist(), store.take([0, 3])["logits"].tolist()
        ([2.0, 2.0, 2.0], [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder / MANIFEST)
        self._sha256 = self.manifest.sha256()
        self._opened: dict[int, list[memoryview]] = {}
        self._forms: list[tuple[str, np.dtype, tuple[int, ...], int]] = []
        for name, form in self.manifest.arrays.items():
            dtype = np.dtype(form.dtype)
            self._forms.append((name, dtype, tuple(form.shape), dtype.itemsize * math.prod(form.shape)))

    def __len__(self) -> int:
        return self.manifest.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    @property
    def row_bytes(self) -> int:
        """How many bytes a row takes."""
        return sum(length for *_, length in self._forms)

    @property
    def shards(self) -> int:
        """How many shards there are when all are written."""
        return -(-self.manifest.rows // self.manifest.shard_rows)

    def span(self, shard: int) -> range:
        """Return the rows of a shard."""
        first = shard * self.manifest.shard_rows
        return range(first, min(first + self.manifest.shard_rows, self.manifest.rows))

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"{shard:05}.safetensors"

    def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a shard, and its checksum when it is whole.

        Args:
            shard: its number.
            arrays: by name, each (rows of the shard, *shape of a row).

        Raises:
            ValueError: the arrays are not those of the manifest.
            KdlibError: it cannot be written; other shards are as they were.
        """
        rows = len(self.span(shard))
        wanted = {name: (form.dtype, (rows, *form.shape)) for name, form in self.manifest.arrays.items()}
        given = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        if given != wanted:
            raise ValueError(f"{self.path(shard)} takes {wanted}, not {given}")
        plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        data = safetensors.numpy.save(plain, metadata={OWNER: self._sha256})
        path = self.path(shard)
        self._opened.pop(shard, None)
        write_atomically(path, data)
        write_atomically(_beside(path), _seal(path, data))

    def written(self, shard: int) -> bool:
        """Return whether a shard was written to its end, perhaps under another manifest: it was not looked at."""
        return _beside(self.path(shard)).exists()

    def finished(self) -> list[int]:
        """Return the numbers of the written shards, by one look at the folder: a manifest may tell of any number."""
        found = (SEAL.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match and int(match[1]) < self.shards)

    def check(self, shard: int) -> None:
        """Refuse a shard that is missing, damaged or of another manifest (DataError), unless it is open already."""
        self._open(shard)

    def intact(self, shard: int) -> bool:
        """Return whether a shard is written and passes :meth:`check`; say so (a warning) where it does not."""
        if not self.written(shard):
            return False
        try:
            self._open(shard)
        except DataError as error:
            warnings.warn(f"{error} It is made anew.", stacklevel=2)
            return False
        return True

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """Return the arrays of one row; they are the caller's."""
        return {name: array.reshape(array.shape[1:]) for name, array in self.take([row]).items()}

    def take(self, rows: Sequence[int] | np.ndarray | Tensor) -> dict[str, np.ndarray]:
        """Return the arrays of some rows, (N, *shape) each, in their order and as often as they are asked for."""
        asked = np.asarray(rows)
        numbers = asked.tolist()
        if asked.ndim != 1 or (numbers and asked.dtype.kind not in "iu"):
            raise ValueError(f"rows are a list of whole numbers, not {asked.dtype} of shape {asked.shape}")
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self):
            raise IndexError(
                f"{self.folder} has {len(self)} rows, counted from 0; {min(numbers)} to {max(numbers)} asked"
            )
        size = self.manifest.shard_rows
        for shard in {row // size for row in numbers} - self._opened.keys():
            self._open(shard)
        places = [(self._opened[row // size], row % size) for row in numbers]
        taken = {}
        for number, (name, dtype, shape, length) in enumerate(self._forms):
            # Slices of bytes, joined: half the time of numpy's rows, concatenated.
            rows_of_it = [bytes_of[number][place * length : (place + 1) * length] for bytes_of, place in places]
            taken[name] = np.ndarray((len(places), *shape), dtype, buffer=bytearray().join(rows_of_it))
        return taken

    def whole(self, name: str) -> np.ndarray:
        """Return all rows of one array in memory, (rows, *shape): for a store that fits, the quickest to take from."""
        number = list(self.manifest.arrays).index(name)
        _, dtype, shape, _ = self._forms[number]
        if len(self.finished()) < self.shards:
            raise DataError(f"{self.folder}: the store is not finished.")
        for shard in range(self.shards):  # before room is made for rows that only a forged manifest tells of
            self._open(shard)
        filled = np.empty((len(self), *shape), dtype)
        for shard in range(self.shards):
            rows = self.span(shard)
            one = np.ndarray((len(rows), *shape), dtype, buffer=self._open(shard)[number])
            filled[rows.start : rows.stop] = one
        return filled

    def _open(self, shard: int) -> list[memoryview]:
        """Return the bytes of a shard's arrays in the order of the manifest, checked when it is first opened."""
        if shard not in self._opened:
            self._opened[shard] = self._checked(shard)
        return self._opened[shard]

    def _checked(self, shard: int) -> list[memoryview]:
        path = self.path(shard)
        for file in (path, _beside(path)):
            if not file.is_file() and file.exists():  # a pipe would be waited for
                raise DataError(f"{file}: not a file.")
        try:
            with _beside(path).open("rb") as beside:
                seal = beside.read(LARGEST)
            size = path.stat().st_size
            if size > 8 + LARGEST + self.row_bytes * len(self.span(shard)):  # not worth a checksum
                raise DataError(f"{path}: damaged: {size:,} bytes, more than {MANIFEST} says. Delete it, make it anew.")
            # Unlike mmap's, torch's map holds no file descriptor: there may be more shards than a process may have.
            raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: there is no such file; the store is not finished.") from None
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        if seal != _seal(path, raw):
            raise DataError(
                f"{path}: damaged: it and {_beside(path).name} do not agree. Delete both and make them anew."
            )
        data = raw.data.toreadonly()
        try:
            start = 8 + int.from_bytes(data[:8], "little")
            header = parse_json(bytes(data[8 : min(start, LARGEST)]))
            owner = header["__metadata__"][OWNER]
            if owner != self._sha256:
                raise DataError(
                    f"{path}: belongs to another store. Its {MANIFEST} has the sha256 {_short(owner)}, the one here "
                    f'"{self._sha256}". Build this store again, or put that {MANIFEST} back.'
                )
            arrays = []
            for name, _, _, length in self._forms:
                first, last = header[name]["data_offsets"]
                array = data[start + first : start + last]
                if first < 0 or not last - first == len(array) == length * len(self.span(shard)):
                    raise ValueError(f"'{name}' lies at {first} to {last}")
                arrays.append(array)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: holds something else than {MANIFEST} says: {error}") from None
        return arrays


def make_store(
    folder: Path,
    made_of: Mapping[str, Any],
    *,
    rows: int,
    row: Callable[[], Mapping[str, np.ndarray]],
    shard_rows: int | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> Store:
    """Make a store, or open the one that was made of the same, to write what it lacks.

    Args:
        folder: is made where it is missing.
        made_of: all that its rows depend on, as JSON has it.
        rows: how many there will be.
        row: returns one row, for names, types and shapes; it is called where there is no store yet.
        shard_rows: rows a shard, at least 1: what is lost when a writer is killed, and held in memory twice while it is
            written. Default: what fits into 32 MiB, or what the store that is there has.
        made_with: what the last bits of its rows depend on as well, such as versions. It is kept, and not compared:
            who writes a shard calls :func:`require_same` before.

    Raises:
        DataError: the folder holds a store of something else, and the text says what differs. Or its manifest is
            damaged.
        KdlibError: it cannot be written, or there is too little room on the disk for what it lacks.
    """
    plain: dict[str, Any] = json.loads(_json({"made_of": dict(made_of), "rows": rows}))
    if not os.path.exists(folder / MANIFEST):
        make_folder(folder)
        arrays = dict(sorted(row().items()))
        for name, array in arrays.items():
            if array.dtype.name not in get_args(Dtype):
                raise DataError(f"{folder}: '{name}' is {array.dtype}; a store keeps {', '.join(get_args(Dtype))}.")
        size = shard_rows or max(1, SHARD // max(1, sum(array.nbytes for array in arrays.values())))
        forms = {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in arrays.items()}
        whole = {**plain, "made_with": dict(made_with or {}), "shard_rows": size, "arrays": forms}
        text = Manifest.model_validate(whole).text().encode()
        if len(text) > LARGEST:
            raise DataError(f"{folder / MANIFEST}: a manifest has at most {LARGEST} bytes, this one {len(text)}.")
        write_atomically(folder / MANIFEST, text, replace=False)  # somebody else's, made meanwhile, is compared below
    remove_left_over(folder)
    store = Store(folder)
    require_same(store, **plain, **({} if shard_rows is None else {"shard_rows": shard_rows}))
    missing = rows - sum(len(store.span(shard)) for shard in store.finished())
    if missing:  # what can be known before hours of computing is said before them
        make_folder(folder)
        require_room(folder, missing * store.row_bytes)
    return store


def require_same(store: Store, **asked: Any) -> None:
    """Refuse a store whose manifest says something else than is asked of it, by key (DataError)."""
    found = differences(store.manifest.model_dump(include=set(asked)), asked)
    if found:
        raise DataError(
            f"{store.folder}: was made of something else. Name another folder, or delete this one.\n{listed(found)}"
        )


def rounded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 rows as float16, and by how much each then differs at most: no finite number from 65520 on."""
    with np.errstate(over="ignore", invalid="ignore"):
        kept = rows.astype(np.float16)
        error: np.ndarray = np.abs(rows - kept.astype(np.float32)).reshape(len(rows), -1).max(1, initial=0)
    return kept, error


def _read_manifest(path: Path) -> Manifest:
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise DataError(f"{path}: not a file.")
        with path.open("rb") as file:
            data = file.read(LARGEST)  # a longer one is cut, and refused
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Is this the folder of a store?") from None
    try:
        plain = parse_json(data)
        del plain["sha256"]
        manifest = Manifest.model_validate(plain)
        if manifest.text().encode() == data:
            return manifest
        reason = "its sha256 is of something else"
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
    raise DataError(f"{path}: damaged, or not a store's: {reason}. Delete the folder and make it anew.")


def differences(there: Any, asked: Any) -> list[str]:
    """Return one line for each value in which two descriptions differ, with both sides."""
    return list(_differences(there, asked))


def listed(lines: Sequence[str]) -> str:
    """Return lines for a message, the first of many."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(f"  {line}" for line in [*lines[:SHOWN], *more])


def _differences(there: Any, asked: Any, at: str = "") -> Iterator[str]:
    """Yield one line for each value in which two manifests differ."""
    if isinstance(there, list) and isinstance(asked, list):
        there, asked = dict(enumerate(there)), dict(enumerate(asked))
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*there, *asked]):
            yield from _differences(there.get(key), asked.get(key), f"{at}.{key}" if at else f"{key}")
    elif _json(there) != _json(asked):
        yield f"{at}: there {_short(there)}, here {_short(asked)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _seal(path: Path, data: Any) -> bytes:
    """Return what stands beside a file with these bytes."""
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()
