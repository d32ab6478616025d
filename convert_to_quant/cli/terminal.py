"""Properties of streams: terminal or not, width and colors.

Colors mean good, suspicious or bad, and come from the terminal's theme. They are controlled, in this order, by
`--color`, NO_COLOR, FORCE_COLOR (https://no-color.org, https://force-color.org), and the kind of stream.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TextIO

STYLES = {"good": "32", "warn": "33", "bad": "31", "head": "1", "dim": "2"}
"""Meaning -> SGR parameter (ECMA-48)."""

COLOR_CHOICES = ("auto", "always", "never")
WIDEST = 80
"""Maximum width of text; longer lines are hard to read."""

_when = "auto"


def choose_color(words: Sequence[str]) -> None:
    """Apply `--color` before the command line is parsed, as parsing errors are colored, too."""
    global _when  # noqa: PLW0603 - a process has one terminal
    _when = value_of("--color", words) or "auto"


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """The last value of a flag in an unparsed command line, or None.

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
    """Whether a stream is a terminal with cursor control."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def has_color(stream: TextIO) -> bool:
    """Whether to write colors to a stream."""
    if _when in ("always", "never"):
        return _when == "always"
    if os.environ.get("NO_COLOR"):
        return False
    return os.environ.get("FORCE_COLOR", "0") not in ("", "0") or is_terminal(stream)


def columns() -> int:
    """Width of the terminal, or COLUMNS, or 80."""
    return shutil.get_terminal_size().columns


def text_width(stream: TextIO) -> int:
    """Width of text: `WIDEST`, or that of a narrower terminal."""
    return min(columns(), WIDEST) if is_terminal(stream) else WIDEST


def width_of(text: str) -> int:
    """Number of columns that a text fills on a terminal.

    >>> width_of("model"), width_of("模型"), width_of("e\N{COMBINING ACUTE ACCENT}")
    (5, 4, 1)
    """
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF") for one in text)


def paint(text: str, style: str, stream: TextIO) -> str:
    """A styled text, if the stream has colors."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style in STYLES and text and has_color(stream) else text


def fitted(text: str, stream: TextIO) -> str:
    """A line, wrapped between words if the stream is a terminal."""
    if not is_terminal(stream) or len(text) <= columns():
        return text
    return textwrap.fill(
        text, max(columns(), 1), replace_whitespace=False, expand_tabs=False, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


class Styled(str):
    """A table cell with a style (a key of `STYLES`)."""

    __slots__ = ("style",)

    style: str

    def __new__(cls, text: str, style: str) -> Styled:
        """A cell with its style."""
        styled = super().__new__(cls, text)
        styled.style = style
        return styled


def style_of(text: str) -> str:
    """The style of a cell, or ""."""
    return text.style if isinstance(text, Styled) else ""


def printable(text: str) -> str:
    r"""A text, such as a name from a file, with control characters escaped.

    >>> printable("a\x1b[2J × b")
    'a\\x1b[2J × b'
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
