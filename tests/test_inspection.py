"""What `inspect` finds: layers as readers see them, and every kind of problem."""

from __future__ import annotations

import json
import typing

import numpy as np
import pytest

from convert_to_quant import layers
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.checkpoint.reader import CheckpointFile
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.errors import CheckpointError
from convert_to_quant.inspection import LARGEST_INPUT_SCALE, LEAST_INPUT_SCALE, Made, inspect_file
from convert_to_quant.options import ConvertOptions
from convert_to_quant.problems import KINDS, Problem

X = "blocks.0"
FLOAT8 = {"format": "float8_e4m3fn"}


def marker(elements):
    return ("F8_E4M3", np.zeros(elements, np.uint8))


def header(**marks):
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": marks})}


def only_problem(found):
    (problem,) = found.problems
    return problem


def mark(**config):
    return bytes_of(json.dumps(config).encode())


def bytes_of(content):
    return np.frombuffer(content, np.uint8)


@pytest.fixture
def look(save, build):
    """Inspect a file of one FP8 layer, with changes: look(changes, marking, metadata, **quantized's arguments)."""

    def look(changes=(), marking="tensor", metadata=None, *, scaled=True, **settings):
        tensors, said = build.quantized([X] if scaled else [], marking, **settings)
        tensors |= dict(changes)
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return inspect_file(save("m.safetensors", tensors, said if metadata is None else metadata))

    return look


# the tables


def test_every_problem_that_layers_can_have_is_explained():
    assert set(typing.get_args(layers.ProblemKind)) <= set(KINDS)


# problems, one by one


E4M3_ONE, E4M3_128, SMALL = 0x38, 0x70, np.float32(0.01)
ROW_WISE = {"y.weight": ("F8_E4M3", np.ones((16, 32), np.uint8)), "y.weight_scale": np.full(16, SMALL)}
WHOLE = {"full_precision_matrix_mult": True}
HALVES = [("BF16", np.uint16(0x3F00)), np.float16(0.5), np.float64(0.5)]
MISSING = {f"{X}.weight_scale": None}
PLAIN = {f"{X}.weight": np.ones((16, 32), np.float16)}

# Changes to a file of one FP8 layer and its config, the only problem (or its kind; None for none), and the reading.
PROBLEMS = [
    *(({}, {"metadata": {"_quantization_metadata": text}}, "header-unreadable", "fp8-at-one")  # by its tensor
      for text in ("{", "[]", '{"layers": 1}', "[" * 100_000)),
    *(({f"{X}.comfy_quant": bytes_of(content)}, {}, "mark-unreadable", "error")
      for content in (b"{", b"[]", b'{"format": 1}', b"\xff", b"", b"\0" * 64, b"{}")),
    ({f"{X}.comfy_quant": mark(format="float8_e5m2")}, {},
     Problem("mark-format", (f"{X}.weight",), "declared as float8_e5m2, but stored as F8_E4M3"), None),
    ({f"{X}.comfy_quant": mark(format="banana")}, {}, Problem("mark-unknown", (X,), "banana"), "error"),
    ({f"{X}.comfy_quant": mark(format="svdquant_w4a4")}, {},
     Problem("mark-unknown", (X,), "svdquant_w4a4, of comfy-quants"), "error"),
    ({"scaled_fp8": marker(0)}, {"marking": "legacy", "dtype": "F8_E5M2"}, "legacy-e5m2", "error"),
    *((MISSING, {"marking": marking}, "weight-scale-missing", None) for marking in ("header", "tensor")),
    ({f"{X}.weight_scale": np.int64(1)}, {}, "scale-dtype", None),
    *(({f"{X}.input_scale": scale}, {}, "input-scale-dtype", "error") for scale in (np.int64(1), *HALVES)),
    ({f"{X}.weight_scale": np.ones((3, 3, 3), np.float32)}, {}, "scale-shape", None),
    ({f"{X}.input_scale": np.ones(2, np.float32)}, {}, "input-scale-shape", None),
    *(({f"{X}.weight_scale": np.ones(shape, np.float32)}, {}, "scale-granularity", "error")  # marked as one per tensor
      for shape in ((16,), (16, 1), (2, 2))),
    *((MISSING | {f"{X}.{key}": scale}, {"marking": "none", "shape": (128, 256)}, Problem("unmarked", (X,)),
       "scale-dropped") for key, scale in (
        ("weight_scale", np.ones(1, np.float32)),  # diffusers, ModelOpt
        ("scale_weight", ("BF16", np.full(1, 0x3F80, np.uint16))),  # kohya, musubi: per tensor,
        ("scale_weight", ("BF16", np.full((128, 1), 0x3F80, np.uint16))),  # per row,
        ("scale_weight", ("BF16", np.full((128, 2, 1), 0x3F80, np.uint16))),  # and per block of a row
        ("weight_scale_inv", np.ones((1, 2), np.float32)))),  # DeepSeek
    (ROW_WISE, {}, Problem("unmarked", ("y",), "FP8, which diffusers 0.42 and later reads"), None),  # Black Forest Labs
    *(({f"gone.{key}": np.float32(1)}, {}, Problem("orphaned-scale", (f"gone.{key}",)), None) for key in (
        "weight_scale", "scale_weight", "weight_scale_inv", "weight_scale_2", "input_scale", "scale_input")),
    ({"gone.comfy_quant": mark(**FLOAT8)}, {}, Problem("orphaned-mark", ("gone.comfy_quant",)), None),
    ({}, {"marking": "header", "metadata": header(**{X: FLOAT8, "gone": FLOAT8})},
     Problem("orphaned-mark", ("gone",), "in the header"), None),
    *(({f"{X}.comfy_quant": mark(**said)}, {"marking": "both"}, Problem("header-disagrees", (X,), detail),
       "fp8-at-one")  # the header wins
      for said, detail in (({**FLOAT8, **WHOLE}, "full_precision_matrix_mult: false and true"),
                           ({"format": "float8_e5m2"}, 'format: "float8_e4m3fn" and "float8_e5m2"'),
                           ({**FLOAT8, "group_size": 64}, "group_size: null and 64"))),
    *(({f"{X}.comfy_quant": bytes_of(content)}, {"marking": "both"}, "header-disagrees", None)
      for content in (b"{", b"[]", b"[" * 100_000)),
    *(({}, {"shape": shape}, Problem("sides", (X,), f"{shape[0]} × {shape[1]}"), "cuda-error")
      for shape in ((24, 32), (32, 24))),
    ({}, {"dtype": "F8_E5M2"}, Problem("e5m2-product", (X,)), "cuda-error"),
    (MISSING | {f"{X}.input_scale": None}, {"marking": "none"}, Problem("raw-fp8", (X,)), "cast"),
    ({"y.weight": np.zeros(512, np.float16), "y.bias": np.zeros(16, np.float16),
      "norm.weight": np.ones(16, np.float16), "norm.bias": np.ones(16, np.float16)}, {},
     Problem("misshapen", ("y",), "512 beside a bias of 16"), None),
    *((changes | {f"{X}.bias": np.zeros(32, np.float16)}, {"scaled": not changes},
       Problem("misshapen", (X,), "16 × 32 beside a bias of 32"), None) for changes in ({}, PLAIN)),
    *(({f"{X}.{key}": np.float32(scale)}, {},
       Problem(kind, (f"{X}.{key}",), f"scales should be finite and not negative, found {scale}"), "error")
      for key, kind in (("weight_scale", "scale-value"), ("input_scale", "input-scale-suspicious"))
      for scale in (np.nan, np.inf, -1.0)),
    *(({f"{X}.weight_scale": np.float32(scale)}, {}, kind, "error") for scale, kind in (
        (1e30, "weight-scale-absurd"), (1158.0, "weight-scale-absurd"), (1e-12, "weight-scale-absurd"),
        (0.0, "scale-value"))),
    *(({f"{X}.weight": ("F8_E4M3", np.zeros((16, 32), np.uint8)), f"{X}.weight_scale": np.float32(scale)}, {},
       "all-zero", "fp8-at-one") for scale in (0.0, 1e-12, 1e30)),  # zeros may have any
    *(({}, {"input_scale": scale}, Problem("input-scale-suspicious", (f"{X}.input_scale",), f"{scale:.3g}"), None)
      for scale in (0.0, LEAST_INPUT_SCALE / 2, LARGEST_INPUT_SCALE * 2)),
    ({"scaled_fp8": marker(2)}, {"marking": "legacy"}, Problem("marker-disables-fp8", ("scaled_fp8",)), "marker"),
    # harmless
    *(({}, {"input_scale": scale}, None, "fp8")  # the third covers Z-Image's largest inputs
      for scale in (0.02, LEAST_INPUT_SCALE, 6.6e4 / 448, LARGEST_INPUT_SCALE)),
    *(({f"{X}.weight_scale": scale}, {}, None, "fp8-at-one") for scale in (*map(np.float32, (1, 5e-6, 30)), *HALVES)),
    *((changes | {f"{X}.bias": np.zeros(16, np.float16)}, {"scaled": not changes}, None, reading)
      for changes, reading in (({}, "fp8-at-one"), (PLAIN, "high-precision"))),
    ({f"{X}.comfy_quant": mark(**FLOAT8, full_precision_matrix_mult=False)}, {"marking": "both"}, None, "fp8-at-one"),
    *(({f"{X}.input_scale": scale}, WHOLE, None, "full-precision") for scale in (np.float16(0.5), np.float32(np.nan))),
    ({}, {"shape": (24, 32), **WHOLE}, None, "full-precision"),
    ({}, {"dtype": "F8_E5M2", **WHOLE}, None, "full-precision"),
    *(({"scaled_fp8": marker(size)}, {"marking": "legacy", "input_scale": 0.5}, None, "fp8") for size in (0, 1)),
    ({f"{X}.weight_scale": np.where(np.arange(16) == 3, 0, SMALL),  # of a row of zeros
      f"{X}.comfy_quant": mark(format="float8_e4m3fn_rowwise")}, {}, None, "dynamic"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "settings", "problem", "reading"), PROBLEMS)
def test_every_problem_is_found_and_no_other(look, changes, settings, problem, reading):
    found = look(changes, **settings)
    told = only_problem(found) if problem else None
    assert problem in (told, told and told.kind)
    assert reading in (None, found.layers[0].reading)


def test_legacy_layers_in_a_file_whose_header_marks_others(save, build):
    legacy, _ = build.quantized(["old.0", "text_encoder.0"], "legacy")
    marked, metadata = build.quantized(["new.0"], "header")
    found = inspect_file(save("m.safetensors", {**legacy, **marked, "scaled_fp8": marker(0)}, metadata))
    assert only_problem(found) == Problem("two-spellings", ("old.0",))
    assert {layer.name: layer.reading for layer in found.layers} == {
        "old.0": "scale-dropped", "text_encoder.0": "text-encoder", "new.0": "fp8-at-one"}  # fmt: skip


@pytest.mark.parametrize("whole", [False, True])
def test_a_bank_of_experts_has_its_own_reading_and_needs_no_input_scale(save, build, whole):
    tensors = {
        "experts.weight": ("F8_E4M3", np.zeros((2, 16, 16), np.uint8)),
        "experts.weight_scale": np.ones(2, np.float32),
        "experts.comfy_quant": build.mark(
            format="float8_e4m3fn", num_experts=2, **({"full_precision_matrix_mult": True} if whole else {})
        ),
    }
    found = inspect_file(save("m.safetensors", tensors))
    assert (found.problems, found.readings) == ((), {"full-precision" if whole else "experts-at-one": 1})


BANK = "transformer_blocks.0.mlp.experts.up"


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int8"])
def test_a_bank_of_experts_in_another_format_is_read_and_left_alone(save, build, name, tmp_path):
    parts, config, *_ = FORMS[name]
    tensors = {f"{BANK}.{key}": twice(part) for key, part in parts.items()}
    tensors[f"{BANK}.comfy_quant"] = build.mark(**config, num_experts=2)
    tensors |= {f"transformer_blocks.{n}.attn.{name}.weight": np.ones((32, 32), np.float32)
                for n in range(2) for name in "qo"}  # fmt: skip
    path = save("m.safetensors", tensors)
    found = inspect_file(path)
    assert (found.problems, found.banks) == ((), 1)
    assert found.readings == {"foreign": 1, "high-precision": 4}
    with open_checkpoint(path) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions())
        assert any(f"expert banks are copied unchanged (1, first: {BANK}" in note for note in plan.notes)
        convert(checkpoint, plan, tmp_path / "out.safetensors")
    with open_checkpoint(path) as before, open_checkpoint(tmp_path / "out.safetensors") as after:
        bank = {name for name in before.tensors if name.startswith(BANK)}
        assert {name for name in after.tensors if name.startswith(BANK)} == bank
        assert all(before.raw(name).tobytes() == after.raw(name).tobytes() for name in bank)


def test_legacy_layers_beside_marked_tensors_are_read_both(save, build):
    legacy, _ = build.quantized(["old.0"], "legacy")
    marked, _ = build.quantized(["new.0"], "tensor")
    assert inspect_file(save("m.safetensors", {**legacy, **marked, "scaled_fp8": marker(0)})).problems == ()


PACKED = {
    "compressed-tensors": {"y.weight_packed": np.zeros((4, 4), np.uint8), "y.weight_scale": np.ones(4, np.float32)},
    "Nunchaku (SVDQuant)": {
        "y.qweight": np.zeros((4, 4), np.int8), "y.wscales": np.ones((1, 4), np.float16),
        "y.proj_down": np.ones((4, 2), np.float16)},
    "GPTQ or AWQ": {"y.qweight": np.zeros((4, 4), np.int32), "y.qzeros": np.zeros((1, 4), np.int32)},
    "bitsandbytes 4-bit": {
        "y.weight": np.zeros((64, 1), np.uint8), "y.weight.absmax": np.ones(2, np.float32),
        "y.weight.quant_map": np.ones(16, np.float32), "y.bias": np.ones(16, np.float32)},
    "bitsandbytes 8-bit": {"y.weight": np.zeros((4, 4), np.int8), "y.SCB": np.ones(4, np.float32)},
    "HQQ": {"y.W_q": np.zeros((4, 4), np.uint8)},
    "Quanto": {"y.weight._data": np.zeros((4, 4), np.int8), "y.weight._scale": np.ones((4, 1), np.float32)},
    "TorchAO": {"y._weight_qdata": np.zeros((4, 4), np.int8), "y._weight_scale": np.ones((4, 1), np.float32)},
    "integers (U8)": {"y.weight": np.zeros(64, np.uint8)},
    "integers (I32)": {"y.weight": np.zeros((4, 4), np.int32)},
}  # fmt: skip


@pytest.mark.parametrize("program", PACKED)
def test_layers_that_other_programs_packed_are_named_and_counted(look, program):
    more = {name.replace("y", "z", 1): tensor for name, tensor in PACKED[program].items()}
    found = look(PACKED[program] | more)
    assert only_problem(found) == Problem("packed", ("y", "z"), program)
    assert [(layer.name, layer.format) for layer in found.layers if layer.reading == "packed"] == [
        ("y", program), ("z", program)]  # fmt: skip
    assert found.readings["packed"] == 2


FORMS = {
    # name: tensors of a layer y, its mark, what it is called, and what ComfyUI does with it
    "int8": (
        {"weight": np.ones((16, 32), np.int8), "weight_scale": np.full((16, 1), SMALL)},
        {"format": "int8_tensorwise"}, "INT8", "per-token"),
    "int8-convrot": (
        {"weight": np.ones((16, 64), np.int8), "weight_scale": np.full((16, 1), SMALL)},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
        "INT8 ConvRot, groups of 64", "per-token"),
    "mxfp8": (
        {"weight": ("F8_E4M3", np.ones((32, 32), np.uint8)), "weight_scale": np.full((128, 4), 120, np.uint8)},
        {"format": "mxfp8"}, "MXFP8", "per-block-32"),
    "nvfp4": (
        {"weight": np.ones((16, 8), np.uint8), "weight_scale": ("F8_E4M3", np.full((128, 4), E4M3_ONE, np.uint8)),
         "weight_scale_2": SMALL},
        {"format": "nvfp4"}, "NVFP4", "per-block-16"),
    "w4a8": (
        {"weight": np.ones((16, 128), np.int8), "weight_s_rel": ("F8_E4M3", np.full((16, 16), E4M3_ONE, np.uint8)),
         "weight_s_channel": np.full(16, SMALL)},
        {"format": "asym_w4a8_int8"}, "W4A8", "per-token"),
    "w6a8": (
        {"weight": np.ones((16, 192), np.int8), "weight_s_rel": ("F8_E4M3", np.full((16, 16), E4M3_ONE, np.uint8)),
         "weight_s_channel": np.full(16, SMALL)},
        {"format": "asym_w4a8_int8"}, "W6A8", "per-token"),
    "convrot-w4a4": (
        {"weight": np.ones((16, 128), np.int8), "weight_scale": np.full(16, SMALL)},
        {"format": "convrot_w4a4"}, "ConvRot W4A4", "per-token"),
    "awq-w4a16": (
        {"weight": np.ones((16, 16), np.int8), "weight_scale": np.ones((16, 2), np.float16),
         "weight_zeros": np.ones((16, 2), np.float16)},
        {"format": "awq_w4a16"}, "AWQ W4A16", "foreign"),
}  # fmt: skip


def twice(tensor):
    """A tensor of two experts that are alike."""
    return (tensor[0], np.stack([tensor[1]] * 2)) if isinstance(tensor, tuple) else np.stack([tensor] * 2)


def layer_y(build, name, mark=None, **changes):
    """A layer y of a format, with other tensors (None: without) and another mark (False: none)."""
    tensors, config, *_ = FORMS[name]
    marked = {} if mark is False else {"comfy_quant": build.mark(**(mark or config))}
    kept = {key: value for key, value in {**tensors, **marked, **changes}.items() if value is not None}
    return {f"y.{key}": value for key, value in kept.items()}


@pytest.mark.parametrize("name", FORMS)
def test_every_format_is_named_and_read(look, build, name):
    found = look(layer_y(build, name))
    layer, (tensors, mark, title, reading) = found.layers[-1], FORMS[name]
    assert (found.problems, layer.title, layer.reading, layer.format) == ((), title, reading, mark["format"])
    assert (layer.marked_by, layer.input_state) == (("tensor",), None)
    if FORMS[name][3] != "foreign":
        assert layer.read_as == name
        stored = sum((part[1] if isinstance(part, tuple) else part).nbytes for part in tensors.values())
        assert layer.bits == 8 * stored / (layer.shape[0] * layer.shape[1])
        assert found.formats[name].title in layer.title


def test_bits_per_weight_are_those_of_all_quantized_layers(look, build):
    found = look(layer_y(build, "w6a8") | {"z.weight": np.zeros((512, 512), np.float16)})
    fp8, w6a8, _ = found.layers
    assert found.bits_per_weight == (fp8.bits * 16 * 32 + w6a8.bits * 16 * 256) / (16 * 32 + 16 * 256)


@pytest.mark.parametrize("scale", [None, np.float32(0.5)])
def test_an_input_scale_is_heeded_by_formats_that_have_one(look, build, scale):
    layer = look(layer_y(build, "nvfp4", input_scale=scale)).layers[-1]
    assert (layer.reading, layer.input_state, layer.input_scale) == (
        ("per-block-16", None, None) if scale is None else ("per-block-static", "calibrated", 0.5)
    )
    layer = look(layer_y(build, "int8", input_scale=scale)).layers[-1]
    assert (layer.reading, layer.input_state) == ("per-token", None if scale is None else "unused")


@pytest.mark.parametrize("name", FORMS)
def test_every_format_needs_its_mark_and_its_scales(look, build, name):
    tensors, mark, *_ = FORMS[name]
    for scale in list(tensors)[1:]:
        problem = only_problem(look(layer_y(build, name, **{scale: None})))
        assert problem.kind == "weight-scale-missing"
        assert mark["format"] in problem.detail
        assert f".{scale}" in problem.detail
    found = look(layer_y(build, name, mark=False))
    assert (only_problem(found).kind, found.layers[-1].reading) == ("unmarked", "scale-dropped")
    if name not in ("convrot-w4a4", "int8-convrot", "awq-w4a16"):  # two of which look like int8
        assert found.layers[-1].read_as == name


GROUP = "convrot_groupsize"
CONVROT = FORMS["int8-convrot"][1]


@pytest.mark.parametrize(
    ("name", "changes", "kind", "detail"),
    [
        ("int8", {"weight_scale": np.ones(16, np.int32)}, "scale-dtype", "a scale should be float32, found I32"),
        ("int8", {"weight_scale": np.full((7, 1), SMALL)}, "scale-shape", "does not fit"),
        ("int8", {"weight_scale": np.float32(np.nan)}, "scale-value", "found nan"),
        ("int8", {"weight_scale": np.where(np.arange(16) == 3, -1, SMALL)[:, None]}, "scale-value", "found -1.0"),
        ("int8", {"weight_scale": np.float32(0)}, "scale-value", "0, but the weights are not 0"),
        ("int8", {"weight_scale": np.float32(1e30)}, "weight-scale-absurd", "1e+30 makes weights up to 1e+30"),
        ("int8", {"weight": np.ones((16, 32), np.uint8)}, "mark-format", "as int8_tensorwise, but stored as U8"),
        ("int8", {"weight": np.ones((16, 32), np.float16)}, "mark-format", "but stored as F16"),
        ("int8", {"weight_scale": np.full(16, SMALL)}, "scale-flat", None),
        ("int8-convrot", {"weight_scale": np.full(16, SMALL)}, "scale-flat", None),
        ("int8-convrot", {"weight_scale": np.full(8, SMALL)}, "scale-shape", "expected shape [16, 1]"),
        ("convrot-w4a4", {"weight_scale": np.full((16, 1), SMALL)}, "scale-shape", "expected shape [16]"),
        ("int8-convrot", {"mark": {**CONVROT, GROUP: 32}}, "rotation-group", "groups of 32: expected a power of 4"),
        ("int8-convrot", {"mark": {**CONVROT, GROUP: 256}}, "rotation-group", "a power of 4 that divides 64"),
        ("int8-convrot", {"mark": {**CONVROT, GROUP: "many"}}, "rotation-group", "groups of -1"),
        ("w4a8", {"mark": {"format": "asym_w4a8_int8", "params": {GROUP: 0}}}, "rotation-group", "groups of -1"),
        ("mxfp8", {"weight_scale": None, "scale_weight": SMALL}, "weight-scale-missing", ".weight_scale is missing"),
        ("mxfp8", {"weight_scale": np.full((32, 1), 120, np.uint8)}, "scale-shape", "shape [128, 4], found [32, 1]"),
        ("mxfp8", {"weight_scale": np.full((128, 4), SMALL)}, "scale-dtype", "expected U8, found F32"),
        ("mxfp8", {"weight_scale": np.full((128, 4), 255, np.uint8)}, "scale-value", "some are NaN"),
        ("mxfp8", {"weight_scale": np.full((128, 4), 60, np.uint8)}, "weight-scale-absurd", "up to 3.04e-18"),
        ("nvfp4", {"weight_scale": ("F8_E4M3", np.ones((16, 1), np.uint8))}, "scale-shape", "expected shape [128, 4]"),
        ("nvfp4", {"weight_scale": np.full((128, 4), SMALL)}, "scale-dtype", "expected F8_E4M3, found F32"),
        ("nvfp4", {"weight_scale_2": np.ones(16, np.float32)}, "scale-shape", "expected shape []"),
        ("nvfp4", {"weight_scale_2": np.float32(np.inf)}, "scale-value", "found inf"),
        ("nvfp4", {"weight_scale_2": np.float32(1e9)}, "weight-scale-absurd", "1e+09 makes weights up to 6e+09"),
        ("nvfp4", {"weight": np.ones((16, 8), np.int8)}, "mark-format", "declared as nvfp4, but stored as I8"),
        ("nvfp4", {"pre_quant_scale": np.ones((4, 4), np.float32)}, "scale-shape", "one value for each of 16 inputs"),
        ("mxfp8", {"pre_quant_scale": np.ones(32, np.float32)}, "pre-quant-scale", "MXFP8"),
        ("w4a8", {"weight_s_channel": np.full((16, 1), SMALL)}, "scale-shape", "expected shape [16], found [16, 1]"),
        ("w4a8", {"weight_s_rel": np.ones((16, 16), np.float16)}, "scale-dtype", "expected F8_E4M3, found F16"),
        ("w4a8", {"weight_s_rel": ("F8_E4M3", np.ones((16, 15), np.uint8))}, "scale-shape", "do not fit a W4A8 layer"),
        ("w4a8", {"weight_s_rel": ("F8_E4M3", np.full((16, 16), E4M3_128, np.uint8))}, "codebook-missing", "up to 128"),
        ("w4a8", {"weight_codebook": np.full(16, np.float32(np.nan))}, "scale-value", "scales should be finite"),
        ("w4a8", {"weight_codebook": np.ones(8, np.float32)}, "scale-shape", "expected shape [16]"),
        ("awq-w4a16", {"weight": np.ones((16, 16), np.float16)}, "mark-format", "stored as F16"),
        ("w6a8", {"bias": np.zeros(3, np.float16)}, "misshapen", "16 × 256 beside a bias of 3"),
        # harmless
        ("nvfp4", {"bias": np.zeros(3, np.float16)}, None, None),  # rows are padded to whole tiles
        ("int8", {"weight_scale": SMALL}, None, None),
        ("mxfp8", {"weight_scale": ("F8_E8M0", np.full((128, 4), 120, np.uint8))}, None, None),
        ("nvfp4", {"weight_scale": np.full((128, 4), E4M3_ONE, np.uint8)}, None, None),
        ("nvfp4", {"weight_scale_2": np.float32(100)}, None, None),  # 600 at its block scales
        ("nvfp4", {"weight_scale_2": SMALL.reshape(1), "pre_quant_scale": np.ones(16, np.float16)}, None, None),
        ("w4a8", {"weight_s_rel": np.full((16, 16), E4M3_ONE, np.uint8)}, None, None),
        ("w4a8", {"weight_s_rel": np.full((16, 16), E4M3_128, np.uint8),
                  "weight_codebook": np.linspace(-1, 1, 16, dtype=np.float32)}, None, None),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_format_is_told(look, build, name, changes, kind, detail):
    found = look(layer_y(build, name, **changes))
    problem = only_problem(found) if kind else None
    assert (problem and problem.kind) == kind, problem
    assert detail is None or detail in problem.detail, problem
    own = (None, "pre-quant-scale", "scale-flat", "misshapen")
    assert found.layers[-1].reading == (FORMS[name][3] if kind in own else "error")


def test_what_only_sglang_reads_is_named(look):
    said = {"format": "rowwise-float8_e4m3fn"}
    found = look(ROW_WISE | {"y.comfy_quant": mark(**said)})
    assert only_problem(found) == Problem("mark-unknown", ("y",), "rowwise-float8_e4m3fn, of SGLang")
    assert (found.layers[-1].title, found.layers[-1].scaling, found.formats["fp8-sglang"].read_by) == (
        "FP8", "row", "SGLang")  # fmt: skip
    text = json.dumps({"format_version": "1.1", "layers": {"y": said}})
    found = look(ROW_WISE, "none", {"_quantization_metadata": text}, scaled=False)
    assert (only_problem(found).kind, found.header_version, found.header_marks) == ("mark-unknown", "1.1", 1)


def test_e5m2_is_judged_by_its_own_range(look):
    small = ("F8_E5M2", np.full((16, 32), 0x30, np.uint8))  # 0.125, as a plain cast leaves it
    kinds = [problem.kind for problem in look({f"{X}.weight": small, f"{X}.weight_scale": np.float32(1)},
                                              dtype="F8_E5M2").problems]  # fmt: skip
    assert kinds == ["e5m2-product"]
    for scale, state in ((LARGEST_INPUT_SCALE, "suspicious"), (LARGEST_INPUT_SCALE / 128, "calibrated"),
                         (LEAST_INPUT_SCALE / 128, "calibrated"), (LEAST_INPUT_SCALE / 256, "suspicious")):  # fmt: skip
        assert look(dtype="F8_E5M2", input_scale=scale).input_states == {state: 1}


@pytest.mark.parametrize(
    ("name", "shape", "detail"),
    [
        ("blocks.1.mlp.0", (16, 64), "16 × 64, but 64 × 16 in other blocks"),
        ("blocks.0.attn.qkv", (16, 48), "16 × 48 after a norm of 16"),
    ],
)
def test_a_weight_that_contradicts_other_blocks_or_its_norm(save, name, shape, detail):
    tensors = {f"blocks.{i}.{name}.weight": np.ones(shape, np.float16) for i in range(3)
               for name, shape in (("mlp.0", (64, 16)), ("mlp.2", (16, 64)))}  # fmt: skip
    tensors |= {"blocks.0.norm1.weight": np.ones(16, np.float16)}
    tensors["blocks.0.attn.qkv.weight"] = np.ones((48, 16), np.float16)
    assert inspect_file(save("m.safetensors", tensors)).problems == ()
    tensors[f"{name}.weight"] = np.ones(shape, np.float16)
    assert only_problem(inspect_file(save("m.safetensors", tensors))) == Problem("misshapen", (name,), detail)


@pytest.mark.parametrize(
    ("calibrate", "scale", "state", "doubts"),
    [
        ({"engine": "layer"}, 0.5, "guessed", ["guessed"]),
        ({"engine": "layer"}, 1.0, "one", []),
        ({"engine": "model", "guessed": [X]}, 0.5, "guessed", ["guessed"]),
        ({"engine": "model", "guessed": [X]}, 1.0, "guessed", ["guessed"]),
        ({"engine": "model", "guessed": ["other"]}, 0.5, "calibrated", []),
        ({"engine": "model"}, 1.0, "calibrated", []),
        ({"engine": "model", "unmeasured": [X]}, 1.0, "one", []),
        ({}, 1.0, "one", ["uncalibrated"]),
        ({}, None, "missing", ["uncalibrated"]),
        ({}, 0.5, "calibrated", []),
    ],
)
def test_scales_that_nobody_measured_are_doubts(look, calibrate, scale, state, doubts):
    found = look(input_scale=scale, metadata={"convert_to_quant": json.dumps({"calibrate": calibrate})})
    assert (found.input_states, [doubt.kind for doubt in found.doubts]) == ({state: 1}, doubts)
    assert found.problems == ()
    assert bool(found.advice) == (state != "calibrated")


def test_layers_without_products_need_no_calibration(look):
    assert look(**WHOLE).doubts == ()
    assert look({f"{X}.weight": np.zeros((16, 32), np.float16)}, "none").doubts == ()


@pytest.mark.parametrize(("marking", "problems"), [("none", ["header-bare"]), ("tensor", [])])
def test_a_header_that_names_layers_bare_in_a_prefixed_file(save, build, marking, problems):
    tensors, _ = build.quantized(["model.diffusion_model.x"], marking)
    header = json.dumps({"layers": {"x": {"format": "float8_e4m3fn"}}})
    found = inspect_file(save("m.safetensors", tensors, {"_quantization_metadata": header}))
    assert [problem.kind for problem in found.problems] == problems


def test_a_marker_of_another_part_says_nothing_about_the_model(save, build):
    names = ["model.diffusion_model.x", "text_encoders.t5xxl.x"]
    tensors, _ = build.quantized(names, "legacy")
    tensors["text_encoders.t5xxl.scaled_fp8"] = ("F8_E4M3", np.zeros(2, np.uint8))
    tensors["model.diffusion_model.scaled_fp8"] = ("F8_E4M3", np.zeros(0, np.uint8))
    found = inspect_file(save("m.safetensors", tensors))
    assert found.problems == ()
    assert [layer.reading for layer in found.layers] == ["fp8-at-one", "text-encoder"]
    assert list(found.legacy_markers.items()) == [
        ("model.diffusion_model.scaled_fp8", 0), ("text_encoders.t5xxl.scaled_fp8", 2)]  # fmt: skip


def test_problems_come_once_per_kind_and_the_worst_first(save, build):
    tensors, _ = build.quantized(["a", "b", "c"], "tensor", shape=(24, 32))
    tensors["c.weight_scale"] = np.float32(np.nan)
    found = inspect_file(save("m.safetensors", tensors))
    assert [(problem.kind, problem.tensors) for problem in found.problems] == [
        ("scale-value", ("c.weight_scale",)), ("sides", ("a", "b"))]  # fmt: skip


# what ComfyUI does, input scales, marks


@pytest.mark.parametrize(
    ("scale", "state", "reading"),
    [(None, "missing", "fp8-at-one"), (1.0, "one", "fp8-at-one"), (0.25, "calibrated", "fp8")],
)
@pytest.mark.parametrize("marking", ["header", "tensor", "both"])
def test_input_scales(look, marking, scale, state, reading):
    layer = look({}, marking, input_scale=scale).layers[0]
    assert (layer.input_scale, layer.input_state, layer.reading) == (scale, state, reading)
    assert layer.marked_by == {"both": ("header", "tensor")}.get(marking, (marking,))


def test_full_precision_uses_no_input_scale(look):
    layer = look(input_scale=0.5, **WHOLE).layers[0]
    assert (layer.reading, layer.input_state, layer.input_scale) == ("full-precision", "unused", 0.5)


@pytest.mark.parametrize(
    ("form", "shape", "block", "scaling"), [("rowwise", (16,), (1, 32), "row"), ("blockwise", (2, 2), (8, 16), "block")]
)
def test_row_and_block_formats_scale_inputs_themselves(look, build, form, shape, block, scaling):
    mark = build.mark(format=f"float8_e4m3fn_{form}", block_size=[8, 16])
    found = look({f"{X}.weight_scale": np.ones(shape, np.float32), f"{X}.comfy_quant": mark})
    layer = found.layers[0]
    assert (layer.reading, layer.block, layer.scaling) == ("dynamic", block, scaling)
    assert layer.input_state == "unused"
    assert found.problems == ()


def test_text_encoders_always_run_in_full_precision(save, build):
    name = "text_encoders.t5xxl.transformer.encoder.block.0"
    tensors, _ = build.quantized([name, "model.diffusion_model.blocks.0"], "tensor")
    found = inspect_file(save("m.safetensors", tensors | {"vae.a": np.zeros(2, np.float32)}))
    assert {layer.name: layer.reading for layer in found.layers} == {
        name: "text-encoder", "model.diffusion_model.blocks.0": "fp8-at-one"}  # fmt: skip
    assert found.parts == ("text encoder", "VAE")
    assert found.prefix == "model.diffusion_model."


@pytest.mark.parametrize(
    ("layer", "marking"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q", "tensor"),
        ("encoder.block.0.layer.0.SelfAttention.q", "legacy"),
        ("text_model.encoder.layers.0.self_attn.q_proj", "tensor"),
        ("transformer.text_model.encoder.layers.0.self_attn.q_proj", "tensor"),
    ],
)
def test_a_file_that_is_a_text_encoder(save, build, layer, marking):
    tensors, _ = build.quantized([layer], marking, shape=(24, 32))
    more = {"scaled_fp8": marker(2)} if marking == "legacy" else {}  # which would disable FP8 products
    found = inspect_file(save("m.safetensors", tensors | more))
    assert (found.family, found.readings, found.problems) == ("text-encoder", {"text-encoder": 1}, ())


def test_shards_are_read_as_one(save_shards, build):
    tensors, metadata = build.quantized(["a", "b"], "both", input_scale=0.5)
    shards = [{name: tensor for name, tensor in tensors.items() if name[0] == letter} for letter in "ab"]
    found = inspect_file(save_shards("m", shards, metadata))
    assert (found.files, found.sharded, found.problems) == (2, True, ())
    assert found.header_marks == 2
    assert found.advice == ("ComfyUI does not read shard indexes: merge the shards into one file",)


def test_unmeasured_input_scales_are_no_problem_but_worth_advice(look):
    assert look().advice == (
        "1 of 1 FP8 matmuls have no measured input scale, so inputs beyond 448 are clipped and tiny ones vanish; "
        "calibrate: convert_to_quant -i FILE -o NEW --actcal",
    )
    assert look(input_scale=0.5).advice == ()


# what stands beside and in the header


def test_how_the_file_was_made(look):
    said = {"version": "0.1.0", "convert": {}, "calibrate": {"engine": "model", "conditioning": "noise", "samples": 64,
            "seed": 42, "depends_on_conditioning": ["a"], "lora": ["style.safetensors"]}}  # fmt: skip
    found = look(metadata={"convert_to_quant": json.dumps(said)})
    assert found.made == Made(
        "0.1.0", True, "model", "noise", 64, 42, depends_on_conditioning=("a",), lora=("style.safetensors",)
    )


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("{", None),
        ("[]", None),
        ("[" * 100_000, None),
        ("{}", Made()),
        ('{"version": 1, "calibrate": [], "convert": 3}', Made()),
        ('{"calibrate": {"samples": "many", "seed": true, "depends_on_conditioning": [1, "a"], "lora": 3}}',
         Made(depends_on_conditioning=("a",))),
    ],
    ids=range(6),
)  # fmt: skip
def test_what_a_file_says_of_itself_is_a_remark_that_may_be_malformed(look, text, made):
    assert look(metadata={"convert_to_quant": text}).made == made


def test_everything_is_json(look):
    document = look(input_scale=np.nan).to_json()
    assert json.loads(json.dumps(document, allow_nan=False))["problems"][0]["remedy"]
    assert (document["layers"][0]["input_scale"], document["readings"]) == (None, {"error": 1})


def test_a_file_that_cannot_be_read_is_refused(look, monkeypatch):
    def refuse(file, *_):
        raise CheckpointError("cannot be read", path=file.path)

    monkeypatch.setattr(CheckpointFile, "read", refuse)
    with pytest.raises(CheckpointError, match="cannot be read"):
        look()


def test_a_file_without_layers_is_read_all_the_same(save):
    found = inspect_file(save("m.safetensors", {"a": np.zeros(2, np.float32)}))
    assert (found.layers, found.problems, found.title) == ((), (), "unknown")
