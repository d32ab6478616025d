"""`dequantize`, `repair`, `migrate` and `--requantize`: messages and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.layers import find_layers

OUT = ("-o", "out.safetensors")


@pytest.fixture
def files(save, build, tmp_path, monkeypatch):
    """A folder with files in FP8, with a broken config, in INT8 without configs, in BF16, and in NVFP4."""
    monkeypatch.chdir(tmp_path)
    fp8, metadata = build.quantized(["blocks.0.a", "blocks.1.a"], "tensor", input_scale=0.5)
    save("fp8.safetensors", fp8, metadata)
    save("broken.safetensors", fp8 | {"blocks.1.a.comfy_quant": np.zeros(64, np.uint8)})
    save("int8.safetensors", {"blocks.0.a.weight": np.ones((16, 32), np.int8),
                              "blocks.0.a.weight_scale": np.ones((16, 1), np.float32)})  # fmt: skip
    save("plain.safetensors", {"blocks.0.a.weight": ("BF16", build.to_bfloat16(np.ones((16, 32))))})
    save("nvfp4.safetensors", {"a.comfy_quant": build.mark(format="nvfp4"), "a.weight": np.ones((16, 8), np.uint8),
                               "a.weight_scale": ("F8_E4M3", np.ones((128, 4), np.uint8)),
                               "a.weight_scale_2": np.float32(1)})  # fmt: skip
    return tmp_path


DONE = {
    "dequantize fp8.safetensors -o out.safetensors": "2 layers in FP8 to BF16; wrote out.safetensors\n",
    "migrate fp8.safetensors -o out.safetensors --to legacy": (
        "2 layers in the legacy convention; wrote out.safetensors\n"
    ),
    "migrate fp8.safetensors -o out.safetensors --to diffusers": (
        "note: 2 input scales left out: diffusers scales the inputs of every layer per token\n"
        "2 layers in the diffusers convention; wrote out.safetensors\n"
    ),
    "repair broken.safetensors -o out.safetensors": (
        "repaired 1 broken quantization config in broken.safetensors; wrote out.safetensors\n"
    ),
    "repair broken.safetensors": (
        "repaired 1 broken quantization config in broken.safetensors; wrote broken.safetensors\n"
    ),
    "repair fp8.safetensors": "0 broken quantization configs in fp8.safetensors; nothing was written\n",
}


@pytest.mark.parametrize("call", DONE)
def test_each_command_reports_what_it_did(ctq, files, call):
    outcome = ctq(*call.split())
    told = "".join(line for line in outcome.err.splitlines(keepends=True) if " → " not in line)  # sizes, seconds
    assert (outcome.code, told) == (0, DONE[call])
    table = "layer       found    repaired to    location\n"
    table += "blocks.1.a  all NUL  float8_e4m3fn  tensor\n"
    assert outcome.out == (table if "broken" in call else "")


UNTOLD = (
    "int8.safetensors: blocks.0.a: no quantization config names its format, and its tensors fit several formats: INT8, "
    "INT8 ConvRot (use a file with quantization configs, or convert the original)"
)
REFUSED = {
    "dequantize plain.safetensors -o out.safetensors": (
        "plain.safetensors: nothing to dequantize: no layer is quantized in a supported format"
    ),
    "dequantize int8.safetensors -o out.safetensors": UNTOLD,
    "migrate plain.safetensors -o out.safetensors --to comfy": (
        "plain.safetensors: nothing to migrate: no layer is quantized with a scale"
    ),
    "migrate int8.safetensors -o out.safetensors --to comfy": UNTOLD,
    "migrate nvfp4.safetensors -o out.safetensors --to legacy": (
        "nvfp4.safetensors: a: a legacy file holds float8_e4m3fn with one scale per tensor only, and this is nvfp4"
    ),
    "repair int8.safetensors": UNTOLD,
    "-i int8.safetensors -o out.safetensors --format fp8 --requantize -q": UNTOLD,
}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
@pytest.mark.parametrize("call", REFUSED)
def test_bad_input_is_refused_and_nothing_changes(refused, files, call, dry):
    refused(f"{REFUSED[call]}\n", *call.split(), *dry)


def test_requantize_warns_about_rounding_twice_and_keeps_measured_scales(done, files):
    outcome = done("-i", "fp8.safetensors", *OUT, "--format", "int8", "--layer-format", "1.a=fp8", "--requantize")
    assert "note: requantized: 1 layer in FP8; the 16-bit original gives better quality\n" in outcome.err
    assert "note: layers that are already quantized are copied unchanged: 1 in FP8\n" in outcome.err
    assert "not measured" not in outcome.err
    with open_checkpoint("out.safetensors") as checkpoint:
        found = {name: layer.format.name for name, layer in find_layers(checkpoint).quantized.items()}
        assert found == {"blocks.0.a": "int8", "blocks.1.a": "fp8"}
        assert checkpoint.float32("blocks.1.a.input_scale") == 0.5


def test_requantizing_and_calibrating_at_once(done, flux_file, flux, scales):
    int8, output = flux_file.with_name("int8.safetensors"), flux_file.with_name("fp8.safetensors")
    done("-i", flux_file, "-o", int8, "--format", "int8")
    done("-i", int8, "-o", output, "--requantize", "--actcal", "--actcal-engine", "layer")
    assert set(scales(output)) == set(flux.quantized)
    assert min(scales(output).values()) < 1
