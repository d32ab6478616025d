"""Adapters merged before rounding: the output equals that of a file that numpy merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert_to_quant import quantize as quantize_module
from convert_to_quant.checkpoint import Entry, open_checkpoint, write_checkpoint
from convert_to_quant.convert import convert, plan_conversion, surviving
from convert_to_quant.errors import TensorError
from convert_to_quant.formats.record import narrow_bfloat16, widen_bfloat16
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.lora import Survival, open_loras
from convert_to_quant.names import PROVENANCE_KEY
from convert_to_quant.options import ConvertOptions

FIRST, SECOND, KEPT = "blocks.0.linear", "blocks.1.linear", "final.linear"
OUT, IN, RANK = 272, 256, 4


def factors(layer: str, seed: int, alpha: float | None = None) -> dict[str, Any]:
    """An adapter of multiples of 1/64, whose products add up exactly in float32 in any order."""
    random = np.random.default_rng(seed)
    found = {
        f"{layer}.lora_A.weight": random.integers(-8, 9, (RANK, IN)).astype(np.float32) / 64,
        f"{layer}.lora_B.weight": random.integers(-8, 9, (OUT, RANK)).astype(np.float32) / 64,
    }
    return found if alpha is None else {**found, f"{layer}.alpha": np.float32(alpha)}


def product(tensors: dict[str, Any], layer: str, scale: float) -> Any:
    return np.float32(scale) * (tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"])


def weight(seed: int) -> Any:
    """bfloat16 bits [OUT, IN]."""
    return narrow_bfloat16(np.random.default_rng(seed).standard_normal((OUT, IN)).astype(np.float32) / 16)


def written(path: Path, entries: dict[str, Any]) -> Path:
    write_checkpoint(
        path, {name: each if isinstance(each, Entry) else Entry.of(each) for name, each in entries.items()}
    )
    return path


@pytest.fixture
def model(tmp_path):
    layers = {name: Entry.of(weight(seed), "BF16") for seed, name in enumerate((FIRST, SECOND, KEPT))}
    return written(tmp_path / "model.safetensors", {f"{name}.weight": each for name, each in layers.items()})


def run(source: Path, output: Path, *loras: str, device: str = "cpu", **options: Any) -> Survival:
    found = Survival()

    def measure(writer: Any) -> None:
        nonlocal found
        with writer.reopen(source) as made:
            found = surviving(checkpoint, made, plan)

    with open_checkpoint(source) as checkpoint, open_loras(loras) as opened:
        plan = plan_conversion(checkpoint, ConvertOptions(exclude=("final",), **options), opened)
        convert(checkpoint, plan, output, device=device, before_commit=measure)
    return found


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    with open_checkpoint(path) as checkpoint:
        return {name: (checkpoint.tensors[name].dtype, checkpoint.raw(name).tobytes()) for name in checkpoint}


@pytest.mark.parametrize("weight_scale", ["absmax", "mse"])
@pytest.mark.parametrize("fmt", ["fp8", "int8", "int8-tensor", "int8-convrot", "mxfp8", "nvfp4", "w4a8"])
def test_the_output_equals_that_of_a_merged_file(tmp_path, model, monkeypatch, fmt, weight_scale):
    """Two files, with strengths and alpha, one on two layers; in bands of a few rows."""
    monkeypatch.setattr(quantize_module, "BAND_VALUES", 50 * IN)
    one, two = factors(FIRST, 5, alpha=8) | factors(KEPT, 6), factors(FIRST, 7)
    first, second = written(tmp_path / "one.safetensors", one), written(tmp_path / "two.safetensors", two)
    survival = run(model, tmp_path / "ours.safetensors", f"{first}:0.5", f"{second}:-2", format=fmt,
                   weight_scale=weight_scale)  # fmt: skip

    change = product(one, FIRST, 0.5 * 8 / RANK) + product(two, FIRST, -2)
    merged = widen_bfloat16(weight(0)) + product(one, FIRST, 0.5 * 8 / RANK) + product(two, FIRST, -2)
    kept = narrow_bfloat16(widen_bfloat16(weight(2)) + product(one, KEPT, 0.5))
    entries = {FIRST: merged, SECOND: Entry.of(weight(1), "BF16"), KEPT: Entry.of(kept, "BF16")}
    before = written(tmp_path / "before.safetensors", {f"{name}.weight": each for name, each in entries.items()})
    run(before, tmp_path / "theirs.safetensors", format=fmt, weight_scale=weight_scale)

    assert tensors_of(tmp_path / "ours.safetensors") == tensors_of(tmp_path / "theirs.safetensors")
    with open_checkpoint(tmp_path / "ours.safetensors") as checkpoint:
        stored = dequantize(checkpoint, find_layers(checkpoint).quantized[FIRST])
        said = json.loads(checkpoint.metadata[PROVENANCE_KEY])["convert"]["merged"]
    left = (stored - widen_bfloat16(weight(0))).ravel()
    assert survival.correlation == pytest.approx(np.corrcoef(left, change.ravel())[0, 1], abs=1e-3)
    assert said == [{"file": "one.safetensors", "strength": 0.5}, {"file": "two.safetensors", "strength": -2}]


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_torch_on_a_device_writes_the_same(tmp_path, model, fmt):
    """The code path of GPUs, on "cpu:0"."""
    lora = written(tmp_path / "one.safetensors", factors(FIRST, 5) | factors(KEPT, 6))
    for device in ("cpu", "cpu:0"):
        run(model, tmp_path / f"{device[3:]}.safetensors", str(lora), format=fmt, device=device)
    assert tensors_of(tmp_path / ".safetensors") == tensors_of(tmp_path / ":0.safetensors")


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_an_unquantized_layer_is_rounded_once_to_its_dtype(tmp_path, dtype):
    kind = np.float16 if dtype == "F16" else np.float32
    plain = (np.random.default_rng(0).standard_normal((OUT, IN)) / 16).astype(kind)
    model = written(tmp_path / "in.safetensors", {f"{FIRST}.weight": plain, f"{KEPT}.weight": plain})
    lora = factors(KEPT, 6)
    run(model, tmp_path / "out.safetensors", str(written(tmp_path / "lora.safetensors", lora)))
    expected = (plain.astype(np.float32) + product(lora, KEPT, 1)).astype(kind)
    assert tensors_of(tmp_path / "out.safetensors")[f"{KEPT}.weight"] == (dtype, expected.tobytes())


def test_a_quantized_layer_is_merged_only_with_requantize(tmp_path, model):
    quantized, output = tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"
    run(model, quantized)
    lora = factors(FIRST, 5)
    path = str(written(tmp_path / "lora.safetensors", lora))
    with pytest.raises(TensorError) as caught:
        run(quantized, output, path, format="int8")
    assert str(caught.value) == (
        f"{quantized}: {FIRST}.weight: a LoRA changes this layer, which is already FP8 and would not be requantized "
        "(merge into the 16-bit original, or add --requantize)"
    )
    run(quantized, output, path, requantize=True)  # FP8 again
    with open_checkpoint(quantized) as checkpoint:
        merged = dequantize(checkpoint, find_layers(checkpoint).quantized[FIRST]) + product(lora, FIRST, 1)
    before = written(tmp_path / "before.safetensors", {f"{FIRST}.weight": merged})
    run(before, tmp_path / "theirs.safetensors")
    ours, theirs = tensors_of(output), tensors_of(tmp_path / "theirs.safetensors")
    assert ours[f"{FIRST}.weight"] == theirs[f"{FIRST}.weight"]
    assert ours[f"{SECOND}.weight"] == tensors_of(quantized)[f"{SECOND}.weight"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [(KEPT, "the merged weight has NaN or infinite values in BF16"), (FIRST, "the weight has NaN or infinite values")],
)
def test_merged_weights_that_overflow_are_refused_and_leave_no_file(tmp_path, model, layer, message):
    lora = written(tmp_path / "lora.safetensors", factors(layer, 5))
    with pytest.raises(TensorError, match=f"{layer}.weight: {message}"):
        run(model, tmp_path / "out.safetensors", f"{lora}:1e39")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_line_reports_what_survives_rounding(done, refused, tmp_path, model):
    lora = written(tmp_path / "lora.safetensors", factors(FIRST, 5) | factors(SECOND, 6))
    output, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    told = done("-i", model, "-o", output, "--format", "int8", "--merge-lora", f"{lora}:0.5", "--json", report).err
    said = json.loads(report.read_text())["merged"]
    survival = said["survival"]
    assert "LoRA: 2 adapters on 2 layers" in told
    assert 0.9 < survival["correlation"] <= 1
    assert f"correlation {survival['correlation']:.3f}, {survival['db']:.1f} dB" in told
    assert set(said["matched"]) == {FIRST, SECOND}
    refused(f"{lora}: the output is the same file as the input", "-i", model, "-o", lora, "--merge-lora", lora)
    twice = done("-i", model, "--dry-run", "--merge-lora", lora, "--merge-lora", f"{lora}:0.5")
    assert "note: --merge-lora names lora.safetensors 2 times: the strengths add up\n" in twice.err


@pytest.mark.parametrize(
    "words",
    [
        ("--format", "nvfp4"),
        ("--actcal", "--actcal-samples", "1", "--actcal-margin", "1"),
        ("--best", "--gpu", "rtx50", "--bits", "7", "--actcal-samples", "3"),
    ],
    ids=lambda words: words[0],
)
def test_differences_of_all_tensors_are_merged_before_measuring(done, flux_file, tmp_path, words):
    """The output equals that of a merged checkpoint, for weights, biases and norms."""
    after, differences = {}, {}
    with open_checkpoint(flux_file) as checkpoint:
        for seed, (name, info) in enumerate(checkpoint.tensors.items()):
            noise = np.random.default_rng(seed).standard_normal(info.shape).astype(np.float32)
            before = checkpoint.float32(name)
            wanted = narrow_bfloat16(before * (1 + noise / 8))
            after[name] = Entry.of(wanted, info.dtype)
            layer, _, kind = name.rpartition(".")
            suffix = {"weight": f"{layer}.diff", "bias": f"{layer}.diff_b"}.get(kind, f"{name}.diff")
            differences[f"diffusion_model.{suffix}"] = widen_bfloat16(wanted) - before
    lora, merged = written(tmp_path / "lora.safetensors", differences), written(tmp_path / "merged.safetensors", after)
    size = ("--actcal-height", 32, "--actcal-width", 32, "--actcal-text-tokens", 4) if "--format" not in words else ()
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    done("-i", merged, "-o", theirs, *words, *size)
    outcome = done("-i", flux_file, "-o", ours, *words, *size, "--merge-lora", lora)
    assert "unsupported" not in outcome.err
    assert "unmatched" not in outcome.err
    assert "merged change after rounding" in outcome.err
    assert tensors_of(ours) == tensors_of(theirs)


def test_trials_of_another_merge_are_refused(done, refused, flux_file, lora, tmp_path):
    output, kept = tmp_path / "out.safetensors", tmp_path / "kept.safetensors"
    small = ("--samples", 3, "--steps", 1, "--height", 32, "--width", 32, "--text-tokens", 4)
    best = ("-i", flux_file, "-o", output, "--best", "--gpu", "rtx50", "--bits", 9)
    done("observe", flux_file, "-o", kept, "--trials", *small)
    done(*best, "--from", kept)
    message = f"{kept}: measured with other adapters merged: none"
    refused(message, *best, "--merge-lora", f"{lora}:0.5", "--from", kept)
