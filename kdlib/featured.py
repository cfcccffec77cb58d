"""A data part as a network sees it: samples through features, kept in memory or on disk, augmented by key."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdlib import ranks
from kdlib.cache import Cache, filled, read_item
from kdlib.data import CLEAN, asked, changes
from kdlib.fingerprints import settings_of, state_of
from kdlib.interfaces import DataPart, Features
from kdlib.keyed import keyed
from kdlib.progress import track
from kdlib.store import Store

MEMORY = 4 << 30
"""Bytes of features that a part keeps at most; beyond that they are computed anew each time."""
AT_ONCE = 64
"""Items that ranks share out, and send one another, at a time."""


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
            Without one they are kept in memory, up to 4 GiB. What is kept is without augmentation; where samples change
            from epoch to epoch by themselves, features of training are computed anew each time.
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
        draws = features is not None and getattr(features, "augments", hasattr(features, "augment"))
        self._draws = augment and bool(draws)
        self._samples_change = changes(part)
        self.augmented = self._draws or self._samples_change
        self._kept: list[dict[str, Any]] = []
        self._kept_as = "float32" if cache is None else cache.dtype
        self._store: Store | None = None
        if features is not None and cache is not None:
            self._store = filled(features, part, cache, self._computed, title)
        elif features is not None and len(part) and len(part) * self._clean(0)["x"].nbytes <= MEMORY:
            indices = iter(track(range(len(part)), title))
            while some := list(itertools.islice(indices, AT_ONCE)):
                self._kept += ranks.mapped(self._computed, some)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: tuple[int, int]) -> Mapping[str, Any]:
        epoch, index = asked(key)
        if self.features is None:
            return self.part[key]
        anew = self._samples_change and epoch != CLEAN
        item = {**(self._computed(index, epoch) if anew else self._clean(index)), "epoch": epoch}
        if self._draws and epoch != CLEAN:
            view: Any = self.features
            item["x"] = view.augment(item["x"].clone(), keyed(self.seed, epoch, index, "augment"))
        return item

    @property
    def made_by(self) -> Mapping[str, Any]:
        """What items depend on beside the fingerprints of the part: the features, and the seed of their views."""
        if self.features is None:
            own: Any = self.part
            made: Mapping[str, Any] = own.made_by
            return made
        state = self.features.state_dict() if hasattr(self.features, "state_dict") else {}
        features = {**settings_of(self.features), "state": state_of(state), "kept": self._kept_as}
        augmentation: dict[str, Any] = {"seed": self.seed} if self._draws else {}
        if self._samples_change:
            own = self.part
            augmentation["samples"] = own.made_by["augmentation"]
        return {"features": features, "augmentation": augmentation or None}

    @property
    def fingerprint(self) -> Callable[[int], str]:
        """The part's own, if it has one: ``made_by`` says what became of its items."""
        own: Any = self.part
        look: Callable[[int], str] = own.fingerprint
        return look

    def _clean(self, index: int) -> dict[str, Any]:
        if self._store is not None:
            return read_item(self._store, self.part, index)
        return self._kept[index] if self._kept else self._computed(index)

    @torch.no_grad()
    def _computed(self, index: int, epoch: int = CLEAN) -> dict[str, Any]:
        item = self.part[epoch, index]
        features: Any = self.features
        return {**item, "x": features(item["x"])}
