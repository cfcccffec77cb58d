"""Training a distiller: settings are refused, all is prepared and tried, and then :mod:`kdlib.training` runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from kdlib.batch import LAYOUTS
from kdlib.data import CLEAN, Loader, as_part
from kdlib.distiller import Distiller, untouched
from kdlib.errors import KdlibError, TrainingError, did_you_mean
from kdlib.files import make_folder, write_json
from kdlib.interfaces import SoftLabelSource
from kdlib.keyed import default_generators_keyed
from kdlib.log import Callback, Event, csv_log, jsonl_log, progress_bar
from kdlib.place import PRECISIONS, Place, device_of, threads_set
from kdlib.progress import track
from kdlib.training import Choice, History, Training, kept_in_eval, samples_of, to_train_mode
from kdlib.worth import Hits, described, hits

JUDGED = 200
"""Rows of each part on which a teacher's accuracy is taken, rounded up to whole batches."""
SCHEDULES = ("constant", "one_cycle", "cosine")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


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

    Each epoch trains in train mode and validates in eval mode; at the end all modes are as they were. What the user
    froze stays frozen: a batch norm whose own weights have ``requires_grad = False`` keeps its statistics; and where
    some layers of the student are in train mode and some modules in eval mode, those in eval mode stay so. A student
    that is in eval mode as a whole, as after a look at its accuracy, is trained as a whole.

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
    place = Place(device_of(device), LAYOUTS[layout], precision)
    home = Place(next((p.device for p in distiller.parameters()), place.device), LAYOUTS["contiguous"], precision)
    parts = _parts(distiller.source, train, valid)
    loader = Loader(parts["training"], batch=batch, seed=seed, workers=workers, keyed=True)
    valid_loader = Loader(parts["validation"], batch=batch, shuffle=False, keyed=True) if valid is not None else None

    with ExitStack() as stack:
        stack.enter_context(threads_set(threads))
        stack.enter_context(_modes_restored(distiller))
        kept = kept_in_eval(distiller.student)
        place.module(distiller)
        _prepare(distiller, parts["training"], batch, place, seed)
        for name, part in parts.items():
            _try_last_batch(distiller, kept, part, batch, place, seed, name)
        maker = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
        stepper = maker([parameter for parameter in distiller.parameters() if parameter.requires_grad], lr=lr)
        steps = epochs * -(-len(loader) // accumulate)
        training = Training(
            distiller,
            stepper,
            _scheduler(stepper, schedule, lr, steps),
            loader,
            valid_loader,
            place,
            Choice(keep=valid is not None and select != "last", patience=patience),
            epochs=epochs,
            seed=seed,
            accumulate=accumulate,
            clip=clip,
            kept=kept,
        )
        tell = _listeners(stack, callbacks, progress, steps, folder)
        if distiller.source is not None:
            _judge_teacher(training, distiller.source, parts, batch, folder, bool(progress))
        training.run(tell)
        home.module(distiller)
        assert training.last is not None  # there was an epoch
        tell(Event("end", training.step, training.epoch - 1, training.last[0], distiller, {}))
    return training.history


def _parts(source: Any, train: Any, valid: Any) -> dict[str, Any]:
    """Return the parts by name, with what the source adds to them."""
    parts = {"training": as_part(train)} | ({} if valid is None else {"validation": as_part(valid)})
    return {name: source.dataset(part) for name, part in parts.items()} if hasattr(source, "dataset") else parts


def _prepare(distiller: Distiller, part: Any, batch: int, place: Place, seed: int) -> None:
    """Have projectors made and everything checked on one batch."""
    with default_generators_keyed(place.device, seed, "step", "prepare"):
        first = next(Loader(part, batch=batch, shuffle=False, keyed=True).epoch(CLEAN))
        with place.autocast():
            tried = {**place.batch(first), "clock": lambda: (int(distiller.step), 0)}
            report = distiller.prepare(tried).check(tried)
    if report.fault is not None:
        raise report.fault
    if not report:
        samples = samples_of(first, part)
        raise TrainingError(f"The distiller does not pass its check on the first batch.\n{report}\n{samples}")


def _try_last_batch(
    distiller: Distiller, kept: Collection[nn.Module], part: Any, batch: int, place: Place, seed: int, name: str
) -> None:
    """Refuse a last batch that is too small for a batch norm or a point, before an epoch is spent on getting there."""
    rest = len(part) % batch
    if not rest:
        return
    with (
        untouched(distiller),
        torch.no_grad(),
        default_generators_keyed(place.device, seed, "step", "last batch"),
    ):
        if name == "training":
            to_train_mode(distiller, kept)
        else:
            distiller.eval()
        rows = next(Loader(part, batch=rest, shuffle=False, keyed=True).epoch(CLEAN))
        try:
            place.forward(distiller, {**place.batch(rows), "clock": lambda: (int(distiller.step), 0)})
        except (KdlibError, ValueError) as error:
            raise TrainingError(
                f"With batch={batch} the last batch of the {name} part has {rest} of its {len(part)} rows; choose "
                f"another size. The distiller cannot take it: {error}"
            ) from error


def _judge_teacher(
    training: Training, source: Any, parts: Mapping[str, Any], batch: int, folder: Path | str | None, progress: bool
) -> None:
    """Find out how often the teacher is right and how far its source's shortcut leads; keep and show it."""
    from rich import get_console

    place, seed, history = training.place, training.seed, training.history
    with default_generators_keyed(place.device, seed, "step", "teacher"):
        history.teacher = _teacher_accuracy(source, parts, batch, place, seed, progress)
        if hasattr(source, "difference"):
            with place.autocast():
                history.difference = dict(source.difference(parts["training"]))
    difference = history.difference
    if folder is not None:
        kept = {**history.teacher, "difference": difference} if difference else history.teacher
        write_json(Path(folder) / "teacher.json", kept)
    lines = [f"teacher on {name}: {described(right)}" for name, right in history.teacher.items()]
    if difference:
        lines.append("teacher's shortcut: " + ", ".join(f"{name} {value:.3g}" for name, value in difference.items()))
    for line in lines if progress else ():
        get_console().print(line, highlight=False, soft_wrap=True)


def _teacher_accuracy(
    source: SoftLabelSource, parts: Mapping[str, Any], batch: int, place: Place, seed: int, progress: bool
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


def _listeners(
    stack: ExitStack, callbacks: Sequence[Callback], progress: bool | str, steps: int, folder: Path | str | None
) -> Callback:
    """Return a function that tells an event to the callbacks, the bar and the logs."""
    listeners = [*callbacks]
    if progress:
        title = progress if isinstance(progress, str) else "training"
        listeners.append(stack.enter_context(progress_bar(steps, title)))
    if folder is not None:
        make_folder(Path(folder))
        listeners += [log(Path(folder)) for log in (csv_log, jsonl_log)]

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


def _scheduler(optimizer: torch.optim.Optimizer, schedule: str, lr: float, steps: int) -> LRScheduler | None:
    if schedule == "one_cycle":
        momentum = bool({"momentum", "betas"} & set(optimizer.defaults))
        return OneCycleLR(optimizer, max_lr=lr, total_steps=steps, cycle_momentum=momentum)
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    return None


@contextmanager
def _modes_restored(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


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
