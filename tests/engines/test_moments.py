"""Second moments of the tiny Flux.1's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from convert_to_quant.checkpoint import Checkpoint, open_checkpoint
from convert_to_quant.convert import plan_conversion
from convert_to_quant.engines import denoiser, moments
from convert_to_quant.families.running import Geometry
from convert_to_quant.options import ConvertOptions, RunOptions

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself

SIZE = Geometry(height=3, width=4, frames=1, text_tokens=5)
SHOWN = RunOptions(samples=3, steps=2, height=32, width=32, text_tokens=4)


@pytest.fixture
def flux(flux_file: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(flux_file) as checkpoint:
        yield checkpoint


def test_moments_are_the_sum_over_all_inputs(flux: Checkpoint) -> None:
    model = denoiser.load(flux)
    layer = next(iter(model.layers))
    seen: list[torch.Tensor] = []
    model.layers[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    found = moments.gather(model, [layer, "not run"], SIZE, 3, SHOWN)
    rows = torch.cat(seen)
    assert found.keys() == {layer}
    torch.testing.assert_close(found[layer], rows.T @ rows)


def test_moments_of_few_layers_are_held_at_a_time(flux: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_conversion(flux, ConvertOptions(format="int8"))
    layers = [layer for layer, _ in plan.quantized]
    whole = moments.Rounding(flux, plan.table, layers, SHOWN)
    monkeypatch.setitem(moments.BUDGET_BYTES, "cpu", 0)
    banded = moments.Rounding(flux, plan.table, layers, SHOWN)
    assert len(whole.bands) == 1
    assert len(banded.bands) == len(layers)
    for layer in layers:
        of_whole, of_band = whole.moments_of(layer.name), banded.moments_of(layer.name)
        assert of_whole is not None
        torch.testing.assert_close(of_whole, of_band)
        assert len(banded.moments) == 1
