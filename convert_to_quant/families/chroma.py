"""Chroma: Flux.1 whose modulations come from one small network.

Kept layers follow silveroxides' larger Chroma preset; Radiance has small networks over pixels ("nerf") at both ends.
"""

from __future__ import annotations

from typing import Any

from . import flux1
from .base import FINAL, MODULATION, Family, signature
from .rules import rules, under
from .running import Architecture, Shapes, blocks


def _config(shapes: Shapes) -> dict[str, Any]:
    hidden, channels = shapes["distilled_guidance_layer.in_proj.weight"]
    return {
        **flux1.common_config(shapes),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": blocks(shapes, "distilled_guidance_layer.layers."),
    }


FAMILY = Family(
    name="chroma",
    title="Chroma (HD, Radiance)",
    signatures=(
        signature("double_blocks.0.img_attn distilled_guidance_layer"),
        signature("transformer_blocks.0.attn.add_q_proj distilled_guidance_layer"),
    ),
    blocks=flux1.BLOCKS,
    keep={r"distilled_guidance_layer": MODULATION, r"nerf_\w+": FINAL},
    names=(
        *under("distilled_guidance_layer.layers.*.")(
            ("{in,out}_layer", "linear_{1,2}"),
        ),
        *rules(("distilled_guidance_layer.norms.*", "distilled_guidance_layer.norms.*")),
        *flux1.BLOCK_NAMES,
    ),
    elsewhere=("Radiance",),
    architecture=Architecture(
        transformer="ChromaTransformer2DModel",
        config=_config,
        latents=flux1.LATENTS,
        wants=flux1.WANTS,
        arguments=flux1.arguments,
    ),
    variants=(
        ("Radiance", signature("nerf_image_embedder")),
        ("Chroma1", signature("distilled_guidance_layer")),
    ),
    folds=flux1.VALUES,
)
