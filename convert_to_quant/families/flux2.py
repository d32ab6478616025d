"""Flux.2: Flux.1 with one modulation for all blocks; ModelOpt, musubi and silveroxides keep it in high precision."""

from __future__ import annotations

from typing import Any

from . import flux1
from .base import Family, signature
from .folds import given
from .rules import rules
from .running import Architecture, Inputs, Shapes, guidance, has


def _config(shapes: Shapes) -> dict[str, Any]:
    config = flux1.common_config(shapes)
    return {
        **config,
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / shapes["x_embedder.weight"][0],
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "guidance_embeds": has(shapes, "guidance_embedder"),
        "axes_dims_rope": (config["attention_head_dim"] // 4,) * 4,
    }


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """Positions are (time, row, column, place in the text)."""
    import torch

    text_ids = inputs.text_ids(4)
    text_ids[:, 3] = torch.arange(len(text_ids), device=text_ids.device)
    return {**flux1.arguments(inputs), "img_ids": inputs.image_ids(4), "txt_ids": text_ids}


FAMILY = Family(
    name="flux2",
    title="Flux.2 (dev, klein)",
    signatures=(
        signature("double_blocks.0.img_attn double_stream_modulation_img.lin single_stream_modulation.lin"),
        signature(
            "transformer_blocks.0.attn.add_q_proj double_stream_modulation_img.linear single_stream_modulation.linear"
        ),
    ),
    blocks=flux1.BLOCKS,
    # diffusers, too, fuses attention and MLP of a single block.
    names=(
        *rules(
            ("{time,guidance}_in.{in,out}_layer", "time_guidance_embed.{timestep,guidance}_embedder.linear_{1,2}"),
            ("double_stream_modulation_{img,txt}.lin", "double_stream_modulation_{img,txt}.linear"),
            ("single_stream_modulation.lin", "single_stream_modulation.linear"),
            ("double_blocks.*.{img,txt}_mlp.{0,2}", "transformer_blocks.*.ff{,_context}.linear_{in,out}"),
            ("single_blocks.*.linear{1,2}", "single_transformer_blocks.*.attn.to_{qkv_mlp_proj,out}"),
        ),
        *flux1.ATTENTION_NAMES,
    ),
    architecture=Architecture(
        transformer="Flux2Transformer2DModel",
        config=_config,
        latents=flux1.LATENTS,
        wants={**flux1.WANTS, "guidance": guidance(flux1.GUIDANCE)},
        arguments=_arguments,
    ),
    variants=(
        ("dev", signature(size=(r"(?:img_in|x_embedder)\.weight", 0, (6144,)))),
        ("klein 9B", signature(size=(r"(?:img_in|x_embedder)\.weight", 0, (4096,)))),
        ("klein 4B", signature(size=(r"(?:img_in|x_embedder)\.weight", 0, (3072,)))),
    ),
    # One modulation without biases serves all blocks, so channels behind norms cannot be scaled.
    folds=(
        flux1.JOINT_VALUES,
        *(
            given(f"{flux1.DOUBLE}{mlp}.linear_in", f"{flux1.DOUBLE}{mlp}.linear_out", 1)
            for mlp in ("ff", "ff_context")
        ),
        given(flux1.SINGLE + "attn.to_qkv_mlp_proj", flux1.SINGLE + "attn.to_out", 2, "first"),
        given(flux1.SINGLE + "attn.to_qkv_mlp_proj", flux1.SINGLE + "attn.to_out", -1, "rest"),
    ),
)
