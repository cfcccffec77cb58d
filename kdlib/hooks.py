"""The hooks that a plugin may implement. Each returns ``{name: class or function}`` and takes no arguments.

None of them is called inside a training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("kdlib")
hookimpl = pluggy.HookimplMarker("kdlib")
"""Marks a function of a plugin module as the implementation of the hook of the same name."""

Builders = Mapping[str, Callable[..., Any]]


@hookspec
def kdlib_models() -> Builders:  # type: ignore[empty-body]
    """Return models: modules that return taps. ``classes``, ``channels`` and ``rate`` are filled from the data."""


@hookspec
def kdlib_datasets() -> Builders:  # type: ignore[empty-body]
    """Return data sets: each builds one ``DataParts``, or a mapping from fold to ``DataParts``."""


@hookspec
def kdlib_features() -> Builders:  # type: ignore[empty-body]
    """Return features: modules from samples to what a network eats."""


@hookspec
def kdlib_sources() -> Builders:  # type: ignore[empty-body]
    """Return soft-label sources: what the teacher sees for a batch."""


@hookspec
def kdlib_points() -> Builders:  # type: ignore[empty-body]
    """Return distillation points: where student and teacher are compared, and how."""


@hookspec
def kdlib_scorers() -> Builders:  # type: ignore[empty-body]
    """Return scorers: classifiers trained on the embeddings of a finished network."""


HOOKS = {
    "model": "kdlib_models",
    "dataset": "kdlib_datasets",
    "features": "kdlib_features",
    "source": "kdlib_sources",
    "point": "kdlib_points",
    "scorer": "kdlib_scorers",
}
"""What a plugin can be, and the hook that brings it in."""
