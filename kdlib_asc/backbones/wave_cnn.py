"""The raw-waveform network (Heo et al. 2019, Table 2)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from kdlib import BatchError
from kdlib_asc.backbones._channels_last import Conv, Norm, Pool, Windows
from kdlib_asc.backbones._common import EMBEDDING, SLOPE, check_input, end, scaled, through
from kdlib_asc.junctions import Junction

STEM = 12
POOL = 3
STRIDE = STEM * POOL**7
"""Samples a frame, 26244; also the shortest input."""
# The stem's windows do not overlap. Where d steps before a junction depend on its other side, a block's two
# convolutions make it d + 2 and its pool ceil((d + 2) / 3): 1 from d = 0 and from d = 1, so 1 frame after seven blocks,
# and 1 after the junction likewise. Backwards, a block's steps a to b see 3 a - 2 to 3 b + 4 of the block before: a
# frame sees 2186 of the stem's steps before its own 2187 and 2186 after them. So the window has 2 frames before the
# junction, and 2 less one step of the stem after it.
JUNCTION = Junction(stride=STRIDE, left=1, right=1, before=2 * STRIDE, after=2 * STRIDE - STEM)


class WaveBlock(nn.Module):
    """One row Res1 to Res7 of Table 2: a residual block that ends with a maximum over 3 steps.

    ``pool(LeakyReLU(norm2(conv2(LeakyReLU(norm1(conv1(x))))) + shortcut(x)))``, (B, C, T) -> (B, C', T // 3). The
    shortcut is the identity, or a 1x1 convolution without batch norm where the channels change (ours; the paper gives
    the kernel size 3 only).
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = Conv(before, after, 3, padding=1)
        self.norm1 = Norm(after)
        self.conv2 = Conv(after, after, 3, padding=1)
        self.norm2 = Norm(after)
        self.shortcut = nn.Identity() if before == after else Conv(before, after, 1)
        self.pool = Pool(POOL)
        self.activation = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (B, C', T // 3)."""
        residual = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        # LeakyReLU rises everywhere, so it may follow the maximum: the same values from a third of the work.
        y: Tensor = self.activation(self.pool(residual + self.shortcut(x)))
        return y


class WaveCNN(nn.Module):
    """The residual network on raw waveforms, ``(B, channels, samples) -> {"logits": (B, K), "embedding": (B, 64)}``.

    ======  =============================================  ==================================
    row     what                                           output for 479999 samples, width 1
    ======  =============================================  ==================================
    conv1   Conv1d 12, stride 12; batch norm; LeakyReLU    64 x 39999
    res1    block with MaxPool1d(3)                        64 x 13333
    res2    the same, as all that follow                   128 x 4444
    res3                                                   128 x 1481
    res4                                                   128 x 493
    res5                                                   128 x 164
    res6                                                   128 x 54
    res7                                                   128 x 18
    (head)  maximum over time                              128
    dense1  128 -> 64, the embedding                       64
    output  64 -> classes                                  10
    ======  =============================================  ==================================

    From the paper: the rows, their shapes and kernel sizes, the global maximum, ten classes. Ours, because the paper
    does not say: LeakyReLU(0.3), the batch norm of the stem, the inside of a block, its pooling (no other place gives
    Table 2's lengths), a linear embedding, biases everywhere, torch's default initialisation and batch norm. At width
    1 with two channels and ten classes there are 613,770 parameters and about 2.8 GMAC a clip of 10 s at 48 kHz.

    The layers' memory holds the channels of one step side by side (channels_last), whatever the layout of the training:
    with bf16 a step takes 0.26 to 0.40 of what the same weights take as Conv1d in fp32, by the allocator. The values
    are the same up to rounding.

    One frame covers 26244 samples, so ``encode`` returns ``samples // 26244`` frames and any length from one frame up
    will do.

    Args:
        classes: number of classes, at least 2.
        channels: channels of the audio, at least 1.
        width: factor on the numbers of channels, above 0 (rounded, at least 4 channels); the embedding stays 64.
        activate_embedding: put a LeakyReLU(0.3) on the embedding.
        checkpoint_activations: in training keep only what goes into each row from conv1 to res7 and compute the rest
            again in the backward: 0.6 of the memory of a training in fp32, more time, and the same results.

    Raises:
        BatchError: the input has another number of axes or channels, or fewer than 26244 samples.

    Source:
        Heo, Jung, Shim, Yu (2019), "Acoustic scene classification using teacher-student learning with soft-labels",
        Table 2.

    Example:
        >>> import torch
        >>> network = WaveCNN(classes=10).eval()
        >>> sum(parameter.numel() for parameter in network.parameters())
        613770
        >>> taps = network(torch.zeros(1, 2, 2 * 26244))
        >>> {name: tuple(tap.shape) for name, tap in taps.items()}
        {'logits': (1, 10), 'embedding': (1, 64)}
    """

    junction = JUNCTION

    def __init__(
        self,
        *,
        classes: Annotated[int, Field(ge=2)],
        channels: Annotated[int, Field(ge=1)] = 2,
        width: Annotated[float, Field(gt=0)] = 1.0,
        activate_embedding: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.channels = channels
        self.width = width
        self.activate_embedding = activate_embedding
        self.checkpoint_activations = checkpoint_activations
        narrow, wide = scaled(64, width), scaled(128, width)
        self.conv1 = nn.Sequential(Windows(channels, narrow, STEM, stride=STEM), Norm(narrow), nn.LeakyReLU(SLOPE))
        self.res1 = WaveBlock(narrow, narrow)
        self.res2 = WaveBlock(narrow, wide)
        self.res3 = WaveBlock(wide, wide)
        self.res4 = WaveBlock(wide, wide)
        self.res5 = WaveBlock(wide, wide)
        self.res6 = WaveBlock(wide, wide)
        self.res7 = WaveBlock(wide, wide)
        self.dense1 = nn.Linear(wide, EMBEDDING)
        self.output = nn.Linear(EMBEDDING, classes)

    def encode(self, x: Tensor) -> Tensor:
        """Return the frames of a batch, (B, channels, samples) -> (B, samples // 26244, D)."""
        check_input("WaveCNN", x, self.channels, "samples")
        if x.shape[-1] < STRIDE:
            raise BatchError(
                f"WaveCNN takes at least {STRIDE} samples ({STRIDE / 48000:.2f} s at 48 kHz); this input has "
                f"{x.shape[-1]}: {tuple(x.shape)}. Pad or join the clips, or use a higher sample rate."
            )
        rows = (self.conv1, self.res1, self.res2, self.res3, self.res4, self.res5, self.res6, self.res7)
        return through(rows, x, checkpoint_activations=self.checkpoint_activations).transpose(1, 2)

    def head(self, frames: Tensor) -> dict[str, Tensor]:
        """Return the taps of frames (B, frames, D): maximum over time, Dense1, Output."""
        return end(frames.amax(dim=1), self.dense1, self.output, activate=self.activate_embedding)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": (B, K), "embedding": (B, 64)}``, which is ``head(encode(x))``."""
        return self.head(self.encode(x))
