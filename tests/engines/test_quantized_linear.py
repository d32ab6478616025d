import numpy as np
import pytest
import torch

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines.quantized_linear import CheckpointLinear, StoredWeight
from convert_to_quant.formats import DEFAULT_GRID as FP8
from convert_to_quant.layers import find_layers

CPU = torch.device("cpu")
BIAS = torch.linspace(-1, 1, 16)


@pytest.fixture
def stored(save, build):
    tensors, metadata = build.quantized(["layer"], "tensor")
    checkpoint = open_checkpoint(save("model.safetensors", tensors, metadata))
    return StoredWeight(checkpoint, [(find_layers(checkpoint).quantized["layer"], slice(None))], CPU)


def weight(stored):
    codes = np.random.default_rng(0).integers(0, 0x78, (16, 32)).astype(np.uint8)
    return torch.from_numpy(FP8.decode(codes) * np.float32(0.5))


def inputs(dtype=torch.float32):
    return (torch.from_numpy(np.random.default_rng(1).standard_normal((2, 5, 32))) * 30).to(dtype)


def rounded(scaled):
    """Our own encoder as the oracle of the FP8 cast."""
    return torch.from_numpy(FP8.decode(FP8.encode(scaled.float().numpy())))


def linear(stored, **options):
    return CheckpointLinear(stored, BIAS, options.pop("dtype", torch.float32), **options)


def test_the_weight_is_the_files_codes_times_its_scale(stored):
    assert torch.equal(stored.dense(torch.float32), weight(stored))
    assert torch.equal(linear(stored).weight, weight(stored))


def test_it_holds_no_weight(stored):
    module = linear(stored)
    assert sum(p.numel() for p in module.parameters()) == 0
    assert next(module.parameters()).dtype == torch.float32
    assert (module.in_features, module.out_features) == (32, 16)


def test_pieces_are_joined_in_their_order(stored):
    layer = stored.layer
    swapped = StoredWeight(stored.checkpoint, [(layer, slice(8, 16)), (layer, slice(0, 8))], CPU)
    assert torch.equal(swapped.dense(torch.float32), weight(stored).roll(8, 0))


def test_a_kept_weight_is_made_once(stored):
    kept = StoredWeight(stored.checkpoint, stored.pieces, CPU, keep=True)
    assert kept.dense(torch.float32) is kept.dense(torch.float32)
    assert stored.dense(torch.float32) is not stored.dense(torch.float32)


def test_dequantize_uses_the_input_as_it_is(stored):
    x = inputs()
    expected = x @ weight(stored).T + BIAS
    assert torch.allclose(linear(stored, input_scale=0.01)(x), expected, rtol=1e-5, atol=1e-3)


def test_full_precision_uses_the_input_as_it_is(stored):
    x = inputs()
    module = linear(stored, arithmetic="comfyui", input_scale=0.01, full_precision=True)
    assert torch.equal(module(x), linear(stored)(x))


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.02])
def test_comfyui_divide_rounds_and_clips_the_divided_input(stored, scale):
    x = inputs()
    scale32 = torch.tensor(scale)
    expected = rounded((x / scale32).clamp(-448, 448)) * scale32 @ weight(stored).T + BIAS
    module = linear(stored, arithmetic="comfyui_divide", input_scale=scale)
    assert torch.allclose(module(x), expected, rtol=1e-5, atol=1e-3)


def test_comfyui_multiplies_in_the_inputs_own_dtype(stored):
    x = inputs(torch.bfloat16)
    scale = torch.tensor(0.3)
    product = x * (1 / scale).to(torch.bfloat16)
    assert product.dtype == torch.bfloat16
    expected = (rounded(product.clamp(-448, 448)) * scale @ weight(stored).T + BIAS.bfloat16().float()).bfloat16()
    multiplied = linear(stored, arithmetic="comfyui", input_scale=0.3, dtype=torch.bfloat16)(x)
    divided = linear(stored, arithmetic="comfyui_divide", input_scale=0.3, dtype=torch.bfloat16)(x)
    assert multiplied.dtype == torch.bfloat16
    assert torch.allclose(multiplied.float(), expected.float(), rtol=2**-7, atol=1e-2)
    assert not torch.equal(multiplied, divided)  # about 4 % of the codes differ by a step


def test_a_power_of_two_makes_both_of_comfyuis_quantizers_agree(stored):
    x = inputs(torch.bfloat16)
    options = {"input_scale": 0.25, "dtype": torch.bfloat16}
    multiplied = linear(stored, arithmetic="comfyui", **options)(x)
    assert torch.equal(multiplied, linear(stored, arithmetic="comfyui_divide", **options)(x))


def test_dynamic_tensor_takes_the_range_of_the_whole_input(stored):
    x = inputs()
    static = linear(stored, arithmetic="comfyui_divide", input_scale=float(x.abs().max()) / 448)(x)
    assert torch.allclose(linear(stored, arithmetic="dynamic_tensor", input_scale=77.0)(x), static)


def test_dynamic_row_takes_the_range_of_each_row(stored):
    x = inputs()
    x[0, 0] *= 1e3
    rows = [linear(stored, arithmetic="dynamic_tensor")(row) for row in x.flatten(0, 1)]
    found = linear(stored, arithmetic="dynamic_row")(x).flatten(0, 1)
    assert torch.allclose(found, torch.stack(rows), rtol=1e-4, atol=1e-2 * float(x.abs().max()))


@pytest.mark.parametrize(
    ("arithmetic", "scale"),
    [("comfyui", 0.25), ("comfyui_divide", 0.3), ("comfyui", 2.0**-12), ("dynamic_tensor", None)],
)
def test_inputs_of_an_e5m2_layer_become_e5m2(save, build, arithmetic, scale):
    tensors, metadata = build.quantized(["layer"], "tensor", dtype="F8_E5M2")
    with open_checkpoint(save("model.safetensors", tensors, metadata)) as checkpoint:
        stored = StoredWeight(checkpoint, [(find_layers(checkpoint).quantized["layer"], slice(None))], CPU)
        x = inputs()
        s = torch.tensor(float(x.abs().max()) / 57344 if scale is None else scale)
        product = x / s if arithmetic != "comfyui" else x * (1 / s)
        codes = product.clamp(-57344, 57344).to(torch.float8_e5m2)
        expected = codes.float() * s @ stored.dense(torch.float32).T + BIAS
        found = linear(stored, arithmetic=arithmetic, input_scale=scale or 1.0)(x)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("arithmetic", ["dynamic_tensor", "dynamic_row"])
def test_an_input_of_zeros_gives_the_bias(stored, arithmetic):
    assert torch.equal(linear(stored, arithmetic=arithmetic)(torch.zeros(3, 32)), BIAS.expand(3, 16))


@pytest.mark.parametrize("scale_shape", [(), (16, 1), (2, 4)])
def test_every_granularity_gives_the_same_weight_on_a_device(save, build, scale_shape):
    tensors, metadata = build.quantized(["layer"], "tensor")
    tensors["layer.weight_scale"] = np.random.default_rng(2).random(scale_shape, np.float32) + 1
    checkpoint = open_checkpoint(save("model.safetensors", tensors, metadata))
    layer = find_layers(checkpoint).quantized["layer"]
    pieces = [(layer, slice(4, 16)), (layer, slice(0, 4))]
    from_pages = StoredWeight(checkpoint, pieces, CPU)
    device_like = StoredWeight(checkpoint, pieces, CPU)
    parts = [device_like.on_device(index) for index in range(2)]
    assert torch.equal(torch.cat(parts), from_pages.dense(torch.float32))
