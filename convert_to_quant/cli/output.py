"""What commands print: talk to stderr, tables to stdout, JSON to a file or stdout, progress to a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]


def say(text: str) -> None:
    """One line of talk."""
    print(text, file=sys.stderr)


def note(text: str) -> None:
    """One line that a user should know."""
    say(f"note: {text}")


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), talk: bool = False
) -> None:
    """A table on stdout, columns as wide as their widest cell.

    Args:
        head: names of the columns.
        rows: cells.
        right: numbers of the columns that are set flush right.
        talk: print it to stderr, where stdout has a JSON document.
    """
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=sys.stderr if talk else sys.stdout)


def write_json(place: str, document: Any) -> None:
    """One JSON document to a file, or to stdout where `place` is "-".

    Raises:
        OutputError: the file cannot be written.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if place == "-":
        sys.stdout.write(text)
        return
    from ..checkpoint import write_bytes

    write_bytes(Path(place), text.encode("utf-8"))


def _silent(_done: int, _total: int) -> None:
    """No terminal, no bar."""


def require_folder(path: Path) -> None:
    """Refuse a file whose folder is missing, before the work and not after it.

    Raises:
        OutputError: the folder does not exist.
    """
    from ..errors import OutputError

    if not path.parent.is_dir():
        raise OutputError(f"cannot be written: the folder {path.parent} does not exist", path=path)


@contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A bar with the time left, on a terminal; nothing elsewhere.

    Yields:
        A function that takes what is done and what there is to do.
    """
    if quiet or not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update
