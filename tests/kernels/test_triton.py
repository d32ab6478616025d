"""The Triton kernel against the definition in torch: on a CUDA device, or with TRITON_INTERPRET=1 on a CPU."""

import importlib.util
import math
import os

import pytest
import torch

from convert_to_quant.kernels import reference
from convert_to_quant.kernels.reference import Totals

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or INTERPRETED),
        reason="needs Triton and a CUDA device",
    ),
    # numpy's, under the interpreter: float32 sums that overflow are discarded; Triton 3.6 is older than numpy 2.4
    pytest.mark.filterwarnings(
        "ignore:overflow encountered", "ignore:Conversion of an array", "ignore:All-NaN slice", "ignore:invalid value"
    ),
]


def assert_agrees(x):
    """Measure x both ways, twice, at two noise levels."""
    from convert_to_quant.kernels import triton

    kernel, definition = (Totals([x.shape[-1]] * 3, x.device) for _ in range(2))
    for sigma in (2, 8):
        triton.accumulate(kernel, 1, kernel.sigma_numbers[sigma : sigma + 1], x)
        reference.accumulate(definition, 1, definition.sigma_numbers[sigma : sigma + 1], x)
    for name in ("sigma_absmax", "sigma_count", "zeros", "histogram", "row_histogram"):
        assert torch.equal(getattr(kernel, name), getattr(definition, name)), name
    torch.testing.assert_close(kernel.sigma_squares, definition.sigma_squares, rtol=1e-5, atol=0)
    channels = [totals.channel_bits[1].view(torch.float32) for totals in (kernel, definition)]
    torch.testing.assert_close(*channels, rtol=0, atol=0, equal_nan=True)
    assert not any(totals.channel_bits[slot].any() for totals in (kernel, definition) for slot in (0, 2))


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_it_works_here():
    from convert_to_quant.kernels import triton

    assert triton.works(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (5, 100), (2, 3, 128), (9, 1536), (2, 2, 3, 64), (64, 3072)])
def test_shapes_and_dtypes_agree(shape, dtype):
    assert_agrees(normal(*shape).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_views_agree(dtype):
    x = normal(3, 14, 160).to(dtype)
    for view in (x[:, 3:9], x[:, ::2], x[..., 1:150], x[..., ::2], x.transpose(1, 2), x.transpose(0, 1), x[:1].expand(4, 14, 160)):  # fmt: skip  # noqa: E501
        assert_agrees(view)


@pytest.mark.parametrize("rows", [255, 512, 1025])
def test_the_channels_of_a_sample_of_rows_agree(rows):
    """The largest rows come last, so that a row too many or too few shows in every channel."""
    assert_agrees(normal(rows, 12) * torch.arange(1, rows + 1, device=DEVICE)[:, None])
    assert_agrees(normal(2, rows, 300)[:, 1:].bfloat16())


def test_special_values_agree():
    patterns = torch.arange(-(1 << 15), 1 << 15, 7).to(torch.int16).to(DEVICE)
    assert_agrees(patterns.view(torch.bfloat16).reshape(1, -1))
    assert_agrees(patterns.view(torch.float16).reshape(-1, 1))
    bits = torch.randint(-(1 << 31), 1 << 31, (64, 300), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    assert_agrees(bits.view(torch.float32).to(DEVICE))
    for value in (0.0, -0.0, 1e-45, 1.0, 3e38, math.inf, math.nan):
        assert_agrees(torch.full((4, 130), value, device=DEVICE))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-13, 1e14, 1e25, 1e37])
def test_sums_survive_the_ends_of_float32(scale):
    assert_agrees(normal(5, 200) * scale)
