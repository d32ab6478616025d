"""FP8 codes against torch's own casts: all codes, all 16-bit patterns, and many float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convert_to_quant import formats
from convert_to_quant.formats.fp8 import E4M3FN, E5M2
from convert_to_quant.formats.record import CHUNK, Grid, narrow_bfloat16, widen_bfloat16

TORCH = {E4M3FN: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
both_formats = pytest.mark.parametrize("grid", [E4M3FN, E5M2], ids=lambda grid: grid.name)
ALL_CODES = np.arange(256, dtype=np.uint8)


def torch_decode(codes: np.ndarray, grid: Grid) -> np.ndarray:
    return torch.from_numpy(codes.copy()).view(TORCH[grid]).float().numpy()


def torch_encode(numbers: np.ndarray, grid: Grid) -> np.ndarray:
    """What every reader does: clamp, then torch's cast."""
    return torch.from_numpy(numbers.copy()).clamp(-grid.max, grid.max).to(TORCH[grid]).view(torch.uint8).numpy()


def assert_same_codes(numbers: np.ndarray, grid: Grid) -> None:
    ours, theirs = grid.encode(numbers), torch_encode(numbers, grid)
    np.testing.assert_array_equal(ours[~np.isnan(numbers)], theirs[~np.isnan(numbers)])
    assert np.isnan(grid.decode(ours)[np.isnan(numbers)]).all()


@both_formats
def test_all_256_codes_mean_what_torch_says(grid):
    ours, theirs = grid.decode(ALL_CODES), torch_decode(ALL_CODES, grid)
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))  # the sign of zero counts


@both_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_patterns_become_the_codes_of_torchs_cast(grid, dtype):
    assert_same_codes(torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).float().numpy(), grid)


@both_formats
def test_every_tie_goes_to_the_even_code_and_its_neighbours_to_the_nearest(grid):
    ties = grid.midpoints.astype(np.float32)
    below, above = np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))
    assert (grid.encode(ties) % 2 == 0).all()
    assert_same_codes(np.concatenate([ties, below, above, -ties, -below, -above]), grid)


@both_formats
@given(
    bits=hnp.arrays(np.uint32, st.integers(1, 300), elements=st.integers(0, (1 << 32) - 1)),
    values=st.lists(st.floats(width=32), max_size=50),
    near=st.lists(st.floats(-600, 600, width=32), max_size=50),
)
def test_any_float32_becomes_the_code_of_torchs_cast(grid, bits, values, near):
    assert_same_codes(np.concatenate([bits.view(np.float32), np.float32(values), np.float32(near)]), grid)


@both_formats
def test_what_is_too_small_or_large_and_nan_keep_their_sign(grid):
    top = grid.encode(np.float32([grid.max]))[0]
    tiny, low_payload = np.finfo(np.float32).smallest_subnormal, np.uint32([0x7F800001]).view(np.float32)[0]
    for number, code in ((0.0, 0), (tiny, 0), (3e38, top), (np.inf, top), (np.nan, 0x7F), (low_payload, 0x7F)):
        np.testing.assert_array_equal(grid.encode(np.float32([number, -np.float32(number)])), [code, code | 0x80])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4), (CHUNK + 3,), (2, CHUNK)])
def test_shapes_are_kept_over_chunk_borders_too(shape):
    numbers = np.random.default_rng(0).normal(0, 100, shape).astype(np.float32)
    codes = E4M3FN.encode(numbers)
    assert codes.shape == E4M3FN.decode(codes).shape == shape
    np.testing.assert_array_equal(codes, torch_encode(np.asarray(numbers), E4M3FN).reshape(shape))


def test_strided_arrays_are_read_in_their_own_order():
    numbers = np.random.default_rng(0).normal(0, 100, (6, 8)).astype(np.float32)
    for view in (numbers.T, numbers[::2, ::-3], numbers[:, 1:2]):
        np.testing.assert_array_equal(E4M3FN.encode(view), E4M3FN.encode(view.copy()))
    np.testing.assert_array_equal(E4M3FN.decode(E4M3FN.encode(numbers).T), E4M3FN.decode(E4M3FN.encode(numbers)).T)


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
