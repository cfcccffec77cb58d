"""Pictures of embeddings, for looking only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = (("#0072B2", "^"), ("#D55E00", "x"))
"""Colour and marker of the two classes; told apart by colour-blind people and in print."""
ABREAST = 3


def separation(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """Return how well classes are separated: the mean silhouette (Rousseeuw 1987), from -1 to 1.

    s = (b - a) / max(a, b) of a clip, with a its mean Euclidean distance to the others of its class and b that to the
    other class.

    Args:
        embeddings: (N, D), N above the number of classes.
        labels: class numbers, (N,).

    Example:
        >>> round(separation(np.array([[0.0], [1.0], [10.0], [11.0]]), np.array([0, 0, 1, 1])), 3)
        0.9
    """
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(embeddings, labels))


def segments_figure(embeddings: Sequence[np.ndarray], labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Return a t-SNE of the same clips' embeddings by number of segments, one panel a number (Heo et al. 2019, fig. 1).

    All embeddings are laid out together in one plane, so that panels may be compared: alone, each would have a scale
    and a turn of its own. The other panels' points are grey. Distances in such a plane say little, so each title has
    the separation in the space of the embeddings themselves.

    Args:
        embeddings: of 1, 2, ... segments, each (N, D).
        labels: class numbers of the clips, (N,), two of them.
        names: of these two classes, the lower number first.
    """
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    points = np.concatenate(embeddings)
    perplexity = min(30.0, (len(points) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    panels = np.split(plane, len(embeddings))
    columns = min(len(panels), ABREAST)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(2.7 * columns, 5.4), 2.9 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for number, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
        axes.scatter(*plane.T, s=5, color="#E3E3E3", linewidths=0)
        for label, (colour, marker) in zip(np.unique(labels), LOOKS, strict=True):
            axes.scatter(*panel[labels == label].T, s=26, color=colour, marker=marker, linewidths=1.2)
        segments = "1 segment" if number == 0 else f"{number + 1} segments"
        axes.set_title(f"{segments}: silhouette {separation(embeddings[number], labels):.2f}")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
        axes.set_box_aspect(1)
    handles = grid.flat[0].collections[1:]
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    figure.suptitle("What the teacher makes of clips, by segments joined", x=0.01, ha="left", weight="bold", size=12)
    return figure
