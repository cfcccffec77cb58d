"""From samples to what the networks take: pre-emphasised samples, or log-mel spectrograms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

from kdlib import BatchError, KdlibError

MelScale = Literal["htk", "slaney"]

FLOOR = 1e-10
"""Least power before the logarithm (ours): far below a quiet recording, rms 0.0025."""


def pre_emphasis(x: Tensor, coefficient: float = 0.97) -> Tensor:
    """Return ``y[t] = x[t + 1] - coefficient x[t]``, one sample fewer.

    Args:
        x: samples, (..., time), at least two.
        coefficient: 0 to 1.

    Raises:
        BatchError: fewer than two samples.

    Source:
        Heo et al. (2019), section 4.2 names pre-emphasis; its Table 2 has 479999 samples of 480000, so nothing is put
        before the first sample. 0.97 is ours.

    Example:
        >>> pre_emphasis(torch.tensor([1.0, 1.0, 3.0]), 0.5)
        tensor([0.5000, 2.5000])
    """
    if x.shape[-1] < 2:
        raise BatchError(f"Pre-emphasis takes at least 2 samples; this input has {x.shape[-1]}: {tuple(x.shape)}.")
    return x[..., 1:] - coefficient * x[..., :-1]


def frame_count(samples: int, length: int, hop: int) -> int:
    """Return the number of frames that cover all samples, ``1 + ceil((samples - length) / hop)``, at least 1.

    Args:
        samples: samples of the clip.
        length: samples of a frame.
        hop: samples from one frame to the next.

    Source:
        Ours; it gives the 249 frames of Heo et al. (2019), Table 3.

    Example:
        >>> frame_count(480000, 4800, 1920), frame_count(479999, 4800, 1920), frame_count(100, 4800, 1920)
        (249, 249, 1)
    """
    return 1 + max(0, math.ceil((samples - length) / hop))


def mel_filters(rate: int, length: int, coefficients: int, mel: MelScale = "htk") -> Tensor:
    """Return triangular bands of peak 1, equally spaced on a mel scale from 0 to rate / 2.

    ``htk``: ``2595 log10(1 + f / 700)``. ``slaney``: linear below 1000 Hz, logarithmic above.

    Args:
        rate: samples a second, in Hz.
        length: FFT length in samples.
        coefficients: number of bands.
        mel: the scale.

    Returns:
        Weights of the FFT's bins, (coefficients, length // 2 + 1), float64.

    Raises:
        KdlibError: a band holds no bin.

    Source:
        Ours: the paper does not say whether its 256 coefficients are mel or linear.

    Example:
        >>> mel_filters(16000, 8, 2).shape
        torch.Size([2, 5])
    """
    top = rate / 2
    steps = torch.linspace(0, 1, coefficients + 2, dtype=torch.float64)
    if mel == "htk":
        edges = 700 * (10 ** (steps * math.log10(1 + top / 700)) - 1)
    else:  # 1000 Hz is mel 15; 27 mel from there are a factor 6.4
        factor = 27 / math.log(6.4)
        mels = steps * (top * 3 / 200 if top < 1000 else 15 + factor * math.log(top / 1000))
        edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) / factor))
    bins = torch.arange(length // 2 + 1, dtype=torch.float64) * rate / length
    low, peak, high = (edges[start : start + coefficients, None] for start in range(3))
    filters = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp_min(0)
    empty = (filters.amax(dim=1) == 0).nonzero().flatten().tolist()
    if empty:
        first = empty[0]
        raise KdlibError(
            f"{len(empty)} of {coefficients} mel bands hold no FFT bin, the first is band {first} from "
            f"{edges[first]:.1f} to {edges[first + 2]:.1f} Hz, with a bin each {rate / length:.1f} Hz (rate {rate} Hz, "
            f"window {length} samples). Take fewer coefficients or a longer window."
        )
    return filters


def band_blocks(filters: Tensor, size: int = 16) -> list[tuple[slice, slice]]:
    """Return, for each ``size`` neighbouring bands, which bands they are and which bins they touch.

    Args:
        filters: (coefficients, bins), as :func:`mel_filters` returns them.
        size: bands a block.

    Example:
        >>> band_blocks(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 1.0]]), size=1)
        [(slice(0, 1, None), slice(0, 1, None)), (slice(1, 2, None), slice(1, 3, None))]
    """
    blocks = []
    for start in range(0, filters.shape[0], size):
        bands = slice(start, min(start + size, filters.shape[0]))
        touched = filters[bands].any(dim=0).nonzero().flatten()
        blocks.append((bands, slice(int(touched[0]), int(touched[-1]) + 1)))
    return blocks


def log_mel(
    samples: Tensor,
    window: Tensor,
    hop: int,
    filters: Tensor,
    blocks: Sequence[tuple[slice, slice]] | None = None,
) -> Tensor:
    """Return ``log(max(filters @ |rfft(window * frame)|^2, 1e-10))`` of each frame.

    Frames start at the first sample, without centring; zeros at the END make the last frame whole.

    Args:
        samples: (..., time), at least one.
        window: the window, whose length is the frame's and the FFT's.
        hop: samples from one frame to the next.
        filters: (coefficients, bins).
        blocks: of ``band_blocks``, to spare finding them anew.

    Returns:
        Natural logarithms of power, (..., frames, coefficients).

    Raises:
        BatchError: no samples.

    Source:
        Ours, to the shape of Heo et al. (2019), section 4.2.

    Example:
        >>> filters = mel_filters(16000, 1600, 64).float()
        >>> log_mel(torch.zeros(2, 16000), torch.hann_window(1600), 640, filters).shape
        torch.Size([2, 24, 64])
    """
    if samples.shape[-1] == 0:
        raise BatchError(f"A spectrogram takes at least 1 sample; this input is empty: {tuple(samples.shape)}.")
    length = window.shape[0]
    frames = frame_count(samples.shape[-1], length, hop)
    # A hop longer than the frame leaves samples after the last frame: then there is nothing to add.
    missing = max(0, (frames - 1) * hop + length - samples.shape[-1])
    framed = pad(samples, (0, missing)).unfold(-1, length, hop)
    spectrum = torch.fft.rfft(framed * window)
    power = spectrum.real.square() + spectrum.imag.square()
    # Block by block, because most of the weights are zero: an eighth of the time of one product with all filters.
    weights = filters.to(power.dtype)
    bands = [power[..., bins] @ weights[rows, bins].T for rows, bins in blocks or band_blocks(weights)]
    return torch.cat(bands, dim=-1).clamp_min(FLOOR).log()


def roll(x: Tensor, axis: int, generator: Generator) -> Tensor:
    """Return ``x`` turned round along one axis by a drawn number of steps, each equally likely."""
    return x.roll(_draw(x.shape[axis], generator), dims=axis)


def mask(x: Tensor, axis: int, count: int, width: float, generator: Generator) -> Tensor:
    """Return a copy of ``x`` with ``count`` stretches along one axis set to 0; they may overlap.

    Args:
        x: one item; all that is not ``axis`` is masked alike, so channels stay in step.
        axis: which axis.
        count: number of masks.
        width: largest width of a mask as a fraction of the axis; widths from 0 up are equally likely.
        generator: where the draws come from.

    Source:
        Park et al. (2019), "SpecAugment", section 2.
    """
    x = x.clone()
    steps = x.shape[axis]
    for _ in range(count):
        size = _draw(math.floor(width * steps) + 1, generator)
        x.narrow(axis, _draw(steps - size + 1, generator), size).zero_()
    return x


def _draw(choices: int, generator: Generator) -> int:
    return int(torch.randint(choices, (), generator=generator))


def _check(who: str, samples: Tensor) -> None:
    if samples.ndim not in (2, 3):
        raise BatchError(
            f"{who} takes (channels, samples) or (batch, channels, samples); this input has {samples.ndim} axes: "
            f"{tuple(samples.shape)}."
        )


class PreEmphasis(nn.Module):
    """Pre-emphasised samples, (channels, time) -> (channels, time - 1), or the same with a batch in front.

    ``y[t] = x[t + 1] - coefficient x[t]``, each channel by itself.

    Args:
        coefficient: 0 to 1 (ours: 0.97).
        roll: augmentation: turn the clip round by a drawn number of samples.
        time_masks: augmentation: number of masks along time, at least 0.
        time_width: largest width of a mask, a fraction of the length in (0, 1].

    Raises:
        BatchError: the input has not 2 or 3 axes, or fewer than two samples.

    Source:
        Heo et al. (2019), section 4.2. The augmentations are ours and off by default.

    Example:
        >>> PreEmphasis()(torch.zeros(2, 480000)).shape
        torch.Size([2, 479999])
    """

    time_axis: int = -1

    def __init__(
        self,
        *,
        coefficient: Annotated[float, Field(ge=0, le=1)] = 0.97,
        roll: bool = False,
        time_masks: Annotated[int, Field(ge=0)] = 0,
        time_width: Annotated[float, Field(gt=0, le=1)] = 0.1,
    ) -> None:
        super().__init__()
        self.coefficient = coefficient
        self.roll = roll
        self.time_masks = time_masks
        self.time_width = time_width

    def forward(self, samples: Tensor) -> Tensor:
        """Return the pre-emphasised samples, one fewer."""
        _check("PreEmphasis", samples)
        return pre_emphasis(samples, self.coefficient)

    @property
    def augments(self) -> bool:
        """Whether :meth:`augment` changes anything."""
        return self.roll or self.time_masks > 0

    def augment(self, x: Tensor, generator: Generator) -> Tensor:
        """Return another view of one item (channels, time), a function of the item and the generator's state."""
        if self.roll:
            x = roll(x, -1, generator)
        return mask(x, -1, self.time_masks, self.time_width, generator) if self.time_masks else x


class Spectrogram(nn.Module):
    """Log-mel spectrograms, (channels, time) -> (channels, frames, coefficients), or with a batch in front.

    ``frames = 1 + ceil((time - window) / hop)``; each coefficient has mean 0 and variance 1 over the training part once
    :meth:`fit` has seen it: ``(log_mel - mean) / scale``. Both are buffers and are saved with the module.

    Args:
        rate: samples a second, in Hz (from the data).
        coefficients: number of mel bands, at least 1.
        window: length of a frame and of its FFT in seconds, above 0.
        hop: from one frame to the next in seconds, above 0.
        mel: the mel scale, ``htk`` or ``slaney``.
        pre_emphasis: coefficient of a pre-emphasis before the frames, 0 (off) to 1.
        standardise: False leaves log-mel as it is, and :meth:`fit` has nothing to do.
        level: ``remove`` subtracts each clip's own mean over channels, frames and coefficients, so that loudness is no
            cue (exact where no band is at the floor of 1e-10); ``keep`` does not.
        roll: augmentation: turn the clip round by a drawn number of frames.
        time_masks: augmentation: number of masks along time, at least 0. Masks are 0: the mean, when standardised.
        time_width: largest width of a time mask, a fraction of the frames in (0, 1].
        frequency_masks: augmentation: number of masks along frequency, at least 0.
        frequency_width: largest width of a frequency mask, a fraction of the coefficients in (0, 1].

    Raises:
        BatchError: the input has not 2 or 3 axes, or is empty.
        KdlibError: a mel band holds no FFT bin, the window or hop is shorter than a sample, or statistics are missing.

    Source:
        Heo et al. (2019), section 4.2: 256 coefficients from 100 ms every 40 ms, 249 frames for 10 s. The mel scale,
        the periodic Hann window, power, the floor, the zeros at the end, statistics, ``level`` and augmentation are
        ours: the paper does not say.

    Example:
        >>> features = Spectrogram(rate=16000, coefficients=64)
        >>> clips = torch.randn(3, 2, 16000, generator=torch.Generator().manual_seed(0))
        >>> features.fit(clips)(clips).shape
        torch.Size([3, 2, 24, 64])
    """

    time_axis: int = -2
    hann: Tensor
    filters: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        rate: Annotated[int, Field(ge=1)],
        coefficients: Annotated[int, Field(ge=1)] = 256,
        window: Annotated[float, Field(gt=0)] = 0.100,
        hop: Annotated[float, Field(gt=0)] = 0.040,
        mel: MelScale = "htk",
        pre_emphasis: Annotated[float, Field(ge=0, le=1)] = 0.0,
        standardise: bool = True,
        level: Literal["keep", "remove"] = "keep",
        roll: bool = False,
        time_masks: Annotated[int, Field(ge=0)] = 0,
        time_width: Annotated[float, Field(gt=0, le=1)] = 0.1,
        frequency_masks: Annotated[int, Field(ge=0)] = 0,
        frequency_width: Annotated[float, Field(gt=0, le=1)] = 0.1,
    ) -> None:
        super().__init__()
        self.rate = rate
        self.coefficients = coefficients
        self.window = window
        self.hop = hop
        self.mel = mel
        self.pre_emphasis = pre_emphasis
        self.standardise = standardise
        self.level = level
        self.roll = roll
        self.time_masks = time_masks
        self.time_width = time_width
        self.frequency_masks = frequency_masks
        self.frequency_width = frequency_width
        length = round(window * rate)
        self.hop_length = round(hop * rate)
        if min(length, self.hop_length) < 1:
            raise KdlibError(f"A window of {window} s or a hop of {hop} s is shorter than a sample at {rate} Hz.")
        filters = mel_filters(rate, length, coefficients, mel).float()
        self.blocks = band_blocks(filters)
        # Made from the settings, so not saved.
        self.register_buffer("hann", torch.hann_window(length, dtype=torch.float64).float(), persistent=False)
        self.register_buffer("filters", filters, persistent=False)
        # NaN says "not fitted", also after loading the state of a module that was not fitted.
        unknown = torch.full((coefficients,), torch.nan) if standardise else None
        self.register_buffer("mean", unknown)
        self.register_buffer("scale", None if unknown is None else unknown.clone())

    @torch.no_grad()
    def fit(self, clips: Iterable[Tensor]) -> Self:
        """Take mean and variance of each coefficient over channels, frames and clips, in float64.

        A coefficient that does not vary keeps a scale of 1.

        Args:
            clips: samples of the training part, each (channels, time) or (B, channels, time), any lengths.

        Raises:
            KdlibError: there is no clip, or one has samples that are not finite.
        """
        if not self.standardise:
            return self
        count = 0
        mean = torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(mean)
        for number, clip in enumerate(clips):
            rows = self._log_mel(clip).double().flatten(end_dim=-2)
            # Statistics of a clip are merged into those so far (Chan et al. 1983): no difference of large sums.
            step = rows.mean(dim=0) - mean
            if not step.isfinite().all():
                raise KdlibError(
                    f"Clip {number} of the training part (counted from 0) has samples that are not finite."
                )
            new = len(rows)
            squares += (rows - rows.mean(dim=0)).square().sum(dim=0) + step.square() * (count * new / (count + new))
            mean += step * (new / (count + new))
            count += new
        if count == 0:
            raise KdlibError("Spectrogram.fit got no clip: the training part is empty.")
        variance = squares / count
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(variance > 1e-10, variance.sqrt(), 1.0))
        return self

    def forward(self, samples: Tensor) -> Tensor:
        """Return the spectrograms, (..., channels, frames, coefficients)."""
        if not self.standardise:
            return self._log_mel(samples)
        if self.scale.isnan().any():
            raise KdlibError(
                "Spectrogram has no statistics: call fit(clips) with the training part first, load a saved state, or "
                "set standardise=False."
            )
        return (self._log_mel(samples) - self.mean) / self.scale

    @property
    def augments(self) -> bool:
        """Whether :meth:`augment` changes anything."""
        return self.roll or self.time_masks > 0 or self.frequency_masks > 0

    def augment(self, x: Tensor, generator: Generator) -> Tensor:
        """Return another view of one item (channels, frames, coefficients), set by the item and the generator."""
        if self.roll:
            x = roll(x, -2, generator)
        if self.time_masks:
            x = mask(x, -2, self.time_masks, self.time_width, generator)
        if self.frequency_masks:
            x = mask(x, -1, self.frequency_masks, self.frequency_width, generator)
        return x

    def _log_mel(self, samples: Tensor) -> Tensor:
        _check("Spectrogram", samples)
        if self.pre_emphasis:
            samples = pre_emphasis(samples, self.pre_emphasis)
        x = log_mel(samples, self.hann, self.hop_length, self.filters, self.blocks)
        return x - x.mean(dim=(-3, -2, -1), keepdim=True) if self.level == "remove" else x
