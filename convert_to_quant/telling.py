"""Text for people: counts with nouns, sizes, durations; and progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

LOST_DB, KEPT_DB = 20.0, 25.0
"""SQNR in dB: red below the first, green from the second; on screens and in the demo's image."""

Progress = Callable[[int, int], None]
"""Called with the work done and the total."""

Advance = Callable[[int], None]
"""Called with the work done since the last call."""


def advance(progress: Progress | None, total: int, done: int = 0) -> Advance:
    """Report increments to a function of the sum.

    Args:
        progress: called with the sum and the total.
        total: all work.
        done: work done before.

    >>> told = advance(print, 10, done=3)
    >>> told(4)
    7 10
    """

    def add(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return add


def part(progress: Progress | None, number: int, of: int = 2) -> Progress | None:
    """Progress of one of several equal runs (number 0, 1, ...) as a part of all of them.

    >>> told = part(print, 1)
    >>> told(2, 10) if told else None
    12 20
    """
    return None if progress is None else lambda done, total: progress(number * total + done, of * total)


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "layer"), plural(1200, "layer")
    ('1 layer', '1,200 layers')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size(count: float) -> str:
    """A number of bytes with its unit.

    >>> size(97_530), size(12)
    ('97.5 kB', '12 bytes')
    """
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """A duration with its unit.

    >>> duration(42.3), duration(400), duration(9000)
    ('42 s', '7 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
