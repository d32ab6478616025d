"""FP8 layers without quantization configs: plain casts, and scales alone."""

from __future__ import annotations

import numpy as np
import pytest

from convert_to_quant.inspection import inspect_file

NAMES = ("blocks.0.a", "blocks.1.a")
LAYER = ("--actcal", "--actcal-engine", "layer")


@pytest.fixture
def cast(save, build):
    """A model cast to FP8, including norms, biases and a layer outside of the blocks."""
    tensors, _ = build.quantized([*NAMES, "head"], "none", input_scale=None)
    tensors = {name: value for name, value in tensors.items() if name.endswith(".weight")}
    codes = np.full(16, 0x38, np.uint8)
    tensors |= {"blocks.0.norm.weight": ("F8_E4M3", codes), "blocks.0.a.bias": ("F8_E4M3", codes)}
    return save("cast.safetensors", tensors)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_plain_cast_gets_configs(done, contents, cast, tmp_path, legacy):
    output = tmp_path / "out.safetensors"
    told = done("-i", cast, "-o", output, *["--legacy"] * legacy).err
    assert "plain casts to FP8 without scales: 3 layers, 2 of them declared with a scale of 1.0" in told
    assert contents(cast).items() <= contents(output).items()
    one, scale = np.float32(1).tobytes(), "scale_weight" if legacy else "weight_scale"
    assert [contents(output)[f"{name}.{scale}"] for name in NAMES] == [one, one]
    found = inspect_file(output)
    assert found.readings == {"fp8-at-one": 2, "cast": 1}
    assert [problem.kind for problem in found.problems] == ["raw-fp8"]


def test_a_plain_cast_is_listed_and_calibrated_but_not_in_place(ctq, done, cast, tmp_path):
    listed = ctq("-i", cast, "--dry-run").out
    assert listed.count("a plain cast: declared with a scale of 1.0") == 2
    assert "head" in listed
    output = tmp_path / "out.safetensors"
    done("-i", cast, "-o", output, *LAYER)
    assert inspect_file(output).input_states == {"guessed": 2}
    in_place = ctq("-i", cast, "--in-place", *LAYER)
    assert in_place.code == 1
    assert "-o NEW --actcal adds quantization configs and input scales" in in_place.err
    other = ctq("-i", cast, "-o", tmp_path / "other.safetensors", "--format", "int8")
    assert other.code == 1
    assert (
        ", copied unchanged; the 16-bit original gives better quality, and --requantize quantizes them again"
        in other.err
    )


def test_scales_without_a_config_cause_a_note_and_get_one_with_mark(ctq, save, build, tmp_path):
    output = tmp_path / "out.safetensors"
    told = "note: ComfyUI ignores the scales of 2 layers without a quantization config (to add configs: --mark)"
    for spelled in (".weight_scale", ".scale_weight"):
        tensors, _ = build.quantized(NAMES, "none", input_scale=None)
        path = save("m.safetensors", {name.replace(".weight_scale", spelled): one for name, one in tensors.items()})
        assert ctq("-i", path, "-o", output, *LAYER).err.splitlines()[-2] == told
        assert inspect_file(output).readings == {"scale-dropped": 2}
        marked = ctq("-i", path, "-o", output, *LAYER, "--mark")
        assert "without a quantization config" not in marked.err
        assert inspect_file(output).readings == {"fp8": 2}
        assert inspect_file(output).input_states == {"guessed": 2}
    assert ctq("-i", path, "--in-place", *LAYER, "--mark").code == 2
