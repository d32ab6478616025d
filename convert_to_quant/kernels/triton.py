"""The measurement of `reference.py` in one pass over the input, for CUDA devices.

One kernel launch reads x once and adds everything to the totals: absmax, both histograms, counts, sums of squares, and
the absmax of the channels of a sample of rows.
Programs loop over blocks of rows, and in a block over chunks of columns. Each warp has a row of its own, so that the
absmax of a row takes only a few shuffles. Values that several programs add to are integers (atomics in any order give
the same bits): counts, and float patterns under max. Only sums of squares are float64, with one addition per program.

Channels. Rows of the sample, at most 12 % of a long input, are read a second time, mostly from the L2 cache, in tiles
of another shape: the maxima of columns cost one atomic max per tile and channel. A branch for them in the loop over all
rows halved the speed of that loop.

The histogram. Each program has 4,096 counters in shared memory, where an atomic increment costs about as much as a
plain store. Triton 3.6 has no such increment, and its `tl.histogram` evaluates every bin for every element (530
instructions per element at 4,096 bins, by its PTX), so four lines of PTX declare and increment the counters. Without
PTX (ROCm, Triton's interpreter), `tl.histogram` replaces them.

Registers. A thread keeps one running sum per group of 8 adjacent lanes between chunks, not one per lane: with the
latter (168 registers, 12 warps per multiprocessor) the kernel took twice as long, waiting for memory.

The common case pays for no other. Lanes outside of x count as zeros, and their number is subtracted at the end. The
loop does not look for infinities and NaN: they show in the sum of squares. A program reads its rows a second time, with
care, if its sum is not finite, or if its absmax is outside [2^-40, 2^50) so that squares could leave the range of
float32. On a healthy model that never happens.

Sums. Lanes add float32 squares; a lane adds few of them, so the error stays near 1e-7.

Speed (NVIDIA H200, 2026-11-22, benchmarks/recorder_kernel.py): 4,608 x 3,072 bfloat16 values in 23 us, 62 % of the
speed of a plain read; 4,608 x 15,360 in 58 us, 78 %. docs/speed.md has more, and what did not help.
"""

from __future__ import annotations

import subprocess
import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import TritonError

from . import BINS, CHANNEL_ROWS, NONFINITE_BIN, SIGMA_BINS, reference
from .reference import MAGNITUDE_BITS, Totals

TILE_LOADS, TILE_ROWS, TILE_COLUMNS = 4, 4, 256
WARPS = 4
"""A warp reads 1,024 values of a row at once: four loads of 16 bytes per thread, for 16-bit values."""
PROGRAMS_PER_MULTIPROCESSOR = 3
"""Fewer wait for memory; more wait for each other when they add their counters to the totals.

4,608 x 3,072 bfloat16 values on an H200: 24 us with 2, 23 with 3, 26 with 4, 37 with 8.
"""
CHANNEL_TILE = (4, 1024)
"""Rows of the sample and channels whose maxima a program takes at a time.

More rows gain 4 us of 78 with 15,360 channels; fewer channels cost 5 us with one row.
"""
GROUP = 8
"""Adjacent lanes of one thread, which keeps one running sum for them."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_BINS = tl.constexpr(BINS)
_NONFINITE_BIN = tl.constexpr(NONFINITE_BIN)
_GROUP = tl.constexpr(GROUP)
_SIGMA_COLUMNS = tl.constexpr(SIGMA_BINS + 1)
_MAGNITUDE_BITS = tl.constexpr(MAGNITUDE_BITS)
_SMALL = tl.constexpr(2.0**-40)
_LARGE = tl.constexpr(2.0**50)


_DECLARE = tl.constexpr(".shared .align 16 .b32 observed_bins[4096];\n\tmov.u32 $0, observed_bins;")
"""Declares the counters in shared memory and returns their address. Emitted once, so its operand is a scalar."""
_STORE_ZERO = tl.constexpr("st.shared.u32 [$1], 0;\n\tmov.u32 $0, 0;")
_INCREMENT = tl.constexpr("red.shared.add.u32 [$1], 1;\n\tmov.u32 $0, 0;")
_READ = tl.constexpr("ld.shared.u32 $0, [$1];")


@triton.jit  # type: ignore[untyped-decorator]
def _ptx(code: tl.constexpr, operand):  # type: ignore[no-untyped-def]
    """Run PTX on one operand of any shape: an address, except for `_DECLARE`."""
    return tl.inline_asm_elementwise(code, "=r,r", [operand], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _float32(value):  # type: ignore[no-untyped-def]
    """Widen exactly: a bfloat16 is the upper half of a float32, subnormal or not."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _row_starts(row, rows_per_batch, batch_stride, row_stride):  # type: ignore[no-untyped-def]
    """Offsets of rows in x, which may be a slice of a batch."""
    batch = row // rows_per_batch
    return batch.to(tl.int64) * batch_stride + (row - batch * rows_per_batch).to(tl.int64) * row_stride


@triton.jit  # type: ignore[untyped-decorator]
def _places(column, start, LOADS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns [1, LOADS, COLUMNS] of a tile, and offsets in x [ROWS, LOADS, COLUMNS]."""
    columns = column + COLUMNS * tl.arange(0, LOADS)[None, :, None] + tl.arange(0, COLUMNS)[None, None, :]
    return columns, start[:, None, None] + columns


@triton.jit  # type: ignore[untyped-decorator]
def _groups(tile, LOADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile whose last axis is the adjacent lanes of one thread."""
    return tl.reshape(tile, [ROWS, LOADS, COLUMNS // _GROUP, _GROUP])


@triton.jit
def _add_up(groups):  # type: ignore[no-untyped-def]
    """Sums [ROWS, COLUMNS / GROUP] of a tile, without communication between threads."""
    return tl.sum(tl.sum(groups, axis=3), axis=1)


@triton.jit
def _largest(groups):  # type: ignore[no-untyped-def]
    """Maxima likewise; NaN are ignored."""
    return tl.max(tl.max(groups, axis=3), axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _carefully(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    x,
    row_histogram,
    rows,
    columns,
    rows_per_batch,
    batch_stride,
    row_stride,
    blocks,
    LOADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Read this program's rows again, for values that are not finite or whose squares leave the range of float32.

    Adds the rows that `_observe` left out of the histogram because of an infinity; returns absmax, and the sum of
    squares in float64.
    """
    top = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS // _GROUP], tl.float64)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        start = _row_starts(row, rows_per_batch, batch_stride, row_stride)
        largest = tl.zeros([ROWS, COLUMNS // _GROUP], tl.float32)
        largest_finite = tl.zeros([ROWS, COLUMNS // _GROUP], tl.float32)
        for column in range(0, columns, LOADS * COLUMNS):
            column_numbers, places = _places(column, start, LOADS, COLUMNS)
            here = (row < rows)[:, None, None] & (column_numbers < columns)
            value = _groups(_float32(tl.load(x + places, mask=here, other=0.0)), LOADS, ROWS, COLUMNS)
            finite = tl.where(tl.abs(value) < float("inf"), value, 0.0)
            wide = finite.to(tl.float64)
            squares += _add_up(wide * wide)
            largest = tl.maximum(largest, _largest(tl.abs(value)))
            largest_finite = tl.maximum(largest_finite, _largest(tl.abs(finite)))
        left_out = (tl.max(largest, axis=1) < float("inf")) == 0
        row_absmax = tl.max(largest_finite, axis=1)
        _add_rows(row_histogram, row_absmax, (row < rows) & left_out, ROWS)
        top = tl.maximum(top, row_absmax)
    return tl.max(top, axis=0), tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _add_rows(row_histogram, row_absmax, here, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    bins = row_absmax.to(tl.int32, bitcast=True) >> 19
    tl.atomic_add(row_histogram + bins, tl.full([ROWS], 1, tl.int64), mask=here, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _add_channels(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    x,
    channel_bits,
    rows,
    columns,
    rows_per_batch,
    batch_stride,
    row_stride,
    sample_step,
    SAMPLED: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add this program's share of the sample, tiles of SAMPLED rows and CHANNELS columns, to the channels' absmax."""
    across = tl.cdiv(columns, CHANNELS)
    tiles = tl.cdiv(tl.cdiv(rows, sample_step), SAMPLED) * across
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        down = tile // across
        column = (tile - down * across) * CHANNELS + tl.arange(0, CHANNELS)
        row = (down * SAMPLED + tl.arange(0, SAMPLED)) * sample_step
        places = _row_starts(row, rows_per_batch, batch_stride, row_stride)[:, None] + column[None, :]
        here = (row < rows)[:, None] & (column < columns)[None, :]
        bits = _float32(tl.load(x + places, mask=here, other=0.0)).to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
        tl.atomic_max(channel_bits + column, tl.max(bits, axis=0), mask=column < columns, sem="relaxed")


@triton.jit
def _add_counts(histogram, zeros, sigma_count, counts, zero_count):  # type: ignore[no-untyped-def]
    """Add a program's counters [BINS] and its number of zeros to the totals."""
    bins = tl.arange(0, _BINS)
    finite_count = tl.sum(tl.where(bins < _NONFINITE_BIN, counts, 0), axis=0)
    nonfinite_count = tl.sum(tl.where(bins >= _NONFINITE_BIN, counts, 0), axis=0)
    tl.atomic_add(zeros, zero_count.to(tl.int64), sem="relaxed")
    tl.atomic_add(sigma_count, finite_count.to(tl.int64), sem="relaxed")
    counts = tl.where(bins < _NONFINITE_BIN, counts, tl.where(bins == _NONFINITE_BIN, nonfinite_count, 0))
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["slot", "rows", "rows_per_batch", "blocks", "sample_step"])  # type: ignore[untyped-decorator]
def _observe(  # type: ignore[no-untyped-def]  # noqa: PLR0917, PLR0915
    x,
    sigma_bin,
    sigma_absmax,
    sigma_count,
    sigma_squares,
    zeros,
    histogram,
    row_histogram,
    channel_bits,
    slot,
    rows,
    columns,
    rows_per_batch,
    batch_stride,
    row_stride,
    blocks,
    sample_step,
    LOADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SAMPLED: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    slot = slot.to(tl.int64)
    level = slot * _SIGMA_COLUMNS + tl.load(sigma_bin)
    row_histogram += slot * _BINS
    bins = tl.arange(0, _BINS)
    if PTX:
        counters = _ptx(_DECLARE, first)
        _ptx(_STORE_ZERO, counters + bins * 4)
        tl.debug_barrier()
    else:
        counts = tl.zeros([_BINS], tl.int32)

    top = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS // _GROUP], tl.float32)
    zero_lanes = tl.zeros([ROWS, COLUMNS // _GROUP], tl.float32)
    absent = 0
    for block in range(first, blocks, programs):
        row = block * ROWS + tl.arange(0, ROWS)
        row_here = row < rows
        start = _row_starts(row, rows_per_batch, batch_stride, row_stride)
        largest = tl.zeros([ROWS, COLUMNS // _GROUP], tl.float32)
        for column in range(0, columns, LOADS * COLUMNS):
            column_numbers, places = _places(column, start, LOADS, COLUMNS)
            here = row_here[:, None, None] & (column_numbers < columns)
            tile = _float32(tl.load(x + places, mask=None if EVEN else here, other=None if EVEN else 0.0))
            bits = tile.to(tl.int32, bitcast=True)
            if PTX:
                _ptx(_INCREMENT, counters + ((bits >> 17) & (4 * _BINS - 4)))
            else:
                numbers = (bits >> 19) & (_BINS - 1)
                counts += tl.histogram(tl.reshape(numbers, [LOADS * ROWS * COLUMNS]), _BINS)
            value = _groups(tile, LOADS, ROWS, COLUMNS)
            largest = tl.maximum(largest, _largest(tl.abs(value)))
            squares += _add_up(value * value)
            zero_lanes += _add_up((value == 0).to(tl.float32))
            absent += LOADS * ROWS * COLUMNS
        absent -= tl.minimum(rows - block * ROWS, ROWS) * columns
        row_absmax = tl.max(largest, axis=1)
        row_finite = row_absmax < float("inf")
        _add_rows(row_histogram, row_absmax, row_here & row_finite, ROWS)
        top = tl.maximum(top, tl.where(row_finite, row_absmax, 0.0))

    _add_channels(
        x, channel_bits, rows, columns, rows_per_batch, batch_stride, row_stride, sample_step, SAMPLED, CHANNELS
    )
    if PTX:
        tl.debug_barrier()
        counts = _ptx(_READ, counters + bins * 4)
    counts = tl.where(bins == 0, counts - absent, counts)
    zero_count = tl.sum(tl.sum(zero_lanes.to(tl.int32), axis=1), axis=0) - absent
    _add_counts(histogram + slot * _BINS, zeros + slot, sigma_count + level, counts, zero_count)

    absmax = tl.max(top, axis=0)
    total_squares = tl.sum(tl.sum(squares.to(tl.float64), axis=1), axis=0)
    if ((total_squares < float("inf")) == 0) | ((absmax < _SMALL) & (absmax > 0)) | (absmax >= _LARGE):
        absmax, total_squares = _carefully(
            x, row_histogram, rows, columns, rows_per_batch, batch_stride, row_stride, blocks, LOADS, ROWS, COLUMNS
        )
    tl.atomic_max(sigma_absmax + level, absmax.to(tl.int32, bitcast=True), sem="relaxed")
    tl.atomic_add(sigma_squares + level, total_squares, sem="relaxed")


def accumulate(totals: Totals, slot: int, sigma_bin: Tensor, x: Tensor) -> None:
    """Add one input to the totals; see `kernels.accumulate`."""
    x = x.detach()
    if x.dtype not in KERNEL_DTYPES:
        x = x.to(torch.float32)
    columns = x.shape[-1] if x.ndim else 1
    assert columns == len(totals.channel_bits[slot]), "the kernel would write beyond them"
    x_BRI = x if x.ndim == 3 else x.reshape(1, -1, columns) if x.ndim < 3 else x.reshape(-1, x.shape[-2], columns)
    if columns > 1 and x_BRI.stride(2) != 1:
        x_BRI = x_BRI.contiguous()
    batches, rows_per_batch, _ = x_BRI.shape
    rows = batches * rows_per_batch
    loads, tile_rows, tile_columns = _tile(columns)
    blocks = triton.cdiv(rows, tile_rows)
    places = PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(x.device)
    with torch.cuda.device_of(x_BRI):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _observe[(min(blocks, places),)](
            x_BRI,
            sigma_bin,
            totals.sigma_absmax_bits,
            totals.sigma_count,
            totals.sigma_squares,
            totals.zeros,
            totals.histogram,
            totals.row_histogram,
            totals.channel_bits[slot],
            slot,
            rows,
            columns,
            rows_per_batch,
            x_BRI.stride(0),
            x_BRI.stride(1),
            blocks,
            max(1, rows // CHANNEL_ROWS),
            LOADS=loads,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            SAMPLED=CHANNEL_TILE[0],
            CHANNELS=CHANNEL_TILE[1],
            EVEN=rows % tile_rows == 0 and columns % (loads * tile_columns) == 0,
            PTX=x.is_cuda and torch.version.hip is None,
            num_warps=WARPS,
        )


def works(device: str | torch.device = "cuda") -> bool:
    """Whether the kernel compiles on a device and agrees with the reference there.

    Triton needs a C compiler at run time, which many machines lack, and the shared counters rely on how it emits PTX.
    So one small input is measured both ways before the kernel is used. A warning gives the reason if it is not.
    """
    x = torch.linspace(-3, 300, 16 * 128, device=device).to(torch.bfloat16).reshape(16, 128)
    x[3, 7:11] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    parts = (x, x[:5, 1:])
    kernel, definition = (Totals([part.shape[1] for part in parts], x.device) for _ in range(2))
    reason = "Triton counts incorrectly"
    try:
        for slot, part in enumerate(parts):
            reference.accumulate(definition, slot, definition.sigma_numbers[2:3], part)
            accumulate(kernel, slot, kernel.sigma_numbers[2:3], part)
        exact = ("sigma_absmax", "sigma_count", "zeros", "histogram", "row_histogram")
        same = [torch.equal(getattr(kernel, name), getattr(definition, name)) for name in exact]
        if all(same) and all(map(torch.equal, kernel.channel_bits, definition.channel_bits)):
            return True
    except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        reason = f"Triton fails ({error})"
    warnings.warn(f"recording uses slower torch operations: {reason}", stacklevel=2)
    return False


@cache
def _tile(columns: int) -> tuple[int, int, int]:
    """Loads, rows and columns of a tile, all powers of two, so that few lanes are outside of x."""
    dividing = columns & -columns
    width = dividing if dividing >= 128 else max(16, triton.next_power_of_2(columns))
    tile_columns = min(TILE_COLUMNS, width)
    loads = min(TILE_LOADS, max(1, width // tile_columns))
    return loads, TILE_ROWS * TILE_COLUMNS // tile_columns, tile_columns


@cache
def _multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of the device."""
    if device.type != "cuda":  # Triton's interpreter, which runs programs one after the other
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
