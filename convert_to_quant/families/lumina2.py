"""Lumina-Image 2, and what Z-Image shares with it: the same network with another modulation.

musubi quantizes the weights of refiners, dit-quantizer keeps them, silveroxides has a preset for it; with FP8
activations it is safer to keep them, an eighth of the weights. musubi and silveroxides keep the modulation, which is
small: 256 inputs.
"""

from __future__ import annotations

import operator
from typing import Any

from . import comfyui
from .base import CONDITION, FINAL, MODULATION, REFINER, TEXT, Family, signature
from .folds import given, normed
from .rules import QKV, rules, under
from .running import Architecture, Shapes, blocks, mask, text

PATCH = 2
BLOCKS = r"layers\.\d+"
TOWERS = "{layers,noise_refiner,context_refiner}.*."
KEEP = {
    r"time_caption_embed\.caption_embedder": TEXT,
    r"siglip_embedder": CONDITION,
    r"noise_refiner|context_refiner|siglip_refiner": REFINER,
    r"layers\.\d+\.(?:adaLN_modulation|norm1)": MODULATION,
    r"all_final_layer|dec_net": FINAL,
}
NAMES = (
    *under(TOWERS)(
        ("attention.qkv", "attn.to_{q,k,v}", QKV),
        ("attention.out", "attn.to_out.0"),
        ("attention.{q,k}_norm", "attn.norm_{q,k}"),
        ("attention_norm2", "norm2"),
        ("feed_forward.w{1,2,3}", "feed_forward.linear_{1,2,3}"),
        ("adaLN_modulation.1", "norm1.linear"),
    ),
    *rules(
        ("{layers,noise_refiner}.*.attention_norm1", "{layers,noise_refiner}.*.norm1.norm"),
        ("context_refiner.*.attention_norm1", "context_refiner.*.norm1"),
        ("cap_embedder.{0,1}", "time_caption_embed.caption_embedder.{0,1}"),
        ("t_embedder.mlp.{0,2}", "time_caption_embed.timestep_embedder.linear_{1,2}"),
        ("final_layer.{adaLN_modulation.1,linear}", "norm_out.linear_{1,2}"),
    ),
)


def _config(shapes: Shapes) -> dict[str, Any]:
    hidden, patched = shapes["x_embedder.weight"]
    head = shapes["layers.0.attn.norm_q.weight"][0]
    return {
        "patch_size": PATCH,
        "in_channels": patched // PATCH**2,
        "out_channels": shapes["norm_out.linear_2.weight"][0] // PATCH**2,
        "hidden_size": hidden,
        "num_layers": blocks(shapes, "layers."),
        "num_refiner_layers": blocks(shapes, "noise_refiner."),
        "num_attention_heads": hidden // head,
        "num_kv_heads": shapes["layers.0.attn.to_k.weight"][0] // head,
        # The class rounds 4 · hidden · multiplier down, then up to a multiple; half a row more makes both exact.
        "multiple_of": 1,
        "ffn_dim_multiplier": (shapes["layers.0.feed_forward.linear_1.weight"][0] + 0.5) / (4 * hidden),
        "axes_dim_rope": (head // 3,) * 3,
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.1.weight"][1],
    }


FAMILY = Family(
    name="lumina2",
    title="Lumina-Image 2.0 (also NewBie)",
    signatures=(
        signature("noise_refiner.0.attention cap_embedder layers.0.adaLN_modulation.1 layers.0.feed_forward.w1"),
        signature(
            ("noise_refiner.0.attn.to_q context_refiner.0.attn.to_q time_caption_embed layers.0.norm1.linear"),
            lacks="ref_image_refiner",
        ),  # unlike OmniGen 2
    ),
    blocks=BLOCKS,
    keep=KEEP,
    names=NAMES,
    architecture=Architecture(
        transformer="Lumina2Transformer2DModel",
        config=_config,
        wants={"encoder_hidden_states": text("cap_feat_dim"), "encoder_attention_mask": mask},
        arguments=lambda inputs: inputs.usual(-1, 1),  # time is 0 for noise, and the output points to the image
        velocity=operator.neg,
        ignored=("norm_final.weight",),
        optional=r"(?:clip_text_pooled_proj|time_text_embed)\..*",  # NewBie's pooled text
    ),
    comfyui={
        "Lumina2": comfyui.takes(
            "cap_embedder.1",
            pooled_output=comfyui.pooled("clip_text_pooled_proj.0", only_with="clip_text_pooled_proj.0"),
        )
    },
    variants=(
        ("NewBie", signature("clip_text_pooled_proj")),
        ("Lumina-Image 2.0", signature("context_refiner")),
    ),
    folds=(
        normed("layers.*.norm1.norm", "layers.*.attn.to_{q,k,v}"),
        normed("layers.*.ffn_norm1", "layers.*.feed_forward.linear_{1,3}"),
        given("layers.*.attn.to_v", "layers.*.attn.to_out.0", head="layers.*.attn.norm_q"),
        given("layers.*.feed_forward.linear_3", "layers.*.feed_forward.linear_2"),
    ),
)
