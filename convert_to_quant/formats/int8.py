"""INT8: weights times one scale per row, or one per tensor; inputs are scaled row by row as they come.

    codes = clamp(round(W / s), ±127)        s = absmax / 127

A row of inputs x is quantized in the same way, with a scale of its own, and the products of codes add up exactly. So
no file holds an input scale: there is nothing to calibrate, and nothing to clip. Steps are equal, so headroom costs
6 dB an octave, and one loud channel makes all others coarse.

Rounded as comfy-kitchen 0.2.40 rounds float32 weights (`quantize_int8_rowwise`, `quantize_int8_tensorwise`), ties to
even, with scales of at least 1e-30. From bfloat16 weights its eager quantizer divides in bfloat16, which moves 7 % of
the codes of normal numbers and costs them 0.6 dB; here every weight is divided in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .record import Format, Grid


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Whole numbers from -128 to 127; where nothing is clipped, -128 is not used."""

    def meanings(self) -> NDArray[np.float64]:
        """What each byte means: two's complement."""
        return np.arange(256).astype(np.int8).astype(np.float64)

    def encode(self, numbers: NDArray[np.float32]) -> NDArray[np.int8]:
        """Nearest whole numbers, ties to even."""
        with np.errstate(invalid="ignore"):  # NaN: whoever has such a weight has refused it
            nearest = np.rint(numbers, out=np.empty(np.shape(numbers), np.float32))
            return np.clip(nearest, -128, 127, out=nearest).astype(np.int8)


INTEGERS = IntegerGrid("int8", "I8", 127.0, 1.0)

ROWS = Format(
    name="int8",
    title="INT8",
    mark={"format": "int8_tensorwise"},
    dtypes=(INTEGERS.dtype,),
    bits=8,
    grid=INTEGERS,
    granularity="row",
    scale_rank=2,
    input_grid=INTEGERS,
    range=INTEGERS.max,
    least_scale=1e-30,
    zero_scale=1e-30,
    cards="Turing and later, RDNA 3 and 4",
    since="June 2026 (PR 14636)",
)
FORMATS = (ROWS, replace(ROWS, name="int8-tensor", granularity="tensor", scale_rank=0))
