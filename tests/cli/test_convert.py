"""`convert_to_quant -i IN -o OUT`, with and without --actcal, on a tiny Flux.1."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.layers import find_layers
from convert_to_quant.stats import Statistics

MODEL = ("--actcal", "--actcal-samples", "1")
TIGHT = (*MODEL, "--actcal-margin", "1")
"""Without headroom every layer gets its own scale; with it, most layers of this model keep 1.0."""
LAYER = ("--actcal", "--actcal-engine", "layer")


def test_unmeasured_scales_cause_a_note_with_the_command_to_measure_them(done, flux_file, scales):
    out = flux_file.with_name("my out.safetensors")
    measures = f"to measure them: convert_to_quant -i '{out}' --actcal --in-place"
    told = f"note: input scales are not measured, so ComfyUI uses 1.0 ({measures})"
    assert told in done("-i", flux_file, "-o", out).err
    assert scales(out) == {}  # other readers would take one of 1.0 for measured
    done("-i", out, "--in-place", *LAYER)
    for words in (["--no-input-scale"], ["--scaling-mode", "row"], LAYER):
        assert "not measured" not in done("-i", flux_file, "-o", out, *words).err


@pytest.mark.parametrize(("name", "told"), [("a.gguf", True), ("a", True), ("a.SFT", False), ("a.safetensors", False)])
def test_a_suffix_that_comfyui_does_not_read_causes_a_note(done, flux_file, fp8_file, name, told):
    for words in (("-i", flux_file), ("-i", fp8_file, *LAYER)):
        said = done(*words, "-o", flux_file.with_name(name)).err
        assert (f"note: ComfyUI does not read {name} as safetensors" in said) == told


def test_in_place_reports_when_nothing_changes(ctq, fp8_file):
    words = ("-i", fp8_file, "--in-place", *LAYER)
    assert ctq(*words).err.endswith(f"wrote {fp8_file}\n")
    before = fp8_file.read_bytes(), fp8_file.stat().st_mtime_ns
    assert ctq(*words).err.endswith(f"{fp8_file} already has these scales; nothing was written\n")
    assert (fp8_file.read_bytes(), fp8_file.stat().st_mtime_ns) == before


def test_dry_run_prints_the_plan_with_reasons_and_writes_nothing(ctq, done, flux_file, folder):
    before = folder()
    outcome = done("-i", flux_file, "--dry-run", "--exclude_layers", r"txt_mlp\.2$")
    rows = {line.split()[0]: line for line in outcome.out.splitlines()}
    assert "fp8" in rows["double_blocks.0.img_mlp.0"]
    assert r"excluded by 'txt_mlp\\.2$'" in rows["double_blocks.0.txt_mlp.2"]
    assert "image embedder: feeds every block" in rows["img_in"]
    assert "dry run: 12 of 21 linear layers" in outcome.err

    outcome = ctq("-i", flux_file, "--dry-run", "-v", "--json", "-")
    document = json.loads(outcome.out)
    assert (document["family"], document["counts"]) == ("flux1", {"quantized": 13, "kept": 8})
    assert "double_blocks.0.img_mlp.0" in outcome.err, "the table makes way"
    assert folder() == before


def test_actcal_and_observe_use_the_same_number_and_size_of_images(done, fp8_file):
    size = "--{0}height 32 --{0}width 48 --{0}text-tokens 5 --{0}samples 4"
    report, statistics = fp8_file.with_name("r.json"), fp8_file.with_name("s.safetensors")
    done("-i", fp8_file, "--dry-run", "--actcal", *size.format("actcal-").split(), "--json", report)
    done("observe", fp8_file, "-o", statistics, *size.format("").split())
    seen = Statistics.load(statistics)
    found = {layer["layer"]: layer for layer in json.loads(report.read_text())["layers"]}
    assert seen.samples == 4
    for name, shape, rows, absmax in zip(seen.names, seen.layers.values(), seen.rows, seen.absmax, strict=True):
        assert found[name]["multiply_adds"] == rows * shape[0] * shape[1]
        assert found[name]["range"] == absmax
    image = "double_blocks.0.img_mlp.0"
    assert seen.rows[seen.names.index(image)] == 4 * 4 * 2 * 3  # images, noise levels, tokens


def test_converting_and_calibrating_at_once_equals_two_runs(done, flux_file, fp8_file, flux, scales):
    at_once, after = flux_file.with_name("once.safetensors"), flux_file.with_name("after.safetensors")
    told = done("-i", flux_file, "-o", at_once, *TIGHT).err
    assert "calibrated 13 of 13 layers by running the model on noise" in told
    assert "note: calibrated on noise: in " in told
    done("-i", fp8_file, "-o", after, *TIGHT)
    assert scales(at_once) == scales(after)
    assert set(scales(after)) == set(flux.quantized)
    assert 1.0 not in scales(after).values()
    for path in (at_once, after):
        with open_checkpoint(path) as checkpoint:
            layers = find_layers(checkpoint).quantized
        assert {name for name, layer in layers.items() if layer.full_precision} == set(flux.one_row)

    # In place, the file that was converted first becomes the very same file.
    done("-i", fp8_file, "--in-place", *TIGHT)
    assert fp8_file.read_bytes() == at_once.read_bytes()
    assert not list(fp8_file.parent.glob("*.undo"))


def test_verbose_prints_scales_source_and_range_of_every_layer(done, fp8_file, flux):
    report = fp8_file.with_name("r.json")
    head, *rows = done("-i", fp8_file, "--dry-run", "-v", "--json", report, *TIGHT).out.splitlines()
    assert all(column in head for column in ("layer", "range", "scale before", "scale after", "source"))
    layers = json.loads(report.read_text())["layers"]
    assert [row.split()[0] for row in rows] == [layer["layer"] for layer in layers]
    assert set(flux.quantized) == {layer["layer"] for layer in layers}
    for row, layer in zip(rows, layers, strict=True):
        assert (layer["source"], layer["scale_before"]) == ("model", 1.0)
        assert layer["scale_after"] == float(np.float32(layer["range"] / 448))
        assert f"{layer['range']:.5g}" in row
        assert f"{layer['scale_after']:.5g}" in row

    outcome = done("-i", fp8_file, "--dry-run", "-v", "--json", "-", *LAYER)
    assert {layer["source"] for layer in json.loads(outcome.out)["layers"]} == {"layer"}
    assert "scale before" in outcome.err, "the table makes way"


@pytest.mark.parametrize("target", ["--in-place", "-o out.safetensors", "--dry-run"])
def test_a_model_that_cannot_be_run_is_refused_and_nothing_is_written(refused, save, build, monkeypatch, target):
    path = save("m.safetensors", *build.quantized(["blocks.0.fc1", "blocks.0.fc2"], "both"))
    monkeypatch.chdir(path.parent)
    message = (
        f"{path}: the model cannot be run, so nothing was calibrated: its tensor names fit no known family "
        "(--actcal-engine layer guesses scales from weights; observe --comfyui-dir DIR may run the model in ComfyUI)\n"
    )
    refused(message, "-i", path, *target.split(), "--actcal")


def test_ranges_cover_the_model_with_and_without_its_lora(done, lora, fp8_file, scales):
    outputs = [fp8_file.with_name(f"{name}.safetensors") for name in ("plain", "with_lora")]
    done("-i", fp8_file, "-o", outputs[0], *MODEL)
    told = done("-i", fp8_file, "-o", outputs[1], *MODEL, "--actcal-lora", f"{lora}:3.0").err
    assert "note: LoRA: 1 adapter on 1 layer" in told
    plain, with_lora = map(scales, outputs)
    assert all(with_lora[name] >= scale for name, scale in plain.items())
    assert with_lora["double_blocks.0.img_mlp.0"] == plain["double_blocks.0.img_mlp.0"]
    assert with_lora["double_blocks.0.img_mlp.2"] > 2 * plain["double_blocks.0.img_mlp.2"]


def test_conversion_flags_without_effect_on_an_fp8_file_are_named(done, fp8_file):
    told = done("-i", fp8_file, "--dry-run", *LAYER, "--scaling_mode", "row", "--exclude-layers", "x").err
    assert "note: the input is already quantized and is only calibrated; no effect: --exclude-layers" in told


def test_legacy_files_stay_legacy_and_are_calibrated(done, flux_file, flux, contents):
    output = flux_file.with_name("legacy.safetensors")
    told = done("-i", flux_file, "-o", output, "--legacy", *TIGHT).err
    assert "3 layers should compute in full precision (first: double_blocks.0.img_mod.lin), but a legacy file" in told
    tensors = contents(output)
    assert "scaled_fp8" in tensors
    assert not any(name.endswith((".input_scale", ".comfy_quant")) for name in tensors)
    found = [np.frombuffer(tensors[name + ".scale_input"], np.float32)[0] for name in flux.quantized]
    assert 1.0 not in found
    assert min(found) > 0


def test_a_shard_index_is_converted_and_calibrated_shard_by_shard(done, save_shards, flux_tensors, flux):
    items = list(flux_tensors().items())
    index = save_shards("model", [dict(items[:30]), dict(items[30:])])
    output = index.with_name("out.safetensors.index.json")
    done("-i", index, "-o", output, *LAYER)
    with open_checkpoint(output) as checkpoint:
        assert len(checkpoint.files) == 2
        layers = find_layers(checkpoint).quantized
        assert set(layers) == set(flux.quantized)
        assert all(checkpoint.float32(layer.input_scale) != 1.0 for layer in layers.values())


CRASH = """
import os, sys
from convert_to_quant import cli, patch
write = patch.write_at
def once_and_die(*words):
    write(*words)
    os._exit(7)
patch.write_at = once_and_die
cli.main(["-i", sys.argv[1], "--in-place", "--actcal", "--actcal-engine", "layer"])
"""


def test_a_half_changed_file_is_restored_in_place_and_not_read(
    done, refused, fp8_file, flux_file, flux, statistics, scales
):
    stats, new, undo = (fp8_file.with_name(name) for name in ("s.safetensors", "new", "fp8.safetensors.undo"))
    statistics(flux.linear).save(stats)
    original = fp8_file.read_bytes()
    killed = subprocess.run([sys.executable, "-c", CRASH, str(fp8_file)], capture_output=True, text=True, check=False)
    assert killed.returncode == 7, killed.stderr
    assert undo.exists()
    assert fp8_file.read_bytes() != original
    problem = f"an in-place change was interrupted and left it half done; the old bytes are in {undo}"
    hint = "any command with --in-place restores them first, for example"
    command = f"convert_to_quant -i {fp8_file} --actcal --in-place"
    for words in (
        ("inspect", fp8_file),
        ("apply", fp8_file, stats, "--in-place", "--dry-run"),
        ("-i", fp8_file, "-o", new, *LAYER),
    ):
        refused(f"{fp8_file}: {problem} ({hint} `{command}`)\n", *words)
    told = done("-i", fp8_file, "--in-place", *LAYER).err
    assert f"note: {fp8_file}: an interrupted in-place change was undone" in told
    assert not undo.exists()
    assert 1.0 not in scales(fp8_file).values()
