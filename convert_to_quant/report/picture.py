"""A report as one picture for sharing: the verdict, and under it every layer as a row.

Each row shows how a layer's inputs are spread, as a strip over log2(|x| / scale): so the zones of FP8 are the same
vertical bands for all layers, and a strip that reaches into the red one is clipped. One panel shows the scales as they
are, the next the new ones; of two sides, what differs between them. Beside them stand the range over noise levels, and
what becomes of the layer.

matplotlib draws, through its Agg canvas alone: no window, no global figure, none of the user's styles. Everything has
whole pixels from the top left corner, so that the same report is the same picture.

Limits. Beyond a few hundred layers rows are a few pixels high; names thin out then, and the text beside rows is left
out. Letters that the font of matplotlib lacks become "?".
"""

from __future__ import annotations

import bisect
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray

from .. import __version__, names
from ..fp8 import E4M3FN
from ..kernels import SIGMA_BINS
from .document import AXIS_LOW, CELLS, CELLS_PER_OCTAVE, Figures, Layer, Report, State
from .verdict import percent

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
Float = NDArray[np.float64]
Color = tuple[int, int, int]

WIDTH = 1600
"""Pixels for which all sizes below are meant; another width scales them."""
LEAST_WIDTH, LARGEST_WIDTH = 800, 8000

DPI = 100
FONT = "DejaVu Sans"  # comes with matplotlib
INK, FADED, FAINT, PAGE = (31, 35, 40), (89, 99, 110), (208, 215, 222), (255, 255, 255)
LEVEL_COLORS = {"good": (26, 127, 55), "warning": (154, 103, 0), "bad": (207, 34, 46)}

MARGIN, GAP = 40, 18
LARGEST_NAME_WIDTH, HEAT_WIDTH, TEXT_WIDTH = 330, 168, 214
ROWS_HEIGHT, LEAST_ROW, LARGEST_ROW = 2000, 1, 24
"""Pixels for all rows, and for one; where both cannot be, the least row decides."""
SMALLEST_MARKED_ROW = 4
"""The largest value is marked in rows of at least so many pixels."""
READABLE_ROW = 12
"""A row of so many pixels has its own name and text."""
MOST_POINTS = 6


@dataclass(frozen=True)
class Zone:
    """A band of |x| / scale.

    Attributes:
        title: what FP8 does there.
        low, high: octaves, log2(|x| / scale).
        tint: where nothing is.
        color: where everything is.
    """

    title: str
    low: float
    high: float
    tint: Color
    color: Color


LARGEST = math.log2(E4M3FN.max)
NORMAL = 1 - E4M3FN.bias
VANISHING = math.log2(E4M3FN.smallest_subnormal / 2)
ZONES = (
    Zone("vanished", -math.inf, VANISHING, (238, 240, 243), (66, 74, 83)),
    Zone("subnormal", VANISHING, NORMAL, (255, 247, 219), (176, 120, 0)),
    Zone("normal", NORMAL, LARGEST, (232, 245, 242), (11, 104, 112)),
    Zone("saturated", LARGEST, math.inf, (255, 232, 230), (196, 22, 38)),
)
FULL_PRECISION = {"one row": ": one row", "rows lost": ": rows lost", "budget": ": budget"}
"""Why a layer computes in full precision, in a word; see `solve.LayerResult.cause`."""

NORMAL_ZONE = ZONES[2]
UNQUANTIZED = (136, 146, 158)
"""Strips of layers whose inputs stay as they are: FP8's zones say nothing about them."""

BLANK = 244
"""Grey of what was not seen."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

HEAT = ((247, 245, 252), (160, 140, 205), (64, 34, 120))
HEAT_OCTAVES = 2
"""A noise level whose range is 2⁻² of the layer's, or less, is pale."""


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
    assert LEAST_WIDTH <= width_pixels <= LARGEST_WIDTH, width_pixels
    panels = _panels(report)
    plan = _Plan(report, width_pixels)
    canvas = _Canvas(width_pixels, plan.height)
    _draw_head(canvas, plan, report)
    _draw_names(canvas, plan, panels[0])
    axis = _axis(panels)
    for number, panel in enumerate(panels):
        _draw_panel(canvas, plan, panel, plan.panel_left(number), axis)
    _draw_heat(canvas, plan, report)
    _draw_fates(canvas, plan, panels)
    _draw_legend(canvas, plan, report, axis)
    return canvas.image()


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
    return text + (f" × {options['margin']:g}" if options["margin"] != 1 else "")


@dataclass(frozen=True)
class Axis:
    """What the panels' horizontal axis is.

    Attributes:
        low, high: its ends, in octaves.
        absolute: log2 |x|, on which every row has its own zones; else log2(|x| / scale), with zones for all.
    """

    low: float
    high: float
    absolute: bool = False


def _axis(panels: Sequence[Panel]) -> Axis:
    """What all panels show: log2(|x| / scale), or log2 |x| where no inputs were seen and only scales are known."""
    rows = [row for panel in panels for row in panel.rows if row is not None and row[1].scale]
    if not any(figures.seen for figures, _ in rows):
        scales = [math.log2(state.scale) for _, state in rows] or [0.0]
        return Axis(math.floor(min(scales) + VANISHING - 2), math.ceil(max(scales) + LARGEST + 2), absolute=True)
    highest = max(math.log2(figures.absmax / state.scale) for figures, state in rows if figures.absmax)
    return Axis(-16, min(max(math.ceil(highest) + 1, 12), 20))


@dataclass(frozen=True)
class Line:
    """A line of text above the rows.

    Attributes:
        y: its baseline, in pixels from the top.
        text, size, color, bold: what is written, and how.
    """

    y: int
    text: str
    size: float
    color: Color = INK
    bold: bool = False


class _Plan:
    """Where everything stands, in pixels from the top left corner."""

    def __init__(self, report: Report, width: int) -> None:
        self.unit = width / WIDTH
        self.width = width
        full = [layer.name for layer in report.layers]
        bare = names.strip_prefix(full)[1]
        self.names = [bare.get(name, name) for name in full]
        count = max(len(full), 1)
        self.row = max(min(self.px(ROWS_HEIGHT) // count, self.px(LARGEST_ROW)), LEAST_ROW)
        self.readable = self.row >= self.px(READABLE_ROW)
        self.gap = self.row // 6
        self.name_size = min(13 * self.unit, 0.7 * self.row) if self.readable else 11 * self.unit
        widest = max((measure(name, self.name_size) for name in self.names), default=0)
        names_width = min(math.ceil(widest), self.px(LARGEST_NAME_WIDTH))
        self.names_right = self.px(MARGIN) + names_width
        self.panels_left = self.names_right + self.px(GAP)
        self.text_left = width - self.px(MARGIN) - self.px(TEXT_WIDTH)
        self.heat_left = self.text_left - self.px(GAP) - self.px(HEAT_WIDTH)
        self.panel_width = (self.heat_left - self.panels_left - 2 * self.px(GAP)) // 2
        self.head = _head_lines(report, self)
        self.top = self.head[-1].y + self.px(112)
        self.bottom = self.top + self.row * count
        self.height = self.bottom + self.px(118)

    def px(self, pixels: float) -> int:
        """Pixels at the width of the picture."""
        return max(round(pixels * self.unit), 1)

    def panel_left(self, number: int) -> int:
        """Where a panel begins."""
        return self.panels_left + number * (self.panel_width + self.px(GAP))

    def row_top(self, number: int) -> int:
        """Where a row begins."""
        return self.top + number * self.row


class _Canvas:
    """A page of pixels; y counts from the top."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=_rgb(PAGE))
        self.canvas = FigureCanvasAgg(self.figure)

    def text(
        self, x: float, y: float, text: str, size: float, color: Color = INK, *,
        bold: bool = False, across: str = "left", down: str = "baseline",
    ) -> None:  # fmt: skip
        """One line; `across` and `down` say what of it stands at x and y."""
        self.figure.text(
            x, self.height - y, drawable(text), transform=IdentityTransform(), color=_rgb(color), ha=across, va=down,
            fontproperties=_font(size, bold), parse_math=False,
        )  # fmt: skip

    def box(self, corner: tuple[float, float], width: float, height: float, color: Color) -> None:
        """A filled rectangle below and right of a corner."""
        x, y = corner[0], self.height - corner[1] - height
        shape = Rectangle((x, y), width, height, transform=IdentityTransform(), facecolor=_rgb(color), linewidth=0)
        shape.set_antialiased(False)
        self.figure.add_artist(shape)

    def pixels(self, x: int, y: int, pixels: Pixels) -> None:
        """An image [height, width, 3] as it is."""
        if pixels.size:
            self.figure.figimage(pixels, x, self.height - y - len(pixels), origin="upper", zorder=0)

    def image(self) -> Image.Image:
        """What was drawn."""
        from PIL import Image

        self.canvas.draw()  # type: ignore[no-untyped-call]
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[:, :, :3].copy())  # type: ignore[no-untyped-call]


def _rgb(color: Color) -> tuple[float, float, float]:
    return color[0] / 255, color[1] / 255, color[2] / 255


@cache
def _font(size: float, bold: bool) -> FontProperties:
    """A font of so many pixels."""
    return FontProperties(family=FONT, size=size * 72 / DPI, weight="bold" if bold else "normal")


@cache
def _letters(bold: bool) -> Any:
    return get_font(findfont(_font(10, bold)))


def drawable(text: str) -> str:
    r"""A text with "?" for letters that the font lacks: names come from files.

    >>> drawable("a\x1b × 模 β")
    'a? × ? β'
    """
    font = _letters(False)
    return "".join(letter if letter.isprintable() and font.get_char_index(ord(letter)) else "?" for letter in text)


def measure(text: str, size: float, bold: bool = False) -> float:
    """Width of a text in pixels."""
    font = _letters(bold)
    font.set_size(size * 72 / DPI, DPI)
    font.set_text(drawable(text), 0.0)
    return float(font.get_width_height()[0]) / 64


def wrap(text: str, size: float, width: float, bold: bool = False) -> list[str]:
    """A text in lines of at most so many pixels; a word that is longer stands alone."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and measure(f"{lines[-1]} {word}", size, bold) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def shorten(text: str, size: float, width: float) -> str:
    """A name that fits, without its beginning where it must be: the end of a layer's name tells it apart."""
    if measure(text, size) <= width:
        return text
    ends = range(1, len(text))  # from the longest end to the shortest
    fitting = bisect.bisect_left(ends, True, key=lambda start: measure("…" + text[start:], size) <= width)
    return "…" + text[ends[min(fitting, len(ends) - 1)] :] if ends else text


def _head_lines(report: Report, plan: _Plan) -> list[Line]:
    """The verdict, wrapped."""
    width = plan.width - 2 * plan.px(MARGIN) - plan.px(24)
    y = plan.px(46)
    lines = [Line(y, report.title, 15 * plan.unit, FADED)]
    y += plan.px(10)
    for text in wrap(report.verdict.headline, 27 * plan.unit, width, bold=True):
        y += plan.px(34)
        lines.append(Line(y, text, 27 * plan.unit, INK, True))
    y += plan.px(8)
    shown = report.verdict.points
    if len(shown) > MOST_POINTS:
        shown = (*shown[: MOST_POINTS - 1], f"And {len(shown) - MOST_POINTS + 1} more.")
    for point in shown:
        for text in wrap(point, 15 * plan.unit, width):
            y += plan.px(22)
            lines.append(Line(y, text, 15 * plan.unit, FADED))
    return lines


def _draw_head(canvas: _Canvas, plan: _Plan, report: Report) -> None:
    """What it is about, and the verdict beside a bar of its colour."""
    left = plan.px(MARGIN)
    first, last = plan.head[0].y - plan.px(16), plan.head[-1].y + plan.px(6)
    canvas.box((left, first), plan.px(6), last - first, LEVEL_COLORS[report.verdict.level])
    for line in plan.head:
        canvas.text(left + plan.px(24), line.y, line.text, line.size, line.color, bold=line.bold)


def _draw_names(canvas: _Canvas, plan: _Plan, panel: Panel) -> None:
    """Names of the layers; where rows are low, of some. Those at risk in the first panel are red."""
    step = 1 if plan.readable else math.ceil(plan.px(16) / plan.row)
    width = plan.names_right - plan.px(MARGIN)
    for number in range(0, len(plan.names), step):
        row = panel.rows[number]
        risky = plan.readable and row is not None and row[1].risk
        canvas.text(
            plan.names_right, plan.row_top(number) + plan.row / 2, shorten(plan.names[number], plan.name_size, width),
            plan.name_size, LEVEL_COLORS["bad"] if risky else INK, across="right", down="center_baseline",
        )  # fmt: skip


def _draw_panel(canvas: _Canvas, plan: _Plan, panel: Panel, left: int, axis: Axis) -> None:
    """A panel: its heading, its axis, and every layer's strip."""
    width = plan.panel_width
    canvas.text(left, plan.top - plan.px(70), panel.title, 19 * plan.unit, bold=True)
    indent = measure(panel.title, 19 * plan.unit, bold=True) + plan.px(10)
    subtitle = shorten(panel.subtitle, 14 * plan.unit, width - indent)
    canvas.text(left + indent, plan.top - plan.px(70), subtitle, 14 * plan.unit, FADED)

    def x_of(octave: float) -> float:
        return left + (min(max(octave, axis.low), axis.high) - axis.low) / (axis.high - axis.low) * width

    if axis.absolute:
        canvas.text(left, plan.top - plan.px(38), "what FP8 holds of |x|", 13 * plan.unit, NORMAL_ZONE.color)
        decades = range(math.ceil(axis.low * math.log10(2)), math.floor(axis.high * math.log10(2)) + 1, 2)
        ticks = [(decade / math.log10(2), f"10{str(decade).translate(SUPERSCRIPTS)}") for decade in decades]
    else:
        for zone in ZONES:
            middle = (x_of(zone.low) + x_of(zone.high)) / 2
            canvas.text(middle, plan.top - plan.px(38), zone.title, 13 * plan.unit, zone.color, across="center")
        ticks = [(VANISHING, "2⁻¹⁰"), (NORMAL, "2⁻⁶"), (0, "1"), (LARGEST, "448")]
    for octave, text in ticks:
        canvas.text(x_of(octave), plan.top - plan.px(12), text, 12 * plan.unit, FADED, across="center")
        canvas.box((round(x_of(octave)), plan.top - plan.px(8)), 1, plan.px(8), FAINT)
    octaves = axis.low + (np.arange(width) + 0.5) / width * (axis.high - axis.low)
    background = np.full((width, 3), BLANK, np.float64) if axis.absolute else _zones(octaves)[0]
    page = np.repeat(np.rint(background).astype(np.uint8)[None], plan.row * len(panel.rows), 0)
    for number, row in enumerate(panel.rows):
        strip = None
        if row is not None and row[1].scale:
            strip = _window(row[1], octaves) if axis.absolute else _strip(*row, octaves, plan)
        if strip is not None:
            top = number * plan.row
            page[top + plan.gap : top + plan.row - plan.gap] = np.rint(strip).astype(np.uint8)
    canvas.pixels(left, plan.top, page)


def _zones(octaves: Float) -> tuple[Float, Float]:
    """Tint and colour of the zone at each log2(|x| / scale), [n, 3] each."""
    zone = np.searchsorted([zone.high for zone in ZONES[:-1]], octaves, side="right")
    tints, colors = (np.array([getattr(one, name) for one in ZONES], np.float64) for name in ("tint", "color"))
    return tints[zone], colors[zone]


def _window(state: State, octaves: Float) -> Float:
    """What FP8 holds at a scale, on an axis of log2 |x|: [n, 3]."""
    relative = octaves - math.log2(state.scale)
    inside = (relative >= VANISHING) & (relative < LARGEST)
    color = np.array(UNQUANTIZED, np.float64) if state.full_precision else _zones(relative)[1]
    return _mix(np.full((len(octaves), 3), BLANK, np.float64), color, np.where(inside, 0.7, 0.0))


def _strip(figures: Figures, state: State, octaves: Float, plan: _Plan) -> Float | None:
    """How a layer's inputs lie in the zones, on an axis of log2(|x| / scale): [n, 3]; None where nothing was seen."""
    if figures.density is None or not figures.absmax:
        return None
    tints, colors = _zones(octaves)
    position = (octaves + math.log2(state.scale) - AXIS_LOW) * CELLS_PER_OCTAVE - 0.5
    levels = np.interp(position, np.arange(CELLS), figures.density.astype(np.float64), left=0, right=0) / 255
    end = int(np.searchsorted(octaves, math.log2(figures.absmax / state.scale), side="right"))
    levels[end:] = 0  # the cell that holds the largest value reaches beyond it
    strength: Float = levels**1.5
    if state.full_precision:
        strip = _mix(tints, np.array(UNQUANTIZED, np.float64), 0.8 * strength)
    else:
        # Beyond 448 a single value is worth seeing.
        strip = _mix(tints, colors, np.where((octaves > LARGEST) & (levels > 0), 0.4 + 0.6 * strength, strength))
    if plan.row >= SMALLEST_MARKED_ROW and end:
        strip[max(end - plan.px(2), 0) : end] = UNQUANTIZED if state.full_precision else colors[end - 1]
    return strip


def _mix(under: Float, over: Float, share: Float) -> Float:
    """Colours over others, [n, 3], as far as each share says."""
    mixed: Float = under * (1 - share[..., None]) + over * share[..., None]
    return mixed


def _heat_colors(shares: Float) -> Pixels:
    """Shares 0 to 1 of the way from pale to dark."""
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(shares, stops, [color[channel] for color in HEAT]) for channel in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def _draw_heat(canvas: _Canvas, plan: _Plan, report: Report) -> None:
    """The range over noise levels, each layer's largest being dark."""
    left, width = plan.heat_left, plan.px(HEAT_WIDTH)
    canvas.text(left, plan.top - plan.px(70), "Noise levels", 19 * plan.unit, bold=True)
    canvas.text(left, plan.top - plan.px(12), "noise", 12 * plan.unit, FADED)
    canvas.text(left + width, plan.top - plan.px(12), "picture", 12 * plan.unit, FADED, across="right")
    ranges = np.full((len(report.layers), SIGMA_BINS), np.nan)
    largest = np.ones((len(report.layers), 1))
    for number, layer in enumerate(report.layers):
        figures = next((figures for figures in layer.sides if figures is not None and figures.absmax), None)
        if figures is not None:
            ranges[number] = [np.nan if value is None else value for value in figures.sigma_absmax]
            largest[number] = figures.absmax
    ranges = ranges[:, ~np.isnan(ranges).all(0)]  # a run of few steps meets few levels
    if not ranges.size:
        canvas.text(left, plan.top + plan.px(20), "not recorded", 13 * plan.unit, FADED)
        return
    with np.errstate(divide="ignore"):
        shares = np.clip(1 + np.log2(ranges / largest) / HEAT_OCTAVES, 0, 1)
    colors = _heat_colors(np.nan_to_num(shares))
    colors[np.isnan(shares)] = BLANK
    cells = colors[:, np.arange(width) * ranges.shape[1] // width]
    page = np.repeat(cells, plan.row, 0)
    for line in range(plan.gap):  # a line between rows, where they are high
        page[line :: plan.row] = PAGE
    canvas.pixels(left, plan.top, page)


def _draw_fates(canvas: _Canvas, plan: _Plan, panels: Sequence[Panel]) -> None:
    """What becomes of each layer, in words where there is room, else as a colour."""
    left = plan.text_left
    canvas.text(left, plan.top - plan.px(70), "Outcome", 19 * plan.unit, bold=True)
    size = min(13 * plan.unit, 0.7 * plan.row)
    for number, (first, second) in enumerate(zip(panels[0].rows, panels[1].rows, strict=True)):
        text, color = _fate(first, second)
        if plan.readable:
            middle = plan.row_top(number) + plan.row / 2
            fitting = shorten(text[::-1], size, plan.px(TEXT_WIDTH))[::-1]
            canvas.text(left, middle, fitting, size, color, down="center_baseline")
        elif color != FADED:
            canvas.box((left, plan.row_top(number)), plan.px(12), max(plan.row, 1), color)


def _fate(first: tuple[Figures, State] | None, second: tuple[Figures, State] | None) -> tuple[str, Color]:
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


def _draw_legend(canvas: _Canvas, plan: _Plan, report: Report, axis: Axis) -> None:
    """What shades mean, and what made the picture."""
    size, y = 13 * plan.unit, plan.bottom + plan.px(40)
    height, gap = plan.px(12), plan.px(8)

    def ramp(x: float, colors: Pixels, before: str, after: str) -> float:
        """Colours between two texts; gives where they end."""
        canvas.text(x, y, before, size, FADED)
        left = round(x + measure(before, size)) + gap
        canvas.pixels(left, y - height + plan.px(1), np.repeat(colors[None], height, 0))
        canvas.text(left + len(colors) + gap, y, after, size, FADED)
        return left + len(colors) + gap + measure(after, size)

    x: float = plan.panels_left
    explanation = "each bar reaches from the smallest value that FP8 keeps at this scale to the largest"
    if not axis.absolute:
        shares = np.linspace(0, 1, plan.px(150))
        tint, color = (np.array([one], np.float64) for one in (NORMAL_ZONE.tint, NORMAL_ZONE.color))
        shades = np.rint(_mix(tint, color, shares**1.5)).astype(np.uint8)
        x = ramp(x, shades, "share of values  10⁻⁸", "1") + plan.px(28)
        ramp(plan.heat_left, _heat_colors(np.linspace(0, 1, plan.px(50))), "1/4", "largest")
        explanation = "axis: |x| / scale, in octaves; the mark is the largest |x|"
    gray = np.full((plan.px(24), 3), UNQUANTIZED, np.uint8)
    ramp(x, gray, "", "in full precision: not quantized")
    canvas.text(plan.panels_left, y + plan.px(28), explanation, size, FADED)
    canvas.text(
        plan.width - plan.px(MARGIN), plan.height - plan.px(24), _source(report), 12 * plan.unit, FADED, across="right"
    )


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
