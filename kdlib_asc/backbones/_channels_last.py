"""Layers on sequences (batch, channels, time) whose memory holds the channels of one step side by side.

Torch's convolutions of one dimension always lay time out innermost, where bf16 gains nothing. The same weights as a
convolution of height 1 keep what ``channels_last`` keeps for images, so each layer here looks at its sequence as such
an image; shapes, parameters and their names stay those of ``Conv1d``, ``BatchNorm1d`` and ``MaxPool1d``. The layout is
in the strides alone: :class:`Windows` begins it, and elementwise functions hand it on.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, max_pool2d


class Windows(nn.Conv1d):
    """A convolution whose windows do not overlap (stride = kernel size, no padding), as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', T // size) of (B, C, T)."""
        size = self.kernel_size[0]
        steps = x.shape[-1] // size
        windows = x[..., : steps * size].reshape(*x.shape[:2], steps, size).transpose(1, 2)
        return linear(windows.flatten(2), self.weight.flatten(1), self.bias).transpose(1, 2)


class Conv(nn.Conv1d):
    """A convolution of one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', T) of (B, C, T)."""
        stride, padding = (1, self.stride[0]), (0, int(self.padding[0]))
        return conv2d(x.unsqueeze(2), self.weight.unsqueeze(2), self.bias, stride, padding).squeeze(2)


class Norm(nn.BatchNorm1d):
    """Batch normalisation."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Let the image through."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, T) of (B, C, T)."""
        return super().forward(x.unsqueeze(2)).squeeze(2)


class Pool(nn.MaxPool1d):
    """The maximum of every ``kernel_size`` steps."""

    kernel_size: int

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, T // size) of (B, C, T)."""
        return max_pool2d(x.unsqueeze(2), (1, self.kernel_size)).squeeze(2)
