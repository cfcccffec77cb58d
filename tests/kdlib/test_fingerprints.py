"""By what a network is known again."""

import copy

import pytest
import torch
from torch import nn

import kdlib
from kdlib.fingerprints import network_of, source_of
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN


class Scaled(nn.Module):
    """A layer with settings that neither its weights nor its repr show."""

    def __init__(self, factor=2.0, names=("a", "b")):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.factor = factor
        self.names = names
        self.function = torch.relu  # no plain data

    def forward(self, x):
        return self.layer(x) * self.factor


@pytest.mark.parametrize("network", [WaveCNN, SpectrogramCNNGRU])
def test_a_setting_that_changes_no_weight_makes_another_network(network):
    torch.manual_seed(0)
    plain = network(classes=3, width=0.1)
    other = network(classes=3, width=0.1, activate_embedding=True)
    other.load_state_dict(plain.state_dict())
    assert repr(plain) == repr(other)
    found, changed = (kdlib.freeze(copy.deepcopy(model)).made_of() for model in (plain, other))
    assert {key for key in found if found[key] != changed[key]} == {"structure"}
    assert kdlib.freeze(copy.deepcopy(plain)).made_of() == found


def test_attributes_deep_inside_count_and_what_is_no_plain_data_or_changes_by_itself_does_not():
    one = nn.Sequential(Scaled(), nn.ReLU())
    assert network_of(one) == network_of(copy.deepcopy(one).eval())
    assert network_of(nn.Sequential(Scaled(3.0), nn.ReLU()))["structure"] != network_of(one)["structure"]
    assert network_of(nn.Sequential(Scaled(names=["a"]), nn.ReLU()))["structure"] != network_of(one)["structure"]


def test_the_code_is_that_of_all_modules_but_torchs():
    alone, inside = network_of(Scaled())["source"], network_of(nn.Sequential(Scaled(), nn.ReLU()))["source"]
    assert alone == inside
    assert network_of(nn.Linear(3, 2))["source"] != alone
    assert source_of(Scaled) != source_of(kdlib.Tapped)


def test_taps_are_told_beside_the_network_that_they_are_read_off():
    net = Scaled()
    bare, tapped = kdlib.freeze(net).made_of(), kdlib.freeze(kdlib.Tapped(net, logits="", inner="layer")).made_of()
    assert tapped["taps"] == {"logits": "", "inner": "layer"}
    assert {key for key in bare if bare[key] != tapped[key]} == {"taps"}


def test_a_store_of_another_setting_of_the_teacher_is_refused(tmp_path):
    from kdlib.storing import build_store

    part = kdlib.TensorPart(torch.randn(4, 3), [0, 1, 0, 1])
    net = Scaled()
    build_store(kdlib.SameInput(kdlib.freeze(kdlib.Tapped(net, logits=""))), part, tmp_path)
    net.factor = 5.0
    with pytest.raises(kdlib.DataError, match="structure"):
        build_store(kdlib.SameInput(kdlib.freeze(kdlib.Tapped(net, logits=""))), part, tmp_path)


class Bare(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.zeros(3), 0


def test_what_a_plain_data_set_lacks_for_a_store_is_said_at_once(tmp_path):
    from kdlib.data import as_part
    from kdlib.storing import build_store

    source = kdlib.SameInput(kdlib.freeze(kdlib.Tapped(nn.Linear(3, 2), logits="")))
    for part in (Bare(), as_part(Bare())):
        with pytest.raises(kdlib.DataError, match=r"Bare lacks ids, labels, groups, fingerprint\..*made_by"):
            build_store(source, part, tmp_path)
