"""LongCat-Image and Bria 3: Flux.1 without a pooled vector."""

from __future__ import annotations

from functools import partial

from . import flux1
from .base import Family, signature
from .rules import rules
from .running import Architecture, text, tokens

FAMILY = Family(
    name="longcat",
    title="LongCat-Image (also Bria 3)",
    signatures=(
        signature(
            "double_blocks.0.img_attn double_blocks.0.img_mlp.0 img_in txt_in time_in",
            lacks="vector_in txt_in.individual_token_refiner distilled_guidance_layer double_stream_modulation_img",
        ),
        signature(
            "transformer_blocks.0.attn.add_q_proj single_transformer_blocks.0.attn time_embed.timestep_embedder",
            lacks="caption_projection context_embedder.token_refiner",
        ),
    ),
    names=(
        *flux1.BLOCK_NAMES,
        *rules(("time_in.{in,out}_layer", "time_embed.timestep_embedder.linear_{1,2}")),
    ),
    architecture=Architecture(
        transformer="LongCatImageTransformer2DModel",
        config=partial(flux1.common_config, lacks=["out_channels"]),
        latents=tokens("in_channels"),
        wants={"encoder_hidden_states": text("joint_attention_dim")},
        arguments=flux1.arguments,
    ),
)
