"""A report as one picture for sharing: the verdict, and under it a line for every layer.

The riskiest layers stand first, in the page's colours. Each line shows how a layer's inputs are spread, as a strip over
log2(|x| / scale): so the zones of FP8 are the same vertical bands for all layers, and a strip that reaches into the
orange one is clipped. One panel shows the scales as they are, the next the new ones; of two sides, what differs between
them. Beside them stand the range over noise levels, and what becomes of the layer; below, the command that applies it.

Of a mix of formats, a chart above the layers shows what each size keeps, and the first panel what each layer alone
keeps in every format that was tried.

matplotlib draws it, through its Agg canvas alone: no window, no global figure, none of the user's styles. So the same
report is the same picture. Places are in inches: measuring texts to lay them out would take as long as drawing them.

Limits. Beyond some 170 layers names thin out, and colours stand for the outcomes. Letters that the font of matplotlib
lacks become "?".
"""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from .. import __version__, names
from ..formats import DEFAULT_GRID, FORMATS
from ..kernels import SIGMA_BINS
from ..telling import plural
from .document import (
    AXIS_LOW,
    CELLS,
    CELLS_PER_OCTAVE,
    DENSITY_DECADES,
    MIX_WORDS,
    ZONES,
    Figures,
    Report,
    State,
    plain,
)
from .page import palette
from .verdict import percent

if TYPE_CHECKING:
    from PIL import Image

Float = NDArray[np.float64]

WIDTH_INCHES, DOTS = 16.0, 100
"""Width of a picture, and pixels per inch."""
CHART = 4.2
"""Inches that the chart of a mix takes, with its words."""
LAYERS_INCHES, LEAST_LAYER, LARGEST_LAYER, READABLE_LAYER = 20.0, 0.01, 0.24, 0.12
"""Height of all layers, and of one: at least and at most, and from which on it has its own name and text."""
EDGE, GAP, ABOVE, BELOW, LEVELS = 0.3, 0.25, 0.9, 1.2, 1.7
"""Inches around everything, between panels, above layers for headings, under them for legends; of noise levels."""
STRIP_PIXELS = 800
"""Points at which a strip is computed."""

PALETTE = {name: colors[0] for name, colors in palette().items()}
"""The page's colours."""
INK, FADED, FAINT, BLANK = (PALETTE[name] for name in ("ink", "soft", "rule", "sunken"))
LEVEL_COLORS = {level: PALETTE[level] for level in ("good", "warning", "bad")}
UNQUANTIZED = PALETTE["apart"]
"""Strips of layers whose inputs stay as they are: FP8's zones say nothing about them."""
HEAT = LinearSegmentedColormap.from_list("heat", palette()["ramp"]).with_extremes(bad=BLANK)
HEAT_OCTAVES = 2
"""A noise level whose range is 2⁻² of the layer's, or less, is pale."""

HEADING, SMALL, TINY = 13.7, 9.4, 8.6
BOLD = 1.15
"""Bold letters are wider than others of their size."""
FONT: Any = get_font(findfont(FontProperties(family="DejaVu Sans")))
STYLE: Any = {"font.family": "DejaVu Sans", "text.color": INK, "text.parse_math": False, "text.hinting": "none"}
"""matplotlib's settings, over its own defaults; the font comes with it."""

TICKS: Any = {"color": FAINT, "labelcolor": FADED}
GRID: Any = {"color": FAINT, "lw": 0.6}

FULL_SHARE = 0.06
"""Share of values in a quarter octave from which on a strip has its full colour, as on the page."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MOST_POINTS = 6
LINE_LETTERS = {20: 86, 10.8: 165}
"""Letters of a line across the picture, by the size of the font."""
NAME_INCHES = 3.3
"""The longest name that is shown whole."""

LARGEST = math.log2(DEFAULT_GRID.max)
NORMAL = math.log2(DEFAULT_GRID.smallest_normal)
VANISHING = math.log2(DEFAULT_GRID.smallest_step / 2)
EDGES = (VANISHING, NORMAL, LARGEST)
COLORS = np.array([to_rgb(PALETTE[zone]) for zone in ZONES])
TINTS = 1 - np.array([[0.1], [0.1], [0.045], [0.1]]) * (1 - COLORS)
"""Colours of the zones where most is, and where nothing is, as on the page."""
BARE = np.ones((STRIP_PIXELS, 3))
"""The strip of a layer without an input scale."""
FULL_PRECISION = {"one row": ": one token", "rows lost": ": tokens lost", "budget": ": budget"}
"""Why a layer computes in full precision, in a word; see `solve.LayerResult.cause`."""

_UNSEEN = Figures(State(0.0, False), State(0.0, False))

Strip = tuple[Figures, State] | None
"""A layer's inputs and the state they meet, or None where there are none."""


class Panel(NamedTuple):
    """One column of strips, one per layer, and what stands above it."""

    title: str
    subtitle: str
    strips: Sequence[Strip]


def draw(report: Report) -> Image.Image:
    """Draw a report in RGB, as high as the number of layers asks for; of the same report always the same."""
    from PIL import Image

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        canvas = FigureCanvasAgg(figure(report))
        canvas.draw()  # type: ignore[no-untyped-call]
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())  # type: ignore[no-untyped-call]


def png(report: Report) -> bytes:
    """Draw a report into a PNG that says what made it, in the text chunks "Software" and "convert_to_quant"."""
    from PIL.PngImagePlugin import PngInfo

    said = {
        "version": __version__,
        "options": dict(report.options),
        "sides": plain(report.sides),
        "verdict": [report.verdict.headline, *report.verdict.points],
    }
    chunks = PngInfo()
    chunks.add_text("Software", f"convert_to_quant {__version__}")
    chunks.add_text("Title", report.title.encode("ascii", "backslashreplace").decode("ascii"))
    chunks.add_text("convert_to_quant", json.dumps(said))
    encoded = io.BytesIO()
    draw(report).save(encoded, "PNG", pnginfo=chunks)
    return encoded.getvalue()


def figure(report: Report) -> Figure:
    """A report as a figure of matplotlib: two panels of strips, the noise levels, and text around them."""
    drawn = [report.layers[number] for number in report.riskiest]
    if not report.mixes:  # where scales are all there is to see, layers without one are not
        drawn = [layer for layer in drawn if any(one is not None and not one.inputs for one in layer.sides)] or drawn
    report = replace(report, layers=tuple(drawn))
    panels = _panels(report)
    count = max(len(drawn), 1)
    tall = count * min(max(LAYERS_INCHES / count, LEAST_LAYER), LARGEST_LAYER)
    bare = names.strip_prefix(layer.name for layer in drawn)[1]
    shown = [_end(drawable(bare.get(layer.name, layer.name)), NAME_INCHES) for layer in drawn]
    states = zip(*(panel.strips for panel in panels), strict=True)
    outcomes = [_outcome(first, second, mixed=bool(report.mixes)) for first, second in states]
    lines = list(_head(report))
    top = BELOW + tall
    chart = CHART if report.mixes else 0.0
    height = top + ABOVE + 0.6 + chart + sum(size / 45 for _, size, _ in lines)
    page = Figure((WIDTH_INCHES, height), DOTS)
    _draw_head(page, lines, LEVEL_COLORS[report.verdict.level], height - EDGE)

    left = EDGE + max(map(_inches, shown), default=0)
    right = WIDTH_INCHES - EDGE - max(_inches("Outcome", BOLD * HEADING), *(_inches(text) for text, _ in outcomes), 0)
    width = (right - left - LEVELS - 3 * GAP) / 2
    span = _span(panels)
    boxes = [Bbox.from_bounds(left + number * (width + GAP), BELOW, width, tall) for number in range(2)]
    heat = Bbox([(right - GAP - LEVELS, BELOW), (right - GAP, top)])
    scaled = not report.mixes or any(strip is not None and strip[1].scale for panel in panels for strip in panel.strips)
    observed = not report.mixes or any(one is not None and one.absmax for layer in report.layers for one in layer.sides)
    if report.mixes:
        ends = (EDGE + 0.7, top + ABOVE + 0.95), (WIDTH_INCHES - EDGE, top + ABOVE + chart - 0.65)
        _draw_mix(page, Bbox(ends), report.mixes)
        wide = Bbox([(left, BELOW), ((heat.x0 if observed else right) - GAP, top)])
        _draw_alone(page, boxes[0] if scaled else wide, report)
        panels = panels[int(report.sides[0].calibrates)], panels[1]
        boxes = boxes[1:] if scaled else []
    for box, panel in zip(boxes, panels, strict=False):
        _draw_panel(page, box, panel, span)
    if observed:
        _draw_levels(page, heat, report)

    _write(page, right, top + 0.6, "Outcome", size=HEADING, color=INK, weight="bold")
    risky = [strip is not None and bool(strip[1].risk) for strip in panels[0].strips]
    _draw_layers(page, Bbox([(left, BELOW), (right, top)]), shown, risky, outcomes)
    legend = {} if span.absolute else {f"{zone}: {says}": PALETTE[zone] for zone, says in ZONES.items()}
    key = left
    for says, color in {**legend, "in full precision: nothing is cut": UNQUANTIZED}.items() if boxes else ():
        _draw_key(page, Bbox.from_bounds(key, 0.72, 0.14, 0.14), [to_rgb(color)], says)
        key += 0.4 + _inches(says)
    command = next((side.apply for side in report.sides if side.apply), "")
    _write(page, left, 0.46, _end(command, heat.x0 - left), color=INK)
    source = _end(_source(report), WIDTH_INCHES - 2 * EDGE, TINY)
    _write(page, WIDTH_INCHES - EDGE, 0.2, source, size=TINY, ha="right")
    return page


def _write(page: Figure, x: float, y: float, text: str, *, size: float = SMALL, color: Any = FADED, **how: Any) -> None:
    """A text at a place in inches."""
    page.text(x, y, drawable(text), transform=page.dpi_scale_trans, size=size, color=color, **how)


def _head(report: Report) -> Iterator[tuple[str, float, str]]:
    """What it is about, and the verdict: lines, the sizes of their letters, and their colours."""
    verdict, points = report.verdict, list(report.verdict.points)
    if len(points) > MOST_POINTS:
        points[MOST_POINTS - 1 :] = [f"And {len(points) - MOST_POINTS + 1} more."]
    faded = [(text, 10.8, FADED) for text in (report.title, *points)]
    for text, size, color in (faded[0], (verdict.headline, 20, INK), *faded[1:]):
        for line in textwrap.wrap(drawable(text), LINE_LETTERS[size]):
            yield line, size, color


def _draw_head(page: Figure, lines: Sequence[tuple[str, float, str]], color: str, top: float) -> None:
    """Lines of text beside a bar of the verdict's colour."""
    left, y = 2 * EDGE, top
    for text, size, ink in lines:
        y -= size / 60
        _write(page, left + 0.24, y, text, size=size, color=ink, weight="bold" if ink == INK else "normal")
        y -= size / 180
    page.add_artist(Line2D([left, left], [top, y], lw=4.5, color=color, transform=page.dpi_scale_trans))


MARKS: Mapping[str, dict[str, Any]] = {
    "curve": {"color": PALETTE["normal"], "marker": "o", "ms": 3, "lw": 1.6},
    "uniform": {"color": UNQUANTIZED, "marker": "s", "ms": 6, "lw": 0},
    "more": {"color": PALETTE["normal"], "marker": "o", "ms": 7, "lw": 0, "mfc": "none", "mew": 1.6},
    "measured": {"color": PALETTE["saturated"], "marker": "_", "ms": 9, "lw": 1.6},
    "chosen": {"color": PALETTE["saturated"], "marker": "D", "ms": 8, "lw": 0},
}
"""How the points of a mix are marked, as on the page."""


def _draw_mix(page: Figure, box: Bbox, mixes: Sequence[Mapping[str, Any]]) -> None:
    """What each size keeps: the best mixes, one format for all layers, and the file."""
    ax = _axes(page, box)
    ax.grid(axis="y", **GRID)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(labelsize=SMALL, **TICKS)
    first = mixes[0]
    points = {
        "curve": first["curve"],
        "uniform": sorted(first.get("uniform", {}).values()),
        "more": [mix["more"] for mix in mixes if "more" in mix],
        "measured": [(mix["bits"], db) for mix in mixes[:1] if "bits" in mix for db in mix.get("measured_db", ())],
        "chosen": [(mix["bits"], mix["expected_db"]) for mix in mixes if {"bits", "expected_db"} <= mix.keys()],
    }
    bits, decibels = ([point[number] for some in points.values() for point in some] for number in (0, 1))
    across = math.floor(min(bits) - 0.5), math.ceil(max(bits))
    ax.set(xlim=across)
    low = 10 * math.floor(min(decibels) / 10)
    ax.set(ylim=(low, max(10 * math.ceil(max(decibels) / 10), low + 10)))
    key, below = box.x0, box.y0 - 0.62
    for name, found in points.items():
        if found:
            ax.plot(*zip(*found, strict=True), **MARKS[name], zorder=3, clip_on=False)
            ends = [key, key + 0.2] if name == "curve" else [key + 0.1]
            page.add_artist(Line2D(ends, [below] * len(ends), transform=page.dpi_scale_trans, **MARKS[name]))
            _write(page, key + 0.3, below - 0.05, MIX_WORDS[name])
            key += 0.6 + _inches(MIX_WORDS[name])
    for name, (at, db) in first.get("uniform", {}).items():
        crowded = any(0 < other - at < 1 and abs(height - db) < 3 for other, height in points["uniform"])
        where: Any = ((0, 7), "center", "bottom") if crowded else ((7, 0), "left", "center")
        ax.annotate(drawable(name), (at, db), where[0], textcoords="offset points", size=SMALL, color=FADED,
                    ha=where[1], va=where[2], zorder=4,
                    bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.5})  # fmt: skip
    if "weights" in first:
        ticks = range(across[0], across[1] + 1)
        ax.set_xticks(ticks, [f"{bits}\n{_size(first, bits)}" for bits in ticks])
    _write(page, box.x0 - 0.7, box.y1 + 0.42, "What each size keeps", size=HEADING, color=INK, weight="bold")
    _write(page, box.x0 - 0.7, box.y1 + 0.18, f"dB of the velocity, expected on {first.get('on', 'noise')}")
    says = "bits per weight, scales included; size of " + ("the file" if "other_bytes" in first else "these layers")
    _write(page, box.x1, box.y1 + 0.18, says, ha="right")


def _size(mix: Mapping[str, Any], bits: float) -> str:
    """What a file takes with so many bits per weight."""
    megabytes = (mix["weights"] * bits / 8 + mix.get("other_bytes", 0)) / 1e6
    return f"{megabytes:.3g} MB" if megabytes < 1000 else f"{megabytes / 1000:.3g} GB"


def _draw_alone(page: Figure, box: Bbox, report: Report) -> None:
    """What each layer alone keeps of the velocity in every format that was tried; the one that it has stands out."""
    tried = [
        (row, db, FORMATS[name].bits, side is not None and name == side.stored)
        for row, layer in enumerate(report.layers)
        for side in layer.sides[:1]
        for name, db in layer.alone_db.items()
        if name in FORMATS
    ]
    ends = (min((db for _, db, _, _ in tried), default=0) - 3, max((db for _, db, _, _ in tried), default=1) + 3)
    ax = _rows(page, box, ends, len(report.layers))
    ax.xaxis.set_major_locator(MultipleLocator(10))
    ax.grid(axis="x", **GRID)
    size = min(box.height / max(len(report.layers), 1) * 72 * 0.5, 6.0)
    for own, mark, scale in ((False, "s", 1.0), (True, "D", 1.3)):
        rows, decibels, bits = np.array([each[:3] for each in tried if each[3] == own]).reshape(-1, 3).T
        shade: Any = {"color": PALETTE["saturated"]} if own else {"c": bits / 8, "cmap": HEAT, "vmin": 0, "vmax": 1}
        ax.scatter(decibels, rows, (scale * size) ** 2, marker=mark, lw=0, zorder=3, **shade)
    _write(page, box.x0, box.y1 + 0.6, "Each layer alone", size=HEADING, color=INK, weight="bold")
    _write(page, box.x1, box.y1 + 0.6, "dB of the velocity, by format", ha="right")
    _write(page, (box.x0 + box.x1) / 2, box.y0 - 0.2, MIX_WORDS["tried"], ha="center")


class Span(NamedTuple):
    """What all panels show, in octaves: log2(|x| / scale), or log2 |x| where only scales are known."""

    low: float
    high: float
    absolute: bool = False


def _span(panels: Sequence[Panel]) -> Span:
    strips = [strip for panel in panels for strip in panel.strips if strip is not None and strip[1].scale]
    if not any(figures.seen for figures, _ in strips):
        scales = [state.log2_scale for _, state in strips] or [0.0]
        return Span(math.floor(min(scales) + VANISHING - 2), math.ceil(max(scales) + LARGEST + 2), absolute=True)
    highest = max(math.log2(figures.absmax) - state.log2_scale for figures, state in strips if figures.absmax)
    return Span(-16, min(max(math.ceil(highest) + 1, 12), 20))


def _draw_panel(page: Figure, box: Bbox, panel: Panel, span: Span) -> None:
    """A panel: its heading, its axis, and every layer's strip."""
    low, high, absolute = span
    octaves = low + (np.arange(STRIP_PIXELS) + 0.5) / STRIP_PIXELS * (high - low)
    under = TINTS[np.searchsorted(EDGES, octaves, side="right")]
    if absolute:
        under = np.tile(to_rgb(BLANK), (STRIP_PIXELS, 1))
    strips = [_strip(one, octaves, under, absolute) for one in panel.strips]
    pixels = np.rint(np.reshape(strips, (-1, STRIP_PIXELS, 3)) * 255).astype(np.uint8)
    ax = _image(page, box, pixels, (low, high))
    subtitle = _end(panel.subtitle, box.width / 2)
    title = _end(panel.title, box.width - _inches(subtitle), BOLD * HEADING)
    _write(page, box.x0, box.y1 + 0.6, title, size=HEADING, color=INK, weight="bold")
    _write(page, box.x1, box.y1 + 0.6, subtitle, ha="right")
    if absolute:
        decades = range(math.ceil(low * math.log10(2)), math.floor(high * math.log10(2)) + 1, 2)
        ax.set_xticks(
            [decade / math.log10(2) for decade in decades],
            [f"10{str(decade).translate(SUPERSCRIPTS)}" for decade in decades],
        )
        says = "|x|; each bar is what FP8 can hold at this scale"
    else:
        ax.set_xticks([VANISHING, NORMAL, 0, LARGEST], ["2⁻¹⁰", "2⁻⁶", "1", f"{DEFAULT_GRID.max:g}"])
        says = "|x| / scale, in octaves; the mark is the largest seen"
        ends = (low, *EDGES, high)
        for zone, start, end in zip(ZONES, ends, ends[1:], strict=False):
            middle = box.width * ((start + end) / 2 - low) / (high - low)
            place, side = (0, "left") if start == low else (middle, "center")
            _write(page, box.x0 + place, box.y1 + 0.32, zone, color=PALETTE[f"{zone}-text"], size=TINY, ha=side)
    _write(page, (box.x0 + box.x1) / 2, box.y0 - 0.2, says, ha="center")


def _axes(page: Figure, box: Bbox) -> Axes:
    """Axes at a place in inches."""
    width, height = page.get_size_inches()
    return page.add_axes((box.x0 / width, box.y0 / height, box.width / width, box.height / height))


def _rows(page: Figure, box: Bbox, ends: tuple[float, float], count: int) -> Axes:
    """Axes with a row for every layer, and what is across above them."""
    ax = _axes(page, box)
    ax.set(xlim=ends, ylim=(max(count, 1) - 0.5, -0.5), yticks=[], xticks=[], frame_on=False)
    ax.xaxis.tick_top()
    ax.tick_params(labelsize=TINY, **TICKS)
    return ax


def _image(page: Figure, box: Bbox, layers: Any, ends: tuple[float, float], **how: Any) -> Axes:
    """Layers as rows of pixels, with white lines between them where they are high enough."""
    ax, each = _rows(page, box, ends, len(layers)), box.height / max(len(layers), 1)
    if len(layers):
        ax.imshow(layers, extent=(*ends, *ax.get_ylim()), aspect="auto", interpolation="nearest", **how)
    if each >= READABLE_LAYER:
        ax.hlines(np.arange(len(layers) + 1) - 0.5, *ends, color="white", lw=each * 14.4, capstyle="projecting")
    return ax


def _draw_key(page: Figure, box: Bbox, colors: Any, says: str) -> None:
    """What shades mean: a bar of them, and words."""
    _image(page, box, [colors], (0, 1))
    _write(page, box.x1 + 0.1, box.y0 + 0.02, says)


def _draw_layers(
    page: Figure, box: Bbox, shown: Sequence[str], risky: Sequence[bool], outcomes: Sequence[tuple[str, str]]
) -> None:
    """Names at the left, those at risk in red; what becomes of each layer at the right.

    Where layers are lower than letters, some have their names, and colours stand for the outcomes.
    """
    each = box.height / max(len(shown), 1)
    readable = each >= READABLE_LAYER
    size = min(SMALL, 50 * each) if readable else 8
    for number in range(0, len(shown), 1 if readable else math.ceil(0.16 / each)):
        y = box.y1 - (number + 0.5) * each
        color = LEVEL_COLORS["bad"] if readable and risky[number] else INK
        _write(page, box.x0 - 0.1, y, shown[number], size=size, color=color, ha="right", va="center_baseline")
        if readable:
            text, color = outcomes[number]
            _write(page, box.x1, y, text, size=size, color=color, va="center_baseline")
    if not readable:
        marks = {box.y1 - (number + 0.5) * each: color for number, (_, color) in enumerate(outcomes) if color != FADED}
        ends = [((box.x1, y), (box.x1 + 0.25, y)) for y in marks]
        page.add_artist(LineCollection(ends, colors=list(marks.values()), linewidths=max(72 * each, 0.8),
                                       transform=page.dpi_scale_trans))  # fmt: skip


def _strip(strip: Strip, octaves: Float, under: Float, absolute: bool) -> Float:
    """How a layer's inputs lie in the zones or, on an axis of log2 |x|, where the zones are: [n, 3]."""
    if strip is not None and strip[0].inputs:
        return BARE
    if strip is None or not strip[1].scale:
        return under
    figures, state = strip
    relative = octaves - state.log2_scale if absolute else octaves
    colors = COLORS[np.searchsorted(EDGES, relative, side="right")]
    if state.full_precision:
        colors = np.tile(to_rgb(UNQUANTIZED), (len(octaves), 1))
    if absolute:
        return _mix(under, colors, 0.7 * ((relative >= VANISHING) & (relative < LARGEST)))
    if figures.density is None or not figures.absmax:
        return under
    position = (octaves + state.log2_scale - AXIS_LOW) * CELLS_PER_OCTAVE - 0.5
    levels = np.interp(position, np.arange(CELLS), figures.density.astype(np.float64), left=0, right=0)
    end = int(np.searchsorted(octaves, math.log2(figures.absmax) - state.log2_scale, side="right"))
    levels[end:] = 0  # the cell that holds the largest value reaches beyond it
    shares = 10 ** ((levels - 1) * DENSITY_DECADES / 254 - DENSITY_DECADES)
    least = 0.14 if state.full_precision else np.where(octaves > LARGEST, 0.42, 0.05)  # what is cut off must be seen
    mixed = _mix(under, colors, (levels > 0) * (least + (1 - least) * np.minimum(1, (shares / FULL_SHARE) ** 0.4)))
    mixed[max(end - 2, 0) : end] = to_rgb(INK)
    return mixed


def _mix(under: Float, over: Float, share: NDArray[Any]) -> Float:
    """Colours over others, [n, 3], as far as each share says."""
    mixed: Float = under + (over - under) * share[:, None]
    return mixed


def _draw_levels(page: Figure, box: Bbox, report: Report) -> None:
    """The range over noise levels, each layer's largest being dark."""
    seen = [next((one for one in layer.sides if one is not None and one.absmax), _UNSEEN) for layer in report.layers]
    ranges = np.array([one.sigma_absmax for one in seen], np.float64).reshape(-1, SIGMA_BINS)  # None becomes NaN
    octaves = np.log2(np.maximum(ranges, 1e-30) / np.array([[one.absmax or 1.0] for one in seen]).reshape(-1, 1))
    octaves = octaves[:, ~np.isnan(octaves).all(0)]  # a run of few steps meets few levels
    _write(page, box.x0, box.y1 + 0.6, "Noise levels", size=HEADING, color=INK, weight="bold")
    if not octaves.size:
        _write(page, box.x0, box.y1 + 0.1, "not recorded")
        return
    _image(page, box, octaves, (0, 1), cmap=HEAT, vmin=-HEAT_OCTAVES, vmax=0)
    _write(page, box.x0, box.y1 + 0.1, "noise", size=TINY)
    _write(page, box.x1, box.y1 + 0.1, "image", size=TINY, ha="right")
    shades = HEAT(np.linspace(0, 1, 256))
    _draw_key(page, Bbox.from_bounds(box.x0, 0.44, 0.8, 0.14), shades, "range, 1/4 of the largest to all of it")


def _panels(report: Report) -> tuple[Panel, Panel]:
    """What stands side by side: before and after, or what differs between two sides."""

    def strips(side: int, which: str) -> list[Strip]:
        sides = [layer.sides[side] for layer in report.layers]
        return [None if figures is None else (figures, getattr(figures, which)) for figures in sides]

    if len(report.sides) == 1:
        (side,) = report.sides
        present = "present scales" if side.model is not None else "a scale of 1.0"
        chosen = f"scales from {side.options['method']}"
        chosen += f" × {side.options['margin']:g}" if side.options["margin"] else ""
        return Panel("As it is", present, strips(0, "before")), Panel("Calibrated", chosen, strips(0, "after"))
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
        which, words = "before", "present scales"
    return Panel(first, words, strips(0, which)), Panel(second, words, strips(1, which))


@cache
def _advance(letter: str) -> float:
    """How wide a letter is, for a size of 1 inch."""
    FONT.set_size(72, 72)
    return float(FONT.load_char(ord(letter)).linearHoriAdvance) / 65536 / 72


def _inches(text: str, size: float = SMALL) -> float:
    """How wide a text is, with a little air."""
    return 1.08 * size / 72 * sum(map(_advance, text)) + 0.1


def drawable(text: str) -> str:
    r"""A text with "?" for letters that the font lacks: names come from files.

    >>> drawable("a\x1b × 模 β")
    'a? × ? β'
    """
    return "".join(sign if sign.isprintable() and FONT.get_char_index(ord(sign)) else "?" for sign in text)


def _end(text: str, inches: float, size: float = SMALL) -> str:
    """A text without its beginning where there is no room for it: the end of a layer's name tells it apart."""
    if _inches(text, size) <= inches:
        return text
    text = text[-500:]
    while text and _inches("…" + text, size) > inches:
        text = text[1:]
    return "…" + text


def _outcome(first: Strip, second: Strip, *, mixed: bool) -> tuple[str, str]:
    """What a layer's two states mean, in few words and a colour; in a mix, its format before it."""
    stored = f"{second[0].stored}: " if mixed and second is not None and second[0].stored else ""
    if first is None or second is None:
        return f"{stored}only on one side", FADED
    before, (figures, after) = first[1], second
    if figures.inputs:
        return f"{stored}inputs {figures.inputs}", FADED
    if figures.unused:
        return f"{stored}its scale is not read", FADED
    if after.full_precision:
        return f"{stored}full precision{FULL_PRECISION.get(figures.cause, '')}", LEVEL_COLORS["warning"]
    if not figures.seen:
        scales = dict.fromkeys("none" if state.scale is None else f"{state.scale:.3g}" for state in (before, after))
        never = "" if len(scales) > 1 or stored else "never seen: "
        return f"{stored}{never}scale {' → '.join(scales)}", FADED
    ratios = dict.fromkeys(f"{round(state.sqnr_db)}" for state in (before, after) if state.sqnr_db is not None)
    words = " → ".join(ratios) + " dB"
    worst = after if after.risk else before
    if not worst.risk:
        return stored + words, FADED
    share = (worst.clipped or 0) if worst.risk == "clips" else 0
    told = f" {percent(share)}" if share >= 1e-5 else ""
    return f"{stored}{worst.risk}{told}: {words}", LEVEL_COLORS["bad"]


def _source(report: Report) -> str:
    """What made the picture."""
    parts = [f"convert_to_quant {__version__}"]
    for side in report.sides:
        files = " + ".join(filter(None, (*side.statistics, side.model)))
        how = (plural(side.samples, "image") if side.samples else "", side.conditioning and f"on {side.conditioning}")
        parts.append(f"{files} ({' '.join(filter(None, how))})" if any(how) else files)
    return " · ".join(parts)
