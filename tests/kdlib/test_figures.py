"""The pictures of a run: what they mark and name, that any name may stand in them, and that none can lose a run."""

import json
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread

import kdlib
from kdlib import figures
from kdlib.errors import DataError
from kdlib.figures import LONGEST, MARKS, attempt, confusion_matrices, draw, save, training_curves
from kdlib.metrics import most_confused
from kdlib.recipe import read
from kdlib.registry import registry
from kdlib.run import run

NAMES = ("airport", "metro", "shopping_mall", "tram")
BEFORE = np.array([[50, 1, 9, 0], [2, 40, 0, 8], [12, 0, 30, 1], [0, 7, 1, 45]])
AFTER = np.array([[55, 1, 4, 0], [2, 42, 0, 6], [10, 0, 32, 1], [0, 5, 1, 47]])
ODD = [
    "$x_1$ and $",
    "_hidden",
    "a name " * 30,
    "🎷 日本",
    "two\nlines\tof it",
    "100 %",
    r"\frac{1}{2}",
    "{}",
    "",
    "[b]",
]
FEW = {
    "name": "few",
    "data": {"kind": "digits"},
    "train": {"epochs": 2, "threads": 1},
    "model": {"kind": "digits_mlp", "width": 16},
}


def texts(figure):
    """Return all that is written in a figure, after it was laid out."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def assert_picture(path, least=300):
    """A PNG of sensible size that shows something."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    height, width, _ = imread(path).shape
    assert least < height < 6000
    assert least < width < 6000
    assert imread(path)[..., :3].std() > 0.02


def boxes(axes):
    """Return the corners (column, row) of the boxes on a matrix, by colour."""
    found = {}
    for patch in axes.patches:
        found.setdefault(to_hex(patch.get_edgecolor()).upper(), set()).add(patch.get_xy())
    return found


# the most confused pairs


def test_the_most_confused_pairs_count_both_directions():
    assert most_confused(BEFORE, 9) == [(0, 2), (1, 3), (0, 1), (2, 3)]  # 21, 15, 3 and 2 errors; the others none


def test_among_pairs_with_as_many_errors_the_order_of_the_classes_decides():
    assert most_confused(np.ones((3, 3), int), 2) == [(0, 1), (0, 2)]
    assert most_confused(np.array([[0, 0, 1], [0, 0, 0], [0, 1, 0]]), 2) == [(0, 2), (1, 2)]


def test_without_errors_no_pair_is_confused():
    assert most_confused(np.diag([3, 0, 2]), 2) == []


# confusion matrices


def test_the_pairs_of_the_first_matrix_are_boxed_in_both():
    figure = confusion_matrices({"without": BEFORE, "with": AFTER}, NAMES)
    expected = {MARKS[0][0]: {(0, 2), (2, 0)}, MARKS[1][0]: {(1, 3), (3, 1)}}
    assert [boxes(axes) for axes in figure.axes[:2]] == [expected, expected]


def test_errors_before_and_after_and_the_accuracies_are_written():
    written = texts(confusion_matrices({"without": BEFORE, "with": AFTER}, NAMES, title="a run"))
    assert "airport / shopping_mall: errors 21 without → 14 with" in written
    assert "metro / tram: errors 15 without → 11 with" in written
    assert f"165 of {BEFORE.sum()} right, {100 * 165 / BEFORE.sum():.1f} %" in written
    assert "a run" in written


def test_cells_have_counts_and_the_colour_of_the_share_of_the_true_class():
    figure = confusion_matrices({"without": BEFORE}, NAMES)
    mesh = figure.axes[0].collections[0]
    np.testing.assert_allclose(np.reshape(mesh.get_array(), (4, 4)), BEFORE / BEFORE.sum(1, keepdims=True))
    counts = {text.get_position(): text.get_text() for text in figure.axes[0].texts[:-1]}
    assert counts[2.5, 0.5] == "9"  # column 2, row 0
    assert (3.5, 0.5) not in counts  # a zero


def test_a_class_without_clips_has_no_share():
    figure = confusion_matrices({"without": [[3, 1, 0], [0, 2, 0], [0, 0, 0]]}, NAMES[:3])
    assert np.reshape(figure.axes[0].collections[0].get_array(), (3, 3))[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("classes", [2, 22, 160])
def test_any_number_of_classes(tmp_path, classes):
    matrix = np.random.default_rng(0).integers(0, 90, (classes, classes))
    save(
        confusion_matrices({"without": matrix, "with": matrix.T}, [f"c{n}" for n in range(classes)]), tmp_path / "c.png"
    )
    assert_picture(tmp_path / "c.png")


def test_odd_names_are_shown_as_they_are_on_one_line(tmp_path):
    matrix = np.arange(100).reshape(10, 10)
    figure = confusion_matrices({"$without": matrix, "_with": matrix}, ODD, title="$ ^_", pairs=3)
    save(figure, tmp_path / "odd.png")
    assert_picture(tmp_path / "odd.png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "$x_1$ and $"
    assert labels[4] == "two lines of it"
    assert max(map(len, labels)) <= LONGEST
    assert not figure.axes[0].get_yticklabels()[0].get_parse_math()


# training curves


def log(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(",".join(map(str, line)) for line in lines) + "\n")
    return path


def test_one_axis_a_term_and_the_learning_rate_below(tmp_path):
    head = ("epoch", "step", "lr", "soft", "hard", "total", "valid_soft", "valid_hard", "valid_total", "seconds")
    path = log(tmp_path / "m.csv", head, (0, 4, 0.1, 2, 1, 3, 4, 2, 6, 1), (1, 8, 0.2, 1, 0.01, 1.1, 5, 3, 8, 1))
    figure = training_curves({"student": path})
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["total", "soft", "hard", "learning rate"]
    lines = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    assert lines[1][:2] == [[2, 1], [4, 5]]
    assert lines[3][0] == [0.1, 0.2]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 2]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "log", "linear"]
    assert figure.axes[0].lines[2].get_xdata() == [1, 1]  # the lowest total on the validation part


def test_an_only_term_that_is_the_total_is_drawn_once(tmp_path):
    head = ("epoch", "step", "lr", "hard", "total", "seconds")
    figure = training_curves({"teacher": log(tmp_path / "m.csv", head, (0, 4, 0.1, 2, 2, 1))})
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["hard", "learning rate"]
    weighted = training_curves({"teacher": log(tmp_path / "w.csv", head, (0, 4, 0.1, 2, 1, 1))})
    assert [axes.texts[0].get_text() for axes in weighted.axes] == ["total", "hard", "learning rate"]


def test_a_term_that_comes_later_or_is_negative_is_drawn(tmp_path):
    head = ("epoch", "step", "lr", "$late_", "hard", "total", "seconds")
    path = log(tmp_path / "m.csv", head, (0, 4, 0.1, "", -2, -2, 1), (1, 8, 0.1, 5, 90, 95, 1), (2, 9, 0, 1, 1, 2, 1))
    figure = training_curves({f"teacher-without-{number}": path for number in range(6)}, title="$")
    save(figure, tmp_path / "curves.png")
    assert_picture(tmp_path / "curves.png")
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), [np.nan, 5, 1])
    assert figure.axes[2].get_yscale() == "linear"


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_a_rate_or_loss_of_any_size_leaves_room_for_its_curve(tmp_path, value):
    head = ("epoch", "step", "lr", "hard", "total", "seconds")
    path = log(tmp_path / "m.csv", head, *[(epoch, epoch, value, value, value, 1) for epoch in range(3)])
    save(training_curves({"teacher": path}), tmp_path / "c.png")
    assert_picture(tmp_path / "c.png")


def test_a_log_without_an_epoch_is_named(tmp_path):
    with pytest.raises(DataError, match=r"m\.csv: holds no epoch"):
        training_curves({"teacher": log(tmp_path / "m.csv", ("epoch", "lr"))})


# in a run


def test_a_run_leaves_its_pictures(tmp_path):
    folder = run(read(FEW), tmp_path / "run", progress=False)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == [
        "confusion.png",
        "main/curves.png",
    ]
    for path in folder.rglob("*.png"):
        assert_picture(path)


def test_several_systems_and_folds_have_a_picture_each(tmp_path):
    head = ("epoch", "step", "lr", "hard", "total", "seconds")
    for fold in (1, 2):
        for system in ("raw", "mel"):
            log(tmp_path / f"fold-{fold}/{system}/teacher/metrics.csv", head, (0, 4, 0.1, 2, 2, 1))
    rows = [
        {"system": system, "role": role, "confusion": matrix.tolist()}
        for system in ("raw", "mel", "fusion")
        for role, matrix in (("without", BEFORE), ("continued", AFTER))
    ]
    draw(tmp_path, {"name": "toy", "rows": rows, "classes": list(NAMES)})
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")} == {
        "confusion.png", "confusion-raw.png", "confusion-mel.png",
        "fold-1/raw/curves.png", "fold-1/mel/curves.png", "fold-2/raw/curves.png", "fold-2/mel/curves.png",
    }  # fmt: skip


def test_the_students_row_is_shown_and_else_the_controls(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "save", lambda figure, path: shown.append(texts(figure)))
    for roles in (("without", "continued", "with"), ("without", "alone"), ("without",)):
        rows = [{"system": "main", "role": role, "confusion": BEFORE.tolist()} for role in roles]
        draw(tmp_path, {"name": "toy", "rows": rows, "classes": list(NAMES)})
    assert [[role for role in written if role in ("without", "continued", "alone", "with")] for written in shown] == [
        ["without", "with"],
        ["without", "alone"],
        ["without"],
    ]


def test_without_matplotlib_a_run_says_so_once_and_is_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = []
    folder = run(read(FEW), tmp_path / "run", progress=False, say=said.append)
    assert [line for line in said if "matplotlib" in line] == [line for line in said if "pip install" in line] != []
    assert len(said) == 2
    assert "\n" not in said[0]
    assert json.loads((folder / "result.json").read_text())["rows"]
    assert not list(folder.rglob("*.png"))


def test_a_picture_that_fails_is_one_warning_that_names_it(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(figures, "training_curves", broken)
    with pytest.warns(UserWarning, match=r"main/curves\.png: not drawn: RuntimeError: no ink") as caught:
        folder = run(read(FEW), tmp_path / "run", progress=False)
    assert len(caught) == 1
    assert (folder / "result.json").is_file()
    assert (folder / "confusion.png").is_file()


class Drawing(kdlib.SameInput):
    """A source that draws the labels that it is given, or fails to."""

    def __init__(self, teacher, *, fails: bool = False) -> None:
        super().__init__(teacher)
        self.fails = fails

    def pictures(self, part):
        from matplotlib.figure import Figure

        if self.fails:
            raise RuntimeError("no ink")
        figure = Figure()
        figure.add_subplot().hist(part.labels)
        figure.labels = np.unique(part.labels).tolist()
        return {"labels": figure}


@pytest.fixture
def drawing():
    registry.cache_clear()
    kdlib.register(type("Plugin", (), {"kdlib_sources": kdlib.hookimpl(lambda self: {"drawing": Drawing})})())
    yield {**FEW, "source": {"kind": "drawing"}, "points": {"hard": {"kind": "hard_labels"}}}
    registry.cache_clear()


def test_a_source_draws_the_clips_of_the_most_confused_pair(tmp_path, monkeypatch, drawing):
    saved = {}
    real = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (saved.setdefault(path.name, figure), real(figure, path)))
    folder = run(read(drawing), tmp_path / "run", progress=False)
    assert_picture(folder / "main/labels.png")
    rows = json.loads((folder / "result.json").read_text())["rows"]
    (without,) = [row["confusion"] for row in rows if row["role"] == "without"]
    assert saved["labels.png"].labels == list(most_confused(np.array(without))[0])


def test_a_source_that_fails_to_draw_loses_nothing(tmp_path, drawing):
    drawing["source"]["fails"] = True
    with pytest.warns(UserWarning, match=r"main/pictures of Drawing: not drawn: RuntimeError: no ink") as caught:
        folder = run(read(drawing), tmp_path / "run", progress=False)
    assert len(caught) == 1
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["without", "with"]


def test_the_settings_and_random_state_of_the_user_are_left_alone(tmp_path):
    before, random = dict(mpl.rcParams), torch.get_rng_state()
    with mpl.rc_context({"text.usetex": True, "font.size": 40}), attempt("a picture"):
        save(confusion_matrices({"without": BEFORE}, NAMES), tmp_path / "c.png")
    assert_picture(tmp_path / "c.png")
    assert dict(mpl.rcParams) == before
    assert torch.equal(torch.get_rng_state(), random)
