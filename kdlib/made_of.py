"""What a training is made of, as plain data: one that goes on must be made of the same."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from kdlib import ranks
from kdlib.distiller import Distiller
from kdlib.errors import DataError
from kdlib.fingerprints import digest, items_of, name_of, network_of, source_of, state_of
from kdlib.schedules import Between
from kdlib.store import differences, listed
from kdlib.taps import Frozen, teachers_in
from kdlib.versions import versions

LONG = 100
"""Values of a list that are kept as they are; of a longer one a hash is."""
DEPTH = 4


def made_of(distiller: Distiller, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the bits of a training depend on, as plain data.

    Args:
        distiller: prepared, so that its projectors are there.
        parts: the data by name, before a source adds to it.
        settings: those of the training.
    """
    found = {
        "settings": dict(settings),
        "student": _network(distiller.student),
        "frozen": [name for name, parameter in distiller.named_parameters() if not parameter.requires_grad],
        "points": {
            name: {"weight": _described(distiller.weights[name]), **_described(point)}
            for name, point in distiller.points.items()
        },
        "source": _described(distiller.source),
        "teachers": [teacher.made_of() for teacher in teachers_in(distiller.source)],
        "data": {name: data_made_of(part, name) for name, part in parts.items()},
        **surroundings(),
    }
    return {name: plain(value) for name, value in found.items()}


def surroundings() -> dict[str, Any]:
    """Return what bits depend on beside the training itself: processes, threads and versions."""
    return {
        "world": ranks.launched()[1],
        "threads": torch.get_num_threads(),
        "versions": versions("kdlib-asc", "torch", "numpy"),
    }


def data_made_of(part: Any, title: str) -> dict[str, Any]:
    """Return what is known of the data of a part: all that it tells, and the values of a plain data set of tensors."""
    items, tensors = None, getattr(getattr(part, "dataset", None), "tensors", None)
    if hasattr(part, "fingerprint"):
        items = items_of(part, title)
    elif tensors is not None:
        items = state_of({str(number): tensor for number, tensor in enumerate(tensors)})
    try:
        made_by = plain(getattr(part, "made_by", None))
    except DataError:  # features that do not keep their settings
        made_by = None
    labels, classes, ids = (getattr(part, name, None) for name in ("labels", "classes", "ids"))
    return {
        "rows": len(part),
        "items": items,
        "ids": None if ids is None else _hash(map(str, ids)),
        "labels": None if labels is None else digest([np.asarray(labels, dtype=np.int64).tobytes()]),
        "classes": None if classes is None else [str(name) for name in classes],
        "made_by": made_by,
    }


def refusal(there: Any, here: Any) -> tuple[list[str], str]:
    """Return a line for each difference, both sides in it, and all of them as a message's end."""
    lines = differences(plain(there), plain(here))
    return lines, (
        f"{listed(lines)}\nThe result would be that of neither. Take it up as it was, or force it (force=True, "
        "--force), which is then recorded."
    )


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back, what JSON cannot say as text."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def _network(network: nn.Module) -> dict[str, Any]:
    state = [[name, str(value.dtype), list(value.shape)] for name, value in network.state_dict().items()]
    return {**network_of(network), "state": digest([json.dumps(state).encode()])}


def _described(value: Any, depth: int = DEPTH) -> Any:
    """Return an object's class and its plain attributes, and those of what it calls: points and sources inside it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _described(item, depth - 1) for key, item in value.items()} if depth else None
    if isinstance(value, list | tuple):
        if len(value) > LONG:
            return _hash(map(repr, value))
        return [_described(item, depth - 1) for item in value] if depth else None
    if isinstance(value, np.ndarray):
        return digest([str((value.dtype, value.shape)).encode(), np.ascontiguousarray(value).tobytes()])
    if isinstance(value, Frozen | Tensor):  # named apart
        return None
    if inspect.isroutine(value):
        return {"function": getattr(value, "__qualname__", repr(type(value)))}
    about = {"class": name_of(value)}
    if depth and (callable(value) or isinstance(value, Between)):
        attributes = getattr(value, "__dict__", {})  # a ufunc and an itemgetter have none
        own = {name: item for name, item in attributes.items() if name[0] != "_" and name != "training"}
        about |= {"source": source_of(type(value)), **{name: _described(item, depth - 1) for name, item in own.items()}}
    return about


def _hash(texts: Iterable[str]) -> str:
    return digest(json.dumps(text).encode() for text in texts)
