"""What the teacher makes of clips by segments: it is drawn of the source's own taps, and the figures are right."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.metrics import silhouette_samples
from torch import nn

import kdlib
from kdlib.figures import attempt, save
from kdlib_asc.figures import segments_figure, separation
from kdlib_asc.sources import MOST_SEGMENTS, SHOWN, MultiSegment

CLASSES = ("bus", "$park_", "tram")


class Clips:
    """Noise around a level a class, (1, 8) each."""

    def __init__(self, labels, *, places=4):
        self.labels = np.array(labels)
        self.ids = [f"clip{number}" for number in range(len(labels))]
        self.groups = [str(number % places) for number in range(len(labels))]
        self.classes = CLASSES
        self.time_axis = -1
        self.augmented = False

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        epoch, index = key
        x = torch.randn(1, 8, generator=kdlib.keyed(0, index)) + 0.3 * float(self.labels[index])
        return {"x": x, "y": int(self.labels[index]), "index": index, "epoch": epoch}


class Ears(nn.Module):
    """Mean, spread and largest value of what is heard; frames are the samples."""

    def encode(self, x):
        return x.transpose(1, 2)

    def head(self, frames):
        heard = torch.cat([frames.mean(1), frames.std(1), frames.amax(1)], dim=1)
        return {"embedding": heard, "logits": heard}

    def forward(self, x):
        return self.head(self.encode(x))


class Mute(Ears):
    def head(self, frames):
        return {"logits": frames.mean(1)}


def panels(source, part, monkeypatch):
    """Return what is given to be drawn."""
    drawn = []
    monkeypatch.setattr("kdlib_asc.sources.segments_figure", lambda *given: drawn.append(given))
    assert set(source.pictures(part)) == {"segments"}
    return drawn[0]


def test_separation_is_the_mean_silhouette():
    points = np.random.default_rng(0).normal(size=(20, 64))
    labels = np.arange(20) % 2
    points[labels == 1] += 0.5
    assert separation(points, labels) == pytest.approx(silhouette_samples(points, labels).mean())


@pytest.mark.parametrize("join", ["input", "frames"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_each_panel_has_the_taps_of_the_source_with_that_many_segments(join, elsewhere, monkeypatch):
    part = Clips([0, 2] * 9)
    settings = {"join": join, "elsewhere": elsewhere, "seed": 3}
    source = MultiSegment(kdlib.freeze(Ears()), part, segments=2, **settings)
    embeddings, labels, names = panels(source, part, monkeypatch)
    order = np.argsort(part.labels, kind="stable")
    assert labels.tolist() == part.labels[order].tolist()
    assert list(names) == ["bus", "tram"]
    for segments, embedding in enumerate(embeddings, start=1):
        other = MultiSegment(kdlib.freeze(Ears()), part, segments=segments, **settings)
        loader = kdlib.Loader(other.dataset(part), batch=len(part), shuffle=False)
        (taps,) = [other(batch) for batch in loader.epoch(kdlib.CLEAN)]
        np.testing.assert_allclose(embedding, taps["embedding"].numpy()[order], rtol=1e-6)
    assert source.segments == 2


@pytest.mark.parametrize(("labels", "most"), [([0] * 9 + [1] * 4, 4), ([0, 1] * 9, MOST_SEGMENTS), ([0, 0, 1, 1], 2)])
def test_segments_go_as_far_as_the_smaller_class_has_clips(labels, most, monkeypatch):
    part = Clips(labels)
    for repeat in (False, True):
        source = MultiSegment(kdlib.freeze(Ears()), part, segments=9, repeat=repeat)
        assert len(panels(source, part, monkeypatch)[0]) == most


def test_a_class_of_one_clip_gives_no_picture():
    part = Clips([0, 0, 0, 1])
    assert MultiSegment(kdlib.freeze(Ears()), part).pictures(part) == {}


@pytest.mark.parametrize("join", ["input", "frames"])
def test_a_clip_that_cannot_be_read_is_no_end_of_the_segments(join, monkeypatch):
    def unread(*_):
        raise kdlib.DataError("clip3.wav: is cut short")

    part = Clips([0, 1] * 3)
    monkeypatch.setattr(Clips, "__getitem__", unread)
    with pytest.raises(kdlib.DataError, match="cut short"):
        MultiSegment(kdlib.freeze(Ears()), part, join=join).pictures(part)


def test_a_large_part_is_thinned_evenly(monkeypatch):
    part = Clips([0] * 250 + [1] * 30)
    embeddings, labels, _ = panels(MultiSegment(kdlib.freeze(Ears()), part), part, monkeypatch)
    assert np.bincount(labels).tolist() == [84, 30]  # every third
    assert max(map(len, embeddings)) <= 2 * SHOWN


def test_a_teacher_without_embedding_is_told():
    part = Clips([0, 1] * 3)
    with pytest.raises(kdlib.TapError, match="no embedding to draw, only logits"):
        MultiSegment(kdlib.freeze(Mute()), part).pictures(part)


@pytest.mark.parametrize("clips", [2, 3, 12])
def test_the_picture_has_a_panel_a_number_of_segments_and_the_separation_in_the_embedding(clips, monkeypatch):
    part = Clips([0, 1] * clips)
    source = MultiSegment(kdlib.freeze(Ears()), part)
    embeddings, labels, names = panels(source, part, monkeypatch)
    figure = segments_figure(embeddings, labels, names)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") or axes.get_title() for axes in shown] == [
        f"{number} segment{'s' if number > 1 else ''}: silhouette {separation(embedding, labels):.2f}"
        for number, embedding in enumerate(embeddings, start=1)
    ]
    for axes in shown:  # all points in grey, then each class of this panel
        assert [len(points.get_offsets()) for points in axes.collections] == [len(embeddings) * 2 * clips, clips, clips]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["bus", "$park_"]


def test_odd_names_do_not_break_the_picture(tmp_path):
    part = Clips([0, 1] * 6)
    part.classes = ("$x_1$ $", "_🎷 " * 20)
    with attempt("the picture"):
        save(MultiSegment(kdlib.freeze(Ears()), part).pictures(part)["segments"], tmp_path / "s.png")
    picture = imread(tmp_path / "s.png")[..., :3]
    assert 500 < min(picture.shape[:2]) < max(picture.shape[:2]) < 3000
    assert picture.std() > 0.02


def test_the_same_clips_give_the_same_picture_and_no_random_state_is_used():
    part = Clips([0, 1] * 6)
    source = MultiSegment(kdlib.freeze(Ears()), part)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = (source.pictures(part)["segments"].axes[0].collections[0].get_offsets() for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
