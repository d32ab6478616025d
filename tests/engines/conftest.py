"""Models as files, for the engines' tests."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.engines.denoiser import LEAST_SIGNAL
from convert_to_quant.families.running import Inputs
from convert_to_quant.options import RunOptions


@pytest.fixture
def flux(flux_file):
    """The tiny Flux.1, opened."""
    with open_checkpoint(flux_file) as checkpoint:
        yield checkpoint


@pytest.fixture
def save_model(tmp_path, build):
    """save_model(state, quantize=lambda name: bool, prefix=""): a float32 checkpoint, FP8 where asked for."""

    def save(state, quantize=lambda _: False, prefix="", input_scale=None, **config):
        tensors = {}
        for name, value in state.items():
            array = np.asarray(value, np.float32)
            layer = name.removesuffix(".weight")
            if not (name.endswith(".weight") and array.ndim == 2 and quantize(layer)):
                tensors[prefix + name] = array
                continue
            scale = np.float32(np.abs(array).max() / 448)
            tensors[prefix + name] = build.fp8(array / scale)
            tensors[prefix + layer + ".weight_scale"] = scale
            if input_scale is not None:
                tensors[prefix + layer + ".input_scale"] = np.float32(input_scale)
            tensors[prefix + layer + ".comfy_quant"] = build.mark(format="float8_e4m3fn", **config)
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}.safetensors"
        path.write_bytes(build.file_bytes(tensors, {"made by": json.dumps("a test")}))
        return path

    return save


@pytest.fixture
def compared():
    """compared(checkpoint, table, model, size, layer_of): what `observe` saw, checked against diffusers' own model.

    Their velocities are equal, and so are the largest inputs of linear layers, which `layer_of` names.
    """

    def compare(checkpoint, table, model, size, layer_of=str):
        seen = engine.observe(checkpoint, table, RunOptions(samples=3, steps=1, seed=9, device="cpu"), geometry=size)
        denoiser = engine.load(checkpoint, table)
        architecture, absmax = denoiser.plan.architecture, {}

        def keep(layer, _, args):
            absmax[layer] = max(absmax.get(layer, 0.0), float(args[0].abs().max()))

        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(partial(keep, layer_of(name)))
        for number in range(3):
            latents, conditioning = engine.start(denoiser, size, 9, [number])
            arguments = architecture.arguments(Inputs(denoiser.plan.config, size, latents, 1.0, conditioning))
            with torch.no_grad():
                output = model(**arguments, return_dict=False)
            predicted = architecture.velocity(output[0] if isinstance(output, tuple) and len(output) == 1 else output)
            predicted = predicted[:, -latents.shape[1] :]
            wanted = {
                "velocity": predicted,
                "v": latents + predicted,
                "noise": predicted - (latents - predicted) / LEAST_SIGNAL,
            }[architecture.prediction]
            assert wanted.shape == latents.shape
            found = denoiser.velocity(latents, 1.0, conditioning, size)
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        visited = seen.statistics.take(np.array(seen.statistics.names)[seen.statistics.visited])
        assert dict(zip(visited.names, visited.absmax.tolist(), strict=True)) == pytest.approx(absmax, rel=1e-3)
        return seen

    return compare
