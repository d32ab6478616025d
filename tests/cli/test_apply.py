"""`apply` and `merge`: scales from statistics, and checks before they are written."""

from __future__ import annotations

import numpy as np
import pytest

from convert_to_quant import headroom
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.layers import find_layers
from convert_to_quant.naming import knowing_weights

LAYER = "double_blocks.0.img_attn.qkv"
OTHER = "double_blocks.0.img_attn.proj"
SHAPES = {LAYER: (32, 16), OTHER: (16, 16)}


@pytest.fixture
def model(save, done):
    rng = np.random.default_rng(0)
    weights = {name + ".weight": rng.standard_normal(shape).astype(np.float16) for name, shape in SHAPES.items()}
    path = save("bf16.safetensors", weights).with_name("fp8.safetensors")
    done("-i", path.with_name("bf16.safetensors"), "-o", path, "--preset", "flux1")
    return path


@pytest.fixture
def stats(tmp_path, statistics):
    """stats({layer: largest value}, name): a statistics file."""

    def make(largest, name="stats"):
        path = tmp_path / f"{name}.safetensors"
        statistics(SHAPES, largest).save(path)
        return path

    return make


def test_the_largest_value_of_all_files_determines_the_scale(done, model, stats, scales, monkeypatch):
    monkeypatch.setattr(headroom, "column_energies", None)  # with a margin, no weight is read
    first, second = stats({LAYER: 896.0, OTHER: 4.48}, "1"), stats({LAYER: 448.0, OTHER: 44.8}, "2")
    done("apply", model, first, second, "-o", model.with_name("out.safetensors"), "--margin", "1")
    assert scales(model.with_name("out.safetensors")) == {LAYER: 2.0, OTHER: pytest.approx(0.1)}


def test_a_merged_file_is_equivalent_to_its_parts(done, model, stats, tmp_path, scales):
    files = [stats({LAYER: 100.0 + number, OTHER: 5.0 - number}, number) for number in range(3)]
    merged, backwards, apart, together = (tmp_path / f"{name}.safetensors" for name in "mbat")
    done("merge", *files, "-o", merged)
    done("merge", *reversed(files), "-o", backwards)
    assert merged.read_bytes() == backwards.read_bytes()
    done("apply", model, *files, "-o", apart)
    done("apply", model, merged, "-o", together)
    assert scales(apart) == scales(together)


def test_a_layer_that_was_never_visited_keeps_its_scale_and_is_named(done, model, stats, scales):
    out = model.with_name("out.safetensors")
    told = done("apply", model, stats({LAYER: 896.0}), "-o", out, "--margin", 1.5).err
    assert scales(out) == {LAYER: 3.0}
    assert f"note: {OTHER}: never visited: keeps its scale" in told


def test_statistics_of_another_model_are_refused_without_force(done, refused, model, statistics, tmp_path, scales):
    stats, out = tmp_path / "stats.safetensors", tmp_path / "out.safetensors"
    statistics(SHAPES, {LAYER: 896.0, OTHER: 1.0}).take([LAYER]).save(stats)
    refused(f"{stats}: made for another model", "apply", model, stats, "-o", out)
    told = done("apply", model, stats, "-o", out, "--force", "--margin", 1.5).err
    assert f"{OTHER}: not in these statistics: keeps its scale" in told
    assert scales(out) == {LAYER: 3.0}


@pytest.mark.parametrize("command", ["apply MODEL STATS --dry-run", "report STATS MODEL"])
def test_statistics_of_a_model_with_equal_shapes_and_other_weights_are_refused(
    done, refused, model, statistics, tmp_path, command
):
    stats = tmp_path / "stats.safetensors"
    words = command.replace("MODEL", str(model)).replace("STATS", str(stats)).split()
    with open_checkpoint(model) as checkpoint:
        known = knowing_weights(statistics(SHAPES), find_layers(checkpoint))
    known.save(stats)
    done(*words)
    known.replace(weights={name: -values for name, values in known.weights.items()}).save(stats)
    refused(f"{stats}: made for another model than fp8.safetensors: no layer matches in its weights", *words)


def test_swapped_arguments_are_detected(refused, model, stats):
    path = stats({})
    hint = f"convert_to_quant apply {model} {path} ..."
    refused(
        f"{path} contains statistics, but the model comes first ({hint})\n", "apply", path, model, "--dry-run", code=2
    )
    new = model.with_name("new.safetensors")
    told = f"{new}: no such file ({model} exists; were input and output swapped? -o names the output)\n"
    for words in (("-i", new), ("apply", new, path), ("dequantize", new)):
        refused(told, *words, "-o", model)


def test_duplicate_statistics_are_ignored_with_a_note(done, model, stats):
    path, twin = stats({LAYER: 1.0}), stats({LAYER: 1.0}, "twin")
    for words in (("merge", path, twin, "-o", model.with_name("all.safetensors")), ("apply", model, path, twin)):
        assert f"note: {twin} is a duplicate of {path} and is ignored\n" in done(*words, "--dry-run").err
