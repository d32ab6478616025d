"""Parts of a full checkpoint that are no diffusion model.

Text encoders run in full precision in ComfyUI, so FP8 there would only lose; a VAE is convolutions and paints the
pixels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OtherPart:
    """A part of a full checkpoint that is no diffusion model.

    Attributes:
        prefix: Beginning of its tensor names, as the file spells them.
        title: Name for people.
    """

    prefix: str
    title: str


_TITLES = {
    "text encoder": (
        "text_encoders. text_encoder. text_encoder_2. text_encoder_3. cond_stage_model. conditioner. "
        "text_embedding_projection."  # LTX-2: between Gemma and the transformer
    ),
    "image encoder": "clip_vision. image_encoder.",
    "VAE": "first_stage_model. vae. audio_vae.",
    "vocoder": "vocoder.",
    "second copy of the model (moving average)": "model_ema.",
}
OTHER_PARTS = tuple(OtherPart(prefix, title) for title, prefixes in _TITLES.items() for prefix in prefixes.split())
"""Parts of a full checkpoint that are never quantized by default."""


def other_part(name: str) -> OtherPart | None:
    """Find out whether a tensor or layer belongs to a text encoder, a VAE, or another part that is not quantized.

    Args:
        name: Its full name, as the file spells it.

    Returns:
        The part, or None for the diffusion model's own layers.

    >>> other_part("first_stage_model.decoder.mid.attn_1.q").title
    'VAE'
    """
    return next((part for part in OTHER_PARTS if name.startswith(part.prefix)), None)
