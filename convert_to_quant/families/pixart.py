"""PixArt: self-attention, cross-attention, one modulation for all blocks; predicts noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import comfyui
from .base import Family, signature
from .rules import HALVES, QKV, rules, under
from .running import Architecture, Inputs, Shapes, has, mask, measured, text

if TYPE_CHECKING:
    from torch import Tensor

HEAD = 72
"""Channels of an attention head (no norm shows it); other widths have the largest power of two up to 64."""


def _config(shapes: Shapes) -> dict[str, Any]:
    hidden = shapes["pos_embed.proj.weight"][0]
    return {
        **measured(shapes, "cross_attention_dim", "caption_channels", head=64 if hidden % HEAD else HEAD),
        "sample_size": 128,
        "use_additional_conditions": has(shapes, "resolution_embedder"),
    }


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """Adds the image's size in pixels."""
    import torch

    batch, (height, width) = len(inputs.latents), inputs.latents.shape[-2:]
    pixels = torch.tensor([[8.0 * height, 8.0 * width]] * batch, device=inputs.latents.device)
    aspect = torch.full((batch, 1), height / width, device=inputs.latents.device)
    sized = inputs.config["use_additional_conditions"]
    sizes = {"resolution": pixels, "aspect_ratio": aspect} if sized else {"resolution": None, "aspect_ratio": None}
    return {**inputs.usual(1000), "added_cond_kwargs": sizes}


def _noise(output: Tensor) -> Tensor:
    """The first half of the channels; the second, if any, is the variance."""
    return output.chunk(2, 1)[0]


ATTENTION_NAMES = under("blocks.*.", "transformer_blocks.*.")(
    ("attn.qkv", "attn1.to_{q,k,v}", QKV),
    ("attn.proj", "attn1.to_out.0"),
    ("cross_attn.q_linear", "attn2.to_q"),
    ("cross_attn.kv_linear", "attn2.to_{k,v}", HALVES),
    ("cross_attn.proj", "attn2.to_out.0"),
    ("scale_shift_table", "scale_shift_table"),
)
END_NAMES = rules(
    ("y_embedder.y_proj.fc{1,2}", "caption_projection.linear_{1,2}"),
    ("final_layer.{linear,scale_shift_table}", "{proj_out,scale_shift_table}"),
)
UNUSED = r"y_embedder\.y_embedding|pos_embed"
"""The encoding of an empty prompt, and a position table that the class computes."""

FAMILY = Family(
    name="pixart",
    title="PixArt",
    signatures=(
        signature("t_block.1 blocks.0.attn.qkv blocks.0.mlp.fc1"),
        signature("adaln_single.linear pos_embed.proj transformer_blocks.0.attn1.to_q transformer_blocks.0.attn2.to_q"),
    ),
    names=(
        *under("blocks.*.", "transformer_blocks.*.")(("mlp.fc{1,2}", "ff.net.{0.proj,2}")),
        *ATTENTION_NAMES,
        *END_NAMES,
        *rules(
            (
                "{t,csize,ar}_embedder.mlp.{0,2}",
                "adaln_single.emb.{timestep,resolution,aspect_ratio}_embedder.linear_{1,2}",
            ),
            ("t_block.1", "adaln_single.linear"),
            ("x_embedder.proj", "pos_embed.proj"),
        ),
    ),
    architecture=Architecture(
        transformer="PixArtTransformer2DModel",
        config=_config,
        wants={"encoder_hidden_states": text("caption_channels"), "encoder_attention_mask": mask},
        arguments=_arguments,
        velocity=_noise,
        prediction="noise",
        optional=UNUSED,
    ),
    elsewhere=("Allegro",),
    variants=(("Allegro", signature(size=(r"pos_embed\.proj\.weight", 0, (2304,)))),),
    comfyui={"PixArt": comfyui.takes("y_embedder.y_proj.fc1", smallest=64)},
)
