"""A recipe looked over: everything is built and tried on one batch, and nothing is trained or written."""

import copy

import pytest
import torch
from torch import nn

import kdlib
from kdlib.checking import LOOKED_AT, check
from kdlib.recipe import read
from kdlib.registry import registry

DIGITS = {
    "data": {"kind": "digits"},
    "train": {"epochs": 2},
    "teacher": {"model": {"kind": "digits_mlp", "width": 32}},
    "student": {"model": {"kind": "digits_mlp", "width": 8}},
    "source": {"kind": "same_input"},
    "points": {"soft": {"kind": "soft_labels"}, "hard": {"kind": "hard_labels", "weight": 0.5}},
}


class Halves(nn.Module):
    """Features with a statistic and a view, which remember what they were fitted on."""

    time_axis = -1
    clips = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((), torch.nan))

    def fit(self, clips):
        Halves.clips = len(list(clips))
        self.scale.fill_(2.0)
        return self

    def forward(self, samples):
        return samples / self.scale

    def augment(self, x, generator):
        return x + torch.rand(x.shape, generator=generator)


class Projected(nn.Module):
    """A point that makes its map by shape."""

    def prepare(self, student, teacher, batch):
        self.map = nn.Linear(student["embedding"].shape[-1], teacher["embedding"].shape[-1])

    def forward(self, student, teacher, batch):
        return (self.map(student["embedding"]) - teacher["embedding"]).square().mean()


class Wrapping:
    """A source that adds to the batch what it needs."""

    def __init__(self, teacher) -> None:
        self.teacher = teacher

    def __call__(self, batch):
        return self.teacher(batch["double"] / 2)

    def dataset(self, part):
        wrapped = copy.copy(part)
        kind = type(part)

        class Doubled(kind):
            def __getitem__(self, key):
                item = super().__getitem__(key)
                return {**item, "double": item["x"] * 2}

        wrapped.__class__ = Doubled
        return wrapped


def broken_loss(*, factor: float = 1.0):
    return lambda student, teacher, batch: factor * student["logits"].mean() / 0


class Mine:
    """What the recipes here name."""

    @kdlib.hookimpl
    def kdlib_features(self):
        return {"halves": Halves}

    @kdlib.hookimpl
    def kdlib_points(self):
        return {"projected": Projected, "broken_loss": broken_loss}

    @kdlib.hookimpl
    def kdlib_sources(self):
        return {"wrapping": Wrapping}


@pytest.fixture(scope="module", autouse=True)
def mine():
    registry.cache_clear()
    kdlib.register(Mine())
    yield
    registry.cache_clear()


def reports(recipe, *changes, **more):
    return dict(check(read({**recipe, **more}, list(changes))))


def test_a_good_recipe_has_a_true_report_for_its_system():
    found = reports(DIGITS)
    assert list(found) == ["main"]
    report = found["main"]
    assert isinstance(report, kdlib.Report)
    assert report
    for words in ("teacher", "frozen", "point soft", "point hard", "weight 0.5", "student tap logits", "(32, 10)"):
        assert words in str(report)


def test_the_shipped_digits_pass():
    assert all(dict(check(read("digits"))).values())


def test_nothing_is_said_of_an_optimizer_which_no_recipe_attaches_before_its_training():
    ((_, report),) = check(read(DIGITS))
    assert not any("optimizer" in (what + seen) for _, what, seen in report.rows)


def test_every_system_is_looked_over():
    one = {key: DIGITS[key] for key in ("teacher", "student", "source", "points")}
    wrong = {**one, "points": {"hidden": {"kind": "hidden_mse"}}}
    recipe = {"data": DIGITS["data"], "train": DIGITS["train"], "systems": {"one": one, "two": wrong, "three": one}}
    found = reports(recipe)
    assert [(name, bool(report)) for name, report in found.items()] == [("one", True), ("two", False), ("three", True)]


def test_one_network_without_a_source_is_looked_over():
    alone = {"data": DIGITS["data"], "train": DIGITS["train"], "model": {"kind": "digits_mlp"}}
    assert "point hard" in str(reports(alone)["main"])
    smooth = reports(alone, points={"smooth": {"kind": "hard_labels", "label_smoothing": 0.1}})["main"]
    assert smooth
    assert "point smooth" in str(smooth)


def test_taps_of_two_shapes_are_wrong_and_both_are_told():
    report = reports(DIGITS, points={"hidden": {"kind": "hidden_mse"}})["main"]
    assert not report
    assert "(32, 8)" in str(report)
    assert "(32, 32)" in str(report)
    assert any(mark == "wrong" and "hidden" in what for mark, what, _ in report.rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("points.soft.tap=logit", "Did you mean 'logits'?"),
        ("points.soft.teacher_tap=embedding", "(32, 32)"),
        ("points.soft.teacher=a", "No teacher named 'a'"),
        ("points.bad.kind=broken_loss", "point bad"),
    ],
)
def test_what_is_wrong_with_a_point_is_told(change, words):
    report = reports(DIGITS, change)["main"]
    assert not report
    assert words in str(report)


def test_a_projector_is_made():
    assert reports(DIGITS, points={"mine": {"kind": "projected"}})["main"]


def test_a_source_that_wraps_the_data_gets_its_batch():
    assert reports(DIGITS, source={"kind": "wrapping"})["main"]


def test_features_are_fitted_on_some_clips():
    assert reports(DIGITS, "data.train=1000", features={"kind": "halves"})["main"]
    assert Halves.clips == LOOKED_AT


def test_a_data_set_smaller_than_what_is_looked_at_will_do():
    assert reports(DIGITS, "data.train=10", features={"kind": "halves"})["main"]
    assert Halves.clips == 10


def test_a_setting_that_disagrees_with_the_data_is_refused():
    with pytest.raises(kdlib.RecipeError, match=r"student\.model\.classes: .*12.*10"):
        reports(DIGITS, "student.model.classes=12")


def test_nothing_is_written_and_no_random_state_is_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    reports(DIGITS)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_same_recipe_gives_the_same_report():
    assert str(reports(DIGITS)["main"]) == str(reports(DIGITS)["main"])
    assert str(reports(DIGITS)["main"]) != str(reports(DIGITS, "train.seed=1")["main"])
