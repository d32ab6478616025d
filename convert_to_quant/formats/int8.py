"""INT8 and INT4: integers with one scale per row or per tensor, and dynamic input scales per token.

    codes = clamp(round(W / s), ±max)        s = absmax / max, of a row        max = 127, or 7

Each token of inputs is quantized in the same way, and sums of integer products are exact. Files hold no input scales:
there is nothing to calibrate or clip. Steps are uniform, so headroom costs 6 dB per octave, and an outlier channel
makes all others coarse; ConvRot rotates W and x first (`rotation`).

Rounds like comfy-kitchen 0.2.40 (`quantize_int8_rowwise`, `quantize_int8_tensorwise`, `quantize_int8_convrot_weight`,
`quantize_convrot_w4a4_weight`), ties to even. Its eager quantizer rotates and divides bfloat16 weights in bfloat16,
which changes 7 % of the codes of normally distributed weights and costs 0.6 dB; here all weights are divided in
float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..lazy_torch import torch
from .packing import pack_nibbles, unpack_nibbles
from .record import INT8_GPUS, Format, Grid, Packed, Parts
from .rotation import GROUP_KEY, group_of, rotate_weight, said_group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Integers from -128 to 127; -128 results only from clipping."""

    def meanings(self) -> NDArray[np.float64]:
        """Two's complement."""
        return np.arange(256).astype(np.int8).astype(np.float64)


INTEGERS = IntegerGrid("int8", "I8", 127.0, 1.0)


def whole_numbers(rows: Tensor, largest: float, least_absmax: float, least_scale: float) -> tuple[Tensor, Tensor]:
    """Quantize each row [..., in] to integers up to ±largest with its own scale, dividing in the row's dtype.

    Returns:
        int8 like `rows`, and float32 scales [..., 1].
    """
    absmax = torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True))  # avoids a temporary |rows|
    scale = (absmax.clamp(min=least_absmax).float() / largest).clamp(min=least_scale)
    divisor = scale.to(rows.dtype)
    divisor = torch.where(divisor == 0, torch.finfo(divisor.dtype).tiny, divisor)
    return (rows / divisor).round_().clamp_(-largest, largest).to(torch.int8), scale


class ConvRot(Packed):
    """INT8 of rotated weights."""

    LEAST_ABSMAX = 0.0

    def config(self, shape: tuple[int, int], block_size: int) -> dict[str, Any]:
        return {**super().config(shape, block_size), GROUP_KEY: group_of(shape[1])}

    def group(self, config: Mapping[str, Any]) -> int:
        return said_group(config)

    def quantize(self, weight_OI: Tensor, _whole: Parts, _method: str) -> dict[str, Tensor]:
        rotated = rotate_weight(weight_OI, group_of(weight_OI.shape[1]))
        codes, scale = whole_numbers(rotated, self.range, self.LEAST_ABSMAX, self.least_scale)
        return {names.WEIGHT: self.pack(codes), names.WEIGHT_SCALE: scale}


class ConvRotW4A4(ConvRot):
    """INT4 of rotated weights and inputs, two codes per byte, the first in the lower half."""

    LEAST_ABSMAX = 1e-10
    range = 7.0

    def pack(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes).view(torch.int8)

    def unpack(self, packed: Tensor) -> Tensor:
        unsigned = unpack_nibbles(packed).to(torch.int8)
        return torch.where(unsigned > 7, unsigned - 16, unsigned)

    def inputs(self, x: Tensor, static: Tensor | None, arithmetic: str) -> tuple[Tensor, Tensor]:
        if arithmetic == "dynamic_tensor":
            return super().inputs(x, static, arithmetic)
        x = x if arithmetic == "comfyui" else x.float()
        codes, scale = whole_numbers(x, self.range, self.LEAST_ABSMAX, self.least_scale)
        return codes, scale.to(x.dtype).float()  # unlike at 8 bits, eager scales are in x's own dtype


ROWS = Format(
    name="int8",
    title="INT8",
    mark={"format": "int8_tensorwise"},
    dtypes=(INTEGERS.dtype,),
    grid=INTEGERS,
    granularity="row",
    column=True,
    input_grid=INTEGERS,
    heeds_full_precision=False,
    least_scale=1e-30,
    zero_scale=1e-30,
    cards="Turing and later, RDNA 3 and 4",
    native=INT8_GPUS,
    since="June 2026 (PR 14636)",
)
CONVROT = ConvRot(**{**vars(ROWS), "name": "int8-convrot", "title": "INT8 ConvRot", "grid": None, "sides": (1, 16),
                     "mark": {"format": "int8_tensorwise", "convrot": True}, "fallback": "int8"})  # fmt: skip
W4A4 = ConvRotW4A4(
    name="convrot-w4a4",
    title="ConvRot W4A4",
    mark={"format": "convrot_w4a4"},
    dtypes=("I8", "U8"),
    bits=4,
    code_bits=4,
    granularity="row",
    input_grid=INTEGERS,
    heeds_full_precision=False,
    sides=(1, 256),
    fallback="int8",
    cards="Ampere and Ada",
    native=frozenset({"rtx30", "rtx40", "l40s"}),
    since="0.33 or earlier",
)
FORMATS = (ROWS, replace(ROWS, name="int8-tensor", granularity="tensor"), CONVROT, W4A4)
