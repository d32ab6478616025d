"""What a stream can show: whether it is a terminal, how wide, in colours or not, and nothing that drives it.

Colours mean something: good, worth a look, bad. They are the terminal's own sixteen, so that its theme decides. Whether
there are any is decided by the first that says so: `--color`, then NO_COLOR, then FORCE_COLOR (https://no-color.org,
https://force-color.org), then whether the stream is a terminal that understands them.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

STYLES = {"good": "32", "warn": "33", "bad": "31", "head": "1", "dim": "2"}
"""Meaning -> what a terminal is told (ECMA-48, SGR)."""

COLOR_CHOICES = ("auto", "always", "never")
WIDEST = 80
"""Columns that text is wrapped to at most: longer lines are hard to read."""

_when = "auto"


def choose_color(words: Sequence[str]) -> None:
    """Take `--color` from a command line, before it is parsed: errors of parsing have colours too."""
    global _when  # noqa: PLW0603 - a process has one terminal
    _when = value_of("--color", words) or "auto"


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """What a command line that is not parsed yet says last behind a flag; None where it does not.

    >>> value_of("--color", ["demo", "--color", "never"]), value_of("--color", ["--color", "auto", "--color=never"])
    ('never', 'never')
    """
    found = None
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag and (equals or number + 1 < len(words)):
            found = value if equals else words[number + 1]
    return found


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at a stream, through something that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def has_color(stream: TextIO) -> bool:
    """Whether to write colours into a stream."""
    if _when in ("always", "never"):
        return _when == "always"
    if os.environ.get("NO_COLOR"):
        return False
    return os.environ.get("FORCE_COLOR", "0") not in ("", "0") or is_terminal(stream)


def columns() -> int:
    """Width of the terminal; 80 where there is none, or what COLUMNS says."""
    return shutil.get_terminal_size().columns


def text_width(stream: TextIO) -> int:
    """Columns that text is wrapped to: `WIDEST`, or fewer on a terminal that has fewer."""
    return min(columns(), WIDEST) if is_terminal(stream) else WIDEST


def paint(text: str, style: str, stream: TextIO) -> str:
    """A text in a style, where the stream has colours."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style in STYLES and text and has_color(stream) else text


def fitted(text: str, stream: TextIO) -> str:
    """A line for a stream: as it is, or broken between words where a terminal would break it within them."""
    if not is_terminal(stream) or len(text) <= columns():
        return text
    return textwrap.fill(
        text, max(columns(), 1), replace_whitespace=False, expand_tabs=False, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


class Styled(str):
    """A text with a meaning (a key of `STYLES`), for tables."""

    __slots__ = ("style",)

    style: str

    def __new__(cls, text: str, style: str) -> Styled:
        """A text and its meaning."""
        styled = super().__new__(cls, text)
        styled.style = style
        return styled


def style_of(text: str) -> str:
    """What a text means; "" where it says nothing about it."""
    return text.style if isinstance(text, Styled) else ""


def printable(text: str) -> str:
    r"""A text with everything escaped that a terminal would obey instead of show: names come from files.

    >>> printable("a\x1b[2J × b")
    'a\\x1b[2J × b'
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
