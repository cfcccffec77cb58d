"""Accuracies and intervals against scikit-learn and scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as reference

from kdlib.metrics import confusion_matrix, macro_accuracy, wilson_interval


@pytest.fixture(params=[2, 5, 10])
def predictions(request):
    """Labels and predictions of which about half are right."""
    draw = np.random.default_rng(request.param)
    labels = np.concatenate([np.arange(request.param), draw.integers(request.param, size=97)])
    wrong = draw.integers(request.param, size=len(labels))
    return request.param, labels, np.where(draw.random(len(labels)) < 0.5, labels, wrong)


def test_the_confusion_matrix_is_that_of_scikit_learn(predictions):
    classes, labels, predicted = predictions
    matrix = confusion_matrix(labels, predicted, classes)
    np.testing.assert_array_equal(matrix, reference.confusion_matrix(labels, predicted, labels=range(classes)))
    assert matrix.dtype == np.int64
    assert matrix.trace() == reference.accuracy_score(labels, predicted, normalize=False)


def test_rows_are_true_classes_and_classes_that_do_not_occur_are_there():
    assert confusion_matrix(np.array([0, 0, 2]), np.array([2, 0, 2]), 4).tolist() == [
        [1, 0, 1, 0],
        [0, 0, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 0],
    ]


def test_macro_accuracy_is_the_balanced_accuracy_of_scikit_learn(predictions):
    classes, labels, predicted = predictions
    ours = macro_accuracy(confusion_matrix(labels, predicted, classes))
    assert ours == pytest.approx(reference.balanced_accuracy_score(labels, predicted), abs=1e-14)


def test_macro_accuracy_counts_each_class_once_however_large():
    assert macro_accuracy(np.array([[98, 0], [2, 0]])) == 0.5
    assert macro_accuracy(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 2]])) == pytest.approx((0.75 + 1) / 2)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 50), (50, 50), (1, 7), (80, 100), (637, 1697)])
def test_the_interval_is_wilsons(correct, total, level):
    theirs = binomtest(correct, total).proportion_ci(confidence_level=level, method="wilson")
    assert wilson_interval(correct, total, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 3000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_lies_between_0_and_1_and_holds_the_share(counts):
    low, high = wilson_interval(*counts)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


def test_more_clips_make_it_narrower():
    widths = [high - low for low, high in (wilson_interval(total // 2, total) for total in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
