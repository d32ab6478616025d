"""ComfyUI computes what our engine simulates, over whole models.

The sharp comparison is layer by layer, on ComfyUI's own inputs: `test_formats.py`. Over a whole FP8 model two runs that
differ in the last bit of a sum drift apart: now and then an input lies on the border between two codes, and a code is a
step of 6 to 12 %. So whole runs are held to what ComfyUI itself makes of inputs that differ in their last bits, and to
the same fidelity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import driver
import pytest

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.comfyui

Figure = Callable[[str, float], float]

BFLOAT16 = {"should_use_bf16": True}
NO_FP8 = {"supports_fp8_compute": False}


def mean_sqnr_db(wanted: Tensor, found: Tensor) -> float:
    """As our `fidelity` has it: the mean over evaluations."""
    from convert_to_quant.fidelity import sqnr_db

    return float(sqnr_db(wanted, found).mean())


@dataclass(frozen=True)
class Bench:
    """What every comparison needs."""

    comfyui: Any
    ours: Any
    files: Callable[[str], Any]
    states: dict[str, Tensor]


@pytest.fixture
def bench(comfyui: Any, ours: Any, files: Callable[[str], Any], states: dict[str, Tensor]) -> Bench:
    """ComfyUI, our engine, the models, and what both are shown."""
    return Bench(comfyui, ours, files, states)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "least_db"),
    [
        ("original", {}, "float32", 100.0),
        ("original", BFLOAT16, "bfloat16", 36.0),
        ("calibrated", NO_FP8, "float32", 100.0),
    ],
)
def test_whole_models_without_fp8_products_agree_to_rounding(
    bench: Bench, figure: Figure, name: str, device: dict[str, bool], dtype: str, least_db: float
) -> None:
    import torch

    path = getattr(bench.files("plain"), name)
    theirs = bench.comfyui.velocity(path, bench.states, device=device)

    found = bench.ours.evaluate(path, bench.states, "dequantize", getattr(torch, dtype))

    assert figure(f"{name} in {dtype}: velocity, ours against ComfyUI's", bench.ours.db(theirs, found)) >= least_db
    if dtype == "bfloat16":
        # Two bfloat16 runs are no closer to each other than each is to float32.
        exact = bench.comfyui.velocity(path, bench.states)
        rounding_db = figure("ComfyUI in bfloat16 against itself in float32", bench.ours.db(exact, theirs))
        assert bench.ours.db(theirs, found) >= rounding_db - 3


@pytest.mark.parametrize(("device", "dtype"), [({}, "float32"), (BFLOAT16, "bfloat16")])
def test_a_whole_fp8_model_agrees_as_closely_as_comfyui_with_itself(
    bench: Bench, figure: Figure, device: dict[str, bool], dtype: str
) -> None:
    import torch

    path, case = bench.files("plain").calibrated, f"FP8 file in {dtype}"
    reference = bench.comfyui.velocity(bench.files("plain").original, bench.states)
    theirs = bench.comfyui.velocity(path, bench.states, device=device)
    # The last bits of the dtype, the size of the difference between two orders of summation. Two programs differ by it
    # at every sum of some hundred, and not only in the input: several last bits, which float32 has to spare.
    step = torch.finfo(getattr(torch, dtype)).eps
    generator = torch.Generator().manual_seed(0)
    twins = []
    for last_bits in {"float32": (1, 8, 64), "bfloat16": (1, 1, 1)}[dtype]:
        noise = torch.randn(bench.states["x"].shape, generator=generator)
        nudged = {**bench.states, "x": bench.states["x"] * (1 + last_bits * step * noise)}
        twins.append(bench.ours.db(theirs, bench.comfyui.run(driver.evaluate, "run", nudged)["velocity"]))

    found = bench.ours.evaluate(path, bench.states, "comfyui", getattr(torch, dtype))

    itself_db = figure(f"{case}: velocity, ComfyUI against itself with nudged inputs (worst of 3)", min(twins))
    assert figure(f"{case}: velocity, ours against ComfyUI's", bench.ours.db(theirs, found)) >= itself_db - 3
    theirs_db = figure(f"{case}: ComfyUI against its own BF16 run", mean_sqnr_db(reference, theirs))
    assert figure(f"{case}: ours against ComfyUI's BF16 run", mean_sqnr_db(reference, found)) == pytest.approx(
        theirs_db, abs=0.5
    )
