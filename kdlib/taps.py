"""Reading named tensors off a network (`Tapped`) and freezing one into a teacher (`freeze`)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from kdlib.batch import LAYOUTS, NamedTaps, layout_of, map_tensors, tensors_in
from kdlib.errors import TapError, did_you_mean
from kdlib.fingerprints import network_of, state_of
from kdlib.interfaces import Taps

_Picks = tuple[str | int, ...]


class Tapped(nn.Module):
    """A model that returns a dictionary of named tensors read off its submodules.

    The model is used as it is: nothing in it is replaced, and its weights keep their names under ``model.``.

    Args:
        model: any module.
        taps: name = path. A path names a submodule (``"layer4.1"``); ``""`` is the model's own output; what follows
            the submodule picks from a tuple, a mapping or a named output (``"gru[0]"``,
            ``"encoder.last_hidden_state"``).

    Raises:
        TapError: a path names nothing or a mere list of modules, the module did not run in this forward or ran twice,
            its output is no tensor, or a later layer changed the tensor in place.

    Example:
        >>> import torch, kdlib
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> student = kdlib.Tapped(net, logits="", embedding="1")
        >>> {name: tuple(tap.shape) for name, tap in student(torch.zeros(2, 4)).items()}
        {'logits': (2, 3), 'embedding': (2, 8)}
    """

    def __init__(self, model: nn.Module, /, **taps: str) -> None:
        if not isinstance(model, nn.Module):
            raise TapError(f"Tapped wants a torch.nn.Module, not {type(model).__name__}.")
        if not taps:
            raise TapError('Tapped wants at least one tap, for example Tapped(model, logits="").')
        super().__init__()
        self.model = model
        self.taps = dict(taps)
        self._pass = _Pass()
        self._own: dict[str, _Picks] = {}
        self._handles: list[Any] = []
        located = {name: _locate(model, path, name) for name, path in taps.items()}
        for name, (module, picks) in located.items():
            if module is model:
                self._own[name] = picks
            else:
                self._handles.append(module.register_forward_hook(_Capture(self, name, picks)))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the model and return its taps."""
        now = self._pass
        now.captured = captured = {}
        now.with_gradient = torch.is_grad_enabled()
        now.versions = None if torch.compiler.is_compiling() else {}
        try:
            output = self._modules["model"](*args, **kwargs)  # type: ignore[misc]  # found sooner than self.model
        finally:
            now.captured = None
        for name, picks in self._own.items():
            captured[name] = _pick(output, picks, name, self)
        for name, version in now.versions.items() if now.versions else ():
            if captured[name]._version != version:
                raise TapError(
                    f"Tap '{name}' was changed in place after module '{self.taps[name]}' returned it, by an in-place "
                    "layer behind it. Tap that layer, or build it with inplace=False."
                )
        try:
            return {name: captured[name] for name in self.taps}
        except KeyError as missing:
            name = missing.args[0]
            path = self.taps[name]
            raise TapError(f"Tap '{name}' did not fire: module '{path}' was not called in this forward.") from None

    def remove(self) -> None:
        """Take the hooks off the model. The Tapped is of no use afterwards; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def extra_repr(self) -> str:
        """Show the taps."""
        return ", ".join(f"{name}={path!r}" for name, path in self.taps.items())


class _Pass:
    """What one forward has recorded so far. No module, whose attributes take microseconds to set."""

    def __init__(self) -> None:
        self.captured: dict[str, Tensor] | None = None
        self.with_gradient = False
        self.versions: dict[str, int] | None = None


class _Capture:
    """A forward hook. It holds its Tapped as an attribute, so that a deep copy captures into the copy."""

    def __init__(self, owner: Tapped, name: str, picks: _Picks) -> None:
        self.owner = owner
        self.now = owner._pass
        self.name = name
        self.picks = picks

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        now, name = self.now, self.name
        if now.captured is None:  # the model was called by itself, or is recomputing in a backward
            return
        if now.with_gradient and not torch.is_grad_enabled():
            raise TapError(
                f"Tap '{name}': module '{self.owner.taps[name]}' ran without gradients, under torch.no_grad or in a "
                "re-entrant checkpoint; a point on it would train nothing. Use checkpoint(..., use_reentrant=False)."
            )
        tap = output if isinstance(output, Tensor) and not self.picks else _pick(output, self.picks, name, self.owner)
        previous = now.captured.get(name)
        if previous is not None and previous.requires_grad == tap.requires_grad:
            raise TapError(
                f"Tap '{name}' fired twice: module '{self.owner.taps[name]}' is used more than once in one forward. "
                "Tap a module that runs once."
            )
        if previous is None or tap.requires_grad:  # of two captures, the one without gradient must not win
            now.captured[name] = tap
            if now.versions is not None and not tap.is_inference():
                now.versions[name] = tap._version


def _locate(model: nn.Module, path: str, tap: str) -> tuple[nn.Module, _Picks]:
    """Split a path into the longest submodule that it names and what to pick from that module's output."""
    tokens: list[str | int] = []
    for part in re.findall(r"[^.\[\]]+|\[-?\d+\]", path):
        tokens.append(int(part[1:-1]) if part.startswith("[") else part)
    module, used = model, 0
    for token in tokens:
        children = dict(module.named_children())
        if str(token) not in children or isinstance(token, int):
            break
        module, used = children[str(token)], used + 1
    if used and getattr(getattr(module, "forward", None), "__func__", None) is nn.Module.forward:
        reached, inside = ".".join(map(str, tokens[:used])), dict(module.named_children())
        child = next((name for name in [*map(str, tokens[used : used + 1]), *inside] if name in inside), "0")
        raise TapError(
            f"Tap '{tap}': '{reached}' is a {type(module).__name__}, which is never called itself. Name a module in "
            f"it: write '{reached}.{child}'."
        )
    return module, tuple(tokens[used:])


def _pick(output: Any, picks: _Picks, tap: str, owner: Tapped) -> Tensor:
    value = output
    for pick in picks:
        try:
            if isinstance(value, Tensor):  # an index would take a row of the batch, a name an attribute such as .T
                raise TypeError
            value = value[pick] if isinstance(pick, int) or isinstance(value, (dict, Mapping)) else getattr(value, pick)
        except (AttributeError, KeyError, IndexError, TypeError):
            path, model = owner.taps[tap], owner.model
            paths = (path for path, _ in model.named_modules() if path)
            raise TapError(
                f"Tap '{tap}': '{path}' names no submodule of {type(model).__name__}, and its output, "
                f"{_describe(value)}, has no item {pick!r} to pick.{did_you_mean(path, paths)}"
            ) from None
    if not isinstance(value, Tensor):
        path = owner.taps[tap]
        raise TapError(f"Tap '{tap}': '{path}' gives {_describe(value)}, not a tensor. Pick one, as in '{path}[0]'.")
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def checked_taps(output: Any, role: str) -> Taps:
    """Return the tensors of a model's output if it is a mapping, else say how to make it one.

    What is no tensor, such as a named output's tuple of all hidden states, is no tap; Tapped picks from it.
    """
    if not isinstance(output, (dict, Mapping)):  # a dictionary is found sooner
        raise TapError(
            f"The {role} returned {_describe(output)}, not taps. Wrap it: "
            "kdlib.Tapped(model, logits=\"\") names its output 'logits'."
        )
    return NamedTaps({name: tap for name, tap in output.items() if isinstance(tap, Tensor)}, role)


class Frozen:
    """A teacher: a model in eval mode, without gradients, that no optimizer, ``state_dict()`` or ``train()`` reaches.

    It is not a module on purpose: assigned to any attribute of any module it stays outside of that module's
    parameters. Make one with :func:`freeze`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pinned: torch.device | None,
        dtype: torch.dtype | None,
        layout: torch.memory_format | None,
        compile: bool,
    ) -> None:
        self.model = model
        self.classes: tuple[str, ...] | None = None
        self._parts = list(model.modules())
        self._weight = next(model.parameters(), None)
        self._pinned = pinned
        self._dtype = dtype
        self._layout = layout
        self._compile = compile
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._order: tuple[int, ...] | None = None
        self._columns: dict[torch.device, Tensor] = {}
        """The order as an index, on each device that logits were on."""

    def __call__(self, *args: Any, **kwargs: Any) -> Taps:
        """Return the model's taps, without gradient."""
        return self._aligned(checked_taps(self._run("__call__", args, kwargs), "teacher"))

    def encode(self, x: Any) -> Tensor:
        """Return the frames (B, frames, D) of a model that has ``encode`` and ``head``."""
        frames: Tensor = self._run("encode", (x,), {})
        return frames

    def head(self, frames: Tensor) -> Taps:
        """Return the taps for frames (B, frames, D) of a model that has ``encode`` and ``head``."""
        return self._aligned(checked_taps(self._run("head", (frames,), {}), "teacher"))

    def made_of(self) -> dict[str, Any]:
        """Return what its taps depend on, as plain data: the network and its weights, type and order of classes.

        Where taps are read off a network by :class:`Tapped`, the network is the one inside, and the taps are told.
        """
        tapped = self.model if isinstance(self.model, Tapped) else None
        network = self.model if tapped is None else tapped.model
        return {
            **network_of(network),
            "taps": None if tapped is None else dict(tapped.taps),
            "state": state_of(network.state_dict()),
            "dtype": None if self._dtype is None else str(self._dtype),
            "compiled": self._compile,
            "classes": None if self.classes is None else list(self.classes),
            "order": None if self._order is None else list(self._order),
        }

    def __repr__(self) -> str:
        return f"Frozen({type(self.model).__name__})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this one, and a copy makes anew: what was compiled, and the order as an index."""
        return {**self.__dict__, "_compiled": {}, "_columns": {}}

    def _method(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] | None = self.model if name == "__call__" else getattr(self.model, name, None)
        if method is None:
            raise TapError(
                f"The teacher {type(self.model).__name__} has no method '{name}'. Joining frames wants a model with "
                "encode(x) -> (B, frames, D) and head(frames) -> taps; join inputs instead."
            )
        if not self._compile:
            return method
        if name not in self._compiled:
            self._compiled[name] = torch.compile(method)
        return partial(self._call_compiled, self._compiled[name])

    def _call_compiled(self, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except RuntimeError as error:
            if type(error).__module__.split(".")[:2] not in (["torch", "_dynamo"], ["torch", "_inductor"]):
                raise
            reason = " ".join(str(error).split("\n\n")[0].split())  # what follows is how to debug torch
            raise TapError(
                f"The teacher {type(self.model).__name__} cannot be compiled here: {reason} "
                "Leave compile out, or see what kdlib doctor says of a compiler."
            ) from error

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = self._method(name)
        first = args[0] if args else None
        example = first if isinstance(first, Tensor) else next(tensors_in((args, kwargs)), None)
        for part in self._parts:  # not any(...), which takes longer than all else here
            if part.training:
                self.model.eval()
                break
        home = None if example is None else example.device
        place = self._pinned or home
        if place is not None and self._weight is not None and self._weight.device != place:
            self.model.to(place)
        with torch.no_grad():
            if self._dtype is None and self._layout is None and place == home:
                return function(*args, **kwargs)
            args, kwargs = (_moved(value, place, self._dtype, self._layout) for value in (args, kwargs))
            if self._dtype is None:
                return _moved(function(*args, **kwargs), home)
            back = example.dtype if example is not None and example.is_floating_point() else torch.get_default_dtype()
            with torch.autocast((place or torch.device("cpu")).type, enabled=False):
                return _moved(function(*args, **kwargs), home, back)

    def _aligned(self, taps: Taps) -> Taps:
        if self._order is None or "logits" not in taps:
            return taps
        logits = taps["logits"]
        if logits.shape[-1] != len(self._order):
            raise TapError(f"The teacher has {logits.shape[-1]} logits and {len(self._order)} class names were given.")
        if logits.device not in self._columns:
            self._columns[logits.device] = torch.tensor(self._order, device=logits.device)
        return {**taps, "logits": logits[..., self._columns[logits.device]]}

    def aligned(self, classes: Sequence[str]) -> Frozen:
        """Return this teacher with its logits in the order of ``classes``, mapped by label.

        Raises:
            TapError: the teacher's classes are not known, or are not the same set.
        """
        if self.classes is None:
            raise TapError("The teacher's class order is not known: freeze(model, classes=[...]) tells it.")
        missing, extra = set(classes) - set(self.classes), set(self.classes) - set(classes)
        if len(set(classes)) != len(classes):
            raise TapError(f"A class is named twice in {list(classes)}.")
        if missing or extra:
            raise TapError(
                f"The teacher's classes do not fit: it lacks {sorted(missing)} and has {sorted(extra)} besides. "
                "Soft labels need the same classes on both sides."
            )
        frozen = copy.copy(self)
        column = dict(zip(self.classes, self._order or range(len(self.classes)), strict=True))
        frozen._order = tuple(column[label] for label in classes)
        frozen.classes = tuple(classes)
        return frozen


def freeze(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    layout: Literal["contiguous", "channels_last"] | None = None,
    compile: bool = False,
    device: torch.device | str | None = None,
    classes: Sequence[str] | None = None,
) -> Frozen:
    """Make a teacher of a model: eval mode, no gradients, out of reach of optimizers and state dicts.

    The model itself is put in eval mode and its parameters stop asking for gradients; only with ``dtype`` is it
    copied first.

    Args:
        model: a module that returns taps (:class:`Tapped`, or one that returns a dictionary).
        dtype: run a copy in this type, outside of the caller's autocast; taps come back in the input's type.
        layout: lay out weights and inputs of four axes so. Default: the weights as they are, inputs as they come.
        compile: run it through ``torch.compile``, from the first call on (which takes seconds, and again where the
            shape of the input changes). On a CPU this wants a C++ compiler. Values are equal up to rounding. A further
            :class:`Tapped` on the model must be made before that call: its taps do not fire afterwards.
        device: stay on this device and bring the taps back. Default: follow the input.
        classes: the names of the logits' columns, for :meth:`Frozen.aligned`.

    Raises:
        TapError: the model is frozen already, dtype or layout is unknown, or a class is named twice; at the first
            call, that it cannot be compiled here.

    Example:
        >>> import torch, kdlib
        >>> big = torch.nn.Linear(4, 3)
        >>> teacher = kdlib.freeze(kdlib.Tapped(big, logits=""))
        >>> teacher(torch.zeros(2, 4))["logits"].requires_grad
        False
    """
    if isinstance(model, Frozen):
        raise TapError("freeze was given a teacher that is frozen already.")
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise TapError(f"dtype={dtype!r} is no type of torch: it wants torch.bfloat16 or the like.")
    if layout is not None and layout not in LAYOUTS:
        raise TapError(f"layout={layout!r} is unknown.{did_you_mean(str(layout), LAYOUTS)}")
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    pinned = None if device is None else torch.empty(0, device=device).device  # with its number, as tensors have it
    if pinned is not None:
        model = model.to(pinned)
    model.eval().requires_grad_(False)
    ordered = None if layout is None else LAYOUTS[layout]
    if ordered is not None:
        model = model.to(memory_format=ordered)  # type: ignore[call-overload]
    frozen = Frozen(model, pinned=pinned, dtype=dtype, layout=ordered, compile=compile)
    if classes is not None:
        if len(set(classes)) != len(classes):
            raise TapError(f"A class is named twice in {list(classes)}.")
        frozen.classes = tuple(classes)
    return frozen


def teachers_in(holder: Any, _depth: int = 3) -> Iterator[Frozen]:
    """Yield the frozen models that a source holds, in its attributes and in those of the sources it holds."""
    if isinstance(holder, Frozen):
        yield holder
    elif isinstance(holder, Mapping):
        for value in holder.values():
            yield from teachers_in(value, _depth)
    elif isinstance(holder, tuple | list):
        for value in holder:
            yield from teachers_in(value, _depth)
    elif _depth and not isinstance(holder, Tensor) and hasattr(holder, "__dict__"):
        for value in vars(holder).values():
            yield from teachers_in(value, _depth - 1)


def _moved(
    value: Any,
    device: torch.device | None,
    dtype: torch.dtype | None = None,
    layout: torch.memory_format | None = None,
) -> Any:
    """Return a nest of tensors on a device, its floating-point ones in a type, its images in a layout."""

    def moved(tensor: Tensor) -> Tensor:
        memory_format = torch.preserve_format if layout is None else layout_of(tensor, layout)
        return tensor.to(device, dtype if tensor.is_floating_point() else None, memory_format=memory_format)

    return map_tensors(moved, value)
