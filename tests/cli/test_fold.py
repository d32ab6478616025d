"""`--fold` and `lora fold`: files whose channels are evened out, LoRAs that fit them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convert_to_quant import names
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.emoji.rerange import RERANGINGS, write_reranged

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself

SMALL = ("--actcal-samples", 3, "--actcal-height", 32, "--actcal-width", 32, "--actcal-text-tokens", 4)
LAYER = "double_blocks.0.img_attn.qkv"


def folding_of(path: Path) -> str | None:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.metadata.get(names.FOLDING_KEY)


@pytest.fixture
def flux_file(flux_file):
    """The tiny Flux.1, every channel of which has a range of its own."""
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


def test_a_folded_file_warns_and_its_loras_are_converted(ctq, flux_file, lora, tmp_path, folder):
    out, converted = tmp_path / "int8.safetensors", tmp_path / "folded.safetensors"
    done = ctq("-i", flux_file, "-o", out, "--format", "int8", "--fold", *SMALL)
    assert done.code == 0
    assert "its channels are folded" in done.err
    shown = ctq("inspect", out)
    assert "its channels are folded" in " ".join(shown.out.split())
    before = folder()
    assert ctq("lora", "fold", lora, "--like", out, "-o", converted, "--dry-run").code == 0
    assert folder() == before
    for wrote in ("wrote", "replaced"):
        done = ctq("lora", "fold", lora, "--like", out, "-o", converted)
        assert (done.code, done.err) == (0, f"1 of 1 adapter scaled for int8.safetensors; {wrote} {converted}\n")
    again = ctq("lora", "fold", converted, "--like", out, "-o", tmp_path / "twice.safetensors")
    assert (again.code, again.err) == (1, f"error: {converted}: it is folded already (give the original)\n")
    plain = ctq("lora", "fold", lora, "--like", flux_file, "-o", tmp_path / "twice.safetensors")
    assert plain.code == 1
    assert "its channels are not folded, so LoRAs fit it as they are" in plain.err


def test_calibration_takes_a_lora_that_is_folded_for_the_file_only(ctq, flux_file, lora, tmp_path):
    out, converted = tmp_path / "fp8.safetensors", tmp_path / "folded.safetensors"
    done = ctq("-i", flux_file, "-o", out, "--fold", "--actcal", *SMALL)
    assert (done.code, done.err.count("its channels are folded")) == (0, 1)
    assert ctq("lora", "fold", lora, "--like", out, "-o", converted).code == 0
    for words in (("-i", out, "-o", tmp_path / "a.safetensors", "--actcal", "--actcal-lora"), ("observe", out, "-o",
                  tmp_path / "stats.safetensors", "--lora")):  # fmt: skip
        sizes = SMALL if words[0] == "-i" else [str(word).replace("actcal-", "") for word in SMALL]
        assert ctq(*words, converted, *sizes).code == 0
        refused = ctq(*words, lora, *sizes)
        assert refused.code == 1
        assert "it is not folded for fp8.safetensors, whose channels are scaled" in refused.err


@pytest.mark.parametrize("words", [("--best", "--gpu", "rtx50", "--bits", 7), ("--format", "w4a8")])
def test_a_folded_file_is_rounded_to_the_same_bytes_every_time(ctq, flux_file, tmp_path, words):
    outs = [tmp_path / name for name in ("nearest.safetensors", "a.safetensors", "b.safetensors")]
    for out, more in zip(outs, ((), ("--round",), ("--round",)), strict=True):
        assert ctq("-i", flux_file, "-o", out, "--fold", *words, *more, *SMALL).code == 0
    nearest, first, again = (tensors_of(out) for out in outs)
    assert folding_of(outs[1]) == folding_of(outs[0]) is not None
    assert first == again
    assert first.keys() == nearest.keys()
    assert first != nearest


def tensors_of(path: Path) -> dict[str, bytes]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.raw(name).tobytes() for name in checkpoint.tensors}


def test_even_channels_are_left_as_they_are(ctq, save, flux_tensors, tmp_path):
    out = tmp_path / "int8.safetensors"
    done = ctq("-i", save("even.safetensors", flux_tensors()), "-o", out, "--format", "int8", "--fold", *SMALL)
    assert (done.code, folding_of(out)) == (0, None)
    assert "its channels are even already" in done.err
