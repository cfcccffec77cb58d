"""Training a distiller: settings are refused, all is prepared and tried, and then :mod:`kdlib.training` runs."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from kdlib import ranks
from kdlib.batch import LAYOUTS
from kdlib.checkpoint import Checkpoints, unsaved
from kdlib.data import CLEAN, Loader, as_part
from kdlib.ddp import batch_norm_synced, ddp
from kdlib.distiller import Distiller, untouched
from kdlib.errors import KdlibError, TrainingError, did_you_mean
from kdlib.files import make_folder, write_json
from kdlib.fingerprints import name_of
from kdlib.interfaces import Batch, SoftLabelSource
from kdlib.keyed import default_generators_keyed
from kdlib.log import Callback, Event, csv_log, jsonl_log, progress_bar
from kdlib.made_of import made_of
from kdlib.place import PRECISIONS, Place, device_of, threads_set
from kdlib.progress import track
from kdlib.signals import heard
from kdlib.training import Choice, History, Training, kept_in_eval, samples_of, to_train_mode
from kdlib.worth import Hits, described, hits

JUDGED = 200
"""Rows of each part on which a teacher's accuracy is taken, rounded up to whole batches."""
BATCH_NORMS = ("local", "sync")
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
    batch_norm: Literal["local", "sync"] = "local",
    workers: int = 0,
    threads: int | None = None,
    folder: Path | str | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | str = True,
    checkpoint: Path | str | None = None,
    every: int | None = None,
    resume: bool = False,
    force: bool = False,
) -> History:
    """Train a distiller's student (and projectors) and return the history.

    Before the first step the distiller is prepared and checked on one batch (:meth:`kdlib.Distiller.check`), and the
    teacher's accuracy is taken on some rows of both parts, without augmentation: a teacher that is always right on the
    training part has little to say there that the labels do not.

    The run is a function of the seed: the order of the rows, augmentation and dropout are keyed by (seed, epoch,
    index) and (seed, step), so the number of workers changes nothing, and the caller's random state is left alone.
    Equal bits also want an equal number of threads.

    In a process group of several ranks (see :doc:`/scale`) each rank takes its run of the rows of every batch, DDP
    averages the gradients so that each row counts the same, and all ranks end with the same weights and history. Then
    ``batch`` means the rows of all ranks together, every rank calls ``callbacks``, and rank 0 alone writes and shows.

    Each epoch trains in train mode and validates in eval mode; at the end all modes are as they were. What the user
    froze stays frozen: a batch norm whose own weights have ``requires_grad = False`` keeps its statistics; and where
    some layers of the student are in train mode and some modules in eval mode, those in eval mode stay so. A student
    that is in eval mode as a whole, as after a look at its accuracy, is trained as a whole.

    Args:
        distiller: what to train.
        train: a data part, or any map-style data set of ``(x, y)`` pairs or mappings.
        valid: the same kind, for ``select`` and ``patience``.
        epochs: passes over the training part, at least 1.
        batch: rows a batch, on all ranks together. The last batch of an epoch has what is left.
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
        batch_norm: of several ranks. ``local``: each normalises by the rows that it has, and the running statistics are
            rank 0's. ``sync``: by the rows of all ranks (``torch.nn.SyncBatchNorm``), on CUDA only.
        workers: loader processes.
        threads: torch's threads for the time of the training.
        folder: where ``metrics.csv`` (epochs), ``metrics.jsonl`` (steps) and ``teacher.json`` (its accuracy, and
            the source's ``difference``) go.
        callbacks: functions of an :class:`kdlib.Event`.
        progress: show a bar on the terminal; a string is its title.
        checkpoint: the file to save the training in, so that another process can go on; its ending is
            ``.safetensors``. With one, SIGTERM and Ctrl-C let the step end and save before they stop.
        every: optimizer steps from one checkpoint to the next. Default: one at the end of each epoch.
        resume: go on from the checkpoint, if there is one; the result is bit-equal to that of a training that was not
            interrupted. ``metrics.csv`` and ``metrics.jsonl`` are cut back to it.
        force: go on even if the training is made of something else than the saved one; the history says so.

    Raises:
        TrainingError: settings that do not fit together; a loss or gradient that is not finite. It is raised before
            the optimizer's step, and names the samples of the batch. A checkpoint that is of another training, or
            damaged, or there and not to be resumed.
        RankError: another rank failed; the text says which, and why.
        Stopped: a signal came, and the checkpoint is saved.

    Example:
        >>> import torch, kdlib
        >>> data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.arange(40) % 2)
        >>> net = kdlib.Tapped(torch.nn.Linear(4, 2), logits="")
        >>> history = kdlib.fit(kdlib.Distiller(net, hard=kdlib.HardLabels()), data, epochs=2, batch=8, progress=False)
        >>> history.steps
        10
    """
    _refuse_settings(valid, epochs, select, patience, accumulate, clip, optimizer)
    _refuse_checkpoint(distiller, checkpoint, every, resume, force)
    _refuse_unknown(optimizer, precision, layout, schedule, select, batch_norm)
    place = Place(device_of(device), LAYOUTS[layout], precision)
    home = Place(next((p.device for p in distiller.parameters()), place.device), LAYOUTS["contiguous"], precision)
    if batch_norm == "sync" and ranks.world() > 1 and place.device.type != "cuda":
        raise TrainingError(
            f"batch_norm='sync' is torch's SyncBatchNorm, which runs on CUDA, and the device is {place.device}: "
            "take 'local'."
        )
    folder = None if ranks.rank() else folder
    progress = False if ranks.rank() else progress
    given = {"training": as_part(train)} | ({} if valid is None else {"validation": as_part(valid)})
    parts = _parts(distiller.source, given)
    loader = Loader(parts["training"], batch=batch, seed=seed, workers=workers, keyed=True, shards="rows")
    valid_loader = None
    if valid is not None:
        valid_loader = Loader(parts["validation"], batch=batch, shuffle=False, keyed=True, shards="batches")

    with ExitStack() as stack:
        stack.callback(loader.close)
        stack.enter_context(threads_set(threads))
        stack.enter_context(_modes_restored(distiller))
        place.module(distiller)
        if batch_norm == "sync" and ranks.world() > 1:
            stack.enter_context(batch_norm_synced(distiller.student))
        kept = kept_in_eval(distiller.student)
        with ranks.together():
            first = _prepare(distiller, parts["training"], batch, place, seed)
            for name, part in parts.items():
                _try_last_batch(distiller, kept, part, batch, place, seed, name)
        maker = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
        stepper = maker([parameter for parameter in distiller.parameters() if parameter.requires_grad], lr=lr)
        steps = epochs * -(-len(loader) // accumulate)
        training = Training(
            distiller,
            _wrapped(distiller, first, place),
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
        begun = False
        if checkpoint is not None:
            settings = {
                "epochs": epochs,
                "batch": batch,
                "lr": lr,
                "schedule": schedule,
                "seed": seed,
                "device": place.device.type,
                "precision": precision,
                "layout": layout,
                "select": select,
                "patience": patience,
                "clip": clip,
                "accumulate": accumulate,
                "batch_norm": batch_norm,
                "optimizer": {"class": name_of(stepper), **stepper.defaults},
            }
            with ranks.together():
                saved = Checkpoints(Path(checkpoint), every, made_of(distiller, given, settings))
            begun = saved.open(training, resume=resume, force=force)
        with ranks.together():  # rank 0's folder may be one that it cannot write into
            tell = _listeners(stack, callbacks, progress, steps, folder, training)
        if distiller.source is not None and not begun:
            _judge_teacher(training, distiller.source, parts, batch, folder, bool(progress))
        if checkpoint is not None:
            training.between = partial(saved.between, training, stack.enter_context(heard()))
        training.run(tell)
        home.module(distiller)
        assert training.last is not None  # there was an epoch
        tell(Event("end", training.step, training.epoch - 1, training.last[0], distiller, {}))
    history = training.history
    if ranks.world() > 1:
        del training  # DDP's wrapper, in a reference cycle, has room for all gradients
        gc.collect()
    return history


def _parts(source: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Return the parts by name, with what the source adds to them."""
    return {name: source.dataset(part) for name, part in parts.items()} if hasattr(source, "dataset") else parts


def _prepare(distiller: Distiller, part: Any, batch: int, place: Place, seed: int) -> dict[str, Any]:
    """Have projectors made and everything checked on one batch, and return it."""
    with default_generators_keyed(place.device, seed, "step", "prepare"):
        first = next(Loader(part, batch=batch, shuffle=False, keyed=True, shards="rows").epoch(CLEAN))
        with place.autocast():
            tried = {**place.batch(first), "clock": lambda: (int(distiller.step), 0)}
            report = distiller.prepare(tried).check(tried)
    if report.fault is not None:
        raise report.fault
    if not report:
        samples = samples_of(first, part)
        raise TrainingError(f"The distiller does not pass its check on the first batch.\n{report}\n{samples}")
    return tried


def _wrapped(distiller: Distiller, batch: Batch, place: Place) -> nn.Module:
    """Return the distiller, or of several ranks DDP around it.

    Buffers are not DDP's business: they are brought level after each step, the banks of points by ``advance``.
    """
    if ranks.world() == 1:
        return distiller
    with place.autocast():
        wrapped = ddp(distiller, batch)
    wrapped.broadcast_buffers = False  # the argument of this name is deprecated, and its heir is new
    return wrapped


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
        shards: Literal["rows", "batches"] | None = "rows" if name == "training" else None
        rows = next(Loader(part, batch=rest, shuffle=False, keyed=True, shards=shards).epoch(CLEAN))
        try:
            place.forward(distiller, {**place.batch(rows), "clock": lambda: (int(distiller.step), 0)})
        except (KdlibError, ValueError) as error:
            several = f", a rank of it {len(rows['index'])}" if len(rows["index"]) < rest else ""
            raise TrainingError(
                f"With batch={batch} the last batch of the {name} part has {rest} of its {len(part)} rows{several}; "
                f"choose another size. The distiller cannot take it: {error}"
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
                history.difference = dict(ranks.once(source.difference, parts["training"]))
    difference = history.difference
    with ranks.together():
        if folder is not None:
            kept = {**history.teacher, "difference": difference} if difference else history.teacher
            write_json(Path(folder) / "teacher.json", kept)
    lines = [f"teacher on {name}: {described(right)}" for name, right in history.teacher.items()]
    if difference:
        told = (f"{name} {value if isinstance(value, int) else f'{value:.3g}'}" for name, value in difference.items())
        lines.append(f"teacher's shortcut: {', '.join(told)}")
    for line in lines if progress else ():
        get_console().print(line, highlight=False, soft_wrap=True)


def _teacher_accuracy(
    source: SoftLabelSource, parts: Mapping[str, Any], batch: int, place: Place, seed: int, progress: bool
) -> dict[str, Hits]:
    """Return how often the teacher is right on some rows of each part, without augmentation."""
    found = {}
    for name, part in parts.items():
        loader = Loader(part, batch=batch, seed=seed, keyed=True, shards="batches")
        mine = len(ranks.dealt(range(-(-JUDGED // batch))))
        batches = itertools.islice(loader.epoch(CLEAN), mine)
        counts: list[Hits] = []
        with ranks.together():
            for one in track(batches, f"teacher on {name}", mine) if progress else batches:
                moved = place.batch(one)
                with place.autocast():
                    counts.append(hits(source, source(moved), moved))
        total: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for of_batch in ranks.gathered(counts):
            total.update({key: right for key, (right, _) in of_batch.items()})
            rows.update({key: seen for key, (_, seen) in of_batch.items()})
        if rows:
            found[name] = {key: (total[key], rows[key]) for key in rows}
    return found


def _listeners(
    stack: ExitStack,
    callbacks: Sequence[Callback],
    progress: bool | str,
    steps: int,
    folder: Path | str | None,
    training: Training,
) -> Callback:
    """Return a function that tells an event to the callbacks, the bar and the logs."""
    listeners = [*callbacks]
    if progress:
        title = progress if isinstance(progress, str) else "training"
        listeners.append(stack.enter_context(progress_bar(steps, title)))
    if folder is not None:
        make_folder(Path(folder))
        listeners.append(csv_log(Path(folder), training.history.epochs))
        listeners.append(jsonl_log(Path(folder), training.step))

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


def _refuse_checkpoint(distiller: Distiller, path: Any, every: int | None, resume: bool, force: bool) -> None:
    if path is None:
        if every is not None or resume or force:
            raise TrainingError("every, resume and force are of a checkpoint, and none was named: checkpoint=PATH.")
        return
    if every is not None and every < 1:
        raise TrainingError(f"every is at least 1 step, not {every}.")
    if Path(path).suffix != ".safetensors":
        raise TrainingError(f"checkpoint={str(path)!r}: the name of a checkpoint ends in .safetensors.")
    lost = unsaved(distiller)
    if lost:
        raise TrainingError(
            f"No checkpoint can hold all that changes in this training: {'; '.join(lost)}. What changes must be a "
            "buffer or a parameter of a module."
        )


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


def _refuse_unknown(optimizer: Any, precision: Any, layout: Any, schedule: Any, select: Any, batch_norm: Any) -> None:
    for name, value, known in (
        ("optimizer", optimizer if isinstance(optimizer, str) else "adam", OPTIMIZERS),
        ("precision", precision, PRECISIONS),
        ("layout", layout, LAYOUTS),
        ("schedule", schedule, SCHEDULES),
        ("select", select or "best", ("best", "last")),
        ("batch_norm", batch_norm, BATCH_NORMS),
    ):
        if value not in known:
            raise TrainingError(f"{name}={value!r} is unknown.{did_you_mean(str(value), known)}")
