"""The bar shows on a terminal, and leaves nothing where there is none."""

import io

import pytest
import rich
from rich.console import Console

import kdlib
from kdlib.progress import silent


@pytest.fixture
def console(monkeypatch):
    def made(**settings):
        seen = Console(file=io.StringIO(), width=80, **settings)
        monkeypatch.setattr(rich, "_console", seen)
        return seen

    return made


def test_the_items_come_through_and_no_line_is_left_where_there_is_no_terminal(console):
    seen = console(force_terminal=False)
    assert list(kdlib.track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert seen.file.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_with_its_title(console):
    seen = console(force_terminal=True)
    assert list(kdlib.track(range(3), "numbers")) == [0, 1, 2]
    assert "numbers" in seen.file.getvalue()


def test_a_quiet_console_shows_nothing(console):
    seen = console(force_terminal=True, quiet=True)
    assert list(kdlib.track(range(3), "numbers")) == [0, 1, 2]
    assert seen.file.getvalue() == ""


@pytest.mark.parametrize("wanted", [True, False])
def test_silence_is_for_a_while_and_a_console_that_was_quiet_stays_so(console, wanted):
    seen, other, quiet = console(force_terminal=True), Console(), Console(quiet=True)
    with silent(wanted, other, quiet):
        assert [one.quiet for one in (seen, other, quiet)] == [wanted, wanted, True]
    assert [one.quiet for one in (seen, other, quiet)] == [False, False, True]
