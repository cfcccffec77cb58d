"""A data part as a network sees it: samples through features, kept in memory or on disk, augmented by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdlib.cache import Cache, filled, read_item
from kdlib.data import CLEAN
from kdlib.interfaces import DataPart, Features
from kdlib.keyed import keyed
from kdlib.progress import track
from kdlib.store import Store

MEMORY = 4 << 30
"""Bytes of features that a part keeps at most; beyond that they are computed anew each time."""


class Featured:
    """Items of a part with ``x`` replaced by its features; in training epochs another view of them each time.

    Args:
        part: samples, or inputs where there are no features.
        features: from samples (channels, time) to x. None leaves the items as they are.
        classes: the class names.
        augment: draw views with ``features.augment``, keyed by (seed, epoch, index).
        seed: of the run.
        title: what to call it beside the progress bar.
        cache: where features are kept on disk: what is there is not computed, and the part's samples are not read.
            Without one they are kept in memory, up to 4 GiB.
    """

    def __init__(
        self,
        part: DataPart,
        features: Features | None,
        *,
        classes: Sequence[str] | None = None,
        augment: bool = False,
        seed: int = 0,
        title: str = "features",
        cache: Cache | None = None,
    ) -> None:
        self.part = part
        self.features = features
        self.seed = seed
        self.labels: np.ndarray = part.labels
        self.groups: Sequence[str] = part.groups
        self.ids: Sequence[str] = part.ids
        self.classes = classes
        self.time_axis = None if features is None else features.time_axis
        changes = features is not None and getattr(features, "augments", hasattr(features, "augment"))
        self.augmented = augment and bool(changes)
        self._kept: list[dict[str, Any]] = []
        self._store: Store | None = None
        if features is not None and cache is not None:
            self._store = filled(features, part, cache, self._computed, title)
        elif features is not None and len(part) * self._clean(0)["x"].nbytes <= MEMORY:
            self._kept = [self._computed(index) for index in track(range(len(part)), title)]

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: tuple[int, int]) -> Mapping[str, Any]:
        epoch, index = key
        if self.features is None:
            return self.part[key]
        item = {**self._clean(index), "epoch": epoch}
        if self.augmented and epoch != CLEAN:
            view: Any = self.features
            item["x"] = view.augment(item["x"].clone(), keyed(self.seed, epoch, index, "augment"))
        return item

    def _clean(self, index: int) -> dict[str, Any]:
        if self._store is not None:
            return read_item(self._store, self.part, index)
        return self._kept[index] if self._kept else self._computed(index)

    @torch.no_grad()
    def _computed(self, index: int) -> dict[str, Any]:
        item = self.part[CLEAN, index]
        features: Any = self.features
        return {**item, "x": features(item["x"])}
