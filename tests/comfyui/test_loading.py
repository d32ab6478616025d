"""ComfyUI's loaders agree with us on a file: FP8 layers, their scales, and layers in full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.layers import find_layers, input_scale

pytestmark = pytest.mark.comfyui

BARE = (
    "default",
    "header only",
    "tensors only",
    "header disagrees",
    "legacy",
    "legacy without FP8 products",
)
PREFIXED = ("prefixed", "prefixed header only", "prefixed tensors only", "prefixed legacy")
LOADERS = ("diffusion_model", "checkpoint")

QUIET = [(name, "diffusion_model") for name in (*BARE, "prefixed tensors only", "prefixed legacy")] + [
    (name, "checkpoint") for name in PREFIXED
]
"""Conventions and loaders without warnings. The checkpoint loader warns about every bare file, FP8 or not."""


def as_we_read(path: Path) -> dict[str, Any]:
    """Every linear layer of a file, in the words of ComfyUI's module."""
    with open_checkpoint(path) as checkpoint:
        table = find_layers(checkpoint)
        found_here: dict[str, Any] = {}
        for layer in table.linear():
            entry: dict[str, Any] = {"quant_format": None, "weight_shape": list(layer.weight.shape)}
            if layer.format is not None:
                entry |= {
                    "quant_format": layer.format.marked,
                    "weight_class": "QuantizedTensor",
                    "weight_dtype": f"torch.{layer.format.codes.name}",
                    "weight_scale": float(checkpoint.float32(layer.weight_scale).item()),
                    "input_scale": input_scale(checkpoint, layer),
                    "full_precision": layer.full_precision,
                }
            found_here[layer.name.removeprefix(table.prefix)] = entry
    return found_here


def as_comfyui_reads(layers: dict[str, Any]) -> dict[str, Any]:
    """The same of what ComfyUI loaded. It drops a legacy scale of 1.0, which says the same."""
    of_all = ("quant_format", "weight_shape")
    of_fp8 = ("weight_class", "weight_dtype", "weight_scale", "full_precision")
    found_here = {}
    for name, layer in layers.items():
        found_here[name] = {key: layer[key] for key in of_all}
        if layer["quant_format"] is not None:
            found_here[name] |= {key: layer[key] for key in of_fp8} | {"input_scale": layer["input_scale"] or 1.0}
    return found_here


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("convention", [*BARE, *PREFIXED])
def test_every_layer_is_read_as_we_read(comfyui, in_convention, convention, loader):
    path = in_convention(convention)
    found_here = as_we_read(path)

    found = comfyui.load(path, "read", loader=loader)

    assert found["model"] == "Flux"
    assert as_comfyui_reads(found["layers"]) == found_here
    fp8 = [layer for layer in found["layers"].values() if layer["quant_format"]]
    assert len(fp8) == 32
    assert all(layer["class"].endswith("MixedPrecisionOps.Linear") for layer in fp8)
    assert all(layer["input_scale_dtype"] == "torch.float32" for layer in fp8)


def test_calibrated_files_have_their_own_scales_and_full_precision(comfyui, in_convention):
    # What the test above compares is not all alike: a reader that ignored it would be seen.
    layers = as_we_read(in_convention("default")).values()
    fp8 = [layer for layer in layers if layer["quant_format"]]

    assert len({layer["input_scale"] for layer in fp8}) > 20
    assert sum(layer["full_precision"] for layer in fp8) == 8
    assert all(layer["full_precision"] for layer in as_we_read(in_convention("legacy without FP8 products")).values()
               if layer["quant_format"])  # fmt: skip


@pytest.mark.parametrize("name", ["converted", "legacy"])
def test_files_before_calibration_have_scales_of_one(comfyui, files, in_convention, tmp_path, name):
    from convert_to_quant.cli import main

    path = files("plain").converted
    if name == "legacy":
        path = tmp_path / "legacy.safetensors"
        assert main(["-i", str(files("plain").original), "-o", str(path), "--legacy", "--quiet"]) == 0

    found = comfyui.load(path, "read")

    assert found["warnings"] == []
    assert as_comfyui_reads(found["layers"]) == as_we_read(path)
    assert {layer["input_scale"] or 1.0 for layer in found["layers"].values() if layer["quant_format"]} == {1.0}


@pytest.mark.parametrize(("convention", "loader"), QUIET)
def test_files_load_without_a_warning(comfyui, in_convention, convention, loader):
    assert comfyui.load(in_convention(convention), "read", loader=loader)["warnings"] == []


@pytest.mark.parametrize("convention", ["prefixed", "prefixed header only"])
def test_headers_of_prefixed_files_cost_one_harmless_warning(comfyui, in_convention, convention):
    # "Load Diffusion Model" reads the header twice: before it takes the prefix off, and after. The second reading
    # leaves configs under the full names, which no module uses. The layers are as they should be (see above).
    (warning,) = comfyui.load(in_convention(convention), "read")["warnings"]

    assert warning.startswith("unet unexpected: ['model.diffusion_model.")
    names = warning.partition("[")[2].rstrip("]").replace("'", "").split(", ")
    assert len(names) == 32
    assert all(name.endswith(".comfy_quant") for name in names)


def test_a_file_that_lost_its_configs_is_not_read_as_fp8(comfyui, in_convention, changed, tmp_path):
    lost = changed(in_convention("header only"), tmp_path / "lost.safetensors", lambda _, configs: configs.clear())

    found = comfyui.load(lost, "read")

    assert any("unet unexpected" in warning for warning in found["warnings"])
    assert not any(layer["quant_format"] for layer in found["layers"].values())


def test_conventions_of_one_model_compute_the_same_bits(comfyui, in_convention, states):
    import torch

    conventions = ("default", "header only", "tensors only", "prefixed", "prefixed header only")
    velocities = [comfyui.velocity(in_convention(convention), states) for convention in conventions]

    assert velocities[0].isfinite().all()
    assert all(torch.equal(velocity, velocities[0]) for velocity in velocities[1:])
