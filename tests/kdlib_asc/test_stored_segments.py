"""Stored soft labels of the multi-segment teacher are those that it gives online."""

import pytest
import torch
from torch import nn

import kdlib
from kdlib.featured import Featured
from kdlib.sources import Stored
from kdlib.storing import build_store
from kdlib_asc.features import PreEmphasis
from kdlib_asc.sources import MultiSegment

ROWS = 13


class Ears(nn.Module):
    """A convolution whose taps depend on everything it hears, and on the order."""

    def __init__(self):
        super().__init__()
        self.filters = nn.Conv1d(2, 4, 9, stride=2)
        self.output = nn.Linear(4, 3)
        generator = kdlib.keyed(0, "ears")
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))

    def encode(self, x):
        return torch.tanh(self.filters(x)).transpose(1, 2)

    def head(self, frames):
        ramp = torch.linspace(0.5, 1, frames.shape[1]).unsqueeze(-1)
        embedding = (frames * ramp).mean(1)
        return {"logits": self.output(embedding), "embedding": embedding}

    def forward(self, x):
        return self.head(self.encode(x))


def part_of(augment=True):
    x = torch.randn(ROWS, 2, 200, generator=kdlib.keyed(0, "clips"))
    clips = kdlib.TensorPart(x, [row % 3 for row in range(ROWS)], classes=("bus", "park", "tram"))
    return Featured(clips, PreEmphasis(roll=True), classes=clips.classes, augment=augment)


@pytest.mark.parametrize("join", ["input", "frames"])
@pytest.mark.parametrize("view", ["same", "clean"])
@pytest.mark.parametrize("augment", [True, False])
def test_stored_targets_are_those_of_the_online_teacher_in_the_epochs_of_the_store(tmp_path, join, view, augment):
    part = part_of(augment)
    online = MultiSegment(kdlib.freeze(Ears()), part, segments=3, join=join, view=view, seed=4)
    build_store(online, part, tmp_path, views=3, batch=4)
    source, worst = Stored(folder=tmp_path), 0.0
    data = online.dataset(source.dataset(part))
    seen = []
    for epoch in (kdlib.CLEAN, 0, 1, 2):
        for batch in kdlib.Loader(data, batch=5, keyed=True).epoch(epoch):
            taps, wanted = source(batch), online(batch)
            assert taps.keys() == wanted.keys()
            worst = max(worst, *(float((taps[name] - wanted[name]).abs().max()) for name in taps))
            seen.append(taps["logits"][batch["index"] == 0])
    assert worst <= 1e-5
    assert len(torch.cat(seen).unique(dim=0)) > 1  # partners were drawn anew


def test_other_segments_are_another_store(tmp_path):
    part = part_of()
    for segments in (2, 3):
        source = MultiSegment(kdlib.freeze(Ears()), part, segments=segments)
        if segments == 2:
            build_store(source, part, tmp_path, batch=4)
            continue
        with pytest.raises(kdlib.DataError, match=r"source\.settings\.segments: there 2, here 3"):
            build_store(source, part, tmp_path, batch=4)
