"""Scores of several systems made one: aligned by name, weighted, normalised."""

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.svm import SVC

import kdlib
from kdlib.fusion import Scores, fuse
from kdlib_asc.scoring import Svm

IDS = tuple(f"clip-{number}" for number in range(6))
CLASSES = ("airport", "bus", "park")


def scores(seed, ids=IDS, classes=CLASSES, **more):
    return Scores(ids, classes, np.random.default_rng(seed).normal(size=(len(ids), len(classes))), **more)


def shuffled(of, seed):
    """The same scores with rows and columns in another order."""
    draw = np.random.default_rng(seed)
    rows, columns = draw.permutation(len(of.ids)), draw.permutation(len(of.classes))
    return Scores(
        tuple(of.ids[row] for row in rows),
        tuple(of.classes[column] for column in columns),
        of.values[np.ix_(rows, columns)],
        of.spread,
    )


def test_the_fusion_is_the_mean():
    one, two = scores(1), scores(2)
    fused = fuse({"one": one, "two": two})
    np.testing.assert_allclose(fused.values, (one.values + two.values) / 2, rtol=0, atol=1e-15)
    assert (fused.ids, fused.classes) == (IDS, CLASSES)


@pytest.mark.parametrize("normalise", ["none", "z", "log_softmax"])
def test_the_order_of_clips_and_classes_does_not_matter(normalise):
    one, two = scores(1, spread=(0.5, 2.0)), scores(2, spread=(-1.0, 0.1))
    straight = fuse({"one": one, "two": two}, normalise=normalise)
    turned = fuse({"one": one, "two": shuffled(two, 3)}, normalise=normalise)
    np.testing.assert_allclose(turned.values, straight.values, rtol=0, atol=1e-15)
    assert turned.ids == IDS
    other = fuse({"one": shuffled(one, 4), "two": two}, normalise=normalise)
    np.testing.assert_allclose(other.aligned(IDS, CLASSES), straight.values, rtol=0, atol=1e-15)


def test_weights_are_shares_and_1_where_none_is_named():
    one, two, three = scores(1), scores(2), scores(3)
    fused = fuse({"one": one, "two": two, "three": three}, weights={"one": 2, "three": 0})
    np.testing.assert_allclose(fused.values, (2 * one.values + two.values) / 3, rtol=0, atol=1e-15)
    same = fuse({"one": one, "two": two}, weights={"one": 10, "two": 10})
    np.testing.assert_allclose(same.values, fuse({"one": one, "two": two}).values, rtol=0, atol=1e-15)


def test_z_uses_what_the_training_part_showed():
    one, two = scores(1, spread=(0.5, 2.0)), scores(2, spread=(-1.0, 0.1))
    fused = fuse({"one": one, "two": two}, normalise="z")
    np.testing.assert_allclose(fused.values, ((one.values - 0.5) / 2 + (two.values + 1) / 0.1) / 2, atol=1e-13)


def test_z_of_scores_that_do_not_vary_is_finite():
    flat = Scores(IDS, CLASSES, np.zeros((6, 3)), (0.0, 0.0))
    assert np.isfinite(fuse({"flat": flat, "two": scores(2)}, normalise="z").values).all()


def test_log_softmax_makes_rows_log_probabilities():
    one, two = scores(1), scores(2)
    fused = fuse({"one": one, "two": two}, normalise="log_softmax")
    expected = (log_softmax(one.values, axis=1) + log_softmax(two.values, axis=1)) / 2
    np.testing.assert_allclose(fused.values, expected, atol=1e-14)
    large = fuse({"one": Scores(IDS, CLASSES, 1e4 * one.values)}, normalise="log_softmax")
    np.testing.assert_allclose(large.values, log_softmax(1e4 * one.values, axis=1), atol=1e-8)


def test_one_system_alone_is_itself():
    np.testing.assert_array_equal(fuse({"one": scores(1)}).values, scores(1).values)


def test_the_scores_that_come_in_are_not_changed():
    one, two = scores(1), scores(2)
    for normalise in ("none", "z", "log_softmax"):
        fuse({"one": one, "two": two}, normalise=normalise)
    np.testing.assert_array_equal(one.values, scores(1).values)
    np.testing.assert_array_equal(two.values, scores(2).values)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (scores(2, ids=(*IDS[:5], "clip-9")), ["clips", "clip-5", "clip-9"]),
        (scores(2, ids=IDS[:5]), ["clips", "clip-5"]),
        (scores(2, ids=(*IDS, "clip-9")), ["clips", "clip-9"]),
        (scores(2, ids=(*IDS[:5], "clip-0")), ["clips", "clip-5"]),
        (scores(2, ids=(*IDS, "clip-0")), ["clips", "clip-0"]),
        (scores(2, classes=("airport", "bus", "tram")), ["classes", "park", "tram"]),
        (scores(2, classes=("airport", "bus")), ["classes", "park"]),
        (scores(2, classes=("airport", "bus", "park", "bus")), ["classes", "bus"]),
    ],
)
def test_clips_and_classes_that_are_not_the_same_are_refused_with_an_example(other, words):
    with pytest.raises(kdlib.KdlibError) as caught:
        fuse({"one": scores(1), "two": other})
    for word in words:
        assert word in str(caught.value)


def test_weights_that_are_all_0_are_refused():
    with pytest.raises(kdlib.KdlibError, match=r"fusion\.weights"):
        fuse({"one": scores(1), "two": scores(2)}, weights={"one": 0, "two": 0})


def test_the_fusion_of_machines_is_the_mean_of_scikit_learns_decisions():
    """Two machines on other embeddings of the same clips, each with classes and clips in its own order."""
    draw = np.random.default_rng(0)
    labels = draw.integers(4, size=80)
    names = np.array(["tram", "bus", "park", "airport"])
    ids = np.array([f"clip-{number}" for number in range(80)])
    first = draw.normal(size=(80, 5)) + 0.7 * labels[:, None]
    second = draw.normal(size=(80, 7)) - 0.5 * labels[:, None] ** 2
    renumbered = np.array([2, 0, 3, 1])  # the second machine counts the classes otherwise
    their_names = names[np.argsort(renumbered)]
    order = draw.permutation(80)

    one = Svm().fit(first[:50], labels[:50])
    two = Svm(c=2.0).fit(second[:50], renumbered[labels[:50]])
    test = np.arange(50, 80)
    turned = order[np.isin(order, test)]
    fused = fuse(
        {
            "one": Scores(tuple(ids[test]), tuple(names[one.classes_]), one.scores(first[test])),
            "two": Scores(
                tuple(ids[turned]),
                tuple(their_names[two.classes_]),
                two.scores(second[turned]),
            ),
        }
    )

    expected = 0
    for embeddings, numbers, own, c in ((first, labels, names, 1.0), (second, renumbered[labels], their_names, 2.0)):
        machine = SVC(C=c, decision_function_shape="ovr", break_ties=True).fit(embeddings[:50], numbers[:50])
        columns = [own[machine.classes_].tolist().index(name) for name in fused.classes]
        expected = expected + machine.decision_function(embeddings[test])[:, columns] / 2
    np.testing.assert_allclose(fused.aligned(tuple(ids[test]), fused.classes), expected, atol=1e-10)
