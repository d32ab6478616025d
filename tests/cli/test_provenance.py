"""Every output records the tool and its options, but no folder of the user's machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert_to_quant import __version__
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.stats import Statistics

OBSERVE = ("--samples", 1, "--steps", 1, "--height", 32, "--width", 32, "--text-tokens", 4)


def made(path: Path) -> dict[str, Any]:
    """The provenance in a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        return json.loads(checkpoint.metadata["convert_to_quant"])


@pytest.fixture
def outputs(done, lora, flux_file, tmp_path):
    """One output of every kind, made with absolute paths."""
    names = ("converted", "calibrated", "applied", "observed", "merged")
    paths = {name: tmp_path / f"{name}.safetensors" for name in names}
    for words in (
        ("-i", flux_file, "-o", paths["converted"], "--weight-scale", "mse"),
        ("-i", flux_file, "-o", paths["calibrated"], "--actcal", "--actcal-engine", "layer", "--actcal-seed", 7,
         "--actcal-lora", lora),
        ("observe", flux_file, "-o", paths["observed"], "--seed", 9, *OBSERVE),
        ("merge", paths["observed"], paths["observed"], "-o", paths["merged"]),
        ("apply", paths["converted"], paths["merged"], "-o", paths["applied"], "--margin", 2),
    ):  # fmt: skip
        done(*words)
    return paths


def test_outputs_record_tool_and_options_but_no_folder(outputs, tmp_path):
    converted, calibrated, applied = (made(outputs[name]) for name in ("converted", "calibrated", "applied"))
    assert {said["version"] for said in (converted, calibrated, applied)} == {__version__}
    assert converted["convert"]["weight_scale"] == "mse"
    assert (calibrated["calibrate"]["seed"], calibrated["calibrate"]["lora"]) == (7, ["style.safetensors"])
    assert (applied["calibrate"]["margin"], applied["calibrate"]["observed"]["seed"]) == (2.0, ["9"])
    assert applied["convert"] == converted["convert"], "steps before stay"
    for name in ("observed", "merged"):
        with open_checkpoint(outputs[name]) as checkpoint:
            head = json.loads(checkpoint.metadata["convert_to_quant.statistics"])
        facts = head["provenance"]
        assert (head["tool_version"], facts["seed"], facts["steps"]) == (__version__, ["9"], ["1"])
    assert Statistics.load(outputs["merged"]).provenance == Statistics.load(outputs["observed"]).provenance
    for path in outputs.values():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_reports_record_tool_command_and_options(done, fp8_file, tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    guessing = {"actcal": True, "actcal-engine": "layer", "actcal-seed": 3}
    for command, words, options in (
        ("convert", ("-i", fp8_file, "--actcal", "--actcal-engine", "layer", "--actcal-seed", 3, "--dry-run"),
         {"input": str(fp8_file), "dry-run": True, **guessing}),
        ("inspect", ("inspect", fp8_file), {"model": [str(fp8_file)]}),
        ("comfyui install", ("comfyui", "install", tmp_path, "--dry-run"), {"dir": str(tmp_path), "dry-run": True}),
    ):  # fmt: skip
        made_by = json.loads(done(*words, "--json", "-", "-q").out)["made_by"]
        wanted = {"tool": "convert_to_quant", "version": __version__, "command": command, "options": options}
        assert made_by == wanted
