"""ComfyUI computes what our engine simulates, over whole models.

The sharp comparison is layer by layer, on ComfyUI's own inputs: `test_formats.py`. Over a whole FP8 model two runs that
differ in the last bit of a sum drift apart: now and then an input lies on the border between two codes, and a code is a
step of 6 to 12 %. So whole runs are held to what ComfyUI itself makes of inputs that differ in their last bits, and to
the same fidelity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import driver
import pytest

pytestmark = pytest.mark.comfyui

Files, Figure = Callable[[str], Any], Callable[[str, float], float]
States = dict[str, Any]


@pytest.mark.parametrize(
    ("name", "dtype", "least_db"),
    [("original", "float32", 100.0), ("original", "bfloat16", 36.0), ("calibrated", "float32", 100.0)],
)
def test_whole_models_without_fp8_products_agree_to_rounding(
    comfyui: Any, ours: Any, files: Files, states: States, figure: Figure, name: str, dtype: str, least_db: float
) -> None:
    import torch

    device = {"should_use_bf16": dtype == "bfloat16", "supports_fp8_compute": False}
    path = getattr(files("plain"), name)
    theirs = comfyui.velocity(path, states, device=device)

    found = ours.evaluate(path, states, "dequantize", getattr(torch, dtype))

    assert figure(f"{name} in {dtype}: velocity, ours against ComfyUI's", ours.db(theirs, found)) >= least_db
    if dtype == "bfloat16":
        # Two bfloat16 runs are no closer to each other than each is to float32.
        exact = comfyui.velocity(path, states)
        rounding_db = figure("ComfyUI in bfloat16 against itself in float32", ours.db(exact, theirs))
        assert ours.db(theirs, found) >= rounding_db - 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_fp8_model_agrees_as_closely_as_comfyui_with_itself(
    comfyui: Any, ours: Any, files: Files, states: States, figure: Figure, dtype: str
) -> None:
    import torch

    path, case = files("plain").calibrated, f"FP8 file in {dtype}"
    reference = comfyui.velocity(files("plain").original, states)
    theirs = comfyui.velocity(path, states, device={"should_use_bf16": dtype == "bfloat16"})
    # The last bits of the dtype, the size of the difference between two orders of summation. Two programs differ by it
    # at every sum of some hundred, and not only in the input: several last bits, which float32 has to spare.
    step = torch.finfo(getattr(torch, dtype)).eps
    generator = torch.Generator().manual_seed(0)
    twins = []
    for last_bits in {"float32": (1, 8, 64), "bfloat16": (1, 1, 1)}[dtype]:
        noise = torch.randn(states["x"].shape, generator=generator)
        nudged = {**states, "x": states["x"] * (1 + last_bits * step * noise)}
        twins.append(ours.db(theirs, comfyui.run(driver.evaluate, "run", nudged)["velocity"]))

    found = ours.evaluate(path, states, "comfyui", getattr(torch, dtype))

    itself_db = figure(f"{case}: velocity, ComfyUI against itself with nudged inputs (worst of 3)", min(twins))
    assert figure(f"{case}: velocity, ours against ComfyUI's", ours.db(theirs, found)) >= itself_db - 3
    theirs_db = figure(f"{case}: ComfyUI against its own BF16 run", ours.sqnr_db(reference, theirs))
    assert figure(f"{case}: ours against ComfyUI's BF16 run", ours.sqnr_db(reference, found)) == pytest.approx(
        theirs_db, abs=0.5
    )
