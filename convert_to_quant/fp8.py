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

Everything is numpy and runs on the CPU. Chunks keep temporaries in the second-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 16
"""Values handled at a time: 64 Ki uint16 values, their int64 indices and their codes stay in a core's L2."""


@dataclass(frozen=True)
class Format:
    """An FP8 number format.

    Attributes:
        name: as ComfyUI and torch spell it.
        safetensors_dtype: as a safetensors header spells it.
        exponent_bits, mantissa_bits: field widths.
        max: the largest finite value.
        infinities: whether the largest exponent means infinity and NaN (IEEE), or only the last code is NaN.
    """

    name: str
    safetensors_dtype: str
    exponent_bits: int
    mantissa_bits: int
    max: float
    infinities: bool

    @property
    def bias(self) -> int:
        """What the exponent field is offset by."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def smallest_subnormal(self) -> float:
        """The least positive value, 2^(1 - bias - mantissa_bits)."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def largest_rounded(self) -> float:
        """Up to here numbers become `max` by rounding: half a step above it."""
        exponent = math.frexp(self.max)[1] - 1
        return self.max + 2.0 ** (exponent - self.mantissa_bits - 1)

    @property
    def worst_rounding_db(self) -> float:
        """Least signal to noise of any numbers between the smallest normal one and `largest_rounded`.

        The worst is half a step above a power of two: an error of 1 / (2^(m + 1) + 1) of the number.
        """
        return 20 * math.log10(2 ** (self.mantissa_bits + 1) + 1)


E4M3FN = Format("float8_e4m3fn", "F8_E4M3", 4, 3, 448.0, infinities=False)
E5M2 = Format("float8_e5m2", "F8_E5M2", 5, 2, 57344.0, infinities=True)
FORMATS = {fmt.name: fmt for fmt in (E4M3FN, E5M2)}
BY_SAFETENSORS_DTYPE = {fmt.safetensors_dtype: fmt for fmt in FORMATS.values()}


@cache
def values(fmt: Format = E4M3FN) -> NDArray[np.float32]:
    """What each code means.

    Returns:
        float32 [256], indexed by code, read-only.

    >>> values(E4M3FN)[[0x01, 0x38, 0x7E]].tolist()
    [0.001953125, 1.0, 448.0]
    """
    codes = np.arange(256)
    exponent = (codes >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    mantissa = codes & ((1 << fmt.mantissa_bits) - 1)
    fraction = mantissa / (1 << fmt.mantissa_bits)
    magnitude = np.where(exponent == 0, fraction, 1.0 + fraction) * np.exp2(np.maximum(exponent, 1) - fmt.bias)
    last = (1 << fmt.exponent_bits) - 1
    if fmt.infinities:
        magnitude[exponent == last] = np.nan
        magnitude[(exponent == last) & (mantissa == 0)] = np.inf
    else:
        magnitude[(codes & 0x7F) == 0x7F] = np.nan
    result: NDArray[np.float32] = np.where(codes < 128, magnitude, -magnitude).astype(np.float32)
    result.flags.writeable = False
    return result


@cache
def levels(fmt: Format = E4M3FN) -> NDArray[np.float64]:
    """The finite values that are not negative, ascending: of codes 0 to n - 1.

    Returns:
        float64 [n], read-only.

    >>> levels(E5M2)[[0, 1, -1]].tolist()
    [0.0, 1.52587890625e-05, 57344.0]
    """
    positive = values(fmt)[:128].astype(np.float64)
    result: NDArray[np.float64] = positive[positive <= fmt.max]
    result.flags.writeable = False
    return result


@cache
def midpoints(fmt: Format = E4M3FN) -> NDArray[np.float64]:
    """Where rounding goes from one of `levels` to the next.

    Returns:
        float64 [n - 1], read-only.
    """
    result: NDArray[np.float64] = (levels(fmt)[1:] + levels(fmt)[:-1]) / 2
    result.flags.writeable = False
    return result


@cache
def _encode_table(fmt: Format) -> NDArray[np.uint8]:
    """Codes of all 65,536 bfloat16 patterns, each read as "this value, or if odd, anything strictly beside it"."""
    between = midpoints(fmt)
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


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact float32 values of bfloat16 bit patterns.

    Args:
        bits: uint16, any shape.

    Returns:
        float32, the same shape.
    """
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def spans(count: int, step: int = CHUNK) -> Iterator[slice]:
    """Slices that cover range(count) in steps."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def encode(numbers: NDArray[np.float32], fmt: Format = E4M3FN) -> NDArray[np.uint8]:
    """Nearest FP8 codes, ties to even, saturating at ±max; NaN stays NaN with its sign.

    Args:
        numbers: float32, any shape.
        fmt: the format.

    Returns:
        uint8 codes, the same shape.

    >>> encode(np.float32([0.0, 1.0, 17.0, 1e9]))  # 17 lies between 16 and 18, a tie: the even code is 16's
    array([  0,  56,  88, 126], dtype=uint8)
    """
    flat = np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1).view(np.uint32)
    codes = np.empty(flat.shape, np.uint8)
    table = _encode_table(fmt)
    for span in spans(len(flat)):
        bits = flat[span]
        odd = (bits & np.uint32(0xFFFF)) != 0
        np.take(table, (bits >> np.uint32(16)) | odd, out=codes[span], mode="clip")
    return codes.reshape(np.shape(numbers))


def decode(codes: NDArray[np.uint8], fmt: Format = E4M3FN) -> NDArray[np.float32]:
    """What codes mean, as float32.

    Args:
        codes: uint8, any shape.
        fmt: the format.

    Returns:
        float32, the same shape.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    numbers = np.empty(flat.shape, np.float32)
    table = values(fmt)
    for span in spans(len(flat)):
        np.take(table, flat[span], out=numbers[span], mode="clip")
    return numbers.reshape(codes.shape)
