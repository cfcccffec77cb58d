"""What the page on speed says to type or to write is accepted."""

import re
import tomllib
from pathlib import Path

import pytest

from kdlib.doctor import SOUND_THRESHOLDS
from kdlib.recipe import find, read

PAGE = (Path(__file__).parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")
TABLES = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)


def over(recipe, changes):
    """A recipe with a table laid over it."""
    merged = dict(recipe)
    for key, value in changes.items():
        merged[key] = over(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_the_page_belongs_into_a_recipe(table):
    plain = tomllib.loads(find("asc_quick").read_text(encoding="utf-8"))
    assert read(over(plain, tomllib.loads(table))).dump() != read(plain).dump()


def test_the_command_of_the_page_is_the_papers_setting_but_for_precision_layout_and_cache(tmp_path):
    (command,) = re.findall(r"\$ kdlib run (asc_dcase2018 .*train\.precision.*)", PAGE)
    recipe, *rest = command.split()
    changes = [change.replace("PATH", str(tmp_path)) for option, change in zip(rest[::2], rest[1::2], strict=True)]
    assert rest[::2] == ["--set"] * len(changes)
    fast, plain = read(recipe, changes), read(recipe, changes[:1])
    for name, system in fast.systems.items():
        train = system.student.train.model_dump()
        assert (train.pop("precision"), train.pop("layout")) == ("bf16", "channels_last")
        assert train.items() <= plain.systems[name].student.train.model_dump().items()
        assert system.student.model.dump() == plain.systems[name].student.model.dump()


def test_the_thresholds_of_the_page_are_those_of_the_doctor():
    assert f"$ export {SOUND_THRESHOLDS}" in PAGE
