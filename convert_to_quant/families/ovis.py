"""Ovis-Image: Flux.1 without a pooled vector, with gates in its MLPs."""

from __future__ import annotations

from . import flux1
from .base import Family, signature
from .running import Architecture, text

FAMILY = Family(
    name="ovis",
    title="Ovis-Image",
    signatures=(
        signature("double_blocks.0.img_mlp.gate_proj img_in txt_in time_in"),
        signature("context_embedder_norm single_transformer_blocks.0.proj_mlp timestep_embedder"),
    ),
    elsewhere=("in its authors' names",),
    architecture=Architecture(
        transformer="OvisImageTransformer2DModel",
        config=flux1.common_config,
        latents=flux1.LATENTS,
        wants={"encoder_hidden_states": text("joint_attention_dim")},
        arguments=flux1.arguments,
    ),
    variants=(("in its authors' names", signature("double_blocks.0.img_mlp.gate_proj")),),
)
