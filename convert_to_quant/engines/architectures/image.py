"""Stable Diffusion 3, Qwen-Image, Lumina 2 and Z-Image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import Geometry, Signal
from ..provenance import Fused, Shapes, qkv_rows
from .base import Architecture, Config, Inputs, blocks, condition_signal, negated, rotary_axes

PATCH = 2
"""All four cut pictures into patches of 2 by 2."""


def _map(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return config["in_channels"], PATCH * geometry.height, PATCH * geometry.width


# --- Stable Diffusion 3 and 3.5 ---

SD3_HEAD = 64
"""Channels of a head in all sizes of Stable Diffusion 3; those without query norms do not show it."""


def _sd3_config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels, patch, _ = shapes["pos_embed.proj.weight"]
    normed = "transformer_blocks.0.attn.norm_q.weight"
    head = shapes[normed][0] if normed in shapes else SD3_HEAD
    layers = blocks(shapes, "transformer_blocks.")
    side = math.isqrt(shapes["pos_embed.pos_embed"][1])
    return {
        "sample_size": side,
        "patch_size": patch,
        "in_channels": in_channels,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "pos_embed_max_size": side,
        "dual_attention_layers": tuple(
            index for index in range(layers) if f"transformer_blocks.{index}.attn2.to_q.weight" in shapes
        ),
        "qk_norm": "rms_norm" if normed in shapes else None,
    }


def _sd3_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    return {
        "encoder_hidden_states": Signal((geometry.text_tokens, config["joint_attention_dim"])),
        "pooled_projections": Signal((config["pooled_projection_dim"],)),
    }


def _sd3_arguments(inputs: Inputs) -> dict[str, Any]:
    return {"hidden_states": inputs.latents, "timestep": inputs.time(1000), **inputs.signals()}


def _sd3_positions(model: nn.Module, config: Config) -> None:
    """Make room for the checkpoint's table of positions."""
    embedder = model.get_submodule("pos_embed")
    side, channels = config["pos_embed_max_size"], config["num_attention_heads"] * config["attention_head_dim"]
    embedder.pos_embed_max_size = side
    embedder._buffers["pos_embed"] = torch.empty(1, side * side, channels, device="meta")


SD3 = Architecture(
    transformer="SD3Transformer2DModel",
    converter="convert_sd3_transformer_checkpoint_to_diffusers",
    native="pos_embed.proj.weight",
    config=_sd3_config,
    latents=_map,
    signals=_sd3_signals,
    arguments=_sd3_arguments,
    stand_ins={"pos_embed_max_size": 1},  # the class would compute a table of hundreds of megabytes
    adjust=_sd3_positions,
)


# --- Qwen-Image, also Edit and Layered ---

QWEN_ZERO_CONDITION_TIME = "__index_timestep_zero__"
"""Marks Qwen-Image-Edit-2511: tokens of the picture to edit are told time 0."""


def _qwen_config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    layered = "time_text_embed.addition_t_embedding.weight" in shapes
    return {
        "patch_size": PATCH,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // PATCH**2,
        "num_layers": blocks(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": rotary_axes(head),
        "zero_cond_t": QWEN_ZERO_CONDITION_TIME in shapes,
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def _qwen_tokens(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return geometry.height * geometry.width, config["in_channels"]


def _qwen_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    return {"encoder_hidden_states": Signal((geometry.text_tokens, config["joint_attention_dim"]))}


def _qwen_arguments(inputs: Inputs) -> dict[str, Any]:
    batch, geometry = len(inputs.latents), inputs.geometry
    arguments = {
        "hidden_states": inputs.latents,
        "timestep": inputs.time(),
        "img_shapes": [[(1, geometry.height, geometry.width)]] * batch,
        **inputs.signals(),
    }
    if inputs.config["use_additional_t_cond"]:
        arguments["additional_t_cond"] = torch.zeros(batch, dtype=torch.int64, device=inputs.latents.device)
    return arguments


QWEN_IMAGE = Architecture(
    transformer="QwenImageTransformer2DModel",
    converter=None,
    native="img_in.weight",
    config=_qwen_config,
    latents=_qwen_tokens,
    signals=_qwen_signals,
    arguments=_qwen_arguments,
    ignored=(QWEN_ZERO_CONDITION_TIME,),
)


# --- Lumina-Image 2 ---


def _lumina_2_config(shapes: Shapes) -> dict[str, Any]:
    hidden, patched = shapes["x_embedder.weight"]
    head = shapes["layers.0.attn.norm_q.weight"][0]
    return {
        "patch_size": PATCH,
        "in_channels": patched // PATCH**2,
        "out_channels": shapes["norm_out.linear_2.weight"][0] // PATCH**2,
        "hidden_size": hidden,
        "num_layers": blocks(shapes, "layers."),
        "num_refiner_layers": blocks(shapes, "noise_refiner."),
        "num_attention_heads": hidden // head,
        "num_kv_heads": shapes["layers.0.attn.to_k.weight"][0] // head,
        # The class rounds 4 · hidden · multiplier down, then up to a multiple; half a row more makes both exact.
        "multiple_of": 1,
        "ffn_dim_multiplier": (shapes["layers.0.feed_forward.linear_1.weight"][0] + 0.5) / (4 * hidden),
        "axes_dim_rope": (head // 3,) * 3,
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.1.weight"][1],
    }


def _lumina_2_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    return {
        "encoder_hidden_states": Signal((geometry.text_tokens, config["cap_feat_dim"])),
        "encoder_attention_mask": Signal((geometry.text_tokens,), "mask"),
        **condition_signal(config, _map(config, geometry), 0),
    }


def _lumina_2_arguments(inputs: Inputs) -> dict[str, Any]:
    """Time runs from 0 (noise) to 1."""
    return {"hidden_states": inputs.latents, "timestep": inputs.time(-1, 1), **inputs.signals()}


LUMINA_2 = Architecture(
    transformer="Lumina2Transformer2DModel",
    converter="convert_lumina2_to_diffusers",
    native="time_caption_embed.caption_embedder.1.weight",
    config=_lumina_2_config,
    latents=_map,
    signals=_lumina_2_signals,
    arguments=_lumina_2_arguments,
    velocity=negated,
    fused=(Fused(r".*\.attention\.qkv", (2304, 768, 768), qkv_rows),),
    ignored=("norm_final.weight",),
)


# --- Z-Image ---


def _z_image_config(shapes: Shapes) -> dict[str, Any]:
    hidden, patched = shapes["all_x_embedder.2-1.weight"]
    head = shapes["layers.0.attention.norm_q.weight"][0]
    side = 2 * (3 * head // 16)
    return {
        "in_channels": patched // PATCH**2,
        "dim": hidden,
        "n_layers": blocks(shapes, "layers."),
        "n_refiner_layers": blocks(shapes, "noise_refiner."),
        "n_heads": hidden // head,
        "n_kv_heads": hidden // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "axes_dims": [head - 2 * side, side, side],
    }


def _z_image_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    return {"cap_feats": Signal((geometry.text_tokens, config["cap_feat_dim"]))}


def _z_image_arguments(inputs: Inputs) -> dict[str, Any]:
    """Samples come as lists, pictures as films of one frame; time runs from 0 (noise) to 1."""
    return {
        "x": list(inputs.latents.unsqueeze(2)),
        "t": inputs.time(-1, 1),
        "cap_feats": list(inputs.conditioning["cap_feats"]),
    }


def _z_image_velocity(output: list[Tensor]) -> Tensor:
    return -torch.stack(output).squeeze(2)


Z_IMAGE = Architecture(
    transformer="ZImageTransformer2DModel",
    converter="convert_z_image_transformer_checkpoint_to_diffusers",
    native="all_x_embedder.2-1.weight",
    config=_z_image_config,
    latents=_map,
    signals=_z_image_signals,
    arguments=_z_image_arguments,
    velocity=_z_image_velocity,
    ignored=("norm_final.weight",),
)
