"""LTX-Video and LTX-2.

Layers outside the blocks are kept as by silveroxides and ModelOpt. Of the 48 blocks of LTX-Video 13B and LTX-2,
silveroxides, dit-quantizer and ModelOpt keep 0, 1, 46 and 47 (ModelOpt also 2 and 45); Lightricks' files keep 0, 43-47.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import comfyui
from .base import FINAL, IMAGE, TEXT, VECTOR, Family, signature
from .folds import given
from .rules import rules
from .running import Architecture, Config, Geometry, Inputs, Shapes, Signal, Want, has, mask, measured, text

if TYPE_CHECKING:
    from torch import Tensor

HEADS = 32
"""Attention heads in all sizes; no tensor shows their number."""

AUDIO_TOKENS = 8
"""LTX-2's audio tokens per latent frame."""

SCALES = (8 / 25, 32.0, 32.0)
"""Seconds, pixels and pixels per latent position, at the pipeline's 25 frames per second."""


def _common_config(shapes: Shapes, *inputs: str) -> dict[str, Any]:
    hidden, _ = shapes["proj_in.weight"]
    return measured(shapes, "cross_attention_dim", *inputs, head=hidden // HEADS)


def _config(shapes: Shapes) -> dict[str, Any]:
    return _common_config(shapes, "caption_channels")


def _latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return geometry.frames * geometry.height * geometry.width, config["in_channels"]


def _arguments(inputs: Inputs) -> dict[str, Any]:
    return {**inputs.usual(1000), **_sizes(inputs.geometry), "rope_interpolation_scale": SCALES}


def _sizes(geometry: Geometry) -> dict[str, int]:
    return {"num_frames": geometry.frames, "height": geometry.height, "width": geometry.width}


def _ltx2_config(shapes: Shapes) -> dict[str, Any]:
    hidden, (audio_hidden, audio_channels) = shapes["proj_in.weight"][0], shapes["audio_proj_in.weight"]
    captions = has(shapes, "caption_projection")
    block = "transformer_blocks.0"
    return {
        **_common_config(shapes, *(["caption_channels"] if captions else [])),
        "audio_in_channels": audio_channels,
        "audio_out_channels": shapes["audio_proj_out.weight"][0],
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": audio_hidden // HEADS,
        "audio_cross_attention_dim": shapes[f"{block}.audio_attn2.to_k.weight"][1],
        "gated_attn": has(shapes, "attn1.to_gate_logits"),
        "audio_gated_attn": has(shapes, "audio_attn1.to_gate_logits"),
        "cross_attn_mod": shapes["time_embed.linear.weight"][0] == 9 * hidden,
        "audio_cross_attn_mod": shapes["audio_time_embed.linear.weight"][0] == 9 * audio_hidden,
        "use_prompt_embeddings": captions,
        "ff_bias": has(shapes, "ff.net.2.bias"),
        "audio_ff_bias": has(shapes, "audio_ff.net.2.bias"),
        "use_prompt_adaln_single": has(shapes, "prompt_adaln"),
        "use_keyframes_abs_pos_embedding": has(shapes, "keyframes_abs_pos_embedding"),
        "rope_type": "split",
    }


def _ltx2_latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    """Video tokens, then audio tokens, which have as many channels."""
    tokens, channels = _latents(config, geometry)
    return tokens + AUDIO_TOKENS * geometry.frames, channels


def _ltx2_texts(name: str) -> Want:
    """Output of the text encoder's connector for the video, or for the audio."""

    def want(config: Config, geometry: Geometry) -> Signal:
        width = config["caption_channels" if config["use_prompt_embeddings"] else name]
        return Signal((geometry.text_tokens, width))

    return want


def _ltx2_arguments(inputs: Inputs) -> dict[str, Any]:
    sound = AUDIO_TOKENS * inputs.geometry.frames
    return {
        **inputs.usual(1000),
        **_sizes(inputs.geometry),
        "hidden_states": inputs.latents[:, :-sound],
        "audio_hidden_states": inputs.latents[:, -sound:],
        "sigma": inputs.time(1000),
        "audio_num_frames": sound,
    }


def _ltx2_velocity(output: tuple[Tensor, Tensor]) -> Tensor:
    import torch

    return torch.cat(output, 1)


def _ltx2_text(scene: comfyui.Scene) -> int:
    """Text features of LTX-2: inputs of the projection before the two connectors, or of both connectors."""
    name = "caption_projection.linear_1"
    if scene.part(name) is not None:
        return comfyui.measure(name, scene)
    return comfyui.measure("cross_attention_dim", scene) + comfyui.measure("audio_cross_attention_dim", scene)


FAMILY = Family(
    name="ltx",
    title="LTX-Video and LTX-2",
    signatures=(
        signature("patchify_proj adaln_single.linear transformer_blocks.0.attn1.to_q proj_out"),
        signature(
            ("proj_in.weight time_embed.linear transformer_blocks.0.attn2.to_q transformer_blocks.0.ff proj_out"),
            lacks="patch_embed transformer_blocks.0.attn1.add_q_proj",
        ),
    ),
    blocks=r"transformer_blocks\.\d+",
    keep={
        r"(?:audio_)?patchify_proj": IMAGE,
        r"(?:audio|video)_embeddings_connector|connectors": TEXT,
        r"\w*adaln_single|audio_time_embed|\w*prompt_adaln|av_cross_attn_\w+": VECTOR,
        r"transformer_blocks\.(?:0|1|46|47)": "block 0, 1, 46 or 47: other converters keep it too",
        r"transformer_blocks\.\d+\.\w+\.to_gate_logits": "attention gate: each of its outputs scales a whole head",
        r"audio_proj_out": FINAL,
    },
    names=rules(
        ("{,audio_}patchify_proj", "{,audio_}proj_in"),
        ("transformer_blocks.*.**.{q,k}_norm", "transformer_blocks.*.**.norm_{q,k}"),
        (
            "transformer_blocks.*.scale_shift_table_a2v_ca_{video,audio}",
            "transformer_blocks.*.{video,audio}_a2v_cross_attn_scale_shift_table",
        ),
        ("{,audio_}adaln_single.**", "{,audio_}time_embed.**"),
        ("{,audio_}prompt_adaln_single.**", "{,audio_}prompt_adaln.**"),
        ("av_ca_{video,audio}_scale_shift_adaln_single.**", "av_cross_attn_{video,audio}_scale_shift.**"),
        ("av_ca_{a2v,v2a}_gate_adaln_single.**", "av_cross_attn_{video_a2v,audio_v2a}_gate.**"),
    ),
    architecture=Architecture(
        transformer="LTXVideoTransformer3DModel",
        config=_config,
        latents=_latents,
        wants={"encoder_hidden_states": text("caption_channels"), "encoder_attention_mask": mask},
        arguments=_arguments,
    ),
    architectures={
        "LTX-2": Architecture(
            transformer="LTX2VideoTransformer3DModel",
            config=_ltx2_config,
            latents=_ltx2_latents,
            wants={
                "encoder_hidden_states": _ltx2_texts("cross_attention_dim"),
                "audio_encoder_hidden_states": _ltx2_texts("audio_cross_attention_dim"),
            },
            arguments=_ltx2_arguments,
            velocity=_ltx2_velocity,
            optional=r"(?:audio|video)_embeddings_connector\..*",  # part of the text encoder
        )
    },
    folds=tuple(
        given(f"transformer_blocks.*.{attention}.to_v", f"transformer_blocks.*.{attention}.to_out.0")
        for attention in ("attn1", "attn2")
    ),
    comfyui={
        "LTXV": comfyui.takes("caption_projection.linear_1", attention_mask=comfyui.ones("text_tokens")),
        "LTXAV": comfyui.takes(
            _ltx2_text,
            latents=(
                comfyui.VIDEO,
                ("num_audio_channels", comfyui.times("frames", 8), "audio_frequency_bins"),
            ),
        ),
    },
    variants=(
        ("LTX-2", signature("audio_patchify_proj|audio_proj_in")),
        ("LTX-Video", signature("proj_out")),
    ),
)
