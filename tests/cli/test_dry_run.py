"""--dry-run reports what every writing command would do, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convert_to_quant.cli import COMMANDS, READERS, main
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
    "lora fold": "lora fold style.safetensors --like folded.safetensors -o out.safetensors",
    "repair": "repair fp8.safetensors",
    "merge": "merge stats.safetensors stats.safetensors -o out.safetensors",
    "report": "report stats.safetensors fp8.safetensors -o out.html --png out.png --csv out.csv",
    "card": "card flux.safetensors fp8.safetensors -o out",
    "demo": "demo -o out",
    "comfyui install": "comfyui install ComfyUI",
    "comfyui uninstall": "comfyui uninstall Installed",
}


@pytest.fixture(scope="module")
def folded(tmp_path_factory, build, flux_tensors):
    """The content of a folded checkpoint."""
    flux, wild, out = (tmp_path_factory.mktemp("folded") / name for name in ("flux", "wild", "out"))
    flux.write_bytes(build.file_bytes(flux_tensors()))
    write_reranged(flux, wild, RERANGINGS["wild"])
    words = "--format int8 --fold --actcal-samples 3 --actcal-height 32 --actcal-width 32 --actcal-text-tokens 4 -q"
    assert main(["-i", str(wild), "-o", str(out), *words.split()]) == 0
    return out.read_bytes()


@pytest.fixture
def place(done, fp8_file, lora, flux, statistics, folded, monkeypatch):
    """A folder with all files of the calls."""
    monkeypatch.chdir(fp8_file.parent)
    statistics(flux.linear).save("stats.safetensors")
    Path("folded.safetensors").write_bytes(folded)
    for name in ("ComfyUI", "Installed"):
        Path(name, "custom_nodes").mkdir(parents=True)
    done("comfyui", "install", "Installed", "-q")


def test_all_writing_commands_are_tested():
    assert {name.partition(" ")[0] for name in CALLS} >= set(COMMANDS) - READERS - {"completion"}


@pytest.mark.parametrize("name", CALLS)
def test_a_dry_run_writes_nothing(ctq, done, place, folder, name):
    before = folder()
    outcome = done(*CALLS[name].split(), "--dry-run")
    assert "dry run: " in outcome.err
    assert ctq(*CALLS[name].split(), "--dry-run", "-q").err == ""
    document = json.loads(ctq(*CALLS[name].split(), "--dry-run", "--json", "-").out)
    assert document["made_by"]["options"]["dry-run"] is True
    assert folder() == before
