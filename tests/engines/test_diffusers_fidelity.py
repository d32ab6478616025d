import pytest
from tiny_flux import random_flux

from convert_to_quant import fidelity
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.families.running import Geometry
from convert_to_quant.fidelity import velocity_fidelity

SIZE = Geometry(height=2, width=3, frames=1, text_tokens=4)


@pytest.fixture
def pair(save_model):
    state = random_flux()
    reference = open_checkpoint(save_model(state))
    quantized = open_checkpoint(save_model(state, lambda layer: "blocks" in layer, input_scale=0.02))
    return engine.load(reference), engine.load(quantized, arithmetic="comfyui_divide")


def test_layer_errors_compare_rows_for_the_references_inputs(pair):
    reference, quantized = pair
    name, layer, seen = "transformer_blocks.0.ff.net.2", "double_blocks.0.img_mlp.2", []
    reference.linears[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    conditioning = fidelity.noise_prompts(reference, SIZE, 2)
    found = velocity_fidelity(reference, quantized, conditioning, SIZE, steps=1, layer_errors=True)
    by_layer = {error.layer: error for error in found.layers}
    assert set(by_layer) == {layer for layer in quantized.layers if "blocks" in layer}
    assert [error.worst for error in found.layers] == sorted((e.worst for e in found.layers), reverse=True)

    wanted, other = (model.linears[name](seen[0]) for model in (reference, quantized))
    rows = ((wanted - other).norm(dim=-1) / wanted.norm(dim=-1)).flatten()
    assert by_layer[layer].rows == len(rows) == 2 * SIZE.height * SIZE.width
    assert by_layer[layer].mean == pytest.approx(float(rows.mean()), rel=1e-4)
    assert by_layer[layer].worst == pytest.approx(float(rows.max()), rel=0.05)  # known to a bin of 1/16 octave
    assert by_layer[layer].whole == pytest.approx(float((wanted - other).norm() / wanted.norm()), rel=1e-4)


def test_layers_are_not_compared_unless_asked_for(pair):
    reference, quantized = pair
    conditioning = fidelity.noise_prompts(reference, SIZE, 1)
    assert velocity_fidelity(reference, quantized, conditioning, SIZE, steps=1).layers == ()
    assert not any(module._forward_hooks for module in reference.linears.values())


def test_clipped_inputs_cost_far_more_than_rounded_ones(pair):
    reference, quantized = pair
    conditioning = fidelity.noise_prompts(reference, SIZE, 2)
    rounded = velocity_fidelity(reference, quantized, conditioning, SIZE, steps=2).sqnr_db
    for module in quantized.linears.values():
        module.input_scale.fill_(1e-4)
    clipped = velocity_fidelity(reference, quantized, conditioning, SIZE, steps=2).sqnr_db
    assert clipped < rounded - 10
