"""Show a point one of several teachers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdlib.batch import NamedTaps
from kdlib.errors import TapError, did_you_mean
from kdlib.interfaces import Batch, DistillPoint, Taps


class _Of(nn.Module):
    """A module, so that a point with a projector keeps its parameters in the distiller."""

    def __init__(self, teacher: str, point: DistillPoint) -> None:
        super().__init__()
        self.teacher = teacher
        self.point = point

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        return self.point(student, self._taps(teacher), batch)

    def prepare(self, student: Taps, teacher: Taps, batch: Batch) -> None:
        if hasattr(self.point, "prepare"):
            self.point.prepare(student, self._taps(teacher), batch)

    def advance(self, student: nn.Module) -> None:
        if hasattr(self.point, "advance"):
            self.point.advance(student)

    def _taps(self, taps: Taps) -> NamedTaps:
        prefix = f"{self.teacher}."
        own = {name.removeprefix(prefix): tap for name, tap in taps.items() if name.startswith(prefix)}
        if not own:
            teachers = {name.partition(".")[0] for name in taps if "." in name}
            hint = did_you_mean(self.teacher, teachers)
            raise TapError(f"No teacher named '{self.teacher}' in the source's taps.{hint}")
        return NamedTaps(own, f"teacher '{self.teacher}'")


def of(teacher: str, point: DistillPoint) -> Any:
    """Return a point that sees the taps of one teacher of a source with several.

    Args:
        teacher: the name before the dot in the source's taps: ``"a"`` for ``a.logits``, ``a.embedding``.
        point: the point to show them to.

    Raises:
        TapError: the source gives no taps of that name.

    Example:
        >>> import torch, kdlib
        >>> point = kdlib.of("a", kdlib.SoftLabels())
        >>> z = torch.zeros(2, 10)
        >>> round(point({"logits": z}, {"a.logits": z, "b.logits": z}, {}).item(), 4)
        2.3026
    """
    return _Of(teacher, point)
