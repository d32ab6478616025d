"""`python -m convert_to_quant.calibrate_activation_scales MODEL -o OUT`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from convert_to_quant.cli import calibrate

LAYERS = ["blocks.0.attn", "blocks.0.mlp"]


@pytest.fixture
def command(ctq):
    def run(*words: object) -> Any:
        return ctq(*words, main=calibrate.main)

    return run


@pytest.fixture
def model(save, build):
    return save("model.safetensors", *build.quantized(LAYERS, "both"))


def test_the_module_runs_as_a_program_with_all_flags(model, save, scales, tmp_path):
    lora = save("lora.safetensors", {"blocks.0.mlp.lora_A.weight": np.ones((2, 32), np.float32),
                                     "blocks.0.mlp.lora_B.weight": np.ones((16, 2), np.float32)})  # fmt: skip
    output, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    words = [model, "-o", output, "--lora", lora, "--json", report, "--samples", 8, "--percentile", 99, "--seed", 3]
    words += ["--engine", "layer"]
    program = [sys.executable, "-m", "convert_to_quant.calibrate_activation_scales", *map(str, words)]
    outcome = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stdout) == (0, ""), outcome.stderr
    document = json.loads(report.read_text())
    options = document["options"]
    assert (options["samples"], options["percentile"], options["seed"]) == (8, 99.0, 3)
    assert list(document["lora"]["matched"]) == ["blocks.0.mlp"]
    assert {entry["layer"]: entry["scale_after"] for entry in document["layers"]} == scales(output)


def test_it_equals_actcal(command, done, model):
    one, other = model.with_name("one.safetensors"), model.with_name("other.safetensors")
    assert command(model, "-o", one, "--engine", "layer", "--seed", 5).code == 0
    done("-i", model, "-o", other, "--actcal", "--actcal-engine", "layer", "--actcal-seed", 5)
    assert one.read_bytes() == other.read_bytes()


def test_in_place(command, model, scales):
    assert command(model, "--in-place", "--engine", "layer", "-q").code == 0
    assert 1.0 not in scales(model).values()


def test_misuse_writes_nothing(refused, model):
    for words, code, message in (
        ((), 2, "no output: add -o OUT (or --in-place, or --dry-run)"),
        (
            ("-o", "out.safetensors", "--percentile", "nan"),
            2,
            "a percentile should be above 0 and at most 100, found nan",
        ),
        (("-o", model), 1, f"{model}: the output is the same file as the input {model} (name another output, or add"),
        (("--in-place", "--mark"), 2, "--mark needs -o OUT: quantization configs cannot be added in place"),
    ):
        refused(message, model, *words, code=code, main=calibrate.main)
