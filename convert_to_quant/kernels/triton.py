"""The measurement of `reference.py` in one pass over the input, for CUDA devices.

One kernel launch reads x once and adds everything to the totals: absmax, both histograms, counts and sums. Programs
walk over blocks of rows; in a block they walk over chunks of columns, so that a row's absmax is complete before it is
binned. What several programs add to is integers (atomics in any order give the same bits): counts, float patterns under
max, and digits of fixed-point sums.

The histogram. 4,096 counters per program live in shared memory, where an atomic increment costs about what a plain
store costs. Triton 3.6 has no such increment, and its own `tl.histogram` evaluates every bin for every element (530
instructions per element at 4,096 bins, by its PTX), so the counters are declared and incremented in four lines of PTX.
Where PTX does not exist (ROCm, Triton's interpreter) `tl.histogram` stands in.

Sums. Lanes add float32 values and squares; a lane of a program adds few of them, so the error stays near 1e-6. Where
the program's absmax lies outside [2^-40, 2^50), squares could leave the range of float32, and the program reads its
rows a second time in float64. That branch never runs on a healthy model.
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

from . import BINS, DIGITS, NONFINITE_BIN, SIGMA_BINS, reference
from .reference import Totals

TILE = 4096
"""Values that a program holds at once: 32 per thread."""
WARPS = 4
PROGRAMS_PER_MULTIPROCESSOR = 3
"""As many as fit: a thread uses 168 registers on Hopper, of 65,536 per multiprocessor."""

ZERO_BIN = BINS
"""Private to the kernel, where zeros are counted apart from other small values."""
OUTSIDE_BIN = BINS + 1
"""Private to the kernel: lanes outside of x."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_BINS = tl.constexpr(BINS)
_NONFINITE_BIN = tl.constexpr(NONFINITE_BIN)
_ZERO_BIN = tl.constexpr(ZERO_BIN)
_OUTSIDE_BIN = tl.constexpr(OUTSIDE_BIN)
_SIGMA_COLUMNS = tl.constexpr(SIGMA_BINS + 1)
_DIGITS = tl.constexpr(DIGITS)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
_SMALL = tl.constexpr(2.0**-40)
_LARGE = tl.constexpr(2.0**50)


@triton.jit
def _shared_counters(anything):  # type: ignore[no-untyped-def]
    """Declare the counters in shared memory; returns their address. Must be emitted once: call it with a scalar."""
    return tl.inline_asm_elementwise(
        ".shared .align 16 .b32 observed_bins[4098];\n\tmov.u32 $0, observed_bins;",
        "=r,r",
        [anything],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _store_zero(address):  # type: ignore[no-untyped-def]
    tl.inline_asm_elementwise(
        "st.shared.u32 [$1], 0;\n\tmov.u32 $0, 0;", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _increment(address):  # type: ignore[no-untyped-def]
    tl.inline_asm_elementwise(
        "red.shared.add.u32 [$1], 1;\n\tmov.u32 $0, 0;", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _read(address):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(
        "ld.shared.u32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _add_digits(target, value, per_unit):  # type: ignore[no-untyped-def]
    """Add a float64 scalar to fixed-point digits; `Totals.digits` explains the steps."""
    number = tl.arange(0, 32)
    here = number < _DIGITS
    magnitude = tl.abs(value)
    whole = tl.floor(magnitude * tl.load(per_unit + number, mask=here, other=0.0))
    above = tl.floor(magnitude * tl.load(per_unit + number + 1, mask=here, other=0.0))
    digits = (whole - above * 4294967296.0).to(tl.int64)
    digits = tl.where(value < 0, -digits, digits)
    tl.atomic_add(target + number, digits, mask=here & (digits != 0), sem="relaxed")


@triton.jit
def _float32(value):  # type: ignore[no-untyped-def]
    """Widen bit for bit: a bfloat16 is the upper half of a float32, subnormal or not."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _row_starts(row, rows_per_batch, batch_stride, row_stride):  # type: ignore[no-untyped-def]
    """Offsets of rows in x, which may be a slice out of the middle of a batch."""
    batch = row // rows_per_batch
    return batch.to(tl.int64) * batch_stride + (row - batch * rows_per_batch).to(tl.int64) * row_stride


@triton.jit  # type: ignore[untyped-decorator]
def _wide_sums(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    x,
    rows,
    columns,
    rows_per_batch,
    batch_stride,
    row_stride,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum and sum of squares of this program's rows in float64, for values whose squares float32 cannot hold."""
    lanes = tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    squares = tl.zeros([ROWS, COLUMNS], tl.float64)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        start = _row_starts(row, rows_per_batch, batch_stride, row_stride)
        for column in range(0, columns, COLUMNS):
            here = (row < rows)[:, None] & (column + lanes < columns)[None, :]
            value = _float32(tl.load(x + start[:, None] + (column + lanes)[None, :], mask=here, other=0.0))
            finite = (value.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS) < _INFINITY_BITS
            wide = tl.where(finite, value, 0.0).to(tl.float64)
            sums += wide
            squares += wide * wide
    return tl.sum(tl.sum(sums, axis=1), axis=0), tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit
def _add_counts(histogram, zeros, sigma_count, counts, zero_count):  # type: ignore[no-untyped-def]
    """Add a program's counters [BINS] and its number of zeros to the totals."""
    bins = tl.arange(0, _BINS)
    finite_count = tl.sum(tl.where(bins < _NONFINITE_BIN, counts, 0), axis=0) + zero_count
    nonfinite_count = tl.sum(tl.where(bins >= _NONFINITE_BIN, counts, 0), axis=0)
    tl.atomic_add(zeros, zero_count.to(tl.int64), sem="relaxed")
    tl.atomic_add(sigma_count, finite_count.to(tl.int64), sem="relaxed")
    counts = tl.where(bins == 0, counts + zero_count, counts)
    counts = tl.where(bins < _NONFINITE_BIN, counts, tl.where(bins == _NONFINITE_BIN, nonfinite_count, 0))
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["slot", "rows", "rows_per_batch", "blocks"])  # type: ignore[untyped-decorator]
def _observe(  # type: ignore[no-untyped-def]  # noqa: PLR0917, PLR0915
    x,
    sigma_bin,
    per_unit,
    sigma_absmax,
    sigma_count,
    sigma_square_digits,
    sum_digits,
    zeros,
    histogram,
    row_histogram,
    slot,
    rows,
    columns,
    rows_per_batch,
    batch_stride,
    row_stride,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    slot = slot.to(tl.int64)
    level = slot * _SIGMA_COLUMNS + tl.load(sigma_bin)
    bins = tl.arange(0, _BINS)
    if PTX:
        counters = _shared_counters(first)
        _store_zero(counters + bins * 4)
        _store_zero(counters + _ZERO_BIN * 4)
        tl.debug_barrier()
    else:
        wide_counts = tl.zeros([2 * _BINS], tl.int32)

    lanes = tl.arange(0, COLUMNS)
    top = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(first, blocks, programs):
        row = block * ROWS + tl.arange(0, ROWS)
        row_here = row < rows
        start = _row_starts(row, rows_per_batch, batch_stride, row_stride)
        largest = tl.zeros([ROWS, COLUMNS], tl.float32)
        for column in range(0, columns, COLUMNS):
            here = row_here[:, None] & (column + lanes < columns)[None, :]
            places = x + start[:, None] + (column + lanes)[None, :]
            value = _float32(tl.load(places, mask=None if EVEN else here, other=None if EVEN else 0.0))
            bits = value.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
            value = tl.where(bits < _INFINITY_BITS, value, 0.0)
            largest = tl.maximum(largest, tl.abs(value))
            sums += value
            squares += value * value
            number = tl.where(bits == 0, _ZERO_BIN, bits >> 19)
            if not EVEN:
                number = tl.where(here, number, _OUTSIDE_BIN)
            if PTX:
                _increment(counters + number * 4)
            else:
                wide_counts += tl.histogram(tl.reshape(number, [ROWS * COLUMNS]), 2 * _BINS)
        row_absmax = tl.max(largest, axis=1)
        row_bins = row_absmax.to(tl.int32, bitcast=True) >> 19
        one = tl.full([ROWS], 1, tl.int64)
        tl.atomic_add(row_histogram + slot * _BINS + row_bins, one, mask=row_here, sem="relaxed")
        top = tl.maximum(top, row_absmax)

    absmax = tl.max(top, axis=0)
    tl.atomic_max(sigma_absmax + level, absmax.to(tl.int32, bitcast=True), sem="relaxed")
    total = tl.sum(tl.sum(sums.to(tl.float64), axis=1), axis=0)
    total_squares = tl.sum(tl.sum(squares.to(tl.float64), axis=1), axis=0)
    if ((absmax < _SMALL) & (absmax > 0)) | (absmax >= _LARGE):
        total, total_squares = _wide_sums(
            x, rows, columns, rows_per_batch, batch_stride, row_stride, blocks, ROWS, COLUMNS
        )
    _add_digits(sum_digits + slot * _DIGITS, total, per_unit)
    _add_digits(sigma_square_digits + level * _DIGITS, total_squares, per_unit)

    if PTX:
        tl.debug_barrier()
        counts = _read(counters + bins * 4)
        zero_count = _read(counters + _ZERO_BIN * 4)
    else:
        places = tl.arange(0, 2 * _BINS)
        zero_count = tl.sum(tl.where(places == _ZERO_BIN, wide_counts, 0), axis=0)
        counts = tl.sum(tl.reshape(tl.where(places < _BINS, wide_counts, 0), [2, _BINS]), axis=0)
    _add_counts(histogram + slot * _BINS, zeros + slot, sigma_count + level, counts, zero_count)


def accumulate(totals: Totals, slot: int, sigma_bin: Tensor, x: Tensor) -> None:
    """Add one input to the totals; `kernels.accumulate` says what the arguments are."""
    x = x.detach()
    if x.dtype not in KERNEL_DTYPES:
        x = x.to(torch.float32)
    columns = x.shape[-1] if x.ndim else 1
    x_BRI = x if x.ndim == 3 else x.reshape(1, -1, columns) if x.ndim < 3 else x.reshape(-1, x.shape[-2], columns)
    if columns > 1 and x_BRI.stride(2) != 1:
        x_BRI = x_BRI.contiguous()
    batches, rows_per_batch, _ = x_BRI.shape
    rows = batches * rows_per_batch
    tile_columns = _tile_columns(columns)
    tile_rows = TILE // tile_columns
    blocks = triton.cdiv(rows, tile_rows)
    places = PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(x.device)
    rounds = triton.cdiv(blocks, places)
    with torch.cuda.device_of(x_BRI):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _observe[(triton.cdiv(blocks, rounds),)](
            x_BRI,
            sigma_bin,
            totals.per_unit,
            totals.sigma_absmax.view(torch.int32),
            totals.sigma_count,
            totals.sigma_square_digits,
            totals.sum_digits,
            totals.zeros,
            totals.histogram,
            totals.row_histogram,
            slot,
            rows,
            columns,
            rows_per_batch,
            x_BRI.stride(0),
            x_BRI.stride(1),
            blocks,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            EVEN=rows % tile_rows == 0 and columns % tile_columns == 0,
            PTX=x.is_cuda and torch.version.hip is None,
            num_warps=WARPS,
        )


def works(device: str | torch.device = "cuda") -> bool:
    """Whether the kernel compiles on a device and agrees with the reference there.

    Triton needs a C compiler at run time, which many machines lack, and the shared counters rely on how it emits PTX;
    so one small input is measured both ways before the kernel is trusted. Says why with a warning where it is not.
    """
    x = torch.linspace(-3, 300, 16 * 128, device=device).to(torch.bfloat16).reshape(16, 128)
    x[3, 7:11] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    kernel, definition = (Totals(1, x.device) for _ in range(2))
    for part in (x, x[:5, 1:]):
        reference.accumulate(definition, 0, definition.sigma_numbers[2:3], part)
        try:
            accumulate(kernel, 0, kernel.sigma_numbers[2:3], part)
        except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
            warnings.warn(f"recording falls back to slower torch operations: Triton fails here ({error})", stacklevel=2)
            return False
    exact = ("sigma_absmax", "sigma_count", "zeros", "histogram", "row_histogram")
    if all(torch.equal(getattr(kernel, name), getattr(definition, name)) for name in exact):
        return True
    warnings.warn("recording falls back to slower torch operations: Triton miscounts here", stacklevel=2)
    return False


def _tile_columns(columns: int) -> int:
    """Width of a tile: a power of two that divides the columns, so that no lane idles, where a fair one does."""
    dividing = columns & -columns
    return min(1024, dividing if dividing >= 128 else max(16, triton.next_power_of_2(columns)))


@cache
def _multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    if device.type != "cuda":  # Triton's interpreter, which runs them one after the other
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
