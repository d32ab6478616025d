"""FP8 values against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convert_to_quant import formats
from convert_to_quant.formats.fp8 import E4M3FN, E5M2
from convert_to_quant.formats.record import CHUNK, Grid, narrow_bfloat16, widen_bfloat16

TORCH = {E4M3FN: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
both_formats = pytest.mark.parametrize("grid", [E4M3FN, E5M2], ids=lambda grid: grid.name)
ALL_CODES = np.arange(256, dtype=np.uint8)


def torch_decode(codes: np.ndarray, grid: Grid) -> np.ndarray:
    return torch.from_numpy(codes.copy()).view(TORCH[grid]).float().numpy()


@both_formats
def test_all_256_codes_mean_what_torch_says(grid):
    ours, theirs = grid.decode(ALL_CODES), torch_decode(ALL_CODES, grid)
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))  # the sign of zero counts


def test_shapes_and_strides_are_kept():
    codes = np.random.default_rng(0).integers(0, 256, (3, CHUNK), np.uint8)
    for view in (codes, codes.T, codes[::2, ::-3], codes[:, 1:2], codes[:0], codes[1, 1]):
        np.testing.assert_array_equal(E4M3FN.decode(view), E4M3FN.values[view])


def test_widening_all_bfloat16_patterns_is_what_torch_does():
    bits = np.arange(1 << 16, dtype=np.uint16)
    theirs = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(widen_bfloat16(bits).view(np.uint32), theirs.view(np.uint32))


def test_narrowing_to_bfloat16_is_what_torch_does():
    values = np.random.default_rng(0).integers(0, 1 << 32, 10_000, np.uint32).view(np.float32)
    values[:6] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40, 3.4e38, np.inf]  # two ties, a subnormal, an overflow
    values = values[np.isfinite(values) | np.isinf(values)]
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(narrow_bfloat16(values), theirs)
    nans = np.uint32([0x7F800001, 0xFFFFFFFF, 0x7FC00000]).view(np.float32)
    assert np.isnan(widen_bfloat16(narrow_bfloat16(nans))).all()


@both_formats
def test_a_formats_numbers_are_those_of_torch(grid):
    info = torch.finfo(TORCH[grid])
    assert (grid.max, grid.smallest_step) == (info.max, info.smallest_normal * 2.0**-grid.mantissa_bits)
    assert grid.exponent_bits + grid.mantissa_bits == 7
    assert str(TORCH[grid]) == f"torch.{grid.name}"
    assert formats.GRIDS[grid.name] is formats.FLOAT_GRIDS[grid.dtype] is grid
