"""The table of formats: what must hold of every record, and how a format is found."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from convert_to_quant.formats import DEFAULT, FORMATS, GRIDS, WRITTEN, of_mark, recognize
from convert_to_quant.options import DEFAULT_FORMAT

READ = [fmt for fmt in FORMATS.values() if fmt.grid is not None]


def test_the_command_lines_default_is_the_packages():
    assert DEFAULT.name == DEFAULT_FORMAT  # spelled out there, so that help needs no numpy


@pytest.mark.parametrize("grid", {*GRIDS.values(), *(fmt.codes for fmt in READ)}, ids=lambda grid: grid.name)
def test_levels_are_sorted_and_numbers_round_to_them(grid):
    assert grid.levels[0] == 0
    assert grid.levels[-1] == grid.max
    assert (np.diff(grid.levels) > 0).all()
    assert grid.smallest_step == np.diff(grid.levels).min()
    if not hasattr(torch, grid.name):
        return  # NVFP4's inputs, which are rounded in blocks
    low, high = (torch.from_numpy(side) for side in (grid.levels[:-1], grid.levels[1:]))
    middle = torch.from_numpy(grid.midpoints).float()
    for sign in (1, -1):
        assert torch.equal(grid.round(sign * high.float()).double(), sign * high)
        assert torch.equal(grid.round(sign * middle.nextafter(torch.tensor(0.0))).double(), sign * low)
        assert torch.equal(grid.round(sign * middle.nextafter(torch.tensor(1e9))).double(), sign * high)


@pytest.mark.parametrize("name", FORMATS)
def test_records_are_whole(name):
    fmt = FORMATS[name]
    assert fmt.name == name
    assert fmt.marked
    assert of_mark(fmt.mark).mark == fmt.mark  # type: ignore[union-attr]
    assert fmt.readable == (fmt.input_grid is not None)
    assert fmt.grid is None or fmt.range == fmt.grid.max
    assert fmt.ranged_by is None or (fmt.ranged_by in fmt.scales and fmt.range > 0)
    if name in WRITTEN:
        assert set(fmt.scales) <= set(fmt.storage((256, 512), 64)) <= {".weight", *fmt.scales, *fmt.optional}
        assert fmt.storage((256, 512), 64)[".weight"][0] == fmt.dtypes[0]
        assert fmt.cards or not fmt.since
        assert not fmt.fallback or FORMATS[fmt.fallback].sides < fmt.sides


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"format": "int8_tensorwise"}, "int8"),
        ({"format": "int8_tensorwise", "convrot": False}, "int8"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}, "int8-convrot"),
        ({"format": "int8_tensorwise", "params": {"convrot": True}}, "int8-convrot"),
        ({"format": "int8_tensorwise", "convrot": False, "params": {"convrot": True}}, "int8"),
        ({"format": "float8_e4m3fn", "params": [1]}, "fp8"),
        ({"format": "float8_e4m3fn_blockwise", "group_size": [64, 64]}, "fp8-block"),
        ({"format": ["float8_e4m3fn"]}, None),
        ({}, None),
    ],
)
def test_a_mark_names_a_format(config, name):
    found = of_mark(config)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("dtype", "scales", "name"),
    [
        ("F8_E4M3", {}, "fp8"),
        ("F8_E4M3", {"weight_scale": "F32"}, "fp8"),
        ("F8_E4M3", {"weight_scale": "I32"}, "fp8"),
        ("F8_E4M3", {"weight_scale": "F8_E8M0"}, "mxfp8"),
        ("F8_E4M3", {"weight_scale": "U8"}, "mxfp8"),
        ("F8_E5M2", {"weight_scale": "F32"}, "fp8-e5m2"),
        ("I8", {"weight_scale": "F32"}, "int8"),
        ("I8", {"weight_scale": "F16", "weight_zeros": "F16"}, "awq-w4a16"),
        ("I8", {"weight_s_rel": "F8_E4M3", "weight_s_channel": "F32"}, "w4a8"),
        ("U8", {"weight_scale": "F8_E4M3", "weight_scale_2": "F32"}, "nvfp4"),
        ("U8", {}, None),
        ("BF16", {"weight_scale": "F32"}, None),
    ],
)
def test_without_a_mark_dtype_and_tensors_tell(dtype, scales, name):
    tensors = {f"x.{suffix}": SimpleNamespace(dtype=scale, shape=(16, 16)) for suffix, scale in scales.items()}
    tensors["x.weight"] = SimpleNamespace(dtype=dtype, shape=(16, 128))
    found = recognize("x", dtype, tensors)
    assert (found and found.name) == name
