"""SIGTERM and Ctrl-C: noted while a training is at a step, and acted on where it is whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HEEDED = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal stopped a training, after its checkpoint was saved; or the command outside of one.

    It is a ``KeyboardInterrupt``, so ``except Exception`` does not take it for an error.
    """

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name}{where}.")
        self.signal = number
        """SIGTERM or SIGINT."""


class Heard:
    """The first signal that came, or 0."""

    number: int = 0


@contextmanager
def heard() -> Iterator[Heard]:
    """Note SIGTERM and Ctrl-C instead of stopping by them; a second Ctrl-C stops at once.

    Afterwards the handlers are those from before, and a signal that came after the last look at the note is theirs. A
    thread that is not the main one can have none, and a signal that is ignored, as in a shell's background, stays so.
    """
    note = Heard()

    def hear(number: int, frame: Any) -> None:
        if note.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        note.number = note.number or number

    with _handled(HEEDED, hear):
        yield note
    if note.number:
        signal.raise_signal(note.number)


@contextmanager
def raised() -> Iterator[None]:
    """Have SIGTERM raise :class:`Stopped` as Ctrl-C raises ``KeyboardInterrupt``, so that what is open is closed."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    with _handled((signal.SIGTERM,), stop):
        yield


def left_to_parent(worker: int = 0) -> None:
    """Ignore both signals in a loader's process, unless they come from the parent, which ends its workers by SIGTERM.

    A terminal or a scheduler sends them to every process; the training decides when to end. A worker ends with its
    parent, whatever that one dies of.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by, args=(parent.pid,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """End with the parent. Torch's worker asks for its parent once it is at work, and misses none that died before."""
    parent.join()
    os._exit(0)


def _end_by(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[[int, Any], None]) -> Iterator[None]:
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, own in before.items():
            if own is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, signal.SIG_DFL if own is None else own)  # None: of a program in C
