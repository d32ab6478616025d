"""The definition of what is measured, against brute force in numpy and exact arithmetic."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convert_to_quant.kernels import BINS, NONFINITE_BIN, accumulate, reference
from convert_to_quant.kernels.reference import Observation, Totals, observe

CPU = torch.device("cpu")
SPECIALS = [
    *[0.0, -0.0, 1.0, -1.0, 448.0, 6.6e4, 1e-42, -1e-45, 2.0**-130, 3.4e38, -3.4e38],
    *[math.inf, -math.inf, math.nan],
]


def brute_force(x):
    """The same numbers one value at a time."""
    rows = x.detach().to(torch.float32).reshape(-1, x.shape[-1]).numpy()
    histogram, row_histogram = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    finite_values = [0.0]
    for row in rows:
        largest = np.float32(0)
        for value in row:
            magnitude = np.abs(value)
            histogram[NONFINITE_BIN if not np.isfinite(value) else int(magnitude.view(np.uint32)) >> 19] += 1
            if np.isfinite(value):
                largest = max(largest, magnitude)
                finite_values.append(float(value))
        row_histogram[int(np.float32(largest).view(np.uint32)) >> 19] += 1
    return Observation(
        absmax=torch.tensor(max(map(abs, finite_values)), dtype=torch.float32),
        sum_of_squares=torch.tensor(math.fsum(v * v for v in finite_values), dtype=torch.float64),
        zeros=torch.tensor(int((rows == 0).sum())),
        histogram=torch.from_numpy(histogram),
        row_histogram=torch.from_numpy(row_histogram),
        channel_bits=torch.from_numpy((rows.view(np.int32) & 0x7FFFFFFF).max(0)),
    )


def assert_same(seen, expected):
    for name in ("absmax", "zeros", "histogram", "row_histogram"):
        assert torch.equal(getattr(seen, name), getattr(expected, name)), name
    infinity = 0x7F800000  # conversions may change which NaN it is, and all of them are above
    assert torch.equal(seen.channel_bits.clamp(max=infinity + 1), expected.channel_bits.clamp(max=infinity + 1))
    assert float(seen.sum_of_squares) == pytest.approx(float(expected.sum_of_squares), rel=1e-6, abs=0)


def test_every_bfloat16_falls_into_the_bin_of_its_upper_bits():
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).reshape(64, 1024)
    expected = np.bincount((bits & 0x7FFF) >> 3, minlength=BINS)
    expected[NONFINITE_BIN] = expected[NONFINITE_BIN:].sum()
    expected[NONFINITE_BIN + 1 :] = 0
    seen = observe(x)
    assert torch.equal(seen.histogram, torch.from_numpy(expected))
    assert seen.histogram[NONFINITE_BIN] == 2 * 128
    assert seen.zeros == 2
    assert seen.absmax == torch.finfo(torch.bfloat16).max
    assert_same(seen, brute_force(x))


def test_float32_is_truncated_not_rounded_to_its_bin():
    edge = np.float32(1.0625)  # a lower edge: 1 + 1/16
    x = torch.tensor([[np.nextafter(edge, np.float32(0)), edge]])
    assert observe(x).histogram.nonzero().flatten().tolist() == [0x3F800000 >> 19, (0x3F800000 >> 19) + 1]


@settings(deadline=None, max_examples=60)
@example(values=SPECIALS, shape=(1, 14, 1), dtype=torch.float32, take=slice(None))
@given(
    values=st.lists(st.floats(width=32) | st.sampled_from(SPECIALS), min_size=1, max_size=12),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    take=st.sampled_from([slice(None), slice(None, None, 2), slice(0, 1)]),
)
def test_shapes_strides_and_special_values_agree_with_brute_force(values, shape, dtype, take):
    full = torch.tensor(list(itertools.islice(itertools.cycle(values), math.prod(shape))), dtype=torch.float32)
    x = full.reshape(shape).to(dtype)
    for view in (x[:, take], x[..., take], x.transpose(0, 2), x[:1].expand(2, *x.shape[1:])):
        assert_same(observe(view), brute_force(view))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-10, 1e10, 1e19, 1e30, 1e38])
def test_sums_survive_the_ends_of_float32(scale):
    x = torch.linspace(-1, 2.9, 8 * 96).reshape(8, 96).mul(scale)
    assert_same(observe(x), brute_force(x))


def test_the_cut_into_blocks_does_not_show(monkeypatch):
    x = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = observe(x)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS_CPU", 100)
    assert_same(observe(x), whole)


def test_one_dimension_is_one_row_and_gradients_are_left_alone():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    seen = observe(x)
    assert seen.row_histogram.sum() == 1
    assert not any(tensor.requires_grad for tensor in seen)


@pytest.mark.parametrize(("rows", "step"), [(256, 1), (511, 1), (512, 2), (1000, 3)])
def test_channels_are_compared_in_a_sample_of_rows(rows, step):
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)) * torch.arange(1, rows + 1)[:, None]
    assert observe(x).channel_bits.view(torch.float32).equal(x[::step].abs().amax(0))


def test_an_input_adds_to_its_own_slot_and_noise_level_only():
    totals = Totals([4] * 3, CPU)
    x = torch.tensor([[1.0, -3.0, 0.0, math.nan]])
    accumulate(totals, 1, totals.sigma_numbers[4:5], x)
    accumulate(totals, 1, totals.sigma_numbers[8:9], 2 * x)
    assert totals.sigma_absmax.nonzero().tolist() == [[1, 4], [1, 8]]
    assert totals.sigma_absmax[1, [4, 8]].tolist() == [3.0, 6.0]
    assert totals.sigma_count[1].tolist() == [0, 0, 0, 0, 3, 0, 0, 0, 3]
    assert totals.zeros.tolist() == [0, 2, 0]
    assert totals.histogram.sum(1).tolist() == [0, 8, 0]
    assert totals.row_histogram.sum(1).tolist() == [0, 2, 0]
    assert totals.sigma_squares[1].tolist() == [0, 0, 0, 0, 10.0, 0, 0, 0, 40.0]
    assert totals.sigma_squares[::2].count_nonzero() == 0
    accumulate(totals, 1, totals.sigma_numbers[4:5], x / 2)
    assert totals.sigma_absmax[1, 4] == 3.0, "the largest stays, whichever comes first"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_cuda_agrees_with_the_cpu_and_never_waits():
    x = torch.randn(4, 37, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    x.view(-1)[: len(SPECIALS)] = torch.tensor(SPECIALS)
    on_device = x.cuda()
    observe(on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = observe(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(Observation(*(tensor.cpu() for tensor in seen)), observe(x))
