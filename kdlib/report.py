"""A distiller looked over on one batch: the findings, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from kdlib.batch import NamedTaps, call
from kdlib.errors import KdlibError
from kdlib.interfaces import Batch, DistillPoint, SoftLabelSource, Taps
from kdlib.schedules import Value, value_in
from kdlib.taps import checked_taps, teachers_in
from kdlib.worth import described, hits

Mark = Literal["ok", "note", "wrong"]


@dataclass
class Report:
    """Findings: true where none is wrong. ``str(report)`` is one table."""

    rows: list[tuple[Mark, str, str]] = field(default_factory=list)
    """(ok, note or wrong; what was looked at; what was seen)."""
    fault: Exception | None = None
    """An exception of a model, source or point that is no user's error."""

    def add(self, mark: Mark, what: str, seen: str) -> None:
        """Add a finding."""
        self.rows.append((mark, what, seen))

    def fail(self, what: str, error: Exception) -> None:
        """Add an exception as a finding."""
        known = isinstance(error, KdlibError)
        self.fault = self.fault if known else self.fault or error
        self.add("wrong", what, str(error) if known else f"{type(error).__name__}: {error}")

    def __bool__(self) -> bool:
        return all(mark != "wrong" for mark, _, _ in self.rows)

    def __str__(self) -> str:
        width = max((len(what) for _, what, _ in self.rows), default=0)
        return "\n".join(f"{mark:<5}  {what:<{width}}  {seen}" for mark, what, seen in self.rows)


def inspect(
    student: nn.Module,
    source: SoftLabelSource | None,
    points: Mapping[str, tuple[Value, DistillPoint]],
    projectors: nn.Module,
    batch: Batch,
    optimizers: Sequence[torch.optim.Optimizer],
) -> Report:
    """Return what is right and wrong on a batch. Whoever calls this restores modes, buffers, gradients and RNG."""
    report = Report()
    _check_teachers(source, optimizers, report)
    try:
        teacher_taps = NamedTaps({} if source is None else source(batch), "teacher")
        student_taps = checked_taps(call(student, batch["x"]), "student")
    except Exception as error:
        report.fail("taps", error)
        return report
    _check_taps(student_taps, teacher_taps, report)
    _check_points(student, points, student_taps, teacher_taps, batch, report)
    _check_optimizers(student, projectors, optimizers, report)
    right = hits(source, teacher_taps, batch)
    if right:
        report.add("ok", "teacher accuracy", f"{described(right)}, in this batch")
    return report


def _check_teachers(
    source: SoftLabelSource | None, optimizers: Sequence[torch.optim.Optimizer], report: Report
) -> None:
    trained = _in_optimizers(optimizers)
    if isinstance(source, nn.Module) and any(parameter.requires_grad for parameter in source.parameters()):
        # A source's taps carry no gradient, so this is a teacher: in the optimizer, and in train mode with the student.
        report.add("wrong", "source", "has parameters of its own: give it a frozen teacher, kdlib.freeze(model)")
    for teacher in teachers_in(source):
        name = f"teacher {type(teacher.model).__name__}"
        if any(module.training for module in teacher.model.modules()):
            report.add("wrong", name, "is in train mode: freeze it again after whoever called train()")
        elif any(parameter.requires_grad for parameter in teacher.model.parameters()):
            report.add("wrong", name, "has parameters that ask for gradients: freeze it with kdlib.freeze")
        elif any(id(parameter) in trained for parameter in teacher.model.parameters()):
            report.add("wrong", name, "has parameters in the optimizer: give it distiller.parameters()")
        else:
            report.add("ok", name, "frozen, in eval mode")


def _check_taps(student: Taps, teacher: Taps, report: Report) -> None:
    for side, taps in (("student", student), ("teacher", teacher)):
        for name, tap in taps.items():
            what = f"{side} tap {name}"
            if tap.is_floating_point() and not bool(torch.isfinite(tap).all()):
                report.add("wrong", what, f"{tuple(tap.shape)}: not finite everywhere")
            elif side == "student" and not tap.requires_grad:
                report.add("note", what, f"{tuple(tap.shape)}: carries no gradient; are the roles swapped?")
            elif side == "teacher" and tap.requires_grad:
                report.add("wrong", what, f"{tuple(tap.shape)}: carries a gradient; are the roles swapped?")
            else:
                report.add("ok", what, str(tuple(tap.shape)))
    if not any(tap.requires_grad for tap in student.values()):
        report.add("wrong", "student", "no tap carries a gradient: nothing would be trained")
    rows = {tap.shape[0] for taps in (student, teacher) for tap in taps.values() if tap.dim()}
    if len(rows) > 1:
        report.add("wrong", "rows", f"student and teacher taps have {sorted(rows)} rows: they must be aligned")


def _check_points(
    student: nn.Module,
    points: Mapping[str, tuple[Value, DistillPoint]],
    student_taps: Taps,
    teacher_taps: Taps,
    batch: Batch,
    report: Report,
) -> None:
    named = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    reached: set[str] = set()
    idle = 0
    for name, (value, point) in points.items():
        what = f"point {name}"
        try:
            weight = value_in(value, batch, "weight")
            if weight == 0:
                report.add("note", what, "weight 0 at this step: not computed")
                idle += 1
                continue
            versions = _versions(student_taps, teacher_taps)
            loss = point(student_taps, teacher_taps, batch)
        except Exception as error:
            report.fail(what, error)
            continue
        if _versions(student_taps, teacher_taps) != versions:
            report.add("wrong", what, "changed a tap in place: the points after it see other numbers")
            continue
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            seen = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            report.add("wrong", what, f"returned {seen}, not one number, a scalar tensor")
            continue
        number = float(loss.detach())
        if not math.isfinite(number):
            report.add("wrong", what, f"loss {number}")
        elif not loss.requires_grad:
            report.add("wrong", what, f"loss {number:.6g} carries no gradient")
        else:
            try:
                gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            except Exception as error:
                report.fail(what, error)
                continue
            reached |= {name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None}
            norm = sum(float(gradient.float().square().sum()) for gradient in gradients if gradient is not None) ** 0.5
            seen = f"loss {number:.6g}, weight {weight:g}, gradient norm on the student {norm:.3g}"
            report.add("ok" if math.isfinite(norm) else "wrong", what, seen)
    if idle == len(points):
        report.add("wrong", "points", "none has a weight above 0 at this step: nothing would be trained")
    missed = [name for name, _ in named if name not in reached]
    if missed and reached:
        seen = f"{len(missed)} parameters get no gradient from any point: {', '.join(missed[:4])}"
        report.add("note", "student", seen)


def _versions(*sides: Taps) -> list[int]:
    """Return how often each tap was changed in place."""
    return [tap._version for taps in sides for tap in taps.values() if not tap.is_inference()]


def _check_optimizers(
    student: nn.Module, projectors: nn.Module, optimizers: Sequence[torch.optim.Optimizer], report: Report
) -> None:
    if not optimizers:
        report.add("note", "optimizer", "none attached: distiller.attach(optimizer) has it looked at")
        return
    for side, module in (("student", student), ("projector", projectors)):
        wanted = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        missing = not_in(optimizers, module)
        if missing:
            mark: Mark = "wrong" if side == "projector" else "note"
            advice = "; make it of distiller.parameters(), after prepare" if side == "projector" else ""
            seen = f"{len(missing)} not in the optimizer: {', '.join(missing[:4])}{advice}"
            report.add(mark, f"{side} parameters", seen)
        elif wanted:
            report.add("ok", f"{side} parameters", f"all {len(wanted)} in the optimizer")


def not_in(optimizers: Sequence[torch.optim.Optimizer], module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that ask for gradients and that no optimizer has."""
    trained = _in_optimizers(optimizers)
    return [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in trained]


def _in_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
