"""The spectrogram network (Heo et al. 2019, Table 3)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from kdlib_asc.backbones._common import EMBEDDING, SLOPE, check_input, end, scaled, through
from kdlib_asc.junctions import Junction

STRIDE = 12
"""Frames of the spectrogram to one of the network: 2 * 2 * 3."""
# Steps before | after a junction that depend on its other side. A convolution of kernel size 3 adds one to each; with a
# stride s, step i sees s i - 1 to s i + 1, and d become floor((d + 1) / s) | ceil((d + 1) / s):
# conv1 3 | 3, res1 5 | 5, res2 (3 | 3) then 4 | 4, res3 (2 | 3) then 3 | 4, res4 (1 | 2) then 2 | 3.
# Backwards, step j of res4 sees 3 j - 4 to 3 j + 4 of res3, 6 j +- 11 of res2, 12 j +- 25 of res1 and 12 j +- 30 of the
# input, and steps -2 to 2 see -54 to 54: 54 frames before the junction, 60 in whole steps, and 55 after it.
JUNCTION = Junction(stride=STRIDE, left=2, right=3, before=60, after=55)


class SpectrogramBlock(nn.Module):
    """One row Res1 to Res4 of Table 3: a residual block whose first convolution has the row's stride.

    ``LeakyReLU(norm2(conv2(LeakyReLU(norm1(conv1(x))))) + shortcut(x))``, (B, C, F, K) -> (B, C', ceil(F / stride),
    ceil(K / stride)). The shortcut is the identity, or a 1x1 convolution of the same stride without batch norm (ours;
    the paper gives kernel size and stride only).
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(after)
        self.stride = stride
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1)
        self.activation = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (B, C', ceil(F / stride), ceil(K / stride))."""
        residual = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        # A 1x1 convolution with a stride, the stride taken first: with it inside the convolution, the backward of some
        # widths writes beyond its memory in channels_last (torch 2.13, CPU). A mean over one value takes every
        # stride-th as an index would, and its gradient keeps the layout: a fifth of a step.
        every = avg_pool2d(x, 1, self.stride) if self.stride > 1 else x
        y: Tensor = self.activation(residual + self.shortcut(every))
        return y


class SpectrogramCNNGRU(nn.Module):
    """The residual network and GRU on spectrograms.

    ``(B, channels, frames, coefficients) -> {"logits": (B, K), "embedding": (B, 64)}``

    =========  =================================================  ===================================
    row        what                                               output for 249 x 256, width 1
    =========  =================================================  ===================================
    conv1      Conv2d 7x7, padding 3; batch norm; LeakyReLU       30 x 249 x 256
    res1       block                                              30 x 249 x 256
    res2       block, stride 2                                    60 x 125 x 128
    res3       block, stride 2                                    120 x 63 x 64
    res4       block, stride 3                                    240 x 21 x 22
    (encode)   mean and maximum over frequency, concatenated      21 x 480
    gru_layer  GRU, one layer, one direction; its last step       480
    dense1     480 -> 64, the embedding                           64
    output     64 -> classes                                      10
    =========  =================================================  ===================================

    From the paper: the rows, their shapes, kernel sizes and strides, mean beside maximum, ten classes. Against the
    paper: Res4 has 240 channels; the table prints 120 there, but its pooling rows (240) and its concatenation (480)
    need 240. Ours, because the paper does not say: LeakyReLU(0.3), the inside of a block, a linear embedding, biases
    everywhere, torch's default initialisation, GRU and batch norm, and pooling over the whole frequency axis instead
    of a fixed 22, so that any number of frames and of coefficients will do. At width 1 with two channels and ten
    classes there are 2,497,464 parameters and about 3.2 GMAC a clip of 10 s.

    Training has two steps (paper, section 4.2). With ``gru=False`` this is the network of the first: mean and maximum
    over frequency *and* time (480) and layers ``cnn_dense1`` and ``cnn_output`` of its own (what replaces the GRU is
    ours). The rows up to res4 have the same names and shapes in both, the layers after them have other names, so
    carrying over every parameter of the same name and shape attaches a new GRU, Dense1 and Output to the trained CNN.

    Args:
        classes: number of classes, at least 2.
        channels: channels of the audio, at least 1.
        width: factor on the channels and on the GRU's size, above 0 (rounded, at least 4); the embedding stays 64.
        activate_embedding: put a LeakyReLU(0.3) on the embedding.
        gru: False for the CNN of the first training step.
        multiple: round channels and the GRU's size to multiples of this, 1 to 1024 (ours): with 32 Table 3's 30, 60,
            120 and 240 channels are 32, 64, 128 and 256, whose sums fill a processor's registers.
        checkpoint_activations: in training keep only what goes into each row from conv1 to res4 and compute the rest
            again in the backward: less memory, more time, and the same results.

    Raises:
        BatchError: the input has another number of axes or channels, or an empty axis.

    Source:
        Heo, Jung, Shim, Yu (2019), "Acoustic scene classification using teacher-student learning with soft-labels",
        Table 3.

    Example:
        >>> import torch
        >>> network = SpectrogramCNNGRU(classes=10).eval()
        >>> sum(parameter.numel() for parameter in network.parameters())
        2497464
        >>> network.encode(torch.zeros(1, 2, 25, 64)).shape
        torch.Size([1, 3, 480])
    """

    junction = JUNCTION

    def __init__(
        self,
        *,
        classes: Annotated[int, Field(ge=2)],
        channels: Annotated[int, Field(ge=1)] = 2,
        width: Annotated[float, Field(gt=0)] = 1.0,
        activate_embedding: bool = False,
        gru: bool = True,
        multiple: Annotated[int, Field(ge=1, le=1024)] = 1,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.channels = channels
        self.width = width
        self.activate_embedding = activate_embedding
        self.gru = gru
        self.multiple = multiple
        self.checkpoint_activations = checkpoint_activations
        c1, c2, c3, c4 = (scaled(size, width, multiple) for size in (30, 60, 120, 240))
        self.conv1 = nn.Sequential(nn.Conv2d(channels, c1, 7, padding=3), nn.BatchNorm2d(c1), nn.LeakyReLU(SLOPE))
        self.res1 = SpectrogramBlock(c1, c1, stride=1)
        self.res2 = SpectrogramBlock(c1, c2, stride=2)
        self.res3 = SpectrogramBlock(c2, c3, stride=2)
        self.res4 = SpectrogramBlock(c3, c4, stride=3)
        if gru:
            size = scaled(480, width, multiple)
            self.gru_layer = nn.GRU(2 * c4, size, batch_first=True)
            self.dense1 = nn.Linear(size, EMBEDDING)
            self.output = nn.Linear(EMBEDDING, classes)
        else:  # other names: Dense1 and Output are new when the GRU is attached, and weights carry over by name
            self.cnn_dense1 = nn.Linear(2 * c4, EMBEDDING)
            self.cnn_output = nn.Linear(EMBEDDING, classes)

    def encode(self, x: Tensor) -> Tensor:
        """Return the frames of a batch, (B, channels, F, K) -> (B, ceil(F / 12), D).

        The first half of D is the mean over frequency, the second half the maximum.
        """
        check_input("SpectrogramCNNGRU", x, self.channels, "frames", "coefficients")
        rows = (self.conv1, self.res1, self.res2, self.res3, self.res4)
        x = through(rows, x, checkpoint_activations=self.checkpoint_activations)
        return torch.cat((x.mean(dim=-1), x.amax(dim=-1)), dim=1).transpose(1, 2)

    def head(self, frames: Tensor) -> dict[str, Tensor]:
        """Return the taps of frames (B, frames, D): the GRU's last step (or both pools over time), Dense1, Output."""
        if self.gru:
            _, last = self.gru_layer(frames)
            return end(last[-1], self.dense1, self.output, activate=self.activate_embedding)
        mean, maximum = frames.chunk(2, dim=-1)
        pooled = torch.cat((mean.mean(dim=1), maximum.amax(dim=1)), dim=-1)
        return end(pooled, self.cnn_dense1, self.cnn_output, activate=self.activate_embedding)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": (B, K), "embedding": (B, 64)}``, which is ``head(encode(x))``."""
        return self.head(self.encode(x))
