"""Sana: linear attention, and an MLP of convolutions, which no format here takes."""

from __future__ import annotations

import math
from typing import Any

from .base import FINAL, IMAGE, TEXT, VECTOR, Family, signature
from .running import Architecture, Config, Geometry, Shapes, blocks, mask, text

HEAD = 32
CROSS_HEADS = (112, 72, 64, 32, 16)
"""Channels of a head: of self-attention, and of cross-attention in Sana 1.6B and 0.6B; no tensor shows either."""


def _config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels, patch, _ = shapes["patch_embed.proj.weight"]
    cross = shapes["transformer_blocks.0.attn2.to_q.weight"][0]
    head, cross_head = math.gcd(hidden, HEAD), next(size for size in (*CROSS_HEADS, cross) if cross % size == 0)
    return {
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": blocks(shapes, "transformer_blocks."),
        "num_cross_attention_heads": cross // cross_head,
        "cross_attention_head_dim": cross_head,
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
        "mlp_ratio": shapes["transformer_blocks.0.ff.conv_point.weight"][1] / hidden,
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in shapes,
        "patch_size": patch,
        "qk_norm": "rms_norm_across_heads" if "transformer_blocks.0.attn1.norm_q.weight" in shapes else None,
    }


def _latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return config["in_channels"], config["patch_size"] * geometry.height, config["patch_size"] * geometry.width


FAMILY = Family(
    name="sana",
    title="Sana",
    signatures=(signature("patch_embed.proj caption_norm transformer_blocks.0.ff.conv_inverted time_embed.linear"),),
    keep={
        r"patch_embed": IMAGE,
        r"caption_projection": TEXT,
        r"time_embed": VECTOR,
        r"proj_out": FINAL,
    },
    elsewhere={"time_embed.guidance_embedder.linear_1.weight": "Sana Sprint"},
    architecture=Architecture(
        transformer="SanaTransformer2DModel",
        native="patch_embed.proj.weight",
        config=_config,
        latents=_latents,
        wants={"encoder_hidden_states": text("caption_channels"), "encoder_attention_mask": mask},
        arguments=lambda inputs: inputs.usual(1000),
    ),
)
