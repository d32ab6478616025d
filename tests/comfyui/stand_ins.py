"""Lets ComfyUI run Flux.1 workflows with the emoji model, by replacing text encoder and VAE.

Copied into `custom_nodes`. ComfyUI's loader nodes then return replacements for CLIP and VAE, whatever file is chosen;
all other nodes and the model are ComfyUI's. The workflow assumes images of 128 pixels; the model generates 32 pixels,
enlarged to 256.
"""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import nodes
import numpy as np
import torch

from convert_to_quant import emoji
from convert_to_quant.emoji.prompts import embed

ENLARGED = 8


class TextEncoder:
    """Stands in for CLIP: words are looked up, see `emoji.prompts`."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list[Any]:
        if text == "break":
            raise ValueError("these words break\nit")
        context, pooled = (torch.from_numpy(part)[None] for part in embed(text))
        return [[context, {"pooled_output": pooled}]]


class Decoder:
    """Stands in for the VAE: the emoji model's latents are pixels."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        x = comfy.latent_formats.Flux().process_in(latents)
        batch, side = len(x), emoji.SIDE_TOKENS
        tokens = x.reshape(batch, 16, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, 64)
        images = emoji.to_pictures(tokens.float().numpy())
        enlarged = images.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
        return torch.from_numpy(enlarged.astype(np.float32) / 255)


nodes.DualCLIPLoader.load_clip = lambda _node, **_files: (TextEncoder(),)
nodes.VAELoader.load_vae = lambda _node, **_files: (Decoder(),)

NODE_CLASS_MAPPINGS: dict[str, type] = {}
