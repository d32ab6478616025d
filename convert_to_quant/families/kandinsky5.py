"""Kandinsky 5 (image and video): latents with channels last."""

from __future__ import annotations

from typing import Any

from . import running
from .base import REFINER, Family, signature
from .comfyui import pooled, takes

PATCH = (1, 2, 2)


def _config(shapes: running.Shapes) -> dict[str, Any]:
    hidden, patched = shapes["visual_embeddings.in_layer.weight"]
    channels, visual = shapes["out_layer.out_layer.weight"][0] // 4, "visual_transformer_blocks"
    conditioned = patched // 4 == 2 * channels + 1
    return {
        "in_visual_dim": channels if conditioned else patched // 4,
        "in_text_dim": shapes["text_embeddings.in_layer.weight"][1],
        "in_text_dim2": shapes["pooled_text_embeddings.in_layer.weight"][1],
        "time_dim": shapes["time_embeddings.out_layer.weight"][0],
        "out_visual_dim": channels,
        "patch_size": PATCH,
        "model_dim": hidden,
        "ff_dim": shapes[f"{visual}.0.feed_forward.in_layer.weight"][0],
        "num_text_blocks": running.blocks(shapes, "text_transformer_blocks."),
        "num_visual_blocks": running.blocks(shapes, f"{visual}."),
        "axes_dims": running.rotary_axes(shapes[f"{visual}.0.self_attention.query_norm.weight"][0], 6),
        "visual_cond": conditioned,
    }


def _latents(config: running.Config, geometry: running.Geometry) -> tuple[int, ...]:
    return geometry.frames, 2 * geometry.height, 2 * geometry.width, config["in_visual_dim"]


def _beside(config: running.Config, geometry: running.Geometry) -> running.Signal | None:
    """The first frame, and a mask."""
    *sizes, channels = _latents(config, geometry)
    return running.Signal((*sizes, channels + 1)) if config["visual_cond"] else None


def _arguments(inputs: running.Inputs) -> dict[str, Any]:
    import torch

    geometry, device = inputs.geometry, inputs.latents.device
    sides = (geometry.frames, geometry.height, geometry.width)
    return {
        **inputs.usual(1000, channels=-1),
        "visual_rope_pos": [torch.arange(side, device=device) for side in sides],
        "text_rope_pos": torch.arange(inputs.conditioning["encoder_hidden_states"].shape[1], device=device),
    }


FAMILY = Family(
    name="kandinsky5",
    title="Kandinsky 5",
    signatures=(signature("visual_transformer_blocks.0.self_attention text_transformer_blocks.0 visual_embeddings"),),
    keep={r"text_transformer_blocks": REFINER},
    architecture=running.Architecture(
        transformer="Kandinsky5Transformer3DModel",
        config=_config,
        latents=_latents,
        wants={
            "encoder_hidden_states": running.text("in_text_dim"),
            "pooled_projections": running.vector("in_text_dim2"),
            running.CONDITION_LATENTS: _beside,
        },
        arguments=_arguments,
    ),
    comfyui={"Kandinsky5": takes("text_embeddings.in_layer", pooled_output=pooled("pooled_text_embeddings.in_layer"))},
)
