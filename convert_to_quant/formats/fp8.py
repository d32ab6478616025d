"""FP8 number formats: the values of the 256 codes, and the nearest code to a number.

An FP8 code is a sign bit, e exponent bits and m mantissa bits. With bias b = 2^(e-1) - 1:

    exponent field 0:  (-1)^s · 2^(1-b) · (mantissa / 2^m)            (subnormal: absolute step 2^(1-b-m))
    otherwise:         (-1)^s · 2^(exponent-b) · (1 + mantissa / 2^m)  (normal: relative step 2^-m)

`float8_e4m3fn` (OCP 8-bit Floating Point Specification 1.0, section 5) has no infinities: only the all-ones code is
NaN, so it reaches 448 = 2^8 · 1.75. `float8_e5m2` keeps IEEE infinities and NaNs and reaches 57,344.

Encoding is torch's cast after a clamp to ±max: to nearest, ties to even.

Readers divide inputs by a static `input_scale`, 1.0 if missing. Formats with scales per row or block are those of the
ComfyUI-QuantOps nodes, which scale inputs dynamically per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .record import FP8_GPUS, Format, Grid

STORED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""The one-byte float dtypes of safetensors."""


@dataclass(frozen=True)
class FloatGrid(Grid):
    """The values of an FP8 format.

    Attributes:
        exponent_bits, mantissa_bits: field widths.
        infinities: whether the largest exponent means infinity or NaN (IEEE); otherwise only the last code is NaN.

    >>> E4M3FN.values[[0x01, 0x38, 0x7E]].tolist()
    [0.001953125, 1.0, 448.0]
    """

    exponent_bits: int
    mantissa_bits: int
    infinities: bool

    def meanings(self) -> NDArray[np.float64]:
        """See the module's docstring."""
        codes = np.arange(256)
        exponent = (codes >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        mantissa = codes & ((1 << self.mantissa_bits) - 1)
        fraction = mantissa / (1 << self.mantissa_bits)
        bias = (1 << (self.exponent_bits - 1)) - 1
        magnitude = np.where(exponent == 0, fraction, 1.0 + fraction) * np.exp2(np.maximum(exponent, 1) - bias)
        last = (1 << self.exponent_bits) - 1
        if self.infinities:
            magnitude[exponent == last] = np.nan
            magnitude[(exponent == last) & (mantissa == 0)] = np.inf
        else:
            magnitude[(codes & 0x7F) == 0x7F] = np.nan
        result: NDArray[np.float64] = np.where(codes < 128, magnitude, -magnitude)
        return result


E4M3FN = FloatGrid("float8_e4m3fn", "F8_E4M3", 448.0, 2.0**-6, 4, 3, infinities=False)
E5M2 = FloatGrid("float8_e5m2", "F8_E5M2", 57344.0, 2.0**-14, 5, 2, infinities=True)

QUANTOPS = "the ComfyUI-QuantOps nodes"

FP8 = Format(
    name="fp8",
    title="FP8",
    mark={"format": "float8_e4m3fn"},
    dtypes=(E4M3FN.dtype,),
    grid=E4M3FN,
    granularity="tensor",
    input_grid=E4M3FN,
    static=True,
    dynamic=False,
    sides=(16, 16),  # required by torch's FP8 matmuls on CUDA
    cards="Ada, Hopper, Blackwell, RDNA 3 and 4",
    native=FP8_GPUS,
    since="October 2025 (PR 10498)",
)
ROWS = replace(FP8, name="fp8-row", mark={"format": "float8_e4m3fn_rowwise"}, granularity="row",
               static=False, dynamic=True, since="", native=frozenset(), reader=QUANTOPS)  # fmt: skip
FORMATS = (
    FP8,
    ROWS,
    replace(ROWS, name="fp8-block", mark={"format": "float8_e4m3fn_blockwise"}, granularity="block"),
    replace(ROWS, name="fp8-block3d", mark={"format": "float8_e4m3fn_block3d"}, granularity=None),
    replace(ROWS, name="fp8-sglang", mark={"format": "rowwise-float8_e4m3fn"}, granularity=None, reader="SGLang"),
    # Never written: CUDA cannot multiply two matrices of this format.
    replace(FP8, name="fp8-e5m2", title="FP8 E5M2", mark={"format": "float8_e5m2"}, dtypes=(E5M2.dtype,), grid=E5M2,
            granularity=None, input_grid=E5M2, cards="", native=frozenset()),
)  # fmt: skip
