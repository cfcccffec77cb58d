"""Files through a finished run: windows, students, scorers, fusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kdlib.errors import KdlibError
from kdlib.recipe import read
from kdlib.saved import load_run


def predict(
    run: Path,
    files: Sequence[Path],
    *,
    fold: str | int | None = None,
    system: str | None = None,
    changes: list[str] | None = None,
) -> Iterator[tuple[Path, dict[str, float] | KdlibError]]:
    """Yield each file with its class scores, the highest first, or with what is wrong with it.

    A file is read as the run's data set reads its clips, in windows of their length that cover it; the scores are means
    over the windows.

    Args:
        run: the folder of a finished run.
        files: what to look at.
        fold: of which fold. Default: the only one.
        system: the one to ask. Default: the fusion, or the only one.
        changes: of the recipe, for example ``"data.resample=true"``.

    Raises:
        KdlibError: the run cannot be loaded, or its data set reads no single files.
    """
    loaded = load_run(run, fold)
    windows = _reader(run, changes)
    for file in files:
        try:
            values = loaded.scores(windows(file), system).mean(axis=0)
        except KdlibError as error:
            yield file, error
        else:
            order = np.argsort(-values, kind="stable")
            yield file, {loaded.classes[place]: float(values[place]) for place in order}


def _reader(run: Path, changes: list[str] | None) -> Callable[[Path], Tensor]:
    data = read(run / "recipe.json", changes).data
    windows: Any = getattr(data.plugin.build, "windows", None)
    if windows is None:
        raise KdlibError(
            f"{run}: the data set '{data.plugin.name}' of this run reads no single files. In Python: "
            "kdlib.load_run(path).scores(x)."
        )
    return lambda path: windows(path, data.settings)
