"""FP8 number formats: what the 256 codes mean, and the nearest code of a number.

An FP8 code is a sign bit, e exponent bits and m mantissa bits. With bias b = 2^(e-1) - 1:

    exponent field 0:  (-1)^s · 2^(1-b) · (mantissa / 2^m)            (subnormal: absolute step 2^(1-b-m))
    otherwise:         (-1)^s · 2^(exponent-b) · (1 + mantissa / 2^m)  (normal: relative step 2^-m)

`float8_e4m3fn` (OCP 8-bit Floating Point Specification 1.0, section 5) has no infinities: only the all-ones code is
NaN, so it reaches 448 = 2^8 · 1.75. `float8_e5m2` keeps IEEE infinities and NaNs and reaches 57,344.

Encoding here is round to nearest, ties to even, and saturates: a finite or infinite value beyond the range becomes
±max, as every FP8 kernel that clamps first does. NaN stays NaN.

It is one table look-up per value. A float32 is first cut to the 16 bits of a bfloat16 in *round to odd*: the low half
is dropped, and if it held anything the last kept bit is set. Those 16 bits keep 7 mantissa bits plus "was there more",
which is enough to round correctly to 3 mantissa bits (round to odd is safe from m + 2 bits on; Boldo and Melquiond,
"Emulation of FMA and correctly rounded sums", IEEE TC 2008). So 65,536 entries answer for all float32 values.

Readers divide inputs by a static scale, `input_scale`, 1.0 where it is missing. Scales per row or per block are those
of the ComfyUI-QuantOps nodes, which scale inputs row by row as they come.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .record import FP8_GPUS, Format, Grid, spans, widen_bfloat16

STORED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Dtypes of one byte with an exponent that a safetensors header can name."""


@dataclass(frozen=True)
class FloatGrid(Grid):
    """The values of an FP8 format.

    Attributes:
        exponent_bits, mantissa_bits: field widths.
        infinities: whether the largest exponent means infinity and NaN (IEEE), or only the last code is NaN.

    >>> E4M3FN.values[[0x01, 0x38, 0x7E]].tolist()
    [0.001953125, 1.0, 448.0]
    >>> E4M3FN.encode(np.float32([0.0, 1.0, 17.0, 1e9]))  # 17 lies between 16 and 18, a tie: the even code is 16's
    array([  0,  56,  88, 126], dtype=uint8)
    """

    exponent_bits: int
    mantissa_bits: int
    infinities: bool

    def meanings(self) -> NDArray[np.float64]:
        """What each code means; see the module's docstring."""
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

    @cached_property
    def _code_table(self) -> NDArray[np.uint8]:
        """Codes of all 65,536 bfloat16 patterns, each read as "this value, or if odd, anything strictly beside it"."""
        between = self.midpoints
        with np.errstate(invalid="ignore"):  # the patterns include signalling NaNs
            magnitudes = widen_bfloat16(np.arange(0x8000, dtype=np.uint16)).astype(np.float64)
        codes = np.searchsorted(between, magnitudes, side="left")  # a value on a midpoint goes to the code below it...
        tied = codes < len(between)
        tied[tied] = magnitudes[tied] == between[codes[tied]]
        codes[tied] += codes[tied] & 1  # ...unless that one is odd
        codes[np.isnan(magnitudes)] = 0x7F
        table = np.concatenate([codes, codes | 0x80]).astype(np.uint8)
        table.flags.writeable = False
        return table

    def encode(self, numbers: NDArray[np.float32], *, fits: bool = False) -> NDArray[np.uint8]:  # noqa: ARG002
        """Nearest codes, ties to even, saturating at ±max; NaN stays NaN with its sign."""
        flat = np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1).view(np.uint32)
        codes = np.empty(flat.shape, np.uint8)
        table = self._code_table
        for span in spans(len(flat)):
            bits = flat[span]
            odd = (bits & np.uint32(0xFFFF)) != 0
            np.take(table, (bits >> np.uint32(16)) | odd, out=codes[span], mode="clip")
        return codes.reshape(np.shape(numbers))


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
    sides=(16, 16),  # torch's FP8 products on CUDA take such sides only, and fail on others
    range=E4M3FN.max,
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
    # CUDA multiplies no two of this format, so nothing is written in it.
    replace(FP8, name="fp8-e5m2", title="FP8 E5M2", mark={"format": "float8_e5m2"}, dtypes=(E5M2.dtype,), grid=E5M2,
            granularity=None, input_grid=E5M2, range=E5M2.max, cards="", native=frozenset()),
)  # fmt: skip
