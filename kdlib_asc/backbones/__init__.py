"""The two networks of Heo et al. (2019): ``x -> {"logits", "embedding"}``, as ``head(encode(x))``."""

from kdlib_asc.backbones.spectrogram_cnn_gru import SpectrogramCNNGRU
from kdlib_asc.backbones.wave_cnn import WaveCNN

__all__ = ["SpectrogramCNNGRU", "WaveCNN"]
