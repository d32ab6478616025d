"""`convert_to_quant --round`: a file whose weights are rounded by running the model, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import plan_conversion
from convert_to_quant.engines.moments import Rounding
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import ConvertOptions, RunOptions
from convert_to_quant.rounding import error_of

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself

SMALL = ("--actcal-samples", 3, "--actcal-height", 32, "--actcal-width", 32, "--actcal-text-tokens", 4)
SHOWN = RunOptions(samples=3, height=32, width=32, text_tokens=4)


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_the_command_rounds_and_says_so(ctq: Any, flux_file: Path, tmp_path: Path, name: str) -> None:
    out, plain = tmp_path / "round.safetensors", tmp_path / "plain.safetensors"
    assert ctq("-i", flux_file, "-o", plain, "--format", name).code == 0
    assert ctq("-i", flux_file, "-o", out, "--format", name, "--round", *SMALL).code == 0
    assert ctq("inspect", out, "--strict").code == 0
    with open_checkpoint(flux_file) as source, open_checkpoint(out) as rounded, open_checkpoint(plain) as nearest:
        assert '"round": true' in rounded.metadata["convert_to_quant"]
        plan = plan_conversion(source, ConvertOptions(format=name))
        layers = [layer for layer, _ in plan.quantized]
        rounding = Rounding(source, plan.table, layers, SHOWN)
        errors = []
        for layer in layers:
            moments, weight = rounding.moments_of(layer.name), torch.from_numpy(dequantize(source, layer))
            found = [find_layers(file).quantized[layer.name] for file in (rounded, nearest)]
            assert moments is not None
            errors.append([
                float(error_of(weight, torch.from_numpy(dequantize(file, each)), moments).sum())
                for file, each in zip((rounded, nearest), found, strict=True)
            ])  # fmt: skip
    assert all(ours <= theirs * 1.001 for ours, theirs in errors)
    assert sum(ours for ours, _ in errors) < 0.8 * sum(theirs for _, theirs in errors)


def test_a_mix_is_rounded_too(ctq: Any, flux_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.safetensors"
    assert ctq("-i", flux_file, "-o", out, "--best", "--gpu", "rtx50", "--bits", 7, "--round", *SMALL).code == 0
    assert ctq("inspect", out, "--strict").code == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--weight-scale", "mse"), "--round finds scales itself"),
        (("--merge-lora", "lora.safetensors"), "--merge-lora and --round cannot be combined"),
    ],
)
def test_what_rounding_would_not_heed_is_refused(
    ctq: Any, flux_file: Path, tmp_path: Path, flags: Any, said: str
) -> None:
    refused = ctq("-i", flux_file, "-o", tmp_path / "out.safetensors", "--round", *flags)
    assert refused.code == 2
    assert said in refused.err


def test_a_model_that_cannot_be_run_is_refused(ctq: Any, save: Any, build: Any, tmp_path: Path) -> None:
    unknown = save("unknown.safetensors", {"blocks.0.mlp.weight": torch.ones(32, 32).numpy()})
    refused = ctq("-i", unknown, "-o", tmp_path / "out.safetensors", "--round", "--format", "int8")
    assert refused.code == 1
    assert "leave --round out" in refused.err
