"""Models as files, for the engines' tests."""

import json

import numpy as np
import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.formats import DEFAULT_GRID


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
            tensors[prefix + name] = ("F8_E4M3", DEFAULT_GRID.encode(array / scale))
            tensors[prefix + layer + ".weight_scale"] = scale
            if input_scale is not None:
                tensors[prefix + layer + ".input_scale"] = np.float32(input_scale)
            tensors[prefix + layer + ".comfy_quant"] = build.mark(format="float8_e4m3fn", **config)
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}.safetensors"
        path.write_bytes(build.file_bytes(tensors, {"made by": json.dumps("a test")}))
        return path

    return save


@pytest.fixture
def largest_inputs():
    """largest_inputs({name: module}): the largest |x| that each module receives from now on, by name."""

    def watch(modules):
        absmax = {}

        def keep(name, x):
            absmax[name] = max(absmax.get(name, 0.0), float(x.abs().max()))

        for name, module in modules.items():
            module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        return absmax

    return watch
