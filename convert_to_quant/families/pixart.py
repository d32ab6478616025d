"""PixArt, by its names alone: ComfyUI's, for diffusers has no converter."""

from __future__ import annotations

from . import comfyui
from .base import Family
from .rules import KV, QKV, rules, under

FAMILY = Family(
    name="pixart",
    title="PixArt",
    names=(
        *under("blocks.*.", "transformer_blocks.*.")(
            ("attn.qkv", "attn1.to_{q,k,v}", QKV),
            ("attn.proj", "attn1.to_out.0"),
            ("cross_attn.q_linear", "attn2.to_q"),
            ("cross_attn.kv_linear", "attn2.to_{k,v}", KV),
            ("cross_attn.proj", "attn2.to_out.0"),
            ("mlp.fc{1,2}", "ff.net.{0.proj,2}"),
        ),
        *rules(
            (
                "{t,csize,ar}_embedder.mlp.{0,2}",
                "adaln_single.emb.{timestep,resolution,aspect_ratio}_embedder.linear_{1,2}",
            ),
            ("t_block.1", "adaln_single.linear"),
            ("y_embedder.y_proj.fc{1,2}", "caption_projection.linear_{1,2}"),
            ("final_layer.linear", "proj_out"),
        ),
    ),
    comfyui={"PixArt": comfyui.takes("y_embedder.y_proj.fc1", smallest=64)},
)
