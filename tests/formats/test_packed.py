"""Formats that pack, rotate, or scale in blocks, against comfy-kitchen's eager quantizers and products."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.engines.quantized_linear import CheckpointLinear, StoredWeight
from convert_to_quant.formats import FORMATS
from convert_to_quant.formats.packing import from_tiles, pack_nibbles, to_tiles, unpack_nibbles
from convert_to_quant.formats.record import Packed
from convert_to_quant.formats.rotation import group_of, hadamard, rotate
from convert_to_quant.formats.w4a8 import NORMAL_CODEBOOK, W4A8
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import ConvertOptions

PACKED = [name for name, fmt in FORMATS.items() if isinstance(fmt, Packed)]
LAYOUTS = {
    "int8-convrot": "TensorWiseINT8Layout",
    "convrot-w4a4": "TensorCoreConvRotW4A4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "w4a8": "AsymW4A8Int8Layout",
    "w6a8": "AsymW4A8Int8Layout",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "int8-convrot": {"per_channel": True, "convrot": True, "convrot_groupsize": 256},
    "w4a8": {"bits": 4},
    "w6a8": {"bits": 6},
}


def weights(kind: str) -> Tensor:
    """A weight [416, 768] (three tiles of scales and a part), with rows and groups of zeros."""
    generator = torch.Generator().manual_seed(7)
    weight = 0.03 * torch.randn(416, 768, generator=generator)
    if kind == "uneven":
        weight *= torch.randn(416, 1, generator=generator).exp() * torch.randn(768, generator=generator).exp()
    if kind == "heavy":
        weight = weight**3
    weight[3] = 0
    weight[5, :64] = 0
    return weight


def written(tmp_path: Path, weight: Tensor, name: str, **options: Any) -> tuple[Path, dict[str, Tensor]]:
    """A file with one layer in a format, and its tensors by suffix."""
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"blocks.0.mlp.weight": weight, "blocks.1.norm.weight": torch.ones(8)}, source)
    with open_checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions(format=name, **options))
        convert(checkpoint, plan, output)
    tensors = load_file(output)
    return output, {key.removeprefix("blocks.0.mlp"): value for key, value in tensors.items() if ".mlp." in key}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("kind", ["normal", "uneven", "heavy"])
@pytest.mark.parametrize("name", PACKED)
def test_files_hold_what_kitchen_makes(tmp_path: Path, name: str, kind: str) -> None:
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    weight = weights(kind)
    output, ours = written(tmp_path, weight, name)
    layout = tensor.get_layout_class(LAYOUTS[name])
    qdata, params = layout.quantize(weight, **SETTINGS.get(name, {}))
    theirs = {f".weight{suffix}": value for suffix, value in layout.state_dict_tensors(qdata, params).items()}
    for suffix, value in theirs.items():
        assert same_bytes(ours[suffix], value), suffix
    with open_checkpoint(output) as checkpoint:
        layer = find_layers(checkpoint).quantized["blocks.0.mlp"]
        assert layer.shape == (416, 768)
        assert layer.format is FORMATS[name]
        real = torch.from_numpy(dequantize(checkpoint, layer))
        part = torch.from_numpy(dequantize(checkpoint, layer, slice(100, 300)))
    assert torch.equal(part, real[100:300])
    torch.testing.assert_close(real, layout.dequantize(qdata, params).float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PACKED)
def test_layers_compute_what_kitchen_computes(tmp_path: Path, name: str) -> None:
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    weight = weights("normal")
    output, _ = written(tmp_path, weight, name)
    layout = tensor.get_layout_class(LAYOUTS[name])
    theirs = tensor.QuantizedTensor(*_quantized(tensor, layout, weight, name))
    x = torch.randn(160, 768, generator=torch.Generator().manual_seed(1))
    x[7] = 0
    bias = torch.linspace(-1, 1, 416)
    quantized_x = x if name not in ("mxfp8", "nvfp4") else tensor.QuantizedTensor.from_float(x, LAYOUTS[name])
    if name in ("mxfp8", "nvfp4"):  # no CPU kernel multiplies them: the product of what both sides mean
        wanted = torch.nn.functional.linear(quantized_x.dequantize(), theirs.dequantize(), bias)
    else:
        wanted = torch.nn.functional.linear(quantized_x, theirs, bias)
    with open_checkpoint(output) as checkpoint:
        layer = find_layers(checkpoint).quantized["blocks.0.mlp"]
        stored = StoredWeight(checkpoint, [(layer, slice(None))], torch.device("cpu"))
        ours = CheckpointLinear(stored, bias, torch.float32, arithmetic="comfyui", input_scale=None)(x)
        parts = [(layer, slice(200, None)), (layer, slice(0, 200))]
        swapped = CheckpointLinear(
            StoredWeight(checkpoint, parts, torch.device("cpu")),
            None,
            torch.float32,
            arithmetic="comfyui",
            input_scale=None,
        )(x)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(swapped, torch.cat([ours[:, 200:] - bias[200:], ours[:, :200] - bias[:200]], 1))


@pytest.mark.parametrize(("width", "group"), [(192, 64), (48, 16)])
def test_narrow_layers_are_rotated_in_the_groups_that_their_mark_names(tmp_path: Path, width: int, group: int) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    output, parts = written(tmp_path, weights("normal")[:, :width].contiguous(), "int8-convrot")
    said = json.loads(bytes(parts[".comfy_quant"]))
    x = torch.randn(160, width, generator=torch.Generator().manual_seed(1))
    wanted = kitchen.int8_linear(x, parts[".weight"], parts[".weight_scale"], None, x.dtype, convrot=said["convrot"],
                                 convrot_groupsize=said["convrot_groupsize"])  # fmt: skip
    with open_checkpoint(output) as checkpoint:
        stored = StoredWeight(
            checkpoint, [(find_layers(checkpoint).quantized["blocks.0.mlp"], slice(None))], torch.device("cpu")
        )
        ours = CheckpointLinear(stored, None, torch.float32, arithmetic="comfyui", input_scale=None)(x)
    assert said["convrot_groupsize"] == group
    assert torch.equal(ours, wanted)


def test_w4a4_scales_inputs_in_their_own_dtype() -> None:
    eager = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    x = weights("uneven").bfloat16()
    codes, scales = FORMATS["convrot-w4a4"].inputs(x, None, "comfyui")
    wanted_codes, wanted_scales = eager.quantize_signed_int4_rowwise(x)
    assert torch.equal(pack_nibbles(codes), wanted_codes.view(torch.uint8))
    assert torch.equal(scales.flatten(), wanted_scales)


def _quantized(tensor: Any, layout: Any, weight: Tensor, name: str) -> tuple[Any, str, Any]:
    qdata, params = layout.quantize(weight, **SETTINGS.get(name, {}))
    return qdata, LAYOUTS[name], params


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("count", [384, 416])  # in whole tiles of scales, and not
def test_any_rows_are_those_of_the_whole(tmp_path: Path, name: str, count: int) -> None:
    output, _ = written(tmp_path, weights("normal")[:count], name)
    with open_checkpoint(output) as checkpoint:
        layer = find_layers(checkpoint).quantized["blocks.0.mlp"]
        whole = torch.from_numpy(dequantize(checkpoint, layer))
        for rows in (slice(0, 16), slice(100, 130), slice(130, None)):
            assert torch.equal(torch.from_numpy(dequantize(checkpoint, layer, rows)), whole[rows])
            stored = StoredWeight(checkpoint, [(layer, rows)], torch.device("cpu"))
            torch.testing.assert_close(stored.on_device(0), whole[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PACKED)
def test_weights_of_16_bits_are_rounded_in_float32(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    weight = weights("normal").to(dtype)
    (tmp_path / "wide").mkdir()
    _, narrow = written(tmp_path, weight, name)
    _, wide = written(tmp_path / "wide", weight.float(), name)
    for key, value in narrow.items():
        if not FORMATS[name].group({}):
            assert same_bytes(value, wide[key]), key
        elif value.dtype == torch.float32:  # the rotation's sums have another order: the last bit of a scale
            torch.testing.assert_close(value, wide[key], rtol=3e-7, atol=0)
        else:
            one, other = value.view(torch.uint8), wide[key].view(torch.uint8)
            assert (one != other).float().mean() < 1e-3, key


@pytest.mark.parametrize(
    ("name", "shape", "becomes", "reason"),
    [
        ("int8-convrot", (64, 24), "int8", "64 × 24: INT8 ConvRot needs multiples of 16 inputs"),
        ("w6a8", (64, 128), "int8", "64 × 128: W6A8 needs multiples of 256 inputs"),
        ("mxfp8", (48, 64), "fp8", "48 × 64: MXFP8 needs sides that are multiples of 32"),
        ("mxfp8", (20, 64), None, "20 × 64: MXFP8 needs sides that are multiples of 32"),
        ("nvfp4", (20, 64), None, "20 × 64: NVFP4 needs sides that are multiples of 16"),
        ("nvfp4", (48, 64), "nvfp4", ""),
    ],
)
def test_sides_that_a_format_cannot_take(
    tmp_path: Path, name: str, shape: tuple[int, int], becomes: str | None, reason: str
) -> None:
    save_file({"blocks.0.mlp.weight": torch.ones(shape)}, tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as checkpoint:
        (decision,) = plan_conversion(checkpoint, ConvertOptions(format=name)).decisions
    assert (decision.format and decision.format.name, decision.reason) == (becomes, reason)


def test_four_over_six_is_never_worse(tmp_path: Path) -> None:
    weight = weights("uneven")
    errors = []
    for method in ("absmax", "mse"):
        output, _ = written(tmp_path, weight, "nvfp4", weight_scale=method)
        with open_checkpoint(output) as checkpoint:
            real = torch.from_numpy(dequantize(checkpoint, find_layers(checkpoint).quantized["blocks.0.mlp"]))
        errors.append((real - weight).reshape(-1, 16).square().sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


def test_scales_per_token_of_nvfp4_inputs_are_those_of_the_token_alone() -> None:
    x = weights("uneven")  # with a token of zeros
    fmt = FORMATS["nvfp4"]
    together = fmt.inputs(x, None, "dynamic_row")[0]
    for number in (0, 1, 100):
        assert torch.equal(together[number], fmt.inputs(x[number], None, "comfyui")[0])
    assert not together[3].any()


@pytest.mark.parametrize("factor", [0.5, 1, 1.5, 16, 256])
@pytest.mark.parametrize("kind", ["normal", "uneven"])
def test_the_grid_of_nvfp4_inputs_expects_what_they_lose(kind: str, factor: float) -> None:
    x, fmt = weights(kind), FORMATS["nvfp4"]
    assert fmt.input_grid is not None
    scale = factor * x.abs().amax() / fmt.input_grid.max
    levels, midpoints = (torch.tensor(part).float() for part in (fmt.input_grid.levels, fmt.input_grid.midpoints))
    expected = levels[torch.searchsorted(midpoints, x.abs() / scale)] * scale - x.abs()
    found = fmt.inputs(x, scale, "comfyui")[0] - x
    assert 10 * (found.square().sum() / expected.square().sum()).log10().abs() < 2


@pytest.mark.parametrize("size", [16, 64, 256])
def test_rotation_is_its_own_inverse_and_spreads_a_channel(size: int) -> None:
    matrix = hadamard(size, torch.float32, torch.device("cpu"))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.abs(), torch.full((size, size), size**-0.5))
    x = torch.eye(2 * size)
    assert torch.equal(rotate(rotate(x, size), size), x)


def test_groups_are_the_largest_that_divide() -> None:
    assert [group_of(width) for width in (15360, 64 * 3, 48, 8, 0)] == [256, 64, 16, 0, 0]


def test_packing_is_undone() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32) % 16
    for high_first in (False, True):
        assert torch.equal(unpack_nibbles(pack_nibbles(codes, high_first=high_first), high_first=high_first), codes)
    assert pack_nibbles(torch.tensor([[1, 2]])).item() == 0x21
    scales = torch.arange(130 * 5, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(130, 5)
    tiled = to_tiles(scales)
    assert tiled.shape == (256, 8)
    assert torch.equal(from_tiles(tiled, 130, 5), scales)
    assert tiled.flatten()[:16].tolist() == [int(scales[row, column]) for row in (0, 32, 64, 96) for column in range(4)]


@pytest.mark.parametrize("name", ["w4a8", "w6a8"])
def test_codes_of_levels_are_the_nearest_at_and_beside_every_tie(name: str) -> None:
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    fmt = FORMATS[name]
    assert isinstance(fmt, W4A8)
    values = torch.tensor(NORMAL_CODEBOOK) if name == "w4a8" else torch.arange(-31.0, 32.0)
    ties = torch.arange(-130, 130.5, 0.5).repeat(3)
    ties[521:1042] = ties[521:1042].nextafter(torch.tensor(1e9))
    ties[1042:] = ties[1042:].nextafter(torch.tensor(-1e9))
    target = torch.nn.functional.pad(ties, (0, -len(ties) % 16)).reshape(1, -1, 16).expand(127, -1, -1).contiguous()
    s_rel = scales.view(torch.uint8).view(-1, 1).expand(-1, target.shape[1]).contiguous().view(torch.float8_e4m3fn)
    chosen, codes = (
        part.reshape(127, len(s_rel[0]), -1) for part in fmt.choose(target.reshape(-1, 16), s_rel.flatten(), values)
    )
    levels = (values * chosen.float()).round().clamp(-127, 127)
    place = torch.searchsorted(levels, target)  # as comfy-kitchen searches: the lower of two that are as near
    low, high = (place - 1).clamp(min=0), place.clamp(max=len(values) - 1)
    nearer = (target - levels.gather(-1, high)).abs() < (target - levels.gather(-1, low)).abs()
    assert torch.equal(codes.long() - int(name == "w6a8"), torch.where(nearer, high, low))
