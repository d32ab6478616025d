"""The embedded emoji model: a trained network of 18 MB with Flux.1's architecture, for the demo and for tests.

It checks the project's claims about images in seconds and without a download. NOTICE.md gives its source. This module
has its path and decodes its latents to images; `prompts` embeds prompts, `rerange` gives it the activation ranges of
large models, and `sheet` lays images out for comparison.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WEIGHTS = Path(__file__).with_name("emoji_flux_bf16.safetensors")
"""The model, in bfloat16."""

SIDE_TOKENS = 8
"""Image tokens per dimension; each is 2×2 latents, and each latent 2×2 pixels."""

SIDE_PIXELS = 4 * SIDE_TOKENS


def to_pictures(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Decode latents to images on white.

    Args:
        latents: [batch, SIDE_TOKENS², 64], in [-1, 1], alpha premultiplied. The channels of a token are (RGBA, row and
            column of the pixel in its latent, row and column of the latent in its token).

    Returns:
        RGB, [batch, SIDE_PIXELS, SIDE_PIXELS, 3].
    """
    batch = len(latents)
    split = latents.reshape(batch, SIDE_TOKENS, SIDE_TOKENS, 4, 2, 2, 2, 2)
    #                       batch, token row and column, RGBA, pixel row and column, latent row and column
    rows_first = split.transpose(0, 1, 6, 4, 2, 7, 5, 3)
    rgba = np.clip(rows_first.reshape(batch, SIDE_PIXELS, SIDE_PIXELS, 4) / 2 + 0.5, 0, 1)
    rgb = np.clip(rgba[..., :3] + (1 - rgba[..., 3:]), 0, 1)
    images: NDArray[np.uint8] = np.round(rgb * 255).astype(np.uint8)
    return images
