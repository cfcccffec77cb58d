"""Pictures of a run, for looking: nothing reads them. matplotlib is wanted only where one is drawn."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from kdlib.errors import DataError
from kdlib.files import write_atomically
from kdlib.metrics import most_confused
from kdlib.recipe import FUSED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
"""Of Okabe and Ito (2008): told apart by colour-blind people, and by their lightness in print."""
MARKS = ((RED, "-"), (GREEN, "--"), ("#CC79A7", ":"))
"""Colour and line of the boxes around the most confused pairs."""
STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "savefig.dpi": 150.0,
    "savefig.bbox": "tight",
    "text.parse_math": False,  # names of classes may hold any character
}
LONGEST = 28
"""Characters of a name that are shown."""
ABREAST = 4
"""Trainings side by side in a picture."""
TRAININGS = ("pretrain", "teacher", "student-pretrain", "continued", "alone", "student")
NOT_LOSSES = ("epoch", "step", "lr", "seconds", "waiting")

P = ParamSpec("P")


def missing() -> str | None:
    """Return what to do to have pictures, or None where they can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return f"Pictures need matplotlib ({error}): pip install 'kdlib-asc[asc]'."
    return None


def styled(make: Callable[P, Figure]) -> Callable[P, Figure]:
    """Have a function draw in the style of these pictures, whatever the user's own settings are."""

    @wraps(make)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _style():
            return make(*args, **kwargs)

    return inside


@contextmanager
def attempt(what: object) -> Iterator[None]:
    """Draw in the style of these pictures; a failure is one warning, for no training shall be lost by a picture."""
    try:
        with _style():
            yield
    except Exception as error:
        warnings.warn(f"{what}: not drawn: {type(error).__name__}: {error}", stacklevel=3)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks shows as boxes
        figure.savefig(drawn := io.BytesIO(), format="png")
    write_atomically(path, drawn.getvalue())


def draw(folder: Path, result: Mapping[str, Any]) -> None:
    """Draw the confusion matrices and the training curves of a finished run into its folder.

    ``confusion.png`` is of the fusion or the only system, ``confusion-SYSTEM.png`` of one of several, each over all
    folds; ``[fold-K/]SYSTEM/curves.png`` of the trainings of one system. A picture that fails is a warning.

    Args:
        folder: of the run.
        result: what its ``result.json`` holds.
    """
    systems: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        systems.setdefault(row["system"], {})[row["role"]] = row["confusion"]
    for system, roles in systems.items():
        only = len(systems) == 1
        path = folder / ("confusion.png" if only or system == FUSED else f"confusion-{system}.png")
        after = next((role for role in ("with", "continued", "alone") if role in roles), None)
        shown = {role: roles[role] for role in ("without", after) if role in roles}
        title = result["name"] if only else f"{result['name']}: {system}"
        with attempt(path):
            save(confusion_matrices(shown, result["classes"], title=title), path)
    logs: dict[Path, dict[str, Path]] = {}
    for log in sorted(folder.rglob("metrics.csv"), key=lambda log: _turn(log.parent.name)):
        logs.setdefault(log.parent.parent, {})[log.parent.name] = log
    for place, trainings in logs.items():
        path = place / "curves.png"
        with attempt(path):
            title = f"{result['name']}: {' '.join(place.relative_to(folder).parts)}"
            save(training_curves(trainings, title=title), path)


@styled
def confusion_matrices(
    confusions: Mapping[str, Any], classes: Sequence[str], *, title: str = "", pairs: int = 2
) -> Figure:
    """Return confusion matrices side by side, with the pairs boxed that the first one confuses most.

    A cell shows a count; its colour is the share of the true class (Heo et al. 2019, figure 2; colours and shares are
    ours).

    Args:
        confusions: by name, counts (K, K): rows are true classes, columns predicted ones.
        classes: the K names.
        title: of the whole.
        pairs: how many to box, 0 to 3.

    Example:
        >>> from kdlib.figures import confusion_matrices, save
        >>> figure = confusion_matrices({"without": [[8, 2], [3, 7]], "with": [[9, 1], [1, 9]]}, ["bus", "tram"])
        >>> len(figure.axes)  # two matrices and the colour bar
        3
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    matrices = {name: np.asarray(matrix) for name, matrix in confusions.items()}
    boxed = list(zip(most_confused(next(iter(matrices.values())), pairs), MARKS, strict=False))
    names = [_short(name) for name in classes]
    side = min(2 + 0.25 * len(names), 11.0)  # inches
    gap = 0.25
    width = len(matrices) * (side + gap)
    # Nothing is fitted: axes stand where they are put, in inches, and what sticks out is kept when the file is cut.
    figure = Figure(figsize=(width, side))
    for number, (name, matrix) in enumerate(matrices.items()):
        axes = figure.add_axes((number * (side + gap) / width, 0, side / width, 1))
        marked = {cell for pair, _ in boxed for cell in (pair, pair[::-1])}
        colours = _matrix(axes, matrix, side, marked)
        _name_classes(axes, names, side, rows=number == 0)
        for pair, (colour, line) in boxed:
            for corner in (pair, pair[::-1]):
                box = Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linestyle=line, linewidth=2.2, zorder=3)
                box.set_clip_on(False)
                axes.add_patch(box)
        right, total = int(matrix.trace()), int(matrix.sum())
        axes.set_title(name, fontweight="bold", pad=20)
        below = f"{right} of {total} right, {100 * right / max(total, 1):.1f} %"
        axes.annotate(below, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points")

    bar = figure.add_axes((1, 0, 0.12 / width, 1))
    scale = figure.colorbar(
        colours, cax=bar, format=lambda share, _: f"{100 * share:.0f} %", ticks=[0, 0.25, 0.5, 0.75, 1]
    )
    scale.set_label("share of the true class")
    scale.outline.set_visible(False)

    height = side + 0.6
    for (one, other), (colour, line) in reversed(boxed):
        errors = " → ".join(f"{matrix[one, other] + matrix[other, one]} {name}" for name, matrix in matrices.items())
        place = (0.02 / width, height / side)
        swatch = Rectangle(
            place, 0.13 / width, 0.13 / side, fill=False, edgecolor=colour, linestyle=line, linewidth=2.2
        )
        figure.add_artist(swatch)
        figure.text(0.25 / width, height / side, f"{names[one]} / {names[other]}: errors {errors}")
        height += 0.22
    figure.text(0, (height + 0.08) / side, title, fontsize=12, fontweight="bold")
    return figure


@styled
def training_curves(trainings: Mapping[str, Path], *, title: str = "") -> Figure:
    """Return the losses of trainings by epoch, one axis a term, above the learning rate.

    An axis is logarithmic where its values are positive and span more than a factor of 20. A dotted line marks the
    epoch of the lowest total on the validation part.

    Args:
        trainings: the path of ``metrics.csv`` by name.
        title: of the whole.

    Raises:
        DataError: a file holds no epoch.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    read = {name: _epochs(Path(path)) for name, path in trainings.items()}
    terms = {name: _terms(columns) for name, columns in read.items()}
    columns = min(len(read), ABREAST)
    rows = -(-len(read) // columns)
    height = rows * (1.6 + max(3.0, *(1.4 * len(of) for of in terms.values()))) + 0.5
    figure = Figure(figsize=(max(3.2 * columns, 5.0), height), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    for number, (name, values) in enumerate(read.items()):
        _curves(figure, grid[divmod(number, columns)], _short(name), values, terms[name])
    lines = [Line2D([], [], color=BLUE, label="training")]
    if any(key.startswith("valid_") for values in read.values() for key in values):
        lines.append(Line2D([], [], color=RED, linestyle="--", label="validation"))
        lines.append(Line2D([], [], color=GREY, linestyle=":", label="lowest on validation"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib.style

    with matplotlib.style.context(STYLE, after_reset=True):
        yield


def _matrix(axes: Axes, matrix: np.ndarray, side: float, marked: Container[tuple[int, int]]) -> Any:
    """Draw the cells of a confusion matrix, with their counts where there is room, and return the colours.

    A zero is left blank where it is not marked.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cell = 72 * side / len(matrix)  # points
    line = min(0.6, cell / 30)
    colours = axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=line)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    size = min(10.0, 0.5 * cell, 1.3 * cell / len(str(matrix.max())))
    if size >= 4.5:
        for (row, column), count in np.ndenumerate(matrix):
            if not count and (row, column) not in marked:
                continue
            colour = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column + 0.5, row + 0.5, str(count), size=size, color=colour, ha="center", va="center")
    return colours


def _name_classes(axes: Axes, names: Sequence[str], side: float, *, rows: bool) -> None:
    size = min(9.0, 0.75 * 72 * side / len(names))
    shown = names if size >= 4 else []  # beyond some 150 classes there is no room
    places = np.arange(len(shown)) + 0.5
    upright = all(len(name) <= 3 for name in names)
    axes.set_xticks(places, shown, rotation=0 if upright else 90, fontsize=size)
    axes.set_yticks(places, shown if rows else [""] * len(shown), fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    if rows:
        axes.set_ylabel("true class")


def _turn(training: str) -> tuple[float, str]:
    """Return where a training stands among those of its system; one of several teachers comes after the teacher."""
    place = TRAININGS.index(training) if training in TRAININGS else TRAININGS.index("teacher") + 0.5
    return place, training


def _epochs(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a ``metrics.csv``; what was not computed in an epoch is NaN."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if not lines:
        raise DataError(f"{path}: holds no epoch.")
    return {name: np.array([float(line[name] or math.nan) for line in lines]) for name in lines[0]}


def _terms(columns: Mapping[str, np.ndarray]) -> list[str]:
    """Return what to draw: the total where it is not the only term itself, then the terms."""
    terms = [name for name in columns if name not in (*NOT_LOSSES, "total") and not name.startswith("valid_")]
    if len(terms) == 1 and np.array_equal(columns[terms[0]], columns["total"]):
        return terms
    return ["total", *terms]


def _curves(
    figure: Figure, place: SubplotSpec, title: str, columns: Mapping[str, np.ndarray], terms: Sequence[str]
) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = columns["epoch"] + 1
    marker = "o" if len(epochs) < 3 else ""
    grid = place.subgridspec(
        len(terms) + 1, 1, height_ratios=[*[max(3.0, 1.5 * len(terms)) / len(terms)] * len(terms), 1]
    )
    axes: list[Axes] = [figure.add_subplot(grid[0])]
    axes += [figure.add_subplot(grid[row], sharex=axes[0]) for row in range(1, len(terms) + 1)]
    for term, axis in zip(terms, axes, strict=False):
        drawn = [(columns[term], BLUE, "-")]
        if f"valid_{term}" in columns:
            drawn.append((columns[f"valid_{term}"], RED, "--"))
        for values, colour, line in drawn:
            axis.plot(epochs, values, color=colour, linestyle=line, marker=marker, markersize=3, linewidth=1.4)
        _scale(axis, np.concatenate([values for values, *_ in drawn]))
    axes[-1].plot(epochs, columns["lr"], color=GREY, marker=marker, markersize=3, linewidth=1.4)
    axes[-1].set_ylim(bottom=0)
    axes[-1].yaxis.set_major_locator(MaxNLocator(3))
    axes[-1].yaxis.set_major_formatter(_number)
    axes[-1].set_xlabel("epoch")
    axes[-1].set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    best = columns.get("valid_total")
    for axis, what in zip(axes, [*map(_short, terms), "learning rate"], strict=True):
        axis.annotate(what, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points")
        axis.label_outer()
        axis.grid(axis="y", color="#E6E6E6", linewidth=0.6)
        axis.set_axisbelow(True)
        if best is not None:
            axis.axvline(epochs[best.argmin()], color=GREY, linestyle=":", linewidth=1)
    axes[0].set_title(title, fontweight="bold", pad=20)


def _scale(axis: Axes, values: np.ndarray) -> None:
    """Make an axis logarithmic where that shows more."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axis.yaxis.set_major_formatter(_number)
        axis.yaxis.set_minor_formatter(NullFormatter())


def _number(value: float, _: float) -> str:
    return f"{value:g}"


def _short(name: str) -> str:
    """Return a name on one line, with its middle left out where it is too long to be shown."""
    line = " ".join(name.split())
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[: half - 1]}…{line[-half:]}"
