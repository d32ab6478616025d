"""Sana, Sana Sprint and Sana Video: linear attention, and an MLP of convolutions, which no format here supports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import pixart
from .base import Family, signature
from .rules import rules, under
from .running import (
    Architecture,
    Config,
    Geometry,
    Shapes,
    embedder,
    guidance,
    has,
    mask,
    measured,
    text,
    video,
)

HEAD = 32
HEADS = (112, 72, 64, 32, 16)
"""Channels of an attention head, which no tensor shows: of self-attention for images, and of the rest, by width."""

GUIDANCE = 4.5
"""Guidance scale of Sana Sprint: its pipeline's default."""


def _head(channels: int) -> int:
    return next(size for size in (*HEADS, channels) if channels % size == 0)


def _config(shapes: Shapes, head: int = HEAD) -> dict[str, Any]:
    hidden, _, *patch = embedder(shapes)
    block = "transformer_blocks.0"
    cross = shapes[f"{block}.attn2.to_q.weight"][0]
    return {
        **measured(shapes, "cross_attention_dim", "caption_channels", head=head),
        "num_cross_attention_heads": cross // _head(cross),
        "cross_attention_head_dim": _head(cross),
        "mlp_ratio": shapes[f"{block}.ff.conv_point.weight"][1] / hidden,
        "attention_bias": f"{block}.attn1.to_q.bias" in shapes,
        "guidance_embeds": has(shapes, "guidance_embedder"),
        "qk_norm": "rms_norm_across_heads" if has(shapes, "attn1.norm_q") else None,
        "patch_size": patch[0] if len(patch) == 2 else tuple(patch),
    }


def _video_config(shapes: Shapes) -> dict[str, Any]:
    return _config(shapes, _head(shapes["patch_embedding.weight"][0]))


def _latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return config["in_channels"], config["patch_size"] * geometry.height, config["patch_size"] * geometry.width


ARCHITECTURE = Architecture(
    transformer="SanaTransformer2DModel",
    config=_config,
    latents=_latents,
    wants={
        "encoder_hidden_states": text("caption_channels"),
        "encoder_attention_mask": mask,
        "guidance": guidance(GUIDANCE),
    },
    arguments=lambda inputs: inputs.usual(1000),
    optional=pixart.UNUSED,
)

FAMILY = Family(
    name="sana",
    title="Sana (also Sprint, Video)",
    signatures=(
        signature("caption_norm transformer_blocks.0.ff.conv_inverted time_embed.linear"),
        signature("t_block.1 blocks.0.attn.qkv blocks.0.mlp.inverted_conv.conv"),
    ),
    names=(
        *pixart.ATTENTION_NAMES,
        *pixart.END_NAMES,
        *under("", "time_embed.")(
            ("t_embedder.mlp.{0,2}", "emb.timestep_embedder.linear_{1,2}"), ("t_block.1", "linear")
        ),
        *under("blocks.*.", "transformer_blocks.*.")(
            ("{attn,cross_attn}.{q,k}_norm", "attn{1,2}.norm_{q,k}"),
            ("mlp.{inverted,depth,point}_conv.conv", "ff.conv_{inverted,depth,point}"),
        ),
        *rules(("x_embedder.proj", "patch_embed.proj"), ("attention_y_norm", "caption_norm")),
    ),
    architecture=ARCHITECTURE,
    architectures={
        "Video": replace(
            ARCHITECTURE,
            transformer="SanaVideoTransformer3DModel",
            config=_video_config,
            latents=video("patch_size"),
        )
    },
    variants=(
        ("Sprint", signature("time_embed.guidance_embedder")),
        ("Video", signature("patch_embedding")),
        ("Sana", signature("")),
    ),
)
