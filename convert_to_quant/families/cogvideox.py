"""CogVideoX: one stream of text and video, with a modulation in each block; predicts v."""

from __future__ import annotations

from typing import Any

from .base import Family, signature
from .comfyui import VIDEO, Want, encoded, takes
from .rules import rules, under
from .running import CONDITION_LATENTS, Architecture, Config, Geometry, Inputs, Shapes, beside, measured, text

ROTARY = 3072
"""Models of at least this width use rotary positions; the smaller one (1920) adds positions."""

TEXT_TOKENS = 226
"""Text is padded to this length; the video's positions start after it."""


def _config(shapes: Shapes) -> dict[str, Any]:
    hidden, _, patch, _ = shapes["patch_embed.proj.weight"]
    return {
        **measured(shapes),
        "time_embed_dim": shapes["time_embedding.linear_1.weight"][0],
        "text_embed_dim": shapes["patch_embed.text_proj.weight"][1],
        "patch_size": patch,
        "use_rotary_positional_embeddings": hidden >= ROTARY,
        "sample_width": patch,  # the smallest: the class builds a position table of this size, unused here
        "sample_height": patch,
        "sample_frames": 1,
    }


def _latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    patch = config["patch_size"]
    return geometry.frames, config["out_channels"], patch * geometry.height, patch * geometry.width


def _arguments(inputs: Inputs) -> dict[str, Any]:
    arguments, geometry = inputs.usual(1000, channels=2), inputs.geometry
    if inputs.config["use_rotary_positional_embeddings"]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        sides = geometry.height, geometry.width
        arguments["image_rotary_emb"] = get_3d_rotary_pos_embed(
            inputs.config["attention_head_dim"], ((0, 0), sides), sides, geometry.frames, device=inputs.latents.device
        )
    return arguments


FAMILY = Family(
    name="cogvideox",
    title="CogVideoX",
    signatures=(
        signature("blocks.0.norm1.linear blocks.0.ff_proj patch_embed.text_proj"),
        signature(
            "transformer_blocks.0.norm2.linear transformer_blocks.0.attn1.to_q patch_embed.text_proj",
            lacks="local_facial_extractor",
        ),
    ),
    names=(
        *under("blocks.*.", "transformer_blocks.*.")(
            ("{q,k,v,attn_out}", "attn1.{to_q,to_k,to_v,to_out.0}"),
            ("norm_{q,k}", "attn1.norm_{q,k}"),
            ("ff_{proj,out}", "ff.net.{0.proj,2}"),
            ("norm{1,2}.{linear,norm}", "norm{1,2}.{linear,norm}"),
        ),
        *rules(("time_embedding_linear_{1,2}", "time_embedding.linear_{1,2}")),
    ),
    elsewhere=("1.5",),
    variants=(("1.5", signature("ofs_embedding.linear_1|ofs_embedding_linear_1")),),
    architecture=Architecture(
        transformer="CogVideoXTransformer3DModel",
        config=_config,
        latents=_latents,
        wants={
            "encoder_hidden_states": text("text_embed_dim", TEXT_TOKENS),
            CONDITION_LATENTS: beside(_latents, 1),  # the first frame, for image-to-video
        },
        arguments=_arguments,
        prediction="v",
    ),
    comfyui={
        "CogVideoX": takes(cross_attn=Want((TEXT_TOKENS, "patch_embed.text_proj")), concat_latent_image=encoded(VIDEO))
    },
)
