"""Headroom for unseen values: how far above absmax / max a static input scale may lie at no cost.

A range observed on some noise is an estimate; real prompts exceeded it by up to a factor of 2.2 on one trained model
(docs/accuracy.md). Values beyond a scale are clipped, which costs much; a scale that is too large costs little, since
FP8 numbers are floats. How little depends on the layer: where weights of quiet channels are large, a factor of 8 cost
3.5 dB.

Maths. An input value x_ti (token t, channel i) is taken as normal with standard deviation c_i r_t, where c_i is the
channel's absmax over `CREST`, and r_t the token's absmax over that of the largest channel. The error of the layer's
output, relative to each token's own output, is then

    E(s) = Σ_t p_t Σ_i w_i · ρ(c_i r_t / s)        w_i ∝ c_i² · (energy of column i of the weight)

with ρ(u) the relative squared error of normal numbers of standard deviation u in the format at scale 1: about 2⁻¹⁰ over
the normal range of FP8, and up to 1 below it. Only the product c_i r_t matters, so in bins of a quarter octave the sum
over channels and tokens is a convolution, and E(s) is one dot product per scale.

The chosen scale is the largest whose E is within `TOLERANCE_DB` of the best: up to `MOST` times absmax / max, or 1.0 if
that is larger, clips nothing and is within the tolerance too. It is at least `LEAST` times absmax / max, from factors
measured on nine models: at 1.5 few layers clip; at 2 two models lose 0.1 to 0.2 dB.

Limits. If outlier tokens are few, the absmax of their channels is below `CREST` standard deviations, and all others
count as quieter than they are: the scale comes out too small, never too large. Real values are heavier around zero than
normal ones; relative errors there have no weight.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .formats.record import Grid
from .kernels import NONFINITE_BIN
from .layers import Layer, dequantize
from .stats import BIN_CENTRES

Float = NDArray[np.float64]

LEAST, MOST = 1.5, 16.0
"""Bounds of the factor on absmax / max."""
TOLERANCE_DB = 0.1
"""The increase in the error of a layer's output that counts as free."""
CREST = 3.0
"""A channel's absmax over its standard deviation in the largest tokens, as for some hundred normal numbers."""
BINS_PER_OCTAVE = 4
BANDS, BAND_ROWS = 8, 16
"""Sampled rows of a weight: this many evenly spaced bands of this many rows."""


def column_energies(checkpoint: Checkpoint, layer: Layer) -> Float:
    """Mean square of each column of a dequantized weight, float64 [in], from a sample of rows; within about 12 %."""
    starts = np.unique(np.linspace(0, max(layer.out_features - BAND_ROWS, 0), BANDS).astype(int)).tolist()
    bands = [dequantize(checkpoint, layer, slice(start, start + BAND_ROWS)) for start in starts]
    rows_RI = np.concatenate(bands)
    energies: Float = np.einsum("ri,ri->i", rows_RI, rows_RI, dtype=np.float64) / max(len(rows_RI), 1)
    return energies


def free_scale(
    grid: Grid,
    absmax: float,
    channel_absmax_I: NDArray[np.float32],
    column_energies_I: Float,
    row_histogram: NDArray[np.int64],
) -> float:
    """The largest input scale that is free for a layer's output.

    Args:
        grid: of the inputs' codes.
        absmax: largest observed |x|, > 0.
        channel_absmax_I: the same per channel, [in].
        column_energies_I: mean square of the weight's columns, [in].
        row_histogram: tokens per bin of their absmax, [BINS], as in `Statistics.row_histogram`.

    Returns:
        The scale, ≥ absmax / max.
    """
    least = absmax / grid.max
    steps = np.arange(round(np.log2(MOST)) * BINS_PER_OCTAVE + 1)
    scales = least * np.exp2(steps / BINS_PER_OCTAVE)
    if least < 1:
        scales = np.append(scales, 1.0)
    sizes, shares = _sizes(channel_absmax_I, column_energies_I, row_histogram)
    errors = np.array([float(shares @ np.interp(sizes - np.log2(scale), *_error_table(grid))) for scale in scales])
    return float(scales[errors <= errors.min() * 10 ** (TOLERANCE_DB / 10)].max())


def _sizes(
    channel_absmax_I: NDArray[np.float32], column_energies_I: Float, row_histogram: NDArray[np.int64]
) -> tuple[Float, Float]:
    """log2 of the standard deviations of a layer's values, and their weights in the error of a token's output.

    Both are [bins]; the weights add up to 1.
    """
    used = (channel_absmax_I > 0) & (column_energies_I > 0)
    deviations = channel_absmax_I[used].astype(np.float64) / CREST
    first_channel, channels = _log2_histogram(deviations, deviations**2 * column_energies_I[used])
    counts = row_histogram[:NONFINITE_BIN].astype(np.float64)
    counts[0] = 0  # tokens of zeros lose nothing
    filled = np.flatnonzero(counts)
    absmaxes = BIN_CENTRES[filled]
    first_row, rows = _log2_histogram(absmaxes / channel_absmax_I.max(), counts[filled])
    shares = np.convolve(channels, rows)
    return (first_channel + first_row + np.arange(len(shares))) / BINS_PER_OCTAVE, shares


def _log2_histogram(values: Float, weights: Float) -> tuple[int, Float]:
    """The index of the first bin of log2, and the weights of positive values per bin, scaled to add up to 1."""
    if not values.size or not weights.sum() > 0:
        return 0, np.ones(1)
    bins = np.rint(np.log2(values) * BINS_PER_OCTAVE).astype(int)
    return int(bins.min()), np.bincount(bins - bins.min(), weights) / weights.sum()


@cache
def _error_table(grid: Grid) -> tuple[Float, Float]:
    """log2 of standard deviations, and ρ of each at scale 1, to about 1 %."""
    normal = NormalDist()
    unit = np.array([normal.inv_cdf(0.5 + (number + 0.5) / 4000) for number in range(2000)])
    low, high = np.log2(grid.smallest_step) - 6, np.log2(grid.max)
    deviations = np.arange(low, high, 1 / 8)
    values = np.exp2(deviations)[:, None] * unit
    rounded = grid.levels[np.searchsorted(grid.midpoints, values)]  # beyond max: clipped
    return deviations, ((rounded - values) ** 2).sum(1) / (values**2).sum(1)
