from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from convert_to_quant import demo
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import main
from convert_to_quant.demo import BEST, BF16, CALIBRATED, GEOMETRY, SCALE_ONE, SMALLER, DemoOptions
from convert_to_quant.emoji import WEIGHTS
from convert_to_quant.engines.diffusers import load
from convert_to_quant.engines.prompts import Prompts
from convert_to_quant.layers import find_layers, input_scale
from convert_to_quant.options import RunOptions

LEAST_SAMPLES = 3
"""The fewest that calibration runs on: one way of eight steps for each kind of conditioning."""

SMALL = DemoOptions(
    variants=("hot",),
    names=("strawberry",),
    steps=2,
    samples=LEAST_SAMPLES,
    tried=RunOptions(samples=LEAST_SAMPLES, steps=1, height=64, width=64, text_tokens=8),
)


def test_demo_converts_calibrates_mixes_paints_and_tells(tmp_path, monkeypatch, capsys):
    shares = []
    run = demo.run

    def small(folder, *, progress):
        def watched(done, total):
            shares.append(done / total)
            progress(done, total)

        return run(folder, SMALL, progress=watched)

    monkeypatch.setattr(demo, "run", small)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    folder, report = tmp_path / "new" / "folder", tmp_path / "report.json"
    assert main(["demo", "-o", str(folder), "--json", str(report)]) == 0

    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "size", "hot"]
    assert [line.split("  ")[0] for line in lines] == [way.name for way in demo.WAYS.values()]
    (row,) = json.loads(report.read_text())["rows"]
    sizes = {way: Path(path).stat().st_size for way, path in row["files"].items()}
    assert sizes[CALIBRATED] * 0.95 < sizes[BEST] <= sizes[CALIBRATED]
    assert sizes[CALIBRATED] * 0.63 < sizes[SMALLER] <= sizes[CALIBRATED] * 2 / 3
    figures = {way: found["sqnr_db"] for way, found in row["fidelity"].items()}
    assert figures[BF16] > 45
    assert figures[SCALE_ONE] < 12
    assert figures[CALIBRATED] > 29
    assert figures[BEST] > figures[CALIBRATED] + 3
    assert figures[SMALLER] > 18
    assert row["calibration"]["engine"] == "model"
    with Image.open(folder / demo.PICTURE) as image:
        assert image.format == "PNG"
        assert len(image.getcolors(1 << 24) or []) > 1000
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    with open_checkpoint(row["files"][BF16]) as checkpoint:
        held_out = Prompts.load(folder / demo.PROMPTS).fitted(load(checkpoint), GEOMETRY)
    for name, values in demo.prompt_conditioning(demo.prompts.HELD_OUT).items():
        assert torch.equal(held_out.tensors[name], values)
    for way in (SCALE_ONE, CALIBRATED):
        with open_checkpoint(row["files"][way]) as checkpoint:
            table = find_layers(checkpoint)
            scales = {input_scale(checkpoint, layer) for layer in table.quantized.values()}
            assert (scales == {1.0}, len(scales) > 10) == (way == SCALE_ONE, way == CALIBRATED)


def test_pictures_show_what_was_asked_for():
    names = ("strawberry", "fish")
    with open_checkpoint(WEIGHTS) as checkpoint:
        model = load(checkpoint)
        _, painted = demo.compare(model, model, demo.prompt_conditioning(names), DemoOptions(steps=6))
    assert painted.shape == (2, 32, 32, 3)
    strawberry, fish = painted.astype(int)
    assert strawberry[8:24, 8:24, 0].mean() > strawberry[8:24, 8:24, 2].mean() + 50  # red
    assert fish[8:24, 8:24, 2].mean() > fish[8:24, 8:24, 0].mean() + 50  # blue
    corners = painted[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 240  # on white


def test_a_file_in_the_folders_place_is_an_error(tmp_path, capsys):
    place = tmp_path / "taken"
    place.write_text("here first")
    assert main(["demo", "-o", str(place)]) == 1
    assert f"{place}: the folder cannot be created" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variant", "least_db", "low", "high"),
    [("plain", 29, 0, 99), ("hot", 29, 5, 9), ("cold", 29, -3, 2), ("spiky", 0, -99, 99), ("wild", 0, -99, 99)],
)
def test_actcal_without_data_keeps_the_picture(tmp_path, variant, least_db, low, high):
    """At least 29 dB where layers have one range each, and nowhere worse than a scale of 1.0 by more than 0.3 dB."""
    files, calibration = demo.make_files(variant, tmp_path, LEAST_SAMPLES)
    assert calibration.engine == "model"
    conditioning = demo.prompt_conditioning(demo.prompts.NAMES[:2])
    with demo.models(files) as (reference, runs):
        one_db, calibrated_db = (
            demo.compare(reference, runs[way], conditioning, DemoOptions(steps=6))[0].sqnr_db
            for way in (SCALE_ONE, CALIBRATED)
        )
    assert calibrated_db > max(one_db - 0.3, least_db)
    assert low < one_db < high
