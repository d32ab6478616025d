"""Stable Diffusion XL.

dit-quantizer quantizes the transformer blocks; ModelOpt keeps the embedders. Stable Diffusion 1 and 2 have the same
names; their text has 768 and 1024 features, SDXL's 2048, its refiner's 1280.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import unet
from .base import Family, signature
from .comfyui import pooled, takes
from .rules import rules
from .running import Config, Geometry, Inputs, Shapes, Signal

BASE_TEXT, REFINER_TEXT = 2048, 1280
NUMBERS = 256
"""Features that encode each number of the image's size."""

SCORE = 6.0
"""The aesthetic score: the refiner pipeline's default."""

_SDXL = takes(cross_attn=unet.PROMPT, pooled_output=pooled(1280))


def _config(shapes: Shapes) -> dict[str, Any]:
    return {
        **unet.config(shapes),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": NUMBERS,
        unet.LABELS: shapes["add_embedding.linear_1.weight"][1],
    }


def _size(config: Config, height: int, width: int) -> tuple[float, ...]:
    """The image's size, its crop, and its size again, or, for the refiner, its aesthetic score."""
    rest = (SCORE,) if config["cross_attention_dim"] == REFINER_TEXT else (height, width)
    return (height, width, 0, 0, *rest)


def _pooled(config: Config, _: Geometry) -> Signal:
    return Signal((config[unet.LABELS] - NUMBERS * len(_size(config, 0, 0)),))


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """Adds the image's size in pixels."""
    arguments = unet.arguments(inputs)
    latents = arguments["sample"]
    size = latents.new_tensor(_size(inputs.config, *(8 * side for side in latents.shape[-2:])))
    added = {"text_embeds": arguments.pop("text_embeds"), "time_ids": size.expand(len(latents), -1)}
    return {**arguments, "added_cond_kwargs": added}


FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL (base, refiner, and models tuned from it)",
    signatures=unet.signatures("add_embedding", BASE_TEXT, REFINER_TEXT),
    blocks=unet.BLOCKS,
    keep=unet.KEEP,
    names=(*unet.NAMES, *rules(("label_emb.0.{0,2}", "add_embedding.linear_{1,2}"))),
    architecture=replace(
        unet.ARCHITECTURE,
        config=_config,
        wants={**unet.WANTS, "text_embeds": _pooled},
        arguments=_arguments,
    ),
    comfyui={"SDXL": _SDXL, "SDXLRefiner": _SDXL, "SDXL_instructpix2pix": unet.IMAGE_BESIDE},
    variants=(
        ("refiner", signature(size=(r".*\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (REFINER_TEXT,)))),
        ("inpainting", signature(size=(unet.FIRST, 1, (9,)))),
        ("InstructPix2Pix", signature(size=(unet.FIRST, 1, (8,)))),
        ("base", signature(size=(r".*\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (BASE_TEXT,)))),
    ),
)
