"""What things are made of, as JSON and hashes: data, settings, weights. By it a cache or a store knows them again."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.errors import DataError
from kdlib.interfaces import DataPart
from kdlib.progress import track
from kdlib.settings import LIVE


def digest(pieces: Iterable[bytes]) -> str:
    """Return the sha256 of bytes in their order."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def source_of(made: Any) -> str:
    """Return the sha256 of the file that a class or function is written in; '' without one, as in a notebook."""
    try:
        path = inspect.getsourcefile(made)
        return "" if path is None else digest([Path(path).read_bytes()])
    except (OSError, TypeError):
        return ""


def name_of(made: Any) -> str:
    """Return the full name of an object's class."""
    return f"{type(made).__module__}.{type(made).__qualname__}"


def state_of(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state dict: names, types, shapes and bits."""
    return digest(piece for name in sorted(state) for piece in _bytes(name, state[name]))


def network_of(model: nn.Module) -> dict[str, str]:
    """Return what a network does with its weights: the class, and hashes of the code and settings of all its modules.

    Settings are a module's attributes that are plain data. Torch's own modules have no code here: torch's version
    stands for it.
    """
    settings = [
        [path, name, value]
        for path, module in model.named_modules()
        for name, value in sorted(vars(module).items())
        if name[0] != "_" and name != "training" and _is_plain(value)
    ]
    own = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    return {
        "class": name_of(model),
        "source": digest(sorted(source_of(kind).encode() for kind in own)),
        "structure": digest([repr(model).encode(), json.dumps(settings).encode()]),
    }


def items_of(part: Any, title: str) -> str:
    """Return the sha256 of the ids and contents of a part with a method ``fingerprint(index)``, in their order.

    The title stands beside the progress bar.
    """
    lines = track(enumerate(part.ids), f"{title}: fingerprints", total=len(part))
    return digest(json.dumps([id, part.fingerprint(index)]).encode() for index, id in lines)


def data_of(part: DataPart, title: str) -> dict[str, Any]:
    """Return what a part is made of, in every epoch.

    Raises:
        DataError: its items are not known, or not how they change from epoch to epoch.
    """
    inner = getattr(part, "dataset", None)
    kind = type(part if inner is None or callable(inner) else inner).__name__  # of what the program knows
    missing = [name for name in ("ids", "labels", "groups", "fingerprint") if not hasattr(part, name)]
    if missing:
        raise DataError(
            f"{title}: {kind} lacks {', '.join(missing)}. Soft labels belong to what the teacher heard, so items must "
            "be known again: a data part has ids, labels, groups, items by (epoch, index), a method fingerprint(index) "
            'and an attribute made_by, which is {"augmentation": None} if items never change (see kdlib.DataPart).'
        )
    made_by: Any = getattr(part, "made_by", None)
    if not isinstance(made_by, Mapping) or "augmentation" not in made_by:
        raise DataError(
            f"{title}: {kind} does not say how its items change from epoch to epoch, and soft labels "
            'belong to what the teacher heard. Give it an attribute made_by = {"augmentation": None} if they never '
            "change, or with what the changes depend on (see kdlib.DataPart)."
        )
    classes = getattr(part, "classes", None)
    return {
        "rows": len(part),
        "items": items_of(part, title),
        "labels": digest([np.asarray(part.labels, dtype=np.int64).tobytes()]),
        "groups": digest([json.dumps([str(group) for group in part.groups]).encode()]),
        "classes": None if classes is None else [str(name) for name in classes],
        "made_by": dict(made_by),
    }


def settings_of(made: Any) -> dict[str, Any]:
    """Return the class of an object, and its settings: attributes with the names of its constructor's arguments.

    Raises:
        DataError: it is a function, or a setting is not kept, or is not plain data.

    Example:
        >>> from kdlib.digits import DigitsMLP
        >>> settings_of(DigitsMLP(width=4))["settings"]
        {'width': 4, 'classes': 10}
    """
    kind = type(made)
    if inspect.isroutine(made):
        raise DataError(f"{made!r} is a function, and does not say what it depends on. Write it as a class.")
    settings = {}
    own: Any = kind.__init__
    parameters = {} if own in (object.__init__, nn.Module.__init__) else inspect.signature(kind).parameters
    for name, parameter in parameters.items():
        if name in LIVE and parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        try:
            value = getattr(made, name)
            settings[name] = json.loads(json.dumps(str(value) if isinstance(value, Path) else value))
        except (AttributeError, TypeError, ValueError):
            raise DataError(
                f"{kind.__name__} does not keep its setting '{name}' as an attribute of that name, as plain data; so "
                "it cannot be told from one with other settings."
            ) from None
    return {"class": name_of(made), "source": source_of(kind), "settings": settings}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def _bytes(name: str, tensor: Tensor) -> tuple[bytes, bytes]:
    flat = tensor.detach().cpu().contiguous().flatten()
    return json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode(), flat.view(torch.uint8).numpy().tobytes()
