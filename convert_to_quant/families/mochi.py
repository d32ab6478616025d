"""Mochi 1: two streams; the text stream is half as wide."""

from __future__ import annotations

import operator
from typing import Any

from .base import Family, signature
from .comfyui import Want, ones, takes
from .rules import GATE_LINEAR, QKV, SHIFT_SCALE, THIRDS, rules, under
from .running import Architecture, Shapes, mask, measured, text, video


def _config(shapes: Shapes) -> dict[str, Any]:
    pooled, text_width = shapes["time_embed.caption_proj.weight"]
    return {
        **measured(shapes),
        "patch_size": shapes["patch_embed.proj.weight"][2],
        "pooled_projection_dim": pooled,
        "text_embed_dim": text_width,
        "time_embed_dim": shapes["time_embed.timestep_embedder.linear_1.weight"][1],
    }


FAMILY = Family(
    name="mochi",
    title="Mochi 1",
    signatures=(
        signature("blocks.0.attn.qkv_x blocks.0.attn.qkv_y t5_y_embedder t5_yproj"),
        signature("transformer_blocks.0.attn1.add_q_proj time_embed.caption_proj pos_frequencies"),
    ),
    names=(
        *under("blocks.*.", "transformer_blocks.*.")(
            ("attn.qkv_x", "attn1.to_{q,k,v}", QKV),
            ("attn.qkv_y", "attn1.add_{q,k,v}_proj", THIRDS),
            ("attn.proj_{x,y}", "attn1.to_{out.0,add_out}"),
            ("attn.{q,k}_norm_x", "attn1.norm_{q,k}"),
            ("attn.{q,k}_norm_y", "attn1.norm_added_{q,k}"),
            ("mod_{x,y}", "norm1{,_context}.linear"),
            ("mlp_{x,y}.w1", "ff{,_context}.net.0.proj", GATE_LINEAR),
            ("mlp_{x,y}.w2", "ff{,_context}.net.2"),
        ),
        *rules(
            ("x_embedder.proj", "patch_embed.proj"),
            ("t_embedder.mlp.{0,2}", "time_embed.timestep_embedder.linear_{1,2}"),
            ("t5_y_embedder.{to_kv,to_q,to_out}", "time_embed.pooler.{to_kv,to_q,to_out}"),
            ("t5_yproj", "time_embed.caption_proj"),
            ("final_layer.mod", "norm_out.linear", SHIFT_SCALE),
            ("final_layer.linear", "proj_out"),
        ),
    ),
    architecture=Architecture(
        transformer="MochiTransformer3DModel",
        config=_config,
        latents=video("patch_size"),
        wants={"encoder_hidden_states": text("text_embed_dim"), "encoder_attention_mask": mask},
        arguments=lambda inputs: inputs.usual(-1000, 1000),  # time is 0 for noise, and the output points to the video
        velocity=operator.neg,
        names=rules(("blocks.47.mod_y", "transformer_blocks.47.norm1_context.linear_1")),  # the last block
    ),
    comfyui={"GenmoMochi": takes(cross_attn=Want((256, "t5_yproj")), attention_mask=ones(256))},
)
