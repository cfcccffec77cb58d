"""Several teachers, mixed by an explicit rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdlib.errors import KdlibError, TapError, did_you_mean
from kdlib.interfaces import Batch, DataPart, SoftLabelSource, Taps
from kdlib.sources.parts import view_of, wrapped_for
from kdlib.sources.several import advance_all, states_of


def mixed_logits(
    logits: Sequence[Tensor], weights: Sequence[float], *, mix: Literal["probabilities", "logits"], dim: int = -1
) -> Tensor:
    """Return one tensor of logits for several, with weights scaled to sum 1.

    ``probabilities``: log Σ_k w_k softmax(z_k), whose softmax is the mean distribution. ``logits``: Σ_k w_k z_k.

    Example:
        >>> import torch
        >>> sure, unsure = torch.tensor([100.0, 0.0]), torch.tensor([0.0, 0.0])
        >>> mixed_logits([sure, unsure], [1, 1], mix="probabilities").softmax(-1)
        tensor([0.7500, 0.2500])
    """
    wide = [one.float() if one.element_size() < 4 else one for one in logits]
    total = sum(weights)
    if mix == "logits":
        return torch.stack([weight / total * one for one, weight in zip(wide, weights, strict=True)]).sum(0)
    parts = [F.log_softmax(one, dim) + math.log(w / total) for one, w in zip(wide, weights, strict=True) if w > 0]
    return torch.stack(parts).logsumexp(0)


class Ensemble(nn.Module):
    """Several sources as one, their logits mixed by a rule that is written down.

    ``probabilities``: the tap ``logits`` is log Σ_k w_k softmax(z_k) at temperature 1, the arithmetic mean of the
    distributions (Hinton et al. 2015, section 1). A point's temperature T then softens the mean, to p^(1/T) scaled to
    sum 1; that is not the mean of the softened distributions. ``logits``: Σ_k w_k z_k, the geometric mean of the
    distributions at every temperature. ``losses``: no mixture; each teacher has points of its own, by
    ``kdlib.of("name", point)`` or the recipe key ``teacher``, whose weights mix the losses.

    In every case each source's taps are there too, as ``name.logits``, ``name.embedding``. The teachers may differ in
    all of them but the number of classes; class order is the matter of :meth:`kdlib.Frozen.aligned`. Taps carry no
    gradient. Where several sources add something to the items of a data part, it stands under ``name.key``, and a
    part's items are loaded once more for each of them. Sources that change during training are saved with this one.

    Args:
        sources: the sources by name; a name has no dot.
        mix: ``probabilities``, ``logits`` or ``losses``.
        weights: the weight of each, 0 or more, by name; 1 where none is given. They are scaled to sum 1.
        dim: the axis of the classes.

    Raises:
        KdlibError: a weight for a source that is not there, below 0, or none above 0.
        TapError: a source has no logits, or the numbers of classes differ.

    Example:
        >>> import torch, kdlib
        >>> from kdlib.sources.ensemble import Ensemble
        >>> one, other = lambda batch: {"logits": batch["x"]}, lambda batch: {"logits": 3 * batch["x"]}
        >>> taps = Ensemble({"a": one, "b": other}, mix="logits")({"x": torch.ones(1, 2)})
        >>> taps["logits"].tolist(), sorted(taps)
        ([[2.0, 2.0]], ['a.logits', 'b.logits', 'logits'])
    """

    def __init__(
        self,
        sources: Mapping[str, SoftLabelSource],
        *,
        mix: Literal["probabilities", "logits", "losses"] = "probabilities",
        weights: dict[str, Annotated[float, Field(ge=0)]] | None = None,
        dim: int = -1,
    ) -> None:
        super().__init__()
        if mix not in ("probabilities", "logits", "losses"):
            raise KdlibError(f"mix={mix!r} is probabilities, logits or losses.")
        self.sources = dict(sources)  # a plain dictionary: sources that are no modules stand beside those that are
        self.states = states_of(self.sources)
        self.mix = mix
        self.weights = weights or {}
        self.dim = dim
        for name, weight in self.weights.items():
            if name not in self.sources:
                raise KdlibError(f"weights: there is no source '{name}'.{did_you_mean(name, self.sources)}")
            if not 0 <= weight < math.inf:
                raise KdlibError(f"weights: '{name}' is a number from 0 up, not {weight}.")
        self._shares = [self.weights.get(name, 1.0) for name in self.sources]
        if not any(self._shares):
            raise KdlibError("weights: all are 0.")

    @torch.no_grad()
    def forward(self, batch: Batch) -> Taps:
        """Return the taps of all sources by ``name.tap``, and the mixture as ``logits``."""
        each = {name: source(view_of(batch, name)) for name, source in self.sources.items()}
        taps = {f"{name}.{tap}": value for name, own in each.items() for tap, value in own.items()}
        if self.mix != "losses":
            taps["logits"] = mixed_logits(self._logits(each), self._shares, mix=self.mix, dim=self.dim)
        return taps

    def dataset(self, part: DataPart) -> DataPart:
        """Return the part with what each of the sources wants of it."""
        return wrapped_for(self.sources, part)

    def advance(self, student: nn.Module) -> None:
        """Advance the sources that have a state."""
        advance_all(self.sources, student)

    def _logits(self, each: Mapping[str, Taps]) -> list[Tensor]:
        lacking = [name for name, taps in each.items() if "logits" not in taps]
        if lacking:
            raise TapError(
                f"'{lacking[0]}' gives {', '.join(each[lacking[0]])} and no logits; mix='losses' needs none."
            )
        sizes = {name: taps["logits"].shape[self.dim] for name, taps in each.items()}
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"'{name}' has {size}" for name, size in sizes.items())
            raise TapError(f"the teachers differ in the number of classes: {said}.")
        return [taps["logits"] for taps in each.values()]
