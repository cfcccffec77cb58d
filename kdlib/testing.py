"""What a plugin must satisfy, as functions for the tests of plugin authors; our own tests run them over every plugin.

Each raises AssertionError with the rule that was broken.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.batch import call, map_tensors
from kdlib.interfaces import Batch, DistillPoint, SoftLabelSource, Taps
from kdlib.registry import PluginWarning, Registry
from kdlib.taps import teachers_in

ROWS, CLASSES, WIDTH = 8, 10, 64


def example_taps(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return ``logits`` (8, 10) and ``embedding`` (8, 64), drawn by a seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        "logits": torch.randn(ROWS, CLASSES, generator=generator),
        "embedding": torch.randn(ROWS, WIDTH, generator=generator),
    }
    return {name: tap.to(dtype) for name, tap in drawn.items()}


def example_batch() -> dict[str, Any]:
    """Return a batch that goes with :func:`example_taps`."""
    y = torch.arange(ROWS) % CLASSES
    return {
        "x": torch.zeros(ROWS, 4),
        "y": y,
        "index": torch.arange(ROWS),
        "epoch": torch.zeros(ROWS, dtype=torch.int64),
    }


def check_point(
    point: DistillPoint,
    *,
    student: Taps | None = None,
    teacher: Taps | None = None,
    batch: Batch | None = None,
    row_order: bool = False,
) -> None:
    """Check a point: one finite number, a gradient on the student, nothing changed, the same each time.

    Args:
        point: what to check; if it has ``prepare``, that is called first.
        student: taps of the student. Default: ``logits`` (8, 10) and ``embedding`` (8, 64).
        teacher: taps of the teacher. Default: the same names and shapes with other values.
        batch: Default: ``x``, ``y``, ``index`` and ``epoch`` of 8 rows.
        row_order: the point may depend on the order of the rows.

    Raises:
        AssertionError: with the rule that is broken.

    Example:
        >>> import kdlib, kdlib.testing
        >>> kdlib.testing.check_point(kdlib.SoftLabels(temperature=4.0))
    """
    student = dict(student if student is not None else example_taps(1))
    teacher = dict(teacher if teacher is not None else example_taps(2))
    batch = dict(batch if batch is not None else example_batch())
    if hasattr(point, "prepare"):
        point.prepare(student, teacher, batch)
    leaves = {name: tap.detach().clone().requires_grad_(tap.is_floating_point()) for name, tap in student.items()}
    frozen = {name: tap.detach().clone() for name, tap in teacher.items()}
    given = copy.deepcopy(batch)
    seen_taps = {name: leaf.clone() for name, leaf in leaves.items()}  # no leaves: a point may write into them

    loss = point(seen_taps, frozen, given)
    assert isinstance(loss, Tensor), f"a point returns a tensor, this one a {type(loss).__name__}"
    assert loss.dim() == 0, f"a point returns one number, this one a tensor of shape {tuple(loss.shape)}"
    assert torch.isfinite(loss), f"the loss of ordinary taps is {loss.item()}"
    assert loss.requires_grad, "the loss carries no gradient: the point detached the student's taps"
    for side, seen, before in (("student", seen_taps, student), ("teacher", frozen, teacher), ("batch", given, batch)):
        assert list(seen) == list(before), f"the point added or removed entries of the {side}'s mapping"
        for name, value in before.items():
            same = torch.equal(seen[name], value) if isinstance(value, Tensor) else seen[name] == value
            assert same, f"the point changed '{name}' of the {side}"

    floating = [tap for tap in leaves.values() if tap.requires_grad]
    gradients = [g for g in torch.autograd.grad(loss, floating, allow_unused=True) if g is not None]
    assert gradients, "no tap of the student gets a gradient"
    assert all(torch.isfinite(g).all() for g in gradients), "the gradient is not finite"
    assert any(g.abs().sum() > 0 for g in gradients), "the gradient is zero everywhere"

    again = point(leaves, frozen, given)
    assert torch.equal(loss, again), f"called twice the point gives {loss.item()} and {again.item()}: state or chance"
    if not row_order:
        reordered = [{n: _reordered(v) for n, v in side.items()} for side in (leaves, frozen, given)]
        other = point(reordered[0], reordered[1], reordered[2])
        assert torch.allclose(loss, other, rtol=1e-4, atol=1e-6), (
            f"putting the rows in another order changes the loss from {loss.item()} to {other.item()}; "
            "if that is meant, call check_point(..., row_order=True)"
        )
    small = [{n: _bf16(v) for n, v in side.items()} for side in (leaves, frozen)]
    assert torch.isfinite(point(small[0], small[1], given)), "the loss of bfloat16 taps is not finite"


def check_source(source: SoftLabelSource, batch: Batch) -> None:
    """Check a source: taps for every row, without gradient, from frozen teachers, nothing changed, rows aligned.

    Args:
        source: what to check.
        batch: what it needs, with tensors whose first axis is the rows.

    Raises:
        AssertionError: with the rule that is broken.

    Example:
        >>> import torch, kdlib, kdlib.testing
        >>> teacher = kdlib.freeze(kdlib.Tapped(torch.nn.Linear(4, 3), logits=""))
        >>> kdlib.testing.check_source(kdlib.SameInput(teacher), {"x": torch.randn(8, 4)})
    """
    given = copy.deepcopy(dict(batch))
    rows = len(next(value for value in given.values() if isinstance(value, Tensor)))
    taps = source(given)
    assert isinstance(taps, Mapping), f"a source returns a mapping of taps, this one a {type(taps).__name__}"
    assert taps, "the source returned no taps"
    for name, tap in taps.items():
        assert isinstance(tap, Tensor), f"tap '{name}' is a {type(tap).__name__}, not a tensor"
        assert not tap.requires_grad, f"tap '{name}' carries a gradient: the teacher would be trained"
        assert not tap.is_inference(), f"tap '{name}' was made in inference mode: losses cannot save it for backward"
        assert tap.dim() == 0 or len(tap) == rows, f"tap '{name}' has {len(tap)} rows, the batch {rows}"
    assert list(given) == list(batch), "the source added or removed entries of the batch"
    for name, value in batch.items():
        same = torch.equal(given[name], value) if isinstance(value, Tensor) else True
        assert same, f"the source changed '{name}' of the batch"
    for teacher in teachers_in(source):
        assert not teacher.model.training, "a teacher is in train mode"
        assert not any(p.requires_grad for p in teacher.model.parameters()), "a teacher's parameters ask for gradients"
    again = source(given)
    assert all(torch.equal(tap, again[name]) for name, tap in taps.items()), "called twice the taps differ"
    reordered = source({name: _reordered(value) for name, value in given.items()})
    for name, tap in taps.items():
        aligned = tap.dim() == 0 or torch.allclose(_reordered(tap), reordered[name], rtol=1e-4, atol=1e-5)
        assert aligned, (
            f"tap '{name}' is not aligned with the batch: with its rows in another order it is not the same rows"
        )


def check_model(model: nn.Module, x: Any) -> None:
    """Check a model: taps by name, rows that do not mix in eval mode, weights that save and load, a copy that works.

    Args:
        model: what to check; it is left in eval mode.
        x: an input of at least 3 rows, as a batch holds it.

    Raises:
        AssertionError: with the rule that is broken.

    Example:
        >>> import torch, kdlib.testing
        >>> from kdlib.digits import DigitsMLP
        >>> kdlib.testing.check_model(DigitsMLP(width=4), torch.rand(3, 64))
    """
    model.eval()
    with torch.no_grad():
        taps = call(model, x)
        assert isinstance(taps, Mapping), f"a model returns a mapping of taps, this one a {type(taps).__name__}"
        assert taps, "the model returned no taps"
        for name, tap in taps.items():
            assert isinstance(tap, Tensor), f"tap '{name}' is a {type(tap).__name__}, not a tensor"
            assert torch.isfinite(tap).all(), f"tap '{name}' is not finite"
        fewer = call(model, map_tensors(lambda tensor: tensor[:-1], x))
        reordered = call(model, _reordered(x))
        for name, tap in taps.items():
            unmixed = torch.allclose(tap[:-1], fewer[name], rtol=1e-3, atol=1e-4)
            aligned = torch.allclose(_reordered(tap), reordered[name], rtol=1e-3, atol=1e-4)
            assert unmixed, f"tap '{name}' mixes rows in eval mode: without the last row the others differ"
            assert aligned, (
                f"tap '{name}' mixes rows in eval mode: with the input's rows in another order it is not the same rows"
            )
        twin = copy.deepcopy(model)
        for value in [*twin.parameters(), *twin.buffers()]:
            value.zero_()
        twin.load_state_dict(model.state_dict())
        reloaded = call(twin, x)
        same = all(torch.equal(tap, reloaded[name]) for name, tap in taps.items())
        assert same, "weights saved and loaded into a copy give other taps: some state is not in state_dict()"
        if hasattr(model, "encode") and hasattr(model, "head"):
            two_steps: Any = model
            joined = two_steps.head(two_steps.encode(x))
            whole = all(torch.allclose(tap, joined[name], rtol=1e-4, atol=1e-5) for name, tap in taps.items())
            assert whole, "head(encode(x)) is not the model's own output"
    reached = call(model, x)
    torch.autograd.backward(torch.stack([tap.float().sum() for tap in reached.values()]).sum())
    missed = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    assert not missed, f"no tap depends on the parameters {', '.join(missed[:4])}"


def check_plugin(name: str) -> None:
    """Check an installed plugin package: its entry point is found and loads, and all that it brings can be used.

    Args:
        name: the name on the left of its line under ``[project.entry-points.kdlib]``.

    Raises:
        AssertionError: with the rule that is broken.

    Example:
        >>> import kdlib.testing
        >>> kdlib.testing.check_plugin("asc")
    """
    found = entry_points(group="kdlib", name=name)
    assert found, f"no installed package has an entry point '{name}' in the group 'kdlib'; is it installed?"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # it is said below
        known = Registry(entry_points(group="kdlib"))
    assert name not in known.broken, f"the plugin '{name}' is broken: {known.broken[name]}"
    assert name in known.packages, f"the plugin '{name}' is left out by KDLIB_DISABLE"
    for kind, of, packages in known.clashes():
        assert name not in packages, f"the {kind} '{of}' is claimed by {' and '.join(packages)}"


def _reordered(value: Any) -> Any:
    """Return a nest of tensors with the rows in another order."""

    def of(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        rows = torch.arange(len(tensor), device=tensor.device)
        return tensor[torch.cat([rows[1::2], rows[::2]]).flip(0)]  # not the reverse: it keeps neighbours together

    return map_tensors(of, value)


def _bf16(value: Tensor) -> Tensor:
    return value.detach().bfloat16() if value.is_floating_point() else value
