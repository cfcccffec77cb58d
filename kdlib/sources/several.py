"""What sources have in common that are made of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdlib.errors import KdlibError, TapError


def states_of(sources: Mapping[str, Any]) -> nn.Module:
    """Return a module that holds those sources that are modules, by name: their state is saved with it.

    Raises:
        KdlibError: there is no source, or one has a dot in its name or cannot be called.
        TapError: one has parameters, which an optimizer would train.
    """
    if not sources:
        raise KdlibError("A source of several sources needs at least one.")
    states = nn.Module()
    for name, source in sources.items():
        if not name or "." in name:
            raise KdlibError(f"A source cannot be named '{name}': the name stands before a dot, as in '{name}.logits'.")
        if not callable(source):
            raise KdlibError(f"Source '{name}' is a {type(source).__name__}; a source is source(batch) -> taps.")
        if isinstance(source, nn.Module):
            if next(source.parameters(), None) is not None:
                raise TapError(
                    f"Source '{name}' ({type(source).__name__}) has parameters, which would be trained. A source holds "
                    "a frozen teacher: kdlib.SameInput(kdlib.freeze(model))."
                )
            states._modules[name] = source  # not add_module, which refuses names such as "train"
    return states


def advance_all(sources: Mapping[str, Any], student: nn.Module) -> None:
    """Advance the sources that have a state."""
    for source in sources.values():
        if hasattr(source, "advance"):
            source.advance(student)
