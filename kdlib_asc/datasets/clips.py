"""What every data-set layout shares: the part, the store of decoded clips, the split by recording, the report."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdlib import DataError, keyed, unreadable
from kdlib_asc.audio import FormError, fitting, read_windows

Rate = Annotated[int, Field(ge=1)]
Channels = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Bad = Literal["error", "skip"]

SHOWN = 20
"""How many problems of a kind a report spells out; the others are counted."""
LONGEST = 300
"""Characters of a name in a report; no file's is as long."""
FEW = 5
"""How many a warning spells out."""


F = TypeVar("F", bound=Callable[..., Any])


def of_clips(**written: Any) -> Callable[[F], F]:
    """Mark the builder of a data set of clips: ``build.windows(path, settings)`` reads any one file in its form.

    That is what ``kdlib predict`` asks for, and ``written`` what ``kdlib data make`` takes; see
    :class:`kdlib.interfaces.DataParts`.
    """

    def mark(build: F) -> F:
        marked: Any = build
        marked.windows = _windows
        marked.written = written
        return build

    return mark


def _windows(path: Path, settings: Any) -> Tensor:
    names = ("rate", "channels", "seconds", "resample", "down_mix")
    return read_windows(path, **{name: getattr(settings, name) for name in names if hasattr(settings, name)})


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
    skipped: Mapping[str, str] | None = None,
) -> SceneParts:
    """Make the parts of one training, with a share of the training part's groups split off for validation.

    Bad clips are not among them; ``skipped`` has their reasons.

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
    return SceneParts(
        train=part(kept),
        valid=part(held_out) if held_out else None,
        test=part(test),
        classes=classes,
        rate=rate,
        channels=channels,
        skipped=tuple((skipped or {}).items()),
    )


def bad_clips(clips: Sequence[Clip], store: ClipStore) -> dict[str, str]:
    """Read every clip once and return what is wrong with the bad ones, by id in their order, with one warning.

    Nothing that was read is kept: it need not fit into the memory.
    """
    errors = unreadable([clip.id for clip in clips], lambda name: store.read(store.root / name), title="reading clips")
    reasons = {name: str(error).removeprefix(f"{store.root / name}: ") for name, error in errors.items()}
    if reasons:
        counts = f"{len(reasons)} of {len(clips)} clips are bad and left out (data.bad='skip')"
        few = listed([f"{name}: {reason}" for name, reason in reasons.items()])
        warnings.warn(f"{store.root}: {counts}{few}", stacklevel=3)
    return reasons


def add_links_out(problems: Problems, root: Path, paths: Iterable[Path]) -> None:
    """Note the files and folders that a link, their own or a folder's above them, takes out of a data set's folder."""
    real = os.path.realpath(root)
    folders: dict[Path, str] = {}
    for path in paths:
        if path.parent not in folders:
            folders[path.parent] = os.path.realpath(path.parent)
        end = os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[path.parent], path.name)
        if os.path.commonpath([real, end]) != real:
            detail = f"to {end}; data.links=true follows it"
            problems.add("link that leads out of the data set's folder", str(path.relative_to(root)), detail)


def listed(lines: Sequence[str]) -> str:
    """Return the first few lines of a warning and the number of the others."""
    more = [f"and {len(lines) - FEW} more"] if len(lines) > FEW else []
    return "".join(f"\n  {line}" for line in [*lines[:FEW], *more])


def add_emptied(problems: Problems, clips: Sequence[Clip], bad: Mapping[str, str], where: str) -> None:
    """Note the classes of which only bad clips are there."""
    left = {clip.label for clip in without(clips, bad)}
    for label in sorted({clip.label for clip in clips} - left):
        mine = [clip for clip in clips if clip.label == label]
        detail = f"all {len(mine)} are bad, the first: {mine[0].id}: {bad[mine[0].id]}"
        problems.add("class without a clip that can be read", f"{label} in {where}", detail)


def without(clips: Sequence[Clip], bad: Mapping[str, str]) -> list[Clip]:
    """Return the clips that are not bad."""
    return [clip for clip in clips if clip.id not in bad]


class ClipStore:
    """Reads the clips of one data set and keeps them decoded, shared by its parts and folds.

    A clip that would take the store beyond ``limit`` is read anew each time, so that a set larger than the memory can
    be used with the default settings. Forked loader workers see what was kept before they started; a pickled or
    copied store starts empty.

    Args:
        root: the folder that the names are relative to.
        read: reads one file, (channels, samples). Its settings are the keywords of a ``partial``.
        made: ``read`` makes a clip from its name, and there is no file.
        keep: whether to keep anything.
        limit: bytes to keep at most, in each process; 2 GiB by default.

    Source:
        Ours.
    """

    def __init__(
        self,
        root: Path,
        read: Callable[[Path], Tensor],
        *,
        made: bool = False,
        keep: bool = True,
        limit: int = 2 << 30,
    ) -> None:
        self.root = root
        self.read = read
        self.made = made
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
            content = name.encode() if self.made else _digest(self.root / name)
            known = self._fingerprints[name] = hashlib.sha256(self._reader() + content).hexdigest()
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


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


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
        augmented: false, for clips never change.
        made_by: says the same to a store.

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
        self.augmented = False
        self.made_by = {"augmentation": None}

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

    def memory(self) -> int:
        """Return the bytes of decoded clips that will be kept at most."""
        return min(self.store.limit, len(self) * self[-1, 0]["x"].nbytes) if self.store.keep else 0


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
        skipped: id and reason of each clip that was left out of the parts as bad.
    """

    train: Clips
    valid: Clips | None
    test: Clips
    classes: tuple[str, ...]
    rate: int
    channels: int
    skipped: tuple[tuple[str, str], ...] = ()

    def advice(self, errors: Sequence[Exception], fine: int) -> dict[str, Any]:
        """Return the settings under which clips that were refused for their form would be read too.

        Args:
            errors: what reading raised, of whatever kind.
            fine: how many clips could be read.
        """
        refused = [error for error in errors if isinstance(error, FormError)]
        if not refused:
            return {}
        return fitting([error.found for error in refused] + [refused[0].wanted] * fine)


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
        short = item if len(item) <= LONGEST else f"{item[:LONGEST]}..."
        self._kinds.setdefault(kind, {}).setdefault(short, detail)

    def check(self, where: str | Path, parts: Callable[[], Any] = lambda: None) -> None:
        """Raise DataError with everything that was noted, numbered by kind, or do nothing where nothing was.

        Args:
            where: what it is wrong with.
            parts: makes what can be read on all the same, for ``kdlib data check``.
        """
        if not self._kinds:
            return
        total = sum(map(len, self._kinds.values()))
        lines = [f"{where}: {total} problem{'s' if total > 1 else ''}"]
        for place, (kind, items) in enumerate(self._kinds.items(), start=1):
            lines.append(f"{place}. {kind} ({len(items)}):")
            lines += [f"     {item}: {detail}" for item, detail in list(items.items())[:SHOWN]]
            if len(items) > SHOWN:
                lines.append(f"     and {len(items) - SHOWN} more")
        error = DataError("\n".join(lines))
        error.parts = parts()
        raise error
