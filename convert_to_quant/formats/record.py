"""Number formats as records: grid of values, scales, quantization config, and what readers do to a layer's inputs.

Conversion, reading, calibration, simulation and reports take everything format-specific from here. A format is a
`Format` in its family's file in this folder, listed in the table `FORMATS`.

A quantized weight is codes C and scales s with W ≈ grid value of C × s. A `Grid` maps codes to values and numbers to
the nearest code; for one-byte codes everything follows from the 256 values.

Grids are described in numpy; codes are computed in torch, which also runs on a GPU and is imported on first use.
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
"""Codes to decode at a time: 64 Ki codes and their float32 values fit in a core's L2 cache."""

TOGETHER_VALUES = 1 << 24
"""Weights that torch quantizes at a time in `Packed.quantized`."""

FLOAT_SCALES = ("F32", "F16", "BF16", "F64")
"""Dtypes of scales stored as ordinary floats."""

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
"""Torch's names of the dtypes of weights and scales, by safetensors dtype."""

Granularity = Literal["tensor", "row", "block"]
Shape = tuple[int, ...]
Stored = tuple[str, Shape]
"""Safetensors dtype, and shape."""


GPUS: Mapping[str, str] = {
    "any": "any GPU since Ampere",
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
"""GPUs that options can name; "any" has INT8 matmuls, and unpacks smaller weights to INT8 first."""

INT8_GPUS = frozenset(GPUS)
AMPERE_GPUS = frozenset({"any", "rtx30", "rtx40", "rtx50", "h100", "l40s"})
FP8_GPUS = frozenset({"rtx40", "rtx50", "h100", "l40s", "rdna3", "rdna4"})
BLACKWELL_GPUS = frozenset({"rtx50"})

Parts = Mapping[str, "Tensor"]


class Weight(NamedTuple):
    """A weight that is read on demand.

    Attributes:
        shape: (out, in).
        absmax: finds its largest magnitude, in one pass over it.
        rows: reads rows by a slice or by indices, [n, in] in the file's dtype.
    """

    shape: tuple[int, int]
    absmax: Callable[[], float]
    rows: Callable[[Any], Tensor]


def spans(count: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover range(count)."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Convert bfloat16 bit patterns, uint16 of any shape, to float32."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def narrow_bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 of any shape to bfloat16 bit patterns, uint16, ties to even; overflow becomes infinity."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    nearest: NDArray[np.uint16] = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nearest[np.isnan(numbers)] = 0x7FC0
    return nearest


def scale_grid(weight_shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks (b_out, b_in) in each dimension of a weight (out, in).

    >>> scale_grid((100, 64), (64, 64))
    (2, 1)
    """
    return -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])


@dataclass(frozen=True)
class Grid(ABC):
    """The values of one-byte codes.

    Attributes:
        name: torch's name of the codes' dtype.
        dtype: the safetensors dtype.
        max: the largest finite value.
        smallest_normal: below it, the rounding error no longer shrinks with the value.
    """

    name: str
    dtype: str
    max: float
    smallest_normal: float

    @abstractmethod
    def meanings(self) -> NDArray[np.float64]:
        """The value of each code, [256] by byte, including NaN and infinity."""

    def decode(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        """The values of one-byte codes, float32 of the same shape."""
        flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
        numbers = np.empty(flat.shape, np.float32)
        for span in spans(len(flat), CHUNK):
            np.take(self.values, flat[span], out=numbers[span], mode="clip")
        return numbers.reshape(np.shape(codes))

    def round(self, numbers: Tensor) -> Tensor:
        """Nearest codes, ties to even, saturating at ±max, in torch's dtype. Overwrites the numbers; NaN is invalid."""
        dtype = getattr(torch, self.name)
        if dtype.is_floating_point:
            return numbers.clamp_(-self.max, self.max).to(dtype)
        return numbers.round_().clamp_(torch.iinfo(dtype).min, self.max).to(dtype)

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """`meanings` as float32 [256]."""
        return self.meanings().astype(np.float32)

    @cached_property
    def levels(self) -> NDArray[np.float64]:
        """The finite, non-negative values, ascending from 0 to `max`; float64 [n]."""
        sizes = np.abs(self.meanings()).tolist()  # np.unique would import numpy.ma, a tenth of the time of `inspect`
        return np.array(sorted({size for size in sizes if size <= self.max}))

    @cached_property
    def midpoints(self) -> NDArray[np.float64]:
        """Midpoints between `levels`, where rounding switches; float64 [n - 1]."""
        midpoints: NDArray[np.float64] = (self.levels[1:] + self.levels[:-1]) / 2
        return midpoints

    @cached_property
    def smallest_step(self) -> float:
        """The smallest positive value, which is also the smallest distance between two values."""
        return float(self.levels[1])

    @cached_property
    def largest_rounded(self) -> float:
        """The largest number that rounds to `max`: half a step above it."""
        return self.max + float(self.max - self.levels[-2]) / 2

    @cached_property
    def worst_rounding_db(self) -> float:
        """Worst SQNR of numbers between `smallest_normal` and `largest_rounded`, at a midpoint."""
        normal = self.midpoints > self.smallest_normal
        errors = (self.midpoints - self.levels[:-1])[normal] / self.midpoints[normal]
        return -20 * math.log10(float(errors.max()))


@dataclass(frozen=True, eq=False)
class Lattice:
    """A weight as indices into the values that a format can represent, for rounding methods to change.

    A weight is unit · step(value · scale): one of K values, one of S scales per group of a row, and a step that rounds
    to integers within ±127 if readers do.

    Attributes:
        values: of the codes, ascending; float32 [K].
        codes: the stored code of each value, uint8 [K].
        positions: index of each weight in `values`, int64 [out, in].
        unit: scale of the whole weight or of each row, float32 [1 or out, 1].
        scales: possible scales of a group; float32 [S].
        numbers: index of each group in `scales`, int64 [out, in / group].
        group: weights per group; 0 for a whole row.
        reach: how far below and above its index to look for a better scale of a group.
        whole: whether value · scale is rounded to an integer.
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
        """The lattice of stored codes, uint8 [out, in], with the values `meanings`; NaN for codes not to be used.

        Without other attributes (`scaled`), there is one scale of 1.
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
        """Possible weights, in units, under scales with these indices [...]; float32 [..., K]."""
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


@dataclass(frozen=True, eq=False)
class Format:
    """A number format of linear layers, as ComfyUI or its nodes read it.

    Attributes:
        name: its key in `FORMATS` and the argument of `--format`.
        title: name in messages, "FP8".
        mark: its quantization config: "format", and other keys that distinguish it.
        dtypes: dtypes of stored weights; the first is written.
        bits: per weight, including the scales of groups.
        scales: suffixes of required scale tensors; `scale_dtypes` are those of the first.
        optional: suffixes of other tensors that readers use if they exist.
        scale_dtypes: accepted dtypes of scales; the first is written.
        grid: of the weight's codes; None if they are packed, rotated or scaled in small blocks.
        granularity: what shares a scale when the format is written; None if it is never written.
        column: whether row scales are written as [out, 1] instead of [out].
        group_width: weights of a row that share a scale; 0 if `granularity` and the block size determine it.
        tiled: whether scales are stored in tiles (`packing`), which also means that inputs are scaled in groups.
        code_bits: bits per code.
        input_grid: grid of a layer's quantized inputs at a scale of 1; None if the format is only recognized.
        static: whether readers use an `input_scale` in the file, which calibration finds.
        dynamic: whether readers scale inputs by their absmax if the file has no `input_scale`; otherwise they use 1.0.
        heeds_full_precision: whether readers support `full_precision_matrix_mult`; ComfyUI 0.33 does not if its kernels
            quantize inputs themselves.
        sides: the dimensions (out, in) of a weight must be multiples of these.
        fallback: the format for layers with other dimensions; "" for high precision.
        ranged_by: suffix of the scale that limits how large weights can be.
        least_scale: lower bound of weight scales.
        zero_scale: the weight scale if all weights are 0.
        cards: GPUs with native matmuls, in words; "" for none.
        native: the same as keys of `GPUS`.
        since: the first ComfyUI version that reads it; "" for none.
        reader: the program that reads it.
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
    least_scale: float = float(np.finfo(np.float32).smallest_subnormal)
    zero_scale: float = 1.0
    cards: str = ""
    native: frozenset[str] = frozenset()
    since: str = ""
    reader: str = "ComfyUI"

    @property
    def marked(self) -> str:
        """Its name in a quantization config."""
        return str(self.mark["format"])

    @property
    def readable(self) -> bool:
        """Whether this tool reads it; otherwise it is only recognized."""
        return self.input_grid is not None

    @property
    def range(self) -> float:
        """The largest weight at a scale of 1."""
        assert self.input_grid is not None, self.name
        return self.input_grid.max

    @property
    def input_block(self) -> int:
        """Inputs that share a dynamic scale; 0 for all of a token."""
        return self.group_width if self.tiled else 0

    @property
    def read_by(self) -> str:
        """The program and version that read it."""
        return f"{self.reader} since {self.since}" if self.since else self.reader

    @property
    def codes(self) -> Grid:
        """The grid of a format with one-byte codes."""
        assert self.grid is not None, self.name
        return self.grid

    # How a layer is stored.

    def takes(self, shape: Shape) -> bool:
        """Whether it supports a weight (out, in)."""
        return not any(side % multiple for side, multiple in zip(shape, self.sides, strict=True))

    @property
    def needs(self) -> str:
        """The dimensions that it requires of a weight, in words."""
        out, within = self.sides
        if out == within:
            return f"dimensions that are multiples of {out}"
        return f"a multiple of {within} inputs"

    def block(self, weight_shape: tuple[int, int], block_size: int) -> tuple[int, int]:
        """The block (b_out, b_in) of a weight (out, in) that shares one scale when it is written."""
        square = (block_size, block_size)
        blocks = {"tensor": weight_shape, "row": (1, weight_shape[1]), "block": square}
        return (1, self.group_width) if self.group_width else blocks[self.granularity or "tensor"]

    def storage(self, shape: tuple[int, int], block_size: int) -> dict[str, Stored]:
        """Dtypes and shapes of the tensors of a weight (out, in), by suffix."""
        grid = scale_grid(shape, self.block(shape, block_size))
        scales = {"tensor": (), "row": grid if self.column else grid[:1], "block": grid}
        scale = tile_shape(*grid) if self.tiled else scales[self.granularity or "tensor"]
        weight = (shape[0], shape[1] * self.code_bits // 8)
        return {names.WEIGHT: (self.dtypes[0], weight), self.scales[0]: (self.scale_dtypes[0], scale)}

    def shape(self, stored: Shape, _parts: Mapping[str, Shape]) -> tuple[int, int] | None:
        """(out, in) of a weight, from its stored shape and the shapes of its scales by suffix; None if impossible."""
        return (stored[0], stored[1] * 8 // self.code_bits) if len(stored) == 2 else None

    def config(self, shape: tuple[int, int], block_size: int) -> dict[str, Any]:
        """The quantization config of a layer written in this format."""
        said = {"group_size": self.block(shape, block_size)[1]} if self.granularity == "block" else {}
        return {**self.mark, **said}

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes [rows, in], one per byte, as they are stored."""
        return codes

    def unpack(self, packed: Tensor) -> Tensor:
        """Unpack stored rows into codes."""
        return packed

    # Weights.

    def weight_scales(self, absmax: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scales that clip nothing: absmax / max, at least `least_scale`; float32 of the same shape."""
        scale = np.maximum(absmax.astype(np.float32) / np.float32(self.codes.max), np.float32(self.least_scale))
        result: NDArray[np.float32] = np.where(absmax == 0, np.float32(self.zero_scale), scale).astype(np.float32)
        return result

    def decode(self, parts: Parts, _config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """A weight as readers multiply it, possibly rotated, from some or all rows of its stored tensors by suffix.

        Returns:
            Levels [out, in], and their float32 scales [1 or out, 1].
        """
        return self.unpack(parts[names.WEIGHT]), parts[self.scales[0]].float().reshape(-1, 1)

    @property
    def roundable(self) -> bool:
        """Whether it has a lattice: one scale per tensor, row, or group of a row."""
        return self.granularity in ("tensor", "row") or self.group_width > 0

    def quantized(self, weight_OI: Tensor, _method: str = "absmax") -> dict[str, Tensor]:
        """The stored tensors of a whole weight [out, in], rounded to nearest, with "absmax" scales."""
        absmax = weight_OI.abs()
        absmax = absmax.amax().reshape(1, 1) if self.granularity == "tensor" else absmax.amax(1, keepdim=True)
        scale = torch.where(absmax == 0, self.zero_scale, (absmax / self.codes.max).clamp(min=self.least_scale))
        return {names.WEIGHT: self.codes.round(weight_OI / scale), self.scales[0]: scale}

    def lattice(self, parts: Parts) -> Lattice:
        """The lattice of a weight made by `quantized`."""
        grid = self.grid or self.input_grid
        assert grid is not None, self.name
        meanings, (levels, scale) = grid.meanings(), self.decode(parts, self.mark)
        return Lattice.of(np.where(np.abs(meanings) <= self.range, meanings, np.nan), levels.view(torch.uint8), scale)

    def stored(self, lattice: Lattice, parts: Parts) -> dict[str, Tensor]:
        """The stored tensors of a changed lattice of `parts`."""
        made = {names.WEIGHT: self.pack(lattice.stored), self.scales[-1]: lattice.unit}
        if lattice.group:
            numbers = lattice.numbers.to(torch.uint8)
            made[self.scales[0]] = to_tiles(numbers) if self.tiled else numbers
        return {**parts, **{key: new.view(parts[key].dtype).reshape(parts[key].shape) for key, new in made.items()}}

    def group(self, _config: Mapping[str, Any]) -> int:
        """Size of the groups of inputs that readers rotate (`rotation`); 0 for none."""
        return 0

    # Inputs.

    def inputs(self, x: Tensor, static: Tensor | None, arithmetic: str) -> tuple[Tensor, Tensor]:
        """Quantize a layer's inputs as readers do.

        Args:
            x: [..., in], rotated if the format rotates.
            static: the layer's input scale, float32 (), if it has one.
            arithmetic: "comfyui" computes in x's own dtype, all others in float32; see `engines.quantized_linear`.

        Returns:
            Levels like x, and their float32 scale, () or [..., 1].
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
    """A format whose codes are packed, rotated, or scaled in small blocks, read and written with torch.

    A weight is written in bands of rows, after the tensors of the whole weight (`whole`). Tiled scales come last.
    """

    ROWS = 128
    """Rows of a tile of scales; bands begin at multiples of it."""

    def whole(self, _weight: Weight) -> dict[str, Tensor]:
        """Tensors of the weight as a whole, by suffix, on the CPU."""
        return {}

    def quantize(self, weight_OI: Tensor, whole: Parts, method: str) -> dict[str, Tensor]:
        """Quantize a band of rows, [rows, in] in any float dtype, in float32, by "absmax" or "mse".

        Returns:
            The stored tensors of these rows, by suffix; scales not yet in tiles.
        """
        raise NotImplementedError

    def pieces(self, weight: Weight, method: str, step: int) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors of a weight, by suffix, in consecutive pieces of `step` rows."""
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
        """See `Format`; the method may also be "mse"."""
        rows, columns = weight_OI.shape
        weight = Weight((rows, columns), lambda: float(weight_OI.abs().max()), weight_OI.__getitem__)
        parts: dict[str, list[Tensor]] = {}
        for suffix, piece in self.pieces(weight, method, max(1, TOGETHER_VALUES // columns)):
            parts.setdefault(suffix, []).append(piece.to(weight_OI.device))
        return {suffix: torch.cat(found) if found[0].dim() else found[0] for suffix, found in parts.items()}
