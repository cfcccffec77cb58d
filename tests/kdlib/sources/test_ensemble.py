"""Several teachers, mixed by a rule."""

import copy
import pickle

import numpy as np
import pytest
import torch

import kdlib
from kdlib.digits import DigitsMLP, digits
from kdlib.settings import read_signature
from kdlib.sources.ema import Ema
from kdlib.sources.ensemble import Ensemble, mixed_logits
from kdlib.testing import check_source


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


class Given:
    """A source of given taps."""

    def __init__(self, **taps):
        self.taps = taps

    def __call__(self, batch):
        return self.taps


A, B, C = (noise(6, 5, seed=seed) for seed in range(3))
SOURCES = {"a": Given(logits=A, embedding=noise(6, 4)), "b": Given(logits=B), "c": Given(logits=C)}


def test_probabilities_are_the_mean_of_the_distributions():
    taps = Ensemble(SOURCES)({})
    expected = np.mean([softmax(z.numpy()) for z in (A, B, C)], 0)
    np.testing.assert_allclose(softmax(taps["logits"].numpy()), expected, rtol=1e-12)
    np.testing.assert_allclose(taps["logits"].numpy(), np.log(expected), rtol=1e-10)


def test_a_temperature_softens_the_mean_and_not_its_parts():
    logits = Ensemble(SOURCES)({})["logits"]
    p = np.mean([softmax(z.numpy()) for z in (A, B, C)], 0)
    softened = p**0.25 / (p**0.25).sum(-1, keepdims=True)
    np.testing.assert_allclose((logits / 4).softmax(-1).numpy(), softened, rtol=1e-10)
    parts = np.mean([softmax(z.numpy() / 4) for z in (A, B, C)], 0)
    assert np.abs(softened - parts).max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_are_the_geometric_mean_at_every_temperature(temperature):
    logits = Ensemble(SOURCES, mix="logits")({})["logits"]
    product = np.prod([softmax(z.numpy() / temperature) ** (1 / 3) for z in (A, B, C)], 0)
    expected = product / product.sum(-1, keepdims=True)
    np.testing.assert_allclose((logits / temperature).softmax(-1).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_weights_are_scaled_to_one_and_are_one_where_none_is_given(mix):
    given = Ensemble(SOURCES, mix=mix, weights={"a": 2.0, "b": 0.5})({})["logits"].numpy()
    parts = [softmax(z.numpy()) if mix == "probabilities" else z.numpy() for z in (A, B, C)]
    mean = (2 * parts[0] + 0.5 * parts[1] + parts[2]) / 3.5
    np.testing.assert_allclose(given, np.log(mean) if mix == "probabilities" else mean, rtol=1e-10)
    one = Ensemble(SOURCES, mix=mix, weights={"a": 0.0, "c": 0.0})({})["logits"]
    expected = B.log_softmax(-1) if mix == "probabilities" else B
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


def test_every_sources_taps_are_there_by_name():
    for mix, own in (("probabilities", {"logits"}), ("logits", {"logits"}), ("losses", set())):
        taps = Ensemble(SOURCES, mix=mix)({})
        assert set(taps) == {"a.logits", "a.embedding", "b.logits", "c.logits"} | own
        assert taps["a.embedding"] is SOURCES["a"].taps["embedding"]


def test_losses_are_mixed_by_the_points_weights():
    student = {"logits": noise(6, 5, seed=9)}
    source = Ensemble({"a": Given(logits=A, embedding=noise(6, 7)), "b": Given(logits=B)}, mix="losses")
    taps, point = source({}), kdlib.SoftLabels()
    loss = 0.3 * kdlib.of("a", point)(student, taps, {}) + 0.7 * kdlib.of("b", point)(student, taps, {})
    expected = 0.3 * point(student, {"logits": A}, {}) + 0.7 * point(student, {"logits": B}, {})
    torch.testing.assert_close(loss, expected)


def test_an_ensemble_of_ensembles_names_its_teachers_twice():
    inner = Ensemble({"x": Given(logits=A), "y": Given(logits=B)}, mix="losses")
    taps = Ensemble({"in": inner, "c": Given(logits=C)}, mix="losses")({})
    assert set(taps) == {"in.x.logits", "in.y.logits", "c.logits"}
    point = kdlib.SoftLabels()
    found = kdlib.of("in", kdlib.of("y", point))({"logits": C}, taps, {})
    assert found == point({"logits": C}, {"logits": B}, {})


@pytest.mark.parametrize("extreme", [1e4, -1e4, -400.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(extreme, dtype):
    sure = torch.zeros(1, 3, dtype=dtype)
    sure[0, 1] = extreme
    logits = mixed_logits([sure, torch.zeros(1, 3, dtype=dtype)], [1, 1], mix="probabilities")
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    expected = (softmax(sure.double().numpy()) + 1 / 3) / 2
    np.testing.assert_allclose(logits.exp().double().numpy(), expected, rtol=1e-5)


def test_classes_on_another_axis():
    a, b = A.T.unsqueeze(0), B.T.unsqueeze(0)  # (1, classes, positions)
    source = Ensemble({"a": Given(logits=a), "b": Given(logits=b)}, dim=1)
    expected = np.log((softmax(A.numpy()) + softmax(B.numpy())) / 2)
    np.testing.assert_allclose(source({})["logits"][0].T.numpy(), expected, rtol=1e-10)


def test_other_numbers_of_classes_name_the_teachers():
    sources = {"big": Given(logits=A), "small": Given(logits=noise(6, 4))}
    for mix in ("probabilities", "logits"):
        with pytest.raises(kdlib.TapError, match="'big' has 5, 'small' has 4"):
            Ensemble(sources, mix=mix)({})
    assert set(Ensemble(sources, mix="losses")({})) == {"big.logits", "small.logits"}


def test_a_source_without_logits_is_named():
    with pytest.raises(kdlib.TapError, match="'b' gives hidden and no logits"):
        Ensemble({"a": Given(logits=A), "b": Given(hidden=B)})({})


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ({}, {}, "at least one"),
        ({"a.b": Given(logits=A)}, {}, "'a.b'"),
        ({"": Given(logits=A)}, {}, "''"),
        ({"a": 3}, {}, "'a' is a int"),
        ({"first": Given(logits=A)}, {"weights": {"frist": 1.0}}, "Did you mean 'first'"),
        ({"a": Given(logits=A)}, {"weights": {"a": -1.0}}, "from 0 up"),
        ({"a": Given(logits=A)}, {"weights": {"a": float("nan")}}, "from 0 up"),
        ({"a": Given(logits=A)}, {"weights": {"a": 0.0}}, "all are 0"),
        ({"a": Given(logits=A)}, {"mix": "median"}, "mix='median'"),
    ],
)
def test_what_cannot_be_mixed_is_refused(sources, settings, message):
    with pytest.raises(kdlib.KdlibError, match=message):
        Ensemble(sources, **settings)


def test_a_network_in_place_of_a_source_is_refused_and_says_how():
    with pytest.raises(kdlib.TapError, match=r"'net' \(DigitsMLP\) has parameters.*kdlib\.freeze"):
        Ensemble({"net": DigitsMLP()})


def teachers(count=2):
    torch.manual_seed(0)
    return {name: kdlib.SameInput(kdlib.freeze(DigitsMLP(width=8 + n))) for n, name in enumerate("abc"[:count])}


@pytest.mark.parametrize("mix", ["probabilities", "logits", "losses"])
def test_it_is_a_source_with_frozen_teachers(mix):
    source = Ensemble(teachers(), mix=mix)
    check_source(source, {"x": torch.rand(6, 64)})
    one = kdlib.Distiller(DigitsMLP(width=4), source, hard=kdlib.HardLabels())
    assert all(name.startswith("student.") for name, _ in one.named_parameters())
    assert {name.split(".")[0] for name in one.state_dict()} == {"student", "step"}
    one.train()
    assert not any(inner.teacher.model.training for inner in source.sources.values())


def test_a_teacher_that_shares_the_students_weights_is_found():
    student = DigitsMLP(width=4)
    with pytest.raises(kdlib.TapError, match="share"):
        kdlib.Distiller(student, Ensemble({"a": kdlib.SameInput(kdlib.freeze(student))}), hard=kdlib.HardLabels())


def test_the_state_of_a_source_inside_is_saved_advanced_and_not_trained():
    torch.manual_seed(0)
    student = DigitsMLP(width=8)
    source = Ensemble({"train": Ema(student, decay=0.5, warm_up=False), **teachers(1)})
    one = kdlib.Distiller(student, source, soft=kdlib.SoftLabels())
    assert "source.states.train.average.model.hidden.weight" in one.state_dict()
    assert all(name.startswith("student.") for name, _ in one.named_parameters())
    optimizer = one.attach(torch.optim.SGD(one.parameters(), lr=1.0))
    before, batch = copy.deepcopy(one.state_dict()), {"x": torch.rand(4, 64)}
    one(batch).total.backward()
    optimizer.step()
    name = "hidden.weight"
    middle = (before[f"student.{name}"] + one.state_dict()[f"student.{name}"]) / 2
    torch.testing.assert_close(one.state_dict()[f"source.states.train.average.model.{name}"], middle)
    torch.manual_seed(1)
    fresh = DigitsMLP(width=8)
    other = kdlib.Distiller(fresh, Ensemble({"train": Ema(fresh), **teachers(1)}), soft=kdlib.SoftLabels())
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.source(batch)["logits"], one.source(batch)["logits"])
    twin = copy.deepcopy(one)
    twin.advance()
    assert torch.equal(other.source(batch)["logits"], one.source(batch)["logits"])


class Adding:
    """A source that wants something beside each item, under one key whatever its settings."""

    def __init__(self, shift):
        self.shift = shift

    def __call__(self, batch):
        return {"logits": batch["more"]}

    def dataset(self, part):
        return Added(part, self.shift)


class Added:
    def __init__(self, part, shift):
        self.part, self.shift = part, shift
        self.labels, self.groups, self.ids = part.labels, part.groups, part.ids

    def __len__(self):
        return len(self.part)

    def __getitem__(self, key):
        item = self.part[key]
        return {**item, "more": item["x"] + self.shift}


PART = kdlib.TensorPart(torch.arange(12.0).view(6, 2), [0, 1] * 3, groups=list("aabbcc"))


def test_two_sources_that_add_the_same_key_get_each_their_own():
    source = Ensemble({"one": Adding(1), "ten": Adding(10), "same": lambda batch: {"logits": batch["x"]}}, mix="losses")
    part = source.dataset(PART)
    assert isinstance(part, kdlib.DataPart)
    assert set(part[0, 3]) == {"x", "y", "index", "epoch", "one.more", "ten.more"}
    batch = next(iter(kdlib.Loader(part, batch=6, shuffle=False)))
    taps = source(batch)
    assert torch.equal(taps["one.logits"], PART.x + 1)
    assert torch.equal(taps["ten.logits"], PART.x + 10)
    assert torch.equal(taps["same.logits"], PART.x)
    check_source(source, batch)


def test_nested_ensembles_keep_their_additions_apart():
    source = Ensemble({"in": Ensemble({"one": Adding(1), "two": Adding(2)}), "ten": Adding(10)}, mix="losses")
    batch = next(iter(kdlib.Loader(source.dataset(PART), batch=6, shuffle=False)))
    taps = source(batch)
    shifts = {"in.one.logits": 1, "in.two.logits": 2, "ten.logits": 10}
    assert all(torch.equal(taps[name], PART.x + shift) for name, shift in shifts.items())


def test_one_source_that_adds_needs_no_names_and_none_leaves_the_part_alone():
    only = Ensemble({"one": Adding(1), "same": lambda batch: {"logits": batch["x"]}})
    part = only.dataset(PART)
    assert set(part[0, 3]) == {"x", "y", "index", "epoch", "more"}
    assert Ensemble(SOURCES).dataset(PART) is PART
    assert Ensemble({"in": Ensemble(SOURCES)}).dataset(PART) is PART


def test_the_wrapped_part_knows_what_the_part_knows_and_pickles():
    PART.time_axis = -1
    part = Ensemble({"one": Adding(1), "ten": Adding(10)}).dataset(PART)
    assert (len(part), part.time_axis, list(part.groups)) == (6, -1, PART.groups)
    assert not part.augmented
    assert not hasattr(part, "windows")
    twin = pickle.loads(pickle.dumps(part))
    assert torch.equal(twin[0, 4]["ten.more"], part[0, 4]["ten.more"])
    assert copy.deepcopy(part).time_axis == -1


def test_the_schema_has_its_weights():
    live, schema = read_signature("source", "ensemble", Ensemble)
    assert live == ("sources",)
    assert schema(weights={"a": 2.0}).weights == {"a": 2.0}
    for wrong in ({"weights": {"a": -1.0}}, {"mix": "median"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            schema(**wrong)


@pytest.mark.parametrize("mix", ["probabilities", "logits", "losses"])
def test_two_epochs_of_fit_on_digits(mix):
    parts, source = digits(train=60, valid=20), Ensemble(teachers(), mix=mix)
    soft = kdlib.of("b", kdlib.SoftLabels()) if mix == "losses" else kdlib.SoftLabels()
    one = kdlib.Distiller(DigitsMLP(width=8), source, soft=soft, hard=kdlib.HardLabels())
    history = kdlib.fit(one, parts.train, valid=parts.valid, epochs=2, batch=20, progress=False)
    assert history.epochs[1]["hard"] < history.epochs[0]["hard"]
