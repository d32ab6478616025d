"""Qwen-Image, also Edit and Layered; its checkpoints use diffusers' names.

silveroxides keeps the first image modulation and the layers outside the blocks; musubi quantizes everything; ModelOpt
keeps the first two and last two blocks, which calibration can still decide.
"""

from __future__ import annotations

from typing import Any

from . import comfyui
from .base import Family, signature
from .flux1 import DOUBLE, JOINT_VALUES
from .folds import modulated
from .running import Architecture, Inputs, Shapes, has, measured, rotary_axes, text, tokens

PATCH = 2
ZERO_CONDITION_TIME = "__index_timestep_zero__"
"""Present in Qwen-Image-Edit-2511: tokens of the image to edit have time 0."""


def _config(shapes: Shapes) -> dict[str, Any]:
    config, layered = measured(shapes), has(shapes, "addition_t_embedding")
    return {
        **config,
        "patch_size": PATCH,
        "out_channels": config["out_channels"] // PATCH**2,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": rotary_axes(config["attention_head_dim"]),
        "zero_cond_t": ZERO_CONDITION_TIME in shapes,
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def _arguments(inputs: Inputs) -> dict[str, Any]:
    batch, geometry = len(inputs.latents), inputs.geometry
    arguments = {**inputs.usual(), "img_shapes": [[(1, geometry.height, geometry.width)]] * batch}
    if inputs.config["use_additional_t_cond"]:
        arguments["additional_t_cond"] = inputs.time(0).long()
    return arguments


FAMILY = Family(
    name="qwen-image",
    title="Qwen-Image (also Edit, Layered)",
    signatures=(
        signature(
            "transformer_blocks.0.img_mod transformer_blocks.0.txt_mod "
            "transformer_blocks.0.img_mlp.net transformer_blocks.0.attn.add_q_proj txt_norm"
        ),
    ),
    blocks=r"transformer_blocks\.\d+",
    keep={
        r"transformer_blocks\.0\.img_mod": ("first image modulation: its error enters the residual stream first"),
    },
    architecture=Architecture(
        transformer="QwenImageTransformer2DModel",
        config=_config,
        latents=tokens("in_channels"),
        wants={"encoder_hidden_states": text("joint_attention_dim")},
        arguments=_arguments,
        ignored=(ZERO_CONDITION_TIME,),
    ),
    comfyui={"QwenImage": comfyui.takes("txt_in")},
    variants=(
        ("Layered", signature("time_text_embed.addition_t_embedding")),
        ("Edit 2511", signature("__index_timestep_zero__")),
        ("Mage-Flow", signature(size=(r"txt_norm\.weight", 0, (2560,)))),
        ("Image or Edit", signature("txt_norm")),
    ),
    folds=(
        modulated(DOUBLE + "img_mod.1", DOUBLE + "attn.to_{q,k,v}"),
        modulated(DOUBLE + "img_mod.1", DOUBLE + "img_mlp.net.0.proj", shift=3),
        modulated(DOUBLE + "txt_mod.1", DOUBLE + "attn.add_{q,k,v}_proj"),
        modulated(DOUBLE + "txt_mod.1", DOUBLE + "txt_mlp.net.0.proj", shift=3),
        JOINT_VALUES,
    ),
)
