"""Our nodes inside the real ComfyUI: they see what hooks put on by hand see, change nothing, and leave nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import driver
import numpy as np
import pytest

from convert_to_quant import families
from convert_to_quant.stats import Statistics

pytestmark = pytest.mark.comfyui

STEPS, GUIDANCE = 4, 2.0

CASES = {
    "BF16 file": ("original", {}, None),
    "BF16 file in bfloat16": ("original", {"should_use_bf16": True}, None),
    "FP8 file": ("calibrated", {}, None),
    "FP8 file in bfloat16": ("calibrated", {"should_use_bf16": True}, None),
    "BF16 file, partly loaded": ("original", {}, 400_000),
    "FP8 file, partly loaded": ("calibrated", {}, 400_000),
}
"""Which file, what ComfyUI is told of the device, and how many bytes of the model it may load."""


@pytest.fixture
def start(ours):
    """One prompt's noise and conditioning."""
    return {name: value[:1].clone() for name, value in ours.start().items()}


def sample(comfyui: Any, key: str, start: dict[str, Any], **how: Any) -> dict[str, Any]:
    found: dict[str, Any] = comfyui.run(driver.sample, key, start, steps=STEPS, cfg=GUIDANCE, **how)
    return found


def saved(comfyui: Any, recorded: str, prefix: str) -> Statistics:
    given = {"stats": recorded, "latent": {}, "filename_prefix": prefix}
    statistics, file = comfyui.ask(driver.give, "SaveActivationStats", **given)
    assert Statistics.load(comfyui.work / "output" / file) == statistics
    found: Statistics = statistics
    return found


@pytest.mark.parametrize("case", CASES)
def test_recorded_ranges_are_those_of_hooks_put_on_by_hand_and_latents_stay_bit_identical(comfyui, files, start, case):
    import torch

    name, device, part = CASES[case]
    path = getattr(files("plain"), name)
    comfyui.load(path, "plain", device=device)
    by_hand = sample(comfyui, "plain", start, by_hand=True, part=part)
    comfyui.load(path, "fresh", device=device)
    comfyui.ask(driver.record, "fresh", "recorded")
    recorded = sample(comfyui, "recorded", start, part=part)
    statistics = saved(comfyui, "recorded", f"{case}/stats")

    assert bool(recorded["left out"]) == (part is not None)
    assert torch.equal(recorded["latents"], by_hand["latents"])
    assert recorded["latents"].isfinite().all()
    assert dict(zip(statistics.names, statistics.absmax.tolist(), strict=True)) == by_hand["absmax"]
    assert statistics.calls.tolist() == [STEPS] * len(by_hand["absmax"])  # ComfyUI runs both conditionings in one batch
    assert np.flatnonzero(statistics.sigma_count.sum(0)).tolist() == [
        1,
        3,
        5,
        7,
    ]  # sigmas 1, 0.75, 0.5, 0.25 in eighths
    assert statistics.samples == 1
    assert comfyui.ask(driver.hooks, "recorded") == 0


def test_a_model_with_a_copy_on_another_device_is_recorded_whole(comfyui, files, start):
    comfyui.load(files("plain").original, "plain")
    comfyui.ask(driver.record, "plain", "alone")
    sample(comfyui, "alone", start)
    comfyui.ask(driver.on_two_devices, "plain", "both")
    comfyui.ask(driver.record, "both", "together")
    sample(comfyui, "together", start)
    alone, together = (saved(comfyui, key, f"copies/{key}") for key in ("alone", "together"))

    # One of the two devices runs the positive conditioning, the other the negative one.
    assert set(together.calls.tolist()) == {2 * STEPS}
    assert (together.samples, alone.samples) == (1, 1)
    assert (together.rows == alone.rows).all()
    assert np.abs(together.absmax / alone.absmax - 1).max() < 1e-4
    assert comfyui.ask(driver.hooks, "copy") == comfyui.ask(driver.hooks, "together") == 0


@pytest.mark.parametrize("recorded_on", ["original", "converted"])
@pytest.mark.parametrize("name", ["hot", "cold"])
def test_recording_calibrating_and_reloading_mends_broken_models(
    comfyui, files, ours, states, figure, name,
    recorded_on
):  # fmt: skip
    import torch

    made = files(name)
    models = comfyui.work / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    broken = Path(shutil.copy(made.converted, models / f"{name}_{recorded_on}.safetensors"))
    comfyui.load(getattr(made, recorded_on), "source")
    comfyui.ask(driver.record, "source", "recorded")
    comfyui.run(driver.sample, "recorded", ours.start(), steps=ours.steps, cfg=ours.guidance)

    given = {"stats": "recorded", "latent": {}, "checkpoint": f"diffusion_models/{broken.name}"}
    file, report = comfyui.ask(driver.give, "CalibrateFP8Checkpoint", **given)

    assert report.startswith("calibrated 32 of 32 layers")
    reference = comfyui.velocity(made.original, states)
    velocities = {
        "broken": comfyui.velocity(broken, states),
        "calibrated": comfyui.velocity(models / file, states),
        "dynamic": ours.evaluate(made.converted, states, "dynamic_tensor", torch.float32),
    }
    quality_db = {key: ours.sqnr_db(reference, found) for key, found in velocities.items()}
    for key, value_db in quality_db.items():
        figure(f"{name}, recorded on the {recorded_on} file by the nodes: {key}", value_db)

    assert quality_db["broken"] < 12
    if recorded_on == "original":
        assert quality_db["calibrated"] > quality_db["dynamic"] - 0.5
    else:  # inputs seen inside of the broken model carry its error
        assert quality_db["calibrated"] > quality_db["dynamic"] - 1.0
    assert broken.read_bytes() == made.converted.read_bytes()


def test_a_quantized_checkpoint_is_loaded_as_it_says(comfyui, files, ours, states, figure):
    models = comfyui.work / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    original = Path(shutil.copy(files("plain").original, models / "emoji.safetensors"))
    before = original.read_bytes()

    given = {"checkpoint": "diffusion_models/emoji.safetensors", "format": "int8-convrot", "exclude": "single_blocks"}
    file, report = comfyui.ask(driver.give, "QuantizeCheckpoint", **given)

    assert file == "emoji_int8-convrot.safetensors"
    found = comfyui.load(models / file, "quantized")
    assert found["warnings"] == []
    kinds = {name: layer["quant_format"] for name, layer in found["layers"].items() if layer["quant_format"]}
    assert set(kinds.values()) == {"int8_tensorwise"}
    assert all(name.startswith("double_blocks") for name in kinds)
    assert report.startswith(f"{len(kinds)} of ")
    reference = comfyui.velocity(original, states)
    quality_db = ours.sqnr_db(reference, comfyui.velocity(models / file, states))
    assert figure("plain, double blocks to INT8 ConvRot by the node", quality_db) > 35
    assert original.read_bytes() == before


def test_hunyuan_video_is_renamed_as_our_table_says(comfyui):
    rules = {
        rule.layer.replace("*", "3"): rule.other.replace("*", "3")
        for rule in families.FAMILIES["hunyuan-video"].spellings
    }
    assert len(rules) > 15
    assert comfyui.ask(driver.renamed, list(rules)) == rules


HIDDEN = 64
ENDINGS = {
    "qkv": (3, 1), "kv_linear": (2, 1), "linear1": (7, 1), "linear2": (1, 5), "mlp.0": (4, 1), "mlp.fc1": (4, 1),
    "mlp.2": (1, 4), "mlp.fc2": (1, 4),
}  # fmt: skip
"""Shapes of the layers that are not square, in hidden sizes."""

DIFFUSERS = {
    "flux_to_diffusers": ({"depth": 2, "depth_single_blocks": 2, "hidden_size": HIDDEN}, {"controlnet_x_embedder"}),
    "mmdit_to_diffusers": ({"depth": 1, "num_blocks": 2}, {"pos_embed.proj"}),
    "z_image_to_diffusers": ({"n_layers": 2, "dim": HIDDEN}, set()),
    "auraflow_to_diffusers": ({"n_double_layers": 2, "n_layers": 4}, set()),
    "pixart_to_diffusers": ({"depth": 2, "hidden_size": HIDDEN}, {"pos_embed.proj"}),
}
"""ComfyUI's tables, what they ask for, and what they list beside linear layers and norms of this model."""


@pytest.mark.parametrize("function", DIFFUSERS)
def test_diffusers_layouts_are_put_where_our_table_says(comfyui, function):
    config, others = DIFFUSERS[function]
    theirs = comfyui.ask(driver.diffusers_names, function, config)
    linear = {name: place for name, place in theirs.items() if ".norm_" not in name and name not in others}
    shapes = {}
    for layer, *_ in linear.values():
        rows, columns = next((shape for ending, shape in ENDINGS.items() if layer.endswith(ending)), (1, 1))
        shapes[layer] = (rows * HIDDEN, columns * HIDDEN)

    targets = families.diffusers_targets(shapes)

    assert len(linear) >= 30
    assert {name: [targets[name].layer, *(targets[name].rows or ())] for name in linear} == linear
