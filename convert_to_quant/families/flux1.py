"""Flux.1, and what related models share with it: blocks with two token streams, then blocks with one.

ModelOpt quantizes the modulation of Flux.1 (27 % of its weights); musubi keeps it, for training. FP8 weights are safe
in a layer with one input vector per image: calibration makes its matmul full precision.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from . import comfyui, running
from .base import Family, signature
from .folds import given, modulated
from .rules import QKV, QKV_MLP, QKV_OF_MLP, SHIFT_SCALE, rules, under

GUIDANCE = 3.5
"""Guidance scale of distilled models: their pipelines' default."""

# The blocks in the authors' names (also of Chroma and HunyuanVideo), and in diffusers' names.
BLOCKS = r"(?:double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.\d+"

FINAL_NAMES = rules(
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear", SHIFT_SCALE),
)
# Shared by Flux.1 and 2, whose norms end in ".scale" and ".weight".
ATTENTION_NAMES = (
    *under("double_blocks.*.", "transformer_blocks.*.")(
        ("img_attn.qkv", "attn.to_{q,k,v}", QKV),
        ("txt_attn.qkv", "attn.add_{q,k,v}_proj", QKV),
        ("{img,txt}_attn.proj", "attn.to_{out.0,add_out}"),
        ("{img,txt}_attn.norm.{query,key}_norm", "attn.norm_{,added_}{q,k}"),
    ),
    *rules(
        ("single_blocks.*.norm.{query,key}_norm", "single_transformer_blocks.*.attn.norm_{q,k}"),
        ("{img,txt}_in", "{x,context}_embedder"),
    ),
    *FINAL_NAMES,
)
BLOCK_NAMES = (
    *ATTENTION_NAMES,
    *under("double_blocks.*.", "transformer_blocks.*.")(
        ("{img,txt}_mod.lin", "norm1{,_context}.linear"),
        ("{img,txt}_mlp.{0,2}", "ff{,_context}.net.{0.proj,2}"),
    ),
    *under("single_blocks.*.", "single_transformer_blocks.*.")(
        ("linear1", "{attn.to_q,attn.to_k,attn.to_v,proj_mlp}", QKV_MLP),
        ("linear2", "proj_out"),
        ("modulation.lin", "norm.linear"),
    ),
)
NAMES = (
    *BLOCK_NAMES,
    *rules(
        ("{time,vector,guidance}_in.{in,out}_layer", "time_text_embed.{timestep,text,guidance}_embedder.linear_{1,2}"),
    ),
)


DOUBLE, SINGLE = "transformer_blocks.*.", "single_transformer_blocks.*."
JOINT_VALUES = given(DOUBLE + "attn.{to_v,add_v_proj}", DOUBLE + "attn.{to_out.0,to_add_out}")
"""Attention over two token streams."""
VALUES = (JOINT_VALUES, given(SINGLE + "attn.to_v", SINGLE + "proj_out", columns="first"))
FOLDS = (
    modulated(DOUBLE + "norm1.linear", DOUBLE + "attn.to_{q,k,v}"),
    modulated(DOUBLE + "norm1.linear", DOUBLE + "ff.net.0.proj", shift=3),
    modulated(DOUBLE + "norm1_context.linear", DOUBLE + "attn.add_{q,k,v}_proj"),
    modulated(DOUBLE + "norm1_context.linear", DOUBLE + "ff_context.net.0.proj", shift=3),
    modulated(SINGLE + "norm.linear", SINGLE + "{attn.to_q,attn.to_k,attn.to_v,proj_mlp}"),
    *VALUES,
)


def common_config(shapes: running.Shapes, *inputs: str, lacks: Collection[str] = ()) -> dict[str, Any]:
    """Configuration entries of Flux.1, Flux.2 and Chroma."""
    config = running.measured(shapes, "joint_attention_dim", *inputs, lacks=lacks)
    return {
        **config,
        "patch_size": 1,
        "num_single_layers": running.blocks(shapes, "single_transformer_blocks."),
        "axes_dims_rope": running.rotary_axes(config["attention_head_dim"]),
    }


def _config(shapes: running.Shapes) -> dict[str, Any]:
    return {
        **common_config(shapes, "pooled_projection_dim"),
        "guidance_embeds": running.has(shapes, "guidance_embedder"),
    }


LATENTS = running.tokens("out_channels")
WANTS = {
    "encoder_hidden_states": running.text("joint_attention_dim"),
    running.CONDITION_LATENTS: running.beside(LATENTS, 1),
}


def arguments(inputs: running.Inputs) -> dict[str, Any]:
    """Positions are (index, row, column), 0 for text."""
    return {**inputs.usual(channels=-1), "img_ids": inputs.image_ids(3), "txt_ids": inputs.text_ids(3)}


FAMILY = Family(
    name="flux1",
    title="Flux.1 (dev, schnell, Kontext, Fill, Krea)",
    signatures=(
        signature(
            "double_blocks.0.img_attn img_in txt_in time_in vector_in",
            lacks="txt_in.individual_token_refiner distilled_guidance_layer double_stream_modulation_img",
        ),
        signature(
            "transformer_blocks.0.attn.add_q_proj single_transformer_blocks.0.attn",
            "time_text_embed.text_embedder x_embedder.weight",
            lacks="context_embedder.token_refiner distilled_guidance_layer",
        ),
    ),
    blocks=BLOCKS,
    names=NAMES,
    # XLabs' attention processors (the suffix of `qkv_lora.down` includes "_lora"), ComfyUI's name for a single block's
    # attention rows, and DiffSynth's names, without `final_norm_out.linear`, whose halves come in either order.
    lora=(
        *under("double_blocks.*.", "double_blocks.*.processor.")(
            ("{img,txt}_attn.qkv", "qkv_lora{1,2}"),
            ("{img,txt}_attn.proj", "proj_lora{1,2}"),
        ),
        *under("single_blocks.*.")(
            ("linear1", "processor.qkv", QKV_OF_MLP),
            ("linear1", "linear1_qkv", QKV_OF_MLP),
            ("linear2", "processor.proj"),
            ("linear1", "to_qkv_mlp"),
            ("linear2", "proj_out"),
            ("modulation.lin", "norm.linear"),
        ),
        *under("double_blocks.*.", "blocks.*.")(
            ("{img,txt}_attn.qkv", "attn.{a,b}_to_qkv"),
            ("img_attn.qkv", "attn.a_to_{q,k,v}", QKV),
            ("txt_attn.qkv", "attn.b_to_{q,k,v}", QKV),
            ("{img,txt}_attn.proj", "attn.{a,b}_to_out"),
            ("{img,txt}_mlp.{0,2}", "ff_{a,b}.{0,2}"),
            ("{img,txt}_mod.lin", "norm1_{a,b}.linear"),
        ),
        *rules(
            ("{time,guidance}_in.{in,out}_layer", "{time,guidance}_embedder.timestep_embedder.{0,2}"),
            ("vector_in.{in,out}_layer", "pooled_text_embedder.{0,2}"),
            ("final_layer.linear", "final_proj_out"),
        ),
    ),
    architecture=running.Architecture(
        transformer="FluxTransformer2DModel",
        config=_config,
        latents=LATENTS,
        wants={
            **WANTS,
            "pooled_projections": running.vector("pooled_projection_dim"),
            "guidance": running.guidance(GUIDANCE),
        },
        arguments=arguments,
    ),
    comfyui={
        "Flux": comfyui.takes(
            "txt_in",
            pooled_output=comfyui.pooled("vector_in.in_layer", only_with="vector_in.in_layer"),
            concat_latent_image=comfyui.encoded(),
        )
    },
    variants=(
        ("Fill", signature(size=(r"(?:img_in|x_embedder)\.weight", 1, (384,)))),
        ("Depth or Canny", signature(size=(r"(?:img_in|x_embedder)\.weight", 1, (128,)))),
        ("Kontext, Krea or dev", signature("guidance_in|time_text_embed.guidance_embedder")),
        ("schnell", signature(size=(r"(?:img_in|x_embedder)\.weight", 0, (3072,)))),
    ),
    folds=FOLDS,
)
