"""What commands print: talk to stderr, tables to stdout, JSON to a file or stdout, progress to a terminal.

Nothing here asks whether it may: `configure` is told once, by the dispatcher, how loud the call is. Tables and progress
are drawn by rich where a person looks at them, and are plain text everywhere else, so that a pipe always gets the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from ..errors import StrPath
from ..telling import KEPT_DB, LOST_DB, Progress, duration
from .terminal import Styled, columns, fitted, has_color, is_terminal, paint, printable, style_of

SECONDS_BETWEEN_LINES = 30.0
"""In a pipe: between two lines of progress."""

LONG_SECONDS = 30.0
"""Work that its first part shows to take longer is said to, with how long."""

FIRST_PARTS = 100
"""That part is one of so many, or one evaluation of a network where that is more."""

GAP = "  "
WRAPPED = 25
"""Cells of a terminal's table that are longer may wrap between words, and nowhere else."""

_begun = time.monotonic()
_quiet = False
_bar_shown: Any = None
_made_by: Mapping[str, Any] = {}
_older: set[Path] = set()
_noted: set[str] = set()


def configure(*, quiet: bool = False, made_by: Mapping[str, Any] | None = None) -> None:
    """Set how loud this call is, and what its JSON documents say about it.

    Args:
        quiet: errors only; data on stdout stays.
        made_by: the entry of that name in every JSON document: tool, version, command, options.
    """
    global _begun, _quiet, _made_by
    _begun, _quiet, _made_by = time.monotonic(), quiet, made_by or {}
    _noted.clear()


def seconds_taken() -> float:
    """Seconds since the call was configured."""
    return time.monotonic() - _begun


def foresee(outputs: Iterable[Path], *, dry: bool = False) -> None:
    """Find out, before any work, which outputs there are already, and whether their folders can be written to.

    Args:
        outputs: checked already.
        dry: touch nothing.

    Raises:
        OutputError: a folder cannot be written to.
    """
    from ..checkpoint import rehearse

    tried: set[Path] = set()
    for path in outputs:
        (_older.add if path.exists() else _older.discard)(path)
        folder = Path(os.path.realpath(path)).parent
        if not dry and folder not in tried:
            tried.add(folder)
            note(*rehearse(path))


def wrote(place: StrPath, *, would: bool = False) -> str:
    """Say in words that an output was written, or would be, and whether it replaces an older file."""
    old = Path(place) in _older
    return f"would {'replace' if old else 'write'} {place}" if would else f"{'replaced' if old else 'wrote'} {place}"


def say(text: str) -> None:
    """One line of talk; a terminal gets it broken between words."""
    if not _quiet:
        print(fitted(printable(text), sys.stderr), file=sys.stderr)


def note(*texts: str) -> None:
    """Lines that a user should know, each said once; a terminal gets them broken between words."""
    for text in texts:
        if not _quiet and text not in _noted:
            _noted.add(text)
            mark = "note:"
            line = fitted(f"{mark} {printable(text)}", sys.stderr)
            print(paint(mark, "warn", sys.stderr) + line.removeprefix(mark), file=sys.stderr)


def error(text: str) -> None:
    """One line that says why the command failed, however quiet it is."""
    print(f"{paint('error:', 'bad', sys.stderr)} {printable(text)}", file=sys.stderr)


def decibels(value: float | None, digits: int = 1) -> str:
    """An SQNR, coloured by what it is worth."""
    if value is None:
        return "-"
    style = "good" if value >= KEPT_DB else "bad" if value < LOST_DB else "warn"
    return Styled(f"{value:.{digits}f} dB", style)


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    optional: Sequence[int] = (),
    talk: bool = False,
) -> None:
    """A table on stdout, columns as wide as their widest cell.

    Args:
        head: names of the columns.
        rows: cells; `Styled` ones in their colours.
        right: numbers of the columns that are set flush right.
        optional: numbers of the columns that a narrow terminal does without, the first to go first.
        talk: print it to stderr, where stdout has a JSON document.
    """
    stream = sys.stderr if talk else sys.stdout
    draw = _draw_table if is_terminal(stream) else _write_table
    draw(head, [[_clean(cell) for cell in row] for row in rows], right, optional, stream)


def _clean(cell: str) -> str:
    """A cell that cannot drive the terminal."""
    return cell if cell.isprintable() else Styled(printable(cell), style_of(cell))


def _widths(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]


def _write_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int], _optional: Sequence[int], stream: TextIO
) -> None:
    """The table as plain text, whole however wide it is."""
    widths = _widths(head, rows)
    for row in (head, *rows):
        cells = [
            (cell.rjust(width) if column in right else cell.ljust(width), style_of(cell))
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        cells[-1] = (cells[-1][0].rstrip(), cells[-1][1])
        print(GAP.join(paint(text, style, stream) for text, style in cells).rstrip(), file=stream)


def _draw_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int], optional: Sequence[int], stream: TextIO
) -> None:
    """The table for a terminal: without the columns that it has no room for, which it names."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    words = [max((len(word) for row in rows for word in row[column].split()), default=0) for column in range(len(head))]
    needed = [max(word, min(width, WRAPPED)) for word, width in zip(words, _widths(head, rows), strict=True)]
    kept, dropped = list(range(len(head))), list(optional)

    def fits() -> bool:
        return sum(needed[number] + len(GAP) for number in kept) - len(GAP) <= columns()

    while dropped and not fits():
        kept.remove(dropped.pop(0))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for number in kept:
        justify: Literal["left", "right"] = "right" if number in right else "left"
        least = needed[number] if fits() else None
        table.add_column(Text(head[number]), justify=justify, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(Text(row[number], _RICH_STYLES.get(style_of(row[number]), "")) for number in kept))
    console = Console(file=stream, width=columns(), color_system=_colors(stream), highlight=False)
    console.print(table)
    if names := ", ".join(name for number, name in enumerate(head) if name and number not in kept):
        console.print(Text(f"no room for: {names} (a pipe, a file and --json have them)", "dim"))


_RICH_STYLES = {"good": "green", "warn": "yellow", "bad": "red", "head": "bold", "dim": "dim"}


def _colors(stream: TextIO) -> Literal["standard"] | None:
    """What rich may write: the sixteen colours of the terminal's theme, or no style at all."""
    return "standard" if has_color(stream) else None


def write_json(place: str | None, document: Mapping[str, Any]) -> None:
    """One JSON document to where `--json` says: a file, pipe or device, "-" for stdout, or nowhere.

    It says what made it.

    Raises:
        OutputError: the file cannot be written.
    """
    if place is None:
        return
    told = {**document, **({"made_by": _made_by} if _made_by else {})}
    text = json.dumps(told, indent=2, ensure_ascii=place == "-", allow_nan=False) + "\n"
    if place == "-":  # in whatever encoding
        sys.stdout.write(text)
        return
    from ..checkpoint import write_bytes

    content = text.encode("utf-8", "backslashreplace")  # half a pair, as a file's name may have
    write_bytes(Path(place), content, stream=True)


@contextmanager
def progress_bar(title: str, *, unit: str = "") -> Iterator[Progress]:
    """A bar with time left on a terminal, a line now and then elsewhere; and how long all takes, if that is long.

    Args:
        title: what is going on.
        unit: "bytes", whose rate is shown too, or nothing.

    Yields:
        A function that takes what is done and what there is to do.
    """
    if _quiet:
        yield lambda _done, _total: None
    elif is_terminal(sys.stderr):
        with _bar(title, unit) as progress:
            yield _estimating(title, progress)
    else:
        yield _estimating(title, _lines(title))


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Progress]:
    from rich import progress
    from rich.console import Console

    global _bar_shown  # noqa: PLW0603 - a process has one terminal
    shown = [progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
             *([progress.TransferSpeedColumn()] if unit else []), progress.TimeRemainingColumn()]  # fmt: skip
    if _bar_shown is not None:  # work within work: two bars would write over each other
        _bar_shown.stop()
    console = Console(stderr=True, color_system=_colors(sys.stderr))
    # Not stdout: it may be a file, and rich would take what is printed there to the terminal.
    with progress.Progress(*shown, console=console, transient=True, redirect_stdout=False) as bar:
        _bar_shown = bar
        task = bar.add_task(title, total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        finally:
            _bar_shown = None


def _estimating(title: str, progress: Progress) -> Progress:
    """Progress that says once, as soon as a first part is done, how long the whole takes."""
    begun: tuple[float, int] | None = None
    told = False

    def tell(done: int, total: int) -> None:
        nonlocal begun, told
        now = time.monotonic()
        start, before = begun = begun or (now, done)
        if not told and 0 < total <= (done - before) * FIRST_PARTS:
            told = True
            seconds = (now - start) * (total - before) / (done - before)
            if seconds > LONG_SECONDS:
                say(f"{title}: about {duration(seconds)} in all")
        progress(done, total)

    return tell


def _lines(title: str) -> Progress:
    """Progress as lines, one every `SECONDS_BETWEEN_LINES`."""
    start = said = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES and 0 < done < total:
            said = now
            left = (now - start) * (total - done) / done
            say(f"{title}: {done / total:.0%}, about {duration(left)} left")

    return tell
