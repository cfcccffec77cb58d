"""Online label smoothing: the soft label of a class is the student's mean prediction for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kdlib.batch import borrowed, call
from kdlib.errors import BatchError
from kdlib.interfaces import Batch, Taps
from kdlib.ranks import gathered
from kdlib.sources.classes import class_numbers, classes_of


def class_means(sums: Tensor) -> Tensor:
    """Return the mean of each class, (K, K), from sums (K, K + 1) whose last column counts; uniform where it counts 0.

    Example:
        >>> import torch
        >>> class_means(torch.tensor([[1.5, 0.5, 2.0], [0.0, 0.0, 0.0]]))
        tensor([[0.7500, 0.2500],
                [0.5000, 0.5000]])
    """
    totals, counts = sums[:, :-1], sums[:, -1:]
    return torch.where(counts > 0, totals / counts.clamp(min=1), 1 / totals.shape[1])


class ClassMeans(nn.Module):
    """Soft labels that are the student's mean prediction for each class (online label smoothing, Zhang et al. 2021).

    The label of class k in epoch e is the mean of softmax(z) over the samples of class k that the student put into
    class k in epoch e - 1; uniform in the first epoch, and where no sample was right. The tap ``logits`` is its
    logarithm, so that its softmax at temperature 1 is that label. The paper's loss is
    ``Distiller(student, source, hard=(α, HardLabels()), soft=(1 - α, SoftLabels()))`` with α = 0.5.

    How the predictions are seen: a source has the student only in ``advance``. So this one remembers the last training
    batch and runs the student on it there, in eval mode, without gradient and with the weights after the step: one
    more forward of the student a step, and none of its statistics or of the random state is changed. The paper and
    the authors' code take the training forward before the step instead. Of accumulated batches only the last is seen.

    Needs ``y`` (class numbers (B,)) and ``epoch`` in the batch. In validation, where the epoch is -1, the labels are
    those of the training epoch just past. State: the means and the running sums, as buffers; it changes only in
    ``advance``, summed over ranks.

    Zhang et al. 2021: Delving deep into label smoothing, IEEE Transactions on Image Processing 30.

    Args:
        data: the training part, for the number of classes.
        classes: K, at least 2. Default: the data's.
        tap: the student's logits, (B, K).

    Raises:
        KdlibError: the number of classes is not known.
        BatchError: a label is no class, or labels are not one number a row.

    Example:
        >>> import torch
        >>> from kdlib.sources.class_means import ClassMeans
        >>> source = ClassMeans(None, classes=4)
        >>> source({"x": torch.zeros(1, 5), "y": torch.tensor([2]), "epoch": torch.tensor([0])})["logits"].exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    means: Tensor
    sums: Tensor
    epoch: Tensor

    def __init__(self, data: Any, *, classes: Annotated[int, Field(ge=2)] | None = None, tap: str = "logits") -> None:
        super().__init__()
        self.classes = classes_of(data, classes)
        self.tap = tap
        self.register_buffer("sums", torch.zeros(self.classes, self.classes + 1))
        self.register_buffer("means", class_means(self.sums))
        self.register_buffer("epoch", torch.full((), -1))
        self._last: Batch | None = None

    def forward(self, batch: Batch) -> Taps:
        """Return the soft label of each row's class as logits."""
        labels, epoch = self._numbers(batch), torch.as_tensor(batch["epoch"]).to(self.epoch.device)
        if self.training and not borrowed(batch):
            self._last = {name: batch[name] for name in ("x", "y", "epoch")}
        # The first batch of an epoch comes before the first advance in it: the sums are complete, not yet the means.
        begins = ((epoch >= 0) & (epoch != self.epoch)).expand(len(labels))
        rows = torch.where(begins[:, None], class_means(self.sums)[labels], self.means[labels])
        return {"logits": rows.clamp(min=torch.finfo(rows.dtype).tiny).log()}

    @torch.no_grad()
    def advance(self, student: nn.Module) -> None:
        """Take the student's predictions for the last training batch into the sums of its epoch."""
        own = [] if self._last is None else [self._counted(student, self._last)]
        self._last = None
        for epoch, new in gathered(own):
            if epoch != int(self.epoch):
                self.means.copy_(class_means(self.sums))
                self.sums.zero_()
                self.epoch.fill_(epoch)
            self.sums += new.to(self.sums.device)

    def _counted(self, student: nn.Module, batch: Batch) -> tuple[int, Tensor]:
        """Return a batch's epoch, and the sums of its right predictions by class."""
        labels = self._numbers(batch)
        predicted = _predictions(student, batch["x"])[self.tap].float().softmax(-1)
        if predicted.shape != (len(labels), self.classes):
            raise BatchError(
                f"the student's '{self.tap}' has shape {tuple(predicted.shape)}; "
                f"{len(labels)} labels of {self.classes} classes want {(len(labels), self.classes)}."
            )
        right = predicted.argmax(-1) == labels
        counted = torch.cat([predicted, predicted.new_ones(len(predicted), 1)], 1) * right[:, None]
        new = torch.zeros_like(self.sums).index_add_(0, labels, counted)
        return int(torch.as_tensor(batch["epoch"]).flatten()[0]), new

    def _numbers(self, batch: Batch) -> Tensor:
        labels: Tensor = batch["y"]
        if labels.is_floating_point() or labels.dim() != 1:
            raise BatchError(f"class means want one class number a row, (B,); 'y' has shape {tuple(labels.shape)}.")
        return class_numbers(labels, self.classes)


def _predictions(student: nn.Module, x: Any) -> Mapping[str, Tensor]:
    """Return the student's taps in eval mode, and leave every module's mode as it was."""
    modes = {part: part.training for part in student.modules()}
    student.eval()
    try:
        taps: Mapping[str, Tensor] = call(student, x)
    finally:
        for part, training in modes.items():
            part.training = training
    return taps
