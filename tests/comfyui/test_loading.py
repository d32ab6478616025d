"""ComfyUI's loaders read our files as we say: which layers are FP8, their scales, and which run in full precision."""

from __future__ import annotations

from collections.abc import Callable
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
"""Spellings and loaders without a word of warning. The checkpoint loader complains of every bare file, FP8 or not."""


def as_we_say(path: Path) -> dict[str, Any]:
    """Every linear layer of a file, in the words of ComfyUI's module."""
    with open_checkpoint(path) as checkpoint:
        table = find_layers(checkpoint)
        said: dict[str, Any] = {}
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
            said[layer.name.removeprefix(table.prefix)] = entry
    return said


def as_comfyui_says(layers: dict[str, Any]) -> dict[str, Any]:
    """The same of what ComfyUI loaded. It drops a legacy scale of 1.0, which says the same."""
    of_all = ("quant_format", "weight_shape")
    of_fp8 = ("weight_class", "weight_dtype", "weight_scale", "full_precision")
    said = {}
    for name, layer in layers.items():
        said[name] = {key: layer[key] for key in of_all}
        if layer["quant_format"] is not None:
            said[name] |= {key: layer[key] for key in of_fp8} | {"input_scale": layer["input_scale"] or 1.0}
    return said


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("spelling", [*BARE, *PREFIXED])
def test_every_layer_is_read_as_we_say(
    comfyui: Any, spelled: Callable[[str], Path], spelling: str, loader: str
) -> None:
    path = spelled(spelling)
    said = as_we_say(path)

    found = comfyui.load(path, "read", loader=loader)

    assert found["model"] == "Flux"
    assert as_comfyui_says(found["layers"]) == said
    fp8 = [layer for layer in found["layers"].values() if layer["quant_format"]]
    assert len(fp8) == 32
    assert all(layer["class"].endswith("MixedPrecisionOps.Linear") for layer in fp8)
    assert all(layer["input_scale_dtype"] == "torch.float32" for layer in fp8)


def test_calibrated_files_have_their_own_scales_and_full_precision(
    comfyui: Any, spelled: Callable[[str], Path]
) -> None:
    # What the test above compares is not all alike: a reader that ignored it would be seen.
    layers = as_we_say(spelled("default")).values()
    fp8 = [layer for layer in layers if layer["quant_format"]]

    assert len({layer["input_scale"] for layer in fp8}) > 20
    assert sum(layer["full_precision"] for layer in fp8) == 8
    assert all(layer["full_precision"] for layer in as_we_say(spelled("legacy without FP8 products")).values()
               if layer["quant_format"])  # fmt: skip


@pytest.mark.parametrize("name", ["converted", "legacy"])
def test_files_before_calibration_have_scales_of_one(
    comfyui: Any, files: Callable[[str], Any], spelled: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    from convert_to_quant.cli import main

    path = files("plain").converted
    if name == "legacy":
        path = tmp_path / "legacy.safetensors"
        assert main(["-i", str(files("plain").original), "-o", str(path), "--legacy", "--quiet"]) == 0

    found = comfyui.load(path, "read")

    assert found["warnings"] == []
    assert as_comfyui_says(found["layers"]) == as_we_say(path)
    assert {layer["input_scale"] or 1.0 for layer in found["layers"].values() if layer["quant_format"]} == {1.0}


@pytest.mark.parametrize(("spelling", "loader"), QUIET)
def test_files_load_without_a_warning(comfyui: Any, spelled: Callable[[str], Path], spelling: str, loader: str) -> None:
    assert comfyui.load(spelled(spelling), "read", loader=loader)["warnings"] == []


@pytest.mark.parametrize("spelling", ["prefixed", "prefixed header only"])
def test_headers_of_prefixed_files_cost_one_harmless_warning(
    comfyui: Any, spelled: Callable[[str], Path], spelling: str
) -> None:
    # "Load Diffusion Model" reads the header twice: before it takes the prefix off, and after. The second reading
    # leaves marks under the full names, which no module takes. The layers are as they should be (see above).
    (warning,) = comfyui.load(spelled(spelling), "read")["warnings"]

    assert warning.startswith("unet unexpected: ['model.diffusion_model.")
    names = warning.partition("[")[2].rstrip("]").replace("'", "").split(", ")
    assert len(names) == 32
    assert all(name.endswith(".comfy_quant") for name in names)


def test_a_file_that_lost_its_marks_is_not_read_as_fp8(
    comfyui: Any, spelled: Callable[[str], Path], changed: Any, tmp_path: Path
) -> None:
    lost = changed(spelled("header only"), tmp_path / "lost.safetensors", lambda _, marks: marks.clear())

    found = comfyui.load(lost, "read")

    assert any("unet unexpected" in warning for warning in found["warnings"])
    assert not any(layer["quant_format"] for layer in found["layers"].values())


def test_spellings_of_one_model_compute_the_same_bits(
    comfyui: Any, spelled: Callable[[str], Path], states: dict[str, Any]
) -> None:
    import torch

    spellings = ("default", "header only", "tensors only", "prefixed", "prefixed header only")
    velocities = [comfyui.velocity(spelled(spelling), states) for spelling in spellings]

    assert velocities[0].isfinite().all()
    assert all(torch.equal(velocity, velocities[0]) for velocity in velocities[1:])
