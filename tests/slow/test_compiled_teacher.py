"""A teacher through torch's compiler for C++: all taps, for each size of batch."""

import shutil

import pytest
import torch

import kdlib
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN

NETWORKS = {
    SpectrogramCNNGRU: ((2, 25, 16), {"maps": "res2.norm2", "frames": "gru_layer[0]", "logits": "output"}),
    WaveCNN: ((2, 2 * 26244), {"maps": "res2.norm2", "logits": "output"}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when it loads its compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("network", NETWORKS)
def test_compiled_for_real_a_teacher_gives_the_taps_of_the_plain_one(network, table):
    shape, paths = NETWORKS[network]
    torch.manual_seed(0)
    tapped = kdlib.Tapped(network(classes=3, width=0.1), **paths)
    plain, fast = kdlib.freeze(tapped), kdlib.freeze(tapped, compile=True)
    short = kdlib.freeze(tapped, dtype=torch.bfloat16, layout="channels_last", compile=True)
    worst = 0.0
    for rows in (4, 4, 3, 1):
        x = torch.randn(rows, *shape)
        expected, found, rounded = plain(x), fast(x), short(x)
        assert list(found) == list(expected)
        for name, tap in expected.items():
            torch.testing.assert_close(found[name], tap, rtol=1e-4, atol=1e-5)
            assert (rounded[name] - tap).norm() / tap.norm() < 0.03
            worst = max(worst, float((found[name] - tap).abs().max()))
    torch._dynamo.reset()
    table(f"{network.__name__} compiled", f"taps within {worst:.1g} of those of the plain one", 4)
