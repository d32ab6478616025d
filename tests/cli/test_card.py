"""`card`: what is published beside a model says what `check` measures, and what was measured on what."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from convert_to_quant import card
from convert_to_quant.emoji import WEIGHTS

SMALL = ("--height", 32, "--width", 48, "--text-tokens", 5, "--steps", 2, "--samples", 2)


def test_a_model_without_a_decoder_is_compared_by_its_latents(ctq, done, flux_file, fp8_file):
    folder, checked = fp8_file.with_name("card"), fp8_file.with_name("check.json")
    done("check", flux_file, fp8_file, *SMALL, "--json", checked)
    outcome = done("card", flux_file, fp8_file, "-o", folder, *SMALL)
    assert outcome.err.splitlines()[1:] == [f"wrote {folder / name}" for name in ("README.md", "card.json")]
    found, text = json.loads((folder / "card.json").read_text()), (folder / "README.md").read_text()
    wanted = json.loads(checked.read_text())
    assert found["fidelity"] == {key: value for key, value in wanted.items() if key != "made_by"}
    assert found["images"] is None
    assert "Images were not compared" in text
    assert "4 samples of noise instead of prompts" in text
    assert f"| velocity SQNR, mean | {wanted['sqnr_db']:.1f}" in text
    assert f"| 0.500 | {wanted['levels'][1]['sqnr_db']:.1f}" in text
    for path in (flux_file, fp8_file):
        assert f"{path.name} | {path.stat().st_size:,} | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in text
    assert "card flux.safetensors fp8.safetensors -o card --samples 2 --steps 2 --height 32 --width 48" in text
    assert str(flux_file.parent) not in text + json.dumps(found), "what is published does not say where files were"
    assert text.startswith("---\n# base_model: ")
    assert "- fp8\n---\n" in text
    assert f"replaced {folder / 'README.md'}" in ctq("card", flux_file, fp8_file, "-o", folder, *SMALL).err


def test_the_emoji_model_is_shown_painting_its_prompts(done, tmp_path):
    from PIL import Image

    quantized, folder = tmp_path / "fp8.safetensors", tmp_path / "card"
    done("-i", WEIGHTS, "-o", quantized)
    done("card", WEIGHTS, quantized, "-o", folder, "--steps", 2, "--samples", 3)
    found, text = json.loads((folder / "card.json").read_text()), (folder / "README.md").read_text()
    assert (found["images"]["count"], found["images"]["height"], found["images"]["lpips"]) == (3, 32, None)
    assert 0.8 < found["images"]["ssim"] < 1
    assert 20 < found["latents"]["snr_db"] < 40
    assert "Measured on 3 prompts: 8 × 8 image tokens and 8 text tokens." in text
    assert "](images.png)" in text
    assert "LPIPS" not in text
    with Image.open(folder / "images.png") as picture:
        assert picture.width > 600


def test_the_latent_snr_is_the_mean_over_samples_of_the_power_ratio():
    samples, latents = card.Samples(decoded=False), torch.ones(2, 4, 8)
    for error in (0.1, 0.01):
        samples.add(latents[:1], latents[:1] * (1 + error))
    assert samples.latents() == pytest.approx({"snr_db": 30, "standard_error_db": 10, "worst_db": 20}, abs=1e-4)
    assert samples.compare() is None


def test_ssim_is_that_of_every_window_by_itself():
    one, other = np.random.default_rng(0).integers(0, 256, (2, 1, 13, 12, 3), np.uint8)
    distance = np.arange(-5, 6) ** 2
    weights = np.exp(-(distance[:, None] + distance) / (2 * 1.5**2))[..., None] / 1.0
    weights /= weights.sum()
    ratios = []
    for row in range(3):
        for column in range(2):
            x, y = (image[0, row : row + 11, column : column + 11].astype(float) for image in (one, other))
            mean_x, mean_y = ((weights * part).sum((0, 1)) for part in (x, y))
            var_x, var_y = (
                (weights * (part - part_mean) ** 2).sum((0, 1)) for part, part_mean in ((x, mean_x), (y, mean_y))
            )
            both = (weights * (x - mean_x) * (y - mean_y)).sum((0, 1))
            ratios.append(
                (2 * mean_x * mean_y + 2.55**2) * (2 * both + 7.65**2)
                / ((mean_x**2 + mean_y**2 + 2.55**2) * (var_x + var_y + 7.65**2))
            )  # fmt: skip
    assert card.ssim(one, other) == pytest.approx([np.mean(ratios)])


def test_lpips_is_measured_where_it_is_installed(tmp_path, monkeypatch):
    source = "def LPIPS(net, verbose): return lambda one, other: (one - other).abs().mean((1, 2, 3))"
    (tmp_path / "lpips.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    white, black = (np.full((2, 16, 16, 3), value, np.uint8) for value in (255, 0))
    assert card.lpips(white, black) == 2  # it takes images in [-1, 1]
