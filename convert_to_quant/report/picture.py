"""A report as one PNG for sharing: the verdict, and below it one row per layer, the riskiest first.

Each row shows how a layer's inputs are distributed over log2(|x| / scale), so that the zones of FP8 are the same
vertical bands in every row; a strip that reaches into the orange band is clipped. One panel shows the current scales,
the next the new ones, or two sides that are compared. Beside them: the range at each noise level, and the outcome. A
mix of formats adds a chart of quality by size and, for each layer, the quality in every format that was tried.

The image is drawn on matplotlib's Agg canvas with its default settings: no window, no pyplot, none of the user's
styles. The same report always gives the same image.

Limits. Above about 150 layers only some rows are labelled. Characters that matplotlib's font lacks become "?".
"""

from __future__ import annotations

import io
import itertools
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator
from numpy.typing import NDArray

from .. import __version__, names
from ..formats import DEFAULT_GRID, FORMATS
from ..kernels import SIGMA_BINS
from ..telling import plural
from . import document
from .document import MIX_WORDS, ZONES, Figures, Report, State
from .page import palette
from .verdict import percent

if TYPE_CHECKING:
    from PIL import Image

Float = NDArray[np.float64]

WIDTH_INCHES, DOTS = 16.0, 100
LAYERS_INCHES, ROW_INCHES, LABEL_INCHES = 20.0, 0.24, 0.13
"""Height of all layers and of one row, both at most; distance of the labels of rows, at least."""
CHART_INCHES, FOOT_INCHES, HEADINGS_INCHES = 4.0, 0.65, 1.6
STRIP_PIXELS = 800

PALETTE = {name: colors[0] for name, colors in palette().items()}
"""The colors of the page."""
INK, FADED, FAINT = (PALETTE[name] for name in ("ink", "soft", "rule"))
BAD = PALETTE["bad"]
UNQUANTIZED = PALETTE["apart"]
"""Strips of layers whose inputs are not quantized: the zones of FP8 do not apply."""
HEAT = LinearSegmentedColormap.from_list("heat", palette()["ramp"]).with_extremes(bad=PALETTE["sunken"])
HEAT_OCTAVES = 2

HEADING, SMALL, TINY = 13.7, 9.4, 8.6
FONT: Any = get_font(findfont(FontProperties(family="DejaVu Sans")))
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": SMALL,
    "text.color": INK,
    "text.parse_math": False,
    "text.hinting": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FADED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "legend.frameon": False,
    "legend.labelcolor": FADED,
    **{f"{axis}tick.{what}": value for axis in "xy" for what, value in {"color": FAINT, "labelcolor": FADED}.items()},
}

FULL_SHARE = 0.06
"""Share of values in a quarter octave at which a strip has its full color, as on the page."""
MOST_POINTS = 6
LINES_PER_INCH = 45
"""Of letters of a size of 1 point."""
NAME_LETTERS, TITLE_LETTERS, FOOT_LETTERS = 44, 32, 150

LARGEST = math.log2(DEFAULT_GRID.max)
NORMAL = math.log2(DEFAULT_GRID.smallest_normal)
VANISHING = math.log2(DEFAULT_GRID.smallest_step / 2)
LOWEST_OCTAVE = -16
COLORS = np.array([to_rgb(PALETTE[zone]) for zone in ZONES])
TINTS = 1 - np.array([[0.1], [0.1], [0.045], [0.1]]) * (1 - COLORS)
"""Colors of the zones where all values lie, and where none does, as on the page."""
FULL_PRECISION = {"one row": ": one token", "rows lost": ": tokens lost", "budget": ": budget"}
"""Why a layer computes in full precision; see `solve.LayerResult.cause`."""

Strip = tuple[Figures, State] | None
"""A layer's inputs and the state they meet; None where a side lacks the layer."""


class Panel(NamedTuple):
    """A column of strips, one per layer."""

    title: str
    subtitle: str
    strips: Sequence[Strip]


def draw(report: Report) -> Image.Image:
    """Draw a report in RGB. The height follows from the number of layers."""
    from PIL import Image

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        canvas = FigureCanvasAgg(figure(report))
        canvas.draw()  # type: ignore[no-untyped-call]
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())  # type: ignore[no-untyped-call]


def png(report: Report) -> bytes:
    """Draw a report into a PNG whose text chunks "Software" and "convert_to_quant" say what made it."""
    from PIL.PngImagePlugin import PngInfo

    made = {
        "version": __version__,
        "options": dict(report.options),
        "sides": document.plain(report.sides),
        "verdict": [report.verdict.headline, *report.verdict.points],
    }
    chunks = PngInfo()
    chunks.add_text("Software", f"convert_to_quant {__version__}")
    chunks.add_text("Title", report.title.encode("ascii", "backslashreplace").decode("ascii"))
    chunks.add_text("convert_to_quant", json.dumps(made))
    encoded = io.BytesIO()
    draw(report).save(encoded, "PNG", pnginfo=chunks)
    return encoded.getvalue()


def figure(report: Report) -> Figure:
    """A report as a matplotlib figure."""
    layers = [report.layers[number] for number in report.riskiest]
    if not report.mixes:  # only scales are shown, so layers without one are left out
        layers = [layer for layer in layers if any(one is not None and not one.inputs for one in layer.sides)] or layers
    report = replace(report, layers=tuple(layers))
    rows = min(LAYERS_INCHES, ROW_INCHES * max(len(layers), 1)) + HEADINGS_INCHES
    heights = [CHART_INCHES, rows] if report.mixes else [rows]
    texts = _head(report)
    head = 0.7 + sum((1 + text.count("\n")) * style["size"] for text, style in texts) / LINES_PER_INCH
    height = head + sum(heights) + FOOT_INCHES
    page = Figure((WIDTH_INCHES, height), DOTS, layout="constrained")
    layout: Any = page.get_layout_engine()
    layout.set(w_pad=0.1, rect=(0.015, FOOT_INCHES / height, 0.97, 1 - (head + FOOT_INCHES) / height))
    *chart, table = page.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _write_head(page, texts, PALETTE[report.verdict.level])
    for part in chart:
        _draw_mix(part.subplots(), report.mixes)
    _draw_layers(table, report)
    command = next((side.apply for side in report.sides if side.apply), "")
    for y, text, color in ((0.42, command, INK), (0.2, _source(report), FADED)):
        page.text(0.3, y, _end(text, FOOT_LETTERS), transform=page.dpi_scale_trans, color=color)
    return page


def _head(report: Report) -> list[tuple[str, Any]]:
    """The title and the verdict: texts of some lines, and their style."""
    points = list(report.verdict.points)
    if len(points) > MOST_POINTS:
        points[MOST_POINTS - 1 :] = [f"And {len(points) - MOST_POINTS + 1} more."]
    said = [(report.title, False), (report.verdict.headline, True), *((point, False) for point in points)]
    small, large = {"size": 10.8, "color": FADED}, {"size": 20, "weight": "bold"}
    return [("\n".join(textwrap.wrap(drawable(text), 86 if big else 165)), large if big else small)
            for text, big in said]  # fmt: skip


def _write_head(page: Figure, texts: Iterable[tuple[str, Any]], color: str) -> None:
    """Write texts from the top, beside a bar of the verdict's color."""
    top = y = page.get_size_inches()[1] - 0.3
    for text, style in texts:
        page.text(0.84, y, text, transform=page.dpi_scale_trans, va="top", **style)
        y -= (1 + text.count("\n")) * style["size"] / LINES_PER_INCH
    page.add_artist(Line2D([0.6, 0.6], [top, y], lw=4.5, color=color, transform=page.dpi_scale_trans))


def _draw_layers(table: SubFigure, report: Report) -> None:
    """All columns of the rows: quality in each format, strips, noise levels; names to the left, outcomes right."""
    panels, mixed, count = _panels(report), bool(report.mixes), len(report.layers)
    states = list(zip(*(panel.strips for panel in panels), strict=True))
    strips = [strip for pair in states for strip in pair if strip is not None and strip[1].scale]
    beyond = [math.log2(figures.absmax) - state.log2_scale for figures, state in strips if figures.absmax]
    columns: list[tuple[float, Callable[[Axes], None]]] = [(4, partial(_draw_alone, report=report))] if mixed else []
    if strips or not mixed:
        draw = partial(_draw_panel, high=min(max(math.ceil(max(beyond)) + 1, 12), 20)) if beyond else _draw_ranges
        shown = [panels[int(report.sides[0].calibrates)]] if mixed else panels
        columns += [(4, partial(draw, panel=panel)) for panel in shown]
        keys = {f"{zone}: {says}": PALETTE[zone] for zone, says in ZONES.items() if beyond}
        keys["full precision: not quantized"] = UNQUANTIZED
        handles = [Patch(color=color, label=text) for text, color in keys.items()]
        table.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    if not mixed or any(one is not None and one.absmax for layer in report.layers for one in layer.sides):
        columns.append((1.6, partial(_draw_levels, report=report)))
    axes = table.subplots(1, len(columns), width_ratios=[width for width, _ in columns], squeeze=False)[0]
    for ax, (_, fill) in zip(axes, columns, strict=True):
        ax.set(xticks=[], yticks=[], ylim=(max(count, 1) - 0.5, -0.5))
        ax.set_frame_on(False)
        ax.xaxis.tick_top()
        fill(ax)

    bare = names.strip_prefix(layer.name for layer in report.layers)[1]
    step = math.ceil(LABEL_INCHES * count / LAYERS_INCHES) or 1
    size = min(SMALL, 50 * max(LABEL_INCHES, LAYERS_INCHES / max(count, 1)))
    where: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center_baseline"}
    for row, (layer, (first, second)) in list(enumerate(zip(report.layers, states, strict=True)))[::step]:
        name, color = bare.get(layer.name, layer.name), BAD if first is not None and first[1].risk else INK
        axes[0].annotate(_end(name, NAME_LETTERS), (0, row), (-6, 0), ha="right", size=size, color=color, **where)
        outcome, color = _outcome(first, second, mixed=mixed)
        axes[-1].annotate(drawable(outcome), (1, row), (6, 0), size=size, color=color, **where)
    axes[-1].annotate("Outcome", (1, 1), (6, 48), "axes fraction", textcoords="offset points",
                      size=HEADING, weight="bold")  # fmt: skip


def _title(ax: Axes, title: str, subtitle: str = "") -> None:
    """A heading at a fixed height over a column, and a line under it."""
    ax.set_title(_end(title, TITLE_LETTERS), loc="left", y=1, pad=48, size=HEADING, weight="bold")
    ax.annotate(_end(subtitle, 2 * TITLE_LETTERS), (0, 1), (0, 36), "axes fraction", textcoords="offset points",
                color=FADED)  # fmt: skip


MARKS: Mapping[str, dict[str, Any]] = {
    "curve": {"color": PALETTE["normal"], "marker": "o", "ms": 3, "lw": 1.6},
    "uniform": {"color": UNQUANTIZED, "marker": "s", "ms": 6, "lw": 0},
    "more": {"color": PALETTE["normal"], "marker": "o", "ms": 7, "lw": 0, "mfc": "none", "mew": 1.6},
    "measured": {"color": PALETTE["saturated"], "marker": "_", "ms": 9, "lw": 1.6},
    "chosen": {"color": PALETTE["saturated"], "marker": "D", "ms": 8, "lw": 0},
}
"""Markers of the chart of sizes, as on the page."""


def _draw_mix(ax: Axes, mixes: Sequence[Mapping[str, Any]]) -> None:
    """Quality by size: the best mixes, one format for all layers, and the file."""
    first = mixes[0]
    uniform: Mapping[str, tuple[float, float]] = first.get("uniform", {})
    points = {
        "curve": first["curve"],
        "uniform": list(uniform.values()),
        "more": [mix["more"] for mix in mixes if "more" in mix],
        "measured": [(mix["bits"], db) for mix in mixes[:1] if "bits" in mix for db in mix.get("measured_db", ())],
        "chosen": [(mix["bits"], mix["expected_db"]) for mix in mixes if {"bits", "expected_db"} <= mix.keys()],
    }
    for name, found in points.items():
        if found:
            ax.plot(*zip(*found, strict=True), **MARKS[name], label=MIX_WORDS[name], zorder=3, clip_on=False)
    for name, point in uniform.items():
        crowded = any(0 < other[0] - point[0] < 1 and abs(other[1] - point[1]) < 3 for other in uniform.values())
        where: Any = {"xytext": (0, 6), "ha": "center"} if crowded else {"xytext": (7, 0), "va": "center"}
        ax.annotate(drawable(name), point, textcoords="offset points", color=FADED, **where)
    ax.grid(axis="y")
    ax.xaxis.set_major_locator(MultipleLocator(1))
    if "weights" in first:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:g}\n{_size(first, bits)}"))
    ax.set_title("Quality by size", loc="left", size=HEADING, weight="bold")
    ax.set_ylabel(f"SQNR of the output, dB, expected on {first.get('on', 'noise')}")
    ax.set_xlabel(
        "bits per weight, scales included; size of " + ("the file" if "other_bytes" in first else "these layers")
    )
    ax.legend(loc="lower right", ncols=5, bbox_to_anchor=(1, 1), borderaxespad=0)


def _size(mix: Mapping[str, Any], bits: float) -> str:
    """The size of a file by its bits per weight."""
    megabytes = (mix["weights"] * bits / 8 + mix.get("other_bytes", 0)) / 1e6
    return f"{megabytes:.3g} MB" if megabytes < 1000 else f"{megabytes / 1000:.3g} GB"


def _draw_alone(ax: Axes, report: Report) -> None:
    """The quality with one layer at a time in each format that was tried; the layer's own format stands out."""
    tried = [
        (row, db, FORMATS[name].bits, side is not None and name == side.stored)
        for row, layer in enumerate(report.layers)
        for side in layer.sides[:1]
        for name, db in layer.alone_db.items()
        if name in FORMATS
    ]
    ax.xaxis.set_major_locator(MultipleLocator(10))
    ax.grid(axis="x")
    for own, marker, size in ((False, "s", 22), (True, "D", 34)):
        rows, decibels, bits = np.array([each[:3] for each in tried if each[3] == own]).reshape(-1, 3).T
        shade: Any = {"color": PALETTE["saturated"]} if own else {"c": bits / 8, "cmap": HEAT, "vmin": 0, "vmax": 1}
        area = size * min(1, 60 / max(len(report.layers), 1))
        ax.scatter(decibels, rows, area, marker=marker, lw=0, zorder=3, **shade)
    _title(ax, "Each layer alone", "SQNR of the output in each format, dB")
    ax.set_xlabel(MIX_WORDS["tried"])


def _draw_panel(ax: Axes, panel: Panel, high: float) -> None:
    """Every layer's inputs relative to its scale, in the zones of FP8."""
    _title(ax, panel.title, panel.subtitle)
    low, edges = LOWEST_OCTAVE, (VANISHING, NORMAL, LARGEST)
    octaves = low + (np.arange(STRIP_PIXELS) + 0.5) / STRIP_PIXELS * (high - low)
    strips = [_strip(one, octaves) for one in panel.strips]
    _show_rows(ax, np.rint(np.reshape(strips, (-1, STRIP_PIXELS, 3)) * 255).astype(np.uint8), (low, high))
    ax.set_xticks([*edges[:2], 0, LARGEST], ["2⁻¹⁰", "2⁻⁶", "1", f"{DEFAULT_GRID.max:g}"])
    middles = [(start + end) / 2 for start, end in itertools.pairwise((low, *edges, high))]
    ax.set_xticks(middles, ZONES, minor=True)
    ax.tick_params(axis="x", which="minor", length=0, pad=18, labelsize=TINY)
    for label, zone in zip(ax.get_xticklabels(minor=True), ZONES, strict=True):
        label.set_color(PALETTE[f"{zone}-text"])
    ax.set_xlabel("|x| / scale, in octaves; the black mark is the largest input")


def _draw_ranges(ax: Axes, panel: Panel) -> None:
    """The range of FP8 at each scale, where no inputs were observed."""
    _title(ax, panel.title, panel.subtitle)
    for row, strip in enumerate(panel.strips):
        if strip is not None and strip[1].scale:
            start, color = strip[1].log2_scale, PALETTE["apart" if strip[1].full_precision else "normal"]
            ax.barh(row, LARGEST - VANISHING, 0.7, start + VANISHING, color=FAINT)
            ax.barh(row, LARGEST - NORMAL, 0.7, start + NORMAL, color=color)
    ax.xaxis.set_major_locator(MultipleLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda octave, _: f"{2**octave:.4g}"))
    ax.set_xlabel("|x|; each bar is the range of FP8 at this scale; colored: its normal zone")


def _show_rows(ax: Axes, rows: Any, ends: tuple[float, float], **how: Any) -> None:
    """Layers as rows of pixels, with white lines between them where they are high enough."""
    ax.set_xlim(ends)
    if len(rows):
        ax.imshow(rows, extent=(*ends, len(rows) - 0.5, -0.5), aspect="auto", interpolation="nearest", **how)
    if len(rows) * LABEL_INCHES <= LAYERS_INCHES:
        width = 14.4 * min(ROW_INCHES, LAYERS_INCHES / max(len(rows), 1))
        ax.hlines(np.arange(len(rows) + 1) - 0.5, *ends, color="white", lw=width, capstyle="projecting")


def _strip(strip: Strip, octaves: Float) -> Float:
    """The colors of a layer's inputs along octaves of |x| / scale, [n, 3]."""
    zones = np.searchsorted((VANISHING, NORMAL, LARGEST), octaves, side="right")
    under, colors = TINTS[zones], COLORS[zones]
    if strip is not None and strip[0].inputs:
        return np.ones((len(octaves), 3))
    mixed: Float = under
    if strip is None or not strip[1].scale or strip[0].density is None or not strip[0].absmax:
        return mixed
    state = strip[1]
    if state.full_precision:
        colors = np.broadcast_to(to_rgb(UNQUANTIZED), colors.shape)
    position = (octaves + state.log2_scale - document.AXIS_LOW) * document.CELLS_PER_OCTAVE - 0.5
    levels = np.interp(position, np.arange(document.CELLS), strip[0].density.astype(np.float64), left=0, right=0)
    end = int(np.searchsorted(octaves, math.log2(strip[0].absmax) - state.log2_scale, side="right"))
    levels[end:] = 0  # the cell of the largest value reaches beyond it
    shares = 10 ** ((levels - 1) * document.DENSITY_DECADES / 254 - document.DENSITY_DECADES)
    least = 0.14 if state.full_precision else np.where(octaves > LARGEST, 0.42, 0.05)  # clipped values must be visible
    opacity = (levels > 0) * (least + (1 - least) * np.minimum(1, (shares / FULL_SHARE) ** 0.4))
    mixed = under + (colors - under) * opacity[:, None]
    mixed[max(end - 2, 0) : end] = to_rgb(INK)
    return mixed


def _draw_levels(ax: Axes, report: Report) -> None:
    """The range at each noise level, relative to the largest of the layer."""
    octaves = np.full((len(report.layers), SIGMA_BINS), np.nan)
    for row, layer in enumerate(report.layers):
        for one in filter(None, layer.sides[::-1]):
            if one.absmax:
                octaves[row] = np.log2(np.maximum(np.array(one.sigma_absmax, np.float64), 1e-30) / one.absmax)
    octaves = octaves[:, ~np.isnan(octaves).all(0)]  # a run of few steps has few levels
    _title(ax, "Noise levels", "" if octaves.size else "not recorded")
    if octaves.size:
        _show_rows(ax, octaves, (0, 1), cmap=HEAT, vmin=-HEAT_OCTAVES, vmax=0)
        ax.set_xticks([0.1, 0.9], ["noise", "image"])
        ax.set_xlabel("pale: range 1/4 of the\nlargest; dark: all of it")


def _panels(report: Report) -> tuple[Panel, Panel]:
    """What stands side by side: before and after, or what differs between two sides."""

    def strips(side: int, which: str) -> list[Strip]:
        sides = [layer.sides[side] for layer in report.layers]
        return [None if figures is None else (figures, getattr(figures, which)) for figures in sides]

    if len(report.sides) == 1:
        (side,) = report.sides
        current = "current scales" if side.model is not None else "a scale of 1.0"
        chosen = f"scales from {side.options['method']}"
        chosen += f" × {side.options['margin']:g}" if side.options["margin"] else ""
        return Panel("As it is", current, strips(0, "before")), Panel("Calibrated", chosen, strips(0, "after"))
    first, second = (side.label for side in report.sides)
    crossed = [layer.crossed for layer in report.layers]
    if any(crossed):
        words = f"scales calibrated on {first}"
        met = [
            None if strip is None or state is None else (strip[0], state)
            for strip, state in zip(strips(1, "after"), crossed, strict=True)
        ]
        return Panel(f"Inputs of {first}", words, strips(0, "after")), Panel(f"Inputs of {second}", words, met)
    which, words = "after", "new scales"
    if [strip and strip[1] for strip in strips(0, "before")] != [strip and strip[1] for strip in strips(1, "before")]:
        which, words = "before", "current scales"
    return Panel(first, words, strips(0, which)), Panel(second, words, strips(1, which))


def drawable(text: str) -> str:
    r"""A text with "?" for characters that the font lacks: names come from files.

    >>> drawable("a\x1b × 模 β")
    'a? × ? β'
    """
    return "".join(sign if sign.isprintable() and FONT.get_char_index(ord(sign)) else "?" for sign in text)


def _end(text: str, letters: int) -> str:
    """The end of a text that is too long: it tells layers apart."""
    return drawable(text if len(text) <= letters else f"…{text[1 - letters :]}")


def _outcome(first: Strip, second: Strip, *, mixed: bool) -> tuple[str, str]:
    """What a layer's two states mean, in a few words and a color; in a mix, after its format."""
    stored = f"{second[0].stored}: " if mixed and second is not None and second[0].stored else ""
    if first is None or second is None:
        return f"{stored}only on one side", FADED
    before, (figures, after) = first[1], second
    if figures.inputs:
        return f"{stored}inputs {figures.inputs}", FADED
    if figures.unused:
        return f"{stored}scale not used", FADED
    if after.full_precision:
        return f"{stored}full precision{FULL_PRECISION.get(figures.cause, '')}", PALETTE["warning"]
    if not figures.seen:
        scales = dict.fromkeys("none" if state.scale is None else f"{state.scale:.3g}" for state in (before, after))
        never = "" if len(scales) > 1 or stored else "not observed: "
        return f"{stored}{never}scale {' → '.join(scales)}", FADED
    ratios = dict.fromkeys(f"{round(state.sqnr_db)}" for state in (before, after) if state.sqnr_db is not None)
    words = " → ".join(ratios) + " dB"
    worst = after if after.risk else before
    if not worst.risk:
        return stored + words, FADED
    share = (worst.clipped or 0) if worst.risk == "clips" else 0
    clipped = f" {percent(share)}" if share >= 1e-5 else ""
    return f"{stored}{worst.risk}{clipped}: {words}", BAD


def _source(report: Report) -> str:
    """What made the image."""
    parts = [f"convert_to_quant {__version__}"]
    for side in report.sides:
        how = (plural(side.samples, "image") if side.samples else "", side.conditioning and f"on {side.conditioning}")
        said = " ".join(filter(None, how))
        parts.append(" + ".join(filter(None, (*side.statistics, side.model))) + (said and f" ({said})"))
    return " · ".join(parts)
