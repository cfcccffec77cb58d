"""Versions: of what is installed."""

import torch

from kdlib.versions import versions


def test_what_is_not_installed_is_left_out():
    assert versions("torch", "no-such-package") == {"torch": torch.__version__}
