"""Measurement of layer inputs: what is measured, and by which code.

A linear layer gets a stream of tokens. `accumulate` adds one input to running totals without making the host wait for
the device. The reference (`reference.py`, torch) defines the result; the Triton kernel (`triton.py`) gives the same in
one pass over the input on a CUDA device. This file defines the layout that both share with the statistics (`stats.py`,
numpy only). It imports no torch.

Bins. The bin of x is the 12 highest bits of its float32 pattern after the sign, `(bits & 0x7FFFFFFF) >> 19`: the
bfloat16 bits of |x| without the sign, shifted right by 3, if float32 is truncated to bfloat16. So float32, float16 and
bfloat16 inputs put the same value into the same bin, and bin edges are exact. Bins grow with |x|: 16 equal steps per
octave from 2^-126 on. Bin 0 contains zeros and everything below 2^-130. `NONFINITE_BIN` counts infinities and NaN,
which count nowhere else; later bins stay empty.

Sums. Sums of squares are float64, added in the order of calls, and on a GPU of thread blocks: their last bits may
differ between runs (1e-14, relative). Everything else is counts and maxima, which do not depend on the order.

Channels. The absmax of each input channel comes from a sample of tokens, since all tokens would cost more than all the
rest: of an input of n tokens, every (n // CHANNEL_ROWS)-th.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .reference import Totals

BINS = 4096
NONFINITE_BIN = 0x7F800000 >> 19
"""Bin of infinities and NaN; finite values have smaller bins."""

SIGMA_BINS = 8
"""Bin i holds noise levels in (i / 8, (i + 1) / 8]; level 0 belongs to bin 0."""
UNKNOWN_SIGMA = SIGMA_BINS
"""Column of inputs whose noise level is unknown, or not one number in [0, 1]."""

CHANNEL_ROWS = 256
"""Size of the sample for the channel absmax: this many tokens, up to twice as many (docs/experiments.md)."""


def accumulate(totals: Totals, slot: int, sigma_bin: Tensor, x: Tensor) -> None:
    """Add one input of a layer to the totals, with the fastest available code. The host does not wait.

    Args:
        totals: on the device of `x`.
        slot: the layer's row in the totals.
        sigma_bin: the input's noise level, one of SIGMA_BINS + 1 columns; int64 [1] on the device of `x`.
        x: [..., in_features], floating, not empty; in_features is that of the slot.
    """
    from . import reference

    if x.is_cuda and _triton_works():
        from . import triton

        triton.accumulate(totals, slot, sigma_bin, x)
    else:
        reference.accumulate(totals, slot, sigma_bin, x)


@cache
def _triton_works() -> bool:
    """Whether Triton is installed, can compile, and agrees with the reference. Checked once."""
    try:
        from . import triton
    except ImportError:
        return False
    return triton.works()
