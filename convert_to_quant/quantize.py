"""Quantization of one weight: its scales and codes, computed and written in bands of rows.

A weight W becomes codes C = round(clamp(W / s, ±max)) on the format's grid and a scale s, with W ≈ C · s. The format
has one s per weight (tensor), row, or block.

    absmax   s = max|W| / max: nothing is clipped, the largest weight becomes the largest code.
    mse      the s with the least Σ (W - C·s)² between half and twice that.

The mse search is exact. For fixed codes the error is a parabola in s, and a code changes only where |W|/s crosses a
midpoint m between two code values, at s = |W|/m. These breakpoints divide the axis of s into intervals in which
error(s) = Σ w² - 2 s Σ w·c + s² Σ c²; sorting them and accumulating the sums gives the global minimum. A 16-bit weight
has at most 32,768 magnitudes, so a histogram represents it; a float32 weight is binned to bfloat16 for the search (not
for the codes).

Bands are streamed to the output, several layers at a time in threads, so memory use does not grow with the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import names
from .checkpoint import ALL_ROWS, Checkpoint, to_float32
from .errors import TensorError
from .formats import DEFAULT
from .formats.packing import round_up
from .formats.record import TORCH_NAMES, Format, Packed, Weight, scale_grid, spans
from .layers import Layer
from .layout import Sink
from .lazy_torch import torch
from .options import ConvertOptions

if TYPE_CHECKING:
    from torch import Tensor

BAND_VALUES = 1 << 20
"""Values per step. With a quarter of them, two threads wait for each other and take 1.5 times as long (2026-11-27)."""

DEVICE_BAND_VALUES = 1 << 23
"""The same on a GPU, enough to occupy it."""

STAGED_BYTES = 1 << 24
"""Bytes that a thread copies to a GPU at a time."""


def rows_at_a_time(layer: Layer, multiple: int = 1) -> int:
    """How many rows of a weight to hold in memory, rounded up to a multiple."""
    return round_up(max(1, BAND_VALUES // max(1, layer.in_features)), multiple)


def refuse_not_finite(checkpoint: Checkpoint, layer: Layer, _write: Sink) -> None:
    """Refuse a copied weight with NaN or infinite values, which would ruin every image."""
    rows = _Rows(checkpoint, layer, DEFAULT)
    rows.absmax(spans(layer.out_features, rows.step), layer.shape)


def quantize_weight(
    checkpoint: Checkpoint,
    layer: Layer,
    fmt: Format,
    options: ConvertOptions,
    sink: Sink,
    *,
    device: torch.device | None = None,
) -> None:
    """Quantize the weight of a layer in high precision, and pass codes and scales to `sink` in consecutive pieces.

    Without a device, bands are computed one by one on the CPU. The results are identical, except that sums of formats
    that rotate have another order on a GPU.

    Raises:
        TensorError: the weight has NaN or infinite values.
    """
    rows = _Rows(checkpoint, layer, fmt) if device is None else _RowsOnDevice(checkpoint, layer, fmt, device)
    if isinstance(fmt, Packed):
        bands = list(spans(layer.out_features, rows.step))
        weight = Weight(layer.shape, lambda: float(rows.absmax(bands, layer.shape).item()), rows)
        pieces = fmt.pieces(weight, options.weight_scale, rows.step)
    elif device is None and fmt.granularity == "tensor" and layer.weight.dtype in ("BF16", "F16"):
        pieces = _by_table(rows, options)
    else:
        pieces = _pieces(rows, options)
    done: Counter[str] = Counter()
    for suffix, piece in pieces:
        data = bytes_of(piece)
        sink(suffix, data, done[suffix])
        done[suffix] += data.nbytes


def _by_table(rows: _Rows, options: ConvertOptions) -> Iterator[tuple[str, Tensor]]:
    """16-bit weights with one scale: a table of all 65,536 codes takes half the time of arithmetic."""
    bands = list(spans(rows.layer.out_features, rows.step))
    scale = torch.from_numpy(_scales(rows, bands, rows.layer.shape, options))
    codes = rows.fmt.codes.round(torch.from_numpy(_meanings(rows.layer.weight.dtype)) / scale[0])
    table = codes.view(torch.uint8).numpy()
    for band in bands:
        yield names.WEIGHT, torch.from_numpy(np.take(table, rows.bits(band).view(np.uint16), mode="clip"))
    yield names.WEIGHT_SCALE, scale


def _pieces(rows: _Rows, options: ConvertOptions) -> Iterator[tuple[str, Tensor]]:
    """All other cases: codes band by band, after all bands that share a scale were read; then the scales."""
    block = rows.fmt.block(rows.layer.shape, options.block_size)
    scale = np.empty(scale_grid(rows.layer.shape, block), np.float32)
    for bands in _bands(rows.layer, block[0], rows.step):
        scale[bands[0].start // block[0] : -(-bands[-1].stop // block[0])] = _scales(rows, bands, block, options)
        for band in bands:
            yield names.WEIGHT, rows.codes(band, scale, block)
    yield names.WEIGHT_SCALE, torch.from_numpy(scale)


def _meanings(dtype: str) -> NDArray[np.float32]:
    """The values of the 65,536 patterns of a 16-bit dtype."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    return to_float32(patterns.view(np.float16) if dtype == "F16" else patterns, dtype)


def _scales(
    rows: _Rows, bands: Sequence[slice], block: tuple[int, int], options: ConvertOptions
) -> NDArray[np.float32]:
    """The scales of the blocks in some bands, [n_out, n_in]."""
    scale = rows.fmt.weight_scales(rows.absmax(bands, block))
    return _least_squares_grid(rows, bands, block, scale) if options.weight_scale == "mse" else scale


class _Rows:
    """Rows of a weight in high precision, `step` rows at a time."""

    def __init__(self, checkpoint: Checkpoint, layer: Layer, fmt: Format) -> None:
        self.checkpoint, self.layer, self.fmt = checkpoint, layer, fmt
        self.step = rows_at_a_time(layer, checkpoint.rows_together)
        self.last: tuple[slice, NDArray[Any]] | None = None

    def bits(self, band: slice) -> NDArray[Any]:
        """See `Checkpoint.bits`; caches the last band."""
        if self.last is None or self.last[0] != band:
            self.last = band, self.checkpoint.bits(self.layer.weight.name, band)
        return self.last[1]

    def absmax(self, bands: Iterable[slice], block: tuple[int, int]) -> NDArray[np.float32]:
        """The absmax of each block of some bands, which are whole blocks or parts of one; float32 [n_out, n_in].

        Raises:
            TensorError: a weight is NaN or infinite.
        """
        absmax: NDArray[np.float32] = np.max([self.band_absmax(band, block) for band in bands], axis=0)
        if not np.isfinite(absmax).all():
            name, problem = self.layer.weight.name, "the weight has NaN or infinite values"
            hint = "the input file is damaged or its training diverged"
            raise TensorError(problem, path=self.checkpoint.path_of(name), tensor=name, hint=hint)
        return absmax

    def band_absmax(self, band: slice, block: tuple[int, int]) -> NDArray[np.float32]:
        """The same for one band, without the check."""
        return _block_absmax(self.bits(band), self.layer.weight.dtype, block)

    def unchecked(self, band: slice) -> Tensor:
        """Rows in the file's dtype."""
        return torch.from_numpy(self.bits(band).view(np.uint8)).view(_torch_dtype(self.layer))

    def codes(self, band: slice, scale: NDArray[np.float32], block: tuple[int, int]) -> Tensor:
        """Codes of a band at the scales [n_out, n_in] of all blocks."""
        weight_OI = self.unchecked(band)
        scales = torch.from_numpy(scale[band.start // block[0] : -(-band.stop // block[0])]).to(weight_OI.device)
        per_row = scales.repeat_interleave(block[0], 0)[band.start % block[0] :][: len(weight_OI)]
        if per_row.shape[1] > 1:
            per_row = per_row.repeat_interleave(block[1], 1)[:, : self.layer.in_features]
        return self.fmt.codes.round(weight_OI.float() / per_row)

    def __call__(self, rows: Any) -> Tensor:
        """Rows by a slice or by indices, in the file's dtype; refuses NaN and infinite weights."""
        bands = [rows] if isinstance(rows, slice) else [slice(row, row + 1) for row in rows.tolist()]
        self.absmax(bands, self.layer.shape)
        return torch.cat([self.unchecked(band) for band in bands]) if len(bands) > 1 else self.unchecked(bands[0])


class _RowsOnDevice(_Rows):
    """Rows of a weight that is copied to a device once, while other threads copy or compute on their own streams."""

    def __init__(self, checkpoint: Checkpoint, layer: Layer, fmt: Format, device: torch.device) -> None:
        super().__init__(checkpoint, layer, fmt)
        self.step = max(1, DEVICE_BAND_VALUES // layer.in_features)
        self.weight = on_device(checkpoint, layer, device)
        if isinstance(fmt, Packed):
            self.absmax([ALL_ROWS], layer.shape)

    def band_absmax(self, band: slice, block: tuple[int, int]) -> NDArray[np.float32]:
        magnitudes = self.weight[band].abs()
        rows, columns = scale_grid((magnitudes.shape[0], magnitudes.shape[1]), block)
        missing = (0, columns * block[1] - magnitudes.shape[1], 0, rows * block[0] - magnitudes.shape[0])
        if any(missing):
            magnitudes = torch.nn.functional.pad(magnitudes, missing)
        largest = magnitudes.reshape(rows, block[0], columns, block[1]).amax((1, 3))
        absmax: NDArray[np.float32] = largest.float().cpu().numpy()
        return absmax

    def unchecked(self, band: slice) -> Tensor:
        return self.weight[band]

    def __call__(self, rows: Any) -> Tensor:
        return self.weight[rows]


def _torch_dtype(layer: Layer) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[layer.weight.dtype])
    return dtype


def on_device(checkpoint: Checkpoint, layer: Layer, device: torch.device) -> Tensor:
    """Copy a weight to a device in the file's dtype, through pinned memory."""
    dtype = _torch_dtype(layer)
    weight = torch.empty(layer.shape, dtype=dtype, device=device)
    rows = min(layer.out_features, max(1, STAGED_BYTES // (layer.in_features * dtype.itemsize)))
    staged = torch.empty((rows, layer.in_features), dtype=dtype, pin_memory=device.type == "cuda")
    for band in spans(layer.out_features, rows):
        part = staged[: band.stop - band.start]
        np.copyto(part.view(torch.uint8).numpy(), checkpoint.bits(layer.weight.name, band).view(np.uint8))
        weight[band].copy_(part)
    return weight


def bytes_of(tensor: Tensor) -> NDArray[Any]:
    """A tensor as numpy float32, or as bytes if it has one-byte elements; copied from a GPU through pinned memory."""
    tensor = (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor).contiguous()
    if tensor.device.type == "cuda":
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    data: NDArray[Any] = tensor.cpu().numpy()
    return data


def _bands(layer: Layer, block_out: int, rows: int) -> Iterator[list[slice]]:
    """Bands of a weight, grouped so that groups share no scale: one of whole blocks, or all parts of one block."""
    step = max(block_out, rows - rows % block_out)
    part = step if rows >= block_out else rows
    for together in spans(layer.out_features, step):
        yield [slice(at, min(at + part, together.stop)) for at in range(together.start, together.stop, part)]


def _block_absmax(bits: NDArray[Any], dtype: str, block: tuple[int, int]) -> NDArray[np.float32]:
    """The absmax of each block of a band of rows; NaN if it contains one.

    Bits without the sign sort by magnitude: finite, then infinity, then NaN. So only the largest are converted.
    """
    if block[0] >= bits.shape[0] and block[1] >= bits.shape[1]:
        bits, block = bits.reshape(1, -1), (1, bits.size)  # three times as fast as row by row
    unsigned, signed = bits.view(f"u{bits.itemsize}"), bits.view(f"i{bits.itemsize}")
    without_sign = np.iinfo(unsigned.dtype).max >> 1
    rows, columns = bits.shape
    if block[1] >= columns:  # the largest signed is positive, the largest unsigned is negative: no temporary
        negative = (unsigned.max(axis=1, keepdims=True) & without_sign).view(signed.dtype)
        magnitudes = np.maximum(signed.max(axis=1, keepdims=True), negative)
    else:
        magnitudes = np.maximum.reduceat(unsigned & without_sign, np.arange(0, columns, block[1]), axis=1)
    if block[0] > 1:
        magnitudes = np.maximum.reduceat(magnitudes, np.arange(0, rows, block[0]), axis=0)
    return to_float32(magnitudes.view(bits.dtype), dtype)


def _least_squares_grid(
    rows: _Rows, bands: Sequence[slice], block: tuple[int, int], absmax_scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The least-squares scales of the blocks in some bands."""
    layer, fmt = rows.layer, rows.fmt
    if scale_grid(layer.shape, block) == (1, 1):
        counts = np.zeros(1 << 15, np.int64)
        for bits in map(rows.bits, bands):
            if layer.weight.dtype in ("BF16", "F16"):
                both_signs = np.bincount(bits.reshape(-1).view(np.uint16), minlength=1 << 16)
                counts += both_signs[: 1 << 15] + both_signs[1 << 15 :]
                continue
            weight_OI = to_float32(bits, layer.weight.dtype)
            rounded = (np.abs(weight_OI).view(np.uint32).reshape(-1) + np.uint32(0x8000)) >> np.uint32(16)
            rounded = np.minimum(rounded, np.uint32(0x7F7F))  # bfloat16's largest finite value
            counts += np.bincount(rounded, minlength=1 << 15)
        used = np.flatnonzero(counts)
        magnitudes = _meanings("F16" if layer.weight.dtype == "F16" else "BF16")[used].astype(np.float64)
        return least_squares_scale(magnitudes, counts[used], absmax_scale, fmt).reshape(1, 1)
    scale = np.empty_like(absmax_scale)
    start, stop = bands[0].start, bands[-1].stop
    for number, at in enumerate(range(start, stop, block[0])):
        weight_OI = to_float32(rows.bits(slice(at, min(at + block[0], stop))), layer.weight.dtype)
        for column, span in enumerate(spans(layer.in_features, block[1])):
            values, counts = np.unique(np.abs(weight_OI[:, span]), return_counts=True)
            found = least_squares_scale(values.astype(np.float64), counts, absmax_scale[number, column], fmt)
            scale[number, column] = found
    return scale


def least_squares_scale(
    magnitudes: NDArray[np.float64], counts: NDArray[np.int64], absmax_scale: Any, fmt: Format = DEFAULT
) -> NDArray[np.float32]:
    """The scale s with the least Σ count · (|w| - s · code(|w| / s))² between half and twice `absmax_scale`.

    Args:
        magnitudes: distinct |w|, float64 [n].
        counts: how often each occurs, [n].
        absmax_scale: max|w| / max, the scale at which nothing is clipped.
        fmt: the format.

    Returns:
        float32 scalar; never worse than `absmax_scale`.

    At 7/6 the second-largest code represents the largest weight exactly, and 0.1 is closer to a code than at 1:

    >>> weights = np.array([0.1, DEFAULT.codes.max])
    >>> round(float(least_squares_scale(weights, np.array([1000, 1]), np.float32(1.0))), 5)
    1.16667
    """
    start = np.asarray(absmax_scale, np.float32).reshape(())
    nonzero = magnitudes > 0
    magnitudes, weights = magnitudes[nonzero], counts[nonzero].astype(np.float64)
    if not len(magnitudes):
        return start
    low, high = float(start) / 2, float(start) * 2
    levels, midpoints = fmt.codes.levels, fmt.codes.midpoints

    # As s grows from low to high, |w| / s crosses the midpoints between |w| / high and |w| / low: one event each.
    first = np.searchsorted(midpoints, magnitudes / high, side="right")
    last = np.searchsorted(midpoints, magnitudes / low, side="left")
    events = last - first
    owner = np.repeat(np.arange(len(magnitudes)), events)
    crossed = np.arange(len(owner)) - np.repeat(np.cumsum(events) - events, events) + first[owner]
    position = magnitudes[owner] / midpoints[crossed]
    order = np.argsort(position, kind="stable")
    owner, crossed, position = owner[order], crossed[order], position[order]

    top = levels[last]
    dot = np.concatenate([[np.sum(weights * magnitudes * top)], weights[owner] * magnitudes[owner]])
    square = np.concatenate([[np.sum(weights * top**2)], weights[owner]])
    dot[1:] *= levels[crossed] - levels[crossed + 1]
    square[1:] *= levels[crossed] ** 2 - levels[crossed + 1] ** 2
    dot, square = np.cumsum(dot), np.cumsum(square)

    edges = np.concatenate([[low], position, [high]])
    best_inside = np.clip(np.divide(dot, square, out=np.full_like(dot, low), where=square > 0), edges[:-1], edges[1:])
    saved = best_inside * (2 * dot - best_inside * square)  # Σ w² - error; the constant does not matter
    found = np.maximum(np.float32(best_inside[int(np.argmax(saved))]), np.float32(fmt.least_scale))

    def error(scale: np.float32) -> float:
        real = levels[np.searchsorted(midpoints, magnitudes / np.float64(scale))] * np.float64(scale)
        return float(np.sum(weights * (magnitudes - real) ** 2))

    return np.asarray(found if error(found) < error(np.float32(start)) else start, np.float32)
