"""Quantized layers, in every convention and with every kind of scale."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.errors import CheckpointError, TensorError
from convert_to_quant.formats.fp8 import E4M3FN, E5M2
from convert_to_quant.formats.record import Grid
from convert_to_quant.layers import dequantize, find_layers, infer_block, input_scale, scale_grid, scales_per_row
from convert_to_quant.marks import disables_fp8

PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "net.", "transformer."]
LEGACY_MARKER = ("F8_E4M3", np.zeros(0, np.uint8))


def table_of(path, **options):
    with open_checkpoint(path) as checkpoint:
        return find_layers(checkpoint, **options)


def refused(path) -> str:
    """The error for a file's layers, without the file's name."""
    with pytest.raises(CheckpointError) as caught:
        table_of(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


# marks


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize(
    ("marking", "found"), [("tensor", "tensor"), ("header", "header"), ("both", "header"), ("none", "none")]
)
def test_every_marking_is_found_under_every_prefix_in_both_formats(*, save, build, marking, found, prefix, dtype):
    names = [f"{prefix}blocks.{i}.linear" for i in range(2)]
    tensors, metadata = build.quantized(names, marking, dtype=dtype, input_scale=0.25)
    tensors[f"{names[0]}.bias"] = np.zeros(16, np.float32)
    path = save("a.safetensors", tensors, metadata)
    table = table_of(path)
    assert table.prefix == prefix
    assert list(table.quantized) == names
    layer = table.quantized[names[0]]
    assert (layer.marking, layer.format.grid) == (found, E4M3FN if dtype == "F8_E4M3" else E5M2)
    assert (layer.out_features, layer.in_features, layer.granularity) == (16, 32, "tensor")
    assert layer.weight_scale == names[0] + ".weight_scale"
    assert layer.input_scale == names[0] + ".input_scale"
    assert (layer.bias, table.quantized[names[1]].bias) == (names[0] + ".bias", None)
    assert (layer.name in table.marks.tensor) == (marking in ("tensor", "both"))
    assert (layer.full_precision, layer.dynamic) == (False, False)
    assert not table.raw
    assert not table.plain
    assert not table.foreign
    with open_checkpoint(path) as checkpoint:
        assert input_scale(checkpoint, layer) == 0.25


def test_scales_without_any_mark_are_noted_because_comfyui_ignores_them(save, build):
    table = table_of(save("a.safetensors", *build.quantized(["x", "y"], "none")))
    assert table.notes == [
        "2 FP8 layers with scales but without quantization config (first: x): ComfyUI ignores the scales"
    ]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("elements", "full_precision"), [(0, False), (1, False), (2, True)])
def test_a_legacy_marker_of_two_elements_means_full_precision(save, build, elements, full_precision, prefix):
    tensors, _ = build.quantized([prefix + "x"], "legacy", input_scale=2.0)
    tensors[prefix + "scaled_fp8"] = ("F8_E4M3", np.zeros(elements, np.uint8))
    table = table_of(save("a.safetensors", tensors))
    layer = table.quantized[prefix + "x"]
    assert table.marks.legacy.marker is not None
    assert (layer.marking, layer.full_precision, disables_fp8(table.marks.legacy.marker)) == (
        "legacy",
        full_precision,
        full_precision,
    )
    assert layer.weight_scale == prefix + "x.scale_weight"
    assert layer.input_scale == prefix + "x.scale_input"


def test_legacy_scales_without_the_marker_have_no_mark(save, build):
    table = table_of(save("a.safetensors", build.quantized(["x"], "legacy")[0]))
    assert table.quantized["x"].marking == "none"
    assert table.marks.legacy.marker is None


def test_legacy_files_are_always_read_as_e4m3fn_so_e5m2_is_refused(save, build):
    tensors, _ = build.quantized(["x"], "legacy", dtype="F8_E5M2")
    path = save("a.safetensors", tensors | {"scaled_fp8": LEGACY_MARKER})
    assert refused(path) == (
        "x.weight: legacy scaled_fp8 files are always read as float8_e4m3fn, but this is float8_e5m2 "
        "(convert the original again)"
    )


@pytest.mark.parametrize("content", [b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}', b"rubbish"])
def test_the_header_wins_over_a_tensor_that_need_not_even_be_json(save, build, content):
    tensors, metadata = build.quantized(["x"], "header")
    tensors["x.comfy_quant"] = np.frombuffer(content, np.uint8)
    layer = table_of(save("a.safetensors", tensors, metadata)).quantized["x"]
    assert (layer.marking, layer.full_precision) == ("header", False)


def test_every_marker_is_about_the_names_that_begin_as_its_own(save, build):
    names = ["model.diffusion_model.x", "text_encoders.t5xxl.x"]
    tensors, _ = build.quantized(names, "legacy")
    tensors["text_encoders.t5xxl.scaled_fp8"] = ("F8_E4M3", np.zeros(2, np.uint8))
    tensors["model.diffusion_model.scaled_fp8"] = LEGACY_MARKER
    table = table_of(save("a.safetensors", tensors))
    assert [table.quantized[name].full_precision for name in names] == [False, True]
    assert table.marks.legacy.marker is not None
    assert table.marks.legacy.marker.name == "model.diffusion_model.scaled_fp8"
    assert not disables_fp8(table.marks.legacy.marker)
    del tensors["model.diffusion_model.scaled_fp8"]
    table = table_of(save("a.safetensors", tensors))
    assert [table.quantized[name].marking for name in names] == ["none", "legacy"]
    table = table_of(
        save("a.safetensors", tensors | {"scaled_fp8": LEGACY_MARKER})
    )  # of all names, unless one is nearer
    assert [table.quantized[name].full_precision for name in names] == [False, True]


def test_a_marker_beside_comfy_quant_loses(save, build):
    tensors, _ = build.quantized(["x"], "tensor")
    table = table_of(save("a.safetensors", tensors | {"scaled_fp8": ("F8_E4M3", np.zeros(2, np.uint8))}))
    assert (table.quantized["x"].marking, table.quantized["x"].full_precision) == ("tensor", False)


def test_a_header_may_name_layers_bare_in_a_prefixed_file(save, build):
    tensors, _ = build.quantized(["diffusion_model.x"], "none")
    header = {"layers": {"x": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}}}
    table = table_of(save("a.safetensors", tensors, {"_quantization_metadata": json.dumps(header)}))
    layer = table.quantized["diffusion_model.x"]
    assert (layer.marking, layer.full_precision) == ("header", True)
    assert table.marks.header.bare("diffusion_model.x")


def test_a_header_that_names_a_layer_as_the_file_does_means_that_layer(save, build):
    names = ["net.x", "net.net.x"]
    tensors, metadata = build.quantized(names[:1], "header")
    table = table_of(save("a.safetensors", tensors | build.quantized(names[1:], "none")[0], metadata))
    assert [table.quantized[name].marking for name in names] == ["header", "none"]


def test_header_layers_without_a_weight_are_noted_in_the_headers_order(save, build):
    tensors, _ = build.quantized(["x"], "tensor")
    header = {"layers": {name: {"format": "float8_e4m3fn"} for name in ("z", "b", "y", "a")}}
    table = table_of(save("a.safetensors", tensors, {"_quantization_metadata": json.dumps(header)}))
    assert table.notes == [
        f"{name}: declared as quantized in the header, but its weight is missing" for name in ("z", "b", "y", "a")
    ]


def test_a_mixed_file_is_sorted_into_all_kinds(save, build):
    tensors = {}
    metadata = {}
    for name, marking in (("header", "header"), ("tensor", "tensor"), ("unmarked", "none"), ("old", "legacy")):
        more, meta = build.quantized([name], marking)
        tensors |= more
        metadata |= meta
    tensors |= {
        "raw.weight": ("F8_E4M3", np.zeros((4, 4), np.uint8)),
        "bf16.weight": ("BF16", np.zeros((4, 8), np.uint16)),
        "f16.weight": np.zeros((4, 8), np.float16),
        "f32.weight": np.zeros((4, 8), np.float32),
        "norm.weight": np.zeros(4, np.float32),
        "convolution.weight": np.zeros((4, 4, 3, 3), np.float32),
        "scalar.weight": np.float32(1),
        "ids.weight": np.zeros((4, 4), np.int64),
        "int8.weight": np.zeros((4, 4), np.int8), "int8.weight_scale": np.zeros((4, 1), np.float32),
        "int8.comfy_quant": build.mark(format="int8_tensorwise"),
        "nvfp4.weight": np.zeros((16, 8), np.uint8), "nvfp4.weight_scale": ("F8_E4M3", np.zeros((128, 4), np.uint8)),
        "nvfp4.weight_scale_2": np.float32(1), "nvfp4.comfy_quant": build.mark(format="nvfp4"),
        "mxfp8.weight": ("F8_E4M3", np.zeros((16, 32), np.uint8)),
        "mxfp8.weight_scale": np.zeros((128, 4), np.uint8), "mxfp8.comfy_quant": build.mark(format="mxfp8"),
        "bare_mxfp8.weight": ("F8_E4M3", np.zeros((16, 32), np.uint8)),
        "bare_mxfp8.weight_scale": ("F8_E8M0", np.zeros((128, 4), np.uint8)),
        "awq.weight": np.zeros((16, 8), np.int8), "awq.weight_scale": np.ones((1, 16), np.float16),
        "awq.weight_zeros": np.ones((1, 16), np.float16), "awq.comfy_quant": build.mark(format="awq_w4a16"),
        "banana.weight": np.zeros((4, 4), np.float16), "banana.comfy_quant": build.mark(format="banana"),
        "bare_int8.weight": np.zeros((4, 4), np.int8), "bare_int8.weight_scale": np.float32(1),
        "three.weight": ("F8_E4M3", np.zeros((2, 3, 4), np.uint8)), "three.weight_scale": np.float32(1),
        "cast_norm.weight": ("F8_E4M3", np.zeros(4, np.uint8)),
        "cast_convolution.weight": ("F8_E4M3", np.zeros((4, 4, 3, 3), np.uint8)),
        "scaled_fp8": LEGACY_MARKER,
    }  # fmt: skip
    table = table_of(save("a.safetensors", tensors, metadata))
    assert {name: layer.marking for name, layer in table.quantized.items()} == {
        "header": "header", "tensor": "tensor", "unmarked": "none", "old": "legacy", "int8": "tensor",
        "bare_int8": "none", "nvfp4": "tensor", "mxfp8": "tensor", "bare_mxfp8": "none"}  # fmt: skip
    assert {name: (layer.marking, layer.format.grid) for name, layer in table.raw.items()} == {"raw": ("raw", E4M3FN)}
    assert list(table.plain) == ["bf16", "f16", "f32"]
    assert all(layer.marking == "plain" and layer.format is None for layer in table.plain.values())
    assert {name: layer.form for name, layer in table.foreign.items()} == {
        "awq": "awq_w4a16", "banana": "banana",
        "three": "float8_e4m3fn, 3-dimensional"}  # fmt: skip
    assert [layer.name for layer in table.linear()] == [*table.quantized, *table.raw, *table.plain]


@pytest.mark.parametrize("name", ["float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "float8_e4m3fn_block3d"])
def test_formats_of_other_nodes_are_fp8_whose_inputs_are_scaled_as_they_come(save, build, name):
    tensors, _ = build.quantized(["x"], "none")
    table = table_of(save("a.safetensors", tensors | {"x.comfy_quant": build.mark(format=name)}))
    assert table.quantized["x"].dynamic


def test_layers_of_shards_are_found_and_named_in_errors_by_their_shard(save_shards, build, tmp_path):
    (first, metadata), (second, _) = build.quantized(["x"], "tensor"), build.quantized(["y"], "tensor")
    assert list(table_of(save_shards("m", [first, second], metadata)).quantized) == ["x", "y"]
    second["y.weight_scale"] = np.float32(np.nan)
    with pytest.raises(TensorError) as caught:
        table_of(save_shards("m", [first, second], metadata))
    assert caught.value.path == tmp_path / "m-00002-of-00002.safetensors"


# what is wrong with a file

BAD_MARKS = {
    "not JSON": (b"{format", "x.comfy_quant: not JSON (Expecting property name"),
    "empty": (b"", "x.comfy_quant: it is empty"),
    "zeros": (bytes(64), "x.comfy_quant: all of its 64 bytes are 0"),
    "a list": (b"[1]", "x.comfy_quant: should be a JSON object, found b'[1]'"),
    "without a format": (b'{"a": 1}', 'x: its quantization config names no format: {"a": 1}'),
    "the other FP8 format": (
        b'{"format": "float8_e5m2"}', "x.weight: declared as float8_e5m2, but stored as F8_E4M3"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_MARKS.values(), ids=BAD_MARKS)
def test_a_bad_comfy_quant_is_refused_by_name(save, build, content, message):
    tensors, _ = build.quantized(["x"], "none")
    tensors["x.comfy_quant"] = np.frombuffer(content, np.uint8)
    assert refused(save("a.safetensors", tensors)).startswith(message)


BAD_HEADERS = {
    "not JSON": ("{", "not JSON (Expecting property name"),
    "a list": ("[]", '"layers" should map layer names to objects'),
    "layers of strings": ('{"layers": {"x": "float8_e4m3fn"}}', '"layers" should map layer names to objects'),
}


@pytest.mark.parametrize(("text", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_bad_header_entry_is_refused_by_name(save, build, text, message):
    path = save("a.safetensors", build.quantized(["x"], "none")[0], {"_quantization_metadata": text})
    assert refused(path).startswith(f"_quantization_metadata: {message}")


@pytest.mark.parametrize("marking", ["tensor", "header"])
def test_a_marked_layer_without_weight_scale_is_refused(save, build, marking):
    tensors, metadata = build.quantized(["x"], marking)
    del tensors["x.weight_scale"]
    path = save("a.safetensors", tensors, metadata)
    assert refused(path) == "x: declared as float8_e4m3fn, but .weight_scale is missing (convert it again)"


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (np.float32(np.nan), "scales should be finite and not negative, found nan"),
        (np.float32(np.inf), "scales should be finite and not negative, found inf"),
        (np.float32(-0.5), "scales should be finite and not negative, found -0.5"),
        (np.float64(1e300), "scales should be finite and not negative, found inf"),
        (("BF16", np.uint16(0x7F80)), "scales should be finite and not negative, found inf"),
        (np.int32(1), "a scale should be float32, found I32"),
        (("F8_E4M3", np.uint8(56)), "a scale should be float32, found F8_E4M3"),
    ],
)
@pytest.mark.parametrize("key", ["weight_scale", "input_scale"])
def test_a_bad_scale_is_refused_by_name_an_input_scale_only_where_it_is_used(save, build, key, scale, message):
    tensors, _ = build.quantized(["x"], "tensor")
    path = save("a.safetensors", tensors | {f"x.{key}": scale})
    said = refused(path) if key == "weight_scale" else refused_input_scale(path)
    assert said == f"x.{key}: {message}"


@pytest.mark.parametrize("shape", [(0,), (3,), (32,), (16, 33), (17, 1), (0, 1), (16, 2, 2), (2, 3, 5, 7), (16, 0)])
def test_a_weight_scale_that_fits_no_rule_is_refused(save, build, shape):
    tensors, _ = build.quantized(["x"], "tensor")
    path = save("a.safetensors", tensors | {"x.weight_scale": np.ones(shape, np.float32)})
    assert refused(path) == (
        f"x.weight_scale: a weight scale of shape {list(shape)} does not fit a weight of shape [16, 32]; "
        "expected one value, one per row, or one per block"
    )


def refused_input_scale(path) -> str:
    """The error for the input scale of layer x, which find_layers has noted."""
    with open_checkpoint(path) as checkpoint:
        table = find_layers(checkpoint)
        with pytest.raises(CheckpointError) as caught:
            input_scale(checkpoint, table.quantized["x"])
    said = str(caught.value).removeprefix(f"{path}: ")
    assert table.notes == [f"{said}: unusable until a calibration replaces it"]
    return said


@pytest.mark.parametrize("shape", [(0,), (2,), (16,)])
def test_an_input_scale_of_several_values_is_refused(save, build, shape):
    tensors, _ = build.quantized(["x"], "tensor")
    path = save("a.safetensors", tensors | {"x.input_scale": np.ones(shape, np.float32)})
    assert refused_input_scale(path) == f"x.input_scale: expected one value, found shape {list(shape)}"


def test_problems_can_be_collected_so_that_the_rest_is_still_found(save, build):
    tensors, _ = build.quantized(["good", "bad", "worse"], "tensor")
    tensors["bad.weight_scale"] = np.float32(np.nan)
    tensors["worse.comfy_quant"] = np.frombuffer(b"{", np.uint8)
    path = save("a.safetensors", tensors, {"_quantization_metadata": "{"})
    table = table_of(path, collect_problems=True)
    assert list(table.quantized) == ["good"]
    assert [error.tensor for error in table.problems] == [
        "_quantization_metadata", "bad.weight_scale", "worse.comfy_quant"]  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 32), (16, 0), (0, 0)])
@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_a_weight_of_no_elements_is_a_layer_all_the_same(save, build, shape, scale_shape):
    tensors, _ = build.quantized(["x"], "tensor", shape=shape)
    path = save("a.safetensors", tensors | {"x.weight_scale": np.ones(scale_shape, np.float32)})
    with open_checkpoint(path) as checkpoint:
        layer = find_layers(checkpoint).quantized["x"]
        assert layer.granularity == "tensor"
        assert dequantize(checkpoint, layer).shape == shape


# scales: which block a shape means, and what the weight then is

SHAPES = [
    # weight, scale, said, block
    ((16, 32), (), None, (16, 32)),
    ((16, 32), (1,), None, (16, 32)),
    ((16, 32), (1, 1), None, (16, 32)),
    ((16, 32), (16,), None, (1, 32)),
    ((16, 32), (16, 1), None, (1, 32)),
    ((1, 32), (1,), None, (1, 32)),
    ((16, 32), (2, 4), None, (8, 8)),
    ((128, 256), (2, 4), None, (64, 64)),
    ((256, 384), (2, 3), None, (128, 128)),  # DeepSeek
    ((100, 64), (2, 1), None, (64, 64)),  # ragged edge, and a block larger than the weight is wide
    ((100, 130), (2, 3), None, (64, 64)),
    ((130, 100), (3, 2), None, (64, 64)),
    ((300, 200), (3, 2), None, (128, 128)),
    ((48, 256), (1, 4), None, (64, 64)),
    ((128, 96), (2, 3), None, (64, 32)),  # not square
    ((16, 96), (4, 2), None, (4, 48)),  # an exact divisor before a power of two
    ((16, 32), (16, 4, 1), None, (1, 8)),  # kohya: n groups per row
    ((16, 30), (16, 5, 1), None, (1, 6)),
    ((16, 32), (16, 1, 1), None, (1, 32)),
    ((16, 32), (16, 4), None, (1, 8)),
    ((16, 32), (1, 4), None, (16, 8)),
    ((16, 32), (4, 1), None, (4, 32)),
    ((100, 100), (2, 2), (50, 50), (50, 50)),  # the file's own word before a power of two
    ((100, 100), (2, 2), (51, 99), (51, 99)),
    ((100, 100), (2, 2), (33, 33), (64, 64)),  # a word that contradicts the shape counts for nothing
    ((65, 65), (2, 2), None, (64, 64)),  # blocks of 32 would be 3
    ((101, 7), (3, 7), None, None),  # 34 to 50 rows each: nothing decides
    ((16, 32), (3,), None, None),
    ((16, 32), (17, 1), None, None),
    ((16, 32), (0, 1), None, None),
]


@pytest.mark.parametrize(("weight", "scale", "said", "block"), SHAPES, ids=map(str, SHAPES))
def test_the_block_follows_from_the_shapes(weight, scale, said, block):
    assert infer_block(weight, scale, said) == block


@given(
    out_features=st.integers(1, 300), in_features=st.integers(1, 300), block_out=st.integers(1, 320),
    block_in=st.integers(1, 320),
)  # fmt: skip
def test_a_block_that_is_found_has_the_grid_of_the_scale_and_squares_of_a_power_of_two_are_always_found(
    out_features, in_features, block_out, block_in
):
    weight = (out_features, in_features)
    grid = (math.ceil(out_features / block_out), math.ceil(in_features / block_in))
    assert scale_grid(weight, (block_out, block_in)) == grid
    found = infer_block(weight, grid)
    assert found is None or scale_grid(weight, found) == grid
    assert scale_grid(weight, infer_block(weight, grid, (block_out, block_in)) or (0, 0)) == grid
    side = 1 << block_out.bit_length()
    assert infer_block(weight, scale_grid(weight, (side, side))) is not None


def brute_force(codes: np.ndarray, grid: Grid, scales: np.ndarray, block: tuple[int, int]) -> list[list[float]]:
    """Real weights, computed element by element."""
    meanings = grid.values
    return [
        [float(meanings[code] * scales[i // block[0]][j // block[1]]) for j, code in enumerate(row)]
        for i, row in enumerate(codes)
    ]


DEQUANTIZED = [(weight, scale, block) for weight, scale, said, block in SHAPES if block and said is None]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize(("shape", "scale_shape", "block"), DEQUANTIZED, ids=map(str, DEQUANTIZED))
def test_real_weights_are_codes_times_scales_as_loops_compute_them(*, save, build, shape, scale_shape, block, dtype):
    tensors, _ = build.quantized(["x"], "tensor", shape=shape, dtype=dtype)
    scale = np.random.default_rng(0).uniform(0.001, 2, scale_shape).astype(np.float32)
    path = save("a.safetensors", tensors | {"x.weight_scale": scale})
    with open_checkpoint(path) as checkpoint:
        layer = find_layers(checkpoint).quantized["x"]
        assert layer.block == block
        grid = scale.reshape(math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
        expected = np.float32(brute_force(tensors["x.weight"][1], layer.format.grid, grid, block))
        np.testing.assert_array_equal(dequantize(checkpoint, layer), expected)
        for rows in (slice(0, 1), slice(3, 11), slice(shape[0] - 1, None), slice(5, 5)):
            np.testing.assert_array_equal(dequantize(checkpoint, layer, rows), expected[rows])
            spread = scales_per_row(scale, layer, rows)
            assert spread.shape in ((len(expected[rows]), 1), expected[rows].shape)


@pytest.mark.parametrize("scale", [np.float16(0.3), np.float64(0.3), ("BF16", np.uint16(0x3E9A))])
def test_scales_of_other_float_dtypes_are_widened(save, build, scale):
    tensors, _ = build.quantized(["x"], "tensor")
    with open_checkpoint(save("a.safetensors", tensors | {"x.weight_scale": scale})) as checkpoint:
        layer = find_layers(checkpoint).quantized["x"]
        value = checkpoint.float32("x.weight_scale")
        assert 0.299 < value < 0.302
        expected = E4M3FN.decode(tensors["x.weight"][1]) * value
        np.testing.assert_array_equal(dequantize(checkpoint, layer), expected)


@pytest.mark.parametrize(
    ("said", "block"),
    [*(({key: 50}, 50) for key in ("group_size", "block_size")), ({"block_size": [50, 50]}, 50),
     *(({"block_size": bad}, 64) for bad in (0, -1, True, "64", [64], [0, 64], None, 1.5))],
)  # fmt: skip
def test_the_block_that_a_config_declares_decides_if_it_is_one(save, build, said, block):
    tensors, _ = build.quantized(["x"], "tensor", shape=(100, 100), **said)
    table = table_of(save("a.safetensors", tensors | {"x.weight_scale": np.ones((2, 2), np.float32)}))
    assert (table.quantized["x"].block, table.quantized["x"].granularity) == ((block, block), "block")


def test_plain_and_raw_weights_mean_what_is_stored(save, build):
    values = np.float32([[1, -2.5], [0, 448]])
    tensors = {
        "bf16.weight": ("BF16", build.to_bfloat16(values)),
        "f16.weight": values.astype(np.float16),
        "f32.weight": values,
        "raw.weight": build.fp8(values),
    }
    with open_checkpoint(save("a.safetensors", tensors)) as checkpoint:
        for layer in find_layers(checkpoint).linear():
            np.testing.assert_array_equal(dequantize(checkpoint, layer), values)


@pytest.mark.parametrize("scale", [None, np.float32(0.5), np.float32([0.5]), np.float32([[0.5]])])
def test_a_missing_input_scale_is_one_as_in_comfyui(save, build, scale):
    tensors, _ = build.quantized(["x"], "tensor", input_scale=None)
    path = save("a.safetensors", tensors if scale is None else tensors | {"x.input_scale": scale})
    with open_checkpoint(path) as checkpoint:
        assert input_scale(checkpoint, find_layers(checkpoint).quantized["x"]) == (1.0 if scale is None else 0.5)
