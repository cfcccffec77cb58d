"""Layers on sequences (batch, channels, time) whose memory holds the channels of one step side by side.

Torch's convolutions of one dimension always lay time out innermost, where bf16 gains nothing. The same weights as a
convolution of height 1 keep what ``channels_last`` keeps for images, so each layer here looks at its sequence as such
an image; shapes, parameters and their names stay those of ``Conv1d``, ``BatchNorm1d`` and ``MaxPool1d``. The layout is
in the strides alone: :class:`Windows` begins it, and elementwise functions hand it on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm, conv2d, linear, max_pool2d

from kdlib import BatchError

BLOCK = 2048
"""Steps whose squares are summed before the sum is added to the others'."""


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
    """Batch normalisation, in training on the CPU in float32 by statistics that are summed in blocks.

    In this layout torch's own adds up all steps of a batch one by one there: of 320,000 steps four digits of a variance
    are left, and outputs are 2e-5 from those of ``BatchNorm1d``. In shorter types that is below their rounding.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Let the image through."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, T) of (B, C, T)."""
        if not (self.training and x.is_cpu and x.dtype == torch.float32):
            return super().forward(x.unsqueeze(2)).squeeze(2)
        rows = x.detach().transpose(1, 2).flatten(0, 1)
        if len(rows) < 2:
            raise BatchError("batch norm in training wants more than one step; this batch has one clip of one step.")
        mean = rows.mean(0)
        var = torch.stack([(block - mean).square_().sum(0) for block in torch.split(rows, BLOCK)]).sum(0) / len(rows)
        with torch.no_grad():
            self._remember(mean, var * (len(rows) / (len(rows) - 1)))
        image = x.unsqueeze(2)
        y: Tensor = _Normalised.apply(image, self.weight, self.bias, mean, var, self.eps)  # type: ignore[no-untyped-call]
        return y.squeeze(2)

    def _remember(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards a batch's, as torch does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)


class _Normalised(Function):
    """Batch norm of an image by given statistics of it; the gradient is that through the statistics, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.eps = eps
        return batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        known = (x, weight, None, None, mean, inverse, True, ctx.eps, wanted)
        return (*torch.ops.aten.native_batch_norm_backward(gradient, *known), None, None, None)


class Pool(nn.MaxPool1d):
    """The maximum of every ``kernel_size`` steps."""

    kernel_size: int

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, T // size) of (B, C, T)."""
        return max_pool2d(x.unsqueeze(2), (1, self.kernel_size)).squeeze(2)
