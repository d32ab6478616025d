"""Signals: the first Ctrl-C or SIGTERM raises an exception, so that outputs are cleaned up; the next exits at once.

A single Ctrl-C can arrive twice, because a parent such as `timeout` or `torchrun` receives and forwards it. Signals
within a moment of the first are therefore ignored.
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
"""Signals this soon after the first are the same one."""


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.exit_code = exit_code(number)
        super().__init__()


def exit_code(number: int) -> int:
    """The exit code of a process that was ended by a signal, as in a shell.

    >>> exit_code(signal.SIGINT), exit_code(signal.SIGTERM)
    (130, 143)
    """
    return 128 + number


@contextmanager
def interruptible(*, last: bool = False) -> Iterator[None]:
    """Turn the first signal into an `Interrupted`. Has no effect outside the main thread.

    A signal that is ignored, as in background jobs of shells, stays ignored.

    Args:
        last: whether the process ends after this block. After a signal, the handlers then stay in place while the
            process waits for its threads.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: handler for each in SIGNALS if (handler := signal.getsignal(each)) is not signal.SIG_IGN}
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
