"""What watching a layer's input measures, and who measures it.

A linear layer sees a stream of rows, one per token. `accumulate` adds one such input to running totals, without the
host ever waiting for the device: the reference (`reference.py`, torch) defines the result, the Triton kernel
(`triton.py`) gives the same in one pass over the input on a CUDA device. This file holds the layout that both, and the
statistics made of them (`stats.py`, numpy only), agree on. It imports no torch.

Bins. The bin of x is the 12 highest bits of its float32 pattern after the sign, `(bits & 0x7FFFFFFF) >> 19`. These are
the bfloat16 bits of |x| without the sign, shifted right by 3, where float32 becomes bfloat16 by truncation: float32,
float16 and bfloat16 inputs put the same value into the same bin, and bin edges are exact. Bins grow with |x|: 16 equal
steps per octave from 2^-126 on; bin 0 holds zeros and all that is under 2^-130. Bin `NONFINITE_BIN` holds infinities
and NaN, which count nowhere else; the bins after it stay empty.

Sums. Sums of squares are float64, added in the order of calls, on a GPU of thread blocks: their last bits may differ
from run to run (1e-14, relative). Everything else is counts and maxima, which no order changes.

Channels. The absmax of each input channel comes from a sample of tokens, since that of all of them would cost more than
all the rest: of an input of n rows, every (n // CHANNEL_ROWS)-th.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .reference import Totals

BINS = 4096
NONFINITE_BIN = 0x7F800000 >> 19
"""The bin of infinities and NaN; finite values have smaller ones."""

SIGMA_BINS = 8
"""Bin i holds noise levels in (i / 8, (i + 1) / 8]; level 0 belongs to bin 0."""
UNKNOWN_SIGMA = SIGMA_BINS
"""Column of inputs whose noise level was not told, or not one number in [0, 1]."""

CHANNEL_ROWS = 256
"""Of an input of more rows, this many or up to twice as many give the absmax of the channels (docs/experiments.md)."""


def accumulate(totals: Totals, slot: int, sigma_bin: Tensor, x: Tensor) -> None:
    """Add one input of a layer to the totals, by the fastest way there is. The host does not wait.

    Args:
        totals: on the device of `x`.
        slot: the layer's row in the totals.
        sigma_bin: the input's noise level, one of SIGMA_BINS + 1 columns; int64 [1] on the device of `x`.
        x: [..., in_features], floating, not empty; in_features as the totals have it for the slot.
    """
    from . import reference

    if x.is_cuda and _triton_works():
        from . import triton

        triton.accumulate(totals, slot, sigma_bin, x)
    else:
        reference.accumulate(totals, slot, sigma_bin, x)


@cache
def _triton_works() -> bool:
    """Whether Triton is installed, can compile here, and measures what the reference measures. Found out once."""
    try:
        from . import triton
    except ImportError:
        return False
    return triton.works()
