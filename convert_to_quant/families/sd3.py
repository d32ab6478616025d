"""Stable Diffusion 3 and 3.5. ModelOpt quantizes the modulation inside the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import comfyui
from .base import VECTOR, Family, signature
from .flux1 import DOUBLE, FINAL_NAMES, JOINT_VALUES
from .folds import given, modulated
from .rules import QKV, SHIFT_SCALE, rules, under
from .running import Architecture, Config, Shapes, has, measured, text, vector

if TYPE_CHECKING:
    from torch import nn

HEAD = 64
"""Channels of an attention head in models without query norms."""


def _config(shapes: Shapes) -> dict[str, Any]:
    patch, side = shapes["pos_embed.proj.weight"][2], math.isqrt(shapes["pos_embed.pos_embed"][1])
    normed = has(shapes, "norm_q")
    config = measured(shapes, "joint_attention_dim", "pooled_projection_dim", head=0 if normed else HEAD)
    return {
        **config,
        "sample_size": side,
        "patch_size": patch,
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pos_embed_max_size": side,
        "dual_attention_layers": tuple(
            index for index in range(config["num_layers"]) if has(shapes, f"transformer_blocks.{index}.attn2")
        ),
        "qk_norm": "rms_norm" if normed else None,
    }


def _build(transformer: Callable[..., nn.Module], config: Config) -> nn.Module:
    """Skips computing a position table of hundreds of megabytes, which the checkpoint contains."""
    import torch

    model = transformer(**{**config, "pos_embed_max_size": 1})
    embedder = model.get_submodule("pos_embed")
    side, channels = config["pos_embed_max_size"], config["num_attention_heads"] * config["attention_head_dim"]
    embedder.pos_embed_max_size = side
    embedder._buffers["pos_embed"] = torch.empty(1, side * side, channels, device="meta")
    return model


FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    signatures=(
        signature("joint_blocks.0.context_block joint_blocks.0.x_block y_embedder"),
        signature(
            "transformer_blocks.0.attn.add_q_proj transformer_blocks.0.norm1_context.linear",
            "pos_embed.proj time_text_embed.text_embedder",
            lacks="single_transformer_blocks",
        ),
    ),
    blocks=r"(?:joint_blocks|transformer_blocks)\.\d+",
    keep={r"y_embedder": VECTOR},
    # The last block's context_block has a modulation of two vectors, which diffusers stores as scale, shift.
    names=(
        *under("joint_blocks.*.", "transformer_blocks.*.")(
            ("x_block.attn{,2}.qkv", "attn{,2}.to_{q,k,v}", QKV),
            ("x_block.attn{,2}.proj", "attn{,2}.to_out.0"),
            ("context_block.attn.qkv", "attn.add_{q,k,v}_proj", QKV),
            ("context_block.attn.proj", "attn.to_add_out"),
            ("x_block.attn{,2}.ln_{q,k}", "attn{,2}.norm_{q,k}"),
            ("context_block.attn.ln_{q,k}", "attn.norm_added_{q,k}"),
            ("x_block.adaLN_modulation.1", "norm1.linear"),
            ("context_block.adaLN_modulation.1", "norm1_context.linear", SHIFT_SCALE),
            ("{x,context}_block.mlp.fc{1,2}", "ff{,_context}.net.{0.proj,2}"),
        ),
        *rules(
            ("pos_embed", "pos_embed.pos_embed"),
            ("x_embedder.proj", "pos_embed.proj"),
            ("{t,y}_embedder.mlp.{0,2}", "time_text_embed.{timestep,text}_embedder.linear_{1,2}"),
        ),
        *FINAL_NAMES,
    ),
    architecture=Architecture(
        transformer="SD3Transformer2DModel",
        config=_config,
        wants={
            "encoder_hidden_states": text("joint_attention_dim"),
            "pooled_projections": vector("pooled_projection_dim"),
        },
        arguments=lambda inputs: inputs.usual(1000),
        build=_build,
    ),
    comfyui={"SD3": comfyui.takes("context_embedder", pooled_output=comfyui.pooled("y_embedder.mlp.0"))},
    variants=(
        ("3.5 Large", signature(size=(r"context_embedder\.weight", 0, (2432,)))),
        ("3.5 Medium", signature("joint_blocks.0.x_block.attn2|transformer_blocks.0.attn2")),
        ("3 Medium", signature(size=(r"context_embedder\.weight", 0, (1536,)))),
    ),
    folds=(
        modulated(DOUBLE + "norm1.linear", DOUBLE + "attn.to_{q,k,v}"),
        modulated(DOUBLE + "norm1.linear", DOUBLE + "ff.net.0.proj", shift=3),
        modulated(DOUBLE + "norm1.linear", DOUBLE + "attn2.to_{q,k,v}", shift=6, of=9),
        modulated(DOUBLE + "norm1_context.linear", DOUBLE + "attn.add_{q,k,v}_proj", of=6),
        modulated(DOUBLE + "norm1_context.linear", DOUBLE + "attn.add_{q,k,v}_proj", shift=1, scale=0, of=2),
        modulated(DOUBLE + "norm1_context.linear", DOUBLE + "ff_context.net.0.proj", shift=3),
        JOINT_VALUES,
        given(DOUBLE + "attn2.to_v", DOUBLE + "attn2.to_out.0"),
    ),
)
