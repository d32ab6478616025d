"""What a number format is: a grid of values, scales, a mark, and what readers do to a layer's inputs.

Everything else takes from here what it needs to know of a format: conversion, reading, calibration, simulation and
reports. A format is a `Format` in its family's file beside this one, and in the table `FORMATS`.

A quantized weight is codes C and scales s with W ≈ grid value of C × s. A `Grid` says what the codes mean and which
code is the nearest to a number; everything that has codes of one byte is derived from the 256 meanings.

A grid is numpy, and a weight of one code a byte needs nothing else. What packs codes, rotates, or scales in blocks is
torch, which also runs on a GPU, and starts only where it is used. Chunks keep temporaries in the second-level cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..lazy_torch import torch
from .packing import tile_shape, to_tiles

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 16
"""Values handled at a time: 64 Ki uint16 values, their int64 indices and their codes stay in a core's L2."""

TOGETHER_VALUES = 1 << 24
"""Weights that torch quantizes at a time."""

FLOAT_SCALES = ("F32", "F16", "BF16", "F64")
"""Dtypes of scales that are plain numbers."""

TORCH_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
"""What torch calls the dtypes of weights and scales, by the spelling of a safetensors header."""

Granularity = Literal["tensor", "row", "block"]
Shape = tuple[int, ...]
Stored = tuple[str, Shape]
"""Dtype, as a safetensors header spells it, and shape."""


GPUS: Mapping[str, str] = {
    "any": "any card since Ampere",
    "rtx20": "GeForce RTX 20 (Turing)",
    "rtx30": "GeForce RTX 30 (Ampere)",
    "rtx40": "GeForce RTX 40 (Ada)",
    "rtx50": "GeForce RTX 50 (Blackwell)",
    "h100": "H100, H200 (Hopper)",
    "l40s": "L40S (Ada)",
    "mi300": "Instinct MI300",
    "rdna3": "Radeon RX 7000",
    "rdna4": "Radeon RX 9000",
}
"""Graphics cards that can be asked for; "any" is what has INT8 products, where packed weights become INT8 first."""

INT8_GPUS = frozenset(GPUS)
AMPERE_GPUS = frozenset({"any", "rtx30", "rtx40", "rtx50", "h100", "l40s"})
FP8_GPUS = frozenset({"rtx40", "rtx50", "h100", "l40s", "rdna3", "rdna4"})
BLACKWELL_GPUS = frozenset({"rtx50"})

Parts = Mapping[str, "Tensor"]


class Weight(NamedTuple):
    """A weight that is read as it is needed.

    Attributes:
        shape: (out, in).
        absmax: finds its largest magnitude, which takes a pass over it.
        rows: gives rows of it, by a slice or by their numbers, [n, in] in the file's dtype.
    """

    shape: tuple[int, int]
    absmax: Callable[[], float]
    rows: Callable[[Any], Tensor]


def spans(count: int, step: int = CHUNK) -> Iterator[slice]:
    """Slices that cover range(count) in steps."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def widen_bfloat16(bits: NDArray[np.uint16], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Exact values, float32, of bfloat16 bit patterns, uint16 of any shape; in `out` where that is given."""
    wide = np.empty(bits.shape, np.uint32) if out is None else out.view(np.uint32)
    wide[...] = bits
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def narrow_bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bit patterns, uint16, of the bfloat16 nearest to float32 numbers of any shape, ties to even.

    What is too large becomes infinity, and NaN stays NaN.
    """
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    nearest: NDArray[np.uint16] = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nearest[np.isnan(numbers)] = 0x7FC0
    return nearest


def scale_grid(weight_shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Scales per dimension of a weight (out, in) in blocks (b_out, b_in).

    >>> scale_grid((100, 64), (64, 64))
    (2, 1)
    """
    return -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])


@dataclass(frozen=True)
class Grid(ABC):
    """The values that codes of one byte stand for.

    Attributes:
        name: as torch spells the dtype of the codes.
        dtype: as a safetensors header spells it.
        max: the largest finite value.
        smallest_normal: from here on the rounding error is relative to the value, as far as the grid is relative.
    """

    name: str
    dtype: str
    max: float
    smallest_normal: float

    @abstractmethod
    def meanings(self) -> NDArray[np.float64]:
        """What each code means, [256] by the code's byte; NaN and infinity where the grid has them."""

    @abstractmethod
    def encode(self, numbers: NDArray[np.float32], *, fits: bool = False) -> NDArray[Any]:
        """Nearest codes, ties to even, saturating at ±max.

        Args:
            numbers: float32, any shape.
            fits: whether none is known to be beyond ±max, and they may be overwritten.

        Returns:
            Codes of one byte, the same shape.
        """

    def decode(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        """What codes of one byte mean, float32 in their shape."""
        flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
        numbers = np.empty(flat.shape, np.float32)
        for span in spans(len(flat)):
            np.take(self.values, flat[span], out=numbers[span], mode="clip")
        return numbers.reshape(np.shape(codes))

    def round(self, numbers: Tensor) -> Tensor:
        """The codes of `encode` in torch's dtype; NaN is not expected."""
        dtype = getattr(torch, self.name)
        if dtype.is_floating_point:
            return numbers.clamp(-self.max, self.max).to(dtype)
        return numbers.round().clamp(torch.iinfo(dtype).min, self.max).to(dtype)

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """`meanings` as float32 [256], read-only."""
        return _read_only(self.meanings().astype(np.float32))

    @cached_property
    def levels(self) -> NDArray[np.float64]:
        """The finite values that are not negative, ascending, from 0 to `max`; float64 [n], read-only."""
        sizes = np.abs(self.meanings()).tolist()  # np.unique would load numpy.ma, a tenth of the time of `inspect`
        return _read_only(np.array(sorted({size for size in sizes if size <= self.max})))

    @cached_property
    def midpoints(self) -> NDArray[np.float64]:
        """Where rounding goes from one of `levels` to the next; float64 [n - 1], read-only."""
        return _read_only((self.levels[1:] + self.levels[:-1]) / 2)

    @cached_property
    def smallest_step(self) -> float:
        """The least positive value, which is also the least distance between two values."""
        return float(self.levels[1])

    @cached_property
    def largest_rounded(self) -> float:
        """Up to here numbers become `max` by rounding: half a step above it."""
        return self.max + float(self.max - self.levels[-2]) / 2

    @cached_property
    def worst_rounding_db(self) -> float:
        """Least signal to noise of any numbers between `smallest_normal` and `largest_rounded`.

        The worst is a midpoint just above `smallest_normal` times a power of two.
        """
        normal = self.midpoints > self.smallest_normal
        errors = (self.midpoints - self.levels[:-1])[normal] / self.midpoints[normal]
        return -20 * math.log10(float(errors.max()))


@dataclass(frozen=True, eq=False)
class Lattice:
    """A weight as positions on what a format can hold, which a rounding may move.

    A weight is unit · step(value · scale), where a value is one of K, a scale is one of S for each group of weights in
    a row, and step rounds to whole numbers up to ±127 where readers do.

    Attributes:
        values: of the codes, ascending; float32 [K].
        codes: which byte or part of one is stored for each, uint8 [K].
        positions: of each weight in `values`, int64 [out, in].
        unit: what scales the whole weight or each row, float32 [1 or out, 1].
        scales: that a group can have, by their numbers; float32 [S].
        numbers: of each group in `scales`, int64 [out, in / group].
        group: how many weights share a number; 0 for all of a row.
        reach: how far a better scale's number may be from one that was found for the weights alone.
        whole: whether value · scale becomes a whole number.
    """

    values: Tensor
    codes: Tensor
    positions: Tensor
    unit: Tensor
    scales: Tensor
    numbers: Tensor
    group: int = 0
    reach: tuple[int, int] = (0, 0)
    whole: bool = False

    @staticmethod
    def of(meanings: Any, stored: Tensor, unit: Tensor, **scaled: Any) -> Lattice:
        """A weight by its stored codes.

        Args:
            meanings: of the codes 0, 1, ...; NaN where one is not to be used.
            stored: uint8 [out, in].
            unit: as of the lattice.
            **scaled: what else it has; one scale of 1 by default.
        """
        table = np.asarray(meanings, np.float64)
        values = np.unique(table[np.isfinite(table)])  # -0 and 0 are one
        codes = [int(np.flatnonzero(table == value)[0]) for value in values]
        place = torch.from_numpy(np.searchsorted(values, np.nan_to_num(table))).to(stored.device)
        parts = {
            "values": torch.from_numpy(values).float(),
            "codes": torch.tensor(codes, dtype=torch.uint8),
            "unit": unit.float().reshape(-1, 1),
            "scales": torch.ones(1),
            "numbers": torch.zeros((len(stored), 1), dtype=torch.int64),
            **scaled,
        }
        parts = {name: v.to(stored.device) if isinstance(v, torch.Tensor) else v for name, v in parts.items()}
        return Lattice(positions=place[stored.int()], **parts)

    def levels(self, numbers: Tensor) -> Tensor:
        """What weights can be under scales [...], in units; float32 [..., K]."""
        levels = self.scales[numbers].unsqueeze(-1) * self.values
        return levels.round_().clamp_(-127, 127) if self.whole else levels

    @property
    def real(self) -> Tensor:
        """The weights in units, float32 [out, in]."""
        scale = self.scales[self.numbers].repeat_interleave(self.positions.shape[1] // self.numbers.shape[1], 1)
        real = self.values[self.positions] * scale
        return real.round_().clamp_(-127, 127) if self.whole else real

    @property
    def stored(self) -> Tensor:
        """The codes [out, in]."""
        return self.codes[self.positions].contiguous()


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class Format:
    """A number format of linear layers, as ComfyUI or its nodes read it; one scale per tensor, row, or square block.

    Attributes:
        name: its key in `FORMATS`, as `--format` takes it.
        title: for people, "FP8".
        mark: what a comfy_quant entry says of it; "format" and what else tells it from others.
        dtypes: what its weights are stored as; the first is written.
        bits: per weight, scales included where they are one per some weights.
        scales: suffixes of the tensors that a weight cannot be read without; the first sizes its values.
        optional: suffixes of tensors that readers heed where they are there.
        scale_dtypes: of the first of `scales`; the first is written.
        grid: of its weights' codes where they are one a byte.
        readable: whether this tool reads it; else it is only recognized.
        granularity: what shares a scale where this format is written; None where it is not written.
        column: whether scales of rows are written as a column, [out, 1].
        group_width: how many weights of a row share a scale; 0 where `granularity` and the block size say it.
        tiled: whether scales lie in tiles (`packing`).
        code_bits: of a code.
        input_grid: of what readers make of a layer's inputs at a scale of 1; None where it is only recognized.
        static: whether readers use an `input_scale` that a file holds, which a calibration finds.
        dynamic: whether readers scale inputs as they come, by their absmax, where a file holds no `input_scale`; else
            they take it for 1.0.
        heeds_full_precision: whether readers heed a mark that inputs are not quantized; ComfyUI 0.33 does not where
            its kernels quantize inputs themselves.
        sides: what the sides (out, in) of a weight must be multiples of.
        fallback: the format of layers whose sides it cannot take; "" for high precision.
        ranged_by: suffix of the scale that says how large the weights can get.
        range: the largest weight at a scale of 1.
        least_scale: a weight scale is never smaller.
        zero_scale: the weight scale where all weights are 0.
        input_block: how many inputs share a scale where readers scale them as they come; 0 for all of a token.
        cards: what multiplies it natively; "" where nothing does.
        native: the same as keys of `GPUS`.
        since: the ComfyUI that first read it; "" where ComfyUI does not.
        reader: what reads it.
    """

    name: str
    title: str
    mark: Mapping[str, Any]
    dtypes: tuple[str, ...]
    bits: float = 8
    scales: tuple[str, ...] = (names.WEIGHT_SCALE,)
    optional: tuple[str, ...] = ()
    scale_dtypes: tuple[str, ...] = FLOAT_SCALES
    grid: Grid | None = None
    readable: bool = True
    granularity: Granularity | None = None
    column: bool = False
    group_width: int = 0
    tiled: bool = False
    code_bits: int = 8
    input_grid: Grid | None = None
    static: bool = False
    dynamic: bool = True
    heeds_full_precision: bool = True
    sides: tuple[int, int] = (1, 1)
    fallback: str = ""
    ranged_by: str | None = names.WEIGHT_SCALE
    range: float = 0.0
    least_scale: float = float(np.finfo(np.float32).smallest_subnormal)
    zero_scale: float = 1.0
    input_block: int = 0
    cards: str = ""
    native: frozenset[str] = frozenset()
    since: str = ""
    reader: str = "ComfyUI"

    @property
    def marked(self) -> str:
        """The word of its mark."""
        word: str = self.mark["format"]
        return word

    @property
    def read_by(self) -> str:
        """What reads it, for people."""
        return f"{self.reader} since {self.since}" if self.since else self.reader

    @property
    def codes(self) -> Grid:
        """The grid of a format that has one code a byte."""
        assert self.grid is not None, self.name
        return self.grid

    # How a layer is stored.

    def takes(self, shape: Shape) -> bool:
        """Whether it can hold a weight (out, in)."""
        return not any(side % multiple for side, multiple in zip(shape, self.sides, strict=True))

    @property
    def needs(self) -> str:
        """Which weights it can hold, for people."""
        out, within = self.sides
        if out == within:
            return f"sides that are multiples of {out}"
        return f"multiples of {within} inputs" + (f" and {out} outputs" if out > 1 else "")

    def block(self, weight_shape: tuple[int, int], block_size: int) -> tuple[int, int]:
        """The weights (b_out, b_in) that share one scale where a weight (out, in) is written."""
        square = (block_size, block_size)
        blocks = {"tensor": weight_shape, "row": (1, weight_shape[1]), "block": square}
        return (1, self.group_width) if self.group_width else blocks[self.granularity or "tensor"]

    def storage(self, shape: tuple[int, int], block_size: int) -> dict[str, Stored]:
        """What a weight (out, in) is written as, by suffix."""
        grid = scale_grid(shape, self.block(shape, block_size))
        scales = {"tensor": (), "row": grid if self.column else grid[:1], "block": grid}
        scale = tile_shape(*grid) if self.tiled else scales[self.granularity or "tensor"]
        weight = (shape[0], shape[1] * self.code_bits // 8)
        return {names.WEIGHT: (self.dtypes[0], weight), self.scales[0]: (self.scale_dtypes[0], scale)}

    def shape(self, stored: Shape, _parts: Mapping[str, Shape]) -> tuple[int, int] | None:
        """(out, in) of a weight that is stored in this shape, with these shapes of its scales by suffix."""
        return (stored[0], stored[1] * 8 // self.code_bits) if len(stored) == 2 else None

    def config(self, shape: tuple[int, int], block_size: int) -> dict[str, Any]:
        """What the mark of a layer says that is written in this format."""
        said = {"group_size": self.block(shape, block_size)[1]} if self.granularity == "block" else {}
        return {**self.mark, **said}

    def pack(self, codes: Tensor) -> Tensor:
        """Codes of a byte each, [rows, in], as they are stored."""
        return codes

    def unpack(self, packed: Tensor) -> Tensor:
        """The codes that are stored in rows."""
        return packed

    # Weights.

    def weight_scales(self, absmax: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scales at which nothing is clipped: absmax / max, but never under `least_scale`; float32, the same shape."""
        scale = np.maximum(absmax.astype(np.float32) / np.float32(self.codes.max), np.float32(self.least_scale))
        result: NDArray[np.float32] = np.where(absmax == 0, np.float32(self.zero_scale), scale).astype(np.float32)
        return result

    def decode(self, parts: Parts, _config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """A weight as readers multiply it, which may be rotated.

        Args:
            parts: the stored tensors by suffix; all, or the same rows of each.
            config: the layer's mark.

        Returns:
            Levels [out, in], and the float32 scales [1 or out, 1] that they carry.
        """
        return self.unpack(parts[names.WEIGHT]), parts[self.scales[0]].float().reshape(-1, 1)

    @property
    def roundable(self) -> bool:
        """Whether it has a lattice: where scales are one per tensor, per row, or per group of a row."""
        return self.granularity in ("tensor", "row") or self.group_width > 0

    def quantized(self, weight_OI: Tensor, _method: str = "absmax") -> dict[str, Tensor]:
        """What is stored of a whole weight [out, in], each weight rounded to nearest; scales by "absmax"."""
        absmax = weight_OI.abs()
        absmax = absmax.amax().reshape(1, 1) if self.granularity == "tensor" else absmax.amax(1, keepdim=True)
        scale = torch.where(absmax == 0, self.zero_scale, (absmax / self.codes.max).clamp(min=self.least_scale))
        return {names.WEIGHT: self.codes.round(weight_OI / scale), self.scales[0]: scale}

    def lattice(self, parts: Parts) -> Lattice:
        """A weight of `quantized` as positions, of which readers multiply what `decode` gives."""
        grid = self.grid or self.input_grid
        assert grid is not None, self.name
        meanings, (levels, scale) = grid.meanings(), self.decode(parts, self.mark)
        return Lattice.of(np.where(np.abs(meanings) <= self.range, meanings, np.nan), levels.view(torch.uint8), scale)

    def stored(self, lattice: Lattice, parts: Parts) -> dict[str, Tensor]:
        """What is stored of a lattice that was `parts`."""
        made = {names.WEIGHT: self.pack(lattice.stored), self.scales[-1]: lattice.unit}
        if lattice.group:
            numbers = lattice.numbers.to(torch.uint8)
            made[self.scales[0]] = to_tiles(numbers) if self.tiled else numbers
        return {**parts, **{key: new.view(parts[key].dtype).reshape(parts[key].shape) for key, new in made.items()}}

    def group(self, _config: Mapping[str, Any]) -> int:
        """The size of the groups of inputs that readers rotate (`rotation`); 0 for none."""
        return 0

    # Inputs.

    def inputs(self, x: Tensor, static: Tensor | None, arithmetic: str) -> tuple[Tensor, Tensor]:
        """Codes that readers make of a layer's inputs.

        Args:
            x: [..., in], rotated where the format rotates.
            static: the layer's input scale, float32 (); None where it has none.
            arithmetic: "comfyui" computes in x's own dtype, all others in float32; see `engines.quantized_linear`.

        Returns:
            Levels like x, and the float32 scale that they carry, () or [..., 1].
        """
        grid = self.input_grid
        assert grid is not None, self.name
        own = arithmetic == "comfyui"
        if not self.dynamic and arithmetic in ("comfyui", "comfyui_divide"):
            scale = torch.ones((), device=x.device) if static is None else static
            scaled = x * (1.0 / scale).to(x.dtype) if own else x.float() / scale
        else:
            absmax = x.abs().amax() if arithmetic == "dynamic_tensor" else x.abs().amax(-1, keepdim=True)
            scale = torch.where(absmax > 0, (absmax.float() / grid.max).clamp(min=self.least_scale), self.zero_scale)
            divisor = scale.to(x.dtype) if own else scale
            scaled = (x if own else x.float()) / torch.where(divisor == 0, torch.finfo(divisor.dtype).tiny, divisor)
        return grid.round(scaled), scale


class Packed(Format):
    """A format whose codes are packed, rotated, or scaled in small blocks: written and read with torch.

    A weight is written in bands of rows. What holds for all of it is found first (`whole`); the rest of each band is
    contiguous in the file, but for scales in tiles, which are laid when all are known.
    """

    ROWS = 128
    """Tiles of scales have as many rows, so bands that are read begin at multiples of it."""

    def whole(self, _weight: Weight) -> dict[str, Tensor]:
        """Tensors that belong to a weight as a whole, by suffix, on the CPU."""
        return {}

    def quantize(self, weight_OI: Tensor, whole: Parts, method: str) -> dict[str, Tensor]:
        """Quantize a band of rows.

        Args:
            weight_OI: [rows, in] in the file's dtype; computed in float32.
            whole: of `whole`.
            method: how scales are chosen, "absmax" or "mse".

        Returns:
            What is stored of these rows, by suffix; scales not yet in tiles.
        """
        raise NotImplementedError

    def pieces(self, weight: Weight, method: str, step: int) -> Iterator[tuple[str, Tensor]]:
        """Everything that is stored of a weight, by suffix, in pieces of `step` rows that follow one another."""
        whole = self.whole(weight)
        yield from whole.items()
        scales = []
        for band in spans(weight.shape[0], step):
            parts = self.quantize(weight.rows(band), whole, method)
            if self.tiled:
                scales.append(parts.pop(names.WEIGHT_SCALE))
            yield from parts.items()
        if scales:
            tiled = to_tiles(torch.cat([part.view(torch.uint8) for part in scales]))
            yield names.WEIGHT_SCALE, tiled.view(scales[0].dtype)

    def quantized(self, weight_OI: Tensor, method: str = "absmax") -> dict[str, Tensor]:
        """As of any format; "mse" as well."""
        rows, columns = weight_OI.shape
        weight = Weight((rows, columns), lambda: float(weight_OI.abs().max()), weight_OI.__getitem__)
        parts: dict[str, list[Tensor]] = {}
        for suffix, piece in self.pieces(weight, method, max(1, TOGETHER_VALUES // columns)):
            parts.setdefault(suffix, []).append(piece.to(weight_OI.device))
        return {suffix: torch.cat(found) if found[0].dim() else found[0] for suffix, found in parts.items()}
