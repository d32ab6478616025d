"""The hand-off's four functions, its test cases and its edge cases, by its names.

Files are built by hand, simulated by the layer engine, patched, and read again with the safetensors library. The same
through the command line stands in tests/cli, on a model that runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from convert_to_quant import calibrate_activation_scales as module
from convert_to_quant.calibrate_activation_scales import (
    calibrate_model,
    compute_activation_scale,
    load_lora_tensors,
    patch_model_with_scales,
)
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import layer as layer_engine
from convert_to_quant.errors import (
    CalibrationError,
    LoraError,
    NoStaticScaleError,
    OptionError,
    TensorError,
    UnsupportedModelError,
)
from convert_to_quant.formats import DEFAULT_GRID, FLOAT_GRIDS, GRIDS
from convert_to_quant.layers import find_layers
from convert_to_quant.options import CalibrationOptions

OUT, IN = 128, 64
LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0")
LAYER_OPTIONS = CalibrationOptions(engine="layer")
GRAINS = {"tensor": (OUT, IN), "row": (1, IN), "block": (32, 32)}
SCALE_SHAPES: dict[str, tuple[int, ...]] = {"tensor": (), "row": (OUT,), "block": (OUT // 32, IN // 32)}

Calibrate = Callable[..., dict[str, np.ndarray]]


def quantize(weight_OI: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Codes by torch's cast, and the scale of every block."""
    tiles = weight_OI.reshape(weight_OI.shape[0] // block[0], block[0], -1, block[1])
    scale = np.abs(tiles).max((1, 3)) / np.float32(448)
    cast = torch.from_numpy(weight_OI / np.kron(scale, np.ones(block, np.float32))).to(torch.float8_e4m3fn)
    return cast.view(torch.uint8).numpy(), scale


def weights(names: tuple[str, ...] = LAYERS) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal((OUT, IN)).astype(np.float32) * 10.0**-number for number, name in enumerate(names)
    }


def fp8_tensors(build: Any, mode: str = "tensor", names: tuple[str, ...] = LAYERS) -> dict[str, Any]:
    formats = {"tensor": "float8_e4m3fn", "row": "float8_e4m3fn_rowwise", "block": "float8_e4m3fn_blockwise"}
    tensors: dict[str, Any] = {}
    for name, weight in weights(names).items():
        codes, scale = quantize(weight, GRAINS[mode])
        tensors[f"{name}.weight"] = ("F8_E4M3", codes)
        tensors[f"{name}.weight_scale"] = scale.reshape(SCALE_SHAPES[mode])
        tensors[f"{name}.input_scale"] = np.float32(1.0)
        tensors[f"{name}.comfy_quant"] = build.mark(format=formats[mode])
    return tensors


def read_scales(path: Path, suffix: str = ".input_scale") -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name.removesuffix(suffix): file.get_tensor(name) for name in names if name.endswith(suffix)}


def expect_good(scales: Mapping[str, torch.Tensor], names: tuple[str, ...] = LAYERS) -> None:
    """As every reader needs them."""
    assert set(scales) == set(names)
    for scale in scales.values():
        assert (scale.dtype, tuple(scale.shape)) == (torch.float32, ())
        assert torch.isfinite(scale)
        assert scale > 0


@pytest.fixture
def calibrate():
    """Calibrate a file by simulation into a new one; gives the new scales and checks the new file."""

    def run(path: Path, *loras: Path, names: tuple[str, ...] = LAYERS, suffix: str = ".input_scale") -> Any:
        output = path.with_name("calibrated.safetensors")
        before = path.read_bytes()
        found = calibrate_model(path, LAYER_OPTIONS, loras=[load_lora_tensors(lora) for lora in loras])
        patch_model_with_scales(path, found, output)
        assert path.read_bytes() == before
        scales = read_scales(output, suffix)
        expect_good(scales, names)
        with open_checkpoint(path) as old, open_checkpoint(output) as new:
            assert set(find_layers(new).static) == set(find_layers(old).static) == set(names)
            for name in old:
                if not name.endswith(suffix):
                    assert new.raw(name).tobytes() == old.raw(name).tobytes(), name
                    assert new.tensors[name].shape == old.tensors[name].shape
        return {name: scale.item() for name, scale in scales.items()}

    return run


def by_hand(name: str, weight: np.ndarray, seed: int = 42) -> float:
    """The default simulation's scale in plain numpy: 64 rows, 99.9th percentile, margin 8."""
    unit = layer_engine.generator(seed, name).standard_normal((64, IN), dtype=np.float32)
    x = unit * np.sqrt(OUT / IN / np.sum(weight.astype(np.float64) ** 2, 0))
    return float(np.sort(np.abs(x).reshape(-1))[int(x.size * 0.999) - 1]) * 8 / 448


# --- the hand-off's six test cases -----------------------------------------------------------------------------------


def expect_by_hand(scales: Mapping[str, Any]) -> None:
    for name, weight in weights().items():
        assert scales[name] == pytest.approx(by_hand(name, weight), rel=0.02)  # of FP8's rounding of the weight


def test_calibrate(save, build, calibrate):
    expect_by_hand(calibrate(save("m.safetensors", fp8_tensors(build))))


SPELLINGS = {
    "kohya": ("lora_unet_double_blocks_0_img_mlp_0", ".lora_down.weight", ".lora_up.weight"),
    "peft": ("base_model.model.double_blocks.0.img_mlp.0", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("transformer.transformer_blocks.0.ff.net.0.proj", ".lora_A.weight", ".lora_B.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_calibrate_with_lora(save, build, calibrate, spelling):
    model = save("m.safetensors", fp8_tensors(build))
    a = np.random.default_rng(5).standard_normal((4, IN)).astype(np.float32)
    a[:, 7] *= 30  # the adapter reads one outlier channel
    name, down, up = SPELLINGS[spelling]
    factors = {name + down: a, name + up: np.ones((OUT, 4), np.float32)}
    lora = save("lora.safetensors", {**factors, name + ".alpha": np.float32(4)})
    plain = calibrate(model)
    with_lora = calibrate(model, lora)
    assert with_lora[LAYERS[0]] == plain[LAYERS[0]], "no adapter, no change"
    assert with_lora[LAYERS[1]] > 1.5 * plain[LAYERS[1]]


@pytest.mark.parametrize("there", [True, False])
def test_calibrate_legacy_keys(save, build, calibrate, there):
    tensors: dict[str, Any] = {"scaled_fp8": ("F8_E4M3", np.zeros(0, np.uint8))}
    for name, weight in weights().items():
        codes, scale = quantize(weight, (OUT, IN))
        tensors |= {f"{name}.weight": ("F8_E4M3", codes), f"{name}.scale_weight": scale.reshape(())}
        tensors |= {f"{name}.scale_input": np.float32(1.0)} if there else {}
    path = save("m.safetensors", tensors)
    expect_by_hand(calibrate(path, suffix=".scale_input"))
    with open_checkpoint(path.with_name("calibrated.safetensors")) as checkpoint:
        assert set(checkpoint) == {*tensors, *(f"{name}.scale_input" for name in LAYERS)}, "legacy stays legacy"


def test_calibrate_mixed_files(save, build, calibrate):
    """FP8 layers beside high precision, int8, convolutions and norms: only the FP8 layers get a scale."""
    random = np.random.default_rng(3)
    tensors = {
        "img_in.weight": ("BF16", build.to_bfloat16(random.standard_normal((IN, 16)))),
        "norm.weight": np.ones(IN, np.float32),
        "conv.weight": random.standard_normal((4, 4, 3, 3)).astype(np.float16),
        "double_blocks.0.txt_mlp.0.weight": random.integers(-127, 127, (OUT, IN)).astype(np.int8),
        "double_blocks.0.txt_mlp.0.weight_scale": np.float32(0.01),
        "double_blocks.0.txt_mlp.0.comfy_quant": build.mark(format="int8_tensorwise"),
        **fp8_tensors(build),
    }
    expect_by_hand(calibrate(save("m.safetensors", tensors)))


# --- its edge cases ---------------------------------------------------------------------------------------------------


def test_calibrate_empty_tensors(save, build):
    tensors = fp8_tensors(build)
    tensors["empty.weight"] = ("F8_E4M3", np.zeros((0, IN), np.uint8))
    tensors["empty.weight_scale"] = np.float32(1.0)
    tensors["empty.comfy_quant"] = build.mark(format="float8_e4m3fn")
    path = save("m.safetensors", tensors)
    calibration = calibrate_model(path, LAYER_OPTIONS)
    assert set(calibration.scales) == set(LAYERS)
    (empty,) = [result for result in calibration.results if result.layer == "empty"]
    assert (empty.range, empty.scale_after) == (None, 1.0)
    assert empty.reason == "weight is empty or all zero: keeps its scale"
    output = path.with_name("out.safetensors")
    patch_model_with_scales(path, calibration, output)
    expect_good(read_scales(output))


@pytest.mark.parametrize("old", [None, ("BF16", np.uint16([0x3F80])), ("F16", np.uint16([0x3C00]))])
def test_input_scales_that_are_missing_or_of_other_dtypes_and_shapes_are_replaced(save, build, calibrate, old):
    tensors = fp8_tensors(build) | {f"{LAYERS[0]}.input_scale": old}
    path = save("m.safetensors", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    expect_by_hand(calibrate(path))


# --- calibrate_model -------------------------------------------------------------------------------------------------


def test_margin_multiplies_float16_safe_raises_and_the_seed_counts(save, build):
    large = fp8_tensors(build)
    large[f"{LAYERS[0]}.weight_scale"] = np.float32(1e6)
    path = save("large.safetensors", large)
    default, wide, safe, other = (
        calibrate_model(path, CalibrationOptions(engine="layer", **words)).scales  # type: ignore[arg-type]
        for words in ({}, {"margin": 16}, {"float16_safe": True}, {"seed": 7})
    )
    assert all(wide[name] == pytest.approx(2 * default[name], rel=1e-6) for name in LAYERS)
    assert default[LAYERS[0]] < safe[LAYERS[0]] == 2.0**-15
    assert other[LAYERS[1]] == pytest.approx(by_hand(LAYERS[1], weights()[LAYERS[1]], 7), rel=0.02)
    assert other[LAYERS[1]] != default[LAYERS[1]]


@pytest.mark.parametrize("mode", ["row", "block"])
def test_row_and_block_wise_files_have_nothing_to_calibrate(save, build, mode):
    with pytest.raises(
        NoStaticScaleError, match="nothing to calibrate: readers of its FP8 layers scale inputs dynamically"
    ):
        calibrate_model(save("m.safetensors", fp8_tensors(build, mode)), LAYER_OPTIONS)


def test_foreign_layers_are_named_as_left_alone(save, build):
    tensors = fp8_tensors(build) | {
        "other.weight": np.zeros((4, 4), np.uint8),
        "other.comfy_quant": build.mark(format="svdquant_w4a4"),
        "rows.weight": np.zeros((4, 4), np.int8),
        "rows.weight_scale": np.float32(1),
        "rows.comfy_quant": build.mark(format="int8_tensorwise"),
        "awq.weight": np.zeros((16, 16), np.uint8),
        "awq.weight_scale": ("F8_E4M3", np.zeros((128, 4), np.uint8)),
        "awq.weight_scale_2": np.float32(1),
        "awq.pre_quant_scale": np.ones(32, np.float32),
        "awq.input_scale": np.float32(1),
        "awq.comfy_quant": build.mark(format="nvfp4"),
    }
    calibration = calibrate_model(save("m.safetensors", tensors), LAYER_OPTIONS)
    notes = calibration.notes
    assert set(calibration.scales) == set(LAYERS)
    assert "left alone: 1 NVFP4 layer, whose inputs readers multiply by pre_quant_scale first" in notes
    assert "left alone: 1 layer in svdquant_w4a4" in notes
    assert "left alone: 1 INT8 layer, whose inputs readers scale dynamically" in notes


def test_lora_report_names_all_that_is_not_applied(save, build):
    pair = {".lora_A.weight": np.ones((1, IN), np.float32), ".lora_B.weight": np.ones((OUT, 1), np.float32)}
    tensors = {
        name + suffix: factor for name in (LAYERS[0], "double_blocks.7.img_mlp.0") for suffix, factor in pair.items()
    }
    lora = load_lora_tensors(save("lora.safetensors", tensors))
    calibration = calibrate_model(save("m.safetensors", fp8_tensors(build)), LAYER_OPTIONS, loras=[lora])
    assert "LoRA: 1 adapter on 1 layer, 1 unmatched" in calibration.notes
    assert any(note.startswith("LoRA unmatched: double_blocks.7.img_mlp.0 (no linear") for note in calibration.notes)
    reasons = {result.layer: result.reason for result in calibration.results}
    assert reasons == {LAYERS[0]: "simulated from LoRA inputs × 8", LAYERS[1]: "simulated from random inputs × 8"}


INSTEAD = f"({module.INSTEAD})"


@pytest.mark.parametrize("package", ["torch", "diffusers"])
def test_without_torch_or_diffusers_only_guesses_by_name_are_made(save, build, monkeypatch, package):
    find_spec = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    path = save("m.safetensors", fp8_tensors(build))
    with pytest.raises(UnsupportedModelError) as caught:
        calibrate_model(path)
    assert str(caught.value) == (
        f"{path}: the model cannot be run, so nothing was calibrated: {package} is not installed {INSTEAD}"
    )
    assert calibrate_model(path, LAYER_OPTIONS).engine == "layer"


@pytest.mark.parametrize("engine", ["auto", "model"])
def test_a_model_that_cannot_be_run_is_never_guessed_unasked(save, build, engine):
    path = save("m.safetensors", fp8_tensors(build))
    with pytest.raises(UnsupportedModelError, match=r"so nothing was calibrated: .*--actcal-engine layer guesses"):
        calibrate_model(path, CalibrationOptions(engine=engine))


ENCODER = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"


def test_a_text_encoder_in_the_same_file_is_left_alone(save, build):
    own = {f"model.diffusion_model.{name}": tensor for name, tensor in fp8_tensors(build).items()}
    encoder, _ = build.quantized([ENCODER], "tensor", input_scale=None)
    path = save("all.safetensors", {**own, **encoder})
    calibration = calibrate_model(path, LAYER_OPTIONS)
    assert set(calibration.scales) == {f"model.diffusion_model.{name}" for name in LAYERS}
    assert calibration.notes == [
        "left alone: 1 FP8 layer outside the diffusion model, whose input scales are never read"
    ]
    patch_model_with_scales(path, calibration, in_place=True)  # although the encoder has no input_scale to write into
    with open_checkpoint(path) as checkpoint:
        assert ENCODER + ".input_scale" not in checkpoint


@pytest.mark.parametrize("encoder", [ENCODER, "encoder.block.0.layer.0.SelfAttention.q"])
def test_a_file_whose_only_fp8_layers_are_a_text_encoders_is_refused(save, build, encoder):
    path = save("encoder.safetensors", *build.quantized([encoder], "tensor"))
    with pytest.raises(TensorError) as caught:
        calibrate_model(path, LAYER_OPTIONS)
    assert str(caught.value) == (
        f"{path}: {encoder}: nothing to calibrate: text encoder (T5), which ComfyUI runs in full precision without "
        "input scales"
    )


def test_e5m2_layers_are_scaled_to_e5m2s_largest_value(save, build):
    weight = np.eye(64, dtype=np.float32)
    tensors = {}
    for name, dtype in (("blocks.0.four", "F8_E4M3"), ("blocks.0.five", "F8_E5M2")):
        tensors |= {
            f"{name}.weight": build.fp8(weight, dtype),
            f"{name}.weight_scale": np.float32(1),
            f"{name}.comfy_quant": build.mark(format=FLOAT_GRIDS[dtype].name),
        }
    calibration = calibrate_model(save("m.safetensors", tensors), LAYER_OPTIONS)
    for result in calibration.results:
        assert result.scale_after == pytest.approx(8 * result.range / GRIDS[result.format].max)
    assert [result.format for result in calibration.results] == ["float8_e4m3fn", "float8_e5m2"]
    codes = torch.eye(64).to(torch.float8_e5m2)
    assert compute_activation_scale(codes) == pytest.approx(compute_activation_scale(weight) * 448 / 57344)


def test_a_calibration_is_json_and_progress_ends_at_all_the_bytes(save, build):
    told: list[tuple[int, int]] = []
    path = save("m.safetensors", fp8_tensors(build))
    found = calibrate_model(path, LAYER_OPTIONS, progress=lambda *words: told.append(words))
    document = json.loads(json.dumps(found.to_json()))
    assert (document["engine"], document["options"]["samples"]) == ("layer", 64)
    assert [layer["layer"] for layer in document["layers"]] == list(LAYERS)
    assert told[-1] == (2 * OUT * IN, 2 * OUT * IN)


# --- patch_model_with_scales -----------------------------------------------------------------------------------------


def test_patch_writes_the_scales_given_and_nothing_else(save, build):
    path = save("m.safetensors", fp8_tensors(build))
    output = path.with_name("out.safetensors")
    patch_model_with_scales(path, {LAYERS[1]: 0.125}, output)
    assert {name: scale.item() for name, scale in read_scales(output).items()} == {LAYERS[0]: 1.0, LAYERS[1]: 0.125}
    with open_checkpoint(path) as old, open_checkpoint(output) as new:
        changed = [name for name in old if old.raw(name).tobytes() != new.raw(name).tobytes()]
    assert changed == [f"{LAYERS[1]}.input_scale"]


def test_patch_needs_an_output_or_in_place_and_not_both(save, build):
    path = save("m.safetensors", fp8_tensors(build))
    for words in ({}, {"output": "out.safetensors", "in_place": True}):
        with pytest.raises(OptionError, match=r"^give either an output or in_place$"):
            patch_model_with_scales(path, {}, **words)


# --- compute_activation_scale ----------------------------------------------------------------------------------------


def test_compute_from_a_float_weight_equals_the_definition():
    weight = weights()[LAYERS[0]]
    unit = np.random.default_rng(42).standard_normal((64, IN), dtype=np.float32)
    x = unit * np.sqrt(OUT / IN / np.sum(weight.astype(np.float64) ** 2, 0))
    expected = np.sort(np.abs(x).reshape(-1))[int(x.size * 0.999) - 1] * 8 / 448
    assert compute_activation_scale(weight) == pytest.approx(expected, rel=1e-5)
    assert compute_activation_scale(torch.from_numpy(weight)) == compute_activation_scale(weight)
    half = torch.from_numpy(weight).bfloat16()
    assert compute_activation_scale(half) == pytest.approx(compute_activation_scale(half.float().numpy()), rel=1e-6)


@pytest.mark.parametrize("mode", GRAINS)
def test_compute_takes_fp8_as_torch_tensors_and_as_codes(mode):
    codes, scale = quantize(weights()[LAYERS[0]], GRAINS[mode])
    scale = scale.reshape(SCALE_SHAPES[mode])
    as_codes = compute_activation_scale(codes, weight_scale=scale)
    tensor = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    assert compute_activation_scale(tensor, weight_scale=torch.from_numpy(np.asarray(scale))) == as_codes
    block = GRAINS[mode]
    spread = np.kron(scale.reshape(OUT // block[0], IN // block[1]), np.ones(block, np.float32))
    real = DEFAULT_GRID.decode(codes) * spread
    assert as_codes == pytest.approx(compute_activation_scale(real), rel=1e-6)


def test_compute_with_lora_rows():
    weight = weights()[LAYERS[0]]
    rows = np.random.default_rng(2).standard_normal((4, IN)).astype(np.float32)
    rows[:, 0] *= 50
    assert compute_activation_scale(weight, lora_A=rows) > 1.5 * compute_activation_scale(weight)
    assert compute_activation_scale(weight, lora_A=np.zeros_like(rows)) == compute_activation_scale(weight)


@pytest.mark.parametrize("weight", [np.zeros((0, 4)), np.zeros((4, 0)), np.zeros((4, 4)), np.zeros((4, 4), np.uint8)])
def test_compute_of_an_empty_or_zero_weight_is_one(weight):
    assert compute_activation_scale(weight, weight_scale=np.float32(1)) == 1.0


NOT_FINITE = "weight: the weight or its scale has NaN or infinite values"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"weight": np.ones(3)}, "a weight should have two dimensions, found [3]"),
        ({"weight": np.full((4, 4), np.nan)}, NOT_FINITE),
        ({"weight_scale": np.float32("inf")}, NOT_FINITE),
        ({"weight_scale": np.ones(3)}, "a weight scale of shape [3] does not fit a weight of [4, 4]"),
        ({"lora_A": np.ones((2, 5))}, "lora_A of shape [2, 5] does not fit a weight of [4, 4]"),
        ({"samples": 0}, "samples should be at least 1, found 0"),
        ({"percentile": 0}, "a percentile should be above 0 and at most 100, found 0"),
        ({"weight": np.full((4, 4), 1e-42)}, "is not finite in float32"),
    ],
    ids=range(8),
)
def test_compute_refuses_what_means_nothing(words, message):
    with pytest.raises((TensorError, OptionError, CalibrationError), match=re.escape(message) + "$"):
        compute_activation_scale(**{"weight": np.ones((4, 4)), **words})


# --- load_lora_tensors -----------------------------------------------------------------------------------------------


def test_load_lora_tensors_gives_the_adapters_and_refuses_other_files(save):
    factors = {"x.lora_A.weight": np.ones((2, 4), np.float32), "x.lora_B.weight": np.ones((4, 2), np.float32)}
    path = save("lora.safetensors", {**factors, "x.alpha": np.float32(1)})
    lora = load_lora_tensors(path, 0.5)
    assert (list(lora.adapters), lora.strength, lora.adapters["x"].scale) == (["x"], 0.5, 0.5)
    with pytest.raises(LoraError, match="not a LoRA"):
        load_lora_tensors(save("other.safetensors", {"x.weight": np.ones((2, 2), np.float32)}))
