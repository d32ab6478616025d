"""`convert_to_quant --best`: the best mix of formats, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.layers import find_layers

SMALL = ("--actcal-samples", 3, "--actcal-height", 32, "--actcal-width", 32, "--actcal-text-tokens", 4)
BEST = ("--best", "--gpu", "rtx50", *SMALL)


def mix(path: Path) -> dict[str, str]:
    """The format of each quantized layer."""
    with open_checkpoint(path) as file:
        return {layer.name: layer.format.name for layer in find_layers(file).quantized.values() if layer.format}


def test_the_best_mix_is_written_reported_and_checked(done, flux_file, tmp_path):
    out, report = tmp_path / "best.safetensors", tmp_path / "best.json"
    outcome = done("-i", flux_file, "-o", out, *BEST, "--bits", 7, "--json", report, "-v")
    found, said = mix(out), json.loads(report.read_text())
    assert "bits per weight" in outcome.err
    assert f"wrote {out}" in outcome.err
    assert found.keys() <= {line.partition(" ")[0] for line in outcome.out.splitlines()}
    for words in ("best mix", "all nvfp4", "this file", "half a bit more", "SQNR alone"):
        assert words in outcome.out
    assert out.stat().st_size < 0.8 * flux_file.stat().st_size
    assert found == {name: each["format"] for name, each in said["best"]["layers"].items() if each["format"]}
    page, document = tmp_path / "mix.html", tmp_path / "mix.json"
    shown = done("report", out, "-o", page, "--json", document)
    assert "A mix of formats at" in shown.err
    layers = {layer["name"]: layer for layer in json.loads(document.read_text())["layers"]}
    assert {name: layer["sides"][0]["stored"] for name, layer in layers.items() if name in found} == found
    for name, each in said["best"]["layers"].items():
        assert layers[name]["alone_db"] == pytest.approx(each["tried"], rel=1e-3)
    checked = done("check", flux_file, out, "--height", 32, "--width", 32, "--samples", 1, "--steps", 1)
    told = done("inspect", out, "--strict")
    words = " ".join(told.out.split())
    assert "best mix of formats for rtx50, chosen by running the model on noise (3 samples, seed 42): " in words
    measured = "{:.1f} to {:.1f} dB measured".format(*said["best"]["measured_db"])
    assert f"{said['best']['bits']:.2f} bits per weight, {measured}" in words
    assert f"its mix of formats was chosen for {measured} on noise" in checked.err


OBSERVED = ("--trials", "--height", 32, "--width", 32, "--text-tokens", 4, "--samples", 3)


def test_trials_of_an_observation_replace_the_run(done, refused, flux_file, tmp_path):
    out, kept, again = (tmp_path / name for name in ("a.safetensors", "kept.safetensors", "b.safetensors"))
    done("-i", flux_file, "-o", out, *BEST, "--bits", 7)
    done("observe", flux_file, "-o", kept, *OBSERVED)
    done("-i", flux_file, "-o", again, "--best", "--gpu", "rtx50", "--bits", 7, "--from", kept)
    assert mix(again) == mix(out)
    shown = done("report", kept, "-v").out
    assert "layer alone, dB in" in shown
    assert all(name in shown for name in mix(out))
    page, table, document = tmp_path / "r.html", tmp_path / "r.csv", tmp_path / "r.json"
    done("report", kept, "-o", page, "--csv", table, "--json", document)
    layers = json.loads(document.read_text())["layers"]
    assert all(set(mix(out).values()) & layer["alone_db"].keys() for layer in layers if layer["name"] in mix(out))
    lines = {line["layer"]: line for line in csv.DictReader(table.read_text().splitlines())}
    for layer in layers:
        for name, alone_db in layer["alone_db"].items():
            assert float(lines[layer["name"]][f"alone_{name}_db"]) == pytest.approx(alone_db, rel=1e-3)
    done("-i", flux_file, "-o", again, "--best", "--gpu", "rtx50", "--bits", 5, "--from", kept)
    assert again.stat().st_size < out.stat().st_size
    message = f"{out}: the file has no trials of formats (make it with observe --trials)\n"
    refused(message, "-i", flux_file, "-o", again, "--best", "--from", out)


def test_stdout_is_one_document(done, flux_file):
    outcome = done("-i", flux_file, *BEST, "--bits", 7, "--dry-run", "-v", "--json", "-")
    said = json.loads(outcome.out)["best"]
    assert said["more"][1] > said["expected_db"]
    assert "half a bit more" in outcome.err


def test_a_dry_run_writes_nothing(ctq, done, flux_file, folder):
    before = folder()
    outcome = ctq("-i", flux_file, *BEST, "--size", "1MB", "--formats", "int8", "--dry-run")
    assert (outcome.code, "the layers fit as they are" in outcome.err) == (2, True)
    told = done("-i", flux_file, *BEST, "--size", "120kB", "--formats", "int8,nvfp4", "--dry-run").err
    assert "nothing was written" in told
    assert folder() == before


@pytest.mark.parametrize(
    ("words", "instead"),
    [(("--best",), "--format converts all layers to one format"), (("--round", "--format", "int8"), "omit --round")],
)
def test_a_model_that_cannot_be_run_is_refused(ctq, save, folder, words, instead):
    path = save("other.safetensors", {f"blocks.{n}.fc.weight": np.ones((32, 32), np.float32) for n in range(2)})
    before = folder()
    outcome = ctq("-i", path, "-o", path.with_name("out.safetensors"), *words)
    assert f"error: {path}: the model cannot be run" in outcome.err
    assert instead in outcome.err
    assert (outcome.code, folder()) == (1, before)
