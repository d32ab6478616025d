"""Headroom against rounding random numbers one by one."""

import numpy as np
import pytest
import torch

from convert_to_quant import headroom
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.formats.fp8 import E4M3FN, E5M2
from convert_to_quant.headroom import LEAST, MOST, TOLERANCE_DB, column_energies, free_scale
from convert_to_quant.kernels import BINS
from convert_to_quant.layers import find_layers

TORCH = {E4M3FN: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
ROWS, CHANNELS, OUTPUTS = 2000, 64, 32


def row_histogram(x):
    return np.bincount(np.abs(x).max(1).astype(np.float32).view(np.uint32) >> 19, minlength=BINS)


def output_error(x_RI, weight_OI, scale, grid):
    """Mean over rows of the relative squared error of x·Wᵀ with x quantized by torch's own cast."""
    scaled = torch.from_numpy(x_RI / scale).float().clamp(-grid.max, grid.max)
    rounded = scaled.to(TORCH[grid]).double().numpy() * scale
    wanted, found = x_RI @ weight_OI.T, rounded @ weight_OI.T
    return float(np.mean(((wanted - found) ** 2).sum(1) / (wanted**2).sum(1)))


def inputs(channel_sizes, row_sizes=1.0):
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((ROWS, CHANNELS))
        * np.broadcast_to(channel_sizes, (CHANNELS,))
        * np.reshape(row_sizes, (-1, 1))
    )


def found_scale(x_RI, weight_OI, grid=E4M3FN):
    absmax_I = np.abs(x_RI).max(0).astype(np.float32)
    return free_scale(grid, float(absmax_I.max()), absmax_I, (weight_OI**2).mean(0), row_histogram(x_RI))


EVEN = np.ones(CHANNELS)
HALF_QUIET = np.where(np.arange(CHANNELS) < CHANNELS // 2, 1.0, 2.0**-13)
OUTLIER_ROW = np.where(np.arange(ROWS) == 7, 2.0**13, 1.0)


@pytest.mark.parametrize("grid", [E4M3FN, E5M2], ids=lambda grid: grid.name)
@pytest.mark.parametrize("deviation_log2", [-20, -12, -8.4, -6, 0, 3])
def test_the_error_of_normal_numbers_is_that_of_torchs_cast(grid, deviation_log2):
    x = np.random.default_rng(1).standard_normal(200_000) * 2.0**deviation_log2
    rounded = torch.from_numpy(x).float().to(TORCH[grid]).double().numpy()
    expected = ((x - rounded) ** 2).sum() / (x**2).sum()
    assert np.interp(deviation_log2, *headroom._error_table(grid)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("channel_sizes", "row_sizes", "weight_sizes"),
    [
        (EVEN, 1.0, EVEN),
        (HALF_QUIET, 1.0, EVEN),  # quiet channels that weigh nothing
        (HALF_QUIET, 1.0, 1 / HALF_QUIET),  # and as much as the others
        (EVEN, OUTLIER_ROW, EVEN),  # one outlier token
        (HALF_QUIET * 1e-6, 1.0, 1 / HALF_QUIET),
    ],
    ids=["even", "quiet channels, even weights", "quiet channels, large weights", "outlier token", "small"],
)
def test_what_is_called_free_costs_no_more_than_it_may(channel_sizes, row_sizes, weight_sizes):
    x_RI = inputs(channel_sizes, row_sizes)
    weight_OI = np.random.default_rng(2).standard_normal((OUTPUTS, CHANNELS)) * weight_sizes
    least = np.abs(x_RI).max() / E4M3FN.max
    scale = found_scale(x_RI, weight_OI)
    assert 0.999 * least < scale < 1.001 * max(MOST * least, 1.0)
    best = min(output_error(x_RI, weight_OI, least * 2**octave, E4M3FN) for octave in range(5))
    cost_db = 10 * np.log10(output_error(x_RI, weight_OI, scale, E4M3FN) / best)
    assert cost_db < 2 * TOLERANCE_DB


@pytest.mark.parametrize(
    ("x_RI", "weight_I", "least", "most"),
    [
        (inputs(EVEN * 1000), EVEN, 0.99 * MOST, 1.01 * MOST),
        (inputs(HALF_QUIET), 1 / HALF_QUIET, 1, LEAST),
        (inputs(EVEN, OUTLIER_ROW), EVEN, 1, LEAST),
        (inputs(EVEN), 0 * EVEN, 1, np.inf),
    ],
    ids=["even channels leave all there is", "quiet channels, large weights", "one outlier token", "a weight of zeros"],
)
def test_headroom_is_what_quiet_channels_and_rows_leave(x_RI, weight_I, least, most):
    scale = found_scale(x_RI, np.ones((OUTPUTS, CHANNELS)) * weight_I)
    assert least * 0.999 < scale / (np.abs(x_RI).max() / E4M3FN.max) < most


@pytest.mark.parametrize(("size", "stays"), [(0.5, True), (1e-3, False)])
def test_a_scale_of_one_stays_where_it_costs_nothing(size, stays):
    x_RI = inputs(EVEN * size)
    assert MOST * np.abs(x_RI).max() / E4M3FN.max < 1
    scale = found_scale(x_RI, np.ones((OUTPUTS, CHANNELS)))
    assert scale == 1.0 if stays else scale < 1e-3


def test_column_energies_are_those_of_the_real_weight(build, save):
    tensors, metadata = build.quantized(["blocks.0.a"], "tensor", shape=(640, 32))
    path = save("model.safetensors", tensors, metadata)
    with open_checkpoint(path) as checkpoint:
        layer = find_layers(checkpoint).quantized["blocks.0.a"]
        found = column_energies(checkpoint, layer)
        weight_OI = checkpoint.float32("blocks.0.a.weight") * checkpoint.float32("blocks.0.a.weight_scale")
    exact = (weight_OI.astype(np.float64) ** 2).mean(0)
    assert np.exp(np.abs(np.log(found / exact))).max() < 2
    assert np.abs(np.log(found / exact)).mean() < 0.3
