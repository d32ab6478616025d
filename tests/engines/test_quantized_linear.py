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
def make(save, build):
    """make(format, scale of the weight): rows of a layer as a file holds them."""

    def made(dtype="F8_E4M3", weight_scale=None):
        tensors, metadata = build.quantized(["layer"], "tensor", dtype=dtype)
        if weight_scale is not None:
            tensors["layer.weight_scale"] = weight_scale
        checkpoint = open_checkpoint(save("model.safetensors", tensors, metadata))
        return StoredWeight(checkpoint, [(find_layers(checkpoint).quantized["layer"], slice(None))], CPU)

    return made


@pytest.fixture
def stored(make):
    return make()


def weight(stored):
    codes = np.random.default_rng(0).integers(0, 0x78, (16, 32)).astype(np.uint8)
    return torch.from_numpy(FP8.decode(codes) * np.float32(0.5))


def inputs(dtype=torch.float32):
    return (torch.from_numpy(np.random.default_rng(1).standard_normal((2, 5, 32))) * 30).to(dtype)


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


@pytest.mark.parametrize("how", [{}, {"arithmetic": "comfyui", "full_precision": True}])
def test_without_codes_the_input_is_used_as_it_is(stored, how):
    x = inputs()
    found = linear(stored, input_scale=0.01, **how)(x)
    assert torch.allclose(found, x @ weight(stored).T + BIAS, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("arithmetic", "scale"),
    [("comfyui", 0.25), ("comfyui", 2.0**-12), ("dynamic_tensor", None)]
    + [("comfyui_divide", scale) for scale in (1.0, 0.3, 0.02)],
)
@pytest.mark.parametrize(
    ("dtype", "cast"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)], ids=["E4M3", "E5M2"]
)
def test_inputs_are_scaled_clipped_and_rounded(make, dtype, cast, arithmetic, scale):
    stored, x, largest = make(dtype), inputs(), torch.finfo(cast).max
    s = torch.tensor(float(x.abs().max()) / largest if scale is None else scale)
    codes = (x / s if arithmetic != "comfyui" else x * (1 / s)).clamp(-largest, largest).to(cast)
    expected = codes.float() * s @ stored.dense(torch.float32).T + BIAS
    found = linear(stored, arithmetic=arithmetic, input_scale=scale or 77.0)(x)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_comfyui_multiplies_in_the_inputs_own_dtype(stored):
    x, scale = inputs(torch.bfloat16), torch.tensor(0.3)
    codes = (x * (1 / scale).to(torch.bfloat16)).clamp(-448, 448).to(torch.float8_e4m3fn)
    expected = (codes.float() * scale @ weight(stored).T + BIAS.bfloat16().float()).bfloat16()
    multiplied, divided = (
        linear(stored, arithmetic=arithmetic, input_scale=0.3, dtype=torch.bfloat16)(x)
        for arithmetic in ("comfyui", "comfyui_divide")
    )
    assert multiplied.dtype == torch.bfloat16
    assert torch.allclose(multiplied.float(), expected.float(), rtol=2**-7, atol=1e-2)
    assert not torch.equal(multiplied, divided)  # about 4 % of the codes differ by a step


def test_dynamic_row_takes_the_range_of_each_row(stored):
    x = inputs()
    x[0, 0] *= 1e3
    rows = [linear(stored, arithmetic="dynamic_tensor")(row) for row in x.flatten(0, 1)]
    found = linear(stored, arithmetic="dynamic_row")(x).flatten(0, 1)
    assert torch.allclose(found, torch.stack(rows), rtol=1e-4, atol=1e-2 * float(x.abs().max()))


@pytest.mark.parametrize("arithmetic", ["dynamic_tensor", "dynamic_row"])
def test_an_input_of_zeros_gives_the_bias(stored, arithmetic):
    assert torch.equal(linear(stored, arithmetic=arithmetic)(torch.zeros(3, 32)), BIAS.expand(3, 16))


@pytest.mark.parametrize("scale_shape", [(), (16, 1), (2, 4)])
def test_every_granularity_gives_the_same_weight_on_a_device(make, scale_shape):
    stored = make(weight_scale=np.random.default_rng(2).random(scale_shape, np.float32) + 1)
    split = StoredWeight(stored.checkpoint, [(stored.layer, slice(4, 16)), (stored.layer, slice(0, 4))], CPU)
    assert torch.equal(torch.cat([split.on_device(index) for index in range(2)]), split.dense(torch.float32))
