"""Bad input on the command line: message and exit code, and no file is written or changed."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert_to_quant import convert as conversion
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import calibrate, convert
from convert_to_quant.errors import Error

LAYER = ("--actcal", "--actcal-engine", "layer")
MODEL = ("--actcal", "--actcal-samples", 1)
CALIBRATE = ("-i", "in.safetensors", "-o", "out.safetensors", *LAYER)
IN_PLACE = ("-i", "in.safetensors", "--in-place", *LAYER)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run in the test's folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(refused):
    """refused(whole message, words...)."""
    return lambda message, *words, **options: refused(f"{message}\n", *words, **options)


@pytest.fixture
def fp8(save, build):
    """Create in.safetensors with two FP8 layers of an unknown model, after a change to its tensors."""

    def make(change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
        tensors, metadata = build.quantized(["blocks.0", "blocks.1"], "tensor")
        change(tensors)
        save("in.safetensors", tensors, metadata)

    return make


def overwrite(path: Path, tensor: str, content: bytes, skip: int = 0) -> None:
    """Overwrite bytes of a tensor in a file."""
    with open_checkpoint(path) as checkpoint:
        offset = checkpoint.files[0].header.data_start + checkpoint.tensors[tensor].start + skip
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("it ran"),)


@pytest.mark.parametrize("words", [LAYER, ()], ids=["calibrate", "convert"])
@pytest.mark.parametrize(
    "content", [lambda whole: whole[:-1], lambda _: pickle.dumps(Bomb())], ids=["truncated", "a pickle"]
)
def test_an_unreadable_input_is_refused_with_the_readers_message(refused, build, content, words):
    Path("a.safetensors").write_bytes(content(build.file_bytes(*build.quantized(["blocks.0"], "tensor"))))
    with pytest.raises(Error) as caught:
        open_checkpoint("a.safetensors")
    refused(str(caught.value), "-i", "a.safetensors", "-o", "out.safetensors", *words)  # Bomb would leave a file


def test_a_damaged_fp8_file(refused, fp8):
    fp8(lambda tensors: tensors["blocks.1.weight"][1].__setitem__((2, 3), 0xFF))
    for words in (CALIBRATE, IN_PLACE):
        refused("in.safetensors: blocks.1.weight: the weight has NaN or infinite values", *words)


def test_nan_in_an_fp8_weight_of_a_model_that_runs(ctq, folder, fp8_file):
    overwrite(fp8_file, "single_blocks.0.linear2.weight", b"\x7f", skip=5)
    before = folder()
    outcome = ctq("-i", fp8_file, "-o", "out.safetensors", *MODEL)
    assert outcome.code == 1
    assert f"error: {fp8_file}: double_blocks.0.img_attn.qkv: the inputs of " in outcome.err
    assert "layers have infinities or NaN" in outcome.err
    assert folder() == before


def test_nan_in_a_bias_is_reported_for_the_input_file(ctq, flux_file):
    overwrite(flux_file, "img_in.bias", b"\xff" * 64)
    outcome = ctq("-i", flux_file, "-o", "out.safetensors", *MODEL)
    assert outcome.err.startswith(f"error: {flux_file}: img_in.bias: it has NaN or infinite values")
    assert (outcome.code, Path("out.safetensors").exists()) == (1, False)


INPUT_SCALE = "double_blocks.0.img_mlp.0.input_scale"


@pytest.mark.parametrize(("value", "engine"), [(-1.0, "layer"), (np.inf, "model")])
def test_an_invalid_input_scale_is_replaced_by_calibration(ctq, done, fp8_file, value, engine):
    done("-i", fp8_file, "--in-place", *LAYER)
    overwrite(fp8_file, INPUT_SCALE, struct.pack("<f", value))
    words = ("--in-place", *MODEL, "--actcal-engine", engine)
    outcome = done("-i", fp8_file, *words)
    problem = f"scales should be finite and not negative, found {value}"
    assert f"note: {INPUT_SCALE}: {problem}: unusable until a calibration replaces it\n" in outcome.err
    with open_checkpoint(fp8_file) as checkpoint:
        assert 0 < checkpoint.float32(INPUT_SCALE) <= 1
    assert "of no use" not in ctq("-i", fp8_file, *words, "--dry-run").err


def test_an_invalid_input_scale_is_refused_where_it_is_used(done, refused, flux_file, fp8_file):
    done("-i", fp8_file, "--in-place", *LAYER)
    overwrite(fp8_file, INPUT_SCALE, struct.pack("<f", np.nan))
    message = f"{fp8_file}: {INPUT_SCALE}: scales should be finite and not negative, found nan"
    refused(message, "check", flux_file, fp8_file, "--height", 32, "--width", 32, "--steps", 1, "--samples", 1)


def test_a_file_with_nothing_to_do(refused, save):
    save("in.safetensors", {"norm.weight": np.ones(4, np.float32)})
    message = (
        "in.safetensors: the diffusion model in this file has no FP8 layers with weight scales "
        "(to convert and calibrate in one step: convert_to_quant -i IN -o OUT --actcal)"
    )
    refused(message, "in.safetensors", "-o", "out.safetensors", main=calibrate.main)
    message = (
        "in.safetensors: nothing to convert: no layer would become FP8 (--dry-run shows the reason for each layer)"
    )
    refused(message, "-i", "in.safetensors", "-o", "out.safetensors", "-q")


@pytest.mark.parametrize("words", [("-o", "out.safetensors"), ("-o", "out.safetensors", "--dry-run"), ("--in-place",)])
def test_a_plain_cast_has_nothing_to_calibrate_without_configs(refused, save, words):
    codes = np.full((64, 64), 0x38, np.uint8)
    save("in.safetensors", {"blocks.0.a.weight": ("F8_E4M3", codes), "head.weight": np.eye(64, dtype=np.float32)})
    message = (
        "in.safetensors: blocks.0.a: nothing to calibrate: a plain FP8 cast without scales (convert_to_quant -i FILE "
        "-o NEW --actcal adds quantization configs and input scales; converting the 16-bit original is more accurate)"
    )
    refused(message, "in.safetensors", *words, main=calibrate.main)


@pytest.mark.parametrize("words", [LAYER, ()], ids=["calibrate", "convert"])
@pytest.mark.parametrize("link", ["symbolic link", "hard link", "another spelling"])
def test_the_output_may_not_be_the_input_under_another_name(refused, fp8, words, link):
    fp8()
    output = f"../{Path.cwd().name}/in.safetensors" if link == "another spelling" else "link.safetensors"
    if link == "symbolic link":
        Path(output).symlink_to("in.safetensors")
    elif link == "hard link":
        Path(output).hardlink_to("in.safetensors")
    hint = "name another output, or add --in-place" if words else "name another output"
    message = f"{output}: the output is the same file as the input in.safetensors ({hint})"
    refused(message, "-i", "in.safetensors", "-o", output, *words)


def test_circular_links_are_an_error_in_one_line(ctq):
    Path("a.safetensors").symlink_to("b.safetensors")
    Path("b.safetensors").symlink_to("a.safetensors")
    outcome = ctq("-i", "a.safetensors", "-o", "out.safetensors")
    assert outcome.code == 1
    assert outcome.err.startswith("error: a.safetensors: ")
    assert outcome.err.count("\n") == 1


def test_a_shard_of_the_input_is_refused_as_output_before_any_work(refused, save_shards, build, monkeypatch):
    index = save_shards("m", [build.quantized([name], "tensor")[0] for name in ("blocks.0", "blocks.1")]).name
    shard, new = "m-00002-of-00002.safetensors", "out.safetensors.index.json"
    monkeypatch.setattr(convert, "calibrate", None)
    message = f"{shard}: the output is the same file as the input {shard} (name another output, or add --in-place)"
    refused(message, "-i", index, *LAYER, "-o", shard)
    message = f"{shard}: --json and -i are the same file (name another file for --json)"
    refused(message, "-i", index, *LAYER, "-o", new, "--json", shard)
    message = f"{shard}: --json and MODEL are the same file (name another file for --json)"
    refused(message, "inspect", ".", "--json", shard)


def lora(save, name: str, rows: int = 16, columns: int = 32, value: float = 1.0) -> None:
    tensors = {f"{name}.lora_A.weight": np.full((2, columns), value, np.float32)}
    save("lora.safetensors", {**tensors, f"{name}.lora_B.weight": np.ones((rows, 2), np.float32)})


def test_adapters_that_cannot_be_used(refused, fp8, save):
    fp8()
    refused("lora.safetensors: no such file", *IN_PLACE, "--actcal-lora", "lora.safetensors")
    lora(save, "blocks.0", value=np.nan)
    message = "lora.safetensors: blocks.0.lora_A.weight: has NaN or infinite values (the file is damaged)"
    refused(message, *IN_PLACE, "--actcal-lora", "lora.safetensors")


def test_adapters_that_do_not_fit_are_refused_before_converting(refused, flux_file, save, monkeypatch):
    monkeypatch.setattr(conversion, "convert", None)
    lora(save, "diffusion_model.double_blocks.0.img_mlp.0")
    message = (
        "lora.safetensors: diffusion_model.double_blocks.0.img_mlp.0: nothing in this LoRA can be applied: 1 "
        "unsupported (its change is [16, 32], but double_blocks.0.img_mlp.0 is [128, 32]); the checkpoint's layers "
        "have names like img_in (was it made for this model?)"
    )
    refused(message, "-i", flux_file, "-o", "out.safetensors", *LAYER, "--actcal-lora", "lora.safetensors")


def test_an_adapter_as_output_and_an_invalid_strength_are_refused(refused, fp8, save):
    fp8()
    lora(save, "blocks.0")
    message = "lora.safetensors: the output is the same file as the input lora.safetensors (name another output)"
    refused(message, *IN_PLACE[:2], "-o", "lora.safetensors", *LAYER, "--actcal-lora", "lora.safetensors:0.5")
    message = "lora.safetensors: a LoRA's strength should be a finite number, found nan"
    refused(message, *IN_PLACE, "--actcal-lora", "lora.safetensors:nan", code=2)


@pytest.mark.parametrize(
    "words",
    [
        "-i in -o out --actcal --actcal-device cuda:99",
        "-i in --dry-run --actcal --actcal-device cuda:99",
        "observe in -o out --device cuda:99",
        "check in out --device cuda:99",
    ],
)
def test_a_missing_device_is_refused_before_reading(ctq, words):
    outcome = ctq(*words.split())
    assert outcome.code == 2
    assert outcome.err.startswith("error: device 'cuda:99' cannot be used: ")
    assert outcome.err.endswith("(the default is a GPU if there is one, else the CPU)\n")


@pytest.mark.parametrize(
    ("input_scale", "problem"),
    [
        ({}, "the file has no such tensor yet"),
        ({"blocks.1.input_scale": ("BF16", np.uint16(0x3F80))}, "it is BF16 [] and must become F32 []"),
    ],
    ids=["no scale", "a scale in bfloat16"],
)
def test_in_place_without_a_float32_scalar_is_refused_before_any_work(refused, fp8, monkeypatch, input_scale, problem):
    monkeypatch.setattr(convert, "calibrate", None)
    fp8(lambda tensors: [tensors.pop("blocks.1.input_scale"), tensors.update(input_scale)])
    place = "in.safetensors: blocks.1.input_scale"
    refused(f"{place}: cannot be changed in place: {problem} (write a new file with -o instead)", *IN_PLACE)


def test_the_document_is_json_even_for_layers_without_a_range(ctq, fp8):
    fp8(lambda tensors: tensors["blocks.0.weight"][1].fill(0))
    outcome = ctq(*IN_PLACE, "--dry-run", "--json", "-")
    document = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second = document["layers"]
    assert (first["range"], first["scale_after"]) == (None, 1.0)
    assert first["reason"] == "weight is empty or all zero: keeps its scale"
    assert second["range"] > 0
