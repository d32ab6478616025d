"""Image quality after calibration in ComfyUI: velocity SQNR of its FP8 run against its run of the original."""

from __future__ import annotations

from functools import cache

import pytest

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="session")
def sqnr_db(comfyui, files, ours, states, figure):
    """sqnr_db("hot"): velocity SQNR of the converted and of the calibrated file, mean over evaluations."""

    @cache
    def measure(name: str) -> tuple[float, float]:
        made = files(name)
        plain = comfyui.velocity(files("plain").original, states)
        velocities = [comfyui.velocity(path, states) for path in (made.original, made.converted, made.calibrated)]
        # A re-ranging is the same function, so the reference itself must be right.
        assert ours.sqnr_db(plain, velocities[0]) > 80
        before, after = (ours.sqnr_db(velocities[0], found) for found in velocities[1:])
        figure(f"{name}, input scales of 1.0", before)
        figure(f"{name}, after --actcal", after)
        return before, after

    return measure


@pytest.mark.parametrize("name", ["hot", "cold"])
def test_models_that_break_at_one_paint_after_calibration(sqnr_db, name):
    before, after = sqnr_db(name)
    plain_before, _ = sqnr_db("plain")

    assert before < 12
    assert after > 26
    assert after > plain_before - 1.5


@pytest.mark.parametrize("name", ["plain", "spiky", "wild"])
def test_models_that_work_at_one_lose_nothing_by_calibration(sqnr_db, name):
    before, after = sqnr_db(name)

    assert after > before - 0.3
