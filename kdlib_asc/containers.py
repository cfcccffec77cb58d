"""What a sound file's own container says against it, where the decoder does not ask."""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

_UNSTATED = 0xFFFFFFFF  # RF64, or written to a pipe
_PLAIN = (1, 3, 6, 7, 0xFFFE)  # PCM, floating point, A-law, mu-law, and an extended header: every sample is as wide
_NAME = re.compile(rb"[ -~]{4}")
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def damage(path: Path) -> str | None:
    """Say what a container lacks, or where it contradicts itself.

    libsndfile takes the length of a file from what is there, passes over what it cannot read, and asks no checksum.
    A WAV, AIFF, AU, CAF or W64 file must hold as many bytes of samples as its header states; the samples of a WAV file
    must be whole frames, and what follows them chunks; each page of an Ogg file must have its number and its checksum,
    and the last one end the stream.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(24)
        if head[:4] == b"OggS":
            return _ogg(file)
        if head[8:12] == b"WAVE":
            return _wave(file, size, "big" if head[:4] == b"RIFX" else "little")
        stated, there = _stated(file, head, size)
    return _short(stated, there)


class FlacSum:
    """The MD5 of the samples that a FLAC file holds, to be compared with what its header says that it is."""

    def __init__(self, path: Path, bits: int) -> None:
        with path.open("rb") as file:
            head = file.read(42)
        self.bits = bits
        self.stated = head[26:42] if head[:4] == b"fLaC" else b""
        self._sum = hashlib.md5(usedforsecurity=False)

    def add(self, samples: np.ndarray) -> None:
        """Take in samples (frames, channels) int32, at the upper end of their 32 bits."""
        own = np.ascontiguousarray(samples >> (32 - self.bits), dtype="<i4").view(np.uint8)
        self._sum.update(own.reshape(-1, 4)[:, : self.bits // 8].tobytes())

    def agrees(self) -> bool:
        """Tell whether the samples are those that were written, as far as the header says."""
        return not self.stated.strip(b"\0") or self._sum.digest() == self.stated


def _short(stated: int, there: int) -> str | None:
    return f"truncated: the header states {stated} bytes of samples, the file has {there}" if stated > there else None


def _wave(file: BinaryIO, size: int, order: Literal["little", "big"]) -> str | None:
    long_size, frame = 0, 0
    for chunk in _chunks(file, 12, 4, order):
        if chunk[0] == b"data":
            break
        if chunk[0] == b"ds64":  # RF64: the true size of the data chunk, behind that of the file
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if chunk[0] == b"fmt ":
            form = file.read(16).ljust(16, b"\0")
            kind, channels, _, _, width, bits = struct.unpack(f"{'<' if order == 'little' else '>'}HHIIHH", form)
            if kind in _PLAIN and width != channels * -(-bits // 8):
                return f"damaged: {channels} channels of {bits} bits are no frames of {width} bytes"
            frame = width if kind in _PLAIN else 1
    else:
        return None  # the decoder says so
    _, length, start = chunk
    stated = long_size if length == _UNSTATED else length
    if length == _UNSTATED and not stated:
        return None  # they go on to the end of the file
    if stated > size - start:
        return _short(stated, size - start)
    if frame and stated % frame:
        return f"damaged: {stated} bytes of samples are no whole frames of {frame} bytes"
    end = start + stated + stated % 2
    for name, length, start in _chunks(file, end, 4, order):
        if not _NAME.fullmatch(name) or start + length > size:
            break
        end = start + length + length % 2
    return f"damaged: it goes on behind its {stated} bytes of samples, and with no chunk" if size - end > 1 else None


def _ogg(file: BinaryIO) -> str | None:
    """Look at every page of an Ogg file (RFC 3533, section 6)."""
    file.seek(0)
    numbers: dict[bytes, int] = {}
    last = 0
    while head := file.read(27):
        body = file.read(head[26]) if len(head) == 27 else b""
        lengths = len(body)
        body += file.read(sum(body))
        if head[:5] != b"OggS\0":
            return f"damaged: something that is no Ogg page lies before byte {file.tell()}"
        if len(head) < 27 or lengths < head[26] or len(body) < lengths + sum(body[:lengths]):
            return "truncated: it ends within an Ogg page"
        if _ogg_sum(head[:22] + bytes(4) + head[26:] + body) != int.from_bytes(head[22:26], "little"):
            return f"damaged: the Ogg page before byte {file.tell()} and its checksum do not agree"
        stream, number = head[14:18], int.from_bytes(head[18:22], "little")
        if numbers.get(stream, number - 1) != number - 1:
            return f"damaged: Ogg pages are missing before byte {file.tell()}"
        numbers[stream], last = number, head[5]
    return None if last & 4 else "truncated: its last Ogg page does not end the stream"


def _ogg_sum(page: bytes) -> int:
    """Return the CRC of a page: zlib's polynomial, with bits in the other order and nothing inverted."""
    reflected = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def _stated(file: BinaryIO, head: bytes, size: int) -> tuple[int, int]:
    """Return how many bytes of samples a header states and how many follow it; (0, 0) where it states none."""
    if head[:4] == b".snd":
        stated = int.from_bytes(head[8:12], "big")
        return (0 if stated == _UNSTATED else stated), size - int.from_bytes(head[4:8], "big")
    if head[:4] == b"riff":  # W64, which states the size of the whole file
        return int.from_bytes(head[16:24], "little") - 24, size - 24
    if head[:4] == b"caff":
        for name, length, start in _chunks(file, 8, 8, "big"):
            if name == b"data":
                return (0 if length == (1 << 64) - 1 else length), size - start
    if head[8:12] in (b"AIFF", b"AIFC", b"8SVX", b"16SV"):
        for name, length, start in _chunks(file, 12, 4, "big"):
            if name in (b"SSND", b"BODY"):
                return (0 if length == _UNSTATED else length), size - start
    return 0, 0


def _chunks(
    file: BinaryIO, start: int, width: int, order: Literal["little", "big"]
) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, length and start of each chunk; lengths have ``width`` bytes, 4-byte ones are padded to even."""
    file.seek(start)
    while len(head := file.read(4 + width)) == 4 + width:
        length, start = int.from_bytes(head[4:], order), file.tell()
        yield head[:4], length, start
        file.seek(start + length + (length % 2 if width == 4 else 0))
