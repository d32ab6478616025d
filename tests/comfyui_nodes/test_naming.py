"""Recorded layers find their places in files that spell them otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.comfyui_nodes.naming import for_checkpoint
from convert_to_quant.layers import find_layers

QKV, MLP = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"
RECORDED = {QKV: (48, 16), MLP: (64, 16), "final_layer.linear": (16, 16)}
SPELLINGS = {
    "its own": {QKV: (48, 16), MLP: (64, 16)},
    "prefixed": {f"model.diffusion_model.{QKV}": (48, 16), f"model.diffusion_model.{MLP}": (64, 16)},
    "HunyuanVideo": {"double_blocks.0.img_attn_qkv": (48, 16), "double_blocks.0.img_mlp.fc1": (64, 16)},
    "diffusers": {
        **{f"transformer_blocks.0.attn.to_{part}": (16, 16) for part in "qkv"},
        "transformer_blocks.0.ff.net.0.proj": (64, 16),
    },
}


@pytest.fixture
def table(save: Callable[..., Path], build: Any) -> Callable[..., Any]:
    """table({layer: shape}): the layers of an FP8 file."""

    def make(shapes: dict[str, tuple[int, int]]) -> Any:
        tensors: dict[str, Any] = {}
        for name, shape in shapes.items():
            tensors |= build.quantized([name], "tensor", shape=shape)[0]
        with open_checkpoint(save("fp8.safetensors", tensors)) as checkpoint:
            return find_layers(checkpoint)

    return make


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_finds_its_layers(
    statistics: Callable[..., Any], table: Callable[..., Any], spelling: str
) -> None:
    shapes = SPELLINGS[spelling]
    recorded = statistics(RECORDED).with_facts(depends_on_conditioning=[MLP])

    found, missing = for_checkpoint(recorded, table(shapes))

    assert missing == ()
    assert dict(found.layers) == shapes
    *attention, mlp = found.names
    assert {float(found.absmax[found.index(name)]) for name in attention} == {1.0}
    assert found.absmax[found.index(mlp)] == 2.0
    assert found.provenance["depends_on_conditioning"] == (mlp,)


def test_layers_that_were_not_recorded_are_named(statistics: Callable[..., Any], table: Callable[..., Any]) -> None:
    found, missing = for_checkpoint(
        statistics(RECORDED), table({QKV: (48, 16), MLP: (32, 16), "double_blocks.1.img_mlp.0": (64, 16)})
    )
    assert found.names == (QKV,)
    assert missing == (MLP, "double_blocks.1.img_mlp.0")


def test_text_encoders_in_the_same_file_are_not_missed(
    statistics: Callable[..., Any], table: Callable[..., Any]
) -> None:
    found, missing = for_checkpoint(
        statistics(RECORDED), table({f"model.diffusion_model.{QKV}": (48, 16), "text_encoders.t5.layer.0": (16, 16)})
    )
    assert (found.names, missing) == ((f"model.diffusion_model.{QKV}",), ())


def test_statistics_of_a_prefixed_file_fit_a_bare_one(
    statistics: Callable[..., Any], table: Callable[..., Any]
) -> None:
    recorded = statistics({f"model.diffusion_model.{name}": shape for name, shape in RECORDED.items()})
    found, missing = for_checkpoint(recorded, table(SPELLINGS["diffusers"]))
    assert (len(found.layers), missing) == (4, ())
