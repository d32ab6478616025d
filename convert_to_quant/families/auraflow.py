"""AuraFlow. In its authors' names, blocks with two streams number the image 2 and the text 1; others have only 1."""

from __future__ import annotations

from typing import Any

from . import comfyui
from .base import Family, signature
from .rules import SHIFT_SCALE, rules, under
from .running import Architecture, Shapes, blocks, measured, text

HEAD = 256
"""Channels of an attention head (no tensor shows it); narrow models may have fewer."""


def _config(shapes: Shapes) -> dict[str, Any]:
    return {
        **measured(shapes, "joint_attention_dim", area=4, head=HEAD, lacks=["num_layers"]),
        "num_mmdit_layers": blocks(shapes, "joint_transformer_blocks."),
        "num_single_dit_layers": blocks(shapes, "single_transformer_blocks."),
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pos_embed_max_size": shapes["pos_embed.pos_embed"][1],
    }


FAMILY = Family(
    name="auraflow",
    title="AuraFlow",
    signatures=(
        signature("double_layers.0.attn.w2q single_layers.0.attn.w1q init_x_linear cond_seq_linear"),
        signature("joint_transformer_blocks.0.attn.add_q_proj time_step_proj.linear_1 register_tokens"),
    ),
    names=(
        *under("double_layers.*.", "joint_transformer_blocks.*.")(
            ("attn.w2{q,k,v,o}", "attn.to_{q,k,v,out.0}"),
            ("attn.w1{q,k,v,o}", "attn.{add_q_proj,add_k_proj,add_v_proj,to_add_out}"),
            ("mlp{X,C}.c_{fc1,fc2,proj}", "ff{,_context}.{linear_1,linear_2,out_projection}"),
            ("mod{X,C}.1", "norm1{,_context}.linear"),
        ),
        *under("single_layers.*.", "single_transformer_blocks.*.")(
            ("attn.w1{q,k,v,o}", "attn.to_{q,k,v,out.0}"),
            ("mlp.c_{fc1,fc2,proj}", "ff.{linear_1,linear_2,out_projection}"),
            ("modCX.1", "norm1.linear"),
        ),
        *rules(
            ("init_x_linear", "pos_embed.proj"),
            ("cond_seq_linear", "context_embedder"),
            ("t_embedder.mlp.{0,2}", "time_step_proj.linear_{1,2}"),
            ("final_linear", "proj_out"),
            ("modF.1", "norm_out.linear", SHIFT_SCALE),
            ("positional_encoding", "pos_embed.pos_embed"),
        ),
    ),
    architecture=Architecture(
        transformer="AuraFlowTransformer2DModel",
        config=_config,
        wants={"encoder_hidden_states": text("joint_attention_dim")},
    ),
    comfyui={"AuraFlow": comfyui.takes("cond_seq_linear")},
)
