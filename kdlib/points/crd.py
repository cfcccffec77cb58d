"""Contrastive representation distillation: tell an item's own pair of embeddings from pairs with other classes."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdlib.batch import borrowed
from kdlib.errors import BatchError, KdlibError
from kdlib.interfaces import Batch, DataPart, Taps
from kdlib.keyed import keyed
from kdlib.points.pairs import relation_rows, unit_rows
from kdlib.points.reduction import full_precision, one_of
from kdlib.ranks import gathered

Seen = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of one batch: the items' numbers, the student's and the teacher's embeddings, log Z of both."""
EPS = 1e-7
"""Added to the noise of the denominator, as in the authors' code."""


def crd_loss(scores: Tensor, *, size: int, log_z: Tensor | float = 0.0, eps: float = 0.0) -> Tensor:
    """Return the contrastive loss of one positive and N negatives a row, averaged over the rows.

    With P = exp(score) / Z and the noise c = N / M: -log(P / (P + c + eps)) of the positive and -log(c / (P + c + eps))
    of each negative (Tian et al. 2020, eq. 18).

    Args:
        scores: (B, 1 + N), similarities over the temperature, the positive first.
        size: M, the number of training items.
        log_z: the logarithm of Z.
        eps: 0 in the paper.

    Example:
        >>> import torch
        >>> round(crd_loss(torch.zeros(1, 3), size=2).item(), 4)  # P = c = 1: 3 log 2
        2.0794
    """
    noise = (scores.shape[1] - 1) / size
    scores = scores - log_z
    positive, negatives = scores[:, 0], scores[:, 1:]
    if eps > 0:
        negatives = torch.logaddexp(negatives, negatives.new_tensor(math.log(eps)))
    of_positive = F.logsigmoid(positive - math.log(noise + eps))
    of_negatives = F.logsigmoid(math.log(noise) - negatives)
    return -(of_positive + of_negatives.sum(-1)).mean()


def keyed_negatives(labels: Tensor, own: Tensor, index: Tensor, epoch: Tensor, *, count: int, seed: int) -> Tensor:
    """Return the numbers of training items of other classes, (B, count), as a function of (seed, epoch, index).

    They differ where there are as many; else they are drawn with replacement.

    Args:
        labels: the class of each training item, (M,).
        own: the class of each row, (B,).
        index: the number of each row, (B,).
        epoch: the epoch of each row, (B,).
        count: N, negatives a row.
        seed: keys the draws.

    Example:
        >>> import torch
        >>> labels, zero = torch.tensor([0, 0, 1, 1]), torch.tensor([0])
        >>> keyed_negatives(labels, zero, zero, zero, count=2, seed=0).sort().values.tolist()
        [[2, 3]]
    """
    others = {label: (labels != label).nonzero().flatten() for label in set(own.tolist())}
    rows = []
    for label, item, when in zip(own.tolist(), index.tolist(), epoch.tolist(), strict=True):
        known, generator = others[label], keyed(seed, "crd", when, item)
        if count > len(known):
            rows.append(known[torch.randint(len(known), (count,), generator=generator)])
        else:
            rows.append(known[torch.randperm(len(known), generator=generator)[:count]])
    return torch.stack(rows)


class Crd(nn.Module):
    """Contrastive representation distillation (CRD, Tian et al. 2020, eq. 18), with two memory banks.

    Linear heads bring student and teacher to one width and to length 1. The critic h(t, s) = e / (e + N / M), e =
    exp(t · s / τ), is to say of a pair whether both embeddings are of the same item: -log h of the pair of the row
    itself, -log(1 - h) of N pairs with items of other classes, summed. Student embeddings meet the teacher's bank and
    teacher embeddings the student's; the two losses are added, and averaged over the batch.

    τ divides both sides and there is no factor τ². The teacher's tap and the banks are detached; both heads are
    trained. A batch of 1 will do. Taps of any shape are flattened row by row.

    Needs ``index`` and ``epoch`` in the batch. Negatives are a function of (seed, epoch, index). ``prepare`` makes the
    heads. The forward changes no bank: it keeps the embeddings of the rows it saw in train mode, and ``advance``, after
    the optimizer's step, moves their bank rows, bank ← unit(momentum · bank + (1 - momentum) · embedding), over all
    ranks. In eval mode the rows are taken for other items than the training part's: the positive is the row's own pair,
    ``y`` in the batch gives its class, and nothing is kept.

    Args:
        data: the training part: its length M and its ``labels``.
        width: dimensions of the common space, at least 1.
        negatives: N, at least 1. The authors have 16384 of the 50000 images of CIFAR-100; with fewer items of other
            classes than N they are drawn with replacement.
        temperature: τ, above 0.
        momentum: the share of a bank row that stays, from 0 to below 1.
        seed: keys the negatives and what the banks hold at first.
        variant: the authors' ``code`` divides exp(t · s / τ) by a constant Z, M times its mean in the first step, takes
            the positive from the bank as well, and adds 1e-7 to N / M. The ``paper`` has none of the three.
        tap: the student's tap.
        teacher_tap: the teacher's tap. Default: as ``tap``.

    Raises:
        KdlibError: the data has fewer than 2 classes, or the point was not prepared.
        BatchError: ``index`` or ``epoch`` do not go with the rows or with the data.

    Example:
        >>> import torch, kdlib
        >>> point = Crd(kdlib.TensorPart(torch.zeros(6, 4), [0, 1, 2, 0, 1, 2]), negatives=4, width=8)
        >>> student, teacher = {"embedding": torch.randn(2, 16)}, {"embedding": torch.randn(2, 32)}
        >>> batch = {"index": torch.tensor([3, 1]), "epoch": torch.tensor([0, 0])}
        >>> point.prepare(student, teacher, batch)
        >>> point(student, teacher, batch).backward()
        >>> before = point.students.clone()
        >>> point.advance(torch.nn.Identity())
        >>> (point.students != before).any(1).tolist()
        [False, True, False, True, False, False]
    """

    students: Tensor
    """Bank of the student's embeddings, (M, width)."""
    teachers: Tensor
    """Bank of the teacher's embeddings, (M, width)."""
    log_z: Tensor
    """Logarithms of Z for the student's and the teacher's anchors, (2,); -inf before the first step."""
    kept: Tensor
    """How many batches since the last step are to go into the banks."""

    def __init__(
        self,
        data: DataPart,
        *,
        width: Annotated[int, Field(ge=1)] = 128,
        negatives: Annotated[int, Field(ge=1)] = 16384,
        temperature: Annotated[float, Field(gt=0)] = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        seed: Annotated[int, Field(ge=0)] = 0,
        variant: Literal["paper", "code"] = "code",
        tap: str = "embedding",
        teacher_tap: str | None = None,
    ) -> None:
        super().__init__()
        one_of("variant", variant, ("paper", "code"))
        self.width = width
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.seed = seed
        self.variant = variant
        self.tap = tap
        self.teacher_tap = tap if teacher_tap is None else teacher_tap
        self.labels = torch.as_tensor(data.labels).long()  # on the host, where index and epoch are
        if len(set(self.labels.tolist())) < 2:
            raise KdlibError("CRD takes negatives from other classes; the training part has fewer than 2 classes.")
        self.heads = nn.ModuleDict()
        reach = math.sqrt(3 / width)  # uniform within it: rows of length 1 in the mean
        for bank in ("students", "teachers"):
            drawn = torch.rand(len(data), width, generator=keyed(seed, "crd", bank))
            self.register_buffer(bank, (2 * drawn - 1) * reach)
        self.register_buffer("log_z", torch.full((2,), -math.inf))
        # Beside `_seen`, which it counts, so that who gives the buffers back (Distiller.check) undoes a forward.
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64), persistent=False)
        self._seen: list[Seen] = []

    def prepare(self, student: Taps, teacher: Taps, batch: Batch) -> None:
        """Make the heads by the widths of the taps. A second call does nothing."""
        if len(self.heads):
            return
        sides = relation_rows(student[self.tap], teacher[self.teacher_tap])
        for side, rows in zip(("student", "teacher"), sides, strict=True):
            self.heads[side] = nn.Linear(rows.shape[1], self.width, device=rows.device, dtype=self.students.dtype)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        if not len(self.heads):
            raise KdlibError("CRD has no heads yet: call distiller.prepare(batch) before the optimizer is made.")
        ours, theirs = relation_rows(student[self.tap], teacher[self.teacher_tap])
        index, epoch = self._keys(batch, len(ours))
        own = self.labels[index] if self.training else batch["y"].cpu()
        negatives = keyed_negatives(self.labels, own, index, epoch, count=self.negatives, seed=self.seed)
        negatives = negatives.to(ours.device)
        with full_precision(ours):
            anchor_s = unit_rows(self.heads["student"](ours.to(self.students.dtype)))
            anchor_t = unit_rows(self.heads["teacher"](theirs.to(self.students.dtype)))
            from_bank = self.variant == "code" and self.training
            scores = []
            for anchor, pair, bank in ((anchor_s, anchor_t, self.teachers), (anchor_t, anchor_s, self.students)):
                positive = (anchor * (bank[index.to(bank.device)] if from_bank else pair)).sum(-1, keepdim=True)
                # All M products and then a choice: less to hold than B times N rows of the bank.
                scores.append(torch.cat([positive, (anchor @ bank.mT).gather(1, negatives)], 1) / self.temperature)
            log_z = torch.stack([self._log_z(one) for one in scores])
            if not borrowed(batch):
                self._keep(index, anchor_s, anchor_t, log_z)
            scale = log_z.where(self.log_z.isinf(), self.log_z)
            constants = [{"log_z": z, "eps": EPS} if self.variant == "code" else {} for z in scale]
            of_student, of_teacher = (
                crd_loss(one, size=len(self.labels), **more) for one, more in zip(scores, constants, strict=True)
            )
            return of_student + of_teacher

    @torch.no_grad()
    def advance(self, student: nn.Module) -> None:
        """Bring what was seen since the last step into the banks. Called after each optimizer step, on every rank."""
        seen = self._seen[: int(self.kept)]
        self._seen = []
        self.kept.zero_()
        seen = gathered(seen)
        if not seen:
            return
        index, ours, theirs = (
            torch.cat(column).to(self.students.device) for column in list(zip(*seen, strict=True))[:3]
        )
        newest = {item: place for place, item in enumerate(index.tolist())}  # an item may have been seen twice
        items, places = (torch.tensor(list(numbers), device=index.device) for numbers in (newest, newest.values()))
        for bank, rows in ((self.students, ours), (self.teachers, theirs)):
            bank[items] = unit_rows(self.momentum * bank[items] + (1 - self.momentum) * rows[places])
        log_z = torch.stack([one[3].to(index.device) for one in seen]).mean(0)
        self.log_z.copy_(log_z.where(self.log_z.isinf(), self.log_z))

    def _keys(self, batch: Batch, rows: int) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(batch["index"]).cpu()
        epoch = torch.as_tensor(batch["epoch"]).cpu().expand(index.shape)
        if index.shape != (rows,):
            raise BatchError(f"the batch's index has shape {tuple(index.shape)}, the taps {rows} rows.")
        if self.training and not 0 <= int(index.min()) <= int(index.max()) < len(self.labels):
            raise BatchError(
                f"the batch's index goes from {int(index.min())} to {int(index.max())}, the data that CRD was made "
                f"with from 0 to {len(self.labels) - 1}: make it with the part that is trained on."
            )
        return index, epoch

    def _log_z(self, scores: Tensor) -> Tensor:
        """Return the logarithm of M times the mean of exp(score)."""
        return scores.detach().logsumexp((0, 1)) - math.log(scores.numel() / len(self.labels))

    def _keep(self, index: Tensor, anchor_s: Tensor, anchor_t: Tensor, log_z: Tensor) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        del self._seen[int(self.kept) :]
        self._seen.append((index, anchor_s.detach(), anchor_t.detach(), log_z))
        self.kept += 1
        while sum(len(one[0]) for one in self._seen[1:]) >= len(self.labels):  # nobody calls advance
            del self._seen[0]
            self.kept -= 1
