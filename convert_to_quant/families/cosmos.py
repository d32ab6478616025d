"""Cosmos-Predict2, and Anima: the same network with an adapter behind the text encoder."""

from __future__ import annotations

from typing import Any

from . import running
from .base import Family, signature
from .comfyui import ids, ones, takes
from .rules import rules, under

PATCH = (1, 2, 2)
ROTARY_SCALE = (1.0, 4.0, 4.0)
"""Position scale for images; (1, 3, 3) for videos at 720p."""


def _config(shapes: running.Shapes) -> dict[str, Any]:
    projection = shapes.get("crossattn_proj.0.weight")
    block = "transformer_blocks.0"
    config = {
        **running.measured(shapes, area=4),  # the last input channel is the padding mask
        "concat_padding_mask": False,
        "mlp_ratio": shapes[f"{block}.ff.net.0.proj.weight"][0] / shapes["patch_embed.proj.weight"][0],
        "text_embed_dim": shapes[f"{block}.attn2.to_k.weight"][1],
        "adaln_lora_dim": shapes[f"{block}.norm1.linear_1.weight"][0],
        "patch_size": PATCH,
        "rope_scale": ROTARY_SCALE,
        "extra_pos_embed_type": None,
        "use_crossattn_projection": projection is not None,
    }
    if projection is not None:
        config |= {"crossattn_proj_in_channels": projection[1], "encoder_hidden_states_channels": projection[0]}
    return config


def _text(config: running.Config, geometry: running.Geometry) -> running.Signal | None:
    """Output of the text encoder, or of Anima's adapter, which does not run here."""
    width = "crossattn_proj_in_channels" if config["use_crossattn_projection"] else "text_embed_dim"
    return running.text(width)(config, geometry)


def _condition(config: running.Config, geometry: running.Geometry) -> running.Signal | None:
    """The first frames and their mask, in image-to-video models."""
    extra = config["in_channels"] - config["out_channels"] - 1
    return running.Signal((extra, *LATENTS(config, geometry)[1:])) if extra else None


def _arguments(inputs: running.Inputs) -> dict[str, Any]:
    """The padding mask is zero; the class would compute it with torchvision."""
    import torch

    arguments = inputs.usual()
    latents = arguments["hidden_states"]
    return {**arguments, "hidden_states": torch.cat([latents, torch.zeros_like(latents[:, :1])], 1)}


LATENTS = running.video("patch_size")

FAMILY = Family(
    name="cosmos-predict2",
    title="Cosmos-Predict2 (also Anima)",
    signatures=(
        signature("blocks.0.adaln_modulation_mlp blocks.0.cross_attn.q_proj x_embedder.proj final_layer.linear"),
        signature(
            "transformer_blocks.0.attn2.to_q transformer_blocks.0.norm1.linear_2 patch_embed.proj time_embed.norm"
        ),
    ),
    names=(
        *under("blocks.*.", "transformer_blocks.*.")(
            ("{self,cross}_attn.{q_proj,k_proj,v_proj,output_proj}", "attn{1,2}.{to_q,to_k,to_v,to_out.0}"),
            ("{self,cross}_attn.{q,k}_norm", "attn{1,2}.norm_{q,k}"),
            ("mlp.layer{1,2}", "ff.net.{0.proj,2}"),
            ("adaln_modulation_{self_attn,cross_attn,mlp}.{1,2}", "norm{1,2,3}.linear_{1,2}"),
        ),
        *rules(
            ("x_embedder.proj.1", "patch_embed.proj"),
            ("t_embedder.1.linear_{1,2}", "time_embed.t_embedder.linear_{1,2}"),
            ("t_embedding_norm", "time_embed.norm"),
            ("final_layer.linear", "proj_out"),
            ("final_layer.adaln_modulation.{1,2}", "norm_out.linear_{1,2}"),
        ),
    ),
    architecture=running.Architecture(
        transformer="CosmosTransformer3DModel",
        config=_config,
        latents=LATENTS,
        wants={"encoder_hidden_states": _text, running.CONDITION_LATENTS: _condition},
        arguments=_arguments,
        optional=r"llm_adapter\..*",
    ),
    comfyui={
        "CosmosPredict2": takes("blocks.0.cross_attn.k_proj"),
        "Anima": takes(
            "llm_adapter.blocks.0.cross_attn.k_proj",
            t5xxl_ids=ids("llm_adapter.embed", form=lambda values: values[0]),
            t5xxl_weights=ones("text_tokens", form=lambda values: values[0]),
        ),
    },
    variants=(("Anima", signature("llm_adapter")), ("Cosmos-Predict2", signature("blocks.0"))),
)
