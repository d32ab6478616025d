"""A Flux.1 small enough to run in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HIDDEN, HEAD, CHANNELS, TEXT, VECTOR = 32, 16, 16, 32, 16

STREAM = {"mod.lin": (6, 1), "attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4)}
SINGLE = {"linear1": (7, 1), "linear2": (1, 5), "modulation.lin": (3, 1)}


def linear_shapes(hidden=HIDDEN, depth=1, singles=1, guidance=False):
    """Layers and their shapes."""
    embedders = {"time_in": 256, "vector_in": VECTOR, **({"guidance_in": 256} if guidance else {})}
    blocks = {f"double_blocks.{n}.{stream}_": STREAM for n in range(depth) for stream in ("img", "txt")}
    blocks |= {f"single_blocks.{n}.": SINGLE for n in range(singles)}
    return {
        "img_in": (hidden, CHANNELS),
        "txt_in": (hidden, TEXT),
        **{
            f"{name}.{layer}": (hidden, columns)
            for name, first in embedders.items()
            for layer, columns in (("in_layer", first), ("out_layer", hidden))
        },
        **{
            block + layer: (rows * hidden, columns * hidden)
            for block, layers in blocks.items()
            for layer, (rows, columns) in layers.items()
        },
        "final_layer.linear": (CHANNELS, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }


def random_flux(seed=0, **size):
    """A random Flux.1 in float32, the same every time."""
    random = np.random.default_rng(seed)
    tensors, shapes = {}, linear_shapes(**size)
    for name, (rows, columns) in shapes.items():
        tensors[name + ".weight"] = random.standard_normal((rows, columns)) / np.sqrt(columns)
        tensors[name + ".bias"] = 0.1 * random.standard_normal(rows)
    for name in shapes:
        if name.endswith(("qkv", "linear1")):
            block = name.rpartition(".")[0]
            tensors |= {f"{block}.norm.{kind}_norm.scale": np.ones(HEAD) for kind in ("query", "key")}
    return {name: np.float32(values) for name, values in tensors.items()}


LINEAR = linear_shapes()
QUANTIZED = tuple(name for name in LINEAR if "blocks." in name)
ONE_ROW = tuple(name for name in QUANTIZED if name.endswith(("mod.lin", "modulation.lin")))


class Flux:
    """What tests know of the model."""

    quantized = QUANTIZED
    one_row = ONE_ROW
    linear = LINEAR


@pytest.fixture
def flux() -> type[Flux]:
    """Names and shapes of the tiny Flux.1."""
    return Flux


def flux_model(to_bfloat16: Callable[[Any], Any]) -> dict[str, Any]:
    """The tiny Flux.1 in bfloat16, freshly made, the same every time."""
    return {name: ("BF16", to_bfloat16(values)) for name, values in random_flux().items()}


@pytest.fixture(scope="session")
def flux_tensors(build: Any) -> Callable[[], dict[str, Any]]:
    """Make the tiny Flux.1."""
    return lambda: flux_model(build.to_bfloat16)


@pytest.fixture
def flux_file(save: Callable[..., Path], flux_tensors: Callable[[], dict[str, Any]]) -> Path:
    """The tiny Flux.1 as a file."""
    return save("flux.safetensors", flux_tensors(), {"author": "a test"})
