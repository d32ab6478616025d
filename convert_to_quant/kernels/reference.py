"""Defines, in torch, what is measured of a layer's input.

`observe` measures one input; `Totals` adds observations up per layer. Everything stays on the input's device and no
value is read back, so a CUDA stream never waits for the host.

Maths. Each row is scaled by a power of two that brings its absmax near 1, so that its float32 sum of squares neither
overflows nor underflows where it matters; rows are then added in float64. A power of two rounds nothing.

Limits. float64 inputs are rounded to float32 first. Counts, absmax and both histograms are exact; sums have the float32
rounding error of a row (about 1e-7, relative).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import BINS, CHANNEL_ROWS, NONFINITE_BIN, SIGMA_BINS

MAGNITUDE_BITS = 0x7FFFFFFF

BLOCK_ELEMENTS_CPU = 1 << 18
"""Elements per step on a CPU: temporaries of 1 MiB stay in the cache.

About 3 ns per element on one core, of which 1 is counting (2026-11-22); one step over a whole input takes three times
that."""


class Observation(NamedTuple):
    """The measurements of one input, on its device."""

    absmax: Tensor
    """Largest finite |x|, float32, shape (); 0 if there is none."""
    sum_of_squares: Tensor
    """Sum of the squares of the finite values, float64, shape ()."""
    zeros: Tensor
    """Number of values that are 0 or -0, int64, shape ()."""
    histogram: Tensor
    """Values per bin of |x|, int64 [BINS]; infinities and NaN in NONFINITE_BIN."""
    row_histogram: Tensor
    """Rows per bin of the row's absmax over its finite values, int64 [BINS]."""
    channel_bits: Tensor
    """Float32 pattern of the largest |x| of each channel in a sample of rows, NaN above all, int32 [in_features]."""


def observe(x: Tensor) -> Observation:
    """Measure one input of a linear layer.

    Args:
        x: [..., in_features] with at least one element, any strides and floating dtype.
    """
    rows_RI = x.detach().reshape(-1, x.shape[-1] if x.ndim else 1)
    step = max(1, BLOCK_ELEMENTS_CPU // rows_RI.shape[1]) if x.device.type == "cpu" else len(rows_RI)
    blocks = [_observe_rows(block) for block in torch.split(rows_RI, step)]
    columns = blocks[0] if len(blocks) == 1 else [torch.cat(parts) for parts in zip(*blocks, strict=True)]
    row_bits, row_squares, nonzeros, prefixes = columns
    sample_RI = rows_RI[:: max(1, len(rows_RI) // CHANNEL_ROWS)].to(torch.float32)
    return Observation(
        absmax=row_bits.amax().view(torch.float32),
        sum_of_squares=row_squares.sum(),
        zeros=rows_RI.numel() - nonzeros.sum(),
        histogram=_count_prefixes(prefixes),
        row_histogram=_count_prefixes(_prefixes(row_bits)),
        channel_bits=(sample_RI.view(torch.int32) & MAGNITUDE_BITS).amax(0),
    )


def _observe_rows(rows_RI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pattern of the absmax and sum of squares per row; the number of nonzeros [1]; all prefixes."""
    rows_RI = rows_RI.to(torch.float32)
    bits_RI = rows_RI.view(torch.int32) & MAGNITUDE_BITS
    finite_RI = rows_RI.nan_to_num(0.0, 0.0, 0.0)  # on a CPU 9 times faster than torch.where
    row_bits = (finite_RI.view(torch.int32) & MAGNITUDE_BITS).amax(-1)

    exponent = (row_bits >> 23).clamp(1, 253)  # 2^(exponent - 127) <= row absmax < twice that, for normal numbers
    scaled_RI = finite_RI * ((254 - exponent) << 23).view(torch.float32).unsqueeze(1)
    unit = ((exponent.to(torch.int64) + (1023 - 127)) << 52).view(torch.float64)
    row_squares = (scaled_RI * scaled_RI).sum(-1, dtype=torch.float32).to(torch.float64)
    nonzeros = torch.count_nonzero(bits_RI).view(1)
    return row_bits, row_squares * unit * unit, nonzeros, _prefixes(bits_RI)


def _prefixes(bits: Tensor) -> Tensor:
    """First bits of non-negative float32 patterns, flat: 16 on a CPU, where shifts are slow; elsewhere the bin."""
    if bits.device.type == "cpu":
        return bits.flatten().view(torch.int16)[1 if sys.byteorder == "little" else 0 :: 2]
    return bits.flatten() >> 19


def _count_prefixes(prefixes: Tensor) -> Tensor:
    """Histogram, int64 [BINS], without rounding and without waiting for the device."""
    device = prefixes.device
    if device.type == "cpu":  # counting 8 times as many bins costs less than shifting
        counts = torch.bincount(prefixes, minlength=8 * BINS).view(BINS, 8).sum(1)
    elif device.type == "cuda":  # torch.bincount would read the largest bin back
        counts = torch.histc(prefixes, BINS, 0, BINS).to(torch.int64)
    else:
        ones = torch.ones((), dtype=torch.int64, device=device).expand(len(prefixes))
        counts = torch.zeros(BINS, dtype=torch.int64, device=device).scatter_add_(0, prefixes.to(torch.int64), ones)
    counts[NONFINITE_BIN] = counts[NONFINITE_BIN:].sum()
    counts[NONFINITE_BIN + 1 :] = 0
    return counts


class Totals:
    """Sums and maxima of observations, per layer, on one device.

    Args:
        widths: in_features of each slot.
        device: of all tensors.

    Attributes:
        sigma_absmax: float32 [slots, SIGMA_BINS + 1]; `sigma_absmax_bits` is the same memory as int32.
        sigma_count: finite values, int64 [slots, SIGMA_BINS + 1].
        sigma_squares: sums of squares, float64 [slots, SIGMA_BINS + 1].
        zeros: int64 [slots].
        histogram, row_histogram: int64 [slots, BINS].
        channel_bits: per slot as in `Observation`, int32 [in_features].
        sigma_numbers: 0 .. SIGMA_BINS, int64; `sigma_numbers[i : i + 1]` is column i without a copy from the host.
    """

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        slots, columns = len(widths), SIGMA_BINS + 1
        with torch.inference_mode(False):  # tensors made in inference mode could not be updated outside of it
            self.sigma_absmax_bits = zeros(slots, columns, dtype=torch.int32)
            self.sigma_absmax = self.sigma_absmax_bits.view(torch.float32)
            self.sigma_count = zeros(slots, columns)
            self.sigma_squares = zeros(slots, columns, dtype=torch.float64)
            self.zeros = zeros(slots)
            self.histogram, self.row_histogram = zeros(slots, BINS), zeros(slots, BINS)
            self.channel_bits = [zeros(width, dtype=torch.int32) for width in widths]
            self.sigma_numbers = torch.arange(columns, device=device)


def accumulate(totals: Totals, slot: int, sigma_bin: Tensor, x: Tensor) -> None:
    """Add one input to the totals; see `kernels.accumulate`."""
    seen = observe(x)
    finite = seen.histogram[:NONFINITE_BIN].sum()
    channel_bits = totals.channel_bits[slot]
    totals.sigma_absmax[slot].scatter_reduce_(0, sigma_bin, seen.absmax.view(1), "amax")
    totals.sigma_count[slot].index_add_(0, sigma_bin, finite.view(1))
    totals.sigma_squares[slot].index_add_(0, sigma_bin, seen.sum_of_squares.view(1))
    totals.zeros[slot] += seen.zeros
    totals.histogram[slot] += seen.histogram
    totals.row_histogram[slot] += seen.row_histogram
    torch.maximum(channel_bits, seen.channel_bits, out=channel_bits)
