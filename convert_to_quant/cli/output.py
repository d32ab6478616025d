"""Everything that commands print: messages and progress to stderr, tables to stdout, JSON to a file or stdout.

The dispatcher calls `configure` once per command. Terminals get colors, fitted tables and a progress bar; everything
else gets plain text that does not depend on its width.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import StrPath
from ..telling import KEPT_DB, LOST_DB, Progress, duration
from .terminal import Styled, columns, fitted, has_color, is_terminal, paint, printable, style_of, width_of

SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal, progress is reported this often, and only if more than this is left at first."""

FIRST_PARTS = 100
"""The first estimate comes after this fraction of the work, or after one evaluation if that is more."""

GAP = "  "
WRAPPED, BROKEN = 25, 12
"""On a terminal, table cells longer than the first may wrap between words; words longer than the second may break."""

_begun = time.monotonic()
_quiet = False
_bar_shown: Any = None
_made_by: Mapping[str, Any] = {}
_older: set[Path] = set()
_noted: set[str] = set()


def configure(*, quiet: bool = False, made_by: Mapping[str, Any] | None = None) -> None:
    """Start a command; `made_by` is the entry of that name in its JSON documents."""
    global _begun, _quiet, _made_by
    _begun, _quiet, _made_by = time.monotonic(), quiet, made_by or {}
    _noted.clear()


def seconds_taken() -> float:
    """Seconds since `configure`."""
    return time.monotonic() - _begun


def foresee(outputs: Iterable[Path], *, dry: bool = False) -> None:
    """Before any work, remember which outputs exist and, unless in a dry run, refuse folders that are not writable."""
    from ..checkpoint import rehearse

    tried: set[Path] = set()
    for path in outputs:
        (_older.add if path.exists() else _older.discard)(path)
        folder = Path(os.path.realpath(path)).parent
        if not dry and folder not in tried:
            tried.add(folder)
            note(*rehearse(path))


def wrote(place: StrPath, *, would: bool = False) -> str:
    """That an output was written, or would be, and whether it replaces an existing file."""
    old = Path(place) in _older
    return f"would {'replace' if old else 'write'} {place}" if would else f"{'replaced' if old else 'wrote'} {place}"


def say(text: str) -> None:
    """Print a message."""
    if not _quiet:
        print(fitted(printable(text), sys.stderr), file=sys.stderr)


def note(*texts: str) -> None:
    """Print notes, each one once per command."""
    for text in texts:
        if not _quiet and text not in _noted:
            _noted.add(text)
            mark = "note:"
            line = fitted(f"{mark} {printable(text)}", sys.stderr)
            print(paint(mark, "warn", sys.stderr) + line.removeprefix(mark), file=sys.stderr)


def error(text: str) -> None:
    """Print why the command failed, even with --quiet."""
    print(f"{paint('error:', 'bad', sys.stderr)} {printable(text)}", file=sys.stderr)


def decibels(value: float | None, digits: int = 1) -> str:
    """An SQNR in dB, colored by quality."""
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
    """Print a table to stdout.

    Args:
        head: column names.
        rows: cells, which may be `Styled`.
        right: right-aligned columns, by number.
        optional: columns that a narrow terminal omits, in this order.
        talk: print to stderr, because stdout has a JSON document.
    """
    stream = sys.stderr if talk else sys.stdout
    drawn = is_terminal(stream)
    names = [Styled(name, "head") for name in head] if drawn else head
    table = [[_clean(cell) for cell in row] for row in (names, *rows)]
    widths = {number: max(map(width_of, column)) for number, column in enumerate(zip(*table, strict=True))}
    if drawn:
        widths = _fit(widths, table, optional)
    for row in table:
        cells = [
            textwrap.wrap(row[number], width, break_on_hyphens=False)
            if width_of(row[number]) > width
            else [row[number]]
            for number, width in widths.items()
        ]
        for parts in zip_longest(*cells, fillvalue=""):
            line = []
            for (number, width), part in zip(widths.items(), parts, strict=True):
                space = " " * (width - width_of(part))
                cell = space + part if number in right else part + space
                line.append(paint(cell if number < max(widths) else cell.rstrip(), style_of(row[number]), stream))
            print(GAP.join(line).rstrip(), file=stream)
        if drawn and row is table[0]:
            rule = "─" if (stream.encoding or "utf-8").lower().startswith("utf") else "-"
            print(rule * (sum(widths.values()) + len(GAP) * (len(widths) - 1)), file=stream)
    if omitted := ", ".join(name for number, name in enumerate(head) if name and number not in widths):
        text = fitted(f"no room for: {omitted} (a pipe, a file and --json have them)", stream)
        print(paint(text, "dim", stream), file=stream)


def _fit(widths: dict[int, int], table: Sequence[Sequence[str]], optional: Sequence[int]) -> dict[int, int]:
    """Widths of the columns that fit a terminal, if need be without optional ones and with long words broken."""
    words = {number: max(width_of(word) for row in table for word in row[number].split() or [""]) for number in widths}
    fit = {number: max(words[number], min(width, WRAPPED)) for number, width in widths.items()}

    def room() -> int:
        return columns() - sum(fit.values()) - len(GAP) * (len(fit) - 1)

    for number in optional:
        if room() < 0:
            del fit[number]
    while room() < 0 and max(fit.values()) > BROKEN:
        fit[max(fit, key=fit.__getitem__)] -= 1
    for number, width in fit.items():
        fit[number] += min(widths[number] - width, max(room(), 0))
    return fit


def _clean(cell: str) -> str:
    """A cell without control characters."""
    return cell if cell.isprintable() else Styled(printable(cell), style_of(cell))


def write_json(place: str | None, document: Mapping[str, Any]) -> None:
    """Write the document of `--json`, with its `made_by` entry, to a file, a pipe, or stdout ("-")."""
    if place is None:
        return
    told = {**document, **({"made_by": _made_by} if _made_by else {})}
    text = json.dumps(told, indent=2, ensure_ascii=place == "-", allow_nan=False) + "\n"
    if place == "-":  # ASCII, as stdout may have any encoding
        sys.stdout.write(text)
        return
    from ..checkpoint import write_bytes

    content = text.encode("utf-8", "backslashreplace")  # file names may contain lone surrogates
    write_bytes(Path(place), content, stream=True)


@contextmanager
def progress_bar(title: str, *, unit: str = "") -> Iterator[Progress]:
    """Show progress: a bar on a terminal, with the rate for the unit "bytes", and a line now and then elsewhere."""
    if _quiet:
        yield lambda _done, _total: None
    elif is_terminal(sys.stderr):
        with _bar(title, unit) as progress:
            yield progress
    else:
        yield _lines(title)


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Progress]:
    from rich import progress
    from rich.console import Console

    global _bar_shown  # noqa: PLW0603 - a process has one terminal
    shown = [progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
             *([progress.TransferSpeedColumn()] if unit else []), progress.TimeRemainingColumn()]  # fmt: skip
    if _bar_shown is not None:  # nested work: two bars would overwrite each other
        _bar_shown.stop()
    console = Console(stderr=True, color_system="standard" if has_color(sys.stderr) else None)
    # stdout may be a file, and rich would redirect it to the terminal.
    with progress.Progress(*shown, console=console, transient=True, redirect_stdout=False) as bar:
        _bar_shown = bar
        task = bar.add_task(title, total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        finally:
            _bar_shown = None


def _lines(title: str) -> Progress:
    """Progress as lines with the time left."""
    begun: tuple[float, int] | None = None
    said: float | None = None

    def tell(done: int, total: int) -> None:
        nonlocal begun, said
        now = time.monotonic()
        start, before = begun = begun or (now, done)
        if not total <= (done - before) * FIRST_PARTS or done >= total:
            return
        left = (now - start) * (total - done) / (done - before)
        if (left if said is None else now - said) >= SECONDS_BETWEEN_LINES:
            said = now
            say(f"{title}: {done / total:.0%}, about {duration(left)} left")

    return tell
