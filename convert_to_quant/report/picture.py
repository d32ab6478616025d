"""A report as one picture for sharing: the verdict, and under it every layer as a row.

Each row shows how a layer's inputs are spread, as a strip over log2(|x| / scale): so the zones of FP8 are the same
vertical bands for all layers, and a strip that reaches into the red one is clipped. One panel shows the scales as they
are, the next the new ones; of two sides, what differs between them. Beside them stand the range over noise levels, and
what becomes of the layer.

matplotlib lays it out and draws it, through its Agg canvas alone: no window, no global figure, none of the user's
styles. So the same report is the same picture.

Limits. Beyond some 170 layers names thin out, and colours stand for the outcomes. Letters that the font of matplotlib
lacks become "?".
"""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from .. import __version__, names
from ..formats import DEFAULT_GRID
from ..kernels import SIGMA_BINS
from .document import AXIS_LOW, CELLS, CELLS_PER_OCTAVE, Figures, Layer, Report, State
from .verdict import percent

if TYPE_CHECKING:
    from PIL import Image

Float = NDArray[np.float64]

WIDTH = 1600
"""Pixels of a picture by default."""
LEAST_WIDTH, LARGEST_WIDTH = 800, 8000

WIDTH_INCHES = 16.0
"""What all sizes below are meant for; the resolution follows from the pixels."""
ROWS_INCHES, LEAST_ROW, LARGEST_ROW, READABLE_ROW = 20.0, 0.01, 0.24, 0.12
"""Height of all rows, and of one: at least and at most, and from which on it has its own name and text."""
STRIP_PIXELS = 800
"""Points at which a strip is computed."""

INK, FADED, FAINT, BLANK = "#1f2328", "#59636e", "#d0d7de", "#f4f4f4"
LEVEL_COLORS = {"good": "#1a7f37", "warning": "#9a6700", "bad": "#cf222e"}
UNQUANTIZED = "#88929e"
"""Strips of layers whose inputs stay as they are: FP8's zones say nothing about them."""
HEAT = LinearSegmentedColormap.from_list("heat", ["#f7f5fc", "#a08ccd", "#402278"]).with_extremes(bad=BLANK)
HEAT_OCTAVES = 2
"""A noise level whose range is 2⁻² of the layer's, or less, is pale."""

STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.4, "text.color": INK, "text.parse_math": False,
    "axes.titlesize": 13.7, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 36,
    "axes.titley": 1.0,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.spines.bottom": False,
    "axes.labelcolor": FADED, "xtick.color": FAINT, "xtick.labelcolor": FADED, "xtick.labelsize": 8.6,
    "xtick.bottom": False, "xtick.labelbottom": False, "xtick.top": True, "xtick.labeltop": True,
    "ytick.left": False, "figure.facecolor": "white", "legend.frameon": False, "legend.labelcolor": FADED,
}  # fmt: skip
"""matplotlib's settings, over its own defaults; the font comes with it."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MOST_POINTS = 6
LINE_LETTERS = {20: 86, 10.8: 165}
"""Letters of a line across the picture, by the size of the font."""
NAME_LETTERS, TITLE_LETTERS, FATE_LETTERS = 44, 56, 32


LARGEST = math.log2(DEFAULT_GRID.max)
NORMAL = math.log2(DEFAULT_GRID.smallest_normal)
VANISHING = math.log2(DEFAULT_GRID.smallest_step / 2)
EDGES = (VANISHING, NORMAL, LARGEST)
ZONES = ("vanished", "subnormal", "normal", "saturated")
"""What FP8 does with log2(|x| / scale) under, between and over the edges."""
TINTS, COLORS = (np.array([to_rgb(color) for color in colors]) for colors in (
    ("#eef0f3", "#fff7db", "#e8f5f2", "#ffe8e6"), ("#424a53", "#b07800", "#0b6870", "#c41626")))  # fmt: skip
"""Their colours where nothing is, and where everything is."""
FULL_PRECISION = {"one row": ": one row", "rows lost": ": rows lost", "budget": ": budget"}
"""Why a layer computes in full precision, in a word; see `solve.LayerResult.cause`."""


_UNSEEN = Figures(State(0.0, False), State(0.0, False))


@dataclass(frozen=True)
class Panel:
    """One column of strips.

    Attributes:
        title, subtitle: above it.
        rows: per layer its inputs and the state they meet, or None where there are none.
    """

    title: str
    subtitle: str
    rows: Sequence[tuple[Figures, State] | None]


def draw(report: Report, width_pixels: int = WIDTH) -> Image.Image:
    """Draw a report.

    Args:
        report: what `figures.build` made.
        width_pixels: of the picture, 800 to 8,000; its height follows from the number of layers.

    Returns:
        An RGB image; of the same report always the same.
    """
    from PIL import Image

    assert LEAST_WIDTH <= width_pixels <= LARGEST_WIDTH, width_pixels
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        canvas = FigureCanvasAgg(figure(report, width_pixels))
        canvas.draw()  # type: ignore[no-untyped-call]
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())  # type: ignore[no-untyped-call]


def png(report: Report, width_pixels: int = WIDTH) -> bytes:
    """Draw a report into a PNG that says what made it, in the text chunks "Software" and "convert_to_quant".

    Args:
        report: what `figures.build` made.
        width_pixels: see `draw`.
    """
    from PIL.PngImagePlugin import PngInfo

    said = {
        "version": __version__,
        "options": dict(report.options),
        "sides": [side.to_json() for side in report.sides],
        "verdict": [report.verdict.headline, *report.verdict.points],
    }
    chunks = PngInfo()
    chunks.add_text("Software", f"convert_to_quant {__version__}")
    chunks.add_text("Title", report.title.encode("ascii", "backslashreplace").decode("ascii"))
    chunks.add_text("convert_to_quant", json.dumps(said))
    encoded = io.BytesIO()
    draw(report, width_pixels).save(encoded, "PNG", pnginfo=chunks)
    return encoded.getvalue()


def figure(report: Report, width_pixels: int = WIDTH) -> Figure:
    """A report as a figure of matplotlib: two panels of strips, the noise levels, and text around them."""
    panels = _panels(report)
    count = len(report.layers)
    row = min(max(ROWS_INCHES / max(count, 1), LEAST_ROW), LARGEST_ROW)
    lines = list(_head(report))
    head, body = 0.6 + sum(size / 45 for _, size, _ in lines), 2.3 + row * max(count, 1)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, rect=(0.012, 0, 0.976, 1))
    page = Figure((WIDTH_INCHES, head + body), width_pixels / WIDTH_INCHES, layout=layout)
    top, bottom = page.subfigures(2, 1, height_ratios=[head, body])  # type: ignore[misc]
    _draw_head(top, lines, LEVEL_COLORS[report.verdict.level], head)
    axes = bottom.subplots(1, 3, width_ratios=[10, 10, 4])
    span = _span(panels)
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel, span, row)
    _draw_heat(axes[2], report, row)
    axes[1].set_yticks([])
    for ax in axes:
        ax.set_ylim(max(count, 1) - 0.5, -0.5)
    _label_rows(axes, report, panels, row)
    _draw_legend(bottom, axes, span[2])
    bottom.supxlabel(drawable(_source(report)), x=0.98, ha="right", color=FADED, fontsize=8.6)
    return page


def _head(report: Report) -> Iterator[tuple[str, float, str]]:
    """What it is about, and the verdict: lines, the sizes of their letters, and their colours."""
    points = report.verdict.points
    if len(points) > MOST_POINTS:
        points = (*points[: MOST_POINTS - 1], f"And {len(points) - MOST_POINTS + 1} more.")
    for text, size, color in ((report.title, 10.8, FADED), (report.verdict.headline, 20, INK),
                              *((point, 10.8, FADED) for point in points)):  # fmt: skip
        for line in textwrap.wrap(drawable(text), LINE_LETTERS[size]):
            yield line, size, color


def _draw_head(top: Any, lines: Sequence[tuple[str, float, str]], color: str, height: float) -> None:
    """Lines of text beside a bar of the verdict's colour."""
    left, y = 0.4 / WIDTH_INCHES, 0.3
    for text, size, ink in lines:
        y += size / 60
        weight = "bold" if ink == INK else "normal"
        top.text(left + 0.015, 1 - y / height, text, size=size, color=ink, weight=weight, va="baseline")
        y += size / 180
    top.add_artist(Line2D([left, left], [1 - 0.3 / height, 1 - y / height], lw=4.5, color=color))


def _span(panels: Sequence[Panel]) -> tuple[float, float, bool]:
    """What all panels show, in octaves: log2(|x| / scale), or log2 |x| where only scales are known; then also True."""
    rows = [row for panel in panels for row in panel.rows if row is not None and row[1].scale]
    if not any(figures.seen for figures, _ in rows):
        scales = [math.log2(state.scale) for _, state in rows] or [0.0]
        return math.floor(min(scales) + VANISHING - 2), math.ceil(max(scales) + LARGEST + 2), True
    highest = max(math.log2(figures.absmax / state.scale) for figures, state in rows if figures.absmax)
    return -16, min(max(math.ceil(highest) + 1, 12), 20), False


def _draw_panel(ax: Axes, panel: Panel, span: tuple[float, float, bool], row: float) -> None:
    """A panel: its heading, its axis, and every layer's strip."""
    low, high, absolute = span
    octaves = low + (np.arange(STRIP_PIXELS) + 0.5) / STRIP_PIXELS * (high - low)
    under = TINTS[np.searchsorted(EDGES, octaves, side="right")]
    if absolute:
        under = np.tile(to_rgb(BLANK), (STRIP_PIXELS, 1))
    strips = [
        under if one is None or not one[1].scale else _strip(*one, octaves, under, absolute) for one in panel.rows
    ]
    _image(ax, strips, (low, high), row)
    title = drawable(_end(panel.title, TITLE_LETTERS))
    ax.set_title(title)
    ax.set_title(drawable(_end(panel.subtitle, TITLE_LETTERS)), loc="right", size=9.4, weight="normal", color=FADED)
    if absolute:
        decades = range(math.ceil(low * math.log10(2)), math.floor(high * math.log10(2)) + 1, 2)
        ax.set_xticks(
            [decade / math.log10(2) for decade in decades],
            [f"10{str(decade).translate(SUPERSCRIPTS)}" for decade in decades],
        )
        ax.set_xlabel("|x|; each bar is what FP8 can hold at this scale")
    else:
        ax.set_xticks([VANISHING, NORMAL, 0, LARGEST], ["2⁻¹⁰", "2⁻⁶", "1", f"{DEFAULT_GRID.max:g}"])
        ax.set_xlabel("|x| / scale, in octaves; the mark is the largest |x|")
        ends = (low, *EDGES, high)
        for zone, start, end, color in zip(ZONES, ends, ends[1:], COLORS, strict=False):
            ax.annotate(zone, ((start + end) / 2, 1), (0, 20), xycoords=ax.get_xaxis_transform(), ha="center",
                        textcoords="offset points", color=color)  # fmt: skip


def _image(ax: Axes, rows: Any, ends: tuple[float, float], row: float, **how: Any) -> None:
    """Rows of pixels, with white lines between them where they are high enough."""
    if len(rows):
        ax.imshow(rows, extent=(*ends, len(rows) - 0.5, -0.5), aspect="auto", interpolation="nearest", **how)
    if row >= READABLE_ROW:
        ax.hlines(np.arange(len(rows) + 1) - 0.5, *ends, color="white", lw=row * 72 / 5)


def _strip(figures: Figures, state: State, octaves: Float, under: Float, absolute: bool) -> Float:
    """How a layer's inputs lie in the zones or, on an axis of log2 |x|, where the zones are: [n, 3]."""
    relative = octaves - math.log2(state.scale) if absolute else octaves
    colors = COLORS[np.searchsorted(EDGES, relative, side="right")]
    if state.full_precision:
        colors = np.tile(to_rgb(UNQUANTIZED), (len(octaves), 1))
    if absolute:
        return _mix(under, colors, 0.7 * ((relative >= VANISHING) & (relative < LARGEST)))
    if figures.density is None or not figures.absmax:
        return under
    position = (octaves + math.log2(state.scale) - AXIS_LOW) * CELLS_PER_OCTAVE - 0.5
    levels = np.interp(position, np.arange(CELLS), figures.density.astype(np.float64), left=0, right=0) / 255
    end = int(np.searchsorted(octaves, math.log2(figures.absmax / state.scale), side="right"))
    levels[end:] = 0  # the cell that holds the largest value reaches beyond it
    strength: Float = levels**1.5 * (0.8 if state.full_precision else 1)
    if not state.full_precision:  # beyond the largest code a single value is worth seeing
        strength = np.where((octaves > LARGEST) & (levels > 0), 0.4 + 0.6 * strength, strength)
    strip = _mix(under, colors, strength)
    strip[max(end - 3, 0) : end] = colors[max(end - 1, 0)]
    return strip


def _mix(under: Float, over: Float, share: NDArray[Any]) -> Float:
    """Colours over others, [n, 3], as far as each share says."""
    mixed: Float = under + (over - under) * share[:, None]
    return mixed


def _draw_heat(ax: Axes, report: Report, row: float) -> None:
    """The range over noise levels, each layer's largest being dark."""
    seen = [next((one for one in layer.sides if one is not None and one.absmax), _UNSEEN) for layer in report.layers]
    ranges = np.array([one.sigma_absmax for one in seen], np.float64).reshape(-1, SIGMA_BINS)  # None becomes NaN
    octaves = np.log2(np.maximum(ranges, 1e-30) / np.array([[one.absmax or 1.0] for one in seen]).reshape(-1, 1))
    octaves = octaves[:, ~np.isnan(octaves).all(0)]  # a run of few steps meets few levels
    ax.set_title("Noise levels")
    if not octaves.size:
        ax.set_xticks([])
        ax.set_xlabel("not recorded")
        return
    _image(ax, octaves, (0, 1), row, cmap=HEAT, vmin=-HEAT_OCTAVES, vmax=0)
    noise, image = ax.set_xticks([0, 1], ["noise", "picture"])
    noise.label2.set_horizontalalignment("left")
    image.label2.set_horizontalalignment("right")


def _panels(report: Report) -> tuple[Panel, Panel]:
    """What stands side by side: before and after, or what differs between two sides."""

    def rows(side: int, which: str) -> list[tuple[Figures, State] | None]:
        all_figures = [layer.sides[side] for layer in report.layers]
        return [None if figures is None else (figures, getattr(figures, which)) for figures in all_figures]

    if len(report.sides) == 1:
        has_model = report.sides[0].model is not None
        return (
            Panel("As it is", "present scales" if has_model else "a scale of 1.0", rows(0, "before")),
            Panel("Calibrated", _solving(report), rows(0, "after")),
        )
    first, second = (side.label for side in report.sides)
    if any(layer.crossed is not None for layer in report.layers):
        met = [
            None if layer.crossed is None or figures is None else (figures, layer.crossed)
            for layer, figures in ((layer, layer.sides[1]) for layer in report.layers)
        ]
        return (
            Panel(f"Inputs of {first}", f"scales calibrated on {first}", rows(0, "after")),
            Panel(f"Inputs of {second}", f"scales calibrated on {first}", met),
        )
    which, words = "after", "new scales"
    if any(_differs(layer, "before") for layer in report.layers):
        which, words = "before", "present scales"
    return Panel(first, words, rows(0, which)), Panel(second, words, rows(1, which))


def _differs(layer: Layer, which: str) -> bool:
    states = [None if figures is None else getattr(figures, which) for figures in layer.sides]
    return states[0] != states[1]


def _solving(report: Report) -> str:
    """How the new scales were chosen, in a word or two."""
    options = report.sides[0].options
    text = f"scales from {options['method']}"
    return text + (f" × {options['margin']:g}" if options["margin"] else "")


def _draw_legend(bottom: Any, axes: Any, absolute: bool) -> None:
    """What shades mean."""
    gray = Patch(color=UNQUANTIZED, label="in full precision: not quantized")
    axes[1].legend(handles=[gray], loc="upper right", bbox_to_anchor=(1, -0.0), borderaxespad=2.4)
    if absolute:
        return
    shades = _mix(TINTS[2], COLORS[2], np.linspace(0, 1, 256) ** 1.5)
    for ax, cmap, shrink, ends, label in (
        (axes[0], ListedColormap(shades), 0.4, ("10⁻⁸", "1"), "share of values"),
        (axes[2], HEAT, 0.8, ("1/4", "largest"), "range"),
    ):
        bar = bottom.colorbar(ScalarMappable(cmap=cmap), ax=ax, location="bottom", shrink=shrink, aspect=20, pad=0.01)
        bar.outline.set_visible(False)
        bar.set_ticks([0, 1], labels=ends)
        bar.set_label(label)


def _label_rows(axes: Any, report: Report, panels: Sequence[Panel], row: float) -> None:
    """Names at the left, those at risk in the first panel in red; what becomes of each layer at the right."""
    full = [layer.name for layer in report.layers]
    bare = names.strip_prefix(full)[1]
    readable = row >= READABLE_ROW
    numbers = range(0, len(full), 1 if readable else math.ceil(0.16 / row))
    size = min(9.4, 50 * row) if readable else 8
    shown = [drawable(_end(bare.get(full[number], full[number]), NAME_LETTERS)) for number in numbers]
    axes[0].set_yticks(numbers, shown, size=size)
    fates = [_fate(*states) for states in zip(panels[0].rows, panels[1].rows, strict=True)]
    axes[2].annotate("Outcome", (1, 1), (12, STYLE["axes.titlepad"]), xycoords="axes fraction", weight="bold",
                     textcoords="offset points", size=STYLE["axes.titlesize"])  # fmt: skip
    right = axes[2].yaxis
    right.tick_right()
    right.set_tick_params(length=0, pad=9)
    right.set_ticks(range(len(full)), [drawable(text[:FATE_LETTERS]) for text, _ in fates], size=size)
    for label, state in zip(axes[0].get_yticklabels(), panels[0].rows, strict=False):
        label.set_color(LEVEL_COLORS["bad"] if readable and state is not None and state[1].risk else INK)
    if readable:
        for label, (_, color) in zip(right.get_ticklabels(), fates, strict=True):
            label.set_color(color)
        return
    right.set_ticks([])
    marks = [(number, color) for number, (_, color) in enumerate(fates) if color != FADED]
    if marks:
        where, colors = zip(*marks, strict=True)
        axes[2].hlines(where, 1.06, 1.16, colors=colors, lw=max(72 * row, 0.8), clip_on=False,
                       transform=axes[2].get_yaxis_transform())  # fmt: skip


@cache
def _letters() -> Any:
    return get_font(findfont(FontProperties(family="DejaVu Sans")))


def drawable(text: str) -> str:
    r"""A text with "?" for letters that the font lacks: names come from files.

    >>> drawable("a\x1b × 模 β")
    'a? × ? β'
    """
    return "".join(sign if sign.isprintable() and _letters().get_char_index(ord(sign)) else "?" for sign in text)


def _end(text: str, most: int) -> str:
    """A text without its beginning where it is long: the end of a layer's name tells it apart."""
    return text if len(text) <= most else "…" + text[1 - most :]


def _fate(first: tuple[Figures, State] | None, second: tuple[Figures, State] | None) -> tuple[str, str]:
    """What a layer's two states mean, in few words and a colour."""
    if first is None or second is None:
        return "only on one side", FADED
    before, (figures, after) = first[1], second
    if figures.unused:
        return "its scale is not read", FADED
    if after.full_precision:
        return "full precision" + FULL_PRECISION.get(figures.cause, ""), LEVEL_COLORS["warning"]
    if not figures.seen:
        scales = dict.fromkeys(f"{state.scale:.3g}" for state in (before, after))
        return ("scale " if len(scales) > 1 else "never seen: scale ") + " → ".join(scales), FADED
    ratios = dict.fromkeys(f"{round(state.sqnr_db)}" for state in (before, after) if state.sqnr_db is not None)
    words = " → ".join(ratios) + " dB"
    worst = after if after.risk else before
    if not worst.risk:
        return words, FADED
    share = (worst.clipped or 0) if worst.risk == "clips" else 0
    return f"{worst.risk}{f' {percent(share)}' if share >= 1e-5 else ''}: {words}", LEVEL_COLORS["bad"]


def _source(report: Report) -> str:
    """What made the picture."""
    parts = [f"convert_to_quant {__version__}"]
    for side in report.sides:
        files = " + ".join((*side.statistics, *([side.model] if side.model else [])))
        how = [
            f"{side.samples} samples" if side.samples else "",
            f"on {side.conditioning}" if side.conditioning else "",
        ]
        parts.append(f"{files} ({' '.join(word for word in how if word)})" if any(how) else files)
    return " · ".join(parts)
