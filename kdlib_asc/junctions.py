"""The frames of joined inputs from the frames of each: only those around a junction are computed anew."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdlib import BatchError


@dataclass(frozen=True)
class Junction:
    """How far a junction of two inputs reaches into the frames of a network, as its attribute ``junction``.

    The inputs are cut to whole frames, so that a frame lies on one side. Alone, an input is followed and preceded by
    zeros at every layer; joined, by the other. Frames further from the junction than ``left`` and ``right`` are the
    same either way, and those up to there are what the network makes of the window of ``before`` and ``after`` steps.

    Args:
        stride: steps of the input (samples, or frames of a spectrogram) to one frame of the network.
        left: frames before the junction that depend on what comes after it.
        right: frames after the junction that depend on what comes before it.
        before: steps before the junction from which these frames are computed, a multiple of ``stride``.
        after: steps after it.

    Source:
        Ours.

    Example:
        >>> import torch
        >>> junction = Junction(stride=1, left=1, right=1, before=2, after=2)  # of a convolution with kernel size 3
        >>> conv = torch.nn.Conv1d(1, 1, 3, padding=1).requires_grad_(False)
        >>> one, other = torch.randn(1, 1, 9), torch.randn(1, 1, 9)
        >>> frames = torch.stack([conv(one), conv(other)], dim=1).transpose(2, 3)  # (B, inputs, frames, D)
        >>> window = torch.cat([junction.tail(one, -1), junction.head(other, -1)], dim=-1)
        >>> joined = junction.mended(frames, conv(window).mT[:, None])
        >>> torch.allclose(joined.mT, conv(torch.cat([one, other], dim=-1)), atol=1e-6)
        True
    """

    stride: int
    left: int
    right: int
    before: int
    after: int

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """Return the input without the steps at its end that fill no frame.

        Raises:
            BatchError: nothing is left.
        """
        steps = x.shape[axis]
        if steps < self.stride:
            raise BatchError(f"Segments are cut to whole frames of {self.stride} steps; this one has {steps} in all.")
        return x.narrow(axis, 0, steps - steps % self.stride)

    def fits(self, x: Tensor, axis: int) -> bool:
        """Tell whether an input is so long that a window reaches over one junction only."""
        return x.shape[axis] >= max(self.before, self.after)

    def tail(self, x: Tensor, axis: int) -> Tensor:
        """Return the end of an input, the part of the window before the junction."""
        return x.narrow(axis, x.shape[axis] - self.before, self.before)

    def head(self, x: Tensor, axis: int) -> Tensor:
        """Return the beginning of an input, the part of the window after the junction."""
        return x.narrow(axis, 0, self.after)

    def mended(self, frames: Tensor, windows: Tensor) -> Tensor:
        """Return the frames of the joined inputs, (B, S * F, D).

        Args:
            frames: of each input alone, (B, S, F, D).
            windows: frames of the window around each junction, (B, S - 1, frames, D).
        """
        middle = self.before // self.stride
        around = windows[:, :, middle - self.left : middle + self.right]
        frames = frames.clone()
        frames[:, :-1, frames.shape[2] - self.left :] = around[:, :, : self.left]
        frames[:, 1:, : self.right] = around[:, :, self.left :]
        return frames.flatten(1, 2)
