from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convert_to_quant import demo
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import main
from convert_to_quant.demo import BF16, CALIBRATED, GEOMETRY, SCALE_ONE, DemoOptions
from convert_to_quant.emoji import WEIGHTS
from convert_to_quant.engines.diffusers import load
from convert_to_quant.engines.prompts import Prompts
from convert_to_quant.errors import OptionError
from convert_to_quant.fidelity import velocity_fidelity
from convert_to_quant.layers import find_layers, input_scale

LEAST_SAMPLES = 3
"""The fewest that calibration runs on: one way of eight steps for each kind of conditioning."""

SMALL = DemoOptions(
    variants=("hot",), names=("strawberry", "fish"), measured=1, levels=2, steps=2, samples=LEAST_SAMPLES
)


def test_demo_converts_calibrates_paints_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares: list[float] = []
    run = demo.run

    def small(folder: Path, *, progress: demo.Progress) -> demo.Demo:
        def watched(done: float, total: float) -> None:
            shares.append(done / total)
            progress(done, total)

        return run(folder, SMALL, progress=watched)

    monkeypatch.setattr(demo, "run", small)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    folder, report = tmp_path / "new" / "folder", tmp_path / "report.json"
    assert main(["demo", "-o", str(folder), "--json", str(report)]) == 0

    head, line = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "model"
    assert line.startswith("hot")
    assert line.count(" dB") == 3
    (row,) = json.loads(report.read_text())["rows"]
    figures = {column: found["sqnr_db"] for column, found in row["fidelity"].items()}
    assert figures[BF16] > 45
    assert figures[SCALE_ONE] < 12
    assert figures[CALIBRATED] > 29
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
    for column in demo.COLUMNS:
        with open_checkpoint(row["files"][column]) as checkpoint:
            table = find_layers(checkpoint)
            scales = {input_scale(checkpoint, layer) for layer in table.quantized.values()}
            assert (scales == {1.0}, len(scales) > 10) == (column == SCALE_ONE, column == CALIBRATED)


def test_pictures_show_what_was_asked_for() -> None:
    names = ("strawberry", "fish")
    with open_checkpoint(WEIGHTS) as checkpoint:
        painted = demo.paint(load(checkpoint), demo.prompt_conditioning(names), DemoOptions(names=names, steps=6))
    assert painted.shape == (2, 32, 32, 3)
    strawberry, fish = painted.astype(int)
    assert strawberry[8:24, 8:24, 0].mean() > strawberry[8:24, 8:24, 2].mean() + 50  # red
    assert fish[8:24, 8:24, 2].mean() > fish[8:24, 8:24, 0].mean() + 50  # blue
    corners = painted[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 240  # on white


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(OptionError, match="unknown re-ranging 'lukewarm'"):
        DemoOptions(variants=("plain", "lukewarm"))


def test_a_file_in_the_folders_place_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "taken"
    place.write_text("here first")
    assert main(["demo", "-o", str(place)]) == 1
    assert f"{place}: the folder cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variant", "least_db", "scale_one_db"),
    [("plain", 29, None), ("hot", 29, (5, 9)), ("cold", 29, (-3, 2)), ("spiky", None, None), ("wild", None, None)],
)
def test_actcal_without_data_keeps_the_picture(
    tmp_path: Path, variant: str, least_db: float | None, scale_one_db: tuple[float, float] | None
) -> None:
    """At least 29 dB where layers have one range each, and nowhere worse than a scale of 1.0 by more than 0.3 dB."""
    files, calibration = demo.make_files(variant, tmp_path, LEAST_SAMPLES)
    assert calibration.engine == "model"
    conditioning = demo.prompt_conditioning(demo.prompts.NAMES[:2])
    with demo.models(files) as (reference, runs):
        found = {
            column: velocity_fidelity(reference, runs[column], conditioning, GEOMETRY, guidance=2, steps=6).sqnr_db
            for column in (SCALE_ONE, CALIBRATED)
        }
    assert found[CALIBRATED] > found[SCALE_ONE] - 0.3
    if least_db is not None:
        assert found[CALIBRATED] >= least_db
    if scale_one_db is not None:
        low, high = scale_one_db
        assert low < found[SCALE_ONE] < high
    assert np.isfinite(list(found.values())).all()
