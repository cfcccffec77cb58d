"""What every data-set layout shares: the part, the store of decoded clips, the split by recording, the report."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdlib import DataError, keyed

Rate = Annotated[int, Field(ge=1)]
Channels = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

SHOWN = 20
"""How many problems of a kind a report spells out; the others are counted."""


class Clip(NamedTuple):
    """One clip before it is read: its file relative to the root, its class, its recording or place."""

    id: str
    label: str
    group: str


def split_groups(
    labels: Sequence[int] | np.ndarray, groups: Sequence[str], share: float, seed: int, *, purpose: str = "validation"
) -> np.ndarray:
    """Choose the groups to take out of a part, class by class, so that no group is cut in two.

    Of the ``n`` groups of a class ``round(share * n)`` go out, at least 1 and at most ``n - 1``; of a single group
    none. A group that holds several classes counts for each and goes out only where each of them keeps another one.
    The choice depends on the names of the groups and not on the order of the items.

    Args:
        labels: class numbers, (N,).
        groups: the recording, place or speaker of each item, N names.
        share: the share of each class's groups, 0 <= share < 1. With 0 nothing goes out.
        seed: the key of the draw, with ``purpose``.
        purpose: keeps draws for different ends apart.

    Returns:
        (N,) bool, true for the items that go out.

    Raises:
        ValueError: ``share`` is out of bounds, or labels and groups differ in number.

    Source:
        Ours; the paper does not say how its epoch was chosen.

    Example:
        >>> split_groups([0, 0, 0, 1, 1], ["a", "a", "b", "c", "d"], 0.5, seed=0).sum() in (2, 3)
        True
    """
    numbers = np.asarray(labels)
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and below 1, not {share}")
    if len(numbers) != len(groups):
        raise ValueError(f"{len(numbers)} labels and {len(groups)} groups")
    if share == 0:
        return np.zeros(len(groups), dtype=np.bool_)
    classes_of: dict[str, set[int]] = {}
    for label, group in zip(numbers.tolist(), groups, strict=True):
        classes_of.setdefault(group, set()).add(label)
    left = Counter(label for classes in classes_of.values() for label in classes)
    out: set[str] = set()
    for label in sorted(left):
        mine = sorted(group for group, classes in classes_of.items() if label in classes)
        missing = max(int(share * len(mine) + 0.5), 1) - sum(group in out for group in mine)
        for place in torch.randperm(len(mine), generator=keyed(seed, "split", purpose, label)).tolist():
            group = mine[place]
            if missing > 0 and group not in out and all(left[other] > 1 for other in classes_of[group]):
                out.add(group)
                left.subtract(classes_of[group])
                missing -= 1
    return np.array([group in out for group in groups], dtype=np.bool_)


def scene_parts(
    train: Sequence[Clip],
    test: Sequence[Clip],
    *,
    classes: tuple[str, ...],
    store: ClipStore,
    validation: float,
    seed: int,
    rate: int,
    channels: int,
) -> SceneParts:
    """Make the parts of one training, with a share of the training part's groups split off for validation.

    Raises:
        DataError: ``validation`` is above 0 and no class has two groups to split.
    """
    number = {name: place for place, name in enumerate(classes)}

    def part(clips: Sequence[Clip]) -> Clips:
        return Clips(
            ids=[clip.id for clip in clips],
            labels=np.array([number[clip.label] for clip in clips], dtype=np.int64),
            groups=[clip.group for clip in clips],
            classes=classes,
            store=store,
        )

    out = split_groups([number[clip.label] for clip in train], [clip.group for clip in train], validation, seed)
    if validation > 0 and not out.any():
        raise DataError(f"{store.root}: data.validation={validation:g}, but no class has two recordings to split")
    held_out = [clip for clip, goes in zip(train, out, strict=True) if goes]
    kept = [clip for clip, goes in zip(train, out, strict=True) if not goes]
    return SceneParts(part(kept), part(held_out) if held_out else None, part(test), classes, rate, channels)


class ClipStore:
    """Reads the clips of one data set and keeps them decoded, shared by its parts and folds.

    A clip that would take the store beyond ``limit`` is read anew each time, so that a set larger than the memory can
    be used with the default settings. Forked loader workers see what was kept before they started; a pickled or
    copied store starts empty.

    Args:
        root: the folder that the names are relative to.
        read: reads one file, (channels, samples). Its settings are the keywords of a ``partial``.
        keep: whether to keep anything.
        limit: bytes to keep at most, in each process; 2 GiB by default.

    Source:
        Ours.
    """

    def __init__(self, root: Path, read: Callable[[Path], Tensor], *, keep: bool = True, limit: int = 2 << 30) -> None:
        self.root = root
        self.read = read
        self.keep = keep
        self.limit = limit
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0
        self._fingerprints: dict[str, str] = {}

    def __call__(self, name: str) -> Tensor:
        """Return the samples of one clip; they are the caller's to change."""
        kept = self._kept.get(name)
        if kept is not None:
            return kept.clone()
        samples = self.read(self.root / name)
        if self.keep and self._bytes + samples.nbytes <= self.limit:
            self._kept[name] = samples.clone()
            self._bytes += samples.nbytes
        return samples

    def fingerprint(self, name: str) -> str:
        """Return a hash of a clip's file, of the reader and of its settings; of its name where it is made, not read."""
        known = self._fingerprints.get(name)
        if known is None:
            digest = hashlib.sha256(self._reader())
            path = self.root / name
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except FileNotFoundError:
                digest.update(name.encode())
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
            known = self._fingerprints[name] = digest.hexdigest()
        return known

    def _reader(self) -> bytes:
        """Return what names the function that reads and its settings: a clip may come out otherwise under others."""
        function = getattr(self.read, "func", self.read)
        settings = sorted(getattr(self.read, "keywords", {}).items())
        source = Path(function.__code__.co_filename)
        code = source.read_bytes() if source.is_file() else b""
        return hashlib.sha256(code).digest() + f"{function.__qualname__} {settings}".encode()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_bytes": 0}


class Clips:
    """One part of a data set of clips (a :class:`kdlib.interfaces.DataPart`).

    ``part[epoch, index]`` is ``{"x": samples (channels, time), "y": int, "index": int, "epoch": int}``. The clip is
    the same in every epoch: views are drawn by features, which the epoch is passed on for.

    Attributes:
        ids: file names relative to the data set's folder, with forward slashes, N of them.
        labels: class numbers, (N,) int64.
        groups: the recording or place of each clip.
        classes: the class names, in the order of the numbers.
        store: reads the samples.

    Raises:
        DataError: on reading an item whose file is not what the settings say (see :func:`kdlib_asc.audio.read_audio`).
        IndexError: on an index out of range.
    """

    ids: Sequence[str]
    labels: np.ndarray
    groups: Sequence[str]

    def __init__(
        self, *, ids: list[str], labels: np.ndarray, groups: list[str], classes: tuple[str, ...], store: ClipStore
    ) -> None:
        self.ids = ids
        self.labels = labels
        self.groups = groups
        self.classes = classes
        self.store = store

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a part of {len(self)} clips")
        return {"x": self.store(self.ids[index]), "y": int(self.labels[index]), "index": index, "epoch": epoch}

    def fingerprint(self, index: int) -> str:
        """Return a hash of the bytes of a clip's file and of how it is read."""
        return self.store.fingerprint(self.ids[index])


@dataclass(frozen=True)
class SceneParts:
    """A data set of clips split for one training (a :class:`kdlib.interfaces.DataParts`).

    Attributes:
        train: the part that is trained on.
        valid: the part that chooses the epoch, split off the training part by recording; None where not asked for.
        test: the part that is scored and chooses nothing.
        classes: the class names, sorted.
        rate: samples a second.
        channels: channels of a clip.
    """

    train: Clips
    valid: Clips | None
    test: Clips
    classes: tuple[str, ...]
    rate: int
    channels: int


class Problems:
    """Collects what is wrong with a data set, to report all of it in one error.

    Example:
        >>> problems = Problems()
        >>> problems.add("listed file that is missing", "audio/a.wav", "in fold1_train.txt")
        >>> problems.check("the set")
        Traceback (most recent call last):
        kdlib.errors.DataError: the set: 1 problem
        1. listed file that is missing (1):
             audio/a.wav: in fold1_train.txt
    """

    def __init__(self) -> None:
        self._kinds: dict[str, dict[str, str]] = {}

    def add(self, kind: str, item: str, detail: str) -> None:
        """Note one problem; of the same item only the first of a kind is kept, since folds repeat it."""
        self._kinds.setdefault(kind, {}).setdefault(item, detail)

    def check(self, where: str | Path) -> None:
        """Raise DataError with everything that was noted, numbered by kind, or do nothing where nothing was."""
        if not self._kinds:
            return
        total = sum(map(len, self._kinds.values()))
        lines = [f"{where}: {total} problem{'s' if total > 1 else ''}"]
        for place, (kind, items) in enumerate(self._kinds.items(), start=1):
            lines.append(f"{place}. {kind} ({len(items)}):")
            lines += [f"     {item}: {detail}" for item, detail in list(items.items())[:SHOWN]]
            if len(items) > SHOWN:
                lines.append(f"     and {len(items) - SHOWN} more")
        raise DataError("\n".join(lines))
