"""Quantized files rewritten: rounded to another format, in BF16, and in other conventions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from on_disk import contents, converted

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import plan_conversion
from convert_to_quant.errors import OutputError, TensorError
from convert_to_quant.formats import FORMATS, WRITTEN
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.layout import write
from convert_to_quant.migration import plan_bfloat16, plan_migration
from convert_to_quant.names import TARGETS
from convert_to_quant.options import ConvertOptions

LAYER = "blocks.0.mlp"
OTHERS = {"blocks.0.norm.weight": np.ones(8, np.float32), "embed.weight": np.ones((3, 5), np.float16)}


def weights():
    """A weight [288, 256]: two tiles of scales and a part."""
    random = np.random.default_rng(3)
    weight = random.standard_normal((288, 256)) * np.exp(random.standard_normal((288, 1)))
    weight[3] = 0
    return weight.astype(np.float32)


def real(checkpoint):
    return dequantize(checkpoint, find_layers(checkpoint).quantized[LAYER])


@pytest.fixture
def make(save, tmp_path):
    """A file with one layer in a format, and other tensors."""

    def make(name):
        source = save("16.safetensors", {LAYER + ".weight": weights()} | OTHERS, {"author": "me"})
        converted(source, output := tmp_path / f"{name}.safetensors", format=name)
        return output

    return make


@pytest.mark.parametrize(("before", "after"), [(name, WRITTEN[number - 1]) for number, name in enumerate(WRITTEN)])
def test_any_format_is_rounded_to_any_other_like_its_real_weights(make, save, tmp_path, monkeypatch, before, after):
    monkeypatch.setattr("convert_to_quant.quantize.BAND_VALUES", 50 * 256)  # bands that no tile ends with
    source, output, expected = make(before), tmp_path / "out.safetensors", tmp_path / "expected.safetensors"
    notes = converted(source, output, format=after, requantize=True)
    with open_checkpoint(source) as checkpoint:
        converted(save("real.safetensors", {LAYER + ".weight": real(checkpoint)} | OTHERS), expected, format=after)
    assert contents(output) == contents(expected)
    title = FORMATS[before].title
    assert notes[-1] == f"requantized: 1 layer in {title}; the 16-bit original gives better quality"


@pytest.mark.parametrize("name", WRITTEN)
def test_layers_in_the_wanted_format_stay_unchanged(make, tmp_path, name):
    source = make(name)
    with pytest.raises(OutputError, match="nothing to convert"):
        converted(source, tmp_path / "out.safetensors", format=name, requantize=True)
    with open_checkpoint(source) as checkpoint:
        notes = plan_conversion(checkpoint, ConvertOptions(format="int8" if name != "int8" else "fp8")).notes
    assert notes[-1].endswith(f"are copied unchanged: 1 in {FORMATS[name].title}; --requantize quantizes them again")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_mix_is_completed_in_one_convention(save, build, tmp_path):
    """A legacy file: excluded layers and those in the format stay, in the convention of the rest."""
    tensors, _ = build.quantized([f"blocks.{i}.a" for i in range(3)], "legacy", input_scale=0.25)
    e5m2, _ = build.quantized(["blocks.3.a"], "legacy", input_scale=2.0, dtype="F8_E5M2")
    raw = {"blocks.4.a.weight": ("F8_E4M3", np.full((16, 32), 0x38, np.uint8))}
    e5m2 = {name.replace("scale_weight", "weight_scale").replace("scale_input", "input_scale"): value
            for name, value in e5m2.items()}  # fmt: skip
    marked = {"blocks.3.a.comfy_quant": build.mark(format="float8_e5m2")}
    marker = {"scaled_fp8": ("F8_E4M3", np.zeros(2, np.uint8))}
    source = save("in.safetensors", tensors | e5m2 | marked | raw | marker)
    output = tmp_path / "out.safetensors"
    converted(source, output, requantize=True, layer_format=("blocks.1=int8",), exclude=("blocks.2",))
    with open_checkpoint(source) as before, open_checkpoint(output) as after:
        old, new = find_layers(before).quantized, find_layers(after).quantized
        assert {name: layer.format.name for name, layer in new.items()} == {
            "blocks.0.a": "fp8", "blocks.1.a": "int8", "blocks.2.a": "fp8", "blocks.3.a": "fp8", "blocks.4.a": "fp8",
        }  # fmt: skip
        assert {layer.marking for layer in new.values()} == {"header"}
        assert "scaled_fp8" not in after
        assert [name for name, layer in new.items() if layer.full_precision] == [f"blocks.{i}.a" for i in range(3)]
        for name in ("blocks.0.a", "blocks.2.a"):
            assert after.raw(name + ".weight").tobytes() == before.raw(name + ".weight").tobytes()
            assert after.float32(name + ".weight_scale") == before.float32(name + ".scale_weight")
            assert after.float32(name + ".input_scale") == 0.25
        assert "blocks.1.a.input_scale" not in after, "int8 has none"
        assert after.float32("blocks.3.a.input_scale") == 2.0 * 57344 / 448, "the same range of inputs"
        assert "blocks.4.a.input_scale" not in after, "nobody measured it"
        assert np.allclose(dequantize(after, new["blocks.4.a"]), 1.0)
        assert np.allclose(
            dequantize(after, new["blocks.1.a"]), dequantize(before, old["blocks.1.a"]), rtol=0.01, atol=3
        )


UNTOLD = {
    "INT8, INT8 ConvRot": {
        ".weight": np.ones((16, 32), np.int8), ".weight_scale": np.ones((16, 1), np.float32),
    },
    "NVFP4, NVFP4 in the order of codes that diffusers reads": {
        ".weight": np.ones((128, 32), np.uint8), ".weight_scale": ("F8_E4M3", np.ones((128, 4), np.uint8)),
        ".weight_scale_2": np.float32(1), ".input_scale": np.float32(1),
    },
}  # fmt: skip


@pytest.mark.parametrize("titles", UNTOLD)
def test_an_ambiguous_layer_without_config_is_refused(save, tmp_path, titles):
    path = save("in.safetensors", {LAYER + suffix: tensor for suffix, tensor in UNTOLD[titles].items()})
    said = f"{path}: {LAYER}: no quantization config names its format, and its tensors fit several formats: {titles} "
    with open_checkpoint(path) as checkpoint:
        for plan in (
            lambda: plan_conversion(checkpoint, ConvertOptions(requantize=True)),
            lambda: plan_bfloat16(checkpoint),
            lambda: plan_migration(checkpoint, "comfy"),
        ):
            with pytest.raises(TensorError) as caught:
                plan()
            assert str(caught.value) == said + "(use a file with quantization configs, or convert the original)"


# to BF16


def dequantized(source, output):
    with open_checkpoint(source) as checkpoint:
        layout, jobs, done = plan_bfloat16(checkpoint)
        write(checkpoint, layout, output, jobs)
    return done


@pytest.mark.parametrize("name", WRITTEN)
def test_dequantized_weights_are_the_nearest_bfloat16_and_nothing_else_changes(make, build, tmp_path, name):
    source, output = make(name), tmp_path / "out.safetensors"
    with open_checkpoint(source) as checkpoint:
        expected = build.to_bfloat16(real(checkpoint))
    assert dequantized(source, output) == f"1 layer in {FORMATS[name].title} to BF16"
    before, after = contents(source), contents(output)
    assert after.pop(LAYER + ".weight") == ("BF16", (288, 256), expected.tobytes())
    assert after == {name: before[name] for name in OTHERS}
    with open_checkpoint(output) as checkpoint:
        assert set(checkpoint.metadata) == {"author", "convert_to_quant"}
        assert set(find_layers(checkpoint).plain) == {LAYER, "embed"}


def test_unreadable_layers_keep_their_configs(save, build, tmp_path):
    tensors, metadata = build.quantized(["blocks.0.a"], "header")
    raw = {"blocks.2.a.weight": ("F8_E4M3", np.full((16, 32), 0x38, np.uint8))}
    foreign = {"blocks.1.a.weight": np.ones((4, 4), np.int8), "blocks.1.a.weight_scale": np.ones(4, np.float32)}
    said = json.loads(metadata["_quantization_metadata"])
    said["layers"]["blocks.1.a"] = {"format": "awq_w4a16"}
    source = save("in.safetensors", tensors | raw | foreign, {"_quantization_metadata": json.dumps(said)})
    output = tmp_path / "out.safetensors"
    assert dequantized(source, output) == "2 layers in FP8 to BF16; 1 in other formats copied unchanged"
    with open_checkpoint(output) as checkpoint:
        assert json.loads(checkpoint.metadata["_quantization_metadata"])["layers"] == {
            "blocks.1.a": {"format": "awq_w4a16"}
        }
        assert list(find_layers(checkpoint).foreign) == ["blocks.1.a"]
        assert checkpoint.bits("blocks.2.a.weight").tolist() == [[0x3F80] * 32] * 16


def test_a_convolution_keeps_the_legacy_marker_that_it_needs(save, build, tmp_path):
    tensors, _ = build.quantized(["blocks.0.a"], "legacy")
    conv = {"conv.weight": ("F8_E4M3", np.ones((4, 4, 3, 3), np.uint8)), "conv.scale_weight": np.float32(1)}
    source = save("in.safetensors", tensors | conv | {"scaled_fp8": ("F8_E4M3", np.zeros(0, np.uint8))})
    with open_checkpoint(source) as checkpoint:
        layout, _, _ = plan_bfloat16(checkpoint)
        assert {"scaled_fp8", *conv} <= set(layout.copied)
        with pytest.raises(TensorError, match="conv: it is float8_e4m3fn, 4-dimensional, which only the legacy"):
            plan_migration(checkpoint, "comfy")


# conventions


def migrated(source, target):
    output = source.with_name(f"{target}.safetensors")
    with open_checkpoint(source) as checkpoint:
        layout, _, _ = plan_migration(checkpoint, target)
        write(checkpoint, layout, output)
    return output


@pytest.mark.parametrize("full", [False, True])
def test_a_round_trip_through_all_conventions_changes_nothing(save, build, full):
    config = {"full_precision_matrix_mult": True} if full else {}
    names = ["model.diffusion_model.blocks.0.a", "model.diffusion_model.blocks.1.a"]
    start = migrated(save("in.safetensors", *build.quantized(names, "tensor", input_scale=0.5, **config)), "comfy")
    path = start.rename(start.with_name("start.safetensors"))
    for target, marking in (("header", "header"), ("legacy", "legacy"), ("comfy", "header")):
        path = migrated(path, target)
        with open_checkpoint(path) as checkpoint:
            table = find_layers(checkpoint)
            assert [layer.marking for layer in table.quantized.values()] == [marking] * 2
            assert [layer.full_precision for layer in table.quantized.values()] == [full] * 2
            assert len(table.marks.tensor.found) == (2 if target == "comfy" else 0)
    assert contents(path) == contents(start.with_name("start.safetensors"))


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_refuses_formats_that_it_cannot_express(make, tmp_path, target, name):
    source = make(name)
    said = {"legacy": ("fp8",), "diffusers": ("fp8", "fp8-row")}.get(target, WRITTEN)
    if name in said:
        before, after = contents(source), contents(migrated(source, target))
        assert after[LAYER + ".weight"] == before[LAYER + ".weight"]
        return
    with open_checkpoint(source) as checkpoint, pytest.raises(TensorError) as caught:
        plan_migration(checkpoint, target)
    assert str(caught.value).startswith(f"{source}: {LAYER}: ")
    assert str(caught.value).endswith(f"only, and this is {FORMATS[name].marked}")


def test_two_scales_of_one_kind_are_refused(save, build):
    tensors, _ = build.quantized(["a"], "tensor")
    path = save("in.safetensors", tensors | {"a.scale_weight": np.float32(2)})
    with open_checkpoint(path) as checkpoint, pytest.raises(TensorError) as caught:
        plan_migration(checkpoint, "header")
    assert str(caught.value) == f"{path}: a.scale_weight: the layer also has this scale under another name"


def test_a_stray_legacy_marker_has_no_effect(save, build):
    tensors, _ = build.quantized(["a"], "tensor")
    source = save("in.safetensors", tensors | {"scaled_fp8": ("F8_E4M3", np.zeros(2, np.uint8))})
    with open_checkpoint(migrated(source, "legacy")) as checkpoint:
        assert checkpoint.tensors["scaled_fp8"].elements == 0
        assert not find_layers(checkpoint).quantized["a"].full_precision


def test_a_legacy_file_has_full_precision_for_all_layers_or_none(save, build):
    one, _ = build.quantized(["blocks.0.a"], "tensor")
    two, _ = build.quantized(["blocks.1.a"], "tensor", full_precision_matrix_mult=True)
    path = save("in.safetensors", one | two)
    with open_checkpoint(path) as checkpoint, pytest.raises(TensorError) as caught:
        plan_migration(checkpoint, "legacy")
    assert str(caught.value) == (
        f"{path}: blocks.1.a: 1 of 2 layers are declared to compute in full precision, but a legacy file declares all "
        "or none"
    )


@pytest.mark.parametrize("name", ["fp8", "fp8-row"])
def test_diffusers_reads_the_diffusers_convention(make, name):
    quantizer = pytest.importorskip("diffusers.quantizers.bfl.bfl_quantizer")
    from diffusers.quantizers.quantization_config import BFLQuantizationConfig
    from safetensors.torch import load_file

    output = migrated(make(name), "diffusers")
    tensors = load_file(output)
    assert set(tensors) == {LAYER + ".weight", LAYER + ".weight_scale", *OTHERS}
    read = quantizer.BFLQuantizer(BFLQuantizationConfig()).maybe_update_state_dict(tensors)
    with open_checkpoint(output) as checkpoint:
        ours = real(checkpoint)
    assert np.array_equal(quantizer._dequantize_weight(read[LAYER + ".weight"]).numpy(), ours)
