"""Links in a data set's folder: those that lead out of it are followed only where a setting says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kdlib import DataError
from kdlib_asc.datasets import dcase, folder

NAMES = [f"{label}-{place}-{take}" for label in ("bus", "park") for place in range(3) for take in range(2)]


def clip(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(80, 0.25), 8000)


def a_folder(root: Path) -> list[str]:
    names = [f"{name.split('-')[0]}/{name.split('-')[1]}__{name[-1]}.wav" for name in NAMES]
    for name in names:
        clip(root / name)
    return names


def a_dcase(root: Path) -> list[str]:
    names = [f"audio/{name}-1-a.wav" for name in NAMES]
    for name in names:
        clip(root / name)
    rows = {name: f"{name}\t{name[6:].split('-')[0]}\n" for name in names}
    (root / "evaluation_setup").mkdir()
    (root / "meta.csv").write_text("filename\tscene_label\n" + "".join(rows.values()))
    (root / "evaluation_setup/fold1_train.txt").write_text("".join(rows[name] for name in names if "-2-" not in name))
    (root / "evaluation_setup/fold1_evaluate.txt").write_text("".join(rows[name] for name in names if "-2-" in name))
    return names


MADE = {"folder": a_folder, "dcase": a_dcase}


def opened(kind: str, root: Path, links: bool = False) -> list[str]:
    form = {"rate": 8000, "channels": 1, "seconds": 0.01}
    parts = folder(root=root, links=links, **form) if kind == "folder" else dcase(root=root, links=links, **form)[1]  # type: ignore[arg-type]
    for part in (parts.train, parts.test):
        for index in range(len(part)):
            assert part[0, index]["x"].shape == (1, 80)
    return sorted([*parts.train.ids, *parts.test.ids])


def a_file(root: Path, out: Path, name: str) -> None:
    (root / name).rename(out / "elsewhere.wav")
    (root / name).symlink_to(out / "elsewhere.wav")


def a_relative_file(root: Path, out: Path, name: str) -> None:
    (root / name).rename(out / "elsewhere.wav")
    (root / name).symlink_to(os.path.relpath(out / "elsewhere.wav", (root / name).parent))


def a_link_to_a_link(root: Path, out: Path, name: str) -> None:
    (root / name).rename(out / "elsewhere.wav")
    (root / "inside.wav").symlink_to(out / "elsewhere.wav")
    (root / name).symlink_to(root / "inside.wav")


def the_folder_above(root: Path, out: Path, name: str) -> None:
    above = root / Path(name).parts[0]
    above.rename(out / "elsewhere")
    above.symlink_to(out / "elsewhere")


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("lead_out", [a_file, a_relative_file, a_link_to_a_link, the_folder_above])
def test_a_link_that_leads_out_is_refused_and_followed_where_that_is_said(
    tmp_path: Path, kind: str, lead_out: Callable[[Path, Path, str], None]
) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    names = MADE[kind](root)
    out.mkdir()
    assert opened(kind, root) == sorted(names)  # the control
    lead_out(root, out, names[3])
    with pytest.raises(DataError, match="link that leads out of the data set's folder") as caught:
        opened(kind, root)
    assert f"{names[3]}: to {out / 'elsewhere'}" in str(caught.value)
    assert "data.links=true follows it" in str(caught.value)
    assert opened(kind, root, links=True) == sorted(names)


@pytest.mark.parametrize("kind", MADE)
def test_a_link_within_and_a_root_that_is_a_link_are_followed(tmp_path: Path, kind: str) -> None:
    names = MADE[kind](tmp_path / "set")
    a_file(tmp_path / "set", tmp_path / "set", names[0])
    (tmp_path / "short").symlink_to(tmp_path / "set")
    assert opened(kind, tmp_path / "short") == sorted(names)


@pytest.mark.parametrize("table", ["meta.csv", "evaluation_setup/fold1_train.txt"])
def test_a_table_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path, table: str) -> None:
    a_dcase(tmp_path / "set")
    (tmp_path / "set" / table).rename(tmp_path / "table")
    (tmp_path / "set" / table).symlink_to(tmp_path / "table")
    with pytest.raises(DataError, match=f"{table}: to {tmp_path / 'table'}"):
        opened("dcase", tmp_path / "set")


@pytest.mark.timeout(20)
def test_a_list_that_is_a_pipe_is_not_waited_for_and_a_huge_one_not_read(tmp_path: Path) -> None:
    a_dcase(tmp_path)
    table = tmp_path / "evaluation_setup/fold1_train.txt"
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(DataError, match="not a file"):
        opened("dcase", tmp_path)
    table.unlink()
    with table.open("wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(DataError, match="a table has at most 268,435,456 bytes"):
        opened("dcase", tmp_path)


@pytest.mark.parametrize("name", ["audio/a\0b.wav", "/etc/passwd", "audio/../../x.wav", "..\\x.wav", "C:\\x.wav", "\0"])
def test_forged_names_in_a_list_are_refused_as_one_report(tmp_path: Path, name: str) -> None:
    a_dcase(tmp_path)
    with (tmp_path / "meta.csv").open("a") as file:
        file.write(f"{name}\tbus\n")
    with pytest.raises(DataError, match=r"path that leaves the data set's folder|name that no file can have"):
        opened("dcase", tmp_path)
