"""`--fold` and `lora fold`: checkpoints with equalized channels, and LoRAs for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convert_to_quant import names
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.emoji.rerange import RERANGINGS, write_reranged

SMALL = ("--actcal-samples", 3, "--actcal-height", 32, "--actcal-width", 32, "--actcal-text-tokens", 4)
LAYER = "double_blocks.0.img_attn.qkv"


def folding_of(path: Path) -> str | None:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.metadata.get(names.FOLDING_KEY)


@pytest.fixture
def flux_file(flux_file):
    """The tiny Flux.1 with a different range in every channel."""
    path = flux_file.with_name("wild.safetensors")
    write_reranged(flux_file, path, RERANGINGS["wild"])
    return path


@pytest.fixture
def lora(flux_file, save):
    with open_checkpoint(flux_file) as checkpoint:
        rows, inputs = checkpoint.tensors[LAYER + ".weight"].shape
    rng = np.random.default_rng(0)
    parts = {".lora_A.weight": (2, inputs), ".lora_B.weight": (rows, 2)}
    return save(
        "lora.safetensors", {LAYER + end: rng.standard_normal(shape, np.float32) for end, shape in parts.items()}
    )


def test_a_folded_file_warns_and_its_loras_are_converted(done, refused, flux_file, lora, tmp_path):
    out, converted, twice = (tmp_path / f"{name}.safetensors" for name in ("int8", "folded", "twice"))
    assert "its channels are equalized" in done("-i", flux_file, "-o", out, "--format", "int8", "--fold", *SMALL).err
    assert "its channels are equalized" in " ".join(done("inspect", out).out.split())
    for wrote in ("wrote", "replaced"):
        told = done("lora", "fold", lora, "--like", out, "-o", converted).err
        assert told == f"1 of 1 adapter scaled for int8.safetensors; {wrote} {converted}\n"
    again = f"{converted}: it is already folded (use the original)\n"
    refused(again, "lora", "fold", converted, "--like", out, "-o", twice)
    plain = f"{flux_file}: its channels are not folded, so LoRAs fit it unchanged"
    refused(plain, "lora", "fold", lora, "--like", flux_file, "-o", twice)


def test_calibration_accepts_only_a_lora_that_is_folded_for_the_file(done, refused, flux_file, lora, tmp_path):
    out, converted, made = (tmp_path / f"{name}.safetensors" for name in ("fp8", "folded", "made"))
    told = done("-i", flux_file, "-o", out, "--fold", "--actcal", *SMALL).err
    assert told.count("its channels are equalized") == 1
    done("lora", "fold", lora, "--like", out, "-o", converted)
    observing = [str(word).replace("actcal-", "") for word in SMALL]
    for words in (("-i", out, "--actcal", *SMALL, "--actcal-lora"), ("observe", out, *observing, "--lora")):
        done(*words, converted, "-o", made)
        problem = f"{lora}: it is not folded for fp8.safetensors, whose channels are scaled"
        refused(problem, *words, lora, "-o", made)


@pytest.mark.parametrize("words", [("--best", "--gpu", "rtx50", "--bits", 7), ("--format", "w4a8")])
def test_rounding_a_folded_file_is_deterministic(done, contents, flux_file, tmp_path, words):
    outs = [tmp_path / name for name in ("nearest.safetensors", "a.safetensors", "b.safetensors")]
    for out, more in zip(outs, ((), ("--round",), ("--round",)), strict=True):
        done("-i", flux_file, "-o", out, "--fold", *words, *more, *SMALL)
    nearest, first, again = map(contents, outs)
    assert folding_of(outs[1]) == folding_of(outs[0]) is not None
    assert first == again
    assert first.keys() == nearest.keys()
    assert first != nearest


def test_equal_channels_are_not_folded(done, save, flux_tensors, tmp_path):
    out = tmp_path / "int8.safetensors"
    even = save("even.safetensors", flux_tensors())
    assert "the channels are already equal" in done("-i", even, "-o", out, "--format", "int8", "--fold", *SMALL).err
    assert folding_of(out) is None
