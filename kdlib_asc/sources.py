"""A teacher that hears several segments of a scene joined together, while the student hears one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import default_collate

from kdlib import CLEAN, Batch, DataError, DataPart, Frozen, KdlibError, TapError, Taps, track
from kdlib_asc.figures import segments_figure
from kdlib_asc.partners import partners

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENCODED_AT_ONCE = 32
"""Clips a batch when frames are kept: memory, not speed, is what it bounds."""
MOST_SEGMENTS = 6
"""Segments that a picture goes up to."""
SHOWN = 100
"""Clips of a class that a picture shows."""


class MultiSegment:
    """Soft labels for a clip from the clip joined with others of its class (Heo et al. 2019, section 3.1, eq. 4).

    x_con = x_base ++ x_1 ++ ... ++ x_(segments - 1), base first; the partners are drawn anew each epoch by
    :func:`kdlib_asc.partners.partners`, in training from the training part only.

    Args:
        teacher: a frozen network on features; for ``join="frames"`` one with ``encode`` and ``head``.
        data: the training part; its ``time_axis`` says where inputs join.
        segments: segments that the teacher hears, the clip itself included, at least 1 (1: the same input).
        join: ``input`` joins features before the network (the paper). ``frames`` joins what ``encode`` makes of each
            segment before ``head``: the teacher is then defined by frames per segment, and where they do not change
            from epoch to epoch they are computed once (ours).
        view: ``same`` gives the teacher the augmented clip that the student gets, and partners as augmented as they
            are in that epoch. ``clean`` gives it all segments without augmentation.
        elsewhere: draw partners from other recording places only.
        repeat: where a class has too few clips, use them again.
        seed: keys the partners.
        time_axis: of the inputs, counted from the end. Default: the data's.

    Raises:
        TapError: the teacher is not frozen.
        KdlibError: no time axis is known.
        DataError: a class has too few clips to join.

    Example:
        >>> import torch, kdlib
        >>> from kdlib_asc.sources import MultiSegment
        >>> class Mean(torch.nn.Module):
        ...     def forward(self, x):
        ...         return {"embedding": x.mean(-1)}
        >>> source = MultiSegment(kdlib.freeze(Mean()), None, segments=2, time_axis=-1)
        >>> batch = {"x": torch.zeros(1, 2, 5), "partners": torch.ones(1, 1, 2, 5)}
        >>> source(batch)["embedding"]
        tensor([[0.5000, 0.5000]])
    """

    def __init__(
        self,
        teacher: Frozen,
        data: Any,
        *,
        segments: Annotated[int, Field(ge=1)] = 2,
        join: Literal["input", "frames"] = "input",
        view: Literal["same", "clean"] = "same",
        elsewhere: bool = False,
        repeat: bool = False,
        seed: int = 0,
        time_axis: Annotated[int, Field(le=-1)] | None = None,
    ) -> None:
        if isinstance(teacher, nn.Module):
            raise TapError(f"A source wants a frozen teacher, not {type(teacher).__name__}: kdlib.freeze(model).")
        axis = getattr(data, "time_axis", None) if time_axis is None else time_axis
        if axis is None:
            raise KdlibError("multi_segment does not know on which axis inputs join: the data has no time_axis.")
        self.teacher = teacher
        self.segments = segments
        self.join = join
        self.view = view
        self.elsewhere = elsewhere
        self.repeat = repeat
        self.seed = seed
        self.time_axis: int = axis

    def __call__(self, batch: Batch) -> Taps:
        """Return the teacher's taps for each clip of the batch joined with its partners."""
        if "frames" in batch:
            return self.teacher.head(batch["frames"].flatten(1, 2))
        base: Tensor = batch["base"] if "base" in batch else batch["x"]
        if self.segments == 1:
            return self.teacher(base)
        others = batch["partners"].unbind(1)
        if self.join == "input":
            return self.teacher(torch.cat([base, *others], dim=self.time_axis))
        frames = self.teacher.encode(torch.cat([base, *others]))
        return self.teacher.head(torch.cat(frames.chunk(1 + len(others)), dim=1))

    def dataset(self, part: DataPart) -> DataPart:
        """Return the part with what this source needs beside each item, loaded where the items are loaded."""
        draw = self._table(part)
        clean = self.view == "clean" or not getattr(part, "augmented", True)
        frames = self._encode(part) if self.join == "frames" and clean else None
        return _Joined(part, draw, clean=clean, frames=frames)

    def _table(self, part: DataPart) -> Callable[..., np.ndarray]:
        """Return the partners in a part as a function of the epoch."""
        draw = functools.partial(
            partners,
            part.labels,
            part.groups,
            self.segments,
            self.seed,
            other_group=self.elsewhere,
            repeat=self.repeat,
            classes=getattr(part, "classes", None),
        )
        draw(epoch=CLEAN)  # a class that is too small is noticed here, not in a loader worker
        return draw

    def pictures(self, part: DataPart) -> dict[str, Figure]:
        """Draw how the teacher embeds clips joined with 1, 2, ... segments of their class (Heo et al. 2019, figure 1).

        For looking only: it is told the classes of the clips. It goes up to 6 segments, as far as each class of the
        part has partners, and shows at most 100 clips of a class. Where no clip has a partner there is no picture.

        Args:
            part: clips of two classes, such as the most confused of a test part.

        Raises:
            TapError: the teacher gives no embedding.
        """
        labels = np.asarray(part.labels)
        members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        shown = np.concatenate([of[:: -(-len(of) // SHOWN)] for of in members])
        embeddings = []
        for segments in range(1, MOST_SEGMENTS + 1):
            source = self._with(segments)
            try:
                source._table(part)
            except DataError:  # a class has no more clips
                break
            embeddings.append(source._embeddings(part, shown))
        if len(embeddings) < 2:
            return {}
        classes = getattr(part, "classes", None)
        names = [str(label) if classes is None else classes[label] for label in np.unique(labels).tolist()]
        return {"segments": segments_figure(embeddings, labels[shown], names)}

    def _with(self, segments: int) -> MultiSegment:
        """Return this source with another number of segments, no clip used again."""
        other = copy.copy(self)
        other.segments, other.repeat = segments, False
        return other

    def _embeddings(self, part: DataPart, clips: np.ndarray) -> np.ndarray:
        """Return the teacher's embeddings of some clips with their partners, without augmentation, (N, D)."""
        joined = self.dataset(part)
        pieces = []
        at_once = max(ENCODED_AT_ONCE // self.segments, 1)
        title = f"the teacher on {self.segments} segments"
        for chosen in track([clips[at : at + at_once] for at in range(0, len(clips), at_once)], title):
            taps = self(default_collate([joined[CLEAN, index] for index in chosen.tolist()]))
            if "embedding" not in taps:
                raise TapError(f"the teacher gives no embedding to draw, only {', '.join(taps)}.")
            pieces.append(taps["embedding"].float().cpu().numpy())
        return np.concatenate(pieces)

    def _encode(self, part: DataPart) -> Tensor:
        """Return the frames of every clip without augmentation, (N, frames, D)."""
        kept = []
        for start in track(range(0, len(part), ENCODED_AT_ONCE), "frames of the teacher"):
            stop = min(start + ENCODED_AT_ONCE, len(part))
            kept.append(self.teacher.encode(torch.stack([part[CLEAN, index]["x"] for index in range(start, stop)])))
        return torch.cat(kept)


class _Joined:
    """A data part whose items bring their partners along. It holds no teacher: loader workers get a copy of it."""

    def __init__(self, part: DataPart, draw: Callable[..., np.ndarray], *, clean: bool, frames: Tensor | None) -> None:
        self.part = part
        self.labels = part.labels
        self.groups = part.groups
        self.ids = part.ids
        self.classes = getattr(part, "classes", None)
        self.time_axis = getattr(part, "time_axis", None)
        self.augmented = getattr(part, "augmented", True)
        self._draw = draw
        self._clean = clean
        self._frames = frames
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: tuple[int, int]) -> Mapping[str, Any]:
        epoch, index = key
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch=epoch))
        others = self._drawn[1][index].tolist()
        item = dict(self.part[key])
        if self._frames is not None:
            return {**item, "frames": self._frames[[index, *others]]}
        seen = CLEAN if self._clean else epoch
        if self._clean:
            item["base"] = self.part[CLEAN, index]["x"]
        if others:
            item["partners"] = torch.stack([self.part[seen, other]["x"] for other in others])
        return item
