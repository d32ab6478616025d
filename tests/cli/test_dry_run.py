"""--dry-run: what every command that writes can be asked first. It fails as the command would, and writes nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convert_to_quant.cli import COMMANDS, READERS
from convert_to_quant.emoji.rerange import RERANGINGS, write_reranged

CALLS = {
    "convert": "-i flux.safetensors -o out.safetensors",
    "convert and calibrate": "-i flux.safetensors -o out.safetensors --actcal",
    "calibrate": "-i fp8.safetensors -o out.safetensors --actcal --actcal-engine layer",
    "calibrate in place": "-i fp8.safetensors --in-place --actcal --actcal-engine layer",
    "observe": "observe flux.safetensors -o out.safetensors",
    "apply": "apply fp8.safetensors stats.safetensors -o out.safetensors",
    "apply in place": "apply fp8.safetensors stats.safetensors --in-place",
    "dequantize": "dequantize fp8.safetensors -o out.safetensors",
    "migrate": "migrate fp8.safetensors -o out.safetensors --to header",
    "lora fold": "lora fold lora.safetensors --like folded.safetensors -o out.safetensors",
    "repair": "repair fp8.safetensors",
    "merge": "merge stats.safetensors stats.safetensors -o out.safetensors",
    "report": "report stats.safetensors fp8.safetensors -o out.html --png out.png --csv out.csv",
    "card": "card flux.safetensors fp8.safetensors -o out",
    "demo": "demo -o out",
    "comfyui install": "comfyui install ComfyUI",
    "comfyui uninstall": "comfyui uninstall Installed",
}

FAILURES = {
    "convert": ("-i flux.safetensors -o none/out.safetensors", "the folder none does not exist"),
    "convert onto itself": ("-i flux.safetensors -o flux.safetensors", "the same file as the input"),
    "calibrate": ("-i fp8.safetensors --actcal -o none/out.safetensors", "the folder none does not exist"),
    "calibrate onto itself": ("-i fp8.safetensors --actcal -o fp8.safetensors", "the same file as the input"),
    "observe": ("observe flux.safetensors -o none/out.safetensors", "the folder none does not exist"),
    "observe itself": ("observe flux.safetensors -o flux.safetensors", "the same file as the input"),
    "observe nothing": ("observe none.safetensors -o out.safetensors", "no such file"),
    "apply": ("apply fp8.safetensors stats.safetensors -o none/out.safetensors", "the folder none does not exist"),
    "apply in place": ("apply flux.safetensors stats.safetensors --in-place", "no FP8 layers"),
    "merge": ("merge stats.safetensors -o none/out.safetensors", "the folder none does not exist"),
    "merge onto itself": ("merge stats.safetensors -o stats.safetensors", "the same file as the input"),
    "report": ("report stats.safetensors fp8.safetensors -o none/out.html", "the folder none does not exist"),
    "card": ("card flux.safetensors fp8.safetensors -o flux.safetensors", "a file is there"),
    "demo": ("demo -o flux.safetensors", "a file is there"),
}


FOLDING = "--actcal-samples 3 --actcal-height 32 --actcal-width 32 --actcal-text-tokens 4"
KEPT = ("stats.safetensors", "folded.safetensors")


@pytest.fixture(scope="module")
def observed():
    """Files that calls are made with and that take a run of the model, once they have been made."""
    return []


@pytest.fixture
def place(ctq, fp8_file, save, observed, monkeypatch):
    """A folder with all that the calls name."""
    folder = fp8_file.parent
    monkeypatch.chdir(folder)
    if not observed:
        words = "--samples 1 --steps 1 --height 32 --width 32 --text-tokens 4 -q"
        assert ctq("observe", "flux.safetensors", "-o", "stats.safetensors", *words.split()).code == 0
        write_reranged(folder / "flux.safetensors", folder / "wild.safetensors", RERANGINGS["wild"])
        words = f"-i wild.safetensors -o folded.safetensors --format int8 --fold {FOLDING} -q"
        assert ctq(*words.split()).code == 0
        observed += [(folder / name).read_bytes() for name in KEPT]
    for name, data in zip(KEPT, observed, strict=True):
        (folder / name).write_bytes(data)
    factors = {"lora_A": np.ones((1, 32), np.float32), "lora_B": np.ones((32, 1), np.float32)}
    save("lora.safetensors", {f"double_blocks.0.img_attn.proj.{name}.weight": each for name, each in factors.items()})
    for name in ("ComfyUI", "Installed"):
        (folder / name / "custom_nodes").mkdir(parents=True)
    assert ctq("comfyui", "install", "Installed", "-q").code == 0
    return folder


def test_every_command_that_writes_is_here():
    assert {name.partition(" ")[0] for name in CALLS} >= set(COMMANDS) - READERS - {"completion"}


@pytest.mark.parametrize("name", CALLS)
def test_it_says_so_and_writes_nothing(ctq, place, folder, name):
    before = folder()
    outcome = ctq(*CALLS[name].split(), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "dry run: " in outcome.err
    assert folder() == before
    assert ctq(*CALLS[name].split(), "--dry-run", "-q").err == ""
    assert folder() == before


@pytest.mark.parametrize("name", CALLS)
def test_it_gives_its_document_all_the_same(ctq, place, name):
    outcome = ctq(*CALLS[name].split(), "--dry-run", "--json", "-")
    assert json.loads(outcome.out)["made_by"]["options"]["dry-run"] is True


@pytest.mark.parametrize("name", FAILURES)
def test_it_fails_as_the_command_would(ctq, place, folder, name):
    before = folder()
    words, said = FAILURES[name]
    outcome = ctq(*words.split(), "--dry-run")
    assert outcome.code == 1, outcome.err
    assert said in outcome.err
    assert folder() == before
