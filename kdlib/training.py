"""The training loop, over a state that is whole between two optimizer steps and can start at any batch."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from kdlib import ranks
from kdlib.batch import SHARE, borrowed, tensors_in
from kdlib.data import CLEAN, Loader
from kdlib.distiller import Distiller, Losses
from kdlib.errors import TrainingError
from kdlib.interfaces import Batch
from kdlib.keyed import default_generators_keyed
from kdlib.log import Callback, Event
from kdlib.place import Place
from kdlib.worth import Hits


@dataclass
class History:
    """What a training was: one record an epoch, and the epoch whose weights the student has now."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    """``epoch``, ``step``, ``lr``, ``seconds``, ``total`` and each term as means over the epoch's rows, on all ranks;
    with a validation part the same with ``valid_`` before the name. ``waiting`` is the share of the time of the epoch's
    steps in which they waited for data: what loading takes, or with workers what it takes longer than the steps do.
    ``seconds`` and ``waiting`` are this rank's."""
    best: int = -1
    """The epoch whose weights were kept."""
    teacher: dict[str, Hits] = field(default_factory=dict)
    """How often the teacher is right before the first step, (right, rows), of ``training`` and ``validation``,
    ``through the source`` and ``on the student's input alone``. Empty without a source."""
    difference: dict[str, float] = field(default_factory=dict)
    """What the source's ``difference`` says of the training part. Empty where it has none."""
    forced: list[str] = field(default_factory=list)
    """Where it went on from a checkpoint by force, a line for each difference from what it was made of before."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return int(self.epochs[-1]["step"]) if self.epochs else 0


@dataclass
class Means:
    """Means of the losses over rows, kept on the device until they are asked for."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, losses: Losses, rows: int) -> None:
        """Take in the losses of a batch."""
        for name, value in {**losses.terms, "total": losses.total.detach()}.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value * rows
            self.counts[name] = self.counts.get(name, 0) + rows

    def result(self) -> dict[str, float]:
        """Return the mean of each term."""
        return {name: float(value) / self.counts[name] for name, value in self.sums.items()}

    def of_all_ranks(self) -> Means:
        """Return the means over what all ranks took in."""
        whole = Means()
        for sums, counts in ranks.gathered([(self.sums, self.counts)]):
            for name, value in sums.items():
                whole.sums[name] = whole.sums.get(name, torch.zeros_like(value)) + value
                whole.counts[name] = whole.counts.get(name, 0) + counts[name]
        return whole


@dataclass
class Choice:
    """The epoch whose weights are kept: that of the lowest validation loss, or the last."""

    keep: bool
    patience: int | None
    best: int = -1
    lowest: float = math.inf
    weights: dict[str, Tensor] | None = None

    def see(self, epoch: int, loss: float | None, distiller: Distiller) -> None:
        """Note an epoch's validation loss."""
        if loss is not None and loss < self.lowest:
            self.lowest, self.best = loss, epoch
            if self.keep:
                self.weights = {name: value.detach().clone() for name, value in distiller.state_dict().items()}

    def out_of_patience(self, last: int) -> bool:
        """Return whether it is too long ago at the last epoch that it got better."""
        return self.patience is not None and last - self.best >= self.patience

    def take(self, distiller: Distiller, last: int) -> int:
        """Give the distiller the chosen weights, and return their epoch."""
        if self.weights is None:
            return last
        distiller.load_state_dict(self.weights)
        return self.best


@dataclass
class Training:
    """A training as it stands: what is trained, how, and how far it has come.

    Between two calls of ``take_step`` and ``end_epoch`` it is whole, and ``run`` goes on from there. It is then the
    same on all ranks, up to what a rank's processes have loaded ahead.
    """

    distiller: Distiller
    wrapped: nn.Module
    """What is called for the losses in training: the distiller, or the DDP around it."""
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    train: Loader
    valid: Loader | None
    place: Place
    choice: Choice
    epochs: int
    seed: int
    accumulate: int
    clip: float | None
    kept: Collection[nn.Module] = ()
    """Modules of the student that stay in eval mode (see :func:`kept_in_eval`)."""

    history: History = field(default_factory=History)
    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """The epoch at work."""
    batch: int = 0
    """Batches of it done."""
    means: Means = field(default_factory=Means)
    """Of the epoch at work so far."""
    seconds: float = 0.0
    """What the epoch at work has taken so far."""
    waited: float = 0.0
    """How much of it was waiting for data."""
    last: tuple[Losses, float] | None = None
    """The losses of the last batch, and the learning rate of its step."""
    between: Callable[[], None] = lambda: None
    """Called where it is whole: after each step and each epoch, and in a validation before each batch."""

    @property
    def over(self) -> bool:
        """Whether there is no step left to take."""
        return self.epoch >= self.epochs or self.choice.out_of_patience(self.epoch - 1)

    def run(self, tell: Callback) -> None:
        """Train to the end, and give the distiller the chosen weights."""
        while not self.over:
            to_train_mode(self.distiller, self.kept)
            batches = self.train.epoch(self.epoch, start=self.batch)
            while self.take_step(batches, tell):
                self.between()
            self.end_epoch(tell)
            self.between()
        self.history.best = self.choice.take(self.distiller, self.epoch - 1)

    def take_step(self, batches: Iterator[Batch], tell: Callback) -> bool:
        """Take one optimizer step on the next batches of the epoch, and return whether there were any."""
        started = time.perf_counter()
        with ranks.together():
            group = self._fetched(batches)
        if not group:
            return False
        self.waited += time.perf_counter() - started
        self.optimizer.zero_grad()
        where = f"step {self.step}, epoch {self.epoch}"
        unseen = any(map(borrowed, group))
        with self._keyed(self.step), _buffers_restored(self.distiller.student, on_error_only=not unseen):
            losses = self._gradients(group, where)
            self._clip(group, where)
        rate = float(self.optimizer.param_groups[0]["lr"])
        now = {"lr": rate, **self.distiller.in_force(self.epoch)}
        self.optimizer.step()
        ranks.level(self.distiller.student.buffers())  # before what follows the student, such as an average of it
        self.distiller.advance()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        self.batch += len(group)
        self.last = losses, rate
        tell(Event("step", self.step, self.epoch, losses, self.distiller, now))
        self.seconds += time.perf_counter() - started
        return True

    def end_epoch(self, tell: Callback) -> None:
        """Validate after the last step of an epoch, note the epoch, and go to the next."""
        assert self.last is not None
        losses, rate = self.last
        started = time.perf_counter()
        record = {"epoch": self.epoch, "step": self.step, "lr": rate, **self.means.result()}
        if self.valid is not None:
            record |= self._validate(self.valid)
        record["seconds"] = self.seconds + time.perf_counter() - started
        record["waiting"] = self.waited / self.seconds
        self.history.epochs.append(record)
        self.choice.see(self.epoch, record.get("valid_total"), self.distiller)
        tell(Event("epoch", self.step, self.epoch, losses, self.distiller, record))
        self.epoch, self.batch, self.means, self.seconds, self.waited = self.epoch + 1, 0, Means(), 0.0, 0.0

    def _keyed(self, *key: int | str) -> Any:
        own = [f"rank {ranks.rank()}"] if ranks.rank() else []
        return default_generators_keyed(self.place.device, self.seed, "step", *key, *own)

    def _fetched(self, batches: Iterator[Batch]) -> list[Batch]:
        """Return the batches of the next step. A data set that draws from torch's default generator is keyed too."""
        with self._keyed(f"data {self.step}"):
            return list(itertools.islice(batches, self.accumulate))

    def _gradients(self, group: list[Batch], where: str) -> Losses:
        """Add up the gradients of a group of batches, each by its share of the rows, and return the last losses."""
        rows = [self.train.rows(self.batch + place) for place in range(len(group))]
        for place, batch in enumerate(group):
            with _kept_back(self.wrapped) if place < len(group) - 1 else nullcontext():
                with ranks.together():
                    losses = self.place.forward(self.wrapped, self.place.batch(batch))
                    _refuse_infinite(losses, batch, self.train.dataset, where)
                torch.autograd.backward(losses.total * (batch[SHARE] * rows[place] / sum(rows)))
            losses = _over_ranks(losses, batch[SHARE])
            self.means.add(losses, rows[place])
        return losses

    def _clip(self, group: list[Batch], where: str) -> None:
        """Bound the gradient's norm, and refuse one that is not finite though the loss is."""
        parameters = [parameter for settings in self.optimizer.param_groups for parameter in settings["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if self.clip is None else self.clip)
        if not math.isfinite(norm.item()):
            samples = " ".join(samples_of(batch, self.train.dataset) for batch in group)
            raise TrainingError(
                f"The gradient is not finite at {where}, though the loss is; it has not changed the student. {samples}"
            )

    @torch.no_grad()
    def _validate(self, loader: Loader) -> dict[str, float]:
        """Return the mean losses over a part, in eval mode. Its epoch is CLEAN, so each time it is the same data."""
        self.distiller.eval()
        means = Means()
        clock = (int(self.distiller.step), self.epoch)
        with self._keyed("validate"):
            batches = loader.epoch(CLEAN)
            for _ in range(ranks.highest(len(loader))):  # a rank may have one batch less than the others
                self.between()
                with ranks.together():
                    batch = next(batches, None)
                    if batch is None:
                        continue
                    losses = self.place.forward(self.distiller, {**self.place.batch(batch), "clock": lambda: clock})
                    _refuse_infinite(losses, batch, loader.dataset, f"the validation after epoch {self.epoch}")
                    means.add(losses, len(batch["index"]))
        return {f"valid_{name}": value for name, value in means.of_all_ranks().result().items()}


def kept_in_eval(student: nn.Module) -> list[nn.Module]:
    """Return the modules of a student that its user froze, and that a training leaves in eval mode.

    These are the modules in eval mode where a layer is in train mode, for then somebody chose (a network that is in
    eval mode as a whole was only looked at); and each batch norm whose own parameters are all frozen.
    """
    modules = list(student.modules())
    chosen = any(module.training for module in modules if next(module.children(), None) is None)
    return [module for module in modules if (chosen and not module.training) or _frozen_norm(module)]


def _frozen_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False)) if isinstance(module, _NormBase) else []
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def to_train_mode(distiller: Distiller, kept: Collection[nn.Module]) -> None:
    """Put a distiller into train mode, but for some modules."""
    distiller.train()
    for module in kept:
        module.training = False  # eval() would take those inside along


def samples_of(batch: Batch, dataset: Any) -> str:
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


def _over_ranks(losses: Losses, share: float) -> Losses:
    """Return the means over the rows of all ranks, without gradient."""
    total, terms = losses.total.detach(), losses.terms
    if ranks.world() > 1:
        means = torch.stack([total, *terms.values()]).double() * (share / ranks.world())
        ranks.summed([means])
        total, *rest = means.to(total.dtype)
        terms = dict(zip(terms, rest, strict=True))
    return Losses(total, terms)


def _kept_back(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which gradients are added up and not yet sent to other ranks."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()


def _refuse_infinite(losses: Losses, batch: Batch, dataset: Any, where: str) -> None:
    if math.isfinite(losses.total.item()):
        return
    terms = ", ".join(f"{name} {value.item():g}" for name, value in losses.terms.items())
    raise TrainingError(
        f"The loss is not finite at {where} ({terms}); it has not changed the student. {samples_of(batch, dataset)}"
    )


@contextmanager
def _buffers_restored(module: nn.Module, *, on_error_only: bool) -> Iterator[None]:
    """Keep a batch out of running statistics, which change in the forward: one that is not finite, or is borrowed."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    restored = not on_error_only
    try:
        yield
    except BaseException:
        restored = True
        raise
    finally:
        if restored:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
