"""AuraFlow, by its names alone: blocks of two streams count 2 for the image and 1 for the text, others have only 1."""

from __future__ import annotations

from . import comfyui
from .base import Family
from .rules import SHIFT_SCALE, rules, under

FAMILY = Family(
    name="auraflow",
    title="AuraFlow",
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
        ),
    ),
    comfyui={"AuraFlow": comfyui.takes("cond_seq_linear")},
)
