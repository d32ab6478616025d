"""INT8, and formats that pack, rotate, or scale in blocks, against comfy-kitchen's eager quantizers and products."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from on_disk import converted
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import plan_conversion
from convert_to_quant.engines.quantized_linear import Arithmetic, CheckpointLinear, StoredWeight, exact_product
from convert_to_quant.formats import FORMATS
from convert_to_quant.formats.packing import from_tiles, pack_nibbles, to_tiles, unpack_nibbles
from convert_to_quant.formats.rotation import hadamard, rotate
from convert_to_quant.formats.w4a8 import NORMAL_CODEBOOK, W4A8
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import ConvertOptions

NAME = "blocks.0.mlp"
ALL = slice(None)
LAYOUTS = {
    "int8": "TensorWiseINT8Layout",
    "int8-tensor": "TensorWiseINT8Layout",
    "int8-convrot": "TensorWiseINT8Layout",
    "convrot-w4a4": "TensorCoreConvRotW4A4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "w4a8": "AsymW4A8Int8Layout",
    "w6a8": "AsymW4A8Int8Layout",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"per_channel": True},
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
    weight[3], weight[4] = 0, 1e-33
    weight[5, :64] = 0
    weight[6] = torch.arange(768) % 255 / 2 - 63.5  # ties
    return weight


def written(folder: Path, weight: Tensor, name: str, **options: Any) -> dict[str, Tensor]:
    """What `folder / "out.safetensors"` holds of one layer, converted to a format, by suffix."""
    save_file({f"{NAME}.weight": weight, "blocks.1.norm.weight": torch.ones(8)}, folder / "in.safetensors")
    converted(folder / "in.safetensors", folder / "out.safetensors", format=name, **options)
    tensors = load_file(folder / "out.safetensors")
    return {key.removeprefix(NAME): value for key, value in tensors.items() if key.startswith(NAME)}


def stored(folder: Path, *rows: slice) -> StoredWeight:
    """That layer's weight, as our simulation reads it: all of it, or some rows."""
    checkpoint = open_checkpoint(folder / "out.safetensors")
    layer = find_layers(checkpoint).quantized[NAME]
    return StoredWeight(checkpoint, [(layer, some) for some in rows or [ALL]], torch.device("cpu"))


def linear(folder: Path, *rows: slice, bias: Tensor | None = None, dtype: torch.dtype = torch.float32,
           arithmetic: Arithmetic = "comfyui") -> CheckpointLinear:  # fmt: skip
    """That layer, as it computes."""
    return CheckpointLinear(stored(folder, *rows), bias, dtype, arithmetic=arithmetic, input_scale=None)


def real(folder: Path, rows: slice = ALL) -> Tensor:
    """What its weight means."""
    with open_checkpoint(folder / "out.safetensors") as checkpoint:
        return torch.from_numpy(dequantize(checkpoint, find_layers(checkpoint).quantized[NAME], rows))


def inputs(width: int = 768) -> Tensor:
    """Inputs [2, 80, width], one token large and one of zeros."""
    x = torch.randn(2, 80, width, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[0, 7] = 1e3 * x[0, 0], 0
    return x


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
    )


@pytest.fixture(params=LAYOUTS)
def name(request: pytest.FixtureRequest) -> Any:
    """A format."""
    return request.param


@pytest.fixture
def kitchen(name: str) -> Any:
    """How comfy-kitchen quantizes to it: gives its layout, the codes and their parameters."""
    layout = pytest.importorskip("comfy_kitchen.tensor").get_layout_class(LAYOUTS[name])
    return lambda weight: (layout, *layout.quantize(weight, **SETTINGS.get(name, {})))


@pytest.mark.parametrize("kind", ["normal", "uneven", "heavy"])
def test_files_hold_what_kitchen_makes(tmp_path: Path, kitchen: Any, name: str, kind: str) -> None:
    ours = written(tmp_path, weights(kind), name)
    layout, qdata, params = kitchen(weights(kind))
    theirs = {f".weight{suffix}": value for suffix, value in layout.state_dict_tensors(qdata, params).items()}
    assert ours.keys() == theirs.keys() | {".comfy_quant"}
    for suffix, value in theirs.items():
        assert same_bytes(ours[suffix], value), suffix
    torch.testing.assert_close(real(tmp_path), layout.dequantize(qdata, params).float(), rtol=1e-6, atol=1e-9)
    layer, fmt = stored(tmp_path).layer, FORMATS[name]
    assert (layer.shape, layer.granularity, layer.static) == ((416, 768), fmt.granularity, fmt.static)
    assert layer.format == fmt or name == "int8-tensor", "which is marked as INT8 is"
    assert json.loads(bytes(ours[".comfy_quant"])) == fmt.config((416, 768), 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_compute_what_kitchen_computes(tmp_path: Path, kitchen: Any, name: str, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and not name.startswith("int8"):
        pytest.skip("its sums have another order")
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    written(tmp_path, weights("normal"), name)
    _, qdata, params = kitchen(weights("normal"))
    theirs = tensor.QuantizedTensor(qdata, LAYOUTS[name], params)
    x, bias = inputs().to(dtype), torch.linspace(-1, 1, 416).to(dtype)
    if name in ("mxfp8", "nvfp4"):  # no CPU kernel multiplies them: the product of what both sides mean
        given = tensor.QuantizedTensor.from_float(x.flatten(0, 1), LAYOUTS[name]).dequantize().reshape(x.shape)
        wanted = torch.nn.functional.linear(given.float(), theirs.dequantize().float(), bias.float()).to(dtype)
    else:
        wanted = torch.nn.functional.linear(x, theirs, bias)
    ours = linear(tmp_path, bias=bias.float(), dtype=dtype)(x)
    assert ours.dtype == dtype
    if FORMATS[name].grid:  # whole numbers add up exactly
        assert torch.equal(ours, wanted)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    swapped = linear(tmp_path, slice(200, None), slice(0, 200), bias=bias.roll(-200).float(), dtype=dtype)(x)
    torch.testing.assert_close(swapped, ours.roll(-200, -1))


@pytest.mark.parametrize(("width", "group"), [(192, 64), (48, 16)])
def test_narrow_layers_are_rotated_in_the_groups_that_their_mark_names(tmp_path: Path, width: int, group: int) -> None:
    int8_linear = pytest.importorskip("comfy_kitchen").int8_linear
    parts = written(tmp_path, weights("normal")[:, :width].contiguous(), "int8-convrot")
    x = inputs(width)
    rotated = {"convrot": True, "convrot_groupsize": group}
    assert json.loads(bytes(parts[".comfy_quant"])).items() >= rotated.items()
    wanted = int8_linear(x, parts[".weight"], parts[".weight_scale"], None, x.dtype, **rotated)
    assert torch.equal(linear(tmp_path)(x), wanted)


@pytest.mark.parametrize("arithmetic", ["comfyui_divide", "dynamic_row"])
def test_kernels_divide_inputs_in_float32(tmp_path: Path, arithmetic: Arithmetic) -> None:
    written(tmp_path, weights("normal"), "int8")
    x, found = inputs().bfloat16(), linear(tmp_path, dtype=torch.bfloat16, arithmetic=arithmetic)
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30)
    codes = (x.float() / scale).round()
    assert codes.abs().max() == 127
    exact = codes.double() @ found.stored.dense(torch.float64).T * scale
    assert torch.allclose(found(x).double(), exact, rtol=2**-6, atol=2**-6)
    assert not torch.equal(found(x), linear(tmp_path, dtype=torch.bfloat16)(x))


def test_sums_of_products_are_exact_where_float32_would_round() -> None:
    generator = torch.Generator().manual_seed(0)
    codes, weight = (torch.randint(100, 128, (n, 20_000), generator=generator).to(torch.int8) for n in (3, 5))
    exact = codes.int() @ weight.int().T
    assert int(exact.max()) > 1 << 24
    assert torch.equal(exact_product(codes, weight), exact.float())


def test_an_adapter_is_added_to_the_real_weight(tmp_path: Path) -> None:
    written(tmp_path, weights("normal"), "int8")
    found, x = linear(tmp_path, arithmetic="comfyui_divide"), inputs()
    before = found(x)

    class Ones:
        matched = (NAME,)

        @staticmethod
        def add_to(change: Any, _name: str, _rows: Any) -> None:
            change += 1

    found.stored.adapters = Ones()  # type: ignore[assignment]
    rounded = (x / (scale := x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127)).round() * scale
    assert torch.allclose(found(x), before + rounded.sum(-1, keepdim=True), rtol=1e-5, atol=1e-3)


def test_int8_codes_are_the_nearest_integers_ties_to_even() -> None:
    grid = FORMATS["int8"].codes
    numbers = torch.tensor([-200, -127.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.6, 127.4, torch.inf])
    assert grid.round(numbers).tolist() == [-128, -128, -2, 0, 0, 2, 2, 127, 127, 127]
    assert (grid.levels.tolist(), grid.largest_rounded) == (list(range(128)), 127.5)


def test_w4a4_scales_inputs_in_their_own_dtype() -> None:
    eager = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    x = weights("uneven").bfloat16()
    codes, scales = FORMATS["convrot-w4a4"].inputs(x, None, "comfyui")
    wanted_codes, wanted_scales = eager.quantize_signed_int4_rowwise(x)
    assert torch.equal(pack_nibbles(codes), wanted_codes.view(torch.uint8))
    assert torch.equal(scales.flatten(), wanted_scales)


@pytest.mark.parametrize("count", [384, 416])  # in whole tiles of scales, and not
def test_any_rows_are_those_of_the_whole(tmp_path: Path, name: str, count: int) -> None:
    written(tmp_path, weights("normal")[:count], name)
    whole = real(tmp_path)
    for rows in (slice(0, 16), slice(100, 130), slice(130, None)):
        assert torch.equal(real(tmp_path, rows), whole[rows])
        torch.testing.assert_close(stored(tmp_path, rows).on_device(0), whole[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_rounded_in_float32(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    weight = weights("normal").to(dtype)
    (tmp_path / "wide").mkdir()
    narrow, wide = written(tmp_path, weight, name), written(tmp_path / "wide", weight.float(), name)
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
        ("fp8", (16, 40), None, "16 × 40: FP8 needs dimensions that are multiples of 16"),
        ("fp8", (1, 16), None, "1 × 16: FP8 needs dimensions that are multiples of 16"),
        ("int8-convrot", (64, 24), "int8", "64 × 24: INT8 ConvRot needs a multiple of 16 inputs"),
        ("w6a8", (64, 128), "int8", "64 × 128: W6A8 needs a multiple of 256 inputs"),
        ("mxfp8", (48, 64), "fp8", "48 × 64: MXFP8 needs dimensions that are multiples of 32"),
        ("mxfp8", (20, 64), None, "20 × 64: MXFP8 needs dimensions that are multiples of 32"),
        ("nvfp4", (20, 64), None, "20 × 64: NVFP4 needs dimensions that are multiples of 16"),
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


@pytest.mark.parametrize(("form", "group", "share"), [("nvfp4", 16, 0.95), ("int8", 768, 0.5), ("int8-tensor", 0, 0.5)])
def test_least_squares_scales_are_never_worse(tmp_path: Path, form: str, group: int, share: float) -> None:
    weight = weights("uneven")[:32]
    if form != "nvfp4":  # clipping is better
        weight = torch.where(torch.arange(768) % 768 == 0, 2.0, 1.03).expand(32, 768).contiguous()
    errors = []
    for method in ("absmax", "mse"):
        written(tmp_path, weight, form, weight_scale=method)
        errors.append((real(tmp_path) - weight).reshape(-1, group or weight.numel()).square().sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < share * errors[0].sum()


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
