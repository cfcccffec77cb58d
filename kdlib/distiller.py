"""The distiller: a student, a source of soft labels and weighted points in one module that returns the losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any, NamedTuple, Self
from weakref import ref

import torch
from torch import Tensor, nn

from kdlib.batch import NamedBatch, NamedTaps, call
from kdlib.errors import KdlibError, TapError
from kdlib.interfaces import Batch, DistillPoint, SoftLabelSource, Taps
from kdlib.report import Report, inspect, not_in
from kdlib.schedules import Schedule, Value, value_at, value_in
from kdlib.taps import Frozen, checked_taps, teachers_in


class Losses(NamedTuple):
    """What a distiller returns: ``total``, to call ``backward`` on, and the ``terms``, for the log."""

    total: Tensor
    """The weighted sum of the terms, a scalar."""
    terms: dict[str, Tensor]
    """Each point's loss, unweighted and detached."""


class Distiller(nn.Module):
    """A student, a source and weighted points: ``forward(batch)`` returns ``Losses(total, terms)``.

    total = Σ weight · point(student(batch["x"]), source(batch), batch)

    Its parameters are the student's and the projectors that points own; a frozen teacher is never among them.

    Args:
        student: a module that returns taps (:class:`kdlib.Tapped`, or one that returns a dictionary).
        source: what gives the teacher's taps. Without one there are none: ``Distiller(net, hard=HardLabels())``
            trains a network by itself.
        points: ``name=point`` or ``name=(weight, point)``. A weight is a number from 0 up, or a function of
            (step, epoch) such as :class:`kdlib.Schedule`. A point of weight 0 is not computed.

    Raises:
        KdlibError: no point, a weight below 0, teacher and student sharing parameters.

    Example:
        >>> import torch, kdlib
        >>> big, small = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> teacher = kdlib.freeze(kdlib.Tapped(big, logits=""))
        >>> student = kdlib.Tapped(small, logits="")
        >>> distiller = kdlib.Distiller(student, kdlib.SameInput(teacher),
        ...                             soft=(0.9, kdlib.SoftLabels.hinton(4.0)), hard=(0.1, kdlib.HardLabels()))
        >>> losses = distiller({"x": torch.zeros(2, 4), "y": torch.tensor([0, 1])})
        >>> losses.total.backward()
        >>> sorted(losses.terms)
        ['hard', 'soft']
    """

    step: Tensor

    def __init__(
        self,
        student: nn.Module,
        source: SoftLabelSource | None = None,
        /,
        **points: DistillPoint | tuple[Value, DistillPoint],
    ) -> None:
        super().__init__()
        if not points:
            raise KdlibError("A distiller needs at least one point, for example hard=kdlib.HardLabels().")
        if isinstance(student, Frozen):
            raise KdlibError("The student is frozen. Are student and teacher swapped?")
        if not isinstance(student, nn.Module):
            raise KdlibError(f"The student must be a torch.nn.Module, not {type(student).__name__}.")
        if isinstance(source, Frozen):
            raise KdlibError("A teacher is no source; say what it sees: kdlib.SameInput(teacher).")
        self.student = student
        self.source = source
        self.weights: dict[str, Value] = {}
        self._points: dict[str, DistillPoint] = {}
        # Not an nn.ModuleDict, which refuses names such as "train"; the keys of the state dict are the points' names.
        self.projectors = nn.Module()
        for name, entry in points.items():
            weight, point = entry if isinstance(entry, tuple) and len(entry) == 2 else (1.0, entry)
            if isinstance(point, type):
                raise KdlibError(f"Point '{name}' is the class {point.__name__}; make one: {point.__name__}().")
            if not callable(point) or not (callable(weight) or _is_number(weight)):
                raise KdlibError(
                    f"'{name}' is no point and no (weight, point): a point is called with (student, teacher, batch), "
                    "and a weight is a number or a schedule."
                )
            if not callable(weight) and not 0 <= float(weight) < float("inf"):
                raise KdlibError(f"Point '{name}': a weight is a number from 0 up, not {weight}.")
            self.weights[name] = weight if callable(weight) else float(weight)
            self._points[name] = point
            if isinstance(point, nn.Module):
                if name == "training":
                    raise KdlibError(
                        "A point that is a module cannot be named 'training', which torch keeps for itself."
                    )
                self.projectors._modules[name] = point
        self._refuse_shared()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        parts: list[Any] = [source, *self._points.values()]
        self._advancing = [part for part in parts if hasattr(part, "advance")]
        self._prepared = False
        self._optimizers: dict[int, ref[torch.optim.Optimizer]] = {}  # by id; one that is dropped trains nothing
        self._hook: Any = None
        self._complete = False

    @property
    def points(self) -> dict[str, DistillPoint]:
        """The points by name."""
        return dict(self._points)

    def forward(self, batch: Batch) -> Losses:
        """Return the losses of a batch, a mapping with ``x`` and what the points and the source need."""
        batch = self._timed(batch)
        return self.losses(*self._both(batch), batch)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> Losses:
        """Return the losses for taps that are there already (mutual learning, cached taps, own loops)."""
        student, teacher, batch = NamedTaps.of(student, "student"), NamedTaps.of(teacher, "teacher"), self._timed(batch)
        total: Tensor | None = None
        terms: dict[str, Tensor] = {}
        for name, point in self._points.items():
            weight = self.weights[name]
            if callable(weight):
                weight = value_in(weight, batch, f"weight of {name}")
            if weight == 0:
                continue
            try:
                loss = point(student, teacher, batch)
            except Exception as error:
                _blame(error, "point", point, name)
                raise
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise KdlibError(f"Point '{name}' returned {shape}; a point returns one number, a scalar tensor.")
            terms[name] = loss.detach()
            total = weight * loss if total is None else total.add(loss, alpha=weight)
        if total is None:
            raise KdlibError(f"No point has a weight above 0 at step {int(self.step)}: nothing to train on.")
        return Losses(total, terms)

    def in_force(self, epoch: int) -> dict[str, float]:
        """Return what the schedules of weights and of the points' settings give now, as ``name.weight`` and so on."""
        scheduled: dict[str, Value] = {f"{name}.weight": weight for name, weight in self.weights.items()}
        for name, point in self._points.items():
            own = {key: value for key, value in _attributes(point).items() if isinstance(value, Schedule)}
            scheduled |= {f"{name}.{key}": value for key, value in own.items()}
        step = int(self.step)
        return {name: value_at(value, step, epoch) for name, value in scheduled.items() if callable(value)}

    def prepare(self, batch: Batch) -> Self:
        """Let points make their projectors by the shapes of one batch's taps.

        Call it before the optimizer is made and before ``load_state_dict``. It has no other effect: modes, buffers
        and random state stay as they were. A second call does nothing.
        """
        wanting: dict[str, Any] = {name: one for name, one in self._points.items() if hasattr(one, "prepare")}
        if wanting and not self._prepared:
            with untouched(self):
                self.eval()
                batch = self._timed(batch)
                with torch.no_grad():
                    student, teacher = self._both(batch)
                for name, point in wanting.items():
                    try:
                        point.prepare(NamedTaps.of(student, "student"), NamedTaps.of(teacher, "teacher"), batch)
                    except Exception as error:
                        _blame(error, "point", point, name)
                        raise
            self._prepared = True
        return self

    def advance(self) -> None:
        """Move the clock by one step and let source and points update their state. Call after each optimizer step."""
        self.step.add_(1)
        for part in self._advancing:
            part.advance(self.student)

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Have the optimizer's ``step`` call :meth:`advance`, and return the optimizer.

        Attach several optimizers one after the other, in the order of their steps: the clock moves with the last one's.
        Once they have stepped, a further call begins anew, for a second stage: the optimizer that it attaches takes the
        place of those before. One that the program drops is forgotten, and a copy of the distiller has none.

        Raises:
            KdlibError: from the first ``step``, before it changes anything: the attached optimizers lack parameters of
                a projector, which would stay as it was made. Or from the ``step`` of one that another took the place
                of.
        """
        if self._hook is not None:
            self._hook.remove()
        if self._complete:
            self._optimizers = {}
        self._hook = optimizer.register_step_post_hook(_Advance(self))
        if id(optimizer) not in self._optimizers:
            optimizer.register_step_pre_hook(_Complete(self))
            self._optimizers[id(optimizer)] = ref(optimizer)
        self._complete = False
        return optimizer

    def check(self, batch: Batch) -> Report:
        """Look for what goes wrong silently, on one batch, and change nothing.

        Returns:
            A report that is true where nothing is wrong, and prints as one table.
        """
        timed = self._timed(batch)
        weighted = {name: (self.weights[name], point) for name, point in self._points.items()}
        with untouched(self, *(teacher.model for teacher in teachers_in(self.source))):
            return inspect(self.student, self.source, weighted, self.projectors, timed, self._attached())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the optimizers: a copy has other parameters, and none that trains them yet."""
        return {**self.__dict__, "_optimizers": {}, "_hook": None, "_complete": False}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        made = {f"{prefix}projectors.{name}" for name in self.projectors.state_dict()}
        strange = [key for key in state_dict if key.startswith(f"{prefix}projectors.") and key not in made]
        if strange and not self._prepared and any(hasattr(point, "prepare") for point in self._points.values()):
            raise KdlibError(
                f"There is no '{strange[0]}' yet to load into: call prepare(batch) before load_state_dict, which makes "
                "the projectors by the shapes of a batch."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _attached(self) -> list[torch.optim.Optimizer]:
        return [optimizer for one in self._optimizers.values() if (optimizer := one()) is not None]

    def _both(self, batch: NamedBatch) -> tuple[Taps, Taps]:
        teacher: Taps = {}
        if self.source is not None:
            try:
                teacher = self.source(batch)
            except Exception as error:
                _blame(error, "source", self.source)
                raise
        return checked_taps(call(self._modules["student"], batch["x"]), "student"), teacher

    def _timed(self, batch: Batch) -> NamedBatch:
        """Return the batch with a clock: a function, since only schedules want to know the time."""
        if isinstance(batch, NamedBatch) and "clock" in batch:
            return batch
        timed = NamedBatch(batch)
        if "clock" not in batch:  # in validation the clock is not the data's
            timed["clock"] = partial(self._clock, batch)
        return timed

    def _clock(self, batch: Batch) -> tuple[int, int | None]:
        epoch = batch.get("epoch")
        first = epoch.flatten()[0] if isinstance(epoch, Tensor) else epoch
        return int(self.step), None if first is None else int(first)

    def _refuse_shared(self) -> None:
        own = {id(parameter): name for name, parameter in self.student.named_parameters()}
        for teacher in teachers_in(self.source):
            shared = [own[id(parameter)] for parameter in teacher.model.parameters() if id(parameter) in own]
            if shared:
                raise TapError(
                    f"Teacher and student share {len(shared)} parameters, '{shared[0]}' first: training one would "
                    "change the other. Make the student a copy before the teacher is frozen, which stops the gradients "
                    "of what it is given: copy.deepcopy(model)."
                )


def _is_number(value: object) -> bool:
    """Return whether float takes it without losing anything; a tensor that wants a gradient would lose that."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad)


def _attributes(point: Any) -> dict[str, Any]:
    """Return a point's attributes, with those of the point that it shows another teacher (``kdlib.of``)."""
    inner = getattr(point, "point", None)
    return vars(point) if inner is None else {**vars(point), **_attributes(inner)}


def _blame(error: Exception, role: str, part: object, name: str = "") -> None:
    """Say in an error which point or source it comes from. A context manager would cost time where there is none."""
    named = f" '{name}'" if name else ""
    where = f"{role}{named} ({type(part).__name__})"
    if isinstance(error, KdlibError):
        raise type(error)(f"{where[0].upper()}{where[1:]}: {error}") from error
    error.add_note(f"in {where}")


class _Complete:
    """Looks before the first step, when all optimizers are attached, whether they train all projectors."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self.distiller._optimizers:
            raise KdlibError(
                "This optimizer was attached before the last one stepped, which took its place. To use both, attach "
                "both, one after the other, in the order of their steps."
            )
        if not self.distiller._complete:
            lacking = not_in(self.distiller._attached(), self.distiller.projectors)
            if lacking:
                raise KdlibError(
                    f"The optimizer lacks {len(lacking)} parameters of projectors: {', '.join(lacking[:4])}. Make it "
                    "of distiller.parameters(), after prepare(batch)."
                )
            self.distiller._complete = True


class _Advance:
    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.distiller.advance()


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Give back the modes, buffers and gradients of modules, and the random state, as they were."""
    modes = {part: part.training for module in modules for part in module.modules()}
    buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    gradients = {parameter: parameter.grad for module in modules for parameter in module.parameters()}
    devices = sorted({parameter.device.index or 0 for parameter in gradients if parameter.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for part, training in modes.items():
                part.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            torch.clear_autocast_cache()  # weights that were cast without gradient would be taken as they are
