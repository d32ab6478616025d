"""Being stopped: the first Ctrl-C or SIGTERM unwinds, so that nothing half-made stays; the next ends at once.

One Ctrl-C can arrive twice: a program between the terminal and us (`timeout`, `torchrun`) gets it as we do, and passes
it on. So the next one is a signal that comes a moment later.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

MOMENT_SECONDS = 0.5
"""Signals that follow the first one sooner are the same one."""


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.exit_code = exit_code(number)
        super().__init__()


def exit_code(number: int) -> int:
    """What shells report of a process that a signal ended.

    >>> exit_code(signal.SIGINT), exit_code(signal.SIGTERM)
    (130, 143)
    """
    return 128 + number


@contextmanager
def interruptible(*, last: bool = False) -> Iterator[None]:
    """Turn the first signal into an `Interrupted`; in a thread, where signals cannot be had, do nothing.

    A signal that is ignored, as shells do for what runs in the background, stays ignored.

    Args:
        last: whether the process ends behind this block. It then waits for its threads, and what a further signal
            means once one came stays so until the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            if not last or signal.getsignal(number) is _unwind:
                signal.signal(number, handler)


def _unwind(number: int, _frame: FrameType | None) -> None:
    first = time.monotonic()

    def end(again: int, _frame: FrameType | None) -> None:
        if time.monotonic() - first > MOMENT_SECONDS:
            os._exit(exit_code(again))

    for each in SIGNALS:
        if signal.getsignal(each) is _unwind:
            signal.signal(each, end)
    raise Interrupted(number)
