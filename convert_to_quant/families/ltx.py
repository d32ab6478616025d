"""LTX-Video and LTX-2.

The ends as in silveroxides and ModelOpt. Blocks 0, 1, 46 and 47 of the 48 in LTX-Video 13B and LTX-2 are kept by
silveroxides, dit-quantizer and ModelOpt (which adds 2 and 45); Lightricks' own files keep 0 and 43 to 47.
"""

from __future__ import annotations

from typing import Any

from . import comfyui
from .base import FINAL, IMAGE, TEXT, VECTOR, Family, signature
from .rules import rules
from .running import Architecture, Config, Geometry, Inputs, Shapes, blocks, mask, text

HEADS = 32
"""Heads in all sizes; the norms span all of them and do not show their number."""

SCALES = (8 / 25, 32.0, 32.0)
"""Seconds, pixels and pixels per latent position, at the pipeline's 25 frames per second."""


def _config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels = shapes["proj_in.weight"]
    return {
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_attention_heads": HEADS,
        "attention_head_dim": hidden // HEADS,
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "num_layers": blocks(shapes, "transformer_blocks."),
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
    }


def _latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return geometry.frames * geometry.height * geometry.width, config["in_channels"]


def _arguments(inputs: Inputs) -> dict[str, Any]:
    return {
        **inputs.usual(1000),
        "num_frames": inputs.geometry.frames,
        "height": inputs.geometry.height,
        "width": inputs.geometry.width,
        "rope_interpolation_scale": SCALES,
    }


def _ltx2_text(scene: comfyui.Scene) -> int:
    """Features of the text in LTX-2: that of the projection before its two connectors, or of these."""
    name = "caption_projection.linear_1"
    if scene.part(name) is not None:
        return scene.inputs(name)
    return scene.number("cross_attention_dim") + scene.number("audio_cross_attention_dim")


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
        r"patchify_proj|audio_patchify_proj|proj_in|audio_proj_in": IMAGE,
        r"(?:audio_)?caption_projection|(?:audio|video)_embeddings_connector|connectors": TEXT,
        r"\w*adaln_single|time_embed|audio_time_embed|\w*prompt_adaln|av_cross_attn_\w+": VECTOR,
        r"transformer_blocks\.(?:0|1|46|47)": "first or last two of 48 blocks, which others keep as well",
        r"transformer_blocks\.\d+\.\w+\.to_gate_logits": "attention gate: one number per head, which scales it whole",
        r"proj_out|audio_proj_out": FINAL,
    },
    names=rules(
        ("{,audio_}patchify_proj", "{,audio_}proj_in"),
        ("{,audio_}adaln_single.**", "{,audio_}time_embed.**"),
        ("{,audio_}prompt_adaln_single.**", "{,audio_}prompt_adaln.**"),
        ("av_ca_{video,audio}_scale_shift_adaln_single.**", "av_cross_attn_{video,audio}_scale_shift.**"),
        ("av_ca_{a2v,v2a}_gate_adaln_single.**", "av_cross_attn_{video_a2v,audio_v2a}_gate.**"),
    ),
    architecture=Architecture(
        transformer="LTXVideoTransformer3DModel",
        converter="convert_ltx_transformer_checkpoint_to_diffusers",
        native="proj_in.weight",
        config=_config,
        latents=_latents,
        wants={"encoder_hidden_states": text("caption_channels"), "encoder_attention_mask": mask},
        arguments=_arguments,
    ),
    comfyui={
        "LTXV": comfyui.takes("caption_projection.linear_1", attention_mask=comfyui.ones("text_tokens")),
        "LTXAV": comfyui.takes(
            _ltx2_text,
            latents=(
                comfyui.VIDEO,
                (
                    comfyui.number("num_audio_channels"),
                    comfyui.times("frames", 8),
                    comfyui.number("audio_frequency_bins"),
                ),
            ),
        ),
    },
)
