"""Krea 2: one stream, one modulation for all blocks, and several layers of its text encoder side by side."""

from __future__ import annotations

import math
from typing import Any

from .base import REFINER, Family, signature
from .comfyui import takes, times
from .running import Architecture, Config, Geometry, Inputs, Shapes, Signal, blocks, measured, rotary_axes, tokens


def _config(shapes: Shapes) -> dict[str, Any]:
    config, fusion = measured(shapes, end="img_in", lacks=["out_channels"]), "text_fusion.layerwise_blocks.0"
    head, text_head = config["attention_head_dim"], shapes[f"{fusion}.attn.norm_q.weight"][0]
    return {
        **config,
        "num_key_value_heads": shapes["transformer_blocks.0.attn.to_k.weight"][0] // head,
        "intermediate_size": shapes["transformer_blocks.0.ff.up.weight"][0],
        "timestep_embed_dim": shapes["time_embed.linear_1.weight"][1],
        "text_hidden_dim": shapes[f"{fusion}.attn.to_q.weight"][1],
        "num_text_layers": math.prod(shapes["text_fusion.projector.weight"]),
        "text_num_attention_heads": shapes[f"{fusion}.attn.to_q.weight"][0] // text_head,
        "text_num_key_value_heads": shapes[f"{fusion}.attn.to_k.weight"][0] // text_head,
        "text_intermediate_size": shapes[f"{fusion}.ff.up.weight"][0],
        "num_layerwise_text_blocks": blocks(shapes, "text_fusion.layerwise_blocks."),
        "num_refiner_text_blocks": blocks(shapes, "text_fusion.refiner_blocks."),
        "axes_dims_rope": rotary_axes(head, 6),
    }


def _text(config: Config, geometry: Geometry) -> Signal:
    return Signal((geometry.text_tokens, config["num_text_layers"], config["text_hidden_dim"]))


def _arguments(inputs: Inputs) -> dict[str, Any]:
    import torch

    return {**inputs.usual(), "position_ids": torch.cat([inputs.text_ids(3), inputs.image_ids(3)])}


FAMILY = Family(
    name="krea2",
    title="Krea 2",
    signatures=(
        signature("blocks.0.attn.wq txtfusion txtmlp tproj first"),
        signature("transformer_blocks.0.attn.to_gate text_fusion time_mod_proj img_in"),
    ),
    keep={r"txtfusion|text_fusion": REFINER},
    architecture=Architecture(
        transformer="Krea2Transformer2DModel",
        config=_config,
        latents=tokens("in_channels"),
        wants={"encoder_hidden_states": _text},
        arguments=_arguments,
    ),
    comfyui={"Krea2": takes(times("txtlayers", "txtdim"))},
)
