"""The ways in which a file says what its layers are."""

from __future__ import annotations

import json

import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.layers import find_layers


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_header_that_names_a_layer_twice_is_changed_in_both_names(save, build, prefix):
    tensors, _ = build.quantized([f"{prefix}x", f"{prefix}y"], "none")
    said = {"format": "float8_e4m3fn"}
    header = {"layers": dict.fromkeys(("x", f"{prefix}x", "y"), said)}
    with open_checkpoint(save("a.safetensors", tensors, {"_quantization_metadata": json.dumps(header)})) as checkpoint:
        changed = find_layers(checkpoint).marks.header.changed(
            {f"{prefix}x": said | {"full_precision_matrix_mult": True}}
        )
    layers = json.loads(changed["_quantization_metadata"])["layers"]
    assert {name for name, config in layers.items() if len(config) == 2} == {"x", f"{prefix}x"}


def test_a_header_that_speaks_of_other_layers_stays_as_it_is(save, build):
    tensors, _ = build.quantized(["x"], "tensor")
    other, _ = build.quantized(["y"], "none")
    header = {"_quantization_metadata": '{ "layers" : {"y": {"format": "float8_e4m3fn"}} }'}
    with open_checkpoint(save("a.safetensors", tensors | other, header)) as checkpoint:
        marks = find_layers(checkpoint).marks
        said = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        assert marks.header.changed({"x": said}) == {}
        assert [json.loads(data) for _, data in marks.tensor.changed("x", said).values()] == [said]
        assert marks.tensor.changed("y", said) == {}
