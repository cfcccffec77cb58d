"""The kit for authors of plugins: what it takes, what it refuses, and that everything registered passes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import kdlib
from kdlib.registry import build, registry
from kdlib.settings import validated
from kdlib.storing import build_store
from kdlib.testing import check_model, check_point, check_source, example_batch, example_taps

NAMES = {kind: registry().names(kind) for kind in ("point", "source", "model")}


class Framed(nn.Module):
    """A network in two steps, (B, 1, time) -> frames -> taps."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 10)

    def encode(self, x):
        return x.unfold(-1, 4, 4).flatten(1, 2)

    def head(self, frames):
        return {"logits": self.layer(frames).mean(1), "embedding": frames.mean(1)}

    def forward(self, x):
        return self.head(self.encode(x))


class Scenes(kdlib.TensorPart):
    """Eight clips of two classes from four places, with everything that a source may ask of its data or its batch."""

    time_axis = -1
    made_by = {"augmentation": None}  # noqa: RUF012

    def __init__(self):
        x = torch.randn(8, 1, 8, generator=torch.Generator().manual_seed(3))
        super().__init__(x, torch.arange(8) % 2, groups=[f"place-{number // 2}" for number in range(8)])
        self.classes = tuple("0123456789")

    def __getitem__(self, key):
        item = super().__getitem__(key)
        return {**item, "teacher_x": item["x"] + 1}


def live():
    """The objects that a plugin may ask for by position."""
    torch.manual_seed(0)
    teacher = kdlib.freeze(Framed())
    sources = {"one": kdlib.SameInput(teacher), "two": kdlib.SameInput(kdlib.freeze(Framed()))}
    points = {"soft": kdlib.SoftLabels(), "hard": kdlib.HardLabels()}
    return {"teacher": teacher, "student": Framed(), "data": Scenes(), "sources": sources, "points": points}


REQUIRED = {"tap": "maps", "taps": ["maps", "deeper"], "classes": 10}
"""What to write for a setting without a default."""


@pytest.fixture(scope="module", autouse=True)
def labels(tmp_path_factory):
    """Soft labels of the teacher for the scenes, for sources that look them up."""
    REQUIRED["folder"] = str(tmp_path_factory.mktemp("labels"))
    build_store(kdlib.SameInput(live()["teacher"]), Scenes(), REQUIRED["folder"])
    yield
    del REQUIRED["folder"]


def made(kind, name, **settings):
    """What a recipe builds that leaves everything at its default."""
    plugin = registry().get(kind, name)
    required = {key for key, field in plugin.settings.model_fields.items() if field.is_required()}
    block = {key: REQUIRED[key] for key in required} | settings
    facts = {"classes": 10, "channels": 1, "rate": 16000}
    return build(plugin, validated(plugin.settings, block, "here"), live(), facts, "here")


def refused(check, *arguments, **keywords):
    """Return the rule that was broken."""
    with pytest.raises(AssertionError) as caught:
        check(*arguments, **keywords)
    assert str(caught.value)
    return str(caught.value)


# everything that is registered


def side(seed):
    """Taps of one side: of the last layers, and maps of two layers further in."""
    draw = torch.Generator().manual_seed(seed)
    maps = {name: torch.randn(8, size, 5, 5, generator=draw) for name, size in (("maps", 6), ("deeper", 6))}
    return {**example_taps(seed), **maps}


@pytest.mark.parametrize("name", NAMES["point"])
def test_every_point_passes_with_its_default_settings(name):
    check_point(made("point", name), student=side(1), teacher=side(2))


INPUTS = {"digits_mlp": (64,), "wave_cnn": (1, 2 * 26244), "spectrogram_cnn_gru": (1, 25, 64)}
"""The shape of a row, by model."""


@pytest.mark.parametrize("name", NAMES["model"])
def test_every_model_passes_with_its_default_settings(name):
    torch.manual_seed(0)
    check_model(made("model", name), torch.randn(3, *INPUTS[name]))


def batch_for(source):
    """The first batch that a training with this source would see."""
    data = Scenes()
    part = source.dataset(data) if hasattr(source, "dataset") else data
    return next(kdlib.Loader(part, batch=8, shuffle=False).epoch(0))


@pytest.mark.parametrize("name", NAMES["source"])
def test_every_source_passes_with_its_default_settings(name):
    source = made("source", name)
    check_source(source, batch_for(source))


@pytest.mark.parametrize("join", ["input", "frames"])
@pytest.mark.parametrize("view", ["same", "clean"])
def test_a_source_of_several_segments_passes_in_every_way(join, view):
    source = made("source", "multi_segment", join=join, view=view)
    check_source(source, batch_for(source))


# points


def mean_square(student, teacher, batch):
    return mse_loss(student["logits"], teacher["logits"])


class Projected(nn.Module):
    """A point that makes its map by shape."""

    def prepare(self, student, teacher, batch):
        self.map = nn.Linear(student["embedding"].shape[-1], teacher["embedding"].shape[-1])

    def forward(self, student, teacher, batch):
        return mse_loss(self.map(student["embedding"].float()), teacher["embedding"].float())


def test_a_function_and_a_point_with_a_projector_pass():
    check_point(mean_square)
    check_point(Projected())


def test_a_point_is_checked_on_taps_of_ones_own():
    student, teacher = {"frames": torch.randn(4, 5, 3)}, {"frames": torch.randn(4, 5, 3)}
    check_point(lambda s, t, b: mse_loss(s["frames"], t["frames"]), student=student, teacher=teacher, batch={})
    check_point(
        lambda s, t, b: mse_loss(s["a"], t["b"]), student={"a": torch.randn(3, 2)}, teacher={"b": torch.randn(3, 2)}
    )


def test_the_taps_of_the_author_are_not_changed():
    student, teacher = example_taps(1), example_taps(2)
    before = copy.deepcopy((student, teacher))
    check_point(mean_square, student=student, teacher=teacher)
    for side, old in zip((student, teacher), before, strict=True):
        assert all(torch.equal(side[name], tap) and not side[name].requires_grad for name, tap in old.items())


def test_order_may_be_allowed():
    point = lambda s, t, b: (s["logits"] * torch.arange(8.0).view(8, 1).to(s["logits"].dtype)).mean()  # noqa: E731
    assert "row_order=True" in refused(check_point, point)
    check_point(point, row_order=True)


def changes_the_student(student, teacher, batch):
    student["logits"].mul_(0.5)
    return mean_square(student, teacher, batch)


def changes_the_teacher(student, teacher, batch):
    teacher["logits"].add_(1)
    return mean_square(student, teacher, batch)


def changes_the_batch(student, teacher, batch):
    batch["y"].add_(1)
    return mean_square(student, teacher, batch)


def adds_a_tap(student, teacher, batch):
    student["mine"] = student["logits"] * 2
    return student["mine"].mean()


def removes_a_tap(student, teacher, batch):
    del teacher["embedding"]
    return mean_square(student, teacher, batch)


def adds_to_the_batch(student, teacher, batch):
    batch["mine"] = 3
    return mean_square(student, teacher, batch)


def overflows(student, teacher, batch):
    factor = 1.0 if student["logits"].dtype == torch.float32 else float("inf")
    return factor * mean_square(student, teacher, batch)


class Counting:
    """A point with a state that changes in the call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, student, teacher, batch):
        self.calls += 1
        return self.calls * mean_square(student, teacher, batch)


BAD_POINTS = {
    "a vector": (lambda s, t, b: (s["logits"] - t["logits"]).square().mean(1), "(8,)"),
    "one number in an array": (lambda s, t, b: mean_square(s, t, b).view(1), "(1,)"),
    "a float": (lambda s, t, b: mean_square(s, t, b).item(), "float"),
    "detached": (lambda s, t, b: mean_square({"logits": s["logits"].detach()}, t, b), "no gradient"),
    "no gradient that counts": (lambda s, t, b: (s["logits"] * 0).mean(), "zero"),
    "not finite": (lambda s, t, b: mean_square(s, t, b) / 0, "inf"),
    "a gradient that is not finite": (
        lambda s, t, b: (s["logits"] - s["logits"].detach()).abs().sum().sqrt(),
        "finite",
    ),
    "not finite in half precision": (overflows, "bfloat16"),
    "changes the student": (changes_the_student, "student"),
    "changes the teacher": (changes_the_teacher, "teacher"),
    "changes the batch": (changes_the_batch, "batch"),
    "adds a tap": (adds_a_tap, "student"),
    "removes a tap": (removes_a_tap, "teacher"),
    "adds to the batch": (adds_to_the_batch, "batch"),
    "the first row": (lambda s, t, b: mse_loss(s["logits"][:1], t["logits"][:1]), "rows"),
    "neighbours": (
        lambda s, t, b: (s["logits"].roll(1, 0) - t["logits"]).square().mul(torch.arange(8).view(8, 1)).mean(),
        "rows",
    ),
    "neighbours, either way round": (lambda s, t, b: s["logits"].diff(dim=0).square().mean(), "rows"),
    "a state": (Counting(), "twice"),
    "chance": (lambda s, t, b: mean_square(s, t, b) * torch.rand(()), "twice"),
}


@pytest.mark.parametrize("what", BAD_POINTS)
def test_a_point_that_breaks_a_rule_is_refused_with_the_rule(what):
    point, word = BAD_POINTS[what]
    torch.manual_seed(0)
    assert word in refused(check_point, point)


# sources


def net():
    torch.manual_seed(0)
    return kdlib.Tapped(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)), logits="", embedding="0")


def batch():
    return {**example_batch(), "x": torch.randn(8, 4, generator=torch.Generator().manual_seed(1))}


def test_good_sources_pass():
    teacher = kdlib.freeze(net())
    check_source(kdlib.SameInput(teacher), batch())
    check_source(lambda b: {f"a.{name}": tap for name, tap in teacher(b["x"]).items()}, batch())
    check_source(lambda b: {**teacher(b["x"]), "temperature": torch.tensor(2.0)}, batch())


class Holding:
    """A source that holds a teacher which somebody woke up."""

    def __init__(self, wake):
        self.teacher = kdlib.freeze(net())
        self.wake = wake

    def __call__(self, batch):
        taps = self.teacher(batch["x"])
        self.wake(self.teacher.model)
        return taps


def bad_sources():
    frozen, awake = kdlib.freeze(net()), net().eval()

    def changing(b):
        taps = frozen(b["x"])
        b["x"].add_(1)
        return taps

    def adding(b):
        b["seen"] = True
        return frozen(b["x"])

    @torch.inference_mode()
    def inferring(b):
        return frozen.model(b["x"])

    return {
        "gradients": (lambda b: awake(b["x"]), "gradient"),
        "rows dropped": (lambda b: {"logits": frozen(b["x"])["logits"][:-1]}, "7 rows"),
        "rows doubled": (lambda b: {"logits": frozen(b["x"])["logits"].repeat(2, 1)}, "16 rows"),
        "rows in another order": (lambda b: {"logits": frozen(b["x"])["logits"].roll(1, 0)}, "aligned"),
        "a tensor": (lambda b: frozen(b["x"])["logits"], "Tensor"),
        "no tap": (lambda b: {}, "no taps"),
        "a list": (lambda b: {"logits": frozen(b["x"])["logits"].tolist()}, "list"),
        "inference mode": (inferring, "inference"),
        "changes the batch": (changing, "'x'"),
        "adds to the batch": (adding, "batch"),
        "chance": (lambda b: {"logits": torch.randn(8, 3)}, "differ"),
        "a teacher in train mode": (Holding(lambda model: model.train()), "train mode"),
        "a teacher with gradients": (Holding(lambda model: model.requires_grad_(True)), "gradients"),
    }


@pytest.mark.parametrize("what", bad_sources())
def test_a_source_that_breaks_a_rule_is_refused_with_the_rule(what):
    source, word = bad_sources()[what]
    assert word in refused(check_source, source, batch())


# models


class Model(nn.Module):
    """A linear map with something done to its logits."""

    def __init__(self, change=lambda logits: {"logits": logits}):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.change = change

    def forward(self, x):
        return self.change(self.layer(x))


class Forgetful(Model):
    """Part of its state is a plain attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.randn(3), persistent=False)

    def forward(self, x):
        return {"logits": self.layer(x) + self.shift}


class Idle(Model):
    """A layer that no tap depends on."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)


class Disagreeing(Model):
    """Its two steps are not what it does in one."""

    def encode(self, x):
        return self.layer(x)

    def head(self, frames):
        return {"logits": frames + 1}


class Normed(nn.Module):
    """Batch norm that keeps no running statistics: each row depends on all others, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x):
        return {"logits": self.norm(self.layer(x))}


def test_good_models_pass():
    torch.manual_seed(0)
    check_model(Model(), torch.randn(5, 4))
    check_model(net(), torch.randn(5, 4))
    check_model(Framed(), torch.randn(5, 1, 8))


BAD_MODELS = {
    "a tensor": (lambda: Model(lambda logits: logits), "Tensor"),
    "no tap": (lambda: Model(lambda logits: {}), "no taps"),
    "a list": (lambda: Model(lambda logits: {"logits": logits.tolist()}), "list"),
    "not finite": (lambda: Model(lambda logits: {"logits": logits / 0}), "not finite"),
    "mixes rows with the first": (lambda: Model(lambda logits: {"logits": logits - logits[:1]}), "mixes rows"),
    "mixes rows one after another": (lambda: Model(lambda logits: {"logits": logits.cumsum(0)}), "mixes rows"),
    "mixes rows by their mean": (lambda: Model(lambda logits: {"logits": logits - logits.mean(0)}), "mixes rows"),
    "mixes rows by batch norm": (Normed, "mixes rows"),
    "state that is not saved": (Forgetful, "state_dict"),
    "a layer without use": (Idle, "unused.weight"),
    "two steps that disagree": (Disagreeing, "head(encode(x))"),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_a_model_that_breaks_a_rule_is_refused_with_the_rule(what):
    maker, word = BAD_MODELS[what]
    torch.manual_seed(0)
    assert word in refused(check_model, maker(), torch.randn(5, 4))


def test_a_checked_model_is_in_eval_mode_without_gradients_and_with_its_weights():
    model = Model().train()
    before = copy.deepcopy(model.state_dict())
    check_model(model, torch.randn(5, 4))
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
