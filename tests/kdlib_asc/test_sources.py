"""The teacher that hears several segments: what it hears with each clip, and where they are joined."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib.taps import teachers_in
from kdlib.testing import check_source
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN
from kdlib_asc.partners import partners
from kdlib_asc.points import HiddenMse
from kdlib_asc.sources import MultiSegment

LABELS = [2, 0, 1, 1, 0, 2, 2, 0, 1, 1, 0, 2, 0]  # 5, 4 and 4 clips
CLASSES = ("bus", "park", "tram")
PLACES = [str(clip // 5) for clip in range(len(LABELS))]  # each class has two clips of one place


class Tagged:
    """A data part whose clip ``i`` is the constant ``start + i``, and 1000 (epoch + 1) more where it is augmented."""

    def __init__(self, labels=LABELS, shape=(1, 4), *, start=0, augmented=True, time_axis=-1):
        self.labels = np.array(labels)
        self.groups = PLACES[: len(labels)]
        self.ids = [f"clip{start + index}" for index in range(len(labels))]
        self.classes = CLASSES
        self.shape = shape
        self.start = start
        self.augmented = augmented
        self.time_axis = time_axis

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        epoch, index = key
        view = 1000 * (epoch + 1) if self.augmented and epoch != kdlib.CLEAN else 0
        x = torch.full(self.shape, float(self.start + index + view))
        return {"x": x, "y": int(self.labels[index]), "index": index, "epoch": epoch}


class Noise(Tagged):
    """The same with noise instead of constants; an augmented clip is turned round in time."""

    def __getitem__(self, key):
        epoch, index = key
        x = torch.randn(self.shape, generator=kdlib.keyed(0, index))
        if self.augmented == "turned" and epoch != kdlib.CLEAN:
            x = x.roll(1 + epoch + index, self.time_axis)
        return super().__getitem__(key) | {"x": x}


class Ears(nn.Module):
    """Returns what it hears, and counts the clips that it encodes."""

    def __init__(self):
        super().__init__()
        self.encoded = 0

    def encode(self, x):
        self.encoded += len(x)
        return x.transpose(1, 2)

    def head(self, frames):
        return {"heard": frames[..., 0]}

    def forward(self, x):
        return {"heard": x[:, 0]}


def hearing(part, *, batch=4, workers=0, epochs=(0,), **settings):
    """Yield each row of each epoch: its number, its class, what the student gets, and what the teacher hears."""
    source = MultiSegment(kdlib.freeze(Ears()), part, **settings)
    loader = kdlib.Loader(source.dataset(part), batch=batch, workers=workers)
    for epoch in epochs:
        for rows in loader.epoch(epoch):
            heard = source(rows)["heard"].unflatten(1, (-1, 4))
            assert (heard == heard[..., :1]).all()  # segments follow one another whole
            for row in range(len(rows["y"])):
                mine = int(rows["x"][row].unique())
                yield epoch, int(rows["index"][row]), int(rows["y"][row]), mine, heard[row, :, 0].int().tolist()


JOINS = pytest.mark.parametrize("join", ["input", "frames"])


# who is heard


@JOINS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmented", [False, True])
def test_rows_are_aligned_and_the_base_comes_first(join, workers, augmented):
    part = Tagged(augmented=augmented)
    rows = list(hearing(part, segments=4, join=join, workers=workers, epochs=(0, 1, 2)))
    assert len(rows) == 3 * len(LABELS)
    assert [index for _, index, *_ in rows] != [*range(len(LABELS))] * 3  # shuffled
    for epoch, index, label, mine, heard in rows:
        view = 1000 * (epoch + 1) if augmented else 0
        clips = [value - view for value in heard]
        assert (mine, label, len(clips)) == (index + view, LABELS[index], 4)
        assert clips[0] == index, "the base is not first"
        assert [LABELS[clip] for clip in clips] == [label] * 4, "a partner is of another class"
        assert len(set(clips)) == 4, "a clip is joined with itself, or a partner repeats"


@JOINS
def test_partners_are_those_of_the_table_of_the_epoch(join):
    part = Tagged(augmented=False)
    for epoch, index, *_, heard in hearing(part, segments=3, join=join, seed=7, epochs=(5, 2, 6)):
        assert heard[1:] == partners(part.labels, part.groups, 3, 7, epoch)[index].tolist()


def test_workers_bring_the_same_batches_as_this_process():
    here, there = (list(hearing(Tagged(), segments=3, workers=workers, epochs=(0, 1))) for workers in (0, 2))
    assert here == there


def test_items_may_be_asked_for_in_any_order_of_epochs():
    data = MultiSegment(kdlib.freeze(Ears()), Tagged(), segments=3).dataset(Tagged())
    first = {key: data[key]["partners"] for key in ((0, 1), (1, 1), (0, 2), (3, 2))}
    assert all(torch.equal(data[key]["partners"], first[key]) for key in reversed(first))


@JOINS
def test_partners_are_drawn_anew_each_epoch(join):
    seen = {}
    for _, index, *_, heard in hearing(Tagged(augmented=False), join=join, epochs=range(30)):
        seen.setdefault(index, set()).add(heard[1])
    assert all(
        seen[index] == {other for other, label in enumerate(LABELS) if label == LABELS[index] and other != index}
        for index in range(len(LABELS))
    )


@JOINS
def test_in_training_from_the_training_part_only(join):
    train, test = Tagged(augmented=False), Tagged(start=500, augmented=False)
    source = MultiSegment(kdlib.freeze(Ears()), train, segments=4, join=join)
    for part, start in ((train, 0), (test, 500)):  # a validation part is wrapped by the same source
        for epoch in (0, 1, 2, kdlib.CLEAN):
            for rows in kdlib.Loader(source.dataset(part), batch=5).epoch(epoch):
                heard = source(rows)["heard"]
                assert ((heard >= start) & (heard < start + len(LABELS))).all()


@JOINS
def test_validation_is_the_same_each_time(join):
    part = Tagged()
    first, again = (list(hearing(part, join=join, epochs=(kdlib.CLEAN,))) for _ in range(2))
    assert first == again
    assert all(max(heard) < len(LABELS) for *_, heard in first)  # clean


@JOINS
def test_elsewhere_joins_other_places_only(join):
    for *_, heard in hearing(Tagged(augmented=False), segments=3, join=join, elsewhere=True, epochs=range(5)):
        assert PLACES[heard[0]] not in {PLACES[clip] for clip in heard[1:]}


@JOINS
def test_repeat_fills_up_a_class_that_is_too_small(join):
    rows = hearing(Tagged([0, 0, 1], augmented=False), segments=4, join=join, repeat=True, epochs=(0,))
    assert sorted((index, sorted(heard)) for _, index, *_, heard in rows) == [
        (0, [0, 1, 1, 1]),
        (1, [0, 0, 0, 1]),
        (2, [2, 2, 2, 2]),
    ]


# which view of it


@JOINS
def test_the_same_view_is_the_students_and_partners_are_augmented_as_in_that_epoch(join):
    for epoch, _, _, mine, heard in hearing(Tagged(), segments=3, join=join, view="same", epochs=(0, 4)):
        assert heard[0] == mine
        assert [value // 1000 for value in heard] == [epoch + 1] * 3


@JOINS
def test_the_clean_view_is_without_augmentation_while_the_student_gets_its_own(join):
    for epoch, index, _, mine, heard in hearing(Tagged(), segments=3, join=join, view="clean", epochs=(0, 4)):
        assert mine == index + 1000 * (epoch + 1)
        assert heard[0] == index
        assert max(heard) < len(LABELS)


@JOINS
@pytest.mark.parametrize("view", ["same", "clean"])
def test_where_nothing_is_augmented_the_views_are_one(join, view):
    plain = list(hearing(Tagged(augmented=False), join=join))
    assert list(hearing(Tagged(augmented=False), join=join, view=view)) == plain


# where segments are joined, with the real networks

WAVE, SPECTROGRAM = (2, 26244 + 600), (2, 13, 24)
NETWORKS = [(WaveCNN, WAVE, -1), (SpectrogramCNNGRU, SPECTROGRAM, -2)]
BOTH = pytest.mark.parametrize(("network", "shape", "axis"), NETWORKS)


def frozen(network):
    torch.manual_seed(0)
    return kdlib.freeze(network(classes=3, width=0.1))


def batch_of(source, part, rows=6, epoch=3):
    return next(iter(kdlib.Loader(source.dataset(part), batch=rows).epoch(epoch)))


def segments_of(part, batch, segments, *, clean):
    """The segments of each row, base first, as the table says: a list of (B, ...)."""
    epoch = int(batch["epoch"][0])
    table = partners(part.labels, part.groups, segments, 0, epoch)
    view = kdlib.CLEAN if clean else epoch
    index = batch["index"].numpy()
    columns = [index, *(table[index, column] for column in range(segments - 1))]
    return [torch.stack([part[view, clip]["x"] for clip in column.tolist()]) for column in columns]


def assert_equal_taps(found, expected, close=None):
    assert set(found) == set(expected) == {"logits", "embedding"}
    for name, tap in expected.items():
        if close is None:
            assert torch.equal(found[name], tap), name
        else:
            torch.testing.assert_close(found[name], tap, rtol=close, atol=close)


@BOTH
@pytest.mark.parametrize("view", ["same", "clean"])
def test_joined_inputs_are_the_inputs_concatenated_on_the_time_axis(network, shape, axis, view):
    part, teacher = Noise(shape=shape, augmented="turned", time_axis=axis), frozen(network)
    source = MultiSegment(teacher, part, segments=3, join="input", view=view)
    batch = batch_of(source, part)
    by_hand = torch.cat(segments_of(part, batch, 3, clean=view == "clean"), dim=axis)
    assert by_hand.shape[axis] == 3 * shape[axis]
    assert_equal_taps(source(batch), teacher(by_hand))


def test_the_time_axis_may_be_set():
    part, teacher = Noise(shape=SPECTROGRAM, time_axis=-1), frozen(SpectrogramCNNGRU)
    source = MultiSegment(teacher, part, time_axis=-2)
    batch = batch_of(source, part)
    assert_equal_taps(source(batch), teacher(torch.cat(segments_of(part, batch, 2, clean=False), dim=-2)))


@BOTH
@pytest.mark.parametrize("view", ["same", "clean"])
def test_joined_frames_are_the_encoded_segments_concatenated(network, shape, axis, view):
    part, teacher = Noise(shape=shape, augmented="turned", time_axis=axis), frozen(network)
    source = MultiSegment(teacher, part, segments=3, join="frames", view=view)
    batch = batch_of(source, part)
    each = [teacher.encode(segment) for segment in segments_of(part, batch, 3, clean=view == "clean")]
    # the batch that a clip is encoded in sways its frames by a last bit or two
    assert_equal_taps(source(batch), teacher.head(torch.cat(each, dim=1)), close=1e-5)


@BOTH
def test_kept_frames_and_frames_made_online_agree(network, shape, axis):
    teacher = frozen(network)
    taps = []
    for augmented in (False, True):  # true, but the views of Noise are all the same: online
        part = Noise(shape=shape, augmented=augmented, time_axis=axis)
        source = MultiSegment(teacher, part, segments=3, join="frames")
        taps.append(source(batch_of(source, part)))
    assert_equal_taps(*taps, close=1e-5)


@BOTH
def test_another_order_of_the_segments_is_another_teacher_for_the_network_with_a_memory(network, shape, axis):
    part, teacher = Noise(shape=shape, time_axis=axis), frozen(network)
    source = MultiSegment(teacher, part, segments=2, join="frames")
    batch = batch_of(source, part)
    frames = [teacher.encode(segment) for segment in segments_of(part, batch, 2, clean=False)]
    turned = teacher.head(torch.cat(frames[::-1], dim=1))["embedding"]
    assert torch.allclose(source(batch)["embedding"], turned, atol=1e-4) == (network is WaveCNN)


@BOTH
@JOINS
@pytest.mark.parametrize("augmented", ["turned", False])
def test_one_segment_is_the_same_input(network, shape, axis, join, augmented):
    part, teacher = Noise(shape=shape, augmented=augmented, time_axis=axis), frozen(network)
    source = MultiSegment(teacher, part, segments=1, join=join)
    kept = join == "frames" and not augmented  # encoded in another batch
    for rows in (1, 3, 6):
        batch = batch_of(source, part, rows)
        assert_equal_taps(source(batch), kdlib.SameInput(teacher)(batch), close=1e-5 if kept else None)


def test_one_segment_will_do_with_a_class_of_one_clip():
    rows = hearing(Tagged([0, 1, 1]), segments=1)
    assert sorted((index, *heard) for _, index, *_, heard in rows) == [(0, 1000), (1, 1001), (2, 1002)]


@BOTH
@JOINS
@pytest.mark.parametrize("augmented", ["turned", False])
def test_it_is_a_source(network, shape, axis, join, augmented):
    part = Noise(shape=shape, augmented=augmented, time_axis=axis)
    source = MultiSegment(frozen(network), part, segments=3, join=join)
    check_source(source, batch_of(source, part))


# what is computed how often


@pytest.mark.parametrize(
    ("augmented", "view", "expected"), [(False, "same", 13), (True, "clean", 13), (True, "same", 2 * 13 * 3)]
)
def test_frames_that_do_not_change_are_encoded_once(augmented, view, expected):
    part, ears = Tagged(augmented=augmented), Ears()
    source = MultiSegment(kdlib.freeze(ears), part, segments=3, join="frames", view=view)
    loader = kdlib.Loader(source.dataset(part), batch=4)
    for _ in range(2):
        for batch in loader:
            source(batch)
    assert ears.encoded == expected


# the wrapped part


@pytest.mark.parametrize("setting", [{"join": "frame"}, {"view": "Clean"}])
def test_another_word_for_a_setting_is_refused(setting):
    with pytest.raises(kdlib.KdlibError, match="is unknown"):
        MultiSegment(kdlib.freeze(Ears()), Tagged(), **setting)


@JOINS
@pytest.mark.parametrize("augmented", [False, True])
def test_the_wrapped_part_pickles_and_holds_no_teacher(join, augmented):
    class Local(Ears):  # cannot be pickled: it is no attribute of a module
        pass

    part = kdlib.TensorPart(torch.arange(13.0)[:, None, None].expand(13, 1, 4), LABELS, groups=PLACES)
    part.augmented = augmented
    data = MultiSegment(kdlib.freeze(Local()), part, segments=2, join=join, time_axis=-1).dataset(part)
    assert not list(teachers_in(data))
    twin = pickle.loads(pickle.dumps(data))
    for key in ((0, 3), (2, 12), (kdlib.CLEAN, 0)):
        item, other = data[key], twin[key]
        assert set(item) == set(other)
        assert all(torch.equal(torch.as_tensor(item[name]), torch.as_tensor(other[name])) for name in item)


def test_the_wrapped_part_is_a_part_that_keeps_what_is_known_of_the_clips():
    part = Tagged()
    data = MultiSegment(kdlib.freeze(Ears()), part).dataset(part)
    assert isinstance(data, kdlib.DataPart)
    assert len(data) == len(part)
    assert (list(data.ids), list(data.groups), data.labels.tolist()) == (part.ids, part.groups, LABELS)
    item, own = data[2, 3], part[2, 3]
    assert {name: item[name] for name in ("y", "index", "epoch")} == {"y": 1, "index": 3, "epoch": 2}
    assert torch.equal(item["x"], own["x"])


def test_wrapping_leaves_the_part_and_its_items_alone():
    part = Tagged(augmented=False)
    before = dict(vars(part))
    data = MultiSegment(kdlib.freeze(Ears()), part, join="frames").dataset(part)
    assert data[0, 0].keys() > part[0, 0].keys() == {"x", "y", "index", "epoch"}
    assert vars(part) == before


# under a distiller


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 64)

    def forward(self, x):
        return {"embedding": self.layer(x[..., :1].mean(1))}


class Pair(Small):
    """A teacher with frames: its embedding is the mean over everything that it hears."""

    def encode(self, x):
        return x.mean(1).unsqueeze(-1)

    def head(self, frames):
        return {"embedding": self.layer(frames.mean(1))}

    def forward(self, x):
        return self.head(self.encode(x))


def made(teacher=None, part=None, **settings):
    torch.manual_seed(0)
    part = Tagged() if part is None else part
    teacher = Pair() if teacher is None else teacher
    return kdlib.Distiller(Small(), MultiSegment(kdlib.freeze(teacher), part, **settings), hidden=HiddenMse())


@JOINS
@pytest.mark.parametrize("view", ["same", "clean"])
def test_fit_trains_with_it_and_workers_change_nothing(join, view):
    trained = []
    for workers in (0, 2):
        distiller = made(segments=3, join=join, view=view)
        start = distiller.student.layer.weight.clone()
        kdlib.fit(distiller, Tagged(), valid=Tagged(start=500), epochs=2, batch=4, workers=workers, progress=False)
        trained.append(distiller.student.layer.weight)
        assert not torch.equal(trained[-1], start)
    assert torch.equal(*trained)


@JOINS
@pytest.mark.parametrize("valid", [False, True])
def test_a_class_that_is_too_small_is_noticed_before_training(join, valid):
    small = Tagged([0, 1, 1, 0, 2, 1, 0])
    train, other = (Tagged(), small) if valid else (small, None)
    distiller = made(segments=2, join=join)
    events = []
    before = distiller.student.layer.weight.clone()
    with pytest.raises(kdlib.DataError, match="Class 'tram' has 1 clips, and 2 are needed"):
        kdlib.fit(distiller, train, valid=other, epochs=1, callbacks=[events.append], progress=False)
    assert not events
    assert torch.equal(distiller.student.layer.weight, before)


@pytest.mark.parametrize("data", [None, kdlib.TensorPart(torch.zeros(2, 1, 4), [0, 0])])
def test_without_a_time_axis_it_is_an_error(data):
    with pytest.raises(kdlib.KdlibError, match="time_axis"):
        MultiSegment(kdlib.freeze(Pair()), data)


def test_a_teacher_that_is_not_frozen_is_refused_and_says_how():
    with pytest.raises(kdlib.TapError, match=r"kdlib\.freeze"):
        MultiSegment(Pair(), Tagged())


@pytest.mark.parametrize("augmented", [False, True])
def test_a_teacher_without_encode_and_head_cannot_join_frames(augmented):
    part = Tagged(augmented=augmented)
    distiller = made(kdlib.Tapped(nn.Linear(4, 64), embedding=""), part, join="frames")
    with pytest.raises(kdlib.TapError, match=r"no method 'encode'.*join inputs"):
        distiller(next(iter(kdlib.Loader(distiller.source.dataset(part), batch=4))))
    with pytest.raises(kdlib.KdlibError, match="no method 'encode'"):
        kdlib.fit(distiller, part, epochs=1, progress=False)


def test_a_batch_without_partners_says_who_misses_them():
    distiller = made()
    with pytest.raises(kdlib.BatchError, match=r"(?i)source \(MultiSegment\).*no 'partners'"):
        distiller(next(iter(kdlib.Loader(Tagged(), batch=4))))


@JOINS
@pytest.mark.parametrize("augmented", [False, True])
def test_nothing_of_the_teacher_changes_or_joins_the_distiller(join, augmented):
    part = Tagged(augmented=augmented)
    distiller = made(part=part, segments=2, join=join)
    teacher = distiller.source.teacher.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    kdlib.fit(distiller, part, epochs=2, batch=4, progress=False)
    distiller.train()
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "step"}
