"""Conversion against torch's own arithmetic, bit for bit, and the file that comes of it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_disk import contents, converted

from convert_to_quant import quantize as quantize_module
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import main
from convert_to_quant.convert import convert, plan_conversion, provenance
from convert_to_quant.errors import Error, OptionError, OutputError, TensorError
from convert_to_quant.families.base import IMAGE
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.marks import disables_fp8
from convert_to_quant.names import PROVENANCE_KEY
from convert_to_quant.options import ConvertOptions
from convert_to_quant.quantize import least_squares_scale

NAME = "blocks.0.linear"
E4M3FN = torch.float8_e4m3fn


def reference(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales [n_out, n_in] in torch, block by block."""
    wide = weight.float()
    grid = [math.ceil(size / side) for size, side in zip(wide.shape, block, strict=True)]
    codes, scales = torch.empty(wide.shape, dtype=E4M3FN), torch.empty(grid)
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        absmax = wide[part].abs().max()
        scale = absmax / 448 if absmax > 0 else torch.tensor(1.0)
        codes[part] = (wide[part] / scale).clamp(-448, 448).to(E4M3FN)
        scales[i, j] = scale
    return codes, scales


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def weights(dtype: torch.dtype, shape: tuple[int, int] = (48, 80), seed: int = 0) -> torch.Tensor:
    """Weights of many magnitudes, with zeros of both signs and outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-4, 0, shape[0])[:, None] * 0.1
    weight.view(-1)[:4] = torch.tensor([0.0, -0.0, -1.5, 1e-7])
    return weight.to(dtype)


def made(folder: Path, weight: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """What a file holds of one weight, by suffix."""
    safetensors.torch.save_file({f"{NAME}.weight": weight}, folder / "in.safetensors")
    converted(folder / "in.safetensors", folder / "out.safetensors", **options)
    read = safetensors.torch.load_file(folder / "out.safetensors")
    return {name.removeprefix(f"{NAME}."): tensor for name, tensor in read.items()}


# codes and scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("options", "block", "scale_shape", "format_name"),
    [
        ({}, (48, 80), (), "float8_e4m3fn"),
        ({"scaling_mode": "row"}, (1, 80), (48,), "float8_e4m3fn_rowwise"),
        ({"scaling_mode": "block"}, (64, 64), (1, 2), "float8_e4m3fn_blockwise"),
        ({"scaling_mode": "block", "block_size": 16}, (16, 16), (3, 5), "float8_e4m3fn_blockwise"),
        ({"scaling_mode": "block", "block_size": 17}, (17, 17), (3, 5), "float8_e4m3fn_blockwise"),
        ({"scaling_mode": "block", "block_size": 1}, (1, 1), (48, 80), "float8_e4m3fn_blockwise"),
        ({"scaling_mode": "block", "block_size": 65535}, (65535, 65535), (1, 1), "float8_e4m3fn_blockwise"),
    ],
)
@pytest.mark.parametrize("band_values", [quantize_module.BAND_VALUES, 20 * 80, 7 * 80, 1])
def test_codes_and_scales_are_those_of_torch_bit_for_bit(
    *, tmp_path, monkeypatch, dtype, options, block, scale_shape, format_name, band_values
):
    monkeypatch.setattr(quantize_module, "BAND_VALUES", band_values)
    weight = weights(dtype)
    read = made(tmp_path, weight, **options)
    codes, scales = reference(weight, block)
    assert_same_bits(read["weight"], codes)
    assert_same_bits(read["weight_scale"], scales.reshape(scale_shape))
    mark = json.loads(read["comfy_quant"].numpy().tobytes())
    assert (mark["format"], mark.get("group_size")) == (format_name, block[1] if "block" in format_name else None)
    with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        layer = find_layers(checkpoint).quantized[NAME]
        spread = scales.repeat_interleave(block[0], 0)[:48].repeat_interleave(block[1], 1)[:, :80]
        np.testing.assert_array_equal(dequantize(checkpoint, layer), (codes.float() * spread).numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_becomes_the_code_of_torch(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(quantize_module, "BAND_VALUES", 1 << 16)
    weight = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).repeat(3).view(dtype)
    weight[~torch.isfinite(weight)] = 0
    weight = weight.reshape(768, 256)
    assert weight.numel() > 2 * quantize_module.BAND_VALUES
    read, (codes, scales) = made(tmp_path, weight), reference(weight, (768, 256))
    assert_same_bits(read["weight"], codes)
    assert_same_bits(read["weight_scale"], scales.reshape(()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_fall_between_two_codes_become_the_code_of_torch(tmp_path, dtype):
    """Here a product with 1 / scale would differ from the quotient."""
    levels = torch.arange(0x7F, dtype=torch.uint8).view(E4M3FN).float()
    midpoints = (levels[1:] + levels[:-1]) / 2
    for number in range(32):
        weight = torch.zeros(16, 16)
        weight.view(-1)[: len(midpoints)] = midpoints * ((1 + number / 32) / 448)
        weight.view(-1)[-1] = 1 + number / 32
        weight = weight.to(dtype)
        assert_same_bits(made(tmp_path, weight)["weight"], reference(weight, (16, 16))[0])


@pytest.mark.parametrize("mode", ["tensor", "row", "block"])
@pytest.mark.parametrize("weight_scale", ["absmax", "mse"])
@pytest.mark.parametrize("largest", [0, 1e-45, 3e-45, 1e-40, 3.4028234663852886e38])
def test_scales_are_finite_and_above_zero_and_1_where_all_weights_are_0(tmp_path, mode, weight_scale, largest):
    weight = torch.zeros(32, 32)
    weight[3, 3] = -largest
    read = made(tmp_path, weight, scaling_mode=mode, block_size=16, weight_scale=weight_scale)
    scale = read["weight_scale"]
    assert torch.isfinite(scale).all()
    assert (scale > 0).all() if largest else (scale == 1).all()
    assert torch.isfinite(read["weight"].float()).all()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("mode", ["tensor", "row", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_weight_with_nan_or_infinity_is_refused_by_name_and_leaves_no_file(tmp_path, bad, mode, dtype):
    weight = weights(dtype)
    weight[40, 70] = torch.tensor(bad, dtype=torch.float64).to(dtype)
    source = tmp_path / "in.safetensors"
    safetensors.torch.save_file({"blocks.1.linear.weight": weights(dtype), f"{NAME}.weight": weight}, source)
    with pytest.raises(TensorError) as caught:
        converted(source, tmp_path / "out.safetensors", scaling_mode=mode)
    assert str(caught.value) == (
        f"{source}: {NAME}.weight: the weight has NaN or infinite values "
        "(the input file is damaged or its training diverged)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


# the least-squares scale


def squared_error(magnitudes: np.ndarray, counts: np.ndarray, scale: float) -> float:
    codes = torch.from_numpy(magnitudes / scale).clamp(max=448).float().to(E4M3FN).double().numpy()
    return float(np.sum(counts * (magnitudes - codes * scale) ** 2))


@settings(max_examples=30)
@given(
    magnitudes=st.lists(st.floats(1e-3, 10), min_size=1, max_size=12, unique=True),
    seed=st.integers(0, 1000),
)
def test_mse_is_the_best_of_a_dense_grid_and_never_worse_than_absmax(magnitudes, seed):
    values = np.sort(np.array(magnitudes))
    counts = np.random.default_rng(seed).integers(1, 100, len(values))
    start = np.float32(values.max() / 448)
    found = float(least_squares_scale(values, counts, start))
    error = squared_error(values, counts, found)
    assert start / 2 <= found <= start * 2 * (1 + 1e-6)
    assert error <= squared_error(values, counts, float(start))
    grid = np.linspace(float(start) / 2, float(start) * 2, 1500)
    best = min(squared_error(values, counts, scale) for scale in grid)
    total = float(np.sum(counts * values**2))
    assert error <= best + 1e-13 * total  # the scale itself is rounded to float32


@pytest.mark.parametrize(
    ("values", "counts", "best"),
    [
        ([0.0012, 448.0], [10**15, 1], 0.0012 * 512),  # below 1: the many are the least code, the one is clipped
        ([0.1, 448.0], [1000, 1], 7 / 6),  # above 1: 384 means 448 exactly
        ([0.0036, 448.0], [10**15, 1], 0.0036 * 512),  # almost twice
    ],
)
def test_mse_looks_from_half_to_twice_the_absmax_scale(values, counts, best):
    assert float(least_squares_scale(np.array(values), np.array(counts), np.float32(1))) == pytest.approx(
        best, rel=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("mode", "block_size", "block"), [("tensor", 64, (48, 80)), ("row", 64, (1, 80)), ("block", 32, (32, 32))]
)
def test_mse_in_a_file_is_the_best_of_a_grid_in_every_block(tmp_path, dtype, mode, block_size, block):
    weight = weights(dtype)
    read = made(tmp_path, weight, scaling_mode=mode, block_size=block_size, weight_scale="mse")
    _, absmax_scales = reference(weight, block)
    scales, codes = read["weight_scale"].reshape(absmax_scales.shape), read["weight"]
    for i, j in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
        part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        wide = weight[part].float()
        assert_same_bits(codes[part].clone(), (wide / scales[i, j]).clamp(-448, 448).to(E4M3FN))
        magnitudes = wide.abs().double().numpy().reshape(-1)
        ours = squared_error(magnitudes, np.ones_like(magnitudes), float(scales[i, j]))
        start = float(absmax_scales[i, j])
        scales_tried = (start, *np.linspace(start / 2, start * 2, 60))
        grid = [squared_error(magnitudes, np.ones_like(magnitudes), tried) for tried in scales_tried]
        binned = (dtype, mode) == (torch.float32, "tensor")  # to bfloat16 for the search
        tolerance = 1.003 if binned else 1.000001
        assert ours <= min(grid) * tolerance


# the file


def model(build) -> dict:
    """A little of everything, named so that no family fits."""
    generator = np.random.default_rng(0)

    def linear(rows: int, columns: int) -> tuple[str, np.ndarray]:
        return "BF16", build.to_bfloat16(generator.normal(0, 0.05, (rows, columns)))

    return {
        "blocks.0.attn.qkv.weight": linear(48, 16),
        "blocks.0.attn.qkv.bias": ("BF16", build.to_bfloat16(np.ones(48))),
        "blocks.0.mlp.weight": linear(32, 32),
        "blocks.0.norm.weight": np.ones(16, np.float32),
        "blocks.0.narrow.weight": linear(24, 16),
        "blocks.0.conv.weight": np.ones((16, 16, 3, 3), np.float16),
        "blocks.0.empty.weight": ("BF16", np.zeros((0, 16), np.uint16)),
        "img_in.weight": linear(16, 16),
        "ids": np.arange(3),
    }


CONVERTED = ["blocks.0.attn.qkv", "blocks.0.mlp"]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "net.", "transformer."])
def test_the_file_is_what_comfyui_expects(tmp_path, save, build, prefix):
    tensors = {prefix + name: tensor for name, tensor in model(build).items()}
    source, output = save("in.safetensors", tensors, {"modelspec.title": "x", "ä": "ö"}), tmp_path / "out.safetensors"
    converted(source, output)
    names = [prefix + name for name in CONVERTED]
    read = safetensors.torch.load_file(output)
    for name in names:
        weight, scale = read[f"{name}.weight"], read[f"{name}.weight_scale"]
        assert (weight.dtype, weight.shape) == (E4M3FN, tensors[f"{name}.weight"][1].shape)
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        mark = read[f"{name}.comfy_quant"]
        assert (mark.dtype, json.loads(mark.numpy().tobytes())) == (torch.uint8, {"format": "float8_e4m3fn"})
    new = {f"{name}.{key}" for name in names for key in ("weight_scale", "comfy_quant")}
    assert read.keys() == tensors.keys() | new
    before, after = contents(source), contents(output)
    for name in before.keys() - {f"{name}.weight" for name in names}:
        assert after[name] == before[name], "byte-identical"
    with safetensors.safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["_quantization_metadata"]) == {
        "format_version": "1.0", "layers": {name: {"format": "float8_e4m3fn"} for name in names}}  # fmt: skip
    assert (metadata["modelspec.title"], metadata["ä"]) == ("x", "ö")
    said = json.loads(metadata[PROVENANCE_KEY])
    assert said["convert"]["family"] == "generic"
    assert said["convert"]["scaling_mode"] == "tensor"
    with open_checkpoint(output) as checkpoint:
        table = find_layers(checkpoint)
        assert list(table.quantized) == names
        assert {layer.marking for layer in table.quantized.values()} == {"header"}
        assert table.notes == []


def test_how_a_file_was_made_keeps_earlier_steps_and_room_for_later_ones(tmp_path, save, build):
    before = {PROVENANCE_KEY: json.dumps({"calibrate": {"seed": 1}, "convert": "older"})}
    output = tmp_path / "out.safetensors"
    converted(save("in.safetensors", model(build), before), output)
    with open_checkpoint(output) as checkpoint:
        text = checkpoint.metadata[PROVENANCE_KEY]
    assert json.loads(text)["calibrate"] == {"seed": 1}
    assert json.loads(text)["convert"]["family"] == "generic"
    names_listed = json.dumps(CONVERTED)
    assert len(text) - len(text.rstrip()) >= 1024 + len(names_listed) - 4  # a calibration lists layers
    for strange in ("{", "[1]", "null"):
        assert json.loads(provenance({PROVENANCE_KEY: strange}, convert=3))["convert"] == 3


def test_legacy_files_have_the_older_spelling_and_a_marker(tmp_path, save, build):
    tensors = {"model.diffusion_model." + name: tensor for name, tensor in model(build).items()}
    output = tmp_path / "out.safetensors"
    converted(save("in.safetensors", tensors), output, legacy=True)
    read = safetensors.torch.load_file(output)
    marker = read["model.diffusion_model.scaled_fp8"]
    assert (marker.dtype, marker.numel()) == (E4M3FN, 0)
    assert not [name for name in read if "comfy_quant" in name or "weight_scale" in name or "input_scale" in name]
    for name in CONVERTED:
        assert read[f"model.diffusion_model.{name}.scale_weight"].shape == ()
        assert read[f"model.diffusion_model.{name}.scale_input"].item() == 1.0
    with open_checkpoint(output) as checkpoint:
        assert "_quantization_metadata" not in checkpoint.metadata
        table = find_layers(checkpoint)
        assert {layer.marking for layer in table.quantized.values()} == {"legacy"}
        assert not disables_fp8(table.marks.legacy.marker)


def test_input_scales_can_be_left_out_of_legacy_files(tmp_path, save, build):
    converted(save("in.safetensors", model(build)), tmp_path / "out", legacy=True, input_scale=False)
    assert not [name for name in contents(tmp_path / "out") if name.endswith(".scale_input")]


def test_shards_become_shards_or_one_file(tmp_path, save_shards, build):
    tensors = model(build)
    names = list(tensors)
    shards = [{name: tensors[name] for name in part} for part in (names[:2], names[2:])]
    source = save_shards("in", shards, {"k": "v"})
    converted(source, tmp_path / "out.safetensors.index.json")
    converted(source, tmp_path / "one.safetensors")
    sharded, one = (open_checkpoint(tmp_path / name) for name in ("out.safetensors.index.json", "one.safetensors"))
    with sharded, one:
        assert len(sharded.files) == 2
        assert all(sharded.path_of(f"{name}.weight_scale") == sharded.path_of(f"{name}.weight") for name in CONVERTED)
        assert (contents(sharded.path), sharded.metadata) == (contents(one.path), one.metadata)


# which layers


def reasons(source: Path, **options) -> dict[str, str]:
    with open_checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions(**options))
    return {decision.layer.name: "" if decision.format else decision.reason for decision in plan.decisions}


def test_every_layer_that_stays_has_its_reason(save, build):
    weight = ("BF16", np.zeros((16, 16), np.uint16))
    more = {"model.diffusion_model." + name: tensor for name, tensor in model(build).items()}
    others = {"text_encoders.t5.blocks.0.q.weight": weight, "first_stage_model.layers.0.weight": weight,
              "surprise.blocks.0.weight": weight}  # fmt: skip
    found = reasons(save("in.safetensors", more | others), exclude=("mlp$",))
    bare = {name.removeprefix("model.diffusion_model."): reason for name, reason in found.items()}
    assert bare == {
        "blocks.0.attn.qkv": "",
        "blocks.0.mlp": "excluded by 'mlp$'",
        "blocks.0.narrow": "24 × 16: FP8 needs dimensions that are multiples of 16",
        "blocks.0.empty": "has no elements",
        "img_in": IMAGE,
        "text_encoders.t5.blocks.0.q": "part of a text encoder",
        "first_stage_model.layers.0": "part of a VAE",
        "surprise.blocks.0": "outside the diffusion model",
    }


def test_a_family_is_detected_or_forced_by_a_preset(save, build):
    weight = ("BF16", np.zeros((16, 16), np.uint16))
    names = ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.lin", "img_in", "txt_in", "time_in.in_layer",
             "vector_in.in_layer", "final_layer.linear"]  # fmt: skip
    path = save("in.safetensors", {f"{name}.weight": weight for name in names})
    with open_checkpoint(path) as checkpoint:
        detected = plan_conversion(checkpoint, ConvertOptions())
        forced = plan_conversion(checkpoint, ConvertOptions(preset="wan"))
        assert (detected.family.name, forced.family.name) == ("flux1", "wan")
        assert [layer.name for layer, _ in detected.quantized] == names[:2]
        assert forced.quantized == []
        with pytest.raises(OptionError, match="sdxxl"):
            plan_conversion(checkpoint, ConvertOptions(preset="sdxxl"))


def test_an_unknown_model_is_noted(save, build):
    with open_checkpoint(save("in.safetensors", model(build))) as checkpoint:
        assert plan_conversion(checkpoint, ConvertOptions()).notes == [
            "the tensor names match no known model family; repeated blocks by their structure: blocks (1 × 4 layers)",
            "only 40% of the weights in repeated blocks would be quantized; the rest stays in high precision "
            "(24 × 16: FP8 needs dimensions that are multiples of 16)",
        ]


# inputs that are quantized in part


def test_layers_that_are_fp8_already_stay_byte_identical_and_keep_their_marks(tmp_path, save, build):
    done, metadata = build.quantized(
        ["blocks.1.a", "blocks.1.b"], "header", input_scale=0.5, full_precision_matrix_mult=True
    )
    more, _ = build.quantized(["blocks.1.c"], "tensor")
    raw = {"blocks.1.raw.weight": ("F8_E4M3", np.zeros((16, 16), np.uint8))}
    foreign = {
        "blocks.1.nvfp4.weight": np.zeros((16, 8), np.uint8),
        "blocks.1.nvfp4.weight_scale": ("F8_E4M3", np.zeros((128, 4), np.uint8)),
        "blocks.1.nvfp4.weight_scale_2": np.float32(1),
    }
    source = save("in.safetensors", model(build) | done | more | raw | foreign, metadata)
    output = tmp_path / "out.safetensors"
    converted(source, output)
    assert contents(output).items() >= {name: contents(source)[name] for name in (*done, *more, *raw, *foreign)}.items()
    with open_checkpoint(source) as before, open_checkpoint(output) as after:
        old, new = find_layers(before), find_layers(after)
        there = ["blocks.1.a", "blocks.1.b", "blocks.1.c", "blocks.1.raw", "blocks.1.nvfp4"]  # a cast gets a scale
        assert {*new.quantized} == {*CONVERTED, *there}
        for name in ("blocks.1.a", "blocks.1.b", "blocks.1.c"):
            assert (new.quantized[name].config, new.quantized[name].full_precision) == (
                old.quantized[name].config, old.quantized[name].full_precision)  # fmt: skip
        assert (list(old.raw), list(new.raw)) == (["blocks.1.raw"], [])
        notes = plan_conversion(before, ConvertOptions()).notes
    assert notes[-1] == (
        "layers that are already quantized are copied unchanged: 4 in FP8 and NVFP4; --requantize quantizes them again"
    )


MARKS = "has quantization configs"
SPELLINGS = [
    ("legacy", {"scaled_fp8": ("F8_E4M3", np.zeros(0, np.uint8))}, "is a legacy scaled_fp8 file", "add"),
    ("tensor", {}, f"{MARKS} (blocks.1.a.comfy_quant)", "drop"),
    ("header", {}, f"{MARKS} (_quantization_metadata)", "drop"),
]


@pytest.mark.parametrize(("marking", "marker", "found", "do"), SPELLINGS)
def test_one_file_cannot_hold_both_spellings_of_which_comfyui_would_drop_one(save, build, marking, marker, found, do):
    marked, metadata = build.quantized(["blocks.1.a"], marking)
    with open_checkpoint(save("in.safetensors", model(build) | marked | marker, metadata)) as checkpoint:
        with pytest.raises(OptionError) as caught:
            plan_conversion(checkpoint, ConvertOptions(legacy=not marker))
        assert len(plan_conversion(checkpoint, ConvertOptions(legacy=bool(marker))).quantized) == 2
    assert str(caught.value) == f"the input {found}, and one file cannot use both conventions ({do} --legacy)"


def test_a_legacy_file_is_completed_under_the_marker_that_it_has(tmp_path, save, build):
    legacy, _ = build.quantized(["blocks.1.a"], "legacy")
    marker = ("F8_E4M3", np.uint8([7]))
    source = save("in.safetensors", model(build) | legacy | {"scaled_fp8": marker})
    converted(source, tmp_path / "out.safetensors", legacy=True)
    with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        table = find_layers(checkpoint)
        assert {layer.marking for layer in table.quantized.values()} == {"legacy"}
        assert len(table.quantized) == 3
        assert checkpoint.raw("scaled_fp8").tobytes() == b"\7"


@pytest.mark.parametrize("stray", ["weight_scale", "input_scale", "comfy_quant"])
def test_a_stray_scale_beside_a_weight_in_high_precision_is_refused(tmp_path, save, build, stray):
    content = build.mark(format="banana") if stray == "comfy_quant" else np.float32(1)
    source = save("in.safetensors", model(build) | {f"{CONVERTED[0]}.{stray}": content})
    if stray == "comfy_quant":  # marked as foreign: left alone
        converted(source, tmp_path / "out.safetensors")
        return
    with pytest.raises(TensorError, match=f"{CONVERTED[0]}.{stray}: the input already has a tensor of this name"):
        converted(source, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


# what is refused


@pytest.mark.parametrize("done", [False, True])
def test_a_conversion_of_nothing_is_refused_and_told_of_calibration_where_that_is_possible(tmp_path, save, build, done):
    source = save("in.safetensors", *build.quantized([CONVERTED[0]] if done else [], "tensor"))
    more = "; --actcal calibrates the existing FP8 layers" if done else ""
    with pytest.raises(OutputError) as caught:
        converted(source, tmp_path / "out.safetensors")
    assert str(caught.value) == (
        f"{source}: nothing to convert: no layer would become FP8 (--dry-run shows the reason for each layer{more})"
    )


def test_the_input_is_refused_as_output_also_as_a_shard(tmp_path, save, save_shards, build):
    source = save("in.safetensors", model(build))
    index = save_shards("m", [model(build)])
    shard, other = tmp_path / "m-00001-of-00001.safetensors", tmp_path / "other.safetensors.index.json"
    before = source.read_bytes(), shard.read_bytes()
    for path, output, same in ((source, source, source), (index, shard, shard), (other, index, shard)):
        if path == other:
            index.rename(other)
        with pytest.raises(OutputError) as caught:
            converted(path, output)
        assert str(caught.value) == f"{same}: the output is the same file as the input {same}"
    assert (source.read_bytes(), shard.read_bytes()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int8", "scaling_mode": "row"}, "--scaling-mode is for fp8; int8 has its own scaling"),
        ({"format": "int8", "legacy": True}, "legacy files support fp8 only"),
        ({"format": "fp8-row", "legacy": True}, "legacy files support fp8 only"),
        ({"block_size": 65536}, "--block-size should be at least 1 and below 65536, found 65536"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError) as caught:
        ConvertOptions(**options)
    assert str(caught.value).startswith(message)


def test_both_ways_to_ask_for_fp8_rows_are_one():
    assert ConvertOptions(format="fp8-row").record is ConvertOptions(scaling_mode="row").record


def test_where_readers_scale_inputs_there_is_nothing_to_calibrate_which_is_said(tmp_path, save, build, capsys):
    source, out = save("in.safetensors", model(build)), str(tmp_path / "out.safetensors")
    assert main(["-i", str(source), "-o", out, "--format", "int8", "--actcal"]) == 0
    assert "note: nothing to calibrate: readers of INT8 layers scale inputs dynamically\n" in capsys.readouterr().err
    before = Path(out).read_bytes()
    for target in (["--in-place"], ["-o", str(tmp_path / "more.safetensors")]):
        assert main(["-i", out, "--actcal", *target]) == 1
        nothing = "nothing to calibrate: readers of its INT8 layers scale inputs dynamically"
        assert capsys.readouterr().err.startswith(f"error: {out}: {nothing} (convert_to_quant inspect out.safetensors")
    assert Path(out).read_bytes() == before


def test_a_calibration_may_change_the_output_before_it_has_its_name_or_prevent_it(tmp_path, save, build):
    source, output = save("in.safetensors", model(build)), tmp_path / "out.safetensors"

    def calibrate(writer) -> None:
        assert not output.exists()
        with writer.reopen(source) as checkpoint:
            info = checkpoint.tensors["blocks.0.mlp.weight_scale"]
            file = checkpoint.file_of(info.name)
            writer.overwrite(0, file.header.data_start + info.start, np.float32(0.125).tobytes())

    def fail(writer) -> None:
        raise Error("no")

    with open_checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions())
        with pytest.raises(Error, match="no"):
            convert(checkpoint, plan, output, before_commit=fail)
        assert not output.exists()
        convert(checkpoint, plan, output, before_commit=calibrate)
    assert safetensors.torch.load_file(output)["blocks.0.mlp.weight_scale"].item() == 0.125


def test_progress_adds_up_to_the_bytes_of_the_input(tmp_path, save, build):
    done = []
    with open_checkpoint(save("in.safetensors", model(build))) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions())
        convert(checkpoint, plan, tmp_path / "out.safetensors", progress=done.append)
        assert sum(done) == sum(info.nbytes for info in checkpoint.tensors.values())
