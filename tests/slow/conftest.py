"""One table at the end: what was broken, how often, and what came of it."""

import pytest

ROWS = []


@pytest.fixture
def table():
    """Return a function that adds a row: ``table(fault, figure)``, or ``table(fault, figure, count)``."""

    def add(fault, figure, count=None):
        ROWS.append((str(fault), "" if count is None else f"{count:,}", str(figure)))

    return add


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    rows = [("fault", "count", "result"), *ROWS]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    terminalreporter.section("faults")
    for fault, count, result in rows:
        terminalreporter.write_line(f"{fault:<{widths[0]}}  {count:>{widths[1]}}  {result}".rstrip())
