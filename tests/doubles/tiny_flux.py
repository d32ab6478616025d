"""A Flux.1 small enough to run in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HIDDEN, HEAD, CHANNELS, TEXT, VECTOR = 32, 16, 16, 32, 16

STREAM = {"mod.lin": (6, 1), "attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4)}
LINEAR = {
    "img_in": (HIDDEN, CHANNELS),
    "txt_in": (HIDDEN, TEXT),
    "time_in.in_layer": (HIDDEN, 256),
    "time_in.out_layer": (HIDDEN, HIDDEN),
    "vector_in.in_layer": (HIDDEN, VECTOR),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    **{
        f"double_blocks.0.{stream}_{layer}": (rows * HIDDEN, columns * HIDDEN)
        for stream in ("img", "txt")
        for layer, (rows, columns) in STREAM.items()
    },
    "single_blocks.0.linear1": (7 * HIDDEN, HIDDEN),
    "single_blocks.0.linear2": (HIDDEN, 5 * HIDDEN),
    "single_blocks.0.modulation.lin": (3 * HIDDEN, HIDDEN),
    "final_layer.linear": (CHANNELS, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}
NORMS = tuple(
    f"{block}norm.{kind}_norm.scale"
    for block in ("double_blocks.0.img_attn.", "double_blocks.0.txt_attn.", "single_blocks.0.")
    for kind in ("query", "key")
)
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
    random = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for name, (rows, columns) in LINEAR.items():
        weight = random.standard_normal((rows, columns)) / np.sqrt(columns)
        tensors[name + ".weight"] = ("BF16", to_bfloat16(weight))
        tensors[name + ".bias"] = ("BF16", to_bfloat16(0.1 * random.standard_normal(rows)))
    for name in NORMS:
        tensors[name] = ("BF16", to_bfloat16(np.ones(HEAD)))
    return tensors


@pytest.fixture(scope="session")
def flux_tensors(build: Any) -> Callable[[], dict[str, Any]]:
    """Make the tiny Flux.1."""
    return lambda: flux_model(build.to_bfloat16)


@pytest.fixture
def flux_file(save: Callable[..., Path], flux_tensors: Callable[[], dict[str, Any]]) -> Path:
    """The tiny Flux.1 as a file."""
    return save("flux.safetensors", flux_tensors(), {"author": "a test"})
