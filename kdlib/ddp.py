"""DistributedDataParallel around a distiller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kdlib import ranks
from kdlib.distiller import Distiller, untouched
from kdlib.errors import TrainingError
from kdlib.interfaces import Batch
from kdlib.taps import teachers_in

HOOKS = [f"_forward{kind}" for kind in ("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_pre_hooks")]
"""Where torch keeps a module's forward hooks, by which it is tapped."""


def ddp(distiller: Distiller, batch: Batch, *, static_graph: bool = False, **settings: Any) -> DistributedDataParallel:
    """Wrap a distiller for training in several processes: gradients are the mean over the ranks.

    Around the distiller, not around the student: DDP has to see the loss to know which parameters it reaches, and
    projectors are to be averaged as well. The distiller is prepared (:meth:`kdlib.Distiller.prepare`), and one dry
    backward finds whether there are parameters that no point reaches, which DDP must be told
    (``find_unused_parameters``). It is told so, too, where a weight is a schedule, for a point whose weight becomes 0
    reaches nothing. Buffers, gradients, modes and random state stay as they were.

    Make the optimizer from ``distiller.parameters()`` afterwards, call the wrapper for the losses, and
    ``distiller.advance()`` after each step. DDP's mean over ranks is the gradient of the mean over all rows where each
    rank's loss is multiplied by world · its rows / all rows, which :class:`kdlib.Loader` calls ``share`` in the batches
    of ``shards="rows"``. :func:`kdlib.fit` does all this by itself.

    Drop the wrapper, with what else refers to it, and call ``gc.collect()`` before ``destroy_process_group()``: it sits
    in a reference cycle, and gloo may abort a process that ends with it.

    Args:
        distiller: on the device it is to be trained on.
        batch: one batch, as in training; each rank may have its own.
        static_graph: refused; see below.
        settings: others of :class:`torch.nn.parallel.DistributedDataParallel`.

    Raises:
        TrainingError: there is no process group; or ``static_graph``, under which ranks part without an error where
            the loss leaves a layer out.

    Example:
        >>> import gc, torch, kdlib
        >>> distiller = kdlib.Distiller(kdlib.Tapped(torch.nn.Linear(4, 3), logits=""), hard=kdlib.HardLabels())
        >>> batch = {"x": torch.zeros(2, 4), "y": torch.tensor([0, 1])}
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> kdlib.ddp(distiller, batch)(batch).total.backward()
        >>> collected = gc.collect()
        >>> torch.distributed.destroy_process_group()
    """
    if static_graph:
        raise TrainingError(
            "static_graph is refused: where points leave a layer out (a loss on a hidden layer alone), or a schedule "
            "lets one begin later, DDP then averages nothing for it, and the ranks part without an error."
        )
    if not ranks.grouped():
        raise TrainingError(
            "There is no process group: call torch.distributed.init_process_group() first, in a program that torchrun "
            "starts; or let `torchrun -m kdlib run` do all of it."
        )
    with ranks.together():
        leaves_out = _leaves_out(distiller.prepare(batch), batch)
    settings.setdefault("find_unused_parameters", any(ranks.gathered([leaves_out])))
    return DistributedDataParallel(distiller, **settings)


def _leaves_out(distiller: Distiller, batch: Batch) -> bool:
    """Return whether some parameters get no gradient, now or, as schedules have it, later."""
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    with untouched(distiller, *(teacher.model for teacher in teachers_in(distiller.source))):
        distiller.train()
        reached = torch.autograd.grad(distiller(batch).total, trained, allow_unused=True)
    scheduled = any(callable(weight) for weight in distiller.weights.values())
    return scheduled or any(gradient is None for gradient in reached)


@contextmanager
def batch_norm_synced(module: nn.Module) -> Iterator[None]:
    """Have a module's batch norms be SyncBatchNorms for a while, of the same parameters, buffers and hooks."""
    swapped = []
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                synced = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
                for hooks in HOOKS:
                    setattr(synced, hooks, getattr(child, hooks))
                setattr(parent, name, synced)
                swapped.append((parent, name, child, synced))
    try:
        yield
    finally:
        for parent, name, child, synced in swapped:
            child._buffers.update(synced._buffers)  # they may have come to another device
            setattr(parent, name, child)
