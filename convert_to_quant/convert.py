"""FP16, BF16 and FP32 checkpoints to another number format: which layers, with which scale, and the file.

A weight W becomes codes C = round(clamp(W / s, ±max)) on the format's grid and a scale s, so that W ≈ C · s. One s
serves the whole weight (tensor), a row of it (row), or a block of it (block), as the format has it.

    absmax   s = max|W| / max: nothing is clipped, the largest weight becomes the largest code.
    mse      the s of least Σ (W - C·s)² between a half and twice that. FP8 is a float, so where s falls on its grid
             matters little and clipping matters much; the search says exactly how much.

The mse search is exact. For fixed codes the error is a parabola in s, and a code changes only where |W|/s crosses a
midpoint m between two code values, at s = |W|/m. So the axis of s falls into intervals, in each of which
error(s) = Σ w² - 2 s Σ w·c + s² Σ c² for known sums; sorted breakpoints and running sums give them all, and with them
the global minimum. A 16-bit weight has at most 32,768 magnitudes, so a histogram stands for it; a float32 weight is
binned to bfloat16 for the search (not for the codes).

16-bit weights under one scale are a table look-up (65,536 entries, made with `Grid.encode`, so bit for bit the same).
Work is streamed in chunks straight to the output, layers side by side in threads: memory does not grow with the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import __version__, families, names
from .checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Spec,
    TensorInfo,
    output_files,
    refuse_same_file,
    serialize_header,
    to_float32,
)
from .errors import OutputError, TensorError
from .formats import DEFAULT, FORMATS
from .formats.record import CHUNK, Format, Packed, scale_grid, spans, widen_bfloat16
from .layers import Layer, LayerTable, find_layers, named, scales_per_row
from .lazy_torch import torch
from .marks import Way, with_full_precision
from .options import ConvertOptions
from .telling import Advance
from .untrusted import JSONError, parse_json

if TYPE_CHECKING:
    from torch import Tensor

BAND_VALUES = 1 << 18
"""Values per step where scales differ within a weight: about 1 MB of float32, which a core's cache holds."""

MSE_SECONDS_PER_WEIGHT = 5e-6
"""What the exact search takes per weight where scales differ within a weight; measured on one core, 2026-11-22."""

RELEASE_BYTES = 1 << 24
PROVENANCE_KEY = names.PROVENANCE_KEY

_LARGEST_BFLOAT16 = 0x7F7F


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer.

    Attributes:
        layer: the layer as it is in the input.
        format: what its weight becomes; None where it stays as it is.
        reason: why it stays, or why it gets another format than the one asked for.
        input_scale: where the format has a static one.
        full_precision: its inputs are not quantized.
    """

    layer: Layer
    format: Format | None
    reason: str = ""
    input_scale: float | None = None
    full_precision: bool = False

    @property
    def quantize(self) -> bool:
        """Whether its weight is quantized."""
        return self.format is not None


@dataclass(frozen=True)
class ConversionPlan:
    """What will become of a checkpoint; nothing has been written yet.

    Attributes:
        table: its layers.
        family: the family whose table decided.
        decisions: one for every layer in high precision, in file order.
        options: how.
        ways: how the file says it; one or several that agree.
        notes: what a user should know.
    """

    table: LayerTable
    family: families.Family
    decisions: list[Decision]
    options: ConvertOptions
    ways: tuple[Way, ...]
    notes: list[str]

    @property
    def quantized(self) -> list[tuple[Layer, Format]]:
        """The layers that are quantized, and what they become."""
        return [(each.layer, each.format) for each in self.decisions if each.format is not None]

    def spelled(self, suffix: str) -> str:
        """A suffix as the file spells it."""
        return self.ways[0].weight_scale if suffix == names.WEIGHT_SCALE else suffix

    @property
    def formats(self) -> dict[Format, int]:
        """How many layers become what, the most frequent first."""
        return dict(Counter(fmt for _, fmt in self.quantized).most_common())


def plan_conversion(checkpoint: Checkpoint, options: ConvertOptions) -> ConversionPlan:
    """Decide for every layer whether it is quantized.

    Args:
        checkpoint: what to convert.
        options: how.

    Returns:
        The plan.

    Raises:
        CheckpointError: the checkpoint's layers cannot be read.
        OptionError: the preset does not exist.
    """
    table = find_layers(checkpoint)
    bare = names.strip_prefix(checkpoint.tensors)[1]
    family = _choose_family(checkpoint, bare, options)
    notes = list(table.notes)
    if family is families.GENERIC and options.preset is None:
        notes.append("no known model family fits these names: only layers in repeated blocks are quantized")
    if table.quantized or table.raw or table.foreign:
        here = [*table.quantized.values(), *table.raw.values()]
        counts = {named(here): len(here), "other formats": len(table.foreign)}
        notes.append(
            "already quantized layers stay as they are: "
            + ", ".join(f"{count} in {kind}" for kind, count in counts.items() if count)
        )
    decisions = [_decide(layer, bare, family, options) for layer in table.plain.values()]
    ways = table.marks.to_write(options.legacy) if any(decision.quantize for decision in decisions) else ()
    if options.weight_scale == "mse":
        weights = sum(
            each.layer.weight.elements
            for each in decisions
            if each.format and each.format.granularity != "tensor" and not isinstance(each.format, Packed)
        )
        minutes = weights * MSE_SECONDS_PER_WEIGHT / 60
        if minutes > 1:
            notes.append(f"an exact search for every row or block takes about {minutes:.0f} core minutes")
    return ConversionPlan(table, family, decisions, options, ways, notes)


def _choose_family(checkpoint: Checkpoint, bare: dict[str, str], options: ConvertOptions) -> families.Family:
    if options.preset is not None:
        return families.family(options.preset)
    shapes = {name: checkpoint.tensors[full].shape for full, name in bare.items()}
    return families.detect(shapes, shapes) or families.GENERIC


def _decide(layer: Layer, bare: dict[str, str], family: families.Family, options: ConvertOptions) -> Decision:
    """Quantize a layer, or the first reason not to."""
    part = families.other_part(layer.name)
    bare_weight = bare.get(layer.weight.name)
    if part is not None:
        return Decision(layer, None, f"belongs to a {part.title}")
    if bare_weight is None:
        return Decision(layer, None, "outside the diffusion model")
    excluded = next((pattern for pattern in options.exclude if re.search(pattern, layer.name)), None)
    if excluded is not None:
        return Decision(layer, None, f"excluded by {excluded!r}")
    kept = family.kept_because(bare_weight[: -len(names.WEIGHT)])
    if kept is not None:
        return Decision(layer, None, kept)
    if layer.weight.elements == 0:
        return Decision(layer, None, "has no elements")
    wanted = fmt = options.record_of(layer.name)
    reason = ""
    while not fmt.takes(layer.shape):
        sides = f"{layer.out_features} × {layer.in_features}"
        reason = reason or f"{sides}: {fmt.title} needs {fmt.needs}"
        if not fmt.fallback:
            return Decision(layer, None, reason)
        fmt = FORMATS[fmt.fallback]
    return Decision(layer, fmt, reason if fmt is not wanted else "")


@dataclass(frozen=True)
class _Output:
    """Every tensor of the output: how large, and where from."""

    specs: dict[str, Spec]
    place: dict[str, str]
    small: dict[str, bytes]
    copied: dict[str, str]
    metadata: dict[str, str]


def _lay_out(checkpoint: Checkpoint, plan: ConversionPlan) -> _Output:
    """The output's tensors, each with the input tensor whose shard it follows."""
    options = plan.options
    quantized = {layer.weight.name: (layer, fmt) for layer, fmt in plan.quantized}
    output = _Output({}, {}, {}, {}, dict(checkpoint.metadata))
    decided = {each.layer.name: each for each in plan.decisions}
    configs = {
        layer.name: with_full_precision(fmt.config(layer.shape, options.block_size), decided[layer.name].full_precision)
        for layer, fmt in plan.quantized
    }

    def add(name: str, spec: Spec, source: str, data: bytes | None = None) -> None:
        if name in output.specs or (name in checkpoint and name != source):
            raise TensorError("the input already has a tensor of this name", path=checkpoint.path, tensor=name)
        output.specs[name], output.place[name] = spec, source
        if data is not None:
            output.small[name] = data

    for name, info in checkpoint.tensors.items():
        if name not in quantized:
            add(name, Spec.like(info), name)
            output.copied[name] = name
            continue
        layer, fmt = quantized[name]
        for suffix, (dtype, shape) in fmt.storage(layer.shape, options.block_size).items():
            add(layer.name + plan.spelled(suffix), Spec(dtype, shape), name)
        if options.input_scale and fmt.static:
            scale = decided[layer.name].input_scale
            data = np.float32(1.0 if scale is None else scale).tobytes()
            add(layer.name + plan.ways[0].input_scale, Spec("F32", ()), name, data)
        for way in plan.ways:
            for mark, (spec, data) in way.beside(layer.name, configs[layer.name]).items():
                add(mark, spec, name, data)

    for way in plan.ways:
        tensors, entries = way.once(configs)
        output.metadata.update(entries)
        for mark, (spec, data) in tensors.items():
            add(mark, spec, next(iter(quantized)), data)
    made = provenance(checkpoint.metadata, convert=asdict(options) | {"family": plan.family.name})
    room_bytes = PROVENANCE_ROOM_BYTES + sum(len(layer.name) + len('"", ') for layer, _ in plan.quantized)
    output.metadata[PROVENANCE_KEY] = made + " " * room_bytes
    return output


def written_bytes(checkpoint: Checkpoint, plan: ConversionPlan) -> int:
    """The size of the file that `convert` would write, to a few bytes for each tensor that may lie aligned."""
    layout = _lay_out(checkpoint, plan)
    ends, end = {}, 0
    for name, spec in layout.specs.items():
        ends[name], end = TensorInfo(name, spec.dtype, spec.shape, end, end + spec.nbytes), end + spec.nbytes
    return len(serialize_header(ends.values(), layout.metadata)) + end


PROVENANCE_ROOM_BYTES = 1024
"""Spaces that leave room for a later calibration to say, in place, how it was done; layer names come on top."""


def provenance(metadata: Mapping[str, str], **steps: Any) -> str:
    """The header entry that says which tool, with which options, made a file.

    Args:
        metadata: of the input, whose own steps are kept unless they are taken anew.
        **steps: options by step ("convert", "calibrate").
    """
    before: Any = {}
    with contextlib.suppress(JSONError):  # whoever wrote it, it is a remark, not data
        before = parse_json(metadata.get(PROVENANCE_KEY, "{}"))
    return json.dumps({**(before if isinstance(before, dict) else {}), **steps, "version": __version__}, sort_keys=True)


def convert(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    output: Path,
    *,
    progress: Advance | None = None,
    before_commit: Callable[[CheckpointWriter], None] | None = None,
) -> None:
    """Write the converted checkpoint.

    Args:
        checkpoint: the input.
        plan: what becomes of it.
        output: a `.safetensors` path, or `.safetensors.index.json` to keep the input's shards.
        progress: told how many input bytes were done.
        before_commit: called with the complete but still unnamed output, which it may read and change in place
            (calibration); if it raises, there is no output.

    Raises:
        TensorError: a weight has NaN or infinite values; the file is not written.
        OutputError: the output cannot be written, or is the input.
    """
    refuse_same_file(output, [checkpoint.path, *(file.path for file in checkpoint.files)])
    if not plan.quantized:
        raise OutputError(
            f"nothing to convert: no layer would become {plan.options.record.title}",
            path=checkpoint.path,
            hint="--dry-run says why, per layer"
            + ("; --actcal calibrates the FP8 layers that are there" if plan.table.static else ""),
        )
    layout = _lay_out(checkpoint, plan)
    files, index = output_files(output, checkpoint, layout.place.__getitem__, layout.specs)
    for path, _ in files:
        refuse_same_file(path, [file.path for file in checkpoint.files])
    with CheckpointWriter(files, layout.metadata, index) as writer:
        for name, data in layout.small.items():
            writer.write(name, data)

        def run(layer: Layer, fmt: Format) -> None:
            def sink(suffix: str, data: NDArray[Any], start: int) -> None:
                writer.write(layer.name + plan.spelled(suffix), data, start)

            quantize_weight(checkpoint, layer, fmt, plan.options, sink)
            if progress is not None:
                progress(layer.weight.nbytes)

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            jobs = [pool.submit(run, layer, fmt) for layer, fmt in plan.quantized]
            try:
                writer.copy(checkpoint, layout.copied)
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if progress is not None:
            progress(sum(layout.specs[name].nbytes for name in layout.copied))
        if before_commit is not None:
            before_commit(writer)


Sink = Callable[[str, NDArray[Any], int], None]
"""Takes a part of one of a layer's tensors: its suffix, the elements, and the byte at which they begin."""


def quantize_weight(
    checkpoint: Checkpoint, layer: Layer, fmt: Format, options: ConvertOptions, sink: Sink
) -> NDArray[np.float32] | None:
    """Quantize one weight, streaming it out.

    Args:
        checkpoint: where it is.
        layer: a layer in high precision.
        fmt: the format.
        options: block size, and how scales are chosen.
        sink: called with codes and scales, chunk by chunk, those of each tensor in order.

    Returns:
        The weight scale of a format that is not packed, float32 [n_out, n_in], one per block: (1, 1) for tensor,
        (out, 1) for row.

    Raises:
        TensorError: the weight has NaN or infinite values.
    """
    if isinstance(fmt, Packed):
        _quantize_packed(checkpoint, layer, fmt, options, sink)
        return None
    by_table = fmt.granularity == "tensor" and layer.weight.dtype in ("BF16", "F16")
    scale = (_quantize_by_table if by_table else _quantize_by_bands)(checkpoint, layer, fmt, options, sink)
    sink(names.WEIGHT_SCALE, scale, 0)
    return scale


def _not_finite(checkpoint: Checkpoint, layer: Layer, fmt: Format) -> TensorError:
    return TensorError(
        "the weight has NaN or infinite values",
        path=checkpoint.path_of(layer.weight.name),
        tensor=layer.weight.name,
        hint=f"{fmt.title} cannot repair them; the input file is damaged or its training diverged",
    )


def _quantize_by_table(
    checkpoint: Checkpoint, layer: Layer, fmt: Format, options: ConvertOptions, sink: Sink
) -> NDArray[np.float32]:
    """One scale for 16-bit weights: two passes over the file's bits, no arithmetic per weight."""
    dtype = layer.weight.dtype
    bits = checkpoint.bits(layer.weight.name).reshape(-1).view(np.uint16)
    meanings = to_float32(np.arange(1 << 16, dtype=np.uint16).view(_bit_dtype(dtype)), dtype)
    magnitudes = np.abs(meanings[: 1 << 15])

    # Bits without the sign order magnitudes: finite, then infinity, then NaN. Read as signed they order the positive
    # weights, read as unsigned the negative ones, so two maxima find the largest magnitude without a temporary.
    largest = max(int(bits.view(np.int16).max()), int(bits.max()) & 0x7FFF, 0)
    if not np.isfinite(magnitudes[largest]):
        raise _not_finite(checkpoint, layer, fmt)
    scale = fmt.weight_scales(magnitudes[largest])
    if options.weight_scale == "mse":
        counts = np.zeros(1 << 16, np.int64)
        for span in spans(len(bits)):
            counts += np.bincount(bits[span], minlength=1 << 16)
        both_signs = counts[: 1 << 15] + counts[1 << 15 :]
        used = np.flatnonzero(both_signs)
        scale = least_squares_scale(magnitudes[used].astype(np.float64), both_signs[used], scale, fmt)
    with np.errstate(invalid="ignore", over="ignore"):
        table = fmt.codes.encode(meanings / scale)
    released = 0
    codes = np.empty(CHUNK, table.dtype)
    for span in spans(len(bits)):
        chunk = codes[: span.stop - span.start]
        np.take(table, bits[span], out=chunk, mode="clip")
        sink(names.WEIGHT, chunk, span.start)
        if span.stop * 2 - released >= RELEASE_BYTES:
            released = span.stop * 2
            checkpoint.release(layer.weight.name)
    checkpoint.release(layer.weight.name)
    return scale.reshape(1, 1)


def _bit_dtype(dtype: str) -> type:
    return np.float16 if dtype == "F16" else np.uint16


def _quantize_by_bands(
    checkpoint: Checkpoint, layer: Layer, fmt: Format, options: ConvertOptions, sink: Sink
) -> NDArray[np.float32]:
    """Scales per block, or wide weights: rows are widened to float32, a band at a time."""
    block = fmt.block(layer.shape, options.block_size)
    absmax = np.zeros(scale_grid(layer.shape, block), np.float32)
    bands = list(_bands(layer, block[0]))
    for band, bits in _banded(checkpoint, layer, bands):
        rows = slice(band.start // block[0], -(-band.stop // block[0]))
        np.maximum(absmax[rows], _block_absmax(bits, layer.weight.dtype, block), out=absmax[rows])
    if not np.isfinite(absmax).all():
        raise _not_finite(checkpoint, layer, fmt)
    scale = fmt.weight_scales(absmax)
    if options.weight_scale == "mse":
        scale = _least_squares_grid(checkpoint, layer, block, scale, fmt)
    blocked = replace(layer, block=block)
    for band, bits in _banded(checkpoint, layer, bands):
        weight_OI = to_float32(bits, layer.weight.dtype)
        np.divide(weight_OI, scales_per_row(scale, blocked, band), out=weight_OI)
        sink(names.WEIGHT, fmt.codes.encode(weight_OI), band.start * layer.in_features)
    return scale


def _quantize_packed(checkpoint: Checkpoint, layer: Layer, fmt: Packed, options: ConvertOptions, sink: Sink) -> None:
    """Packed formats, in bands of whole tiles of scales."""
    rows = max(1, BAND_VALUES // (layer.in_features * Packed.ROWS)) * Packed.ROWS
    bands = list(spans(layer.out_features, rows))
    every = (1, layer.in_features)
    largest = [_block_absmax(bits, layer.weight.dtype, every).max() for _, bits in _banded(checkpoint, layer, bands)]
    absmax = float(np.max(largest))
    if not math.isfinite(absmax):
        raise _not_finite(checkpoint, layer, fmt)

    def some(numbers: Tensor) -> Tensor:
        bits = checkpoint.bits(layer.weight.name)[numbers.numpy()]
        return torch.from_numpy(to_float32(bits, layer.weight.dtype))

    whole = fmt.whole(absmax, layer.shape, some, options.weight_scale)
    for suffix, tensor in whole.items():
        sink(suffix, tensor.numpy(), 0)
    done: Counter[str] = Counter()
    for _, bits in _banded(checkpoint, layer, bands):
        weight_OI = torch.from_numpy(to_float32(bits, layer.weight.dtype))
        for suffix, tensor in fmt.quantize(weight_OI, whole, options.weight_scale).items():
            data = tensor.contiguous().view(torch.uint8).numpy() if tensor.element_size() == 1 else tensor.numpy()
            sink(suffix, data, done[suffix])
            done[suffix] += data.nbytes


def _bands(layer: Layer, block_out: int) -> Iterator[slice]:
    """Rows of a weight in steps of whole blocks, or of a part of one where a block is a large weight."""
    rows = max(1, BAND_VALUES // layer.in_features)
    if rows >= block_out:
        rows -= rows % block_out
        yield from spans(layer.out_features, rows)
        return
    for block_rows in spans(layer.out_features, block_out):
        for part in spans(block_rows.stop - block_rows.start, rows):
            yield slice(block_rows.start + part.start, block_rows.start + part.stop)


def _banded(checkpoint: Checkpoint, layer: Layer, bands: Sequence[slice]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Each band with its rows [rows, in], as `Checkpoint.bits` gives them."""
    bits = checkpoint.bits(layer.weight.name)
    done_bytes = 0
    for band in bands:
        yield band, bits[band]
        done_bytes += bits[band].nbytes
        if done_bytes >= RELEASE_BYTES:
            checkpoint.release(layer.weight.name)
            done_bytes = 0
    checkpoint.release(layer.weight.name)


def _block_absmax(bits: NDArray[Any], dtype: str, block: tuple[int, int]) -> NDArray[np.float32]:
    """Largest magnitude per block of a band of rows; NaN where a block has one.

    Bits without the sign order magnitudes: finite, then infinity, then NaN. So only the largest are widened.
    """
    unsigned = bits.view(f"u{bits.itemsize}")
    magnitudes = unsigned & (np.iinfo(unsigned.dtype).max >> 1)
    rows, columns = magnitudes.shape
    if block[1] >= columns:
        magnitudes = magnitudes.max(axis=1, keepdims=True)
    else:
        magnitudes = np.maximum.reduceat(magnitudes, np.arange(0, columns, block[1]), axis=1)
    if block[0] > 1:
        magnitudes = np.maximum.reduceat(magnitudes, np.arange(0, rows, block[0]), axis=0)
    return to_float32(magnitudes.view(bits.dtype), dtype)


def _least_squares_grid(
    checkpoint: Checkpoint, layer: Layer, block: tuple[int, int], absmax_scale: NDArray[np.float32], fmt: Format
) -> NDArray[np.float32]:
    """The least-squares scale of every block."""
    if absmax_scale.size == 1:
        counts = np.zeros(1 << 15, np.int64)
        for _, bits in _banded(checkpoint, layer, list(_bands(layer, block[0]))):
            weight_OI = to_float32(bits, layer.weight.dtype)
            rounded = (np.abs(weight_OI).view(np.uint32).reshape(-1) + np.uint32(0x8000)) >> np.uint32(16)
            rounded = np.minimum(rounded, np.uint32(_LARGEST_BFLOAT16))  # what is above would round to infinity
            counts += np.bincount(rounded, minlength=1 << 15)
        used = np.flatnonzero(counts)
        magnitudes = widen_bfloat16(used.astype(np.uint16)).astype(np.float64)
        return least_squares_scale(magnitudes, counts[used], absmax_scale, fmt).reshape(1, 1)
    scale = np.empty_like(absmax_scale)
    whole_blocks = list(spans(layer.out_features, block[0]))
    for number, (_, bits) in enumerate(_banded(checkpoint, layer, whole_blocks)):
        weight_OI = to_float32(bits, layer.weight.dtype)
        for column, span in enumerate(spans(layer.in_features, block[1])):
            values, counts = np.unique(np.abs(weight_OI[:, span]), return_counts=True)
            start = absmax_scale[number, column]
            scale[number, column] = least_squares_scale(values.astype(np.float64), counts, start, fmt)
    return scale


def least_squares_scale(
    magnitudes: NDArray[np.float64], counts: NDArray[np.int64], absmax_scale: Any, fmt: Format = DEFAULT
) -> NDArray[np.float32]:
    """The scale s of least Σ count · (|w| - s · code(|w| / s))² between half and twice `absmax_scale`.

    Args:
        magnitudes: distinct |w|, float64 [n].
        counts: how often each occurs, [n].
        absmax_scale: max|w| / max, the scale at which nothing is clipped.
        fmt: the format.

    Returns:
        float32 scalar. Never worse than `absmax_scale` itself.

    At 7/6 the code before the last means the largest weight exactly, and 0.1 lies nearer to a code than at 1:

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

    # As s grows from low to high, |w| / s falls through the midpoints in ((|w| / high), (|w| / low)): one event each.
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
    saved = best_inside * (2 * dot - best_inside * square)  # Σ w² - error: the constant does not matter
    found = np.maximum(np.float32(best_inside[int(np.argmax(saved))]), np.float32(fmt.least_scale))

    def error(scale: np.float32) -> float:
        codes = fmt.codes.encode((magnitudes / np.float64(scale)).astype(np.float32))
        real = fmt.codes.decode(codes).astype(np.float64) * np.float64(scale)
        return float(np.sum(weights * (magnitudes - real) ** 2))

    return np.asarray(found if error(found) < error(np.float32(start)) else start, np.float32)
