"""Wan, HunyuanVideo and LTX-Video."""

from __future__ import annotations

import math
from typing import Any

from ..noise import Geometry, Signal
from ..provenance import Fused, Shapes, qkv_mlp_rows
from .base import Architecture, Config, Inputs, blocks, condition_signal, rotary_axes


def _film(config: Config, geometry: Geometry, patch: tuple[int, ...]) -> tuple[int, ...]:
    frames, height, width = patch
    return config["out_channels"], frames * geometry.frames, height * geometry.height, width * geometry.width


# --- Wan 2.1 and 2.2 ---

WAN_HEAD = 128
"""Channels of a head in all sizes; its norms span all heads and do not show it."""

WAN_IMAGE_TOKENS = 257
"""Tokens of the image encoder (CLIP ViT-H) that image-to-video models read."""


def _wan_config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels, *patch = shapes["patch_embedding.weight"]
    image_norm = shapes.get("condition_embedder.image_embedder.norm1.weight")
    added_keys = shapes.get("blocks.0.attn2.add_k_proj.weight")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": max(hidden // WAN_HEAD, 1),
        "attention_head_dim": min(hidden, WAN_HEAD),
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": blocks(shapes, "blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": None if image_norm is None else image_norm[0],
        "added_kv_proj_dim": None if added_keys is None else added_keys[1],
    }


def _wan_latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return _film(config, geometry, config["patch_size"])


def _wan_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    signals = {
        "encoder_hidden_states": Signal((geometry.text_tokens, config["text_dim"])),
        **condition_signal(config, _wan_latents(config, geometry), 0),
    }
    if config["image_dim"] is not None:
        signals["encoder_hidden_states_image"] = Signal((WAN_IMAGE_TOKENS, config["image_dim"]))
    return signals


def _wan_arguments(inputs: Inputs) -> dict[str, Any]:
    return {"hidden_states": inputs.joined(1), "timestep": inputs.time(1000), **inputs.signals()}


WAN = Architecture(
    transformer="WanTransformer3DModel",
    converter="convert_wan_transformer_to_diffusers",
    native="condition_embedder.time_proj.weight",
    config=_wan_config,
    latents=_wan_latents,
    signals=_wan_signals,
    arguments=_wan_arguments,
)


# --- HunyuanVideo ---

HUNYUAN_GUIDANCE = 6.0
"""Guidance that the distilled model is told; its pipeline's default."""

# The converter knows the authors' names; ComfyUI saves its own.
HUNYUAN_SPELLINGS = (
    (r"^txt_in\.t_embedder\.in_layer\.", "txt_in.t_embedder.mlp.0."),
    (r"^txt_in\.t_embedder\.out_layer\.", "txt_in.t_embedder.mlp.2."),
    (r"^txt_in\.c_embedder\.in_layer\.", "txt_in.c_embedder.linear_1."),
    (r"^txt_in\.c_embedder\.out_layer\.", "txt_in.c_embedder.linear_2."),
    (r"^(time_in|guidance_in)\.in_layer\.", r"\1.mlp.0."),
    (r"^(time_in|guidance_in)\.out_layer\.", r"\1.mlp.2."),
    (r"\b(img|txt)_mod\.lin\.", r"\1_mod.linear."),
    (r"\bmodulation\.lin\.", "modulation.linear."),
    (r"\b(img|txt|self)_attn\.(qkv|proj)\.", r"\1_attn_\2."),
    (r"\b(img_mlp|txt_mlp|blocks\.\d+\.mlp)\.0\.", r"\1.fc1."),
    (r"\b(img_mlp|txt_mlp|blocks\.\d+\.mlp)\.2\.", r"\1.fc2."),
    (r"\b(img|txt)_attn\.norm\.query_norm\.(?:scale|weight)$", r"\1_attn_q_norm.weight"),
    (r"\b(img|txt)_attn\.norm\.key_norm\.(?:scale|weight)$", r"\1_attn_k_norm.weight"),
    (r"^(single_blocks\.\d+)\.norm\.query_norm\.(?:scale|weight)$", r"\1.q_norm.weight"),
    (r"^(single_blocks\.\d+)\.norm\.key_norm\.(?:scale|weight)$", r"\1.k_norm.weight"),
)


def _hunyuan_config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels, *patch = shapes["x_embedder.proj.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    out_channels = shapes["proj_out.weight"][0] // math.prod(patch)
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": blocks(shapes, "transformer_blocks."),
        "num_single_layers": blocks(shapes, "single_transformer_blocks."),
        "num_refiner_layers": blocks(shapes, "context_embedder.token_refiner.refiner_blocks."),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / hidden,
        "patch_size": patch[1],
        "patch_size_t": patch[0],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "rope_axes_dim": rotary_axes(head),
        "image_condition_type": "latent_concat" if in_channels > out_channels else None,
    }


def _hunyuan_latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return _film(config, geometry, (config["patch_size_t"], config["patch_size"], config["patch_size"]))


def _hunyuan_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    signals = {
        "encoder_hidden_states": Signal((geometry.text_tokens, config["text_embed_dim"])),
        "encoder_attention_mask": Signal((geometry.text_tokens,), "mask"),
        "pooled_projections": Signal((config["pooled_projection_dim"],)),
        **condition_signal(config, _hunyuan_latents(config, geometry), 0),
    }
    if config["guidance_embeds"]:
        signals["guidance"] = Signal((), "value", 1000 * HUNYUAN_GUIDANCE)
    return signals


def _hunyuan_arguments(inputs: Inputs) -> dict[str, Any]:
    return {"hidden_states": inputs.joined(1), "timestep": inputs.time(1000), **inputs.signals()}


HUNYUAN_VIDEO = Architecture(
    transformer="HunyuanVideoTransformer3DModel",
    converter="convert_hunyuan_video_transformer_to_diffusers",
    native="x_embedder.proj.weight",
    config=_hunyuan_config,
    latents=_hunyuan_latents,
    signals=_hunyuan_signals,
    arguments=_hunyuan_arguments,
    fused=(Fused(r"single_blocks\.\d+\.linear1", (3072, 3072, 3072, 12288), qkv_mlp_rows),),
    spellings=HUNYUAN_SPELLINGS,
)


# --- LTX-Video ---

LTX_HEADS = 32
"""Heads in all sizes; the norms span all of them and do not show their number."""

LTX_SCALES = (8 / 25, 32.0, 32.0)
"""Seconds, pixels and pixels per latent position, at the pipeline's 25 frames per second."""


def _ltx_config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels = shapes["proj_in.weight"]
    return {
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_attention_heads": LTX_HEADS,
        "attention_head_dim": hidden // LTX_HEADS,
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "num_layers": blocks(shapes, "transformer_blocks."),
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
    }


def _ltx_latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return geometry.frames * geometry.height * geometry.width, config["in_channels"]


def _ltx_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    return {
        "encoder_hidden_states": Signal((geometry.text_tokens, config["caption_channels"])),
        "encoder_attention_mask": Signal((geometry.text_tokens,), "mask"),
    }


def _ltx_arguments(inputs: Inputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.time(1000),
        "num_frames": inputs.geometry.frames,
        "height": inputs.geometry.height,
        "width": inputs.geometry.width,
        "rope_interpolation_scale": LTX_SCALES,
        **inputs.signals(),
    }


LTX = Architecture(
    transformer="LTXVideoTransformer3DModel",
    converter="convert_ltx_transformer_checkpoint_to_diffusers",
    native="proj_in.weight",
    config=_ltx_config,
    latents=_ltx_latents,
    signals=_ltx_signals,
    arguments=_ltx_arguments,
)
