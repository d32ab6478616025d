"""Rounding by second moments: never worse than nearest, and what readers make of the bytes is what was chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.formats import FORMATS, WRITTEN
from convert_to_quant.formats.record import Format
from convert_to_quant.formats.rotation import rotate
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import ConvertOptions
from convert_to_quant.rounding import error_of, round_weight, solver
from convert_to_quant.rounding.solver import rotated_moments

ROUNDED = [name for name in WRITTEN if FORMATS[name].roundable]
OUT, IN = 160, 256


def a_weight() -> Tensor:
    """[160, 256] (a tile of scales and a part), with a row and a group of zeros, and an outlier."""
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)) / 30
    weight[3] = 0
    weight[5, :64] = 0
    weight[7, 9] = 1
    return weight


def some_moments(kind: str) -> Tensor:
    """Of inputs that go together ("correlated"), fewer than they are wide ("few"), or one channel of them ("one")."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(1024 if kind == "correlated" else 40, IN, generator=generator)
    if kind == "one":
        rows = rows * (torch.arange(IN) == 17)
    elif kind != "alone":
        rows = rows @ torch.randn(IN, IN, generator=generator).cumsum(0)
    return torch.diag(rows.square().sum(0)) if kind == "alone" else rows.T @ rows


def made(fmt: Format, parts: Any) -> tuple[Tensor, int]:
    """What readers multiply, and in which groups it is rotated."""
    config = fmt.config((OUT, IN), 0)
    levels, scale = fmt.decode(parts, config)
    return levels.float() * scale, fmt.group(config)


def error(fmt: Format, parts: Any, moments: Tensor) -> float:
    real, group = made(fmt, parts)
    return float(error_of(rotate(a_weight(), group), real, rotated_moments(moments, group)).sum())


@pytest.mark.parametrize(("kind", "most"), [("correlated", 0.5), ("few", 1 + 1e-6), ("one", 1 + 1e-6)])
@pytest.mark.parametrize("name", ROUNDED)
def test_it_is_never_worse_than_nearest_and_better_where_inputs_correlate(name, kind, most):
    fmt, moments = FORMATS[name], some_moments(kind)
    nearest = error(fmt, fmt.quantized(a_weight()), moments)
    assert error(fmt, round_weight(a_weight(), moments, fmt), moments) <= nearest * most


@pytest.mark.parametrize("name", ROUNDED)
def test_every_weight_goes_to_nearest_where_inputs_do_not_correlate(name):
    """Under the scales that were chosen. Rotation would make them correlate, so such inputs are all alike."""
    fmt = FORMATS[name]
    moments = torch.eye(IN) if made(fmt, fmt.quantized(a_weight()))[1] else some_moments("alone")
    lattice = fmt.lattice(round_weight(a_weight(), moments, fmt))
    real, group = made(fmt, fmt.stored(lattice, fmt.quantized(a_weight())))
    numbers = lattice.numbers.repeat_interleave(IN // lattice.numbers.shape[1], 1)
    levels = lattice.levels(numbers) * lattice.unit.unsqueeze(-1)
    wanted = rotate(a_weight(), group)
    least = (levels - wanted.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((real - wanted).abs(), least, rtol=1e-4, atol=1e-6)


def test_moments_of_nothing_leave_nearest():
    fmt = FORMATS["w4a8"]
    parts, nearest = round_weight(a_weight(), torch.zeros(IN, IN), fmt), fmt.quantized(a_weight())
    assert all(torch.equal(parts[key].view(torch.uint8), nearest[key].view(torch.uint8)) for key in nearest)


@pytest.mark.parametrize("name", ROUNDED)
def test_files_read_as_what_was_chosen(tmp_path, build, name):
    fmt, moments = FORMATS[name], some_moments("correlated")
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(build.file_bytes({"blocks.0.mlp.weight": a_weight().numpy()}))
    parts = round_weight(a_weight(), moments, fmt)
    mode = name.partition("-")[2] if name == "fp8-row" else "tensor"
    options = ConvertOptions(format="fp8" if name == "fp8-row" else name, scaling_mode=mode)  # type: ignore[arg-type]
    with open_checkpoint(source) as checkpoint:
        convert(checkpoint, plan_conversion(checkpoint, options), output, rounding=lambda _layer, _fmt: parts)
    with open_checkpoint(output) as written:
        (layer,) = find_layers(written).quantized.values()
        real = dequantize(written, layer)
    lattice = fmt.lattice(parts)
    chosen = rotate(lattice.real * lattice.unit, made(fmt, parts)[1])
    np.testing.assert_allclose(real, chosen.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROUNDED)
def test_one_launch_rounds_as_many_do(name, monkeypatch):
    weight, moments, fmt = a_weight().cuda(), some_moments("correlated").cuda(), FORMATS[name]
    in_one = round_weight(weight, moments, fmt)
    monkeypatch.setattr(solver, "_one_launch", lambda *_: solver._nearest_plane)
    in_many = round_weight(weight, moments, fmt)
    assert all(torch.equal(part.float(), in_many[suffix].float()) for suffix, part in in_one.items())
