"""Checkpoints: a training as it stands in one file, written whole, with the one before kept and damage refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from kdlib import ranks
from kdlib.distiller import Distiller, Losses
from kdlib.errors import KdlibError, TrainingError
from kdlib.files import make_folder, read_tensors, remove_left_over, write_tensors
from kdlib.made_of import refusal
from kdlib.signals import Heard, Stopped
from kdlib.store import differences, listed
from kdlib.training import History, Means, Training

FORMAT = 1
NOTE = "checkpoint"
CLOCK = ("last_epoch", "_step_count", "_last_lr")
"""What changes in a schedule of torch; the rest, functions among it, is made anew from the settings."""


class Checkpoints:
    """The checkpoints of one training: the last at ``path``, and the one before beside it as ``NAME.previous.EXT``.

    The file is safetensors with a checksum of its own: all tensors, and the rest as JSON among its metadata. It is
    written beside its place, flushed, and renamed, so a kill at any moment leaves one that is whole.

    Args:
        path: the file.
        every: optimizer steps from one to the next. None: at the end of each epoch.
        made_of: what the training is made of (:func:`kdlib.made_of.made_of`).
    """

    def __init__(self, path: Path, every: int | None, made_of: Mapping[str, Any]) -> None:
        self.path = path
        self.previous = path.with_name(f"{path.stem}.previous{path.suffix}")
        self.every = every
        self.made_of = made_of
        self._whole = False  # whether what is at the path may take the place of the one before
        self._saved: tuple[int, int, int] | None = None

    def open(self, training: Training, *, resume: bool = False, force: bool = False) -> bool:
        """Bring a training to where its checkpoint was taken, and return whether there was one.

        Args:
            training: made and prepared as the one that was saved.
            resume: whether to. Else no checkpoint may be there.
            force: go on in spite of differences, which are then noted in the history.

        Raises:
            TrainingError: there is a checkpoint and it is not to be resumed; it is of another training; all that is
                there is damaged; or ranks see different ones.
        """
        if not resume:
            ranks.once(self._refuse_present)
            return False
        with ranks.together():
            begun = self._resume(training, force)
        places = ranks.gathered([_place_of(training)])
        if len(set(places)) > 1:
            raise TrainingError(
                f"{self.path}: the ranks do not see the same checkpoint; they would go on from the steps "
                f"{', '.join(str(step) for *_, step in places)}. Its folder has to lie on a file system that all of "
                "them see."
            )
        return begun

    def _resume(self, training: Training, force: bool) -> bool:
        found = self._read()
        if found is None:
            return False
        path, tensors, note = found
        lines, text = refusal(note["made_of"], self.made_of)
        if lines and not force:
            raise TrainingError(f"{path}: this checkpoint is of another training.\n{text}")
        try:
            state = joined(note["state"], tensors)
            if lines:
                _refuse_other_schedule(state, note["made_of"], self.made_of, training)
                _take_new_settings(state, note["made_of"], self.made_of)
            restore(training, state)
        except KdlibError as error:
            raise TrainingError(f"{path}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{path}: cannot be taken up by this training: {error}") from error
        training.history.forced += [line for line in lines if line not in training.history.forced]
        self._saved = None if lines else _place_of(training)
        return True

    def between(self, training: Training, heard: Heard) -> None:
        """Save a training where it is time, and stop it where that was asked for. It must be whole.

        Raises:
            Stopped: it was; the checkpoint is saved.
        """
        asked = ranks.highest(heard.number)
        if self.every is None:
            due = training.batch == 0
        else:
            due = training.step % self.every == 0 and (self._saved is None or self._saved[2] != training.step)
        if due or asked or training.over:
            self.save(training)
        if asked:
            where = f" after step {training.step}, epoch {training.epoch}; the checkpoint is {self.path}"
            raise Stopped(asked, where)

    def save(self, training: Training) -> None:
        """Write the training as it stands; what was the last is the one before. Nothing is done where it is there."""
        place = _place_of(training)
        if place != self._saved:
            ranks.once(self._write, training)
            self._whole, self._saved = True, place

    def _write(self, training: Training) -> None:
        tensors: dict[str, Tensor] = {}
        plain = apart(state_of(training), tensors)
        make_folder(self.path.parent)
        if self._whole and self.path.exists():
            self.path.replace(self.previous)
        write_tensors(self.path, tensors, {NOTE: {"format": FORMAT, "made_of": self.made_of, "state": plain}})

    def _refuse_present(self) -> None:
        for path in (self.path, self.previous):
            if path.exists():
                raise TrainingError(
                    f"{path}: there is a checkpoint already. Go on from it with resume=True, or remove it."
                )

    def _read(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest checkpoint that is whole, or None where there is none."""
        if ranks.rank() == 0:
            remove_left_over(self.path.parent)
        damaged: list[str] = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                tensors, note = _checked(path)
            except KdlibError as error:
                damaged.append(str(error))
                continue
            if damaged and ranks.rank() == 0:
                warnings.warn(f"{damaged[0]} Going on from the one before, {path}.", stacklevel=4)
            self._whole = path == self.path
            return path, tensors, note
        if damaged:
            raise TrainingError(
                "There is no checkpoint left to go on from; remove the file to begin this training anew.\n"
                + listed(damaged)
            )
        return None


def state_of(training: Training) -> dict[str, Any]:
    """Return what a training has become, as tensors and plain data in dictionaries, lists and tuples.

    What it is made of (data, settings, teacher) is no part of it.
    """
    optimizer, scheduler, last = training.optimizer.state_dict(), training.scheduler, training.last
    choice = training.choice
    return {
        "distiller": _own(training.distiller),
        "optimizer": optimizer,
        "scheduler": None if scheduler is None else _clock(scheduler),
        "length": _length(training),
        "choice": {"best": choice.best, "lowest": choice.lowest, "weights": choice.weights},
        "history": asdict(training.history),
        "place": {"step": training.step, "epoch": training.epoch, "batch": training.batch},
        "means": {"sums": training.means.sums, "counts": training.means.counts},
        "seconds": training.seconds,
        "waited": training.waited,
        "last": None if last is None else {"total": last[0].total, "terms": last[0].terms, "lr": last[1]},
    }


def restore(training: Training, state: Mapping[str, Any]) -> None:
    """Give a training, made and prepared as that one was, what :func:`state_of` returned of it.

    Raises:
        TrainingError: names or shapes are not those of this distiller, or the optimizer is another.
    """
    device = training.place.device
    own, saved = _own(training.distiller), state["distiller"]
    lines = differences(_shapes(saved), _shapes(own))
    if lines:
        raise TrainingError(f"the tensors are not those of this distiller.\n{listed(lines)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    _restore_optimizer(training.optimizer, state["optimizer"])
    if training.scheduler is not None:
        training.scheduler.load_state_dict(dict(state["scheduler"]))
    training.choice.best, training.choice.lowest = state["choice"]["best"], state["choice"]["lowest"]
    kept = state["choice"]["weights"]
    training.choice.weights = None if kept is None else {name: value.to(device) for name, value in kept.items()}
    training.history = History(**state["history"])
    training.step, training.epoch, training.batch = (state["place"][name] for name in ("step", "epoch", "batch"))
    sums = {name: value.to(device) for name, value in state["means"]["sums"].items()}
    training.means = Means(sums, dict(state["means"]["counts"]))
    training.seconds, training.waited = state["seconds"], state["waited"]
    last = state["last"]
    if last is not None:
        training.last = (
            Losses(last["total"].to(device), {n: v.to(device) for n, v in last["terms"].items()}),
            last["lr"],
        )


def unsaved(distiller: Distiller) -> list[str]:
    """Return what changes in training and is in no parameter and no buffer, so that no checkpoint can hold it."""
    found = [
        f"the source or point {type(part).__name__} has a method 'advance' and is no module"
        for part in _within([distiller.source, *distiller.points.values()])
        if hasattr(part, "advance") and not isinstance(part, nn.Module)
    ]
    extra = nn.Module.get_extra_state
    return found + [
        f"the module {name or 'itself'} ({type(module).__name__}) has an extra state"
        for name, module in distiller.named_modules()
        if type(module).get_extra_state is not extra
    ]


def apart(value: Any, tensors: dict[str, Tensor], at: str = "") -> Any:
    """Return a nest as JSON can hold it, its tensors taken out into a dictionary by their places.

    Example:
        >>> tensors = {}
        >>> plain = apart({"a": (1, torch.ones(1)), 2: None}, tensors)
        >>> sorted(tensors), joined(plain, tensors)
        (['a/1'], {'a': (1, tensor([1.])), 2: None})
    """
    if isinstance(value, Tensor):
        while at in tensors:  # of keys with a slash in them
            at += "/"
        tensors[at] = value
        return {"tensor": at}
    if isinstance(value, Mapping):
        return {"mapping": [[key, apart(item, tensors, f"{at}/{key}".lstrip("/"))] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        items = [apart(item, tensors, f"{at}/{number}".lstrip("/")) for number, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TrainingError(f"{at} is a {type(value).__name__}; a checkpoint holds tensors and plain data.")


def joined(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`apart`."""
    if isinstance(plain, list):
        return [joined(item, tensors) for item in plain]
    if not isinstance(plain, Mapping):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    if "tuple" in plain:
        return tuple(joined(item, tensors) for item in plain["tuple"])
    return {key: joined(item, tensors) for key, item in plain["mapping"]}


def _checked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint, or raise a KdlibError that names the file and says what is wrong with it."""
    try:
        tensors, notes = read_tensors(path)
    except RecursionError:
        raise KdlibError(f"{path}: not a checkpoint of kdlib.") from None
    note = notes.get(NOTE)
    if not isinstance(note, dict) or not {"format", "made_of", "state"} <= note.keys():
        raise KdlibError(f"{path}: not a checkpoint of kdlib.")
    if note["format"] != FORMAT:
        raise KdlibError(f"{path}: a checkpoint of format {note['format']}; this version of kdlib reads {FORMAT}.")
    return tensors, note


def _own(distiller: Distiller) -> dict[str, Tensor]:
    """Return all that training changes; buffers that a state dict leaves out, too."""
    return {**dict(distiller.named_parameters()), **dict(distiller.named_buffers())}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


def _clock(scheduler: LRScheduler) -> dict[str, Any]:
    state = scheduler.state_dict()
    return {name: state[name] for name in CLOCK if name in state}


def _length(training: Training) -> int:
    """Return the optimizer steps of the whole training, over which a schedule is laid out."""
    return training.epochs * -(-len(training.train) // training.accumulate)


def _place_of(training: Training) -> tuple[int, int, int]:
    return training.epoch, training.batch, training.step


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != [len(group["params"]) for group in saved["param_groups"]]:
        raise TrainingError(
            "the optimizer had other parameters; were other layers frozen, or is the optimizer another one?"
        )

    def laid_out(number: int, value: Any) -> Any:
        """Lay a tensor out in memory as its parameter is: what it is not, torch may add up in another order."""
        like = parameters[number]
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape != like.shape:
            return value.clone() if isinstance(value, Tensor) else value
        return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)

    state = {
        number: {name: laid_out(number, value) for name, value in entries.items()}
        for number, entries in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _refuse_other_schedule(
    state: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any], training: Training
) -> None:
    """Refuse what no force makes fit: a schedule is laid out over all steps, from the first learning rate to the last.

    Raises:
        TrainingError: one side has a schedule, and the other none or another.
    """
    if state["scheduler"] is None and training.scheduler is None:
        return
    sides = (before["settings"], state["length"]), (now["settings"], _length(training))
    was, wanted = ({"schedule": of["schedule"], "lr": of["lr"], "steps": steps} for of, steps in sides)
    lines = differences(was, wanted)
    if lines:
        raise TrainingError(
            "the learning rate follows a schedule over the whole training, which cannot be changed on the way, not "
            f"even by force. Begin anew, or take it up as it was.\n{listed(lines)}"
        )


def _take_new_settings(state: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Give the saved optimizer the settings that were forced; else the saved ones would hold.

    Raises:
        TrainingError: it is of another class.
    """
    old, new = (made_of["settings"].get("optimizer", {}) for made_of in (before, now))
    if old.get("class") != new.get("class"):
        raise TrainingError(
            f"the optimizer was {old.get('class')} and is {new.get('class')} now; its state fits no other, not even by "
            "force."
        )
    for name, value in new.items():
        if old.get(name) != value:
            for group in state["optimizer"]["param_groups"]:
                if name in group:
                    group[name] = tuple(value) if isinstance(value, list) else value


def _within(parts: Any, depth: int = 6) -> Iterator[Any]:
    """Yield sources and points, and those that they hold in their attributes."""
    for part in parts if depth else ():
        if isinstance(part, Mapping | list | tuple):
            yield from _within(part.values() if isinstance(part, Mapping) else part, depth - 1)
        elif hasattr(part, "__dict__"):
            yield part
            yield from _within([value for value in vars(part).values() if _holds(value)], depth - 1)


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) or hasattr(value, "advance")
