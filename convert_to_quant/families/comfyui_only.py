"""Models that only ComfyUI runs: the inputs of each of its classes.

A model of which more is known has a file of its own.
"""

from __future__ import annotations

from .base import Family
from .comfyui import SOUND, Scene, Want, encoded, ids, listed, measure, ones, over, pooled, signal, takes, text, times
from .unet import unclip

QWEN_WORDS = 151643
"""Qwen's first special token, such as "an image starts here"; lower numbers are words."""


_UPSCALING = times("lq_proj.sr_scale", "lq_proj.latent_spatial_down_factor")
"""PiD: pixels per latent of its input."""


def _ernie_text(scene: Scene) -> int:
    """Ernie: features of the text before its projection, if it has one."""
    return measure("hidden_size" if scene.part("text_proj") is None else "text_proj", scene)


_IMAGES = {
    "StableCascade_C": takes(
        "clip_txt_mapper",
        pooled_output=pooled("clip_txt_pooled_mapper"),
        unclip_conditioning=pooled("clip_img_mapper", form=unclip),
    ),
    "StableCascade_B": takes(
        pooled_output=pooled("clip_mapper"),
        stable_cascade_prior=signal(16, over(times("height", 4), 42), over(times("width", 4), 42)),
    ),
    "HunyuanDiT": takes(
        cross_attn=Want(("text_len", "blocks.0.attn2.kv_proj")),
        attention_mask=ones("text_len"),
        conditioning_mt5xl=Want(("text_len_t5", "mlp_t5.0")),
        attention_mask_mt5xl=ones("text_len_t5"),
    ),
    "Lens": takes("txt_in"),
    "PixelDiTT2I": takes("y_embedder.proj"),
    "PiD": takes(
        lq_latent=signal("lq_proj.latent_channels", over("height", _UPSCALING), over("width", _UPSCALING)),
        degrade_sigma=ones(),
    ),
    "HiDreamO1": takes(
        text_input_ids=ids(QWEN_WORDS), reference_latents=signal("height", "width", 3, form=listed), multiple=32
    ),
    "Omnigen2": takes(
        "time_caption_embed.caption_embedder.0",
        attention_mask=ones("text_tokens"),
        reference_latents=encoded(form=listed),
    ),
    "JoyImage": takes("condition_embedder.text_embedder.linear_1"),
    "Ideogram4": takes("llm_cond_proj"),
    "ErnieImage": takes(_ernie_text),
}

_VIDEOS = {
    "CosmosVideo": takes("blocks.block0.blocks.1.block.attn.to_k.0"),
    "SeedVR2": takes("txt_in", condition=signal(times("channels", 1, 1), "frames", "height", "width")),
    "MiniMaxH3": takes(
        "condition_proj",
        latents=(
            ("latents_dim", "frames", "height", "width"),
            ("audio_latents_dim", 2, times("frames", 7)),
        ),
    ),
}

_SOUNDS = {
    "StableAudio1": takes("to_cond_embed.0"),
    "StableAudio3": takes("to_cond_embed.0", concat_latent_image=encoded(SOUND)),
    "ACEStep": takes("genre_embedder", conditioning_lyrics=ids("lyric_embs"), latents=(("channels", 16, "tokens"),)),
    "ACEStep15": takes(
        "encoder.text_projector",
        conditioning_lyrics=text("encoder.lyric_encoder.embed_tokens"),
        reference_audio_timbre_latents=encoded(SOUND, form=listed),
    ),
    "MiniMaxMusic3": takes(
        cross_attn=Want(("tokens", times("latent_conditioners.0", 8))), conditioning_scale=ones(1, 1)
    ),
}

_SHAPES = {
    "Hunyuan3Dv2": takes("cond_in"),
    "Hunyuan3Dv2_1": takes("blocks.0.attn2.to_k"),
    "TripoSplat": takes(
        cross_attn=Want((times("tokens", 1, 5), "cond_channels")),
        reference_latents=signal("cond2_channels", 1, "tokens", form=listed, only_with="cond_embedder2"),
        latents=(("q_token_length", "in_channels"), (1, "cam_channels")),
    ),
}

FAMILY = Family(
    name="comfyui-only",
    title="models that only ComfyUI runs",
    comfyui={**_IMAGES, **_VIDEOS, **_SOUNDS, **_SHAPES},
)
