"""A report as CSV: one line per layer and side, one number per cell, for spreadsheets and pandas.

Names of columns carry their units: `_db`, `_share` (0 to 1), `_octaves`; ranges and scales have the unit of the layer's
input. What is not known is empty. Nothing but the head and the lines is in the file, no comments, so that every reader
takes it; what made it stands in the last two columns of every line, so that lines of several files can be joined.

Names come from files. One that a spreadsheet would compute (it begins with =, +, - or @) gets an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import __version__
from .document import SIGMA_EDGES, Figures, Layer, Report, Side, State

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Line:
    """What a line is made from."""

    layer: Layer
    number: int
    side: Side
    figures: Figures


def _state_columns(suffix: str, state_of: Callable[[Line], State | None]) -> dict[str, Callable[[Line], Cell]]:
    """The columns of one state."""

    def column(name: str) -> Callable[[Line], Cell]:
        return lambda line: None if (state := state_of(line)) is None else getattr(state, name)

    return {
        f"scale_{suffix}": column("scale"),
        f"full_precision_{suffix}": column("full_precision"),
        f"sqnr_{suffix}_db": column("sqnr_db"),
        f"clipped_{suffix}_share": column("clipped"),
        f"vanished_{suffix}_share": column("vanished"),
        f"rows_lost_{suffix}_share": column("rows_lost"),
        f"beyond_{suffix}_octaves": lambda line: line.figures.octaves_over(state_of(line)),
        f"risk_{suffix}": column("risk"),
    }


def _figure(name: str) -> Callable[[Line], Cell]:
    return lambda line: getattr(line.figures, name)


def _level(number: int) -> Callable[[Line], Cell]:
    return lambda line: line.figures.sigma_absmax[number]


COLUMNS: Mapping[str, Callable[[Line], Cell]] = {
    "layer": lambda line: line.layer.name,
    "side": lambda line: "AB"[line.number],
    "label": lambda line: line.side.label,
    "out_features": lambda line: line.layer.shape[0],
    "in_features": lambda line: line.layer.shape[1],
    "source": _figure("source"),
    "rows": _figure("rows"),
    "rows_per_sample": _figure("rows_per_sample"),
    "calls": _figure("calls"),
    "multiply_adds": _figure("multiply_adds"),
    "zeros_share": _figure("zeros"),
    "absmax": _figure("absmax"),
    "rms": _figure("rms"),
    "median": _figure("median"),
    "p999": _figure("p999"),
    **_state_columns("before", lambda line: line.figures.before),
    **_state_columns("after", lambda line: line.figures.after),
    # of two sides that saw different inputs: the first side's new scale on the second side's inputs
    **_state_columns("crossed", lambda line: line.layer.crossed if line.number == 1 else None),
    "changed": _figure("changed"),
    "cause": _figure("cause"),
    "reason": _figure("reason"),
    "unused": _figure("unused"),
    "conditioning_dependent": _figure("conditioning_dependent"),
    **{
        f"absmax_sigma_{low:g}_to_{high:g}": _level(number)
        for number, (high, low) in enumerate(itertools.pairwise(SIGMA_EDGES))
    },
    "tool": lambda _: f"convert_to_quant {__version__}",
    "options": lambda line: "; ".join(f"{key}={_option(value)}" for key, value in line.side.options.items()),
}
"""Name of each column -> what stands in it. Columns are only ever added."""


def rows(report: Report) -> Iterator[list[str]]:
    """The cells of every line, the head first."""
    yield list(COLUMNS)
    for layer in report.layers:
        for number, (side, figures) in enumerate(zip(report.sides, layer.sides, strict=True)):
            if figures is not None:
                line = Line(layer, number, side, figures)
                yield [cell(column(line)) for column in COLUMNS.values()]


def cell(value: Cell) -> str:
    """One value as text.

    >>> [cell(value) for value in (None, True, 3, 0.1, 1e-9, "=1+1", "blocks.0", math.inf)]
    ['', 'true', '3', '0.1', '1e-09', "'=1+1", 'blocks.0', '']
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.9g}"
    text = str(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") and isinstance(value, str) else text


def _option(value: Any) -> str:
    return " ".join(value) if isinstance(value, (list, tuple)) else cell(value)


def render(report: Report) -> str:
    """The whole file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows(report))
    return text.getvalue()
