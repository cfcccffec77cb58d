"""A teacher that hears several segments of a scene joined together, while the student hears one."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.data import default_collate

from kdlib import CLEAN, Batch, DataError, DataPart, Frozen, KdlibError, TapError, Taps, track
from kdlib_asc.figures import segments_figure
from kdlib_asc.junctions import Junction
from kdlib_asc.partners import partners

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JOINS, VIEWS = ("input", "frames", "exact"), ("same", "clean")
ENCODED_AT_ONCE = 32
"""Clips a batch when frames are kept: memory, not speed, is what it bounds."""
COMPARED = 32
"""Clips on which a teacher is compared with that of joined inputs."""
MOST_SEGMENTS = 6
"""Segments that a picture goes up to."""
SHOWN = 100
"""Clips of a class that a picture shows."""


class MultiSegment:
    """Soft labels for a clip from the clip joined with others of its class (Heo et al. 2019, section 3.1, eq. 4).

    x_con = x_base ++ x_1 ++ ... ++ x_(segments - 1), base first; the partners are drawn anew each epoch by
    :func:`kdlib_asc.partners.partners`, in training from the training part only.

    Args:
        teacher: a frozen network on features; with ``encode`` and ``head`` for ``join="frames"``, and with a
            ``junction`` besides (:class:`kdlib_asc.junctions.Junction`) for ``join="exact"``.
        data: the training part; its ``time_axis`` says where inputs join.
        segments: segments that the teacher hears, the clip itself included, at least 1 (1: the same input).
        join: ``input`` joins features and runs the network over all of them (the paper). ``frames`` joins what
            ``encode`` makes of each segment before ``head``: the teacher is then defined by frames per segment, and
            differs from the paper's around each junction. ``exact`` cuts each segment to whole frames of the network
            (raw: up to 26243 samples are cut off, 0.55 s at 48 kHz; spectrogram: up to 11 frames) and gives what the
            network makes of these segments joined, up to rounding. With ``frames`` and ``exact`` what does not change
            from epoch to epoch, with the view ``clean`` or without augmentation, is computed once and kept in memory:
            the frames, and for ``exact`` the edges of each clip, from which the frames around each junction are
            computed anew (0.84 MB a clip of stereo audio, 0.24 MB of a stereo spectrogram with 256 coefficients).
            Otherwise ``exact`` costs as much as ``input``. Both are ours; :meth:`difference` says what they change.
        view: ``same`` gives the teacher the augmented clip that the student gets, and partners as augmented as they
            are in that epoch. ``clean`` gives it all segments without augmentation.
        elsewhere: draw partners from other recording places only.
        repeat: where a class has too few clips, use them again.
        seed: keys the partners.
        time_axis: of the inputs, counted from the end. Default: the data's.

    Raises:
        TapError: the teacher is not frozen, or lacks what ``join`` needs.
        KdlibError: no time axis is known, or ``join`` or ``view`` is another word.
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
        join: Literal["input", "frames", "exact"] = "input",
        view: Literal["same", "clean"] = "same",
        elsewhere: bool = False,
        repeat: bool = False,
        seed: int = 0,
        time_axis: Annotated[int, Field(le=-1)] | None = None,
    ) -> None:
        if isinstance(teacher, nn.Module):
            raise TapError(f"A source wants a frozen teacher, not {type(teacher).__name__}: kdlib.freeze(model).")
        for name, value, known in (("join", join, JOINS), ("view", view, VIEWS)):
            if value not in known:
                raise KdlibError(f"{name}={value!r} is unknown. There is {', '.join(known)}.")
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
        if join == "exact":
            self._junction()  # a teacher without one is refused before anything is computed

    def __call__(self, batch: Batch) -> Taps:
        """Return the teacher's taps for each clip of the batch joined with its partners."""
        if "frames" in batch:
            return self.teacher.head(self._mended(batch["frames"], batch.get("windows")))
        segments: list[Tensor] = [batch["base"] if "base" in batch else batch["x"]]
        if self.segments > 1:
            segments += batch["partners"].unbind(1)
        if self.join == "frames" and len(segments) > 1:
            frames = self.teacher.encode(torch.cat(segments))
            return self.teacher.head(torch.cat(frames.chunk(len(segments)), dim=1))
        if self.join == "exact":
            segments = [self._junction().cut(segment, self.time_axis) for segment in segments]
        return self.teacher(torch.cat(segments, dim=self.time_axis))

    def dataset(self, part: DataPart) -> DataPart:
        """Return the part with what this source needs beside each item, loaded where the items are loaded."""
        draw = self._table(part)
        clean = self.view == "clean" or not getattr(part, "augmented", True)
        kept = self._encode(part) if self.join != "input" and clean else None
        return _Joined(part, draw, clean=clean, kept=kept)

    def difference(self, part: DataPart) -> dict[str, float]:
        """Return how far this teacher is from that of ``join="input"``, on at most 32 clips without augmentation.

        ``KL`` is the mean over clips of KL(softmax(z_input) || softmax(z)) in nats, ``same class`` the share of clips
        where both logits have one argmax, ``embedding`` the largest difference of a coordinate, and ``cut off`` the
        samples or frames that a segment lost, ``of`` how many. Empty for ``input`` itself.

        Args:
            part: what :meth:`dataset` returned.
        """
        if self.join == "input" or not isinstance(part, _Joined):
            return {}
        other = copy.copy(self)
        other.join = "input"
        whole = other.dataset(part.part)
        clips = np.unique(np.linspace(0, len(part) - 1, COMPARED).astype(np.int64))
        found, wanted = self._taps(part, clips), other._taps(whole, clips)
        result = {}
        if "logits" in wanted:
            z, z_input = found["logits"].double(), wanted["logits"].double()
            log_q, log_p = z.log_softmax(-1), z_input.log_softmax(-1)
            result["KL"] = float(kl_div(log_q, log_p, reduction="batchmean", log_target=True))
            result["same class"] = float((z.argmax(-1) == z_input.argmax(-1)).double().mean())
        if "embedding" in wanted:
            result["embedding"] = float((found["embedding"] - wanted["embedding"]).abs().max())
        if self.join == "exact":
            steps = part.part[CLEAN, 0]["x"].shape[self.time_axis]
            result |= {"cut off": steps % self._junction().stride, "of": steps}
        return result

    def _junction(self) -> Junction:
        junction = getattr(self.teacher.model, "junction", None)
        if not isinstance(junction, Junction):
            raise TapError(
                f"The teacher {type(self.teacher.model).__name__} has no attribute 'junction'. join=\"exact\" wants a "
                "model that says how far a junction reaches (kdlib_asc.junctions.Junction); join inputs instead."
            )
        return junction

    def _mended(self, frames: Tensor, windows: Tensor | None) -> Tensor:
        """Return the frames of each segment (B, S, F, D) as those of the joined segments, (B, S * F, D)."""
        if windows is None:
            return frames.flatten(1, 2)
        around = self.teacher.encode(windows.flatten(0, 1))
        return self._junction().mended(frames, around.view(*windows.shape[:2], *around.shape[1:]))

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
        taps = self._taps(self.dataset(part), clips)
        if "embedding" not in taps:
            raise TapError(f"the teacher gives no embedding to draw, only {', '.join(taps)}.")
        return taps["embedding"].numpy()

    def _taps(self, joined: DataPart, clips: np.ndarray) -> dict[str, Tensor]:
        """Return logits and embeddings for some clips of what ``dataset`` returned, without augmentation."""
        pieces = []
        at_once = max(ENCODED_AT_ONCE // self.segments, 1)
        title = f"the teacher on {self.segments} segments"
        for chosen in track([clips[at : at + at_once] for at in range(0, len(clips), at_once)], title):
            pieces.append(self(default_collate([joined[CLEAN, index] for index in chosen.tolist()])))
        names = [name for name in ("logits", "embedding") if name in pieces[0]]
        return {name: torch.cat([taps[name] for taps in pieces]).float().cpu() for name in names}

    def _encode(self, part: DataPart) -> _Kept | None:
        """Return what is kept of every clip without augmentation; None where clips are too short for a window."""
        whole: list[Tensor] = []
        for start in track(range(0, len(part), ENCODED_AT_ONCE), "frames of the teacher"):
            stop = min(start + ENCODED_AT_ONCE, len(part))
            x = torch.stack([part[CLEAN, index]["x"] for index in range(start, stop)])
            edges: list[Tensor] = []
            if self.join == "exact":
                junction = self._junction()
                x = junction.cut(x, self.time_axis)
                if not junction.fits(x, self.time_axis):
                    warnings.warn(
                        f'join="exact" saves nothing here but what it cuts off: segments of {x.shape[self.time_axis]} '
                        f"steps do not fill one side of a window, {max(junction.before, junction.after)}, and are "
                        'joined and run whole in each step. Consider join="input" or "frames".',
                        stacklevel=3,
                    )
                    return None
                edges = [junction.tail(x, self.time_axis), junction.head(x, self.time_axis)]
            rows = [self.teacher.encode(x), *edges]
            whole = whole or [one.new_empty(len(part), *one.shape[1:]) for one in rows]
            for all_rows, one in zip(whole, rows, strict=True):
                all_rows[start:stop] = one
        return _Kept(self.time_axis, *whole)


@dataclass(frozen=True)
class _Kept:
    """What is computed once: the frames of every clip, (N, frames, D), and the edges that windows are made of."""

    time_axis: int
    frames: Tensor
    tails: Tensor | None = None
    heads: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """All of it, in bytes."""
        return sum(one.nbytes for one in (self.frames, self.tails, self.heads) if one is not None)

    def of(self, clips: list[int]) -> dict[str, Tensor]:
        """Return the frames of some clips, (S, frames, D), and the windows around their junctions, (S - 1, ...)."""
        frames = {"frames": self.frames[clips]}
        if self.tails is None or self.heads is None or len(clips) < 2:
            return frames
        return {**frames, "windows": torch.cat([self.tails[clips[:-1]], self.heads[clips[1:]]], dim=self.time_axis)}


class _Joined:
    """A data part whose items bring their partners along. It holds no teacher: loader workers get a copy of it."""

    def __init__(self, part: DataPart, draw: Callable[..., np.ndarray], *, clean: bool, kept: _Kept | None) -> None:
        self.part = part
        self.labels = part.labels
        self.groups = part.groups
        self.ids = part.ids
        self.classes = getattr(part, "classes", None)
        self.time_axis = getattr(part, "time_axis", None)
        self.augmented = getattr(part, "augmented", True)
        self._draw = draw
        self._clean = clean
        self._kept = kept
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.part)

    def memory(self) -> int:
        """Return the bytes that are kept of the clips for the teacher."""
        return 0 if self._kept is None else self._kept.nbytes

    def __getitem__(self, key: tuple[int, int]) -> Mapping[str, Any]:
        epoch, index = key
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch=epoch))
        others = self._drawn[1][index].tolist()
        item = dict(self.part[key])
        if self._kept is not None:
            return {**item, **self._kept.of([index, *others])}
        seen = CLEAN if self._clean else epoch
        if self._clean:
            item["base"] = self.part[CLEAN, index]["x"]
        if others:
            item["partners"] = torch.stack([self.part[seen, other]["x"] for other in others])
        return item
