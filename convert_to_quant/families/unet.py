"""U-Nets from Stable Diffusion 1 to XL, by their names alone.

Both sides count the blocks: the authors from first to last, diffusers by level, with two blocks each on the way down
and three on the way up.
"""

from __future__ import annotations

from typing import Any

from .base import Family, signature
from .comfyui import BASE, Scene, encoded, measure, pooled, setting, signal, takes, text, vision_output
from .rules import rules

NAMES = rules(
    *(
        (f"{side}_blocks.{3 * level + block + first}.{layer}", f"{way}_blocks.{level}.{kind}.{block}.{module}")
        for side, way, blocks, first in (("input", "down", 2, 1), ("output", "up", 3, 0))
        for level in range(4)
        for block in range(blocks)
        for layer, kind, module in (("1.**", "attentions", "**"), ("0.emb_layers.1", "resnets", "time_emb_proj"))
    ),
    ("middle_block.1.**", "mid_block.attentions.0.**"),
    ("middle_block.{0,2}.emb_layers.1", "mid_block.resnets.{0,1}.time_emb_proj"),
    ("time_embed.{0,2}", "time_embedding.linear_{1,2}"),
    ("label_emb.0.{0,2}", "add_embedding.linear_{1,2}"),
    ("label_emb.0.{0,2}", "class_embedding.linear_{1,2}"),
)


def _unclip_width(scene: Scene) -> int:
    """Features of an image as a prompt: half of what it is given with, the other half says how noisy it is."""
    return measure(setting("adm_in_channels"), scene) // 2


def unclip(values: Any) -> Any:
    """An image as a prompt."""
    return [{"clip_vision_output": vision_output(values), "strength": 1.0, "noise_augmentation": 0.0}]


def _unclip_row(values: Any) -> Any:
    """The same, as one of several images."""
    return unclip(values[:, None])


def _token(values: Any) -> Any:
    """A vector as a text of one token."""
    return values[:, None]


TEXT = text(setting("context_dim"))
IMAGE_BESIDE = takes(cross_attn=TEXT, concat_latent_image=encoded())
_CLIP_IMAGE = pooled(setting("context_dim"), form=_token)

FAMILY = Family(
    name="unet",
    title="Stable Diffusion 1 and 2",
    signatures=(
        signature(
            "input_blocks.0.0 time_embed.0 output_blocks.0.0",
            size=(r"(?:input|output)_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (768, 1024)),
        ),
        signature(
            "conv_in time_embedding.linear_1 down_blocks.0 up_blocks.0",
            size=(
                r"(?:down|up)_blocks\.\d+\.attentions\.0\.transformer_blocks\.0\.attn2\.to_k\.weight",
                1,
                (768, 1024),
            ),
        ),
    ),
    names=NAMES,
    relatives=("UNet2DConditionModel",),
    comfyui={
        BASE: takes(cross_attn=TEXT),
        "SD21UNCLIP": takes(cross_attn=TEXT, unclip_conditioning=pooled(_unclip_width, form=_unclip_row)),
        "SVD_img2vid": takes(cross_attn=_CLIP_IMAGE, concat_latent_image=encoded(), batch="frames"),
        "Stable_Zero123": takes(cross_attn=_CLIP_IMAGE, concat_latent_image=encoded()),
        "SD_X4Upscaler": takes(cross_attn=TEXT, concat_image=signal(3, "height", "width")),
        "SD15_instructpix2pix": IMAGE_BESIDE,
        "Lotus": takes(cross_attn=TEXT),
    },
    variants=(
        ("Stable Video Diffusion", signature("input_blocks.1.1.time_stack")),
        ("unCLIP", signature("label_emb.0.0")),
        ("Stable Diffusion 1", signature(size=(r".*\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (768,)))),
        ("Stable Diffusion 2", signature(size=(r".*\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (1024,)))),
    ),
)
