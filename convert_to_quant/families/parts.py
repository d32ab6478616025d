"""Parts of a full checkpoint that are no diffusion model.

Text encoders run in full precision in ComfyUI, so FP8 there would only lose; a VAE is convolutions and paints the
pixels.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
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


TEXT_ENCODERS: Mapping[str, tuple[str, ...]] = {
    "T5": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "CLIP": ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
    "language model": ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
}
"""Files that hold nothing but a text encoder: what it is, and tensors by which it shows."""


def text_encoder(names: Container[str]) -> str | None:
    """Find out whether a file that fits no family of diffusion models is a text encoder.

    Args:
        names: its tensors.

    Returns:
        What it is, for people; None where it is none.
    """
    return next((kind for kind, tensors in TEXT_ENCODERS.items() if all(name in names for name in tensors)), None)
