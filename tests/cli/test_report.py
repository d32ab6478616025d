"""`report`: files told apart by what they are, outputs that replace nothing, and a verdict in any case."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convert_to_quant import __version__
from convert_to_quant.cli.report import verdict_lines
from convert_to_quant.recorder import Recording
from convert_to_quant.report import figures
from convert_to_quant.stats import Statistics

TOKENS = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
LAYERS = ("blocks.0.a", "blocks.1.a")


def observed(factors: Mapping[str, float]) -> Statistics:
    """Statistics of layers that saw normal inputs of these magnitudes."""
    recording = Recording(dict.fromkeys(factors, (16, 32)), {name: [name] for name in factors})
    for number, factor in enumerate(factors.values()):
        recording.observe(number, torch.from_numpy(factor * TOKENS))
    return recording.statistics(samples=2)


@pytest.fixture
def stats(tmp_path):
    """Write a statistics file: stats("name", loud=1000 for blocks.0.a)."""

    def stats(name: str = "stats", loud: float = 1000.0) -> Path:
        path = tmp_path / f"{name}.safetensors"
        observed({LAYERS[0]: loud, LAYERS[1]: 1.0}).save(path)
        return path

    return stats


@pytest.fixture
def model(save, build):
    def model(name: str = "fp8", **settings: Any) -> Path:
        return save(f"{name}.safetensors", *build.quantized(LAYERS, "tensor", **settings))

    return model


def test_without_an_output_the_verdict_is_data(ctq, stats, model):
    outcome = ctq("report", stats(), model())
    assert (outcome.code, outcome.err) == (0, "")
    head, *points = outcome.out.splitlines()
    assert head == "fp8.safetensors: 1 of 2 FP8 layers at risk at the current scales, none after calibration."
    assert points[0].startswith("- Clipping in 1 layer: inputs reach up to ")
    assert ctq("report", model(), stats()) == outcome, "files are told apart by what they are"


def test_all_outputs_tell_the_same(done, stats, model, tmp_path):
    page, png, table, document = (tmp_path / name for name in ("r.html", "r.png", "r.csv", "r.json"))
    outcome = done("report", stats(), model(), "-o", page, "--png", png, "--csv", table, "--json", document)
    assert outcome.out == ""
    assert outcome.err.splitlines()[0].startswith("fp8.safetensors: 1 of 2 FP8 layers at risk")
    assert outcome.err.splitlines()[-3:] == [f"wrote {path}" for path in (page, png, table)]
    told = json.loads(document.read_text())
    assert told["version"] == __version__
    assert told["options"]["files"] == ["stats.safetensors", "fp8.safetensors"]
    assert [layer["sides"][0]["before"]["risk"] for layer in told["layers"]] == ["clips", ""]
    assert [line["risk_before"] for line in csv.DictReader(io.StringIO(table.read_text()))] == ["clips", ""]
    assert told["verdict"]["headline"] in page.read_text()
    chunks = Image.open(png).text  # type: ignore[attr-defined]
    assert json.loads(chunks["convert_to_quant"])["verdict"][0] == told["verdict"]["headline"]


def test_files_whose_names_are_no_text_are_reported(done, stats, model, tmp_path):
    observed, checkpoint = stats(os.fsdecode(b"\xe9")), model(os.fsdecode(b"\xff"))
    places = [tmp_path / name for name in ("r.html", "r.csv", "r.json")]
    outputs = zip(("-o", "--csv", "--json"), places, strict=True)
    done("report", observed, checkpoint, *itertools.chain(*outputs))
    for place in places:
        assert "\\udcff" in place.read_text(encoding="utf-8")


def test_csv_and_json_go_to_stdout_alone(ctq, stats):
    table = ctq("report", stats(), "--csv", "-")
    assert [line["layer"] for line in csv.DictReader(io.StringIO(table.out))] == list(LAYERS)
    document = ctq("report", stats(), "--json", "-", "-v")
    assert [layer["name"] for layer in json.loads(document.out)["layers"]] == list(LAYERS)
    assert LAYERS[0] in document.err


def test_quiet_leaves_the_data(ctq, stats, tmp_path):
    assert ctq("report", stats(), "-q").out.startswith("stats.safetensors: 1 of 2")
    outcome = ctq("report", stats(), "-q", "--csv", tmp_path / "t.csv")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_verbose_says_every_layer(ctq, stats):
    outcome = ctq("report", stats(), "-v")
    (line,) = [line for line in outcome.out.splitlines() if line.startswith(LAYERS[0])]
    assert "clips" in line
    assert "31." in line


def test_options_of_apply_decide_what_is_chosen(ctq, stats):
    scales = [
        json.loads(ctq("report", stats(), "--json", "-", *words).out)["layers"][1]["sides"][0]["after"]["scale"]
        for words in (("--margin", "1"), ("--margin", "2"), ("--keep", "blocks.1"))
    ]
    assert scales[1] == pytest.approx(2 * scales[0])
    assert scales[2] == 1.0


def test_two_statistics_are_compared(ctq, stats):
    outcome = ctq("report", stats("mine", 1.0), stats("with_lora", 20.0))
    assert outcome.out.splitlines()[0] == (
        "mine against with_lora: Scales calibrated on mine do not fit with_lora: 1 of 2 layers at risk."
    )


def test_two_checkpoints_are_compared_with_and_without_statistics(ctq, stats, model):
    paths = model("one"), model("two", input_scale=16.0)
    assert "Scales differ in 2 of 2 layers between one and two." in ctq("report", *paths).out
    outcome = ctq("report", paths[0], stats(), paths[1])
    assert "Layers at risk: 1 of 2 (one), 0 of 2 (two)." in outcome.out


def test_the_first_statistics_belong_to_the_first_checkpoint(ctq, stats, model):
    paths = stats("a", 1.0), stats("b", 20.0), model("one"), model("two", input_scale=16.0)
    document = json.loads(ctq("report", *paths, "--json", "-").out)
    assert [(side["statistics"], side["model"]) for side in document["sides"]] == [
        (["a.safetensors"], "one.safetensors"), (["b.safetensors"], "two.safetensors")]  # fmt: skip


@pytest.mark.parametrize("words", ["margin=2 method=percentile", "--margin=2  --method=percentile"])
def test_one_statistics_file_is_solved_in_two_ways(ctq, stats, words):
    document = json.loads(ctq("report", stats(), "--keep", "blocks_1", f"--against={words}", "--json", "-").out)
    first, second = (side["options"] for side in document["sides"])
    assert (first["margin"], first["method"]) == (None, "absmax")
    assert (second["margin"], second["method"]) == (2.0, "percentile")
    assert first["keep"] == second["keep"] == ["blocks_1"]  # what it does not say stays


def test_merged_statistics_are_one_side(ctq, stats):
    document = json.loads(ctq("report", stats("a", 5.0), stats("b", 7.0), "--merge", "--json", "-").out)
    (side,) = document["sides"]
    assert (side["statistics"], side["samples"]) == (["a.safetensors", "b.safetensors"], 4)
    assert document["layers"][0]["sides"][0]["absmax"] == pytest.approx(7 * float(np.abs(TOKENS).max()), rel=1e-3)


def test_a_narrow_terminal_gets_the_verdict_in_its_width(monkeypatch):
    for name, value in {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    lines = list(verdict_lines(figures.build(figures.Source(observed({"a": 1000.0, "b": 1.0}))), terminal))
    assert max(map(len, "\n".join(lines).splitlines())) <= 40


def test_names_cannot_drive_the_terminal(ctq, tmp_path):
    path = tmp_path / "e\x1b[2Jvil.safetensors"
    observed({"a\x1b[2J": 1000.0}).save(path)
    assert "\x1b" not in ctq("report", path, "-v").out


def test_a_report_imports_no_torch(stats):
    code = (
        "import sys\nfrom convert_to_quant.cli import main\n"
        f"assert main(['report', {str(stats())!r}, '--csv', '-']) == 0\n"
        "print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout.splitlines()[-1] == "[]"
