"""Qwen-Image 2.1: one stream of text and image, one modulation for all blocks."""

from __future__ import annotations

from typing import Any

from .base import Family, signature
from .rules import HALVES, rules
from .running import Architecture, Inputs, Shapes, measured, rotary_axes, text, tokens

HEAD = 128
"""Channels of an attention head (no norm shows it); narrow models may have fewer."""

SLOT = 4
"""Image tokens per position in the text encoder's sequence."""


def _config(shapes: Shapes) -> dict[str, Any]:
    config = measured(shapes, head=HEAD)
    return {
        **config,
        "context_in_dim": shapes["txt_in.in_layer.weight"][1],
        "mlp_ratio": shapes["transformer_blocks.0.img_mlp.out.weight"][1] // shapes["img_in.weight"][0],
        "axes_dims_rope": rotary_axes(config["attention_head_dim"]),
    }


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """In the sequence, image positions follow the text."""
    import torch

    geometry = inputs.geometry
    batch, places = inputs.conditioning["encoder_hidden_states"].shape[:2]
    of_image = torch.arange(places + geometry.height * geometry.width // SLOT, device=inputs.latents.device) >= places
    return {
        **inputs.usual(),
        "img_shapes": [[(1, geometry.height, geometry.width)]] * batch,
        "img_mask": of_image.expand(batch, -1),
    }


FAMILY = Family(
    name="qwen-image-2.1",
    title="Qwen-Image 2.1",
    signatures=(signature("transformer_blocks.0.img_mlp.out modulation.1 txt_in.in_layer"),),
    names=rules(
        ("transformer_blocks.*.img_mlp.gate_up", "transformer_blocks.*.img_mlp.{gate_layer,proj}", HALVES),
    ),
    architecture=Architecture(
        transformer="QwenImage21Transformer2DModel",
        config=_config,
        latents=tokens("in_channels"),
        wants={"encoder_hidden_states": text("context_in_dim")},
        arguments=_arguments,
    ),
)
