"""`observe --engine comfyui` with the real ComfyUI: the same ranges as our own engine, and every family it detects."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import inprocess_driver as asked
import numpy as np
import pytest
from processes import Process
from tiny_models import LEFT_OUT, MODELS

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import main
from convert_to_quant.kernels import SIGMA_BINS
from convert_to_quant.layers import find_layers, input_scale
from convert_to_quant.stats import Statistics

pytestmark = pytest.mark.comfyui

STEPS = 4
SMALL = ("--height", "128", "--width", "128", "--steps", "2")

SLOW = {"WAN22_Animate": "its face encoder takes videos of 512 by 512 pixels whatever the model's size"}
"""Minutes on a CPU: these paint one picture in place of three."""

NEVER_RUN: Mapping[str, tuple[str, ...]] = {
    "HunyuanImage21Refiner": ("time_r_in.in_layer", "time_r_in.out_layer"),
    "WAN22_WanDancer": ("head_global.head",),
    "ACEStep": (
        *(f"projectors.{tower}.{layer}" for tower in (0, 1) for layer in (0, 2, 4)),
        *(
            f"transformer_blocks.0.cross_attn.{layer}"
            for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        ),
    ),
}
"""Layers that ComfyUI itself never runs here: a second time that this refiner leaves out, a head for videos of another
frame rate, heads that only training has."""

ZEROS: Mapping[str, tuple[str, ...]] = {"ACEStep": ("speaker_embedder",)}
"""Layers that ComfyUI itself shows nothing but zeros."""


@pytest.fixture(scope="session")
def inprocess(tree):
    """A process that runs our command line, and ComfyUI inside of it."""
    with closing(Process(asked.start)) as running:
        yield running


def observe(inprocess: Process, model: Path, stats: Path, *words: object) -> str:
    """Observe a model in ComfyUI: what is said."""
    code, said = inprocess.ask(asked.observe, model, stats, *words)
    assert code == 0, said
    return str(said)


def written(tree: Path) -> dict[str, int]:
    """Everything in a folder, and when it was changed."""
    return {str(path): path.stat().st_mtime_ns for path in tree.rglob("*")}


# ---------------------------------------------------------------- the same ranges as our own engine


@pytest.mark.parametrize("weights", ["original", "converted"])
@pytest.mark.parametrize("name", ["plain", "hot"])
def test_recorded_ranges_are_those_of_our_own_engine_on_the_same_inputs(inprocess, files, ours, name, weights):
    from convert_to_quant.engines import diffusers
    from convert_to_quant.recorder import record

    path = getattr(files(name), weights)

    found = inprocess.ask(asked.same_inputs, path, ours.start(), STEPS)

    with open_checkpoint(path) as checkpoint:
        model = diffusers.load(checkpoint, arithmetic="dequantize")
        shapes, feeds = diffusers.watched(model)
        conditioning = {"encoder_hidden_states": ours.context, "pooled_projections": ours.pooled}
        with record(model.model, shapes, feeds) as recording:
            for _ in diffusers.trajectory(model, ours.noise, conditioning, ours.geometry, STEPS):
                pass
        expected = recording.statistics()
    assert found.keys() == set(expected.names)
    for layer, value in zip(expected.names, expected.absmax.tolist(), strict=True):
        assert found[layer] == pytest.approx(value, rel=2e-5), layer


# ---------------------------------------------------------------- every family


def test_every_family_that_comfyui_detects_has_a_tiny_model_or_a_reason(inprocess):
    assert set(inprocess.ask(asked.families)) <= MODELS.keys() | LEFT_OUT.keys()
    assert not MODELS.keys() & LEFT_OUT.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_model_is_detected_run_and_observed_on_every_layer(inprocess, name, tmp_path):
    images = 1 if name in SLOW else 3
    code, said, detected = inprocess.ask(asked.tiny, name, tmp_path, images)

    assert code == 0, said
    assert set(detected) == {name}
    seen = Statistics.load(tmp_path / "stats.safetensors")
    unvisited = {layer for layer, visited in zip(seen.names, seen.visited, strict=True) if not visited}
    prefix = MODELS[name].prefix
    assert {layer.removeprefix(prefix) for layer in unvisited} == set(NEVER_RUN.get(name, ()))
    ranges = zip(seen.names, seen.visited, seen.absmax, strict=True)
    assert tuple(layer for layer, visited, absmax in ranges if visited and not absmax) == ZEROS.get(name, ())
    assert seen.samples == images
    levels = seen.sigma_count.sum(0) > 0  # one step is taken, at the highest level; text is prepared before, at none
    assert levels[SIGMA_BINS - 1]
    assert not levels[: SIGMA_BINS - 1].any()
    with open_checkpoint(tmp_path / "tiny.safetensors") as checkpoint:
        shapes = {tensor.removesuffix(".weight"): info.shape for tensor, info in checkpoint.tensors.items()}
    assert all(shapes[layer] == shape for layer, shape in seen.layers.items())
    for layer in unvisited:
        assert f"{layer}: never ran" in said


@pytest.mark.parametrize("name", ["Flux", "SD3", "AuraFlow"])
def test_a_file_in_diffusers_layout_is_recorded_under_its_own_names(inprocess, name, tmp_path):
    codes, parts = inprocess.ask(asked.diffusers_layout, name, tmp_path)

    assert codes == [0, 0]
    native, split = (Statistics.load(tmp_path / f"{stem}.stats") for stem in ("native", "diffusers"))
    expected = dict(zip(native.names, native.absmax.tolist(), strict=True))
    found = dict(zip(split.names, split.absmax.tolist(), strict=True))
    assert set(found) == {layer for layer, whole in parts.items() if whole in expected}
    assert len(set(parts.values())) == len(expected)  # several are parts of one in the model's own layout
    for layer, value in found.items():
        assert value == pytest.approx(expected[parts[layer]], rel=1e-5), layer


def test_renamed_layers_of_an_fp8_file_are_recorded_under_its_own_names(inprocess, tmp_path):
    """HunyuanVideo's authors call layers otherwise than ComfyUI."""
    from safetensors.torch import load_file, save_file

    theirs = {"_mod.lin.": "_mod.linear.", "_attn.qkv.": "_attn_qkv.", "_attn.proj.": "_attn_proj.",
              ".modulation.lin.": ".modulation.linear."}  # fmt: skip
    code, said, _ = inprocess.ask(asked.tiny, "HunyuanVideo", tmp_path, 3)
    assert code == 0, said
    before = Statistics.load(tmp_path / "stats.safetensors")
    renamed = {}
    for key, values in load_file(tmp_path / "tiny.safetensors").items():
        for ours, original in theirs.items():
            key = key.replace(ours, original)  # noqa: PLW2901
        renamed[key] = values
    save_file(renamed, tmp_path / "theirs.safetensors")
    assert main(["-i", str(tmp_path / "theirs.safetensors"), "-o", str(tmp_path / "fp8.safetensors")]) == 0

    size = ("--samples", "3", "--steps", "1", "--height", "64", "--width", "64", "--frames", "5", "--text-tokens", "12")
    observe(inprocess, tmp_path / "fp8.safetensors", tmp_path / "fp8.stats", *size)

    seen = Statistics.load(tmp_path / "fp8.stats")
    known = dict(zip(before.names, before.absmax.tolist(), strict=True))
    assert any("_attn_qkv" in layer for layer in seen.names)
    for layer, value in zip(seen.names, seen.absmax.tolist(), strict=True):
        for ours, original in theirs.items():
            layer = f"{layer}.".replace(original, ours).rstrip(".")  # noqa: PLW2901
        assert value == pytest.approx(known[layer], rel=0.3), layer  # FP8 weights


# ---------------------------------------------------------------- activations that are folded into a layer's call


@pytest.mark.parametrize("name", ["WAN21_T2V", "MiniMaxH3"])
def test_recorded_ranges_are_those_behind_an_activation_that_is_folded_into_the_call(inprocess, name, tmp_path):
    met, recorded, products = inprocess.ask(asked.folded, name, tmp_path)

    assert met
    assert products
    assert not recorded.unseen
    for layer, seen in met.items():
        row = recorded.names.index(layer)
        assert [recorded.absmax[row], recorded.calls[row]] == pytest.approx(seen, rel=1e-6), layer


# ---------------------------------------------------------------- the command


def test_the_hot_model_is_calibrated_from_a_run_in_comfyui(inprocess, files, tmp_path):
    """Input scales are not in the file; the ranges of the run are those of full precision all the same."""
    said = observe(inprocess, files("hot").converted, tmp_path / "stats", *SMALL, "--samples", "3")

    seen = Statistics.load(tmp_path / "stats")
    facts = dict(seen.provenance)
    with open_checkpoint(files("hot").converted) as checkpoint:
        assert list(seen.names) == list(find_layers(checkpoint).quantized)
    assert f"observed {len(seen.names)} layers over 3 images" in said
    assert facts["engine"] == ("comfyui",)
    assert facts["family"] == ("Flux",)
    assert facts["conditioning"] == ("noise",)
    assert facts["depends_on_conditioning"]
    assert float(seen.absmax.max()) > 448
    calibrated = tmp_path / "calibrated.safetensors"
    words = ("apply", files("hot").converted, tmp_path / "stats", "-o", calibrated, "--margin", 1)
    assert main(list(map(str, words))) == 0
    with open_checkpoint(calibrated) as checkpoint:
        layers = find_layers(checkpoint).quantized.values()
        assert all(input_scale(checkpoint, layer) != 1.0 for layer in layers if not layer.full_precision)


def test_a_run_that_was_stopped_goes_on_and_gives_the_same(inprocess, files, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    model = files("plain").converted
    observe(inprocess, model, whole, *SMALL, "--samples", "4")
    started = ("--samples", "4", "--save-every", "0")
    assert inprocess.ask(asked.stopped, 3, model, stopped, *SMALL, *started) == 130
    assert stopped.with_name("stopped.partial").exists()

    observe(inprocess, model, stopped, *SMALL, *started, "--resume")

    first, second = Statistics.load(whole), Statistics.load(stopped)
    assert first.names == second.names
    assert np.array_equal(first.absmax, second.absmax)
    assert np.array_equal(first.histogram, second.histogram)
    assert not stopped.with_name("stopped.partial").exists()


def test_a_lora_widens_the_ranges_behind_it(inprocess, files, tmp_path):
    import torch
    from safetensors.torch import save_file

    layer = "double_blocks.0.img_attn.qkv"
    model = files("plain").original
    with open_checkpoint(model) as checkpoint:
        out_features, in_features = checkpoint.tensors[f"{layer}.weight"].shape
    down = torch.randn(4, in_features, generator=torch.Generator().manual_seed(0))
    up = torch.randn(out_features, 4, generator=torch.Generator().manual_seed(1))
    name = f"lora_unet_{layer.replace('.', '_')}"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")

    observe(inprocess, model, tmp_path / "without", *SMALL, "--samples", "3")
    observe(inprocess, model, tmp_path / "with", *SMALL, "--samples", "3", "--lora", tmp_path / "lora.safetensors")
    again = observe(inprocess, model, tmp_path / "again", *SMALL, "--samples", "3")

    without, adapted, after = (Statistics.load(tmp_path / stem) for stem in ("without", "with", "again"))
    assert adapted.samples == 2 * without.samples
    assert (adapted.absmax >= without.absmax).all()
    behind = without.names.index("double_blocks.0.img_attn.proj")
    assert adapted.absmax[behind] > 2 * without.absmax[behind]
    assert adapted.absmax[without.names.index(layer)] == pytest.approx(without.absmax[without.names.index(layer)])
    assert np.array_equal(after.absmax, without.absmax), again  # the adapter left with its run
    assert dict(adapted.provenance)["lora"] == ("lora.safetensors",)


def test_a_lora_of_another_model_is_refused(inprocess, files, tmp_path):
    import torch
    from safetensors.torch import save_file

    name = "lora_unet_nothing_of_the_kind"
    save_file({f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.lora_up.weight": torch.ones(8, 1)},
              tmp_path / "lora.safetensors")  # fmt: skip
    words = (files("plain").original, tmp_path / "stats", "--lora", tmp_path / "lora.safetensors")
    code, said = inprocess.ask(asked.observe, *words)

    assert code == 1
    assert "lora.safetensors: ComfyUI cannot apply any of its weights to this Flux model" in said


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"something.weight": (8, 8)},
            "ComfyUI cannot load this model: RuntimeError: ERROR: Could not detect model type",
        ),
        ({"head.modulation": (1, 2, 128), "head.head.weight": (64, 128)}, "ComfyUI cannot load this model: KeyError"),
    ],
)
def test_what_comfyui_cannot_load_is_an_error_with_its_reason(inprocess, tensors, message, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "odd.safetensors")
    code, said = inprocess.ask(asked.observe, tmp_path / "odd.safetensors", tmp_path / "stats")

    assert code == 1
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "stats").exists()


def test_auto_takes_comfyui_for_what_diffusers_cannot_run(inprocess, tmp_path):
    code, said, _ = inprocess.ask(asked.tiny, "HunyuanDiT1", tmp_path, 3)
    assert code == 0, said
    words = ["observe", str(tmp_path / "tiny.safetensors"), "-o", str(tmp_path / "auto"), *SMALL, "--samples", "3"]

    code, said = inprocess.ask(asked.command, words)
    assert code == 1
    assert "--comfyui-dir DIR runs it in ComfyUI" in said
    code, said = inprocess.ask(asked.command, [*words, "--comfyui-dir", str(asked.TREE)])
    assert code == 0, said
    assert "ComfyUI runs it: " in said
    assert dict(Statistics.load(tmp_path / "auto").provenance)["engine"] == ("comfyui",)


def test_comfyui_is_left_as_it_was_found(inprocess, files, tmp_path):
    before = written(asked.TREE)
    observe(inprocess, files("plain").original, tmp_path / "stats", *SMALL, "--samples", "3")

    assert written(asked.TREE) == before
    assert inprocess.ask(asked.left_behind) == []
