"""Statistics are mapped to files of the same model with other layer names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert_to_quant.calibrate_activation_scales import apply_statistics
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.errors import StatisticsError
from convert_to_quant.formats import WRITTEN
from convert_to_quant.layers import find_layers, input_scale
from convert_to_quant.naming import for_checkpoint, knowing_weights
from convert_to_quant.options import ConvertOptions, SolveOptions
from convert_to_quant.stats import Statistics

QKV, MLP = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"
RECORDED = {QKV: (48, 16), MLP: (64, 16), "final_layer.linear": (16, 16)}
SPELLINGS = {
    "its own": {QKV: (48, 16), MLP: (64, 16)},
    "prefixed": {f"model.diffusion_model.{QKV}": (48, 16), f"model.diffusion_model.{MLP}": (64, 16)},
    "HunyuanVideo": {"double_blocks.0.img_attn_qkv": (48, 16), "double_blocks.0.img_mlp.fc1": (64, 16)},
    "diffusers": {
        **{f"transformer_blocks.0.attn.to_{part}": (16, 16) for part in "qkv"},
        "transformer_blocks.0.ff.net.0.proj": (64, 16),
    },
}


@pytest.fixture
def file(save, build):
    """file({layer: shape}): an FP8 file."""

    def make(shapes: dict[str, tuple[int, int]]) -> Path:
        tensors: dict[str, Any] = {}
        for name, shape in shapes.items():
            tensors |= build.quantized([name], "tensor", shape=shape)[0]
        return save("fp8.safetensors", tensors)

    return make


@pytest.fixture
def table(file):
    """table({layer: shape}): the layers of an FP8 file."""

    def make(shapes: dict[str, tuple[int, int]]) -> Any:
        with open_checkpoint(file(shapes)) as checkpoint:
            return find_layers(checkpoint)

    return make


@pytest.mark.parametrize("onto", SPELLINGS)
@pytest.mark.parametrize("recorded", SPELLINGS)
def test_statistics_go_from_every_spelling_to_every_other(statistics, table, recorded, onto):
    *attention, mlp = SPELLINGS[recorded]
    seen = statistics(SPELLINGS[recorded]).with_facts(depends_on_conditioning=[mlp])

    found = for_checkpoint(seen, table(SPELLINGS[onto]))

    assert (dict(found.layers), found.left_out) == (SPELLINGS[onto], ())
    *others, last = found.names
    assert found.absmax[found.index(last)] == seen.absmax[seen.index(mlp)]
    assert {float(found.absmax[found.index(name)]) for name in others} <= {
        float(seen.absmax[seen.index(name)]) for name in attention
    }
    assert found.provenance["depends_on_conditioning"] == (last,)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_calibration_puts_ranges_onto_every_spelling(statistics, file, spelling):
    with open_checkpoint(file(SPELLINGS[spelling])) as checkpoint:
        calibration = apply_statistics(checkpoint, statistics(RECORDED, 448.0), SolveOptions(margin=1.0))
    *attention, mlp = SPELLINGS[spelling]
    assert calibration.scales == {**dict.fromkeys(attention, 1.0), mlp: 2.0}
    assert calibration.notes == []


def test_layers_that_were_not_recorded_are_named(statistics, table):
    other = "double_blocks.1.img_mlp.0"
    partial = table({QKV: (48, 16), MLP: (32, 16), other: (64, 16)})

    with pytest.raises(StatisticsError, match=rf"2 of 3 layers differ in name or shape: {MLP}, {other} \(--force"):
        for_checkpoint(statistics(RECORDED), partial)
    found = for_checkpoint(statistics(RECORDED), partial, force=True)
    assert (found.names, found.left_out) == ((QKV,), (MLP, other))
    with pytest.raises(StatisticsError, match="no layer matches"):
        for_checkpoint(statistics({"other": (4, 4)}), partial, force=True)


def test_text_encoders_in_the_same_file_are_left_alone(statistics, file):
    layer, encoder = f"model.diffusion_model.{QKV}", "text_encoders.t5.layer.0"
    with open_checkpoint(file({layer: (48, 16), encoder: (16, 16)})) as checkpoint:
        calibration = apply_statistics(checkpoint, statistics(RECORDED))
        assert input_scale(checkpoint, find_layers(checkpoint).quantized[encoder]) == 1.0
    assert [result.layer for result in calibration.results] == [layer]
    assert calibration.notes == [
        "left alone: 1 FP8 layer outside the diffusion model, whose input scales are never read"
    ]


@pytest.mark.parametrize("word", ["_orig_mod.", "module.", "dit.", "first."])
def test_statistics_of_a_wrapped_file_fit_it_and_a_bare_one(statistics, table, word):
    wrapped = {word + name: shape for name, shape in RECORDED.items()}
    assert dict(for_checkpoint(statistics(wrapped), table(wrapped)).layers) == wrapped
    if word != "first.":  # an unknown prefix
        assert dict(for_checkpoint(statistics(wrapped), table(RECORDED)).layers) == RECORDED


@pytest.fixture
def models(save):
    """models(seed): a file with two layers of random float32 weights."""

    def make(seed: int) -> Path:
        rng = np.random.default_rng(seed)
        weights = {f"{name}.weight": rng.standard_normal((256, 256)).astype(np.float32) / 16 for name in (QKV, MLP)}
        return save(f"{seed}.safetensors", weights)

    return make


@pytest.mark.parametrize("fmt", WRITTEN)
def test_statistics_know_their_model_in_every_format_and_no_other_of_its_shapes(statistics, models, tmp_path, fmt):
    recorded = statistics({QKV: (256, 256), MLP: (256, 256)})
    with open_checkpoint(models(1)) as checkpoint:
        recorded = knowing_weights(recorded, find_layers(checkpoint))
    recorded.save(tmp_path / "stats.safetensors")
    loaded = Statistics.load(tmp_path / "stats.safetensors")
    assert loaded == recorded
    assert loaded != recorded.replace(weights={})
    for seed in (1, 2):
        converted = tmp_path / f"{seed}_{fmt}.safetensors"
        with open_checkpoint(models(seed)) as checkpoint:
            convert(checkpoint, plan_conversion(checkpoint, ConvertOptions(format=fmt, preset="flux1")), converted)
        with open_checkpoint(converted) as checkpoint:
            table = find_layers(checkpoint)
            assert for_checkpoint(recorded.replace(weights={}), table).names == (QKV, MLP)  # older files are believed
            if seed == 1:
                assert for_checkpoint(loaded, table).names == (QKV, MLP)
                continue
            with pytest.raises(StatisticsError) as caught:
                for_checkpoint(loaded, table)
            problem = f"made for another model than {converted.name}: no layer matches in its weights"
            assert str(caught.value) == f"{loaded.path}: {problem} (observe this model first)"
