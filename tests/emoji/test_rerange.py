from __future__ import annotations

import numpy as np
import pytest
import torch

from convert_to_quant.checkpoint import Entry, open_checkpoint, write_checkpoint
from convert_to_quant.demo import GEOMETRY, prompt_conditioning
from convert_to_quant.emoji import WEIGHTS
from convert_to_quant.emoji.rerange import RERANGINGS, rerange, write_reranged
from convert_to_quant.engines import noise
from convert_to_quant.engines.diffusers import load


@pytest.fixture(scope="module")
def tensors():
    with open_checkpoint(WEIGHTS) as checkpoint:
        return {name: checkpoint.float32(name) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def velocity(tmp_path_factory):
    """The velocity that a model in float32 predicts for one prompt on noise."""
    folder = tmp_path_factory.mktemp("reranged")

    def velocity(tensors):
        path = folder / "model.safetensors"
        write_checkpoint(path, {name: Entry.of(values) for name, values in tensors.items()})
        with open_checkpoint(path) as checkpoint:
            model = load(checkpoint, dtype=torch.float32)
            latents = noise.latents(model.latent_shape(GEOMETRY), 0, 0)
            return model.velocity(latents, 0.7, prompt_conditioning(("honey pot",)), GEOMETRY)

    return velocity


@pytest.mark.parametrize("name", [name for name in RERANGINGS if name != "plain"])
def test_the_function_stays_the_same(tensors, velocity, name):
    reranged = rerange(tensors, RERANGINGS[name])
    changed = [tensor for tensor in tensors if not np.array_equal(tensors[tensor], reranged[tensor])]
    assert len(changed) > len(tensors) / 4
    expected, found = velocity(tensors), velocity(reranged)
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_plain_is_the_model_as_it_is(tensors):
    reranged = rerange(tensors, RERANGINGS["plain"])
    assert all(np.array_equal(tensors[name], reranged[name]) for name in tensors)


def test_factors_undone_only_in_one_of_two_places_would_change_the_function(tensors, velocity):
    reranged = rerange(tensors, RERANGINGS["hot"])
    reranged["single_blocks.3.linear2.weight"] = tensors["single_blocks.3.linear2.weight"]
    expected, found = velocity(tensors), velocity(reranged)
    assert (found - expected).norm() / expected.norm() > 0.1


def test_random_factors_are_the_same_every_time(tensors):
    name = "double_blocks.0.img_attn.qkv.weight"
    first, again = (rerange(tensors, RERANGINGS["wild"])[name] for _ in range(2))
    assert np.array_equal(first, again)


def test_files_have_bfloat16_weights_and_float32_biases(tmp_path):
    output = tmp_path / "plain.safetensors"
    write_reranged(WEIGHTS, output, RERANGINGS["plain"])
    with open_checkpoint(WEIGHTS) as source, open_checkpoint(output) as written:
        assert set(source.tensors) == set(written.tensors)
        for name, info in written.tensors.items():
            assert info.dtype == ("F32" if name.endswith(".bias") else "BF16"), name
            assert np.array_equal(source.float32(name), written.float32(name)), name
