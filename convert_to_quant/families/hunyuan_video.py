"""HunyuanVideo: Flux.1's blocks and a refiner of text tokens. musubi quantizes the blocks, modulation included."""

from __future__ import annotations

from typing import Any

from . import comfyui, flux1, running
from .base import CONDITION, REFINER, Family, signature
from .rules import QKV, rules, under

GUIDANCE, IMAGE_GUIDANCE = 6.0, 3.5
"""Guidance scale of distilled models, for videos and for images: their pipelines' defaults."""

IMAGE_TOKENS = 729
"""SigLIP's 27 by 27 patches of the first frame; zeros for text-to-video."""

# Names of whole layers: the authors', then ComfyUI's. A checkpoint may use either.
SPELLINGS = (
    *under("double_blocks.*.{img,txt}_")(
        ("attn_{qkv,proj}", "attn.{qkv,proj}"),
        ("attn_{q,k}_norm", "attn.norm.{query,key}_norm"),
        ("mod.linear", "mod.lin"),
        ("mlp.fc{1,2}", "mlp.{0,2}"),
    ),
    *under("txt_in.individual_token_refiner.blocks.*.")(
        ("self_attn_{qkv,proj}", "self_attn.{qkv,proj}"),
        ("mlp.fc{1,2}", "mlp.{0,2}"),
    ),
    *rules(
        ("single_blocks.*.modulation.linear", "single_blocks.*.modulation.lin"),
        ("single_blocks.*.{q,k}_norm", "single_blocks.*.norm.{query,key}_norm"),
        ("txt_in.t_embedder.mlp.{0,2}", "txt_in.t_embedder.{in,out}_layer"),
        ("txt_in.c_embedder.linear_{1,2}", "txt_in.c_embedder.{in,out}_layer"),
        ("{time,guidance}_in.mlp.{0,2}", "{time,guidance}_in.{in,out}_layer"),
    ),
)
# From ComfyUI's names.
NAMES = (
    *under("txt_in.individual_token_refiner.blocks.*.", "context_embedder.token_refiner.refiner_blocks.*.")(
        ("self_attn.qkv", "attn.to_{q,k,v}", QKV),
        ("self_attn.proj", "attn.to_out.0"),
        ("mlp.{0,2}", "ff.net.{0.proj,2}"),
        ("adaLN_modulation.1", "norm_out.linear"),
        ("norm{1,2}", "norm{1,2}"),
    ),
    *under("txt_in.", "context_embedder.")(
        ("input_embedder", "proj_in"),
        ("{t,c}_embedder.{in,out}_layer", "time_text_embed.{timestep,text}_embedder.linear_{1,2}"),
    ),
    *rules(
        ("img_in.proj", "x_embedder.proj"),
        ("byt5_in.{layernorm,fc1,fc2,fc3}", "context_embedder_2.{norm,linear_1,linear_2,linear_3}"),
        ("vision_in.proj.{0,1,3,4}", "image_embedder.{norm_in,linear_1,linear_2,norm_out}"),
        ("cond_type_embedding", "cond_type_embed"),
    ),
)


def _config(shapes: running.Shapes) -> dict[str, Any]:
    hidden, _, *patch = shapes["x_embedder.proj.weight"]
    config = running.measured(shapes)
    return {
        **config,
        "num_refiner_layers": running.blocks(shapes, "context_embedder.token_refiner.refiner_blocks."),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / hidden,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "patch_size_t": patch[0],
        "patch_size": patch[-1],
        "rope_axes_dim": running.rotary_axes(config["attention_head_dim"]),
    }


def _video_config(shapes: running.Shapes) -> dict[str, Any]:
    config = _config(shapes)
    return {
        **config,
        "num_single_layers": running.blocks(shapes, "single_transformer_blocks."),
        "guidance_embeds": running.has(shapes, "guidance_embedder"),
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "image_condition_type": "latent_concat" if config["in_channels"] > config["out_channels"] else None,
    }


def _second_text(shapes: running.Shapes) -> dict[str, Any]:
    """Configuration entries of HunyuanImage 2.1 and HunyuanVideo 1.5."""
    glyphs = shapes.get("context_embedder_2.linear_1.weight", (0, None))
    return {"text_embed_2_dim": glyphs[1], "use_meanflow": running.has(shapes, "timestep_embedder_r")}


def _image_config(shapes: running.Shapes) -> dict[str, Any]:
    config, patch = _config(shapes), shapes["x_embedder.proj.weight"][2:]
    del config["patch_size_t"]
    head = config["attention_head_dim"]
    return {
        **config,
        **_second_text(shapes),
        "num_single_layers": running.blocks(shapes, "single_transformer_blocks."),
        "patch_size": patch,
        "guidance_embeds": running.has(shapes, "guidance_embedder"),
        "rope_axes_dim": (head // 2, head // 2) if len(patch) == 2 else config["rope_axes_dim"],
    }


def _video_15_config(shapes: running.Shapes) -> dict[str, Any]:
    image = shapes["image_embedder.linear_1.weight"]
    return {**_config(shapes), **_second_text(shapes), "image_embed_dim": image[1]}


def _image_latents(config: running.Config, geometry: running.Geometry) -> tuple[int, ...]:
    *time, height, width = config["patch_size"]
    frames = tuple(patch * geometry.frames for patch in time)
    return config["out_channels"], *frames, height * geometry.height, width * geometry.width


_TEXTS = {
    "encoder_hidden_states": running.text("text_embed_dim"),
    "encoder_attention_mask": running.mask,
    # ByT5's encoding of text to be rendered in the image
    "encoder_hidden_states_2": running.if_there("text_embed_2_dim", running.text("text_embed_2_dim")),
    "encoder_attention_mask_2": running.if_there("text_embed_2_dim", running.mask),
}
LATENTS = running.video("patch_size_t", "patch_size", "patch_size")
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
        r"txt_in\.individual_token_refiner|context_embedder\.token_refiner": REFINER,
        r"byt5_in|context_embedder_2|vision_in|cond_type_embed(?:ding)?|image_embedder|image_projection": CONDITION,
    },
    names=(*NAMES, *flux1.NAMES),
    spellings=SPELLINGS,
    architecture=running.Architecture(
        transformer="HunyuanVideoTransformer3DModel",
        config=_video_config,
        latents=LATENTS,
        wants={
            "encoder_hidden_states": running.text("text_embed_dim"),
            "encoder_attention_mask": running.mask,
            "pooled_projections": running.vector("pooled_projection_dim"),
            running.CONDITION_LATENTS: running.beside(LATENTS, 0),
            "guidance": running.guidance(1000 * GUIDANCE),
        },
        arguments=lambda inputs: inputs.usual(1000),
        optional=r"(?:clean_x_embedder|image_projection)\..*",  # FramePack's earlier frames and its image
    ),
    architectures={
        "HunyuanVideo 1.5": running.Architecture(
            transformer="HunyuanVideo15Transformer3DModel",
            config=_video_15_config,
            latents=LATENTS,
            wants={
                **_TEXTS,
                "image_embeds": running.text("image_embed_dim", IMAGE_TOKENS),
                running.CONDITION_LATENTS: running.beside(LATENTS, 0),
            },
            arguments=lambda inputs: inputs.usual(1000),
            names=rules(("time_in.{in,out}_layer", "time_embed.timestep_embedder.linear_{1,2}")),
        ),
        "HunyuanImage 2.1": running.Architecture(
            transformer="HunyuanImageTransformer2DModel",
            config=_image_config,
            latents=_image_latents,
            wants={
                **_TEXTS,
                running.CONDITION_LATENTS: running.beside(_image_latents, 0),
                "guidance": running.guidance(1000 * IMAGE_GUIDANCE),
            },
            arguments=lambda inputs: inputs.usual(1000),
            names=rules(
                (
                    "{time,time_r,guidance}_in.{in,out}_layer",
                    "time_guidance_embed.{timestep_embedder,timestep_embedder_r,guidance_embedder}.linear_{1,2}",
                ),
            ),
        ),
    },
    comfyui={
        "HunyuanVideo": comfyui.takes(
            "txt_in.input_embedder",
            pooled_output=comfyui.pooled("vector_in.in_layer", only_with="vector_in.in_layer"),
            conditioning_byt5small=_GLYPHS,
            clip_vision_output=comfyui.vision("vision_in.proj.1", tokens=IMAGE_TOKENS),
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
    variants=(
        ("FramePack", signature("clean_x_embedder")),
        ("HunyuanVideo 1.5", signature("cond_type_embedding|cond_type_embed")),
        ("HunyuanImage 2.1", signature("byt5_in|time_r_in|time_guidance_embed")),
        ("HunyuanImage 2.1", signature(size=(r"(?:img_in|x_embedder)\.proj\.weight", 1, (64,)))),
        ("HunyuanVideo", signature("")),
    ),
    folds=flux1.FOLDS,
)
