"""Cross-fitted teachers that hear several segments: every segment is of a recording that the teacher has not heard."""

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib.sources.cross_fit import CrossFit
from kdlib.testing import check_source
from kdlib_asc.points import HiddenMse
from kdlib_asc.sources import MultiSegment

JOINS = pytest.mark.parametrize("join", ["input", "frames"])
LENGTH = 5


class Mean(nn.Module):
    """A network whose embedding is the mean over everything that it hears, times a weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def encode(self, x):
        return self.weight * x.mT

    def head(self, frames):
        return {"embedding": frames.mean(1)}

    def forward(self, x):
        return self.head(self.encode(x))


def numbered(rows, start=0, augmented=False):
    """Clips (1, 5) that are constant and tell their number; recordings of two, classes of many."""
    x = torch.arange(start, start + rows).float()[:, None, None].expand(rows, 1, LENGTH)
    labels, names = np.arange(rows) // 2 % 2, range(start, start + rows)
    part = kdlib.TensorPart(x, labels, groups=[f"g{name // 2}" for name in names], ids=list(map(str, names)))
    part.time_axis, part.classes, part.augmented = -1, ("bus", "tram"), augmented
    return part


def made(part, join, segments=2, parts=2):
    inner = [MultiSegment(kdlib.freeze(Mean(k + 1.0)), part, segments=segments, join=join) for k in range(parts)]
    return CrossFit(inner, part)


@JOINS
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_a_teacher_hears_only_recordings_that_it_was_not_trained_on(join, augmented, segments):
    part = numbered(32, augmented=augmented)
    source = made(part, join, segments)
    for epoch in range(2):
        batch = next(kdlib.Loader(source.dataset(part), batch=32).epoch(epoch))
        check_source(source, batch)
        embedding = source(batch)["embedding"][:, 0]
        for row, index in enumerate(batch["index"].tolist()):
            fold = int(source.folds[index])
            assert int(batch["cross_fit"][row]) == fold
            heard = batch["frames"][row].flatten() / (fold + 1) if "frames" in batch else batch["x"][row].flatten()
            if segments > 1 and "partners" in batch:
                heard = torch.cat([heard, batch["partners"][row].flatten()])
            clips = sorted({round(value) for value in heard.tolist()})
            assert index in clips
            assert len(clips) == segments
            assert all(source.folds[clip] == fold and part.labels[clip] == part.labels[index] for clip in clips)
            torch.testing.assert_close(embedding[row], (fold + 1) * heard.mean())


@JOINS
def test_a_held_out_part_gets_the_mean_of_the_teachers(join):
    part, other = numbered(32), numbered(16, start=100)
    source = made(part, join)
    batch = next(kdlib.Loader(source.dataset(other), batch=16, shuffle=False).epoch(kdlib.CLEAN))
    check_source(source, batch)
    alone = MultiSegment(kdlib.freeze(Mean(1.5)), other, segments=2, join=join)  # 1.5 is the mean of 1 and 2
    expected = alone(next(kdlib.Loader(alone.dataset(other), batch=16, shuffle=False).epoch(kdlib.CLEAN)))
    torch.testing.assert_close(source(batch)["embedding"], expected["embedding"])


@JOINS
def test_a_part_with_too_few_clips_of_a_class_is_noticed_before_training(join):
    part = numbered(32)
    with pytest.raises(kdlib.DataError, match="Class 'bus' has 8 clips, and 9 are needed"):
        made(part, join, segments=9).dataset(part)


@JOINS
@pytest.mark.parametrize("augmented", [False, True])
def test_fit_trains_with_it_and_workers_change_nothing(join, augmented):
    part, valid, trained = numbered(32, augmented=augmented), numbered(8, start=100), []
    for workers in (0, 2):
        student = Mean(0.5)
        one = kdlib.Distiller(student, made(part, join), hidden=HiddenMse())
        kdlib.fit(one, part, valid=valid, epochs=2, batch=8, lr=1e-2, workers=workers, progress=False)
        trained.append(float(student.weight.detach()))
    assert trained[0] == trained[1] > 0.5
