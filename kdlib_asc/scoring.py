"""The classifier on embeddings: a support vector machine that, once fitted, is a few plain arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field

from kdlib import KdlibError, TrainingError

_KERNEL_VALUES = 1 << 24  # of the kernel matrix at a time: 128 MiB
_ARRAYS = ("settings", "classes", "mean", "scale", "gamma", "support_vectors", "pairs", "intercept")


def one_vs_rest(decisions: np.ndarray, classes: int) -> np.ndarray:
    r"""Turn the decisions between pairs of classes into one score a class.

    With :math:`d_{ij}` the decision between i < j (at least 0: class i wins), :math:`v_k` the pairs that class k wins
    and :math:`c_k = \sum_{j > k} d_{kj} - \sum_{i < k} d_{ik}`, the score is :math:`v_k + c_k / (3 (|c_k| + 1))`:
    votes, and confidence where votes are equal.

    Args:
        decisions: (N, K (K - 1) / 2), pairs in the order (0, 1), (0, 2), ..., (1, 2), ...
        classes: K.

    Returns:
        (N, K) float64.

    Source:
        scikit-learn's ``decision_function_shape="ovr"``, to which it is equal.

    Example:
        >>> one_vs_rest(np.array([[1.0, 1.0, -1.0]]), 3).argsort().tolist()
        [[1, 2, 0]]
    """
    first, second = np.triu_indices(classes, 1)
    is_first, is_second = np.eye(classes)[first], np.eye(classes)[second]
    won = (decisions >= 0).astype(np.float64)
    votes = won @ is_first + (1 - won) @ is_second
    confidence = decisions @ (is_first - is_second)
    return np.asarray(votes + confidence / (3 * (np.abs(confidence) + 1)))


class Svm:
    """A support vector classifier on embeddings.

    Two classes: scores are (-s, s) with s the decision for the higher one. More: see ``one_vs_rest``. The
    predicted class is the argmax of the scores; of equal ones the lowest. Scores are computed by numpy from the
    arrays of ``state()``, in float64, whether the machine was just fitted or loaded; they equal those of
    ``sklearn.svm.SVC(decision_function_shape="ovr", break_ties=True)`` to 1e-12. Only ``fit`` needs scikit-learn.

    Args:
        c: the penalty of a margin error, above 0.
        kernel: ``"rbf"``, ``exp(-gamma |a - b|^2)``, or ``"linear"``.
        gamma: of the RBF kernel: ``"scale"``, 1 / (D times the variance of all values); ``"auto"``, 1 / D; or a number
            above 0.
        scale_features: give each dimension mean 0 and variance 1 by statistics of the fitted embeddings first.

    Attributes:
        classes_: the class numbers of the score columns, (K,) int64, once fitted.

    Raises:
        TrainingError: on fitting fewer than two classes, and on embeddings that are not finite or have a wrong shape.
        KdlibError: not fitted, scikit-learn is missing, or a state is not one.

    Source:
        The paper's section 2.2 fits one SVM on each network's embeddings and names neither kernel nor C; RBF, C = 1,
        gamma "scale" and no scaling are ours (and scikit-learn's defaults).

    Example:
        >>> x = np.array([[0.0, 0.1], [0.2, 0.0], [1.0, 1.1], [0.9, 1.0]])
        >>> svm = Svm(kernel="linear").fit(x, np.array([0, 0, 1, 1]))
        >>> svm.scores(x).argmax(axis=1).tolist()
        [0, 0, 1, 1]
        >>> bool((Svm.from_state(svm.state()).scores(x) == svm.scores(x)).all())
        True
    """

    classes_: np.ndarray

    def __init__(
        self,
        *,
        c: Annotated[float, Field(gt=0)] = 1.0,
        kernel: Literal["rbf", "linear"] = "rbf",
        gamma: Literal["scale", "auto"] | Annotated[float, Field(gt=0)] = "scale",
        scale_features: bool = False,
    ) -> None:
        self.c = c
        self.kernel = kernel
        self.gamma = gamma
        self.scale_features = scale_features
        self._arrays: dict[str, np.ndarray] | None = None

    def fit(self, embeddings: np.ndarray, labels: np.ndarray) -> Self:
        """Train on embeddings (N, D) and class numbers (N,)."""
        x, y = _checked(embeddings), np.asarray(labels)
        if y.shape != (len(x),):
            raise TrainingError(f"the SVM got {len(x)} embeddings and labels of shape {y.shape}")
        if len(np.unique(y)) < 2:
            raise TrainingError(f"the SVM needs two classes or more, and the labels hold only {np.unique(y).tolist()}")
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise KdlibError(f"fitting an SVM needs scikit-learn: pip install 'kdlib-asc[asc]' ({error})") from error
        mean, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
        if self.scale_features:
            # A constant dimension has a standard deviation of rounding errors: dividing by it would make noise of it.
            mean, scale = x.mean(axis=0), np.where(np.ptp(x, axis=0) > 0, x.std(axis=0), 1.0)
        x = (x - mean) / scale
        gamma = _gamma(self.gamma, x)
        svc = SVC(C=self.c, kernel=self.kernel, gamma=gamma, decision_function_shape="ovr", break_ties=True).fit(x, y)
        self._arrays = {
            "settings": np.frombuffer(json.dumps(self._settings()).encode(), dtype=np.uint8).copy(),
            "classes": svc.classes_.astype(np.int64),
            "mean": mean,
            "scale": scale,
            "gamma": np.array([gamma]),
            "support_vectors": np.ascontiguousarray(svc.support_vectors_, dtype=np.float64),
            "pairs": _pair_weights(np.asarray(svc.dual_coef_), np.asarray(svc.n_support_)),
            "intercept": np.ascontiguousarray(svc.intercept_, dtype=np.float64),
        }
        self.classes_ = self._arrays["classes"]
        return self

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Return one column of scores a class, (N, K) float64, columns in the order of ``classes_``."""
        arrays = self._fitted()
        x, vectors = _checked(embeddings), arrays["support_vectors"]
        if x.shape[1] != vectors.shape[1]:
            raise TrainingError(f"the SVM was fitted on {vectors.shape[1]} dimensions and got {x.shape[1]}")
        x = (x - arrays["mean"]) / arrays["scale"]
        gamma = float(arrays["gamma"][0]) if self.kernel == "rbf" else None
        rows = max(1, _KERNEL_VALUES // len(vectors))
        blocks = [_kernel(x[at : at + rows], vectors, gamma) @ arrays["pairs"] for at in range(0, len(x), rows)]
        decisions = np.concatenate([*blocks, np.zeros((0, len(arrays["intercept"])))]) + arrays["intercept"]
        return (
            one_vs_rest(decisions, len(self.classes_)) if len(self.classes_) > 2 else np.hstack([-decisions, decisions])
        )

    def state(self) -> dict[str, np.ndarray]:
        """Return the fitted machine as plain arrays, fit for safetensors."""
        return {name: array.copy() for name, array in self._fitted().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """Return the machine that ``state()`` described; it scores without scikit-learn."""
        lacking = [name for name in _ARRAYS if name not in state]
        if lacking:
            raise KdlibError(f"not the state of an SVM: it lacks {', '.join(lacking)}")
        arrays = {name: np.array(state[name]) for name in _ARRAYS}
        try:
            svm = cls(**json.loads(arrays["settings"].tobytes()))
        except (ValueError, TypeError) as error:
            raise KdlibError(f"not the state of an SVM: its settings are not readable: {error}") from error
        svm._arrays = arrays
        svm.classes_ = arrays["classes"]
        return svm

    def _settings(self) -> dict[str, Any]:
        return {"c": self.c, "kernel": self.kernel, "gamma": self.gamma, "scale_features": self.scale_features}

    def _fitted(self) -> dict[str, np.ndarray]:
        if self._arrays is None:
            raise KdlibError("the SVM is not fitted: call fit(embeddings, labels) first")
        return self._arrays


def _checked(embeddings: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(embeddings, dtype=np.float64)
    if x.ndim != 2:
        raise TrainingError(f"the SVM needs embeddings of shape (N, D), not {x.shape}")
    broken = int((~np.isfinite(x)).any(axis=1).sum())
    if broken:
        raise TrainingError(
            f"{broken} of {len(x)} embeddings hold NaN or infinity: the network that made them diverged"
        )
    return x


def _gamma(setting: str | float, x: np.ndarray) -> float:
    if not isinstance(setting, str):
        return float(setting)
    spread = float(x.var()) if setting == "scale" else 1.0
    return 1.0 / (x.shape[1] * spread) if spread > 0 else 1.0


def _pair_weights(dual: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spread libsvm's (K - 1, S) coefficients to one column a pair of classes, (S, K (K - 1) / 2).

    Support vectors are sorted by class. Row j - 1 of a vector of class i is its weight against class j > i, row i that
    of a vector of class j against i.
    """
    ends = np.cumsum(counts)
    starts = ends - counts
    first, second = np.triu_indices(len(counts), 1)
    if len(counts) == 2:  # one row for both; scikit-learn turned its sign in favour of the higher class
        return np.ascontiguousarray(dual.T, dtype=np.float64)
    weights = np.zeros((dual.shape[1], len(first)))
    for pair, (i, j) in enumerate(zip(first, second, strict=True)):
        weights[starts[i] : ends[i], pair] = dual[j - 1, starts[i] : ends[i]]
        weights[starts[j] : ends[j], pair] = dual[i, starts[j] : ends[j]]
    return weights


def _kernel(x: np.ndarray, vectors: np.ndarray, gamma: float | None) -> np.ndarray:
    """Return (rows of x, S) kernel values: RBF, or linear where gamma is None."""
    if gamma is None:
        return np.asarray(x @ vectors.T)
    centre = vectors.mean(axis=0)  # distances do not change, and less cancels in |a|^2 + |b|^2 - 2 ab
    x, vectors = x - centre, vectors - centre
    squares = (x**2).sum(axis=1)[:, None] + (vectors**2).sum(axis=1) - 2 * x @ vectors.T
    return np.asarray(np.exp(-gamma * np.maximum(squares, 0)))
