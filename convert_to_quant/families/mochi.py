"""Mochi 1: two streams, of which the text's is half as wide."""

from __future__ import annotations

import operator
from typing import Any

from .base import Family, signature
from .comfyui import Want, ones, takes
from .running import Architecture, Shapes, blocks, mask, text


def _config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels, patch, _ = shapes["patch_embed.proj.weight"]
    head = shapes["transformer_blocks.0.attn1.norm_q.weight"][0]
    pooled, text_width = shapes["time_embed.caption_proj.weight"]
    out_channels = shapes["proj_out.weight"][0] // patch**2
    return {
        "patch_size": patch,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": blocks(shapes, "transformer_blocks."),
        "pooled_projection_dim": pooled,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_embed_dim": text_width,
        "time_embed_dim": shapes["time_embed.timestep_embedder.linear_1.weight"][1],
    }


def _latents(config: Any, geometry: Any) -> tuple[int, ...]:
    patch = config["patch_size"]
    return config["in_channels"], geometry.frames, patch * geometry.height, patch * geometry.width


FAMILY = Family(
    name="mochi",
    title="Mochi 1",
    signatures=(
        signature("blocks.0.attn.qkv_x blocks.0.attn.qkv_y t5_y_embedder t5_yproj"),
        signature("transformer_blocks.0.attn1.add_q_proj time_embed.caption_proj pos_frequencies"),
    ),
    architecture=Architecture(
        transformer="MochiTransformer3DModel",
        converter="convert_mochi_transformer_checkpoint_to_diffusers",
        native="time_embed.caption_proj.weight",
        config=_config,
        latents=_latents,
        wants={"encoder_hidden_states": text("text_embed_dim"), "encoder_attention_mask": mask},
        arguments=lambda inputs: inputs.usual(
            -1000, 1000
        ),  # time runs from 0 (noise) to 1, and the output to the video
        velocity=operator.neg,
    ),
    comfyui={"GenmoMochi": takes(cross_attn=Want((256, "t5_yproj")), attention_mask=ones(256))},
)
