"""The SVM against scikit-learn's."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.multiclass import _ovr_decision_function

from kdlib import KdlibError, TrainingError
from kdlib.interfaces import Scorer
from kdlib_asc import scoring
from kdlib_asc.scoring import Svm, one_vs_rest


def blobs(classes: int, rows: int = 30, dims: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), rows))
    return rng.normal(size=(classes, dims))[labels] + rng.normal(size=(len(labels), dims)), labels


def reference(x: np.ndarray, y: np.ndarray, **options: Any) -> SVC:
    return SVC(decision_function_shape="ovr", break_ties=True, **options).fit(x, y)


@pytest.mark.parametrize("classes", [3, 4, 10])
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({}, {}),
        ({"c": 10.0}, {"C": 10.0}),
        ({"kernel": "linear"}, {"kernel": "linear"}),
        ({"gamma": "auto"}, {"gamma": "auto"}),
        ({"gamma": 0.3}, {"gamma": 0.3}),
    ],
    ids=["default", "c", "linear", "auto", "number"],
)
def test_scores_equal_scikit_learn(classes: int, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    x, y = blobs(classes)
    new = blobs(classes, seed=1)[0]
    svm, svc = Svm(**mine).fit(x, y), reference(x, y, **theirs)
    scores = svm.scores(new)
    assert scores.shape == (len(new), classes)
    np.testing.assert_allclose(scores, svc.decision_function(new), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(svm.classes_[scores.argmax(axis=1)], svc.predict(new))


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_two_classes_are_minus_s_and_s(kernel: Any) -> None:
    x, y = blobs(2)
    new = blobs(2, seed=1)[0]
    scores = Svm(kernel=kernel).fit(x, y).scores(new)
    decision = reference(x, y, kernel=kernel).decision_function(new)
    np.testing.assert_allclose(scores, np.stack([-decision, decision], axis=1), rtol=0, atol=1e-12)
    assert (scores.argmax(axis=1) == reference(x, y, kernel=kernel).predict(new)).all()


def test_far_from_the_origin_distances_do_not_cancel() -> None:
    x, y = blobs(3)
    x = x + 1e4
    np.testing.assert_allclose(Svm().fit(x, y).scores(x), reference(x, y).decision_function(x), rtol=0, atol=1e-10)


def test_kernel_of_equal_embeddings_is_at_most_one_however_sharp() -> None:
    x = blobs(3)[0]
    assert scoring._kernel(x, x, 1e14).max() <= 1


def test_single_precision_embeddings_are_scored_in_double() -> None:
    x, y = blobs(4)
    x = x.astype(np.float32)
    scores = Svm().fit(x, y).scores(x)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, reference(x.astype(float), y).decision_function(x), rtol=0, atol=1e-12)


def test_class_numbers_with_gaps_and_out_of_order() -> None:
    x, y = blobs(3)
    y = np.array([7, 2, 5])[y]
    svm = Svm().fit(x, y)
    assert svm.classes_.tolist() == [2, 5, 7]
    assert svm.classes_.dtype == np.int64
    np.testing.assert_allclose(svm.scores(x), reference(x, y).decision_function(x), rtol=0, atol=1e-12)


def test_class_with_a_single_embedding() -> None:
    x, y = blobs(3)
    keep = (y != 1) | (np.cumsum(y == 1) == 1)
    x, y = x[keep], y[keep]
    np.testing.assert_allclose(Svm().fit(x, y).scores(x), reference(x, y).decision_function(x), rtol=0, atol=1e-12)


def test_scoring_in_blocks_is_scoring_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(4)
    svm = Svm().fit(x, y)
    whole = svm.scores(x)
    monkeypatch.setattr(scoring, "_KERNEL_VALUES", 700)
    np.testing.assert_allclose(svm.scores(x), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_no_rows_give_no_scores(classes: int) -> None:
    assert Svm().fit(*blobs(classes)).scores(np.zeros((0, 8))).shape == (0, classes)


@given(
    classes=st.sampled_from([3, 4, 10]),
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]), min_size=90, max_size=90),
)
def test_votes_and_confidences_equal_scikit_learn_on_ties(classes: int, values: list[float]) -> None:
    pairs = classes * (classes - 1) // 2
    decisions = np.array(values[: 90 // pairs * pairs]).reshape(-1, pairs)
    theirs = _ovr_decision_function(decisions < 0, -decisions, classes)
    mine = one_vs_rest(decisions, classes)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(mine.argmax(axis=1), theirs.argmax(axis=1))


def test_three_classes_in_a_circle_of_votes_are_told_apart_by_confidence() -> None:
    scores = one_vs_rest(np.array([[0.2, -0.9, 0.5]]), 3)  # 0 beats 1, 2 beats 0, 1 beats 2
    assert scores.round().tolist() == [[1, 1, 1]]
    assert scores.argmax() == 2


def test_of_equal_scores_the_lowest_class_is_predicted() -> None:
    assert one_vs_rest(np.array([[0.5, -0.5, 0.5]]), 3).argmax() == 0
    x = np.array([[-1.0], [1.0]])
    assert Svm(kernel="linear").fit(x, np.array([4, 9])).scores(np.zeros((1, 1))).argmax() == 0


def test_scaled_features_equal_a_standard_scaler_before_the_svm() -> None:
    x, y = blobs(3)
    x = x * np.array([1e-3, 1e3, 1, 1, 1, 1, 1, 1]) + 5
    scaler = StandardScaler().fit(x)
    svm = Svm(scale_features=True).fit(x, y)
    theirs = reference(scaler.transform(x), y).decision_function(scaler.transform(x))
    np.testing.assert_allclose(svm.scores(x), theirs, rtol=0, atol=1e-10)
    assert abs(svm.scores(x) - Svm().fit(x, y).scores(x)).max() > 0.1


def test_constant_feature_is_not_divided_by_its_rounding_errors() -> None:
    x, y = blobs(3)
    with_constant = np.hstack([x, np.full((len(x), 1), 0.7)])
    assert 0 < with_constant.std(axis=0)[-1] < 1e-12
    svm = Svm(scale_features=True, gamma=0.125).fit(with_constant, y)
    plain = Svm(scale_features=True, gamma=0.125).fit(x, y)
    with_constant[:, -1] += 1e-13
    np.testing.assert_allclose(svm.scores(with_constant), plain.scores(x), rtol=0, atol=1e-12)


def test_embeddings_that_are_all_equal_still_fit() -> None:
    x, y = np.ones((10, 4)), np.arange(10) % 2
    theirs = reference(x, y).decision_function(x)
    np.testing.assert_allclose(Svm().fit(x, y).scores(x)[:, 1], theirs, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    classes=st.sampled_from([2, 3, 10]),
    kernel=st.sampled_from(["rbf", "linear"]),
    gamma=st.sampled_from(["scale", "auto", 0.25]),
    scale=st.booleans(),
)
def test_state_comes_back_from_safetensors_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, classes: int, kernel: Any, gamma: Any, scale: bool
) -> None:
    x, y = blobs(classes, rows=8)
    svm = Svm(c=2.0, kernel=kernel, gamma=gamma, scale_features=scale).fit(x, y)
    path = tmp_path_factory.mktemp("svm") / "svm.safetensors"
    save_file(svm.state(), path)
    back = Svm.from_state(load_file(path))
    np.testing.assert_array_equal(back.scores(x), svm.scores(x))
    np.testing.assert_array_equal(back.classes_, svm.classes_)
    assert (back.c, back.kernel, back.gamma, back.scale_features) == (2.0, kernel, gamma, scale)


def test_loaded_state_scores_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(3)
    svm = Svm().fit(x, y)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    np.testing.assert_array_equal(Svm.from_state(svm.state()).scores(x), svm.scores(x))
    with pytest.raises(KdlibError, match=r"pip install 'kdlib-asc\[asc\]'"):
        Svm().fit(x, y)


def test_changing_a_state_does_not_change_the_machine() -> None:
    x, y = blobs(3)
    svm = Svm().fit(x, y)
    before, state = svm.scores(x), svm.state()
    for array in state.values():
        array.fill(0)
    np.testing.assert_array_equal(svm.scores(x), before)


def test_fitting_twice_gives_the_same_bits_and_forgets_the_first_data() -> None:
    x, y = blobs(3)
    svm = Svm().fit(*blobs(10, seed=5)).fit(x, y)
    np.testing.assert_array_equal(svm.scores(x), Svm().fit(x, y).scores(x))


def test_state_that_is_none() -> None:
    state = Svm().fit(*blobs(2)).state()
    with pytest.raises(KdlibError, match="lacks intercept"):
        Svm.from_state({name: array for name, array in state.items() if name != "intercept"})
    with pytest.raises(KdlibError, match="settings are not readable"):
        Svm.from_state({**state, "settings": np.frombuffer(b"{", dtype=np.uint8)})
    with pytest.raises(KdlibError, match="settings are not readable"):
        Svm.from_state({**state, "settings": np.frombuffer(b'{"colour": 1}', dtype=np.uint8)})


def test_scoring_before_fitting() -> None:
    with pytest.raises(KdlibError, match="not fitted"):
        Svm().scores(np.zeros((1, 2)))
    with pytest.raises(KdlibError, match="not fitted"):
        Svm().state()


def test_one_class_is_named() -> None:
    with pytest.raises(TrainingError, match=r"two classes or more, and the labels hold only \[3\]"):
        Svm().fit(np.zeros((4, 2)), np.full(4, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_counted(value: float) -> None:
    x, y = blobs(2)
    svm = Svm().fit(x, y)
    x[[3, 5], 1] = value
    for call in (lambda: svm.scores(x), lambda: Svm().fit(x, y)):
        with pytest.raises(TrainingError, match="2 of 60 embeddings hold NaN or infinity"):
            call()


def test_shapes_that_do_not_fit() -> None:
    x, y = blobs(2)
    with pytest.raises(TrainingError, match=r"60 embeddings and labels of shape \(59,\)"):
        Svm().fit(x, y[:-1])
    with pytest.raises(TrainingError, match=r"shape \(N, D\), not \(8,\)"):
        Svm().fit(x[0], y)
    with pytest.raises(TrainingError, match="fitted on 8 dimensions and got 7"):
        Svm().fit(x, y).scores(x[:, :7])


def test_fit_warns_of_nothing_and_returns_the_scorer() -> None:
    svm = Svm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        returned: Scorer = svm.fit(*blobs(3))
    assert returned is svm


def test_settings_are_keyword_only_attributes() -> None:
    svm = Svm(c=2.0, kernel="linear", gamma=0.5, scale_features=True)
    assert vars(svm).items() >= {"c": 2.0, "kernel": "linear", "gamma": 0.5, "scale_features": True}.items()
    with pytest.raises(TypeError):
        Svm(2.0)  # type: ignore[call-arg]


def test_no_pickle_in_the_file(tmp_path: Path) -> None:
    state = Svm().fit(*blobs(3)).state()
    assert {array.dtype.kind for array in state.values()} <= set("fiu")
