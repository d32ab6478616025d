"""`apply` and `merge`: what was observed goes into the checkpoint, before which everything is checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from convert_to_quant import headroom
from convert_to_quant.checkpoint import Entry, open_checkpoint, write_checkpoint
from convert_to_quant.cli import main
from convert_to_quant.layers import find_layers, input_scale
from convert_to_quant.naming import knowing_weights
from convert_to_quant.stats import BIN_EDGES, Statistics

LAYER = "double_blocks.0.img_attn.qkv"
OTHER = "double_blocks.0.img_attn.proj"
SHAPES = {LAYER: (32, 16), OTHER: (16, 16)}


def seen(largest: dict[str, float], *, rows: int = 64) -> Statistics:
    """Statistics of layers whose values all lie in the bin of their largest."""
    empty = Statistics.empty(SHAPES)
    for number, name in enumerate(SHAPES):
        if name not in largest:
            continue
        value = np.float32(largest[name])
        empty.sigma_absmax[number, 7] = value
        bin_number = int(np.searchsorted(BIN_EDGES, value, side="right")) - 1
        empty.sigma_count[number, 7] = empty.histogram[number, bin_number] = rows * 16
        empty.row_histogram[number, bin_number] = empty.rows[number] = rows
        empty.rows_per_sample[number] = rows
        empty.calls[number] = 1
    return empty.replace(samples=1)


@pytest.fixture
def model(tmp_path):
    source, path = tmp_path / "bf16.safetensors", tmp_path / "fp8.safetensors"
    rng = np.random.default_rng(0)
    weights = {name + ".weight": rng.standard_normal(shape).astype(np.float16) for name, shape in SHAPES.items()}
    write_checkpoint(source, {name: Entry.of(values) for name, values in weights.items()})
    assert main(["-i", str(source), "-o", str(path), "--preset", "flux1", "-q"]) == 0
    return path


def scales(path: Path) -> dict[str, float]:
    with open_checkpoint(path) as checkpoint:
        return {name: input_scale(checkpoint, layer) for name, layer in find_layers(checkpoint).quantized.items()}


def test_the_largest_value_seen_in_any_file_becomes_the_scale(model, tmp_path):
    first, second, out = (tmp_path / name for name in ("1.safetensors", "2.safetensors", "out.safetensors"))
    seen({LAYER: 896.0, OTHER: 4.48}).save(first)
    seen({LAYER: 448.0, OTHER: 44.8}).save(second)
    assert main(["apply", str(model), str(first), str(second), "-o", str(out), "--margin", "1"]) == 0
    assert scales(out) == {LAYER: 2.0, OTHER: pytest.approx(0.1)}


def test_merged_files_give_the_same_bytes_as_the_files_themselves(model, tmp_path):
    files = [str(tmp_path / f"{number}.safetensors") for number in range(3)]
    for number, file in enumerate(files):
        seen({LAYER: 100.0 + number, OTHER: 5.0 - number}).save(file)
    merged, backwards, apart, together = (str(tmp_path / f"{name}.safetensors") for name in "mbat")
    assert main(["merge", *files, "-o", merged, "-q"]) == 0
    assert main(["merge", *reversed(files), "-o", backwards, "-q"]) == 0
    assert Path(merged).read_bytes() == Path(backwards).read_bytes()
    assert main(["apply", str(model), *files, "-o", apart, "-q"]) == 0
    assert main(["apply", str(model), merged, "-o", together, "-q"]) == 0
    assert scales(Path(apart)) == scales(Path(together))


@pytest.mark.parametrize("words", [("--margin", "1"), ("--method", "percentile"), ("--margin", "1", "--keep", "proj$")])
def test_no_weight_is_read_where_no_headroom_is_looked_for(model, tmp_path, monkeypatch, words):
    stats = tmp_path / "stats.safetensors"
    seen({LAYER: 896.0, OTHER: 44.8}).save(stats)
    monkeypatch.setattr(headroom, "column_energies", lambda *_: pytest.fail("a weight was read"))
    assert main(["apply", str(model), str(stats), "--in-place", "-q", *words]) == 0
    assert (scales(model)[OTHER] == 1.0) == ("--keep" in words), "layers to keep are left alone"


def test_a_layer_that_was_never_visited_keeps_its_scale_and_is_named(model, tmp_path, capsys):
    stats = tmp_path / "stats.safetensors"
    seen({LAYER: 896.0}).save(stats)
    assert main(["apply", str(model), str(stats), "--in-place"]) == 0
    assert scales(model) == {LAYER: 3.0, OTHER: 1.0}  # 1.5 times what was seen
    assert f"note: {OTHER}: never visited: keeps its scale" in capsys.readouterr().err


def test_a_dry_run_reports_and_writes_nothing(model, tmp_path, folder, capsys):
    stats = tmp_path / "stats.safetensors"
    seen({LAYER: 896.0, OTHER: 896.0}).save(stats)
    before = folder()
    assert main(["apply", str(model), str(stats), "--dry-run", "--json", "-", "--margin", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {entry["layer"]: entry["scale_after"] for entry in report["layers"]} == {LAYER: 4.0, OTHER: 4.0}
    assert folder() == before


def test_statistics_of_another_model_are_refused_and_forced_ones_name_the_rest(model, tmp_path, capsys):
    stats = tmp_path / "stats.safetensors"
    seen({LAYER: 896.0, OTHER: 1.0}).take([LAYER]).save(stats)
    assert main(["apply", str(model), str(stats), "--in-place"]) == 1
    assert "made for another model" in capsys.readouterr().err
    assert main(["apply", str(model), str(stats), "--in-place", "--force"]) == 0
    assert f"{OTHER}: not in these statistics: keeps its scale" in capsys.readouterr().err
    assert scales(model) == {LAYER: 3.0, OTHER: 1.0}


@pytest.mark.parametrize("command", [["apply", "MODEL", "STATS", "--dry-run"], ["report", "STATS", "MODEL"]])
def test_statistics_of_other_weights_of_the_same_shapes_are_refused_by_both_names(model, tmp_path, ctq, command):
    stats = tmp_path / "stats.safetensors"
    with open_checkpoint(model) as checkpoint:
        known = knowing_weights(seen({LAYER: 896.0, OTHER: 1.0}), find_layers(checkpoint))
    places = {"STATS": str(stats), "MODEL": str(model)}
    words = [places.get(word, word) for word in command]
    known.save(stats)
    assert ctq(*words).code == 0
    known.replace(weights={name: -values for name, values in known.weights.items()}).save(stats)
    done = ctq(*words)
    assert done.code == 1
    assert f"error: {stats}: made for another model than fp8.safetensors: no layer matches in its weights" in done.err


def test_swapped_arguments_are_told(ctq, fp8_file):
    stats = fp8_file.with_name("swapped.safetensors")
    assert ctq("observe", fp8_file, "-o", stats, "--steps", 1, "--height", 32, "--width", 32).code == 0
    outcome = ctq("apply", stats, fp8_file, "--dry-run")
    told = f"error: {stats} holds statistics: the model comes first (convert_to_quant apply {fp8_file} {stats} ...)\n"
    assert (outcome.code, outcome.err) == (2, told)
    new = fp8_file.with_name("new.safetensors")
    told = f"error: {new}: no such file ({fp8_file}, which would be written, is there: -o names the new file)\n"
    for words in (("-i", new), ("apply", new, stats), ("dequantize", new)):
        assert ctq(*words, "-o", fp8_file).err == told


def test_the_same_statistics_count_once_and_are_told(ctq, fp8_file):
    stats, twin = fp8_file.with_name("one.safetensors"), fp8_file.with_name("twin.safetensors")
    assert ctq("observe", fp8_file, "-o", stats, "--steps", 1, "--height", 32, "--width", 32).code == 0
    twin.write_bytes(stats.read_bytes())
    for words in (
        ("merge", stats, twin, "-o", fp8_file.with_name("all.safetensors")),
        ("apply", fp8_file, stats, twin),
    ):
        outcome = ctq(*words, "--dry-run")
        assert outcome.code == 0
        assert f"note: {twin} holds the same as {stats}: it counts once\n" in outcome.err
