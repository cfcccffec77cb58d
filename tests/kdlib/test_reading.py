"""Reading everything once: which errors come back, in which order, and what ends it."""

import gc
import threading
import time
import weakref

import pytest

from kdlib import DataError, unreadable
from kdlib.errors import KdlibError
from kdlib.reading import BLOCK


def test_errors_come_in_the_order_of_the_ids_whichever_is_read_first():
    def read(name):
        time.sleep(0.02 if name == "0" else 0)
        raise DataError(name)

    errors = unreadable([str(number) for number in range(50)], read, title="reading")
    assert [(name, str(error)) for name, error in errors.items()] == [(str(n), str(n)) for n in range(50)]


def test_each_id_is_read_once_and_good_ones_are_not_reported():
    seen, lock = [], threading.Lock()

    def read(name):
        with lock:
            seen.append(name)

    assert unreadable(list("abc"), read, title="reading") == {}
    assert sorted(seen) == ["a", "b", "c"]


def test_a_fault_that_is_no_bad_item_ends_it_before_the_rest_is_read():
    seen = []

    def read(name):
        seen.append(name)
        time.sleep(0.001)
        raise KdlibError("no decoder is installed")

    with pytest.raises(KdlibError, match="no decoder"):
        unreadable([str(number) for number in range(10_000)], read, title="reading")
    assert len(seen) < 1000


def test_nothing_to_read():
    assert unreadable([], int, title="reading") == {}


def test_an_error_does_not_hold_what_was_being_read():
    class Samples:
        pass

    held = []

    def read(name):
        samples = Samples()
        held.append(weakref.ref(samples))
        try:
            int(name)
        except ValueError as error:
            raise DataError(name) from error

    assert list(unreadable(["x"], read, title="reading")) == ["x"]
    gc.collect()
    assert [samples() for samples in held] == [None]


def test_more_items_than_are_handed_out_at_a_time_all_come_back_in_order():
    names = [str(number) if number % 100 else f"x{number}" for number in range(3 * BLOCK + 1)]
    expected = [name for name in names if name.startswith("x")]
    assert list(unreadable(names, int, title="reading", caught=ValueError)) == expected
