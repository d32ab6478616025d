"""NVFP4: E2M1 codes (0, ½, 1, 1½, 2, 3, 4, 6 and a sign), an E4M3 scale per 16, and a float32 scale per tensor.

    global = absmax / (448 · 6)      block = E4M3(absmax of 16 / (6 · global))      codes = E2M1(W / (block · global))

Inputs are quantized in the same way. Their global scale is the file's `input_scale`, largest input / 2688, or dynamic
if the file has none. If a file has `pre_quant_scale` [in], its weights were divided by it, and readers multiply inputs
by it first.

Rounds like comfy-kitchen 0.2.40 (`quantize_nvfp4`); two codes per byte, the first in the upper half; scales in tiles
(`packing`). "mse" tries absmax / 4 as well as absmax / 6 in each block and uses the scale with the smaller squared
error ("four over six": Cook et al., arXiv 2512.02010), since the grid has no value between 4 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..lazy_torch import torch
from .fp8 import E4M3FN
from .packing import absmax_of, from_tiles, in_groups, pack_nibbles, unpack_nibbles
from .record import BLACKWELL_GPUS, Grid, Lattice, Packed, Parts, Stored, Weight

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 16
LARGEST = 6.0
LARGEST_INPUT = E4M3FN.max * LARGEST
"""The largest input at an input scale of 1: 2688."""

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*SIZES, *(-size for size in SIZES))
"""The values of the 16 codes."""


@dataclass(frozen=True)
class BlockGrid(Grid):
    """An approximate grid of inputs at an input scale of 1, for values whose block is unknown.

    Each value is treated as the largest of its block. Blocks below half the smallest E4M3 scale become 0, values beyond
    448 · 6 are clipped, and in between the rounding error is that of E2M1's two steps per octave.

    >>> BLOCKS.levels[:6] / BLOCKS.smallest_step
    array([0., 1., 2., 3., 4., 6.])
    """

    def meanings(self) -> NDArray[np.float64]:
        """E2M1's steps from the largest value at the smallest scale up to the largest of all; the rest is NaN."""
        sizes = np.outer(np.exp2(np.arange(1, 18)), (1.0, 1.5)).reshape(-1)
        half = np.full(128, np.nan)
        half[: len(sizes) + 3] = [0.0, LEAST_INPUT, *(LEAST_INPUT * sizes), LARGEST_INPUT]
        return np.concatenate([half, -half])


LEAST_INPUT = E4M3FN.smallest_step * LARGEST
"""The largest value of a block with the smallest scale, at an input scale of 1."""

BLOCKS = BlockGrid("nvfp4", "U8", LARGEST_INPUT, 2 * LEAST_INPUT)


def encode(size: Tensor) -> Tensor:
    """Nearest E2M1 codes of magnitudes, ties to the even code, saturating at 6; uint8. Overwrites `size`."""
    # Steps are uniform from 0 to 2, 2 to 4, and 4 to 6, so each part is rounded to an integer.
    codes = (size * 2).round_().clamp_(max=4)
    codes += size.clamp(2, 4).round_()
    codes += size.clamp_(4, LARGEST).mul_(0.5).round_()
    return codes.sub_(4).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Values of E2M1 codes, float32."""
    table = torch.tensor(VALUES, device=codes.device)
    return table.index_select(0, codes.flatten().int()).reshape(codes.shape)


def scales_of(absmax: Tensor, overall: Tensor, reaches: float = LARGEST) -> Tensor:
    """E4M3 scales of blocks with absmax float32 [..., in / 16], such that their largest values become `reaches`.

    `overall` is the global scale, float32 (), or [..., 1] for one per token.
    """
    scales = absmax / overall.new_full((), reaches) / overall  # a tensor: CUDA divides by a number by multiplying
    return scales.clamp_(max=E4M3FN.max).to(torch.float8_e4m3fn)


def codes_of(blocked: Tensor, scales: Tensor, overall: Tensor) -> Tensor:
    """E2M1 codes, uint8 like `blocked` [..., in / 16, 16]; bit 3 is the sign. Blocks with a scale of 0 become 0."""
    total = (overall * scales.float()).unsqueeze(-1)
    codes = encode(blocked.abs().div_(torch.where(total == 0, torch.inf, total)))
    signs = blocked.view(torch.int32) >> 28
    signs &= (total != 0).int() << 3
    codes |= signs.to(torch.uint8)
    return codes


def meanings(codes: Tensor, scales: Tensor, overall: Tensor) -> Tensor:
    """Values of codes [..., in / 16, 16] with scales [..., in / 16], float32 [..., in]."""
    return (decode(codes) * (overall * scales.float()).unsqueeze(-1)).flatten(-2)


class NVFP4(Packed):
    """See the module's docstring."""

    def storage(self, shape: tuple[int, int], block_size: int) -> dict[str, Stored]:
        return {**super().storage(shape, block_size), names.WEIGHT_SCALE_2: ("F32", ())}

    def pack(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes, high_first=True)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack_nibbles(packed, high_first=True)

    def whole(self, weight: Weight) -> dict[str, Tensor]:
        return {names.WEIGHT_SCALE_2: torch.tensor(weight.absmax() or LARGEST_INPUT) / LARGEST_INPUT}

    def quantize(self, weight_OI: Tensor, whole: Parts, method: str) -> dict[str, Tensor]:
        overall = whole[names.WEIGHT_SCALE_2].to(weight_OI.device)
        blocked = in_groups(weight_OI.float(), BLOCK)
        absmax = absmax_of(blocked)
        scales = scales_of(absmax, overall)
        if method == "mse":
            other = scales_of(absmax, overall, 4.0)
            error, other_error = (
                in_groups(meanings(codes_of(blocked, tried, overall), tried, overall), BLOCK)
                .sub_(blocked)
                .square_()
                .sum(-1)
                for tried in (scales, other)
            )
            chosen = torch.where(other_error < error, other.view(torch.uint8), scales.view(torch.uint8))
            scales = chosen.view(torch.float8_e4m3fn)
        codes = codes_of(blocked, scales, overall)
        return {names.WEIGHT: self.pack(codes.flatten(-2)), names.WEIGHT_SCALE: scales}

    def lattice(self, parts: Parts) -> Lattice:
        codes = self.unpack(parts[names.WEIGHT])
        numbers = from_tiles(parts[names.WEIGHT_SCALE].view(torch.uint8), len(codes), codes.shape[1] // BLOCK)
        scaled = {"group": BLOCK, "scales": torch.tensor(E4M3FN.levels).float(), "numbers": numbers.long()}
        return Lattice.of(VALUES, codes, parts[names.WEIGHT_SCALE_2], reach=(-2, 5), **scaled)

    def decode(self, parts: Parts, _config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        codes = in_groups(self.unpack(parts[names.WEIGHT]), BLOCK)
        tiled = parts[names.WEIGHT_SCALE].view(torch.uint8)
        scales = from_tiles(tiled, *codes.shape[:2]).contiguous().view(torch.float8_e4m3fn)
        overall = parts[names.WEIGHT_SCALE_2].float().reshape(())
        return meanings(codes, scales, overall), torch.ones((1, 1), device=codes.device)

    def inputs(self, x: Tensor, static: Tensor | None, arithmetic: str) -> tuple[Tensor, Tensor]:
        if arithmetic == "dynamic_row":
            overall = (x.abs().amax(-1, keepdim=True) / LARGEST_INPUT).float().clamp(min=torch.finfo().tiny)
        elif static is None or arithmetic == "dynamic_tensor":
            overall = (x.abs().amax() / LARGEST_INPUT).float()
        else:
            overall = static.to(x.device)
        blocked = in_groups(x.float(), BLOCK)
        scales = scales_of(absmax_of(blocked), overall)
        return meanings(codes_of(blocked, scales, overall), scales, overall), torch.ones((), device=x.device)


FORMATS = (
    NVFP4(
        name="nvfp4",
        title="NVFP4",
        mark={"format": "nvfp4"},
        dtypes=("U8",),
        bits=4.5,
        code_bits=4,
        scales=(names.WEIGHT_SCALE, names.WEIGHT_SCALE_2),
        optional=(names.PRE_QUANT_SCALE,),
        scale_dtypes=("F8_E4M3", "U8"),
        granularity="block",
        group_width=BLOCK,
        tiled=True,
        input_grid=BLOCKS,
        static=True,
        sides=(16, 16),
        ranged_by=names.WEIGHT_SCALE_2,
        cards="Blackwell",
        native=BLACKWELL_GPUS,
        since="January 2026 (PR 11635)",
    ),
)
