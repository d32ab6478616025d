"""A report as CSV: one line per layer and side, one number per cell, for spreadsheets and pandas.

Column names carry units: `_db`, `_share` (0 to 1), `_octaves`; ranges and scales have the unit of the layer's input.
Unknown values are empty. The file has a header and no comments, so that every reader accepts it. The last two columns
say what made each line, so that lines of several files can be joined.

Names come from files. If a spreadsheet would run one as a formula (it begins with =, +, - or @), an apostrophe is put
in front.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from typing import Any

from .. import __version__
from ..choose import CANDIDATES
from .document import SIGMA_EDGES, Figures, Layer, Report, Side, State

Cell = str | int | float | bool | None


def _columns(layer: Layer, number: int, side: Side, figures: Figures) -> dict[str, Cell]:
    """The columns of a layer's line. Columns are only ever added."""
    crossed = layer.crossed if number == 1 else None
    states = {"before": figures.before, "after": figures.after, "crossed": crossed}
    return {
        "layer": layer.name,
        "side": "AB"[number],
        "label": side.label,
        "out_features": layer.shape[0],
        "in_features": layer.shape[1],
        **_named(figures, "source", "rows", "rows_per_sample", "calls", "multiply_adds"),
        "zeros_share": figures.zeros,
        **_named(figures, "absmax", "rms", "median", "p999"),
        **{
            name.format(suffix): value
            for suffix, state in states.items()
            for name, value in _state_columns(figures, state).items()
        },
        **_named(figures, "changed", "cause", "reason", "unused", "conditioning_dependent"),
        **{
            f"absmax_sigma_{low:g}_to_{high:g}": absmax
            for (high, low), absmax in zip(itertools.pairwise(SIGMA_EDGES), figures.sigma_absmax, strict=True)
        },
        **{f"alone_{name}_db": layer.alone_db.get(name) for name in CANDIDATES},
        "format": figures.stored,
        "bits": figures.bits,
        "inputs": figures.inputs,
        "format_with_more": figures.more,
        "tool": f"convert_to_quant {__version__}",
        "options": "; ".join(f"{key}={_option(value)}" for key, value in side.options.items()),
    }


def _named(figures: Figures, *names: str) -> dict[str, Cell]:
    return {name: getattr(figures, name) for name in names}


def _state_columns(figures: Figures, state: State | None) -> dict[str, Cell]:
    """The columns of one state; all empty if there is none."""
    known = {} if state is None else vars(state)
    return {
        "scale_{}": known.get("scale"),
        "full_precision_{}": known.get("full_precision"),
        "sqnr_{}_db": known.get("sqnr_db"),
        **{f"{loss}_{{}}_share": known.get(loss) for loss in ("clipped", "vanished", "rows_lost")},
        "beyond_{}_octaves": figures.octaves_over(state),
        "risk_{}": known.get("risk"),
    }


_ANY = State(1.0, False)
COLUMNS = tuple(_columns(Layer("", (0, 0), ()), 0, Side(""), Figures(_ANY, _ANY)))
"""Names of all columns."""


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
    """The whole file: a header, and a line for each layer and side that has it."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for layer in report.layers:
        for number, (side, figures) in enumerate(zip(report.sides, layer.sides, strict=True)):
            if figures is not None:
                lines.writerow(map(cell, _columns(layer, number, side, figures).values()))
    return text.getvalue()
