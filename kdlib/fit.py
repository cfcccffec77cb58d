"""The training loop: one process, one distiller, epochs of keyed batches."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from kdlib.batch import tensors_in
from kdlib.data import CLEAN, Loader, as_part, to_device
from kdlib.distiller import Distiller, Losses, untouched
from kdlib.errors import KdlibError, TrainingError, did_you_mean
from kdlib.files import write_json
from kdlib.interfaces import Batch, SoftLabelSource
from kdlib.keyed import default_generators_keyed
from kdlib.log import Callback, Event, csv_log, jsonl_log, progress_bar
from kdlib.progress import track
from kdlib.worth import Hits, described, hits

JUDGED = 200
"""Rows of each part on which a teacher's accuracy is taken, rounded up to whole batches."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = ("fp32", "bf16")
SCHEDULES = ("constant", "one_cycle", "cosine")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass
class History:
    """What a training was: one record an epoch, and the epoch whose weights the student has now."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    """``epoch``, ``step``, ``lr``, ``seconds``, ``total`` and each term as means over the epoch's rows; with a
    validation part the same with ``valid_`` before the name."""
    best: int = -1
    """The epoch whose weights were kept."""
    teacher: dict[str, Hits] = field(default_factory=dict)
    """How often the teacher is right before the first step, (right, rows): of ``training`` and ``validation``,
    ``through the source`` and ``on the student's input alone``. Empty without a source."""
    difference: dict[str, float] = field(default_factory=dict)
    """What the source's ``difference`` says of the training part. Empty where it has none."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return int(self.epochs[-1]["step"]) if self.epochs else 0


def fit(
    distiller: Distiller,
    train: Any,
    *,
    valid: Any = None,
    epochs: int,
    batch: int = 32,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adam",
    lr: float = 1e-3,
    schedule: Literal["constant", "one_cycle", "cosine"] = "constant",
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    layout: Literal["contiguous", "channels_last"] = "contiguous",
    select: Literal["best", "last"] | None = None,
    patience: int | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    workers: int = 0,
    threads: int | None = None,
    folder: Path | str | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | str = True,
) -> History:
    """Train a distiller's student (and projectors) and return the history.

    Before the first step the distiller is prepared and checked on one batch (:meth:`kdlib.Distiller.check`), and the
    teacher's accuracy is taken on some rows of both parts, without augmentation: a teacher that is always right on the
    training part has little to say there that the labels do not.

    The run is a function of the seed: the order of the rows, augmentation and dropout are keyed by (seed, epoch,
    index) and (seed, step), so the number of workers changes nothing, and the caller's random state is left alone.
    Equal bits also want an equal number of threads.

    Args:
        distiller: what to train.
        train: a data part, or any map-style data set of ``(x, y)`` pairs or mappings.
        valid: the same kind, for ``select`` and ``patience``.
        epochs: passes over the training part, at least 1.
        batch: rows a batch. The last batch of an epoch has what is left.
        optimizer: ``adam``, ``adamw``, ``sgd`` (torch's defaults), or a function (parameters, lr=...) -> optimizer.
        lr: the learning rate; with ``one_cycle`` its peak.
        schedule: ``constant``; ``one_cycle`` (torch's OneCycleLR) or ``cosine`` to 0, both over all optimizer steps.
        seed: keys everything random.
        device: ``auto`` takes CUDA where there is one.
        precision: ``bf16`` runs the forward under autocast; weights stay float32.
        layout: ``channels_last`` for 2-D convolutions.
        select: keep the weights of the epoch with the lowest validation loss (``best``, needs ``valid``) or the
            ``last``. Default: ``best`` where there is a validation part.
        patience: stop after this many epochs without a better validation loss.
        clip: largest norm of the gradient.
        accumulate: batches an optimizer step. Batch norm still sees single batches.
        workers: loader processes.
        threads: torch's threads for the time of the training.
        folder: where ``metrics.csv`` (epochs), ``metrics.jsonl`` (steps) and ``teacher.json`` (its accuracy, and
            the source's ``difference``) go.
        callbacks: functions of an :class:`kdlib.Event`.
        progress: show a bar on the terminal; a string is its title.

    Raises:
        TrainingError: settings that do not fit together; a loss or gradient that is not finite. It is raised before
            the optimizer's step, and names the samples of the batch.

    Example:
        >>> import torch, kdlib
        >>> data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.arange(40) % 2)
        >>> net = kdlib.Tapped(torch.nn.Linear(4, 2), logits="")
        >>> history = kdlib.fit(kdlib.Distiller(net, hard=kdlib.HardLabels()), data, epochs=2, batch=8, progress=False)
        >>> history.steps
        10
    """
    _refuse_settings(valid, epochs, select, patience, accumulate, clip, optimizer)
    for name, value, known in (
        ("optimizer", optimizer if isinstance(optimizer, str) else "adam", OPTIMIZERS),
        ("precision", precision, PRECISIONS),
        ("layout", layout, LAYOUTS),
        ("schedule", schedule, SCHEDULES),
        ("select", select or "best", ("best", "last")),
    ):
        if value not in known:
            raise TrainingError(f"{name}={value!r} is unknown.{did_you_mean(str(value), known)}")
    place = _Place(device_of(device), LAYOUTS[layout], precision)
    home = _Place(next((p.device for p in distiller.parameters()), place.device), LAYOUTS["contiguous"], precision)
    source = distiller.source
    wrap = source.dataset if source is not None and hasattr(source, "dataset") else lambda part: part
    loader = Loader(wrap(as_part(train)), batch=batch, seed=seed, workers=workers, keyed=True)
    first = Loader(loader.dataset, batch=batch, shuffle=False, keyed=True)
    valid_loader = None
    if valid is not None:
        valid_loader = Loader(wrap(as_part(valid)), batch=batch, shuffle=False, keyed=True)

    with ExitStack() as stack:
        stack.enter_context(threads_set(threads))
        stack.enter_context(_modes_restored(distiller))
        place.module(distiller)
        with default_generators_keyed(place.device, seed, "step", "prepare"):
            batch_0 = next(first.epoch(CLEAN))
            with place.autocast():
                tried = {**place.batch(batch_0), "clock": lambda: (int(distiller.step), 0)}
                report = distiller.prepare(tried).check(tried)
        if report.fault is not None:
            raise report.fault
        if not report:
            samples = _samples(batch_0, loader.dataset)
            raise TrainingError(f"The distiller does not pass its check on the first batch.\n{report}\n{samples}")
        _try_last_batch(distiller, loader.dataset, batch, place, seed, training=True)
        if valid_loader is not None:
            _try_last_batch(distiller, valid_loader.dataset, batch, place, seed, training=False)
        maker = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
        stepper = maker([parameter for parameter in distiller.parameters() if parameter.requires_grad], lr=lr)
        steps = epochs * -(-len(loader) // accumulate)
        scheduler = _scheduler(stepper, schedule, lr, steps)
        tell = _listeners(stack, callbacks, progress, steps, folder)

        history = History()
        if source is not None:
            parts = {"training": loader.dataset}
            if valid_loader is not None:
                parts["validation"] = valid_loader.dataset
            with default_generators_keyed(place.device, seed, "step", "teacher"):
                history.teacher = _teacher_accuracy(source, parts, batch, place, seed, bool(progress))
                if hasattr(source, "difference"):
                    with place.autocast():
                        history.difference = dict(source.difference(loader.dataset))
            _report_teacher(history, folder, bool(progress))
        chosen = _Choice(keep=valid is not None and select != "last", patience=patience)
        step = 0
        for epoch in range(epochs):
            distiller.train()
            started = time.perf_counter()
            means = _Means()
            batches = loader.epoch(epoch)
            while group := _fetched(batches, accumulate, seed, step, place.device):
                stepper.zero_grad()
                where = f"step {step}, epoch {epoch}"
                with (
                    default_generators_keyed(place.device, seed, "step", step),
                    _buffers_restored_on_error(distiller.student),
                ):
                    losses = _gradients(distiller, group, place, means, loader.dataset, where)
                    _clip(stepper, clip, group, loader.dataset, where)
                rate = float(stepper.param_groups[0]["lr"])
                now = {"lr": rate, **distiller.in_force(epoch)}
                stepper.step()
                distiller.advance()
                if scheduler is not None:
                    scheduler.step()
                step += 1
                tell(Event("step", step, epoch, losses, distiller, now))
            record = {"epoch": epoch, "step": step, "lr": rate, **means.result()}
            if valid_loader is not None:
                record |= _validate(distiller, valid_loader, place, (int(distiller.step), epoch), seed)
            record["seconds"] = time.perf_counter() - started
            history.epochs.append(record)
            over = chosen.see(epoch, record.get("valid_total"), distiller)
            tell(Event("epoch", step, epoch, losses, distiller, record))
            if over:
                break
        history.best = chosen.take(distiller, last=epoch)
        home.module(distiller)
        tell(Event("end", step, epoch, losses, distiller, {}))
    return history


@dataclass(frozen=True)
class _Place:
    """Where and how a forward runs."""

    device: torch.device
    layout: torch.memory_format
    precision: str

    def batch(self, batch: Batch) -> dict[str, Any]:
        return to_device(batch, self.device, self.layout)

    def module(self, module: nn.Module) -> None:
        module.to(self.device).to(memory_format=self.layout)  # type: ignore[call-overload]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self, distiller: Distiller, batch: Batch) -> Losses:
        with self.autocast():
            losses: Losses = distiller(batch)
        return losses


@dataclass
class _Choice:
    """The epoch whose weights are kept: that of the lowest validation loss, or the last."""

    keep: bool
    patience: int | None
    best: int = -1
    lowest: float = math.inf
    weights: dict[str, Tensor] | None = None

    def see(self, epoch: int, loss: float | None, distiller: Distiller) -> bool:
        """Note an epoch's validation loss, and return whether patience has run out."""
        if loss is None:
            return False
        if loss < self.lowest:
            self.lowest, self.best = loss, epoch
            if self.keep:
                self.weights = {name: value.detach().clone() for name, value in distiller.state_dict().items()}
        return self.patience is not None and epoch - self.best >= self.patience

    def take(self, distiller: Distiller, *, last: int) -> int:
        """Give the distiller the chosen weights, and return their epoch."""
        if self.weights is None:
            return last
        distiller.load_state_dict(self.weights)
        return self.best


def _try_last_batch(distiller: Distiller, part: Any, batch: int, place: _Place, seed: int, *, training: bool) -> None:
    """Refuse a last batch that is too small for a batch norm or a point, before an epoch is spent on getting there."""
    rest = len(part) % batch
    if not rest:
        return
    with (
        untouched(distiller),
        torch.no_grad(),
        default_generators_keyed(place.device, seed, "step", "last batch"),
    ):
        distiller.train(training)
        rows = next(Loader(part, batch=rest, shuffle=False, keyed=True).epoch(CLEAN))
        try:
            place.forward(distiller, {**place.batch(rows), "clock": lambda: (int(distiller.step), 0)})
        except (KdlibError, ValueError) as error:
            which = "training" if training else "validation"
            raise TrainingError(
                f"With batch={batch} the last batch of the {which} part has {rest} of its {len(part)} rows; choose "
                f"another size. The distiller cannot take it: {error}"
            ) from error


def _gradients(
    distiller: Distiller, group: list[Batch], place: _Place, means: _Means, dataset: Any, where: str
) -> Losses:
    """Add up the gradients of a group of batches, each by its share of the rows, and return the last losses."""
    rows = sum(_rows(batch) for batch in group)
    for batch in group:
        losses = place.forward(distiller, place.batch(batch))
        _refuse_infinite(losses, batch, dataset, where)
        torch.autograd.backward(losses.total * (_rows(batch) / rows))
        means.add(losses, _rows(batch))
    return losses


@torch.no_grad()
def _validate(
    distiller: Distiller, loader: Loader, place: _Place, clock: tuple[int, int], seed: int
) -> dict[str, float]:
    """Return the mean losses over a part, in eval mode. The epoch is CLEAN, so each time it is the same data."""
    distiller.eval()
    means = _Means()
    with default_generators_keyed(place.device, seed, "step", "validate"):
        for batch in loader.epoch(CLEAN):
            losses = place.forward(distiller, {**place.batch(batch), "clock": lambda: clock})
            _refuse_infinite(losses, batch, loader.dataset, f"the validation after epoch {clock[1]}")
            means.add(losses, _rows(batch))
    return {f"valid_{name}": value for name, value in means.result().items()}


def _teacher_accuracy(
    source: SoftLabelSource, parts: Mapping[str, Any], batch: int, place: _Place, seed: int, progress: bool
) -> dict[str, Hits]:
    """Return how often the teacher is right on some rows of each part, without augmentation."""
    found = {}
    count = -(-JUDGED // batch)
    for name, part in parts.items():
        batches = itertools.islice(Loader(part, batch=batch, seed=seed, keyed=True).epoch(CLEAN), count)
        total: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for one in track(batches, f"teacher on {name}", count) if progress else batches:
            moved = place.batch(one)
            with place.autocast():
                of_batch = hits(source, source(moved), moved)
            total.update({key: right for key, (right, _) in of_batch.items()})
            rows.update({key: seen for key, (_, seen) in of_batch.items()})
        if rows:
            found[name] = {key: (total[key], rows[key]) for key in rows}
    return found


def _report_teacher(history: History, folder: Path | str | None, progress: bool) -> None:
    """Show how often the teacher is right and how far its source's shortcut leads, and keep it beside the logs."""
    from rich import get_console

    difference = history.difference
    if folder is not None:
        kept = {**history.teacher, "difference": difference} if difference else history.teacher
        write_json(Path(folder) / "teacher.json", kept)
    lines = [f"teacher on {name}: {described(right)}" for name, right in history.teacher.items()]
    if difference:
        lines.append("teacher's shortcut: " + ", ".join(f"{name} {value:.3g}" for name, value in difference.items()))
    for line in lines if progress else ():
        get_console().print(line, highlight=False, soft_wrap=True)


def _listeners(
    stack: ExitStack, callbacks: Sequence[Callback], progress: bool | str, steps: int, folder: Path | str | None
) -> Callback:
    """Return a function that tells an event to the callbacks, the bar and the logs."""
    listeners = [*callbacks]
    if progress:
        title = progress if isinstance(progress, str) else "training"
        listeners.append(stack.enter_context(progress_bar(steps, title)))
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        listeners += [stack.enter_context(log(Path(folder))) for log in (csv_log, jsonl_log)]

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


class _Means:
    """Means of the losses over rows, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self.rows = 0
        self.counts: dict[str, int] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, losses: Losses, rows: int) -> None:
        for name, value in {**losses.terms, "total": losses.total.detach()}.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value * rows
            self.counts[name] = self.counts.get(name, 0) + rows

    def result(self) -> dict[str, float]:
        return {name: float(value) / self.counts[name] for name, value in self.sums.items()}


def _fetched(batches: Iterator[Batch], count: int, seed: int, step: int, device: torch.device) -> list[Batch]:
    """Return the batches of the next step. A data set that draws from torch's default generator is keyed too."""
    with default_generators_keyed(device, seed, "step", f"data {step}"):
        return list(itertools.islice(batches, count))


def _rows(batch: Batch) -> int:
    return len(batch["index"])


def _scheduler(optimizer: torch.optim.Optimizer, schedule: str, lr: float, steps: int) -> LRScheduler | None:
    if schedule == "one_cycle":
        momentum = bool({"momentum", "betas"} & set(optimizer.defaults))
        return OneCycleLR(optimizer, max_lr=lr, total_steps=steps, cycle_momentum=momentum)
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    return None


@contextmanager
def _buffers_restored_on_error(module: nn.Module) -> Iterator[None]:
    """Keep a batch that is not finite out of running statistics: they change in the forward, before it is noticed."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise


@contextmanager
def _modes_restored(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Give torch so many threads for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(device: str | torch.device) -> torch.device:
    """Return a device that can be used, ``auto`` as CUDA where there is one, or raise a TrainingError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return place


def _refuse_infinite(losses: Losses, batch: Batch, dataset: Any, where: str) -> None:
    if math.isfinite(losses.total.item()):
        return
    terms = ", ".join(f"{name} {value.item():g}" for name, value in losses.terms.items())
    raise TrainingError(
        f"The loss is not finite at {where} ({terms}); it has not changed the student. {_samples(batch, dataset)}"
    )


def _clip(stepper: torch.optim.Optimizer, clip: float | None, group: list[Batch], dataset: Any, where: str) -> None:
    """Bound the gradient's norm, and refuse one that is not finite though the loss is."""
    parameters = [parameter for settings in stepper.param_groups for parameter in settings["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
    if not math.isfinite(norm.item()):
        samples = " ".join(_samples(batch, dataset) for batch in group)
        raise TrainingError(
            f"The gradient is not finite at {where}, though the loss is; it has not changed the student. {samples}"
        )


def _samples(batch: Batch, dataset: Any) -> str:
    """Name the samples of a batch: those whose input is not finite, else all."""
    ids = getattr(dataset, "ids", None)
    names = [str(index) if ids is None else ids[index] for index in batch["index"].tolist()]
    good = torch.ones(len(names), dtype=torch.bool)
    for value in tensors_in(batch):
        if value.is_floating_point() and value.dim() and len(value) == len(names):
            good &= torch.isfinite(value).reshape(len(names), -1).all(1)
    bad = [name for name, finite in zip(names, good.tolist(), strict=True) if not finite]
    if bad:
        return f"Samples whose input is not finite: {', '.join(bad)}."
    return f"The inputs are finite; the samples are: {', '.join(names)}."


def _refuse_settings(
    valid: Any, epochs: int, select: Any, patience: int | None, accumulate: int, clip: float | None, optimizer: Any
) -> None:
    for name, count in (
        ("epochs", epochs),
        ("accumulate", accumulate),
        ("patience", 1 if patience is None else patience),
    ):
        if count < 1:
            raise TrainingError(f"{name} is at least 1, not {count}.")
    if clip is not None and not clip > 0:  # a negative one would turn the gradient round
        raise TrainingError(f"clip is a norm above 0, not {clip}.")
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TrainingError(
            f"optimizer is a name or a function of (parameters, lr=...), not an optimizer that is made already: it may "
            f"lack projectors. Pass torch.optim.{type(optimizer).__name__}, or functools.partial of it."
        )
    if valid is None and (select == "best" or patience is not None):
        raise TrainingError("select='best' and patience need a validation part; there is none. Take select='last'.")
