"""Broken quantization configs: which are found, how they are repaired, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.errors import OutputError, TensorError
from convert_to_quant.layers import find_layers
from convert_to_quant.patch import apply_in_place, rewrite
from convert_to_quant.repair import plan_repair

NAME, OTHER = "blocks.0.a", "blocks.1.a"
KEY = "_quantization_metadata"
LONG = 136
"""Bytes of a config with room for any other."""

FP8 = {".weight": ("F8_E4M3", np.full((16, 32), 0x38, np.uint8)), ".weight_scale": np.float32(0.5)}
LAYERS = {
    "float8_e4m3fn": FP8,
    "float8_e5m2": FP8 | {".weight": ("F8_E5M2", np.full((16, 32), 0x38, np.uint8))},
    "float8_e4m3fn_rowwise": FP8 | {".weight_scale": np.ones(16, np.float32)},
    "float8_e4m3fn_blockwise": FP8 | {".weight_scale": np.ones((2, 4), np.float32)},
    "mxfp8": {".weight": ("F8_E4M3", np.ones((32, 32), np.uint8)), ".weight_scale": np.full((128, 4), 127, np.uint8)},
    "nvfp4": {".weight": np.ones((16, 8), np.uint8), ".weight_scale": ("F8_E4M3", np.full((128, 4), 0x38, np.uint8)),
              ".weight_scale_2": np.float32(1)},
    "int8_tensorwise": {".weight": np.ones((16, 32), np.int8), ".weight_scale": np.float32(1)},
    "asym_w4a8_int8": {".weight": np.ones((16, 128), np.int8), ".weight_s_channel": np.ones(16, np.float32),
                       ".weight_s_rel": ("F8_E4M3", np.full((16, 16), 0x38, np.uint8))},
}  # fmt: skip
"""Layers whose tensors determine the format."""

BROKEN = {
    "no config": None,
    "empty": b"",
    "all NUL": bytes(LONG),
    "not JSON": b"{".ljust(LONG),
    "no format": b'{"full_precision_matrix_mult": true}'.ljust(LONG),
    "unknown format (banana)": b'{"format": "banana"}'.ljust(LONG),
}
"""What is reported, and the bytes of the comfy_quant tensor."""


def layer(form, mark, name=NAME):
    """The tensors of a layer, with these bytes as its config."""
    tensors = {name + suffix: tensor for suffix, tensor in LAYERS[form].items()}
    return tensors if mark is None else tensors | {name + ".comfy_quant": np.frombuffer(mark, np.uint8)}


def repaired(source, *, in_place):
    output = source if in_place else source.with_name(source.name.replace("in", "out", 1))
    with open_checkpoint(source) as checkpoint:
        repairs, patch = plan_repair(checkpoint, in_place=in_place)
        if in_place:
            apply_in_place(patch)
        else:
            rewrite(patch, output)
    return output, [(one.layer, one.found, one.becomes, one.where) for one in repairs]


def raw(path):
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.raw(name).tobytes() for name in checkpoint if not name.endswith(".comfy_quant")}


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "new file"])
@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("form", LAYERS)
def test_a_broken_config_gets_the_format_of_the_tensors(save, form, fault, in_place):
    mark, room = BROKEN[fault], {"room": "x" * 300} if in_place else {}
    source = save("in.safetensors", layer(form, mark), room)
    if in_place:  # as a tool leaves it that fills the header up with spaces
        content = source.read_bytes()
        source.write_bytes(content.replace(b'"room": "' + b"x" * 300 + b'"', b'"room": ""' + b" " * 300))
    before = raw(source)
    output, repairs = repaired(source, in_place=in_place)
    header = in_place and not mark
    assert repairs == [(NAME, fault, form, "header" if header else "tensor")]
    with open_checkpoint(output) as checkpoint:
        table = find_layers(checkpoint)
        found = table.quantized[NAME]
        assert (found.marking, found.config["format"]) == ("header" if header else "tensor", form)
        assert found.full_precision == (fault == "no format")
        assert table.notes == []
    assert raw(output) == before
    assert repaired(output, in_place=True)[1] == [], "nothing is left to repair"


UNKNOWN, BANANA = {"format": "banana"}, "unknown format (banana)"


def test_in_place_needs_room(save):
    source = save("in.safetensors", layer("float8_e4m3fn", None))
    before = source.read_bytes()
    with pytest.raises(OutputError) as caught:
        repaired(source, in_place=True)
    assert str(caught.value).startswith(f"{source}: cannot be changed in place: the header has ")
    assert str(caught.value).endswith("(write a new file with -o instead)")
    assert source.read_bytes() == before
    assert [path.name for path in source.parent.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(
    ("header", "tensor", "told", "where"),
    [
        (UNKNOWN, None, BANANA, "header"),
        (UNKNOWN, b"", f"{BANANA}; empty", "header"),
        (UNKNOWN, bytes(LONG), f"{BANANA}; all NUL", "header and tensor"),
        (UNKNOWN, b'{"format": "float8_e4m3fn", "x": 1}', BANANA, "header"),
        ({"format": "float8_e4m3fn"}, bytes(LONG), "all NUL", "tensor"),
    ],
)  # fmt: skip
def test_header_and_tensor_agree_afterwards(save, header, tensor, told, where):
    text = json.dumps({"format_version": "1.0", "layers": {NAME: header}}) + " " * 80
    source = save("in.safetensors", layer("float8_e4m3fn", tensor), {KEY: text})
    assert repaired(source, in_place=True)[1] == [(NAME, told, "float8_e4m3fn", where)]
    with open_checkpoint(source) as checkpoint:
        table = find_layers(checkpoint)
        assert table.quantized[NAME].config["format"] == "float8_e4m3fn"
        if tensor:
            assert table.marks.disagreement(NAME) is None


def test_an_unreadable_header_is_rewritten_for_all_layers(save):
    good = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
    tensors = layer("float8_e4m3fn", good) | layer("mxfp8", None, OTHER) | layer("nvfp4", bytes(LONG), "c")
    source = save("in.safetensors", tensors, {KEY: "{" + "x" * 400})
    assert repaired(source, in_place=True)[1] == [
        (KEY, "cannot be read", "all layers", "header"), (OTHER, "no config", "mxfp8", "header"),
        ("c", "all NUL", "nvfp4", "tensor"),
    ]  # fmt: skip
    with open_checkpoint(source) as checkpoint:
        table = find_layers(checkpoint)
        assert [(one.marking, one.format.name, one.full_precision) for one in table.quantized.values()] == [
            ("header", "fp8", True), ("header", "mxfp8", False), ("header", "nvfp4", False),
        ]  # fmt: skip


ROWS = {".weight": np.ones((16, 32), np.int8), ".weight_scale": np.ones((16, 1), np.float32)}
MISSPELT = {NAME + ".weight": FP8[".weight"], NAME + ".scale_weight": np.float32(1)}
REFUSED = {
    "ambiguous": ({NAME + suffix: tensor for suffix, tensor in ROWS.items()},
                  f"{NAME}: no quantization config names its format, and its tensors fit several formats: INT8, "
                  "INT8 ConvRot (use a file with quantization configs, or convert the original)"),
    "no scale": ({NAME + ".weight": FP8[".weight"], NAME + ".comfy_quant": np.zeros(LONG, np.uint8)},
                 f"{NAME}: no quantization config names its format, and its tensors fit no supported format "
                 "(use a file with quantization configs, or convert the original)"),
    "misnamed": (MISSPELT,
                 f"{NAME}.scale_weight: readers of quantization configs expect this scale under another name "
                 "(convert_to_quant migrate --to comfy renames it)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_in_doubt_is_refused(save, case):
    tensors, said = REFUSED[case]
    source = save("in.safetensors", tensors | layer("float8_e4m3fn", bytes(LONG), OTHER))
    before = source.read_bytes()
    for in_place in (True, False):
        with pytest.raises(TensorError) as caught:
            repaired(source, in_place=in_place)
        assert str(caught.value) == f"{source}: {said}"
    assert source.read_bytes() == before
    assert [path.name for path in source.parent.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("left", [{"convrot": True}, {"convrot": True, "convrot_groupsize": 16}], ids=str)
def test_what_is_left_of_a_config_decides_among_formats(save, left):
    mark = json.dumps(left).ljust(100).encode()
    tensors = {NAME + suffix: tensor for suffix, tensor in ROWS.items()}
    source = save("in.safetensors", tensors | {NAME + ".comfy_quant": np.frombuffer(mark, np.uint8)})
    repaired(source, in_place=True)
    with open_checkpoint(source) as checkpoint:
        found = find_layers(checkpoint).quantized[NAME]
        assert (found.format.name, found.group) == ("int8-convrot", 16)


def test_layers_without_need_of_a_config_or_with_a_known_one_are_left_alone(save, build):
    tensors, _ = build.quantized([NAME], "legacy")
    tensors |= {"scaled_fp8": ("F8_E4M3", np.zeros(0, np.uint8)), "norm.weight": ("F8_E4M3", np.zeros(4, np.uint8)),
                "raw.weight": FP8[".weight"], "raw.input_scale": np.float32(1),
                "plain.weight": np.ones((4, 4), np.float32), "plain.input_scale": np.float32(1)}  # fmt: skip
    awq = {OTHER + ".weight": np.ones((4, 4), np.int8), OTHER + ".comfy_quant": build.mark(format="awq_w4a16")}
    for found in (tensors, awq):
        with open_checkpoint(save("in.safetensors", found)) as checkpoint:
            assert plan_repair(checkpoint, in_place=True)[0] == []


def test_shards_are_repaired_each_in_its_own_file(save_shards):
    source = save_shards("in", [layer("float8_e4m3fn", bytes(LONG)), layer("mxfp8", bytes(LONG), OTHER)])
    before = raw(source)
    for in_place in (False, True):
        output, _ = repaired(source, in_place=in_place)
        assert raw(output) == before
        with open_checkpoint(output) as checkpoint:
            assert [one.marking for one in find_layers(checkpoint).quantized.values()] == ["tensor"] * 2
            assert len(checkpoint.files) == 2
