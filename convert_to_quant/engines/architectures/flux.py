"""Flux.1, Flux.2 and Chroma: two streams of tokens, then one."""

from __future__ import annotations

from typing import Any

import torch

from ..noise import Geometry, Signal
from ..provenance import Fused, Shapes, qkv_mlp_rows
from .base import Architecture, Config, Inputs, blocks, condition_signal, rotary_axes

GUIDANCE = 3.5
"""Guidance that distilled models are told; their pipelines' default."""

SINGLE_BLOCKS = Fused(r"single_blocks\.\d+\.linear1", (3072, 3072, 3072, 12288), qkv_mlp_rows)
"""diffusers' converters split attention and MLP of a single block at hidden size 3072."""

SPELLINGS = ((r"\b(query_norm|key_norm)\.weight$", r"\1.scale"),)
"""The converters know the authors' names; ComfyUI's ModelSave writes those of its own classes."""


def _common_config(shapes: Shapes) -> dict[str, Any]:
    """What the configurations of these families share."""
    hidden, in_channels = shapes["x_embedder.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": blocks(shapes, "transformer_blocks."),
        "num_single_layers": blocks(shapes, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "axes_dims_rope": rotary_axes(head),
    }


def _tokens(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return geometry.height * geometry.width, config["out_channels"]


def _text(config: Config, geometry: Geometry) -> dict[str, Signal]:
    return {
        "encoder_hidden_states": Signal((geometry.text_tokens, config["joint_attention_dim"])),
        **condition_signal(config, _tokens(config, geometry), 1),
    }


def _guidance(config: Config) -> dict[str, Signal]:
    return {"guidance": Signal((), "value", GUIDANCE)} if config["guidance_embeds"] else {}


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """Positions are (index, row, column); the text has none."""
    text_tokens = inputs.conditioning["encoder_hidden_states"].shape[1]
    return {
        "hidden_states": inputs.joined(-1),
        "timestep": inputs.time(),
        "img_ids": inputs.image_ids(3),
        "txt_ids": torch.zeros(text_tokens, 3, device=inputs.latents.device),
        **inputs.signals(),
    }


# --- Flux.1 ---


def _flux_1_config(shapes: Shapes) -> dict[str, Any]:
    return {
        **_common_config(shapes),
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _flux_1_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    pooled = {"pooled_projections": Signal((config["pooled_projection_dim"],))}
    return {**_text(config, geometry), **pooled, **_guidance(config)}


FLUX_1 = Architecture(
    transformer="FluxTransformer2DModel",
    converter="convert_flux_transformer_checkpoint_to_diffusers",
    native="x_embedder.weight",
    config=_flux_1_config,
    latents=_tokens,
    signals=_flux_1_signals,
    arguments=_arguments,
    fused=(SINGLE_BLOCKS,),
    spellings=SPELLINGS,
)


# --- Chroma: Flux.1 whose modulations come from one small network ---


def _chroma_config(shapes: Shapes) -> dict[str, Any]:
    hidden, channels = shapes["distilled_guidance_layer.in_proj.weight"]
    return {
        **_common_config(shapes),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": blocks(shapes, "distilled_guidance_layer.layers."),
    }


CHROMA = Architecture(
    transformer="ChromaTransformer2DModel",
    converter="convert_chroma_transformer_checkpoint_to_diffusers",
    native="x_embedder.weight",
    config=_chroma_config,
    latents=_tokens,
    signals=_text,
    arguments=_arguments,
    fused=(SINGLE_BLOCKS,),
    spellings=SPELLINGS,
)


# --- Flux.2 ---


def _flux_2_config(shapes: Shapes) -> dict[str, Any]:
    config = _common_config(shapes)
    hidden = shapes["x_embedder.weight"][0]
    head = config["attention_head_dim"]
    return {
        **config,
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / hidden,
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": (head // 4,) * 4,
    }


def _flux_2_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    return {**_text(config, geometry), **_guidance(config)}


def _flux_2_arguments(inputs: Inputs) -> dict[str, Any]:
    """Positions are (time, row, column, place in the text)."""
    text_tokens = inputs.conditioning["encoder_hidden_states"].shape[1]
    text_ids = torch.zeros(text_tokens, 4, device=inputs.latents.device)
    text_ids[:, 3] = torch.arange(text_tokens, device=inputs.latents.device)
    return {**_arguments(inputs), "img_ids": inputs.image_ids(4), "txt_ids": text_ids}


FLUX_2 = Architecture(
    transformer="Flux2Transformer2DModel",
    converter="convert_flux2_transformer_checkpoint_to_diffusers",
    native="x_embedder.weight",
    config=_flux_2_config,
    latents=_tokens,
    signals=_flux_2_signals,
    arguments=_flux_2_arguments,
    spellings=SPELLINGS,
)
