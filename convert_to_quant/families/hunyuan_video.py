"""HunyuanVideo: Flux.1's blocks and a refiner of the text tokens. musubi quantizes the blocks, modulation included."""

from __future__ import annotations

import math
from typing import Any

from . import comfyui, flux1
from .base import CONDITION, FINAL, IMAGE, REFINER, TEXT, VECTOR, Family, signature
from .rules import QKV, rules, turned, under
from .running import CONDITION_LATENTS, Architecture, Shapes, beside, blocks, guidance, mask, text, vector, video

GUIDANCE = 6.0
"""Guidance that the distilled model is told; its pipeline's default."""

# Spellings of whole layers that two kinds of checkpoint use for the same layer: the authors', then ComfyUI's. Either
# may be the checkpoint's.
SPELLINGS = (
    *under("double_blocks.*.{img,txt}_")(
        ("attn_{qkv,proj}", "attn.{qkv,proj}"),
        ("mod.linear", "mod.lin"),
        ("mlp.fc{1,2}", "mlp.{0,2}"),
    ),
    *under("txt_in.individual_token_refiner.blocks.*.")(
        ("self_attn_{qkv,proj}", "self_attn.{qkv,proj}"),
        ("mlp.fc{1,2}", "mlp.{0,2}"),
    ),
    *rules(
        ("single_blocks.*.modulation.linear", "single_blocks.*.modulation.lin"),
        ("txt_in.t_embedder.mlp.{0,2}", "txt_in.t_embedder.{in,out}_layer"),
        ("txt_in.c_embedder.linear_{1,2}", "txt_in.c_embedder.{in,out}_layer"),
        ("{time,guidance}_in.mlp.{0,2}", "{time,guidance}_in.{in,out}_layer"),
    ),
)
# ComfyUI's names of norms, as it finds them and as its ModelSave writes them, then the authors'.
NORM_SPELLINGS = rules(
    (
        "double_blocks.*.{img,txt}_attn.norm.{query,key}_norm.{scale,weight}",
        "double_blocks.*.{img,txt}_attn_{q,k}_norm.{weight,weight}",
    ),
    ("single_blocks.*.norm.{query,key}_norm.{scale,weight}", "single_blocks.*.{q,k}_norm.{weight,weight}"),
)

# By ComfyUI's names.
NAMES = (
    *under("txt_in.individual_token_refiner.blocks.*.", "context_embedder.token_refiner.refiner_blocks.*.")(
        ("self_attn.qkv", "attn.to_{q,k,v}", QKV),
        ("self_attn.proj", "attn.to_out.0"),
        ("mlp.{0,2}", "ff.net.{0.proj,2}"),
        ("adaLN_modulation.1", "norm_out.linear"),
    ),
    *under("txt_in.", "context_embedder.")(
        ("input_embedder", "proj_in"),
        ("{t,c}_embedder.{in,out}_layer", "time_text_embed.{timestep,text}_embedder.linear_{1,2}"),
    ),
)


def _config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels, *patch = shapes["x_embedder.proj.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    out_channels = shapes["proj_out.weight"][0] // math.prod(patch)
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": blocks(shapes, "transformer_blocks."),
        "num_single_layers": blocks(shapes, "single_transformer_blocks."),
        "num_refiner_layers": blocks(shapes, "context_embedder.token_refiner.refiner_blocks."),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / hidden,
        "patch_size": patch[1],
        "patch_size_t": patch[0],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "rope_axes_dim": flux1.rotary_axes(head),
        "image_condition_type": "latent_concat" if in_channels > out_channels else None,
    }


LATENTS = video("patch_size_t", "patch_size", "patch_size")
_VIDEO_BESIDE = comfyui.takes(concat_latent_image=comfyui.encoded(comfyui.VIDEO))
_GLYPHS = comfyui.text("byt5_in.fc1", only_with="byt5_in.fc1")

FAMILY = Family(
    name="hunyuan-video",
    title="HunyuanVideo 1.0 and 1.5 (also HunyuanImage 2.1, FramePack)",
    signatures=(
        signature("double_blocks.0 txt_in.individual_token_refiner"),
        signature("transformer_blocks.0.attn.add_q_proj context_embedder.token_refiner"),
    ),
    blocks=flux1.BLOCKS,
    keep={
        r"img_in": IMAGE,
        r"txt_in\.individual_token_refiner|context_embedder\.token_refiner": REFINER,
        r"txt_in": TEXT,
        r"time_in|time_r_in|vector_in|guidance_in": VECTOR,
        r"byt5_in|vision_in|cond_type_embedding|image_embedder|image_projection|cond_type_embed": CONDITION,
        r"final_layer": FINAL,
        **flux1.DIFFUSERS_ENDS,
    },
    names=(*NAMES, *flux1.NAMES),
    spellings=SPELLINGS,
    architecture=Architecture(
        transformer="HunyuanVideoTransformer3DModel",
        converter="convert_hunyuan_video_transformer_to_diffusers",
        native="x_embedder.proj.weight",
        config=_config,
        latents=LATENTS,
        wants={
            "encoder_hidden_states": text("text_embed_dim"),
            "encoder_attention_mask": mask,
            "pooled_projections": vector("pooled_projection_dim"),
            CONDITION_LATENTS: beside(LATENTS, 0),
            "guidance": guidance(1000 * GUIDANCE),
        },
        arguments=lambda inputs: inputs.usual(1000),
        fused=(flux1.SINGLE_BLOCKS,),
        spellings=(*turned(SPELLINGS), *NORM_SPELLINGS),
    ),
    comfyui={
        "HunyuanVideo": comfyui.takes(
            "txt_in.input_embedder",
            pooled_output=comfyui.pooled("vector_in.in_layer", only_with="vector_in.in_layer"),
            conditioning_byt5small=_GLYPHS,
            clip_vision_output=comfyui.vision("vision_in.proj.1", tokens=729),
            settings={"pooled_output": None},
        ),
        "HunyuanVideo15": _VIDEO_BESIDE,
        "HunyuanVideo15_SR_Distilled": comfyui.takes(
            concat_latent_image=comfyui.signal(comfyui.times("channels", 2, 2), "frames", "height", "width")
        ),
        "HunyuanVideoI2V": _VIDEO_BESIDE,
        "HunyuanVideoSkyreelsI2V": _VIDEO_BESIDE,
        "HunyuanImage21": comfyui.takes("txt_in.input_embedder", conditioning_byt5small=_GLYPHS),
        "HunyuanImage21Refiner": _VIDEO_BESIDE,
    },
)
