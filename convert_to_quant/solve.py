"""Input scales from statistics, and the layers that should compute in full precision.

A reader of a format with a static input scale quantizes a layer's input x as q = round(clamp(x / s, ±max)),
real = q · s, on the format's grid of values, whose largest is max. Given the histogram of |x|:

    absmax       s = margin · absmax / max. No observed value is clipped. Without a margin: as much headroom for unseen
                 values as costs the layer's output nothing (`headroom.py`), at least a factor of 1.5.
    percentile   s = margin · percentile(|x|) / max. Larger values are clipped; for simulated inputs.

Expected squared error. Within a bin, x counts as uniform over [a, b]. With u = x / s, code values v_k and midpoints
m_k between them, the error of one u is (u - v_k)² in its cell [m_(k-1), m_k], so F(t) = ∫₀ᵗ (u - v(u))² du is a cubic
in each cell, and a bin costs s² · (F(b/s) - F(a/s)) / (b/s - a/s) per value: exact, without sampling.

Full precision. A token (row of the input) whose own absmax is below 32 of the grid's smallest steps (2⁻⁹ · s each in
FP8) keeps at most 5 bits of range. A single outlier token can do that to all others, and the error over the whole
tensor hides it. So tokens are counted: if more than `row_loss_limit` of them are lost, the layer computes in full
precision. So does a layer that sees one token per image (modulation, embedders), where full precision costs no time. A
budget, as a share of the model's compute (MACs), is spent where it is expected to help most (`_spend_budget`).

A scale is always float32, finite and > 0. Layers that were never visited, or saw only zeros, keep theirs and are named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import headroom
from .errors import CalibrationError
from .formats import DEFAULT_GRID
from .formats.record import Grid
from .kernels import NONFINITE_BIN
from .methods import METHODS
from .options import SolveOptions
from .stats import BIN_CENTRES, BIN_EDGES, Statistics

Cause = Literal["", "one row", "rows lost", "budget"]

LOST_ROW_STEPS = 32.0
"""A token is lost if its absmax is below this many of the grid's smallest steps: in FP8, below 2⁻⁴ of the scale."""
FLOAT16_SMALLEST_SCALE = 2.0**-15
"""Below it 1/s overflows where a reader multiplies by the reciprocal in float16."""
KEPT = "kept, as --keep asks"
_ROUNDED_DOWN = 1 + 2.0**-23
"""absmax / max may round down in float32. That does not clip absmax: it still becomes the largest code."""

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Present:
    """A layer before solving.

    Attributes:
        scale: its input scale; 1.0 where readers assume it because there is none; None where they scale inputs
            dynamically.
        full_precision: whether it computes in full precision.
        shape: (out, in).
        grid: of the codes of its inputs.
        column_energies: mean square of each column of its weight, [in] (`headroom.column_energies`); None if the
            weight is not available.
    """

    scale: float | None
    full_precision: bool
    shape: tuple[int, int]
    grid: Grid = DEFAULT_GRID
    column_energies: Float | None = None


@dataclass(frozen=True)
class LayerResult:
    """One solved layer.

    Attributes:
        source: where the range comes from: "model" (observed), "layer" (simulated), "none".
        range: the largest |x| that the scale must represent, without the margin; None if nothing was observed.
        scale_before, scale_after: input scales; None where readers scale inputs dynamically.
        full_precision_before, full_precision_after: precision of the matrix multiplication.
        reason: why scale and precision are what they are.
        cause: what moved it to full precision: "", "one row" (it costs nothing), "rows lost" (necessary), "budget".
        sqnr_before_db, sqnr_after_db: expected signal-to-quantization-noise ratio of the input; None for simulated
            inputs, for zeros only, and for a scale of 0.
        clipped_before, clipped_after: share of values beyond ±max · s.
        vanished_before, vanished_after: share of nonzero values that become 0.
        rows_lost_before, rows_lost: share of tokens below 32 smallest steps, before and after.
        multiply_adds: out × in × tokens observed.
        format: of the inputs, a key of `formats.GRIDS`.
        conditioning_dependent: whether its range depends on the magnitude of the synthetic conditioning.
    """

    layer: str
    source: str
    range: float | None
    scale_before: float | None
    scale_after: float | None
    full_precision_before: bool
    full_precision_after: bool
    reason: str
    cause: Cause = ""
    sqnr_before_db: float | None = None
    sqnr_after_db: float | None = None
    clipped_before: float | None = None
    clipped_after: float | None = None
    vanished_before: float | None = None
    vanished_after: float | None = None
    rows_lost_before: float | None = None
    rows_lost: float | None = None
    multiply_adds: int = 0
    format: str = DEFAULT_GRID.name
    conditioning_dependent: bool = False

    @property
    def changed(self) -> bool:
        """Whether the file must change for this layer."""
        return self.scale_after != self.scale_before or self.full_precision_after != self.full_precision_before


def final_scale(scale: float, layer: str, *, float16_safe: bool = False) -> float:
    """A positive scale as it is stored: the nearest float32 > 0, and at least 2⁻¹⁵ if it must be float16-safe.

    Raises:
        CalibrationError: it is not finite in float32.
    """
    with np.errstate(over="ignore"):  # refused below
        value = max(float(np.float32(scale)), float(np.finfo(np.float32).tiny))
    if float16_safe:
        value = max(value, FLOAT16_SMALLEST_SCALE)
    if not np.isfinite(value):
        raise CalibrationError(f"an input scale of {scale} is not finite in float32", tensor=layer)
    return value


def solve(
    statistics: Statistics, present: Mapping[str, Present], options: SolveOptions | None = None
) -> list[LayerResult]:
    """Choose scale and precision of every layer.

    Args:
        statistics: of these layers; missing layers count as never visited.
        present: the layers of a checkpoint as they are.
        options: how to solve.

    Returns:
        One result per layer of `present`, in its order.

    Raises:
        CalibrationError: a layer saw NaN or infinite inputs.
    """
    options = options or SolveOptions()
    visited = {name for name, ran in zip(statistics.layers, statistics.visited, strict=True) if ran}
    seen = [name for name in present if name in visited]
    chosen = statistics.take(seen)
    _refuse_nonfinite(chosen)
    before = np.array([present[name].scale or 0.0 for name in seen], np.float64)
    grids = [present[name].grid for name in seen]
    kept = np.array([any(re.search(pattern, name) for pattern in options.keep) for name in seen], bool)
    ranges = METHODS[options.method].choose(chosen, options.percentile)
    least = ranges / [grid.max for grid in grids]
    factors, after = np.ones(len(seen)), before.copy()
    for number in np.flatnonzero((ranges > 0) & ~kept).tolist():
        name = seen[number]
        factors[number] = _headroom(chosen, number, present[name], options)
        after[number] = final_scale(factors[number] * least[number], name, float16_safe=options.float16_safe)
    was, now = (expected_errors(chosen, scales, grids) for scales in (before, after))
    columns = {"rows_lost_before": was.rows_lost, "rows_lost": now.rows_lost}
    for when, errors in (("before", was), ("after", now)):
        columns |= {f"sqnr_{when}_db": errors.sqnr_db, f"clipped_{when}": errors.clipped}
        columns |= {f"vanished_{when}": errors.vanished}
    row_errors = dict(zip(seen, _expected_row_errors(chosen, after, grids, now.sqnr_db), strict=True))
    moving = set(statistics.provenance.get("depends_on_conditioning", ()))
    numbers = {name: number for number, name in enumerate(seen)}
    results = []
    for name, state in present.items():
        if name not in numbers:
            why = "ran, but its input could not be seen" if name in statistics.unseen else "never visited"
            results.append(unchanged(name, state, f"{why}: keeps its scale"))
            continue
        number = numbers[name]
        costs: dict[str, Any] = {column: finite(values[number]) for column, values in columns.items()}
        result = replace(
            unchanged(name, state, _scale_reason(options, float(factors[number]), float(after[number])), "model"),
            range=float(ranges[number]),
            scale_after=state.scale if after[number] == before[number] else float(after[number]),
            multiply_adds=int(chosen.rows[number]) * state.shape[0] * state.shape[1],
            conditioning_dependent=name in moving,
            **costs,
        )
        if kept[number]:
            result = replace(result, reason=KEPT)
        elif chosen.absmax[number] == 0:
            result = replace(result, reason="seen only as zeros: keeps its scale")
        else:
            if ranges[number] == 0:
                result = replace(result, reason=f"its percentile {options.percentile:g} is 0: keeps its scale")
            result = _precision(result, bool(chosen.one_row[number]), options)
        results.append(result)
    return _spend_budget(results, row_errors, options)


def unchanged(name: str, state: Present, reason: str, source: str = "none") -> LayerResult:
    """A layer that keeps its scale and its precision, and why."""
    scale, full_precision = state.scale, state.full_precision
    return LayerResult(name, source, None, scale, scale, full_precision, full_precision, reason, format=state.grid.name)


def finite(number: float) -> float | None:
    """A number for JSON, which has no infinities and no NaN."""
    return float(number) if np.isfinite(number) else None


def _refuse_nonfinite(statistics: Statistics) -> None:
    broken = np.flatnonzero(statistics.nonfinite > 0)
    if len(broken):
        name, count = statistics.names[broken[0]], statistics.nonfinite[broken[0]]
        problem = f"its inputs had {count} NaN or infinite values, in {len(broken)} layers in all"
        hint = "the model or its inputs are broken; compute in bfloat16 or float32, not float16"
        raise CalibrationError(problem, path=statistics.path, tensor=name, hint=hint)


def _headroom(statistics: Statistics, number: int, state: Present, options: SolveOptions) -> float:
    """The factor on a layer's range: the requested margin, or what costs nothing."""
    if not options.finds_headroom:
        return options.margin or 1.0
    channel_absmax_I = statistics.channel_absmax[number]
    if not len(channel_absmax_I) or state.column_energies is None:
        return headroom.LEAST
    absmax = float(statistics.absmax[number])
    free = headroom.free_scale(
        state.grid, absmax, channel_absmax_I, state.column_energies, statistics.row_histogram[number]
    )
    return max(headroom.LEAST, free * state.grid.max / absmax)


def _scale_reason(options: SolveOptions, factor: float, scale: float) -> str:
    reason = METHODS[options.method].reason.format(percentile=options.percentile)
    if factor != 1:
        reason += f" × {factor:.3g}"
    if scale < FLOAT16_SMALLEST_SCALE:
        reason += "; too small for readers that divide in float16 (--float16-safe)"
    return reason


def _precision(result: LayerResult, one_row: bool, options: SolveOptions) -> LayerResult:
    """The precision that a layer's own tokens require."""
    lost = result.rows_lost or 0.0
    cause: Cause
    if lost > options.row_loss_limit:
        cause, reason = "rows lost", f"full precision: {lost:.1%} of its tokens would be lost"
    elif one_row and options.one_row_full_precision:
        cause, reason = "one row", "full precision: one token per image, which costs nothing"
    else:
        return result
    return replace(result, full_precision_after=True, reason=reason, cause=cause)


def _spend_budget(
    results: Sequence[LayerResult], row_errors: Mapping[str, float], options: SolveOptions
) -> list[LayerResult]:
    """Move the layers that gain most for their cost to full precision, within the budget.

    Layers are ranked by

        expected relative squared error of a token · lateness / multiply-adds^(2/3)

    The first factor is computed; the others fit measurements on six variants of the emoji model, one layer at a time in
    full precision (docs/accuracy.md). FP8 gives nearly all layers the same relative error, so that error matters only
    where tokens are lost, and then it dominates. The effect of a layer's error on the image grows only with about the
    third root of its compute, so the same budget buys more in small layers. And it grows with depth: few layers read
    the errors of late blocks, which are next to the output. It fell about as 1, 1/2, 1/3 from the last block backwards.
    """
    left = options.full_precision_budget * sum(result.multiply_adds for result in results)
    late = _lateness([result.layer for result in results])

    def worth(result: LayerResult) -> float:
        return row_errors[result.layer] * late[result.layer] / math.pow(max(result.multiply_adds, 1), 2 / 3)

    found = {result.layer: result for result in results}
    open_to_it = [
        result
        for result in results
        if not result.full_precision_after and result.sqnr_after_db is not None and result.reason != KEPT
    ]
    for result in sorted(open_to_it, key=lambda result: (-worth(result), result.layer)):
        if result.multiply_adds <= left:
            left -= result.multiply_adds
            reason = "full precision: among the worst that the budget covers"
            found[result.layer] = replace(result, full_precision_after=True, reason=reason, cause="budget")
    return list(found.values())


_BLOCK = re.compile(r"(?:^|(?<=\.))([^.]+)\.(\d+)\.")
"""The first numbered part of a layer's name: its stack, and its block there."""


def _lateness(layers: Sequence[str]) -> dict[str, float]:
    """1 for the last block of a model, 1/2 for the one before, and so on; 1 outside of blocks.

    The stack with the most blocks runs last (the single blocks of Flux and HunyuanVideo, Z-Image's layers after its
    refiners); all others run before it.

    >>> _lateness(["double.0.a", "single.0.a", "single.1.a", "single.1.b", "head"])
    {'double.0.a': 0.3333333333333333, 'single.0.a': 0.5, 'single.1.a': 1.0, 'single.1.b': 1.0, 'head': 1.0}
    """
    places = {layer: (found[1], int(found[2])) for layer in layers if (found := _BLOCK.search(layer))}
    stacks: dict[str, list[int]] = {}
    for stack, number in sorted(set(places.values())):
        stacks.setdefault(stack, []).append(number)
    last = max(stacks, key=lambda stack: (len(stacks[stack]), stack), default="")

    def blocks_left(stack: str, number: int) -> int:
        return len(stacks[stack]) - stacks[stack].index(number) + (0 if stack == last else len(stacks[last]))

    return {layer: 1 / blocks_left(*places[layer]) if layer in places else 1.0 for layer in layers}


def _expected_row_errors(statistics: Statistics, scales: Float, grids: Sequence[Grid], sqnr_db: Float) -> Float:
    """Expected squared error of a token relative to the token, mean over tokens, [L]; NaN where the scale is 0.

    The error over the whole tensor is relative to its largest tokens. Small tokens suffer more: steps of d (2⁻⁹ s in
    FP8) cost d² / 12 per value however small the token is, at most all of it. A token with absmax a is assumed to have
    a mean square of ρ² a², with ρ² from the layer's totals.
    """
    counts = statistics.row_histogram[:, :NONFINITE_BIN].astype(np.float64)
    counts[:, 0] = 0  # tokens of zeros lose nothing
    rows = np.maximum(counts.sum(1), 1)
    squares = BIN_CENTRES**2
    crest = statistics.mean_square * rows / np.maximum(counts @ squares, 1e-300)
    steps = scales * [grid.smallest_step for grid in grids]
    floors = steps[:, None] ** 2 / 12 / np.maximum(crest[:, None] * squares, 1e-300)
    lost = np.einsum("lb,lb->l", counts, np.minimum(floors, 1.0)) / rows
    whole: Float = np.where(np.isfinite(sqnr_db), 10 ** (-sqnr_db / 10), 0.0)
    return np.where(scales > 0, whole + lost, np.nan)


class ExpectedErrors(NamedTuple):
    """The cost of quantizing inputs at given scales, per layer [L].

    Attributes:
        sqnr_db: 10 log10 of mean x² over the expected squared error; infinite for zeros only.
        clipped: share of values beyond ±max · s.
        vanished: share of values that are not zero and lie below half the smallest code.
        rows_lost: share of tokens that are not all zeros but lie below `LOST_ROW_STEPS` smallest steps.

    Where the scale is 0, `rows_lost` is 0 and the others are NaN.
    """

    sqnr_db: Float
    clipped: Float
    vanished: Float
    rows_lost: Float


def expected_errors(statistics: Statistics, scales: Float, grids: Sequence[Grid]) -> ExpectedErrors:
    """Expected error of quantizing each layer's inputs at a scale.

    Args:
        statistics: of L layers.
        scales: [L], ≥ 0; some files have scales of 0.
        grids: one per layer.
    """
    count = np.maximum(statistics.count, 1).astype(np.float64)
    absmax = statistics.absmax.astype(np.float64)
    error, clipped, vanished = np.full((3, len(scales)), np.nan)
    for number, (scale, grid) in enumerate(zip(scales, grids, strict=True)):
        if scale == 0:
            continue
        counts = statistics.histogram[number, :NONFINITE_BIN]
        used = np.flatnonzero(counts)
        weights = counts[used].astype(np.float64)
        low, high = BIN_EDGES[used] / scale, BIN_EDGES[used + 1] / scale
        high = np.minimum(high, absmax[number] / scale)  # so the last bin ends at absmax
        error[number] = scale * scale * (weights @ _mean_error(low, high, grid))
        clipped[number] = weights @ _share_above(low, high, grid.max * _ROUNDED_DOWN)
        below = weights @ (1 - _share_above(low, high, grid.smallest_step / 2))
        vanished[number] = max(below - statistics.zeros[number], 0.0)
    signal = statistics.sum_of_squares
    with np.errstate(divide="ignore", invalid="ignore"):
        sqnr_db = 10 * np.log10(np.where(signal > 0, signal / np.maximum(error, 1e-300), np.inf))
    lost = statistics.rows_below(LOST_ROW_STEPS * scales * [grid.smallest_step for grid in grids])
    return ExpectedErrors(sqnr_db, clipped / count, vanished / count, lost)


def _share_above(low: Float, high: Float, limit: float) -> Float:
    """Share of a uniform variable on [low, high] above a limit; low = high is a point."""
    width = high - low
    point = (high > limit).astype(np.float64)
    share: Float = np.clip(np.divide(high - limit, width, out=point, where=width > 0), 0.0, 1.0)
    return share


@cache
def _cells(grid: Grid) -> tuple[Float, Float, Float]:
    """Code values v [n], midpoints m [n - 1], and F at the lower end of each code's cell [n]."""
    codes, midpoints = grid.levels, grid.midpoints
    lower = np.concatenate([[0.0], midpoints])
    inside = ((midpoints - codes[:-1]) ** 3 - (lower[:-1] - codes[:-1]) ** 3) / 3
    return codes, midpoints, np.concatenate([[0.0], np.cumsum(inside)])


def _mean_error(low: Any, high: Any, grid: Grid) -> Float:
    """Mean squared error of quantizing u uniform on [low, high], 0 ≤ low ≤ high, at scale 1.

    Differences of F lose digits where a bin is much narrower than its distance from 0. So a bin inside one cell, or
    hardly wider than a point, is integrated directly.
    """
    codes, midpoints, cumulative = _cells(grid)
    first = np.searchsorted(midpoints, low, side="right")
    last = np.searchsorted(midpoints, high, side="left")
    near, far = low - codes[first], high - codes[last]
    other = high - codes[first]
    within = (near * near + near * other + other * other) / 3  # mean of (u - v)² where all u have one code v
    lower = np.concatenate([[0.0], midpoints])
    area = (
        cumulative[last]
        - cumulative[first]
        + (far**3 - (lower[last] - codes[last]) ** 3) / 3
        - (near**3 - (lower[first] - codes[first]) ** 3) / 3
    )
    across = np.maximum(area, 0.0) / np.maximum(high - low, 1e-300)
    mean: Float = np.where((first == last) | (high - low < 1e-9 * high), within, across)
    return mean
