"""A report as plain values, and as the JSON document that the page and other programs read.

A report has one side, or two that are compared. Each layer appears once, whichever sides have it. On each side it has a
state before (the file as it is) and after (solved): scale, precision, and the expected cost of quantizing its inputs.

Risks. `RISKS` says what each means. Layers whose inputs are not quantized are at no risk. For the others:

    no scale    the scale is 0, or unusable (NaN, bfloat16, several values) and reported as 0.
    clips,      the expected SQNR of the inputs is below `Grid.worst_rounding_db`. Rounding alone never gets that low:
    vanishes,   within FP8's normal range, from 2⁻⁶ times the scale up, an error is at most 1/17 of its value (halfway
    coarse      between 1 and 1.125), so any distribution in it has at least 20 log10(17) = 24.6 dB. So some values lie
                outside: it *clips* if the largest input exceeds what still rounds to the largest code
                (`Grid.largest_rounded` times the scale); else it *vanishes* if most nonzero values become 0; else it
                is *coarse*, spread over the few codes below the normal range.
    tokens lost most tokens lie entirely below 2⁻⁴ of the scale (`solve`). The SQNR over all values hides them.

A few values clipped at no cost are therefore no risk, but reported. Nor are a few lost tokens: ranges do not tell
whether the image needs them (a Wan-shaped model has 21 layers that lose some, without any loss in dB).

Limits. A risk concerns inputs, not the image: where outlier channels meet small weights, clipping costs the output less
than the input ("spiky" emoji at a scale of 1.0: 18 of 32 layers clip, and the image loses about 1 dB; "hot": 17 layers,
23 dB). `check` measures images.

Densities. Shares of values in cells of a quarter octave of |x|, with values uniform within a bin of the histogram. A
share is one byte: 0 for none, else 1 + 254 · (log10(share) + 8) / 8. Values beyond the axis count in its last cells.
The document stores a density without the empty cells at both ends: [index of the first cell, bytes in base64].
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
    "no scale": "the scale is 0, or ComfyUI cannot use it: inputs become infinite or NaN, or it fails",
    "clips": f"inputs above {DEFAULT_GRID.max:g} times the scale are clipped",
    "vanishes": "most inputs are too small for the scale and round to 0",
    "tokens lost": "most tokens lie below 1/16 of the scale, where FP8 has few codes; often due to an outlier",
    "coarse": "inputs lie among the smallest steps of the scale, where FP8 has few codes",
}
"""What each risk means, the worst first."""

ZONES = {
    "vanished": "rounds to 0",
    "subnormal": "fewer bits",
    "normal": "4 significant bits",
    "saturated": f"clipped to {DEFAULT_GRID.max:g}",
}
"""What FP8 does with |x| / scale, from small to large."""

MIX_WORDS = {
    "curve": "best mix at each size",
    "uniform": "one format for all layers",
    "more": "half a bit more per weight",
    "measured": "this file, measured at two image sizes",
    "chosen": "this file",
    "tried": "a format that was tried; a stronger color means more bits",
}
"""The legend of the chart of sizes, in page and image."""

MOST = 0.5
"""Share of lost values or tokens above which a layer is at risk."""

AXIS_LOW, AXIS_HIGH, CELLS_PER_OCTAVE = -32, 24, 4
"""The axis of densities, log2 |x|."""
CELLS = (AXIS_HIGH - AXIS_LOW) * CELLS_PER_OCTAVE

FIGURE_DIGITS, SCALE_DIGITS = 4, 9
"""Significant digits in the document; scales keep all digits of a float32."""

DENSITY_DECADES = 8
"""The smallest share that is distinguished is 10⁻⁸."""

SIGMA_EDGES = tuple(1 - number / SIGMA_BINS for number in range(SIGMA_BINS + 1))
"""Edges of noise levels, from noise to image; bin i is (SIGMA_EDGES[i + 1], SIGMA_EDGES[i]]."""

EXACT_DB = 300.0
"""Stands for an unknown SQNR when layers are sorted."""

Density = NDArray[np.uint8]


@dataclass(frozen=True)
class State:
    """A layer at one scale, and the expected cost of quantizing its inputs with it.

    Attributes:
        scale: its input scale; None where readers scale inputs dynamically.
        full_precision: whether its inputs are not quantized.
        sqnr_db: signal-to-quantization-noise ratio of the inputs; None if only zeros were observed, or nothing.
        clipped: share of values above the largest code times the scale.
        vanished: share of all values that are not 0 but round to it.
        rows_lost: share of tokens below 2⁻⁴ of the scale.
        risk: a key of `RISKS`, or "".
        max: the largest input that a scale of 1 can represent.

    Costs are those of FP8, also where `full_precision` avoids them.
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
        """log2 of the FP8 scale with the same range; the scale must not be None or 0."""
        assert self.scale
        return math.log2(self.scale * self.max / DEFAULT_GRID.max)


@dataclass(frozen=True, eq=False)
class Figures:
    """The measurements of a layer on one side.

    Attributes:
        format: of the codes of its inputs, a key of `formats.GRIDS`.
        source: "model" if its inputs were observed, else "none".
        reason: why the solved scale or precision is what it is.
        cause: what moved it to full precision; see `solve.LayerResult`.
        unused: why readers ignore its input scale; "" if they use it.
        inputs: how readers scale its inputs if not by an input scale; else "".
        stored: the format of its weight, a key of `formats.FORMATS`; its dtype if it is not quantized; "" without a
            checkpoint.
        more: its format in the best mix with half a bit more per weight; "" if unknown.
        conditioning_dependent: whether its range depends on the synthetic conditioning of a run on noise.
        rows, rows_per_sample, calls: as in `Statistics`.
        zeros: share of values that are 0.
        absmax, rms, median, p999: of |x|; None if nothing was observed.
        density, row_density: of |x| of values, and of the absmax of tokens; uint8 [CELLS], see the module's docstring.
        sigma_absmax, sigma_rms: per noise level, from noise to image; None where nothing was observed.
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
        """log2 of the largest input over the largest value that a state can represent; above 0 it is clipped."""
        if state is None or not (self.absmax and state.scale):
            return None
        return math.log2(self.absmax / (state.max * state.scale))

    @property
    def seen(self) -> bool:
        """Whether nonzero inputs were observed."""
        return bool(self.absmax)


@dataclass(frozen=True)
class Layer:
    """A layer of the report, by its name in the first side that has it.

    Attributes:
        shape: (out, in).
        sides: its measurements; None for a side without it.
        crossed: the first side's new scale and precision on the second side's inputs; None if both sides have the
            same statistics, or one side did not observe the layer.
        alone_db: SQNR of the velocity with only this layer quantized, by format; from trials.
    """

    name: str
    shape: tuple[int, int]
    sides: tuple[Figures | None, ...]
    crossed: State | None = None
    alone_db: Mapping[str, float] = field(default_factory=dict)

    @property
    def danger(self) -> float:
        """A sorting key, the largest first: by the worst risk of the file as it is, then by SQNR."""
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
    """The origin of a side.

    Attributes:
        statistics: names of the statistics files.
        model, family: name of the checkpoint, and what it is.
        samples: the number of observed images.
        engine, conditioning: how they were observed, if known.
        options: how scales were chosen.
        notes: for the user, one sentence each.
        apply: the command that writes the new scales, with file names but no folders; "" if none changes.
        mix: results of `choose.Mixes.results` without the layers, "on" (what the model was conditioned on), and
            "other_bytes" (of the file, outside these layers). Empty if no formats were tried.
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
        """Whether there are statistics to choose scales from."""
        return bool(self.statistics)


@dataclass(frozen=True)
class Verdict:
    """A headline and further sentences, the most important first.

    `level` is "bad" if a layer is at risk, "warning" if something else needs attention, else "good".
    """

    level: Level
    headline: str
    points: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All measurements, and the verdict; `options` are how the report was requested.

    Layers are in the natural order of their names: block 2 before block 10.
    """

    title: str
    sides: tuple[Side, ...]
    layers: tuple[Layer, ...]
    verdict: Verdict
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def riskiest(self) -> list[int]:
        """Indices of the layers, the riskiest first."""
        return sorted(range(len(self.layers)), key=lambda number: -self.layers[number].danger)

    @property
    def mixes(self) -> list[Mapping[str, Any]]:
        """The mixes of the sides that have a chart of sizes."""
        return [side.mix for side in self.sides if side.mix.get("curve")]

    def document(self) -> dict[str, Any]:
        """JSON values. The same report always gives the same document."""
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

    Floats are rounded to `digits` significant digits, scales to `SCALE_DIGITS`, and become None if they are not finite.
    Without `digits`, floats stay as they are.

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
    """The occupied part of a density: the index of its first cell, and its bytes in base64."""
    occupied = np.flatnonzero(density)
    if not occupied.size:
        return None
    return [int(occupied[0]), base64.b64encode(np.trim_zeros(density).tobytes()).decode("ascii")]
