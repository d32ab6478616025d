"""MXFP8: E4M3 codes with a power-of-two scale per 32, for inputs and weights (OCP Microscaling Formats 1.0).

    scale = 2^ceil(log2(absmax / 448)), stored as the exponent + 127 (E8M0)        codes = E4M3(W / scale)

Rounds like comfy-kitchen 0.2.40 (`quantize_mxfp8`). The specification uses floor(log2(absmax)) - 8, which clips up to
an octave; the ceiling clips nothing. Scales are stored in tiles (`packing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import names
from ..lazy_torch import torch
from .fp8 import E4M3FN
from .packing import absmax_of, from_tiles, in_groups
from .record import BLACKWELL_GPUS, Lattice, Packed, Parts

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
BIAS = 127


def scale_of(exponents: Tensor) -> Tensor:
    """Convert E8M0 bytes to float32; 0, the scale of an all-zero block, becomes 0."""
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def blocks_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [..., in] in blocks: E4M3 codes like x, and E8M0 exponents, uint8 [..., in / 32]."""
    blocked = in_groups(x, BLOCK)
    absmax = absmax_of(blocked)
    largest = absmax.new_full((), E4M3FN.max)  # a tensor, since CUDA divides by a number by multiplying
    ratio = (absmax / largest).clamp(min=2.0**-BIAS)
    exponents = torch.log2(ratio.double()).float().ceil() + BIAS  # in float32 it differs between devices
    exponents = torch.where(absmax == 0, 0, exponents.clamp(0, 254)).to(torch.uint8)
    scale = scale_of(exponents).unsqueeze(-1)
    scaled = blocked.float() / torch.where((absmax == 0).unsqueeze(-1), 1, scale)
    return E4M3FN.round(scaled).reshape(x.shape), exponents


def meanings(codes: Tensor, exponents: Tensor) -> Tensor:
    """Values of codes [..., in] with exponents [..., in / 32], float32."""
    return (in_groups(codes.float(), BLOCK) * scale_of(exponents).unsqueeze(-1)).reshape(codes.shape)


class MXFP8(Packed):
    """See the module's docstring."""

    def quantize(self, weight_OI: Tensor, _whole: Parts, _method: str) -> dict[str, Tensor]:
        codes, exponents = blocks_of(weight_OI)
        return {names.WEIGHT: codes, names.WEIGHT_SCALE: exponents}

    def lattice(self, parts: Parts) -> Lattice:
        codes = parts[names.WEIGHT].view(torch.uint8)
        numbers = from_tiles(parts[names.WEIGHT_SCALE], codes.shape[0], codes.shape[1] // BLOCK)
        scales = scale_of(torch.arange(255, dtype=torch.uint8))
        return Lattice.of(E4M3FN.meanings(), codes, torch.ones(1), group=BLOCK, scales=scales,
                          numbers=numbers.long(), reach=(-1, 1))  # fmt: skip

    def decode(self, parts: Parts, _config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        codes = parts[names.WEIGHT]
        tiled = parts[names.WEIGHT_SCALE].view(torch.uint8)
        exponents = from_tiles(tiled, codes.shape[0], codes.shape[1] // BLOCK)
        return meanings(codes, exponents), torch.ones((1, 1), device=codes.device)

    def inputs(self, x: Tensor, static: Tensor | None, arithmetic: str) -> tuple[Tensor, Tensor]:
        if arithmetic.startswith("dynamic"):
            return super().inputs(x, static, arithmetic)
        return meanings(*blocks_of(x)), torch.ones((), device=x.device)


FORMATS = (
    MXFP8(
        name="mxfp8",
        title="MXFP8",
        mark={"format": "mxfp8"},
        dtypes=("F8_E4M3",),
        bits=8.25,
        scale_dtypes=("U8", "F8_E8M0"),
        granularity="block",
        group_width=BLOCK,
        tiled=True,
        input_grid=E4M3FN,
        sides=(32, 32),
        fallback="fp8",
        cards="Blackwell",
        native=BLACKWELL_GPUS,
        since="0.33 or earlier",
    ),
)
