"""What a report holds: plain values, and the JSON document that the page and other programs read.

A report has one side, or two that are compared. A layer has one place in it, whichever sides know it. On each side it
has a state before (the file as it is) and after (what solving chose): scale, precision, and what quantizing its inputs
with them is expected to cost.

Risks. `RISKS` says what each means. A layer whose inputs are never quantized is at no risk. Of the others:

    no scale    the scale is 0, so every input is divided by 0; or readers cannot use what the file has (NaN, bfloat16,
                several values), and it is told as 0.
    clips,      the expected signal-to-noise ratio of inputs is under `Grid.worst_rounding_db`. Rounding never gets
    vanishes,   that low: within FP8's normal range, from 2⁻⁶ times the scale up, an error is at most 1/17 of its value
    coarse      (a value on the middle between 1 and 1.125), so the ratio of any distribution in there is at least
                20 log10(17) = 24.6 dB. So something lies outside: it *clips* if the largest input exceeds what is
                rounded to the largest code (`Grid.largest_rounded` times the scale); else it
                *vanishes* if most values that are not zero become zero; else it is *coarse*, spread over the few
                codes below the normal range.
    tokens lost most tokens lie wholly under 2⁻⁴ of the scale (`solve`). The ratio over all values hides them.

So a few values clipped at no cost are no risk; their share is told all the same. Nor are fewer lost tokens: ranges do
not tell whether the image needs them (a Wan-shaped model has 21 layers that lose some, and loses nothing in dB).

Limits. A risk is one of inputs, not of the image: where outlier channels meet small weights, cutting them off costs the
output less than it costs the input ("spiky" emoji at a scale of 1.0: 18 of 32 layers clip, and the image loses about
1 dB; "hot": 17 layers, 23 dB). `check` measures what it costs the image.

Densities. Shares of values in cells of a quarter octave of |x|, values taken as uniform within a bin of the histogram.
A share is one byte, 0 for none, else 1 + 254 · (log10(share) + 8) / 8. What lies beyond the axis is in its last cells.
The document holds a density without the empty cells on both sides: [number of the first cell, bytes in base64].
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..formats import DEFAULT_GRID, FORMATS
from ..kernels import SIGMA_BINS

FORMAT = 1
"""Version of the document."""

Risk = Literal["", "no scale", "clips", "vanishes", "tokens lost", "coarse"]
Level = Literal["good", "warning", "bad"]

RISKS: Mapping[Risk, str] = {
    "no scale": "its scale is 0, or nothing that ComfyUI can use: inputs become infinite or NaN, or it fails",
    "clips": f"inputs beyond {DEFAULT_GRID.max:g} times the scale are cut off",
    "vanishes": "most inputs are too small for the scale and become 0",
    "tokens lost": "most tokens lie under 1/16 of the scale, where few codes are; often an outlier sets it",
    "coarse": "inputs lie among the smallest steps of the scale, where few codes are left",
}
"""What each risk means, the worst first."""

ZONES = {
    "vanished": "rounds to 0",
    "subnormal": "few steps left",
    "normal": "even, relative steps",
    "saturated": f"cut off at {DEFAULT_GRID.max:g}",
}
"""What FP8 does with |x| / scale, from small to large."""

MIX_WORDS = {
    "curve": "the best mix of each size",
    "uniform": "one format for all layers",
    "more": "half a bit more per weight",
    "measured": "this file as measured, at two sizes of image",
    "chosen": "this file",
    "tried": "a format that was tried; the stronger its colour, the more bits",
}
"""What the marks of the chart of sizes are, in page and picture."""

MOST = 0.5
"""Share of values or tokens that are lost from which on a layer is at risk for that alone."""

AXIS_LOW, AXIS_HIGH, CELLS_PER_OCTAVE = -32, 24, 4
"""The axis of densities, log2 |x|."""
CELLS = (AXIS_HIGH - AXIS_LOW) * CELLS_PER_OCTAVE

FIGURE_DIGITS, SCALE_DIGITS = 4, 9
"""Significant digits of figures in the document, and of scales: all that a float32 has."""

DENSITY_DECADES = 8
"""Shares from 10⁻⁸ to 1 are told apart."""

SIGMA_EDGES = tuple(1 - number / SIGMA_BINS for number in range(SIGMA_BINS + 1))
"""Edges of the noise levels, from noise to image; bin i is (SIGMA_EDGES[i + 1], SIGMA_EDGES[i]]."""

EXACT_DB = 300.0
"""Stands for a ratio of signal to noise that is not known, where layers are sorted."""

Density = NDArray[np.uint8]


@dataclass(frozen=True)
class State:
    """A layer with one scale, and what quantizing its inputs with it is expected to cost.

    Attributes:
        scale: its input scale; None where readers scale inputs as they come.
        full_precision: whether its inputs stay as they are.
        sqnr_db: signal to quantization noise of the inputs; None where nothing but zeros was seen, or nothing.
        clipped: share of values beyond the largest code times the scale.
        vanished: share of all values that are not zero and become it.
        rows_lost: share of tokens under 2⁻⁴ of the scale.
        risk: a key of `RISKS`, or "".
        max: the largest input that a scale of 1 holds.

    The costs are those of FP8 also where `full_precision` avoids them.
    """

    scale: float | None
    full_precision: bool
    sqnr_db: float | None = None
    clipped: float | None = None
    vanished: float | None = None
    rows_lost: float | None = None
    risk: Risk = ""
    max: float = DEFAULT_GRID.max

    @property
    def log2_scale(self) -> float:
        """Where the scale of FP8 that holds as much lies, in octaves; for scales that are there and not 0."""
        assert self.scale
        return math.log2(self.scale * self.max / DEFAULT_GRID.max)


@dataclass(frozen=True, eq=False)
class Figures:
    """What one side knows of a layer.

    Attributes:
        before, after: as the file is, and as solving chose.
        format: the grid of its inputs' codes, a key of `formats.GRIDS`.
        source: "model" where its inputs were seen, "none" where they were not.
        reason: why scale or precision after is what it is.
        cause: what moved it to full precision; see `solve.LayerResult`.
        unused: why no reader uses its input scale; "" where one does.
        inputs: how readers scale its inputs where no input scale does, in a word; "" where one does.
        stored: the format of its weight, a key of `formats.FORMATS`; the dtype where it is not quantized; "" where no
            checkpoint says.
        bits: per weight, scales included.
        more: the format that it would have in the mix of half a bit more; "" where nothing says.
        conditioning_dependent: its range moves with the made-up conditioning of a run on noise.
        rows, rows_per_sample, calls: as in `Statistics`.
        multiply_adds: out × in × rows.
        zeros: share of values that are 0.
        absmax, rms, median, p999: of |x|; None where nothing was seen.
        density, row_density: uint8 [CELLS], see the module's docstring; of values' |x|, and of tokens' absmax.
        sigma_absmax, sigma_rms: per noise level, from noise to image; None where nothing was seen.
        changed: whether the file would change for this layer.
    """

    before: State
    after: State
    format: str = DEFAULT_GRID.name
    source: str = "none"
    reason: str = ""
    cause: str = ""
    unused: str = ""
    inputs: str = ""
    stored: str = ""
    bits: float | None = None
    more: str = ""
    conditioning_dependent: bool = False
    rows: int = 0
    rows_per_sample: int = 0
    calls: int = 0
    multiply_adds: int = 0
    zeros: float | None = None
    absmax: float | None = None
    rms: float | None = None
    median: float | None = None
    p999: float | None = None
    density: Density | None = None
    row_density: Density | None = None
    sigma_absmax: tuple[float | None, ...] = (None,) * SIGMA_BINS
    sigma_rms: tuple[float | None, ...] = (None,) * SIGMA_BINS
    changed: bool = field(init=False)

    def __post_init__(self) -> None:
        states = [(state.scale, state.full_precision) for state in (self.before, self.after)]
        object.__setattr__(self, "changed", states[0] != states[1])

    def octaves_over(self, state: State | None) -> float | None:
        """Octaves from the largest code times a scale up to the largest input: above 0 something is clipped."""
        if state is None or not (self.absmax and state.scale):
            return None
        return math.log2(self.absmax / (state.max * state.scale))

    @property
    def seen(self) -> bool:
        """Whether its inputs were seen, and were not all zero."""
        return bool(self.absmax)


@dataclass(frozen=True)
class Layer:
    """A layer's place in the report.

    Attributes:
        name: as the first side that has it spells it.
        shape: (out, in).
        sides: what each side knows of it; None where a side does not have it.
        crossed: the first side's new scale and precision on the second side's inputs; None where both sides have the
            same statistics, or one has none of this layer.
        alone_db: by format, SQNR of the velocity where this layer alone is in it; of trials.
    """

    name: str
    shape: tuple[int, int]
    sides: tuple[Figures | None, ...]
    crossed: State | None = None
    alone_db: Mapping[str, float] = field(default_factory=dict)

    @property
    def danger(self) -> float:
        """A sorting key, the largest first: by the worst risk as the file is, then by the ratio of signal to noise."""
        met = [(figures, figures.before) for figures in self.sides if figures is not None]
        met += [(figures, self.crossed) for figures in self.sides[1:] if figures is not None and self.crossed]
        severity = ["", *list(RISKS)[::-1]]
        return max(
            (
                1000.0 * severity.index(state.risk) - (EXACT_DB if state.sqnr_db is None else state.sqnr_db)
                for figures, state in met
                if not (state.full_precision or figures.unused)
            ),
            default=-math.inf,
        )


@dataclass(frozen=True)
class Side:
    """Where the figures of a side come from.

    Attributes:
        label: a short name for it.
        statistics: names of the statistics files.
        model: name of the checkpoint.
        family: what the checkpoint is.
        samples: images that were observed.
        engine, conditioning: how, where that is known.
        provenance: all that the statistics say of themselves.
        options: how scales were chosen.
        notes: what a user should know, one sentence each.
        apply: the command that writes the new scales, with names of files without folders; "" where none changes.
        mix: what the mix of its formats keeps, beside what others would, see `choose.Mixes.figures`; of its layers
            the layers tell. `other_bytes` is what the file has besides them. Empty where nothing was tried.
    """

    label: str
    statistics: tuple[str, ...] = ()
    model: str | None = None
    family: str | None = None
    samples: int = 0
    engine: str | None = None
    conditioning: str | None = None
    provenance: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    apply: str = ""
    mix: Mapping[str, Any] = field(default_factory=dict)

    @property
    def calibrates(self) -> bool:
        """Whether there is something to choose scales from."""
        return bool(self.statistics)


@dataclass(frozen=True)
class Verdict:
    """What it all means.

    Attributes:
        level: "bad" where a layer is at risk, "warning" where something else should be known, else "good".
        headline: one sentence.
        points: further sentences, the most important first.
    """

    level: Level
    headline: str
    points: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All figures, and what they mean.

    Attributes:
        title: what it is about.
        sides: one, or two.
        layers: in the natural order of their names: block 2 before block 10.
        verdict: what it means.
        options: how the report was asked for.
    """

    title: str
    sides: tuple[Side, ...]
    layers: tuple[Layer, ...]
    verdict: Verdict
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def riskiest(self) -> list[int]:
        """Numbers of the layers, the riskiest first."""
        return sorted(range(len(self.layers)), key=lambda number: -self.layers[number].danger)

    @property
    def mixes(self) -> list[Mapping[str, Any]]:
        """What the sides know of their mixes of formats, as far as there is a chart of it."""
        return [side.mix for side in self.sides if side.mix.get("curve")]

    def document(self) -> dict[str, Any]:
        """Everything as JSON values: the same report is the same document."""
        return {
            "format": FORMAT,
            "version": __version__,
            "options": plain(self.options),
            "title": self.title,
            "sides": plain(self.sides),
            "verdict": plain(self.verdict),
            "risks": dict(RISKS),
            "zones": dict(ZONES),
            "words": dict(MIX_WORDS),
            "format_bits": {name: fmt.bits for name, fmt in FORMATS.items()} if self.mixes else {},
            "riskiest": self.riskiest,
            "grid": {
                "max": DEFAULT_GRID.max,
                "smallest_normal": DEFAULT_GRID.smallest_normal,
                "smallest": DEFAULT_GRID.smallest_step,
            },
            "axis": {"low": AXIS_LOW, "high": AXIS_HIGH, "per_octave": CELLS_PER_OCTAVE},
            "sigma_edges": list(SIGMA_EDGES),
            "layers": plain(self.layers, FIGURE_DIGITS),
        }


def encode_shares(shares: NDArray[np.float64]) -> Density:
    """Shares in [0, 1] as bytes; see the module's docstring.

    >>> encode_shares(np.array([0.0, 1e-9, 1e-8, 1e-4, 1.0])).tolist()
    [0, 1, 1, 128, 255]
    """
    logarithms = np.log10(np.maximum(shares, 10.0**-DENSITY_DECADES))
    levels = 1 + np.rint(254 * (logarithms + DENSITY_DECADES) / DENSITY_DECADES)
    encoded: Density = np.where(shares > 0, np.minimum(levels, 255), 0).astype(np.uint8)
    return encoded


def plain(value: Any, digits: int | None = None) -> Any:
    """A value of a report as JSON values.

    Args:
        value: a dataclass, mapping, list, tuple, density or plain value.
        digits: significant digits of floats; of scales it is always `SCALE_DIGITS`. None keeps floats as they are.

    Returns:
        Mappings, lists, strings, numbers and None; a float that is not finite has no place in JSON and is None.

    >>> plain({"scale": 1 / 3, "pair": (2 / 3, math.inf)}, digits=4)
    {'scale': 0.333333333, 'pair': [0.6667, None]}
    """
    if isinstance(value, float):
        if not digits:
            return value
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(one, digits) for one in value]
    if isinstance(value, np.ndarray):
        return _cells(value)
    entries = value if isinstance(value, Mapping) else vars(value)
    return {key: plain(one, SCALE_DIGITS if digits and key == "scale" else digits) for key, one in entries.items()}


def _cells(density: Density) -> list[int | str] | None:
    """The occupied part of a density: the number of its first cell, and its bytes in base64."""
    occupied = np.flatnonzero(density)
    if not occupied.size:
        return None
    return [int(occupied[0]), base64.b64encode(np.trim_zeros(density).tobytes()).decode("ascii")]
