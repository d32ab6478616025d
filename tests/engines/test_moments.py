"""Second moments of the tiny Flux.1's inputs."""

import pytest
import torch

from convert_to_quant.convert import plan_conversion
from convert_to_quant.engines import moments
from convert_to_quant.options import ConvertOptions, RunOptions

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself

SHOWN = RunOptions(samples=3, steps=2, height=32, width=32, text_tokens=4)


def gathering(flux):
    plan = plan_conversion(flux, ConvertOptions(format="int8"))
    return moments.Gathering(flux, plan.table, [layer for layer, _ in plan.quantized], SHOWN)


def test_moments_are_the_sum_over_all_inputs(flux):
    whole = gathering(flux)
    layer = next(iter(whole.model.layers))
    seen = []
    whole.model.layers[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    found = whole.gather([layer, "not run"])
    rows = torch.cat(seen)
    assert found.keys() == {(layer,)}
    torch.testing.assert_close(found[layer,], rows.T @ rows)


def test_moments_of_few_layers_are_held_at_a_time(flux, monkeypatch):
    plan = plan_conversion(flux, ConvertOptions(format="int8"))
    whole = gathering(flux)
    monkeypatch.setattr(moments, "BUDGET_BYTES", 0)
    banded = gathering(flux)
    assert len(whole.bands) == 1
    assert len(banded.bands) == len(plan.quantized)
    for layer, _ in plan.quantized:
        of_whole, of_band = whole.moments_of(layer), banded.moments_of(layer)
        assert of_whole is not None
        torch.testing.assert_close(of_whole, of_band)
        assert len(banded.moments) == 1
