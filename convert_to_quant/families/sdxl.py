"""Stable Diffusion XL.

dit-quantizer quantizes the transformer blocks; ModelOpt keeps the embedders. The neighbours Stable Diffusion 1 and 2
have the same names and context vectors of 768 and 1024; SDXL has 2048 and its refiner 1280.
"""

from __future__ import annotations

from . import unet
from .base import TEXT, VECTOR, Family, signature
from .comfyui import pooled, takes

_CONTEXT = (2048, 1280)
_SDXL = takes(cross_attn=unet.TEXT, pooled_output=pooled(1280))

FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL (base, refiner, and models tuned from it)",
    signatures=(
        signature(
            "input_blocks.0.0 label_emb.0.0 output_blocks.0.0",
            size=(r"(?:input|output)_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, _CONTEXT),
        ),
        signature(
            "conv_in add_embedding.linear_1 down_blocks.0 up_blocks.0",
            size=(r"(?:down|up)_blocks\.\d+\.attentions\.0\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, _CONTEXT),
        ),
    ),
    blocks=r".*\.transformer_blocks\.\d+",
    keep={
        r"time_embed|time_embedding|label_emb|add_embedding": VECTOR,
        r".*\.(?:emb_layers|time_emb_proj)": VECTOR,
        r".*\d+\.(?:proj_in|proj_out)": "end of a transformer: carries the residual stream of its level",
        r"encoder_hid_proj": TEXT,
    },
    names=unet.NAMES,
    comfyui={"SDXL": _SDXL, "SDXLRefiner": _SDXL, "SDXL_instructpix2pix": unet.IMAGE_BESIDE},
    variants=(
        ("refiner", signature(size=(r".*\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (1280,)))),
        ("inpainting", signature(size=(r"(?:input_blocks\.0\.0|conv_in)\.weight", 1, (9,)))),
        ("base", signature(size=(r".*\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (2048,)))),
    ),
)
