"""The table of partners: who is joined to whom, in which epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib import CLEAN, DataError
from kdlib_asc.partners import partners

LABELS = np.array([2, 0, 2, 2, 0, 0, 2, 0, 2, 0, 0])  # 6 clips of class 0, 5 of class 2, none of class 1
ANYWHERE = [""] * len(LABELS)

seeds = st.integers(0, 2**31)
epochs = st.integers(CLEAN, 10_000)


@st.composite
def scenes(draw, *, least=1):
    """Labels in any order with at least ``least`` clips a class, and a number of segments that each class allows."""
    sizes = draw(st.dictionaries(st.integers(0, 40), st.integers(least, 9), min_size=1, max_size=5))
    labels = draw(st.permutations([label for label, size in sizes.items() for _ in range(size)]))
    return np.array(labels), draw(st.integers(1, min(sizes.values())))


def table(labels=LABELS, segments=4, seed=0, epoch=0, groups=None, **settings):
    return partners(labels, [""] * len(labels) if groups is None else groups, segments, seed, epoch, **settings)


# the rule


@settings(database=None, deadline=None)
@given(scenes(), seeds, epochs)
def test_the_rules_hold_for_any_labels_and_segments(scene, seed, epoch):
    labels, segments = scene
    drawn = table(labels, segments, seed, epoch)
    everybody = np.arange(len(labels))
    assert drawn.shape == (len(labels), segments - 1)
    assert drawn.dtype == np.int64
    assert (labels[drawn] == labels[:, None]).all(), "a partner is of another class"
    assert (drawn != everybody[:, None]).all(), "a clip is its own partner"
    assert all(len(set(row)) == segments - 1 for row in drawn.tolist()), "a row's partners repeat"
    assert all(sorted(column) == everybody.tolist() for column in drawn.T.tolist()), "a clip serves not once a column"


@settings(database=None, deadline=None)
@given(scenes(least=2), seeds, epochs)
def test_partner_s_stands_s_places_on_in_one_circle_a_class(scene, seed, epoch):
    labels, _ = scene
    segments = int(np.unique(labels, return_counts=True)[1].min())
    drawn = table(labels, segments, seed, epoch)
    following = drawn[:, 0]
    for column in range(1, segments - 1):
        assert np.array_equal(drawn[:, column], following[drawn[:, column - 1]])
    for label in np.unique(labels):
        members = set(np.flatnonzero(labels == label).tolist())
        walked, clip = set(), min(members)
        while clip not in walked:
            walked.add(clip)
            clip = int(following[clip])
        assert walked == members


def test_one_segment_is_a_table_without_columns():
    assert table(segments=1).shape == (11, 0)


def test_one_segment_asks_nothing_of_a_class_of_one_clip():
    assert table(np.array([0, 1, 1]), 1).shape == (3, 0)


def test_as_many_segments_as_clips_joins_the_whole_class():
    drawn = table(np.zeros(4, dtype=np.int64), 4)
    assert [{clip, *row} for clip, row in enumerate(drawn.tolist())] == [{0, 1, 2, 3}] * 4


@pytest.mark.parametrize("segments", [0, -1])
def test_no_segment_is_an_error(segments):
    with pytest.raises(DataError, match=f"at least 1, not {segments}"):
        table(segments=segments)


# chance


@settings(database=None, deadline=None)
@given(scenes(), seeds, epochs)
def test_a_function_of_seed_and_epoch_that_leaves_the_random_state_alone(scene, seed, epoch):
    labels, segments = scene
    torch.manual_seed(seed % 7)
    before = torch.get_rng_state()
    first = table(labels, segments, seed, epoch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1 + seed % 5)
    table(labels, segments, seed + 1, epoch + 1)
    assert np.array_equal(table(labels, segments, seed, epoch), first)


def test_epochs_differ_and_seeds_differ():
    labels = np.repeat([0, 1], 8)
    tables = {table(labels, 2, seed, epoch).tobytes() for seed in range(5) for epoch in range(CLEAN, 9)}
    assert len(tables) == 50


def test_every_pair_of_a_class_is_joined_in_some_epoch():
    seen = {(clip, int(row[0])) for epoch in range(60) for clip, row in enumerate(table(np.zeros(5, int), 2, 0, epoch))}
    assert seen == {(a, b) for a in range(5) for b in range(5) if a != b}


def test_places_make_no_difference_unless_asked_for():
    places = [str(clip % 3) for clip in range(len(LABELS))]
    assert np.array_equal(table(groups=places), table(groups=ANYWHERE))


# a class that is too small


def test_a_class_with_fewer_clips_than_segments_is_an_error_naming_it():
    with pytest.raises(DataError, match=r"Class '2' has 5 clips, and 6 are needed"):
        table(segments=6)


def test_the_class_is_named_by_its_name_if_that_is_given():
    with pytest.raises(DataError, match="Class 'tram' has 5 clips"):
        table(segments=6, classes=["bus", "park", "tram"])


@settings(database=None, deadline=None)
@given(scenes(), seeds, epochs)
def test_the_smallest_number_that_is_too_many_is_one_above_the_smallest_class(scene, seed, epoch):
    labels, _ = scene
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    table(labels, smallest, seed, epoch)
    with pytest.raises(DataError):
        table(labels, smallest + 1, seed, epoch)


def test_repeat_uses_clips_again_but_never_the_clip_itself():
    drawn = table(np.array([0, 0, 0, 1, 1]), 5, repeat=True)
    assert drawn.shape == (5, 4)
    for clip, row in enumerate(drawn.tolist()):
        others = {0, 1, 2} - {clip} if clip < 3 else {3, 4} - {clip}
        assert set(row) == others


def test_repeat_gives_a_class_of_one_the_clip_itself():
    assert table(np.array([0, 1, 1]), 3, repeat=True)[0].tolist() == [0, 0]


@settings(database=None, deadline=None)
@given(scenes(), seeds, epochs)
def test_repeat_changes_nothing_where_classes_are_large_enough(scene, seed, epoch):
    labels, segments = scene
    plain = table(labels, segments, seed, epoch)
    assert np.array_equal(table(labels, segments, seed, epoch, repeat=True), plain)


# from other places only

PLACES = ["a", "a", "b", "b", "c", "c", "c", "a", "b", "a", "b"]


@settings(database=None, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abcd")), min_size=1, max_size=24), seeds, epochs)
def test_other_group_joins_clips_of_the_class_from_other_places(clips, seed, epoch):
    labels = np.array([label for label, _ in clips])
    places = [place for _, place in clips]
    allowed = [
        {other for other, seen in enumerate(clips) if seen[0] == label and seen[1] != place} for label, place in clips
    ]
    segments = 1 + min(map(len, allowed))
    drawn = table(labels, segments, seed, epoch, places, other_group=True)
    assert drawn.shape == (len(clips), segments - 1)
    for row, among in zip(drawn.tolist(), allowed, strict=True):
        assert set(row) <= among, "a partner is of the same place or of another class"
        assert len(set(row)) == len(row), "a row's partners repeat"
    assert np.array_equal(table(labels, segments, seed, epoch, places, other_group=True), drawn)
    with pytest.raises(DataError, match="recorded elsewhere"):
        table(labels, segments + 1, seed, epoch, places, other_group=True)


def test_other_group_draws_anew_each_epoch_and_reaches_every_allowed_clip():
    labels, places = np.zeros(6, dtype=np.int64), ["a", "a", "a", "b", "c", "d"]
    tables = [table(labels, 2, 0, epoch, places, other_group=True) for epoch in range(60)]
    assert {int(drawn[0, 0]) for drawn in tables} == {3, 4, 5}
    assert {int(drawn[3, 0]) for drawn in tables} == {0, 1, 2, 4, 5}


def test_other_group_with_too_few_elsewhere_names_class_and_place():
    labels, places = np.zeros(4, dtype=np.int64), ["a", "a", "a", "b"]
    with pytest.raises(DataError, match=r"Class 'tram' has 1 clips recorded elsewhere than 'a', and 2 are needed"):
        table(labels, 3, 0, 0, places, other_group=True, classes=["tram"])


def test_other_group_with_repeat_uses_those_elsewhere_again():
    labels, places = np.zeros(4, dtype=np.int64), ["a", "a", "b", "b"]
    drawn = table(labels, 4, 0, 0, places, other_group=True, repeat=True)
    assert [set(row) for row in drawn.tolist()] == [{2, 3}, {2, 3}, {0, 1}, {0, 1}]


def test_other_group_with_nobody_elsewhere_is_an_error_that_repeat_cannot_mend():
    with pytest.raises(DataError, match="Class '0' has 0 clips recorded elsewhere than 'a'"):
        table(np.zeros(3, dtype=np.int64), 2, 0, 0, ["a", "a", "a"], other_group=True, repeat=True)
