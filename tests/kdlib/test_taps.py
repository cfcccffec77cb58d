"""Reading tensors off a network, and freezing one into a teacher."""

import copy
import functools
import gc
import pickle
import re
import weakref
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import kdlib


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mlp(inplace=False):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 3))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        frames, _ = self.gru(self.body(x))
        return self.fc(frames[:, -1])


class Model(nn.Module):
    """Any forward over a few layers."""

    def __init__(self, forward):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.relu = nn.ReLU()
        self.run = forward

    def forward(self, x, **settings):
        return self.run(self, x, **settings)


def hooks_on(module):
    return sum(len(part._forward_hooks) for part in module.modules())


# Tapped: what is read


def test_a_submodules_output_and_the_models_own():
    net, x = mlp(), torch.randn(5, 4)
    taps = kdlib.Tapped(net, logits="", embedding="1", first="0")(x)
    assert list(taps) == ["logits", "embedding", "first"]
    assert torch.equal(taps["first"], net[0](x))
    assert torch.equal(taps["embedding"], net[:2](x))
    assert torch.equal(taps["logits"], net(x))


def test_a_nested_submodule_and_one_item_of_a_tuple():
    net, x = Recurrent(), torch.randn(5, 7, 4)
    taps = kdlib.Tapped(net, hidden="body.0", frames="gru[0]", state="gru[1]", last="gru[-1]", logits="fc")(x)
    frames, state = net.gru(net.body(x))
    assert torch.equal(taps["hidden"], net.body[0](x))
    assert torch.equal(taps["frames"], frames)
    assert torch.equal(taps["state"], state)
    assert torch.equal(taps["last"], state)
    assert torch.equal(taps["logits"], net(x))


Output = namedtuple("Output", ["last_hidden_state", "pooled"])


@pytest.mark.parametrize(
    "make",
    [
        lambda hidden, pooled: Output(hidden, pooled),
        lambda hidden, pooled: {"last_hidden_state": hidden, "pooled": pooled},
        lambda hidden, pooled: SimpleNamespace(last_hidden_state=hidden, pooled=pooled),
    ],
    ids=["named tuple", "mapping", "attributes"],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_named_output_of_the_model_or_of_a_submodule(make, own):
    inner = Model(lambda self, x: make(self.first(x), self.second(x)))
    x = torch.randn(5, 4)
    expected = inner.first(x), inner.second(x)
    if own:
        tapped = kdlib.Tapped(inner, hidden="last_hidden_state", pooled="pooled")
    else:
        outer = nn.ModuleDict({"encoder": inner})
        outer.forward = lambda x: inner(x) and x
        tapped = kdlib.Tapped(outer, hidden="encoder.last_hidden_state", pooled="encoder.pooled")
    taps = tapped(x)
    assert torch.equal(taps["hidden"], expected[0])
    assert torch.equal(taps["pooled"], expected[1])


def test_an_item_of_a_list_inside_a_named_output():
    net = Model(lambda self, x: {"hidden_states": [self.first(x), self.second(x)]})
    x = torch.randn(5, 4)
    assert torch.equal(kdlib.Tapped(net, h="hidden_states[1]")(x)["h"], net.second(x))


def test_a_tap_may_have_the_name_of_a_module_attribute():
    taps = kdlib.Tapped(mlp(), model="0", train="1", self="", taps="2")(torch.randn(2, 4))
    assert list(taps) == ["model", "train", "self", "taps"]


def test_further_arguments_reach_the_model():
    net = Model(lambda self, x, scale=1.0: self.first(x) * scale)
    x = torch.randn(2, 4)
    assert torch.equal(kdlib.Tapped(net, out="")(x, scale=3.0)["out"], net.first(x) * 3.0)


def test_the_models_output_weights_and_gradients_are_as_without_it():
    net, x = mlp(), torch.randn(5, 4)
    plain = copy.deepcopy(net)
    tapped = kdlib.Tapped(net, logits="", embedding="1")
    taps = tapped(x)
    (taps["logits"].sum() + taps["embedding"].square().sum()).backward()
    hidden = plain[:2](x)
    (plain[2](hidden).sum() + hidden.square().sum()).backward()
    for parameter, expected in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=0)
    assert {f"model.{name}" for name in plain.state_dict()} == set(tapped.state_dict())


def test_two_readers_of_one_model_do_not_disturb_each_other():
    net, x = mlp(), torch.randn(2, 4)
    one, other = kdlib.Tapped(net, a="0"), kdlib.Tapped(net, b="1")
    assert torch.equal(one(x)["a"], net[0](x))
    assert torch.equal(other(x)["b"], net[:2](x))
    one.remove()
    assert torch.equal(other(x)["b"], net[:2](x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients_and_in_inference_mode(mode):
    tapped, x = kdlib.Tapped(mlp(), logits="", embedding="1"), torch.randn(2, 4)
    expected = tapped(x)["embedding"]
    with mode():
        taps = tapped(x)
    assert torch.equal(taps["embedding"], expected)
    assert not taps["embedding"].requires_grad


# Tapped: what is refused


def test_a_tap_that_did_not_fire_is_named():
    net = Model(lambda self, x: self.first(x))
    with pytest.raises(kdlib.TapError, match=r"'late' did not fire.*'second'"):
        kdlib.Tapped(net, late="second")(torch.randn(2, 4))


def test_a_tap_that_did_not_fire_this_time_is_not_the_last_ones():
    net = Model(lambda self, x, skip=False: self.first(x) if skip else self.second(x))
    tapped = kdlib.Tapped(net, late="second")
    tapped(torch.randn(2, 4))
    with pytest.raises(kdlib.TapError, match="'late' did not fire"):
        tapped(torch.randn(2, 4), skip=True)
    assert tapped(torch.randn(2, 4))["late"].shape == (2, 4)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_shared_module_that_fires_twice_is_refused(gradients):
    net = Model(lambda self, x: self.first(self.first(x)))
    with torch.set_grad_enabled(gradients), pytest.raises(kdlib.TapError, match=r"'twice' fired twice.*'first'"):
        kdlib.Tapped(net, twice="first")(torch.randn(2, 4))


def test_a_tap_changed_in_place_by_a_relu_is_refused_by_name():
    tapped = kdlib.Tapped(mlp(inplace=True), logits="", before="0")
    with pytest.raises(kdlib.TapError, match=r"'before' was changed in place.*'0'"):
        tapped(torch.randn(2, 4))
    with torch.no_grad(), pytest.raises(kdlib.TapError, match="changed in place"):
        tapped(torch.randn(2, 4))


def test_the_in_place_layer_itself_may_be_tapped():
    net, x = mlp(inplace=True), torch.randn(2, 4)
    taps = kdlib.Tapped(net, after="1", logits="")(x)
    assert torch.equal(taps["after"], torch.relu(net[0](x)))


@pytest.mark.parametrize(
    ("path", "known"), [("body.relu", "body.0"), ("headd", "head"), ("head.weight", "head"), ("body[0]", "body.0")]
)
def test_a_path_that_names_nothing_says_what_there_is(path, known):
    net = nn.Sequential()
    net.add_module("body", mlp())
    net.add_module("head", nn.Linear(3, 2))
    with pytest.raises(kdlib.TapError, match=rf"(?s)'gone'.*{path.replace('[', '.').replace(']', '.')}.*{known}"):
        kdlib.Tapped(net, gone=path)(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("layers[1]", "layers.1"),
        ("layers[1][0]", "layers.1"),
        ("layers", "layers.0"),
        ("layers[7]", "layers.0"),
        ("layers.last", "layers.0"),
        ("heads", "heads.a"),
        ("heads.b[0]", "heads.b.0"),
        ("none[0]", "none.0"),
    ],
)
def test_a_list_of_modules_which_is_never_called_says_how_to_name_one_in_it(path, written):
    net = Model(lambda self, x: x)
    net.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    net.heads = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleList([nn.Linear(4, 4)])})
    net.none = nn.ModuleList()
    list_ = re.escape(written.rpartition(".")[0])
    with pytest.raises(kdlib.TapError, match=rf"Tap 'h': '{list_}' is a Module\w+, .* write '{re.escape(written)}'\."):
        kdlib.Tapped(net, h=path)


def test_a_list_of_modules_that_can_be_called_may_be_tapped():
    class Pair(nn.ModuleList):
        def forward(self, x):
            return self[0](x), self[1](x)

    net, x = nn.Sequential(nn.Linear(4, 4), Pair([nn.Linear(4, 2), nn.Linear(4, 3)])), torch.randn(2, 4)
    assert torch.equal(kdlib.Tapped(net, h="1[1]")(x)["h"], net(x)[1])


def test_an_item_of_what_a_sequential_returns_may_be_tapped():
    net, x = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.GRU(8, 6))), torch.randn(2, 4)
    assert torch.equal(kdlib.Tapped(net, frames="0[0]")(x)["frames"], net(x)[0])


def test_a_near_name_is_suggested():
    net = nn.Sequential()
    net.add_module("embedding", nn.Linear(4, 2))
    with pytest.raises(kdlib.TapError, match=r"Did you mean 'embedding'\?"):
        kdlib.Tapped(net, e="embeding")(torch.randn(2, 4))


def test_a_tuple_says_how_to_pick_from_it():
    with pytest.raises(kdlib.TapError, match=r"'frames'.*tuple of 2.*'gru\[0\]'"):
        kdlib.Tapped(Recurrent(), frames="gru")(torch.randn(2, 7, 4))


def test_an_item_that_a_tuple_lacks_is_refused():
    with pytest.raises(kdlib.TapError, match=r"'frames'.*tuple of 2.*5"):
        kdlib.Tapped(Recurrent(), frames="gru[5]")(torch.randn(2, 7, 4))


def test_a_row_of_a_tensor_cannot_be_taken_for_an_item():
    with pytest.raises(kdlib.TapError, match="'row'"):
        kdlib.Tapped(mlp(), row="2[0]")(torch.randn(2, 4))
    with pytest.raises(kdlib.TapError, match="'turned'"):
        kdlib.Tapped(mlp(), turned="2.T")(torch.randn(2, 4))


def test_no_taps_and_no_module_are_refused():
    with pytest.raises(kdlib.TapError, match="at least one tap"):
        kdlib.Tapped(mlp())
    with pytest.raises(kdlib.TapError, match="function"):
        kdlib.Tapped(lambda x: x, logits="")


def test_after_a_forward_that_failed_the_next_one_works():
    tapped = kdlib.Tapped(mlp(), logits="", embedding="1")
    with pytest.raises(RuntimeError):
        tapped(torch.randn(2, 5))
    assert tapped(torch.randn(2, 4))["embedding"].shape == (2, 8)


# Tapped: copies, hooks, memory


def test_a_deep_copy_captures_into_the_copy_and_not_into_the_original():
    tapped, x = kdlib.Tapped(mlp(), logits="", embedding="1"), torch.randn(2, 4)
    before = tapped(x)
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    taps = twin(x)
    assert torch.equal(taps["embedding"], torch.zeros(2, 8))
    taps["embedding"].sum().backward()
    assert all(parameter.grad is None for parameter in tapped.parameters())
    assert torch.equal(tapped(x)["embedding"], before["embedding"])


def test_hooks_taken_off_a_copy_stay_on_the_original():
    tapped, x = kdlib.Tapped(mlp(), logits="", embedding="1"), torch.randn(2, 4)
    twin = copy.deepcopy(tapped)
    twin.remove()
    assert hooks_on(twin) == 0
    assert hooks_on(tapped) == 1
    assert tapped(x)["embedding"].shape == (2, 8)


def test_a_pickle_round_trip_gives_the_same_taps():
    tapped, x = kdlib.Tapped(mlp(), logits="", embedding="1"), torch.randn(2, 4)
    expected = tapped(x)
    loaded = pickle.loads(pickle.dumps(tapped))
    assert list(loaded(x)) == list(expected)
    assert all(torch.equal(loaded(x)[name], tap) for name, tap in expected.items())
    loaded.remove()
    assert hooks_on(loaded) == 0
    assert torch.equal(tapped(x)["embedding"], expected["embedding"])


def test_calling_the_inner_model_alone_records_nothing():
    net, x = mlp(), torch.randn(2, 4)
    tapped = kdlib.Tapped(net, embedding="1")
    hidden = []
    net[1].register_forward_hook(lambda module, args, output: hidden.append(weakref.ref(output)))
    output = net(x)
    assert hidden[0]() is not None  # the graph of the output holds it
    del output
    gc.collect()
    assert hidden[0]() is None
    assert torch.equal(tapped(x)["embedding"], net[:2](x))


def test_a_call_of_the_inner_model_between_forwards_does_not_count_as_firing():
    net = Model(lambda self, x, skip=False: x if skip else self.first(x))
    tapped = kdlib.Tapped(net, tap="first")
    net(torch.randn(2, 4))
    with pytest.raises(kdlib.TapError, match="did not fire"):
        tapped(torch.randn(2, 4), skip=True)


def test_nothing_is_kept_after_forward():
    tapped = kdlib.Tapped(mlp(), logits="", embedding="1")
    taps = tapped(torch.randn(2, 4))
    references = [weakref.ref(tap) for tap in taps.values()]
    assert all(reference() is not None for reference in references)
    del taps
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_nothing_is_kept_after_a_forward_that_failed():
    references = []

    def fail(self, x):
        references.append(weakref.ref(self.first(x)))
        raise ValueError("on purpose")

    tapped = kdlib.Tapped(Model(fail), tap="first")
    with pytest.raises(ValueError, match="on purpose"):
        tapped(torch.randn(2, 4))
    gc.collect()
    assert references[0]() is None


def test_remove_leaves_the_model_as_it_was():
    net, x = mlp(), torch.randn(2, 4)
    tapped = kdlib.Tapped(net, embedding="1", first="0")
    assert hooks_on(net) == 2
    tapped.remove()
    assert hooks_on(net) == 0
    tapped.remove()  # twice does no harm
    with pytest.raises(kdlib.TapError):
        tapped(x)


def test_with_takes_the_hooks_off_also_after_an_error():
    net, x = mlp(), torch.randn(2, 4)
    with kdlib.Tapped(net, embedding="1") as tapped:
        assert torch.equal(tapped(x)["embedding"], net[:2](x))
    assert hooks_on(net) == 0
    with pytest.raises(ValueError, match="on purpose"), kdlib.Tapped(net, embedding="1"):
        raise ValueError("on purpose")
    assert hooks_on(net) == 0


def test_remove_leaves_the_hooks_of_others():
    net, calls = mlp(), []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    kdlib.Tapped(net, embedding="1").remove()
    net(torch.randn(2, 4))
    assert calls == [1]


def test_compiled_it_gives_the_same_taps_and_gradients():
    tapped, x = kdlib.Tapped(mlp(), logits="", embedding="1"), torch.randn(5, 4)
    expected = tapped(x)
    (gradient,) = torch.autograd.grad(expected["embedding"].sum(), tapped.model[0].weight)
    compiled = torch.compile(tapped, backend="eager")
    try:
        for _ in range(2):
            taps = compiled(x)
            assert list(taps) == list(expected)
            assert all(torch.equal(taps[name], tap) for name, tap in expected.items())
            (found,) = torch.autograd.grad(taps["embedding"].sum(), tapped.model[0].weight)
            assert torch.equal(found, gradient)
    finally:
        torch._dynamo.reset()


# Tapped: gradient checkpointing


def checkpointed(reentrant):
    return Model(
        lambda self, x: checkpoint(lambda h: self.relu(self.second(h)), self.first(x), use_reentrant=reentrant)
    )


def test_checkpointing_gives_the_gradients_of_the_plain_model():
    net, x = checkpointed(False), torch.randn(5, 4)
    tapped = kdlib.Tapped(net, inside="second", out="")
    for _ in range(2):  # the recomputation in a backward is no firing in the next forward
        net.zero_grad()
        taps = tapped(x)
        assert taps["inside"].requires_grad
        (taps["inside"].square().sum() + taps["out"].sum()).backward()
    found = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    inside = net.second(net.first(x))
    (inside.square().sum() + torch.relu(inside).sum()).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_reentrant_checkpointing_gives_no_detached_tap():
    tapped = kdlib.Tapped(checkpointed(True), inside="second", out="")
    try:
        taps = tapped(torch.randn(5, 4))
    except kdlib.TapError as error:
        assert "inside" in str(error)  # noqa: PT017
    else:
        assert taps["inside"].requires_grad  # detached, a point on it would train nothing and say nothing


# freeze


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_puts_the_model_in_eval_mode_and_stops_its_gradients(net):
    teacher = kdlib.freeze(kdlib.Tapped(net, logits=""))
    assert isinstance(teacher, kdlib.Frozen)
    assert not any(part.training for part in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    taps = teacher(torch.randn(5, 4, requires_grad=True))
    assert not taps["logits"].requires_grad
    x = torch.randn(5, 4)
    assert torch.equal(teacher(x)["logits"], net(x))


def test_a_module_that_holds_it_does_not_reach_it(net):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = kdlib.freeze(kdlib.Tapped(net, logits=""))
            self.layer = nn.Linear(2, 2)

    holder = Holder()
    assert not isinstance(holder.teacher, nn.Module)
    assert [name for name, _ in holder.named_parameters()] == ["layer.weight", "layer.bias"]
    assert list(holder.state_dict()) == ["layer.weight", "layer.bias"]
    assert len(list(holder.modules())) == 2
    holder.train()
    assert not any(part.training for part in net.modules())
    holder.to(torch.float64).requires_grad_(True)
    assert net[0].weight.dtype == torch.float32
    assert not net[0].weight.requires_grad


def test_buffers_and_parameters_are_bit_equal_after_many_calls_in_training(net):
    teacher = kdlib.freeze(kdlib.Tapped(net, logits=""))
    student = nn.Linear(4, 3)
    before = state(net)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(20):
        x = 100 * torch.randn(5, 4)
        optimizer.zero_grad()
        mse_loss(student(x), teacher(x)["logits"]).backward()
        optimizer.step()
    assert equal(state(net), before)


@pytest.mark.parametrize("wrapped", [True, False])
def test_it_runs_in_eval_mode_even_if_the_models_owner_calls_train(net, wrapped):
    model = kdlib.Tapped(net, logits="")
    teacher = kdlib.freeze(model)
    x = torch.randn(5, 4)
    expected, before = teacher(x)["logits"], state(net)
    (net if wrapped else model).train()
    assert torch.equal(teacher(x)["logits"], expected)
    assert equal(state(net), before)


def test_the_students_backward_flows_through_mse_loss_on_teacher_taps(net):
    teacher, student = kdlib.freeze(kdlib.Tapped(net, logits="")), nn.Linear(4, 3)
    x = torch.randn(5, 4)
    tap = teacher(x)["logits"]
    assert not tap.is_inference()
    mse_loss(student(x), tap).backward()
    expected = 2 * (student(x) - tap) / 15
    torch.testing.assert_close(student.bias.grad, expected.sum(0), rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_with_a_dtype_a_copy_runs_and_the_original_is_untouched(net):
    before = state(net)
    teacher = kdlib.freeze(kdlib.Tapped(net, logits="", hidden="0"), dtype=torch.bfloat16)
    assert equal(state(net), before)
    assert all(part.training for part in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    x = torch.randn(5, 4)
    for dtype in (torch.float32, torch.float64, torch.float16):
        taps = teacher(x.to(dtype))
        assert {tap.dtype for tap in taps.values()} == {dtype}
    expected = copy.deepcopy(net).eval().to(torch.bfloat16)(x.bfloat16()).float()
    assert torch.equal(teacher(x)["logits"], expected)
    assert not torch.equal(expected, copy.deepcopy(net).eval()(x))  # bfloat16 it is


class Witness(nn.Module):
    """Tells what it ran under."""

    seen = ()

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, number=None):
        Witness.seen = (torch.is_autocast_enabled("cpu"), x.dtype, None if number is None else number.dtype)
        return {"logits": self.layer(x)}


def test_with_a_dtype_the_callers_autocast_is_off_inside_and_on_again_after():
    teacher = kdlib.freeze(Witness(), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        taps = teacher(torch.randn(2, 4))
        assert Witness.seen[:2] == (False, torch.float32)
        assert torch.is_autocast_enabled("cpu")
    assert taps["logits"].dtype == torch.float32


def test_without_a_dtype_the_callers_autocast_is_obeyed():
    with torch.autocast("cpu", torch.bfloat16):
        assert kdlib.freeze(Witness())(torch.randn(2, 4))["logits"].dtype == torch.bfloat16
    assert Witness.seen[0]


def test_with_a_dtype_integers_are_not_cast():
    kdlib.freeze(Witness(), dtype=torch.bfloat16)(torch.randn(2, 4), number=torch.tensor([1, 2]))
    assert Witness.seen[1:] == (torch.bfloat16, torch.int64)


def test_it_stays_on_its_device_and_brings_the_taps_back(net):
    teacher = kdlib.freeze(kdlib.Tapped(net, logits=""), device="cpu")
    assert teacher(torch.randn(2, 4))["logits"].device.type == "cpu"
    follower = kdlib.freeze(kdlib.Tapped(nn.Linear(4, 3), logits=""))
    assert follower(torch.randn(2, 4, device="meta"))["logits"].device.type == "meta"


@pytest.mark.parametrize("model", [nn.Linear(4, 3), nn.Identity()])
def test_a_device_by_another_of_its_names_moves_nothing_in_a_call(monkeypatch, model):
    assert torch.device("cpu:0") != torch.zeros(0, device="cpu:0").device  # as "cuda" and "cuda:0"
    teacher = kdlib.freeze(kdlib.Tapped(model, logits=""), device="cpu:0")
    moved, seen, x = [], [], torch.randn(2, 4)
    monkeypatch.setattr(teacher.model, "to", moved.append)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher(x)
    assert moved == []
    assert seen[0] is x


class Framed(nn.Module):
    """Convolution, batch norm and GRU, as frames and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.gru = nn.GRU(4, 5, batch_first=True)
        self.fc = nn.Linear(5, 3)

    def encode(self, x):
        return self.norm(self.conv(x)).relu().mean(-1).transpose(1, 2)

    def head(self, frames):
        steps, _ = self.gru(frames)
        return {"logits": self.fc(steps[:, -1]), "embedding": steps[:, -1]}

    def forward(self, x):
        return self.head(self.encode(x))


def test_in_a_layout_weights_and_images_are_laid_out_and_taps_stay_the_same():
    model, seen = Framed().eval(), []
    x = torch.randn(3, 2, 6, 8)
    expected = model(x)
    teacher = kdlib.freeze(model, layout="channels_last")
    model.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(dict(teacher(x)), expected)
    torch.testing.assert_close(teacher.encode(x), model.encode(x))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in seen[:2])
    assert x.is_contiguous()
    assert torch.equal(kdlib.freeze(model, layout="contiguous")(x)["logits"], model(x)["logits"])
    assert model.conv.weight.is_contiguous()


def test_a_type_by_name_is_refused_with_what_is_wanted():
    with pytest.raises(kdlib.TapError, match=r"dtype='bf16' is no type of torch.*torch\.bfloat16"):
        kdlib.freeze(Framed(), dtype="bf16")


def test_an_unknown_layout_is_refused_with_the_near_one():
    with pytest.raises(kdlib.TapError, match=r"'channel_last' is unknown.*channels_last"):
        kdlib.freeze(Framed(), layout="channel_last")


@pytest.fixture
def compiled(monkeypatch):
    """Compile without a C++ compiler: what is traced runs as it was traced."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def test_compiled_it_gives_all_taps_of_each_batch(compiled):
    model = Framed()
    tapped = kdlib.Tapped(model, logits="fc", maps="norm", frames="gru[0]")
    plain, fast = kdlib.freeze(tapped), kdlib.freeze(tapped, compile=True)
    for rows in (3, 3, 5, 1):
        x = torch.randn(rows, 2, 6, 8)
        found, expected = fast(x), plain(x)
        assert list(found) == list(expected)
        assert not any(tap.requires_grad for tap in found.values())
        torch.testing.assert_close(dict(found), dict(expected))


def test_compiled_it_has_frames_and_head_a_dtype_a_layout_and_the_order_of_classes(compiled):
    model, x = Framed(), torch.randn(3, 2, 6, 8)
    settings = {"dtype": torch.bfloat16, "layout": "channels_last", "classes": ["a", "b", "c"]}
    plain, fast = (kdlib.freeze(model, **settings, compile=compile).aligned(["c", "a", "b"]) for compile in (0, 1))
    for teacher in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(dict(teacher(x)), dict(plain(x)), rtol=0.02, atol=0.02)
        torch.testing.assert_close(dict(teacher.head(teacher.encode(x))), dict(plain(x)), rtol=0.02, atol=0.02)
        assert teacher(x)["logits"].dtype == torch.float32
    assert {key for key, value in fast.made_of().items() if value != plain.made_of()[key]} == {"compiled"}


def test_compiled_it_says_what_is_wrong_with_a_tap_and_obeys_eval_mode(compiled, net):
    fast = kdlib.freeze(kdlib.Tapped(net, logits=""), compile=True)
    x, before = torch.randn(5, 4), state(net)
    expected = fast(x)["logits"]
    net.train()
    assert torch.equal(fast(x)["logits"], expected)
    assert equal(state(net), before)
    unused = Model(lambda self, x: self.first(x))
    with pytest.raises(kdlib.TapError, match="'second' was not called"):
        kdlib.freeze(kdlib.Tapped(unused, logits="", embedding="second"), compile=True)(x)


def test_a_teacher_that_cannot_be_compiled_says_so_and_what_to_do(monkeypatch):
    def broken(*_):
        raise OSError("no compiler in this room")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    try:
        with pytest.raises(kdlib.TapError, match=r"Framed cannot be compiled here: .*no compiler in this room"):
            kdlib.freeze(Framed(), compile=True)(torch.randn(3, 2, 6, 8))
    finally:
        torch._dynamo.reset()


def test_freezing_twice_and_a_doubled_class_are_refused(net):
    teacher = kdlib.freeze(kdlib.Tapped(net, logits=""))
    with pytest.raises(kdlib.TapError, match="frozen already"):
        kdlib.freeze(teacher)
    with pytest.raises(kdlib.TapError, match="twice"):
        kdlib.freeze(kdlib.Tapped(mlp(), logits=""), classes=["a", "b", "a"])


def test_a_model_without_encode_and_head_says_so(net):
    teacher = kdlib.freeze(kdlib.Tapped(net, logits=""))
    for call in (teacher.encode, teacher.head):
        with pytest.raises(kdlib.TapError, match=r"Tapped has no method '(encode|head)'"):
            call(torch.randn(2, 4))


# freeze: the order of classes


@pytest.fixture
def labelled():
    return kdlib.freeze(kdlib.Tapped(mlp(), logits="", embedding="1"), classes=["bus", "park", "tram"])


def test_columns_are_mapped_by_label(labelled):
    x = torch.randn(5, 4)
    taps = labelled(x)
    mapped = labelled.aligned(["tram", "bus", "park"])(x)
    assert torch.equal(mapped["logits"], taps["logits"][:, [2, 0, 1]])
    assert torch.equal(mapped["embedding"], taps["embedding"])
    assert torch.equal(labelled(x)["logits"], taps["logits"])  # the first teacher keeps its own order


def test_mapping_twice_is_mapping_to_the_last(labelled):
    x = torch.randn(5, 4)
    order = ["park", "tram", "bus"]
    twice = labelled.aligned(["tram", "bus", "park"]).aligned(order)
    assert torch.equal(twice(x)["logits"], labelled.aligned(order)(x)["logits"])
    assert torch.equal(twice.aligned(["bus", "park", "tram"])(x)["logits"], labelled(x)["logits"])


def test_copies_that_have_run_are_mapped_each_in_its_own_order_on_each_device(labelled):
    x = torch.randn(5, 4)
    first = labelled.aligned(["tram", "bus", "park"])
    logits = first(x)["logits"]
    second, same = first.aligned(["park", "tram", "bus"]), copy.deepcopy(first)
    assert torch.equal(second(x)["logits"], logits[:, [2, 0, 1]])
    assert torch.equal(same(x)["logits"], logits)
    assert first(x.to("meta"))["logits"].device.type == "meta"  # its weights too, which are lost there
    assert torch.equal(same(x)["logits"], logits)
    assert torch.equal(pickle.loads(pickle.dumps(same))(x)["logits"], logits)


@pytest.mark.parametrize("wanted", [["bus", "park"], ["bus", "park", "tram", "airport"], ["bus", "park", "metro"]])
def test_other_classes_are_refused_with_the_difference(labelled, wanted):
    (difference, *_) = sorted(set(wanted) ^ {"bus", "park", "tram"})
    with pytest.raises(kdlib.TapError, match=difference):
        labelled.aligned(wanted)


def test_a_class_wanted_twice_is_refused(labelled):
    with pytest.raises(kdlib.TapError):
        labelled.aligned(["bus", "park", "tram", "bus"])


def test_an_unknown_order_is_refused(net):
    with pytest.raises(kdlib.TapError, match="class order is not known"):
        kdlib.freeze(kdlib.Tapped(net, logits="")).aligned(["a", "b", "c"])


def test_fewer_names_than_columns_are_refused():
    teacher = kdlib.freeze(kdlib.Tapped(mlp(), logits=""), classes=["bus", "park"])
    with pytest.raises(kdlib.TapError, match=r"2.*3|3.*2"):
        teacher.aligned(["park", "bus"])(torch.randn(2, 4))


def test_a_teacher_of_embeddings_alone_can_be_aligned():
    teacher = kdlib.freeze(kdlib.Tapped(mlp(), embedding="1"), classes=["bus", "park", "tram"])
    x = torch.randn(2, 4)
    assert torch.equal(teacher.aligned(["tram", "bus", "park"])(x)["embedding"], teacher(x)["embedding"])
