"""HiDream-I1: blocks with two streams, then with one; MLPs are experts chosen by a router."""

from __future__ import annotations

import operator
from typing import Any

from . import comfyui
from .base import Family, signature
from .running import Architecture, Config, Geometry, Inputs, Shapes, Signal, blocks, measured, vector

HEAD = 128
"""Channels of an attention head (norms span all heads); narrow models may have fewer."""

ACTIVE = 2
"""Experts per token."""


def _config(shapes: Shapes) -> dict[str, Any]:
    double, single = blocks(shapes, "double_stream_blocks."), blocks(shapes, "single_stream_blocks.")
    experts = shapes["double_stream_blocks.0.block.ff_i.gate.weight"][0]
    config = measured(shapes, area=4, head=HEAD, end="final_layer.linear")
    head = config["attention_head_dim"]
    return {
        **config,
        "patch_size": 2,
        "num_layers": double,
        "num_single_layers": single,
        "caption_channels": [shapes[f"caption_projection.{place}.linear.weight"][1] for place in (double + single, 0)],
        "text_emb_dim": shapes["p_embedder.pooled_embedder.linear_1.weight"][1],
        "num_routed_experts": experts,
        "num_activated_experts": min(ACTIVE, experts),
        "axes_dims_rope": (head // 2, head // 4, head // 4),
        "llama_layers": list(range(double + single)),
    }


def _t5(config: Config, geometry: Geometry) -> Signal:
    return Signal((geometry.text_tokens, config["caption_channels"][0]))


def _llama(config: Config, geometry: Geometry) -> Signal:
    """One layer of Llama for each block."""
    return Signal((len(config["llama_layers"]), geometry.text_tokens, config["caption_channels"][1]))


def _arguments(inputs: Inputs) -> dict[str, Any]:
    arguments = inputs.usual()
    del arguments["timestep"]
    layers = arguments["encoder_hidden_states_llama3"].movedim(1, 0)
    return {**arguments, "timesteps": inputs.time(1000), "encoder_hidden_states_llama3": layers}


def _last_caption(scene: comfyui.Scene) -> int:
    """Features of T5: the last projection."""
    return comfyui.measure(f"caption_projection.{len(scene.part('caption_projection')) - 1}.linear", scene)


def _llama_layers(scene: comfyui.Scene) -> int:
    """Layers of Llama, up to the last one used."""
    return int(max(scene.part("llama_layers"))) + 1


FAMILY = Family(
    name="hidream",
    title="HiDream-I1",
    signatures=(signature("double_stream_blocks.0.block.attn1 single_stream_blocks.0.block caption_projection.0"),),
    architecture=Architecture(
        transformer="HiDreamImageTransformer2DModel",
        config=_config,
        wants={
            "encoder_hidden_states_t5": _t5,
            "encoder_hidden_states_llama3": _llama,
            "pooled_embeds": vector("text_emb_dim"),
        },
        arguments=_arguments,
        velocity=operator.neg,
    ),
    comfyui={
        "HiDream": comfyui.takes(
            _last_caption,
            pooled_output=comfyui.pooled("p_embedder.pooled_embedder.linear_1"),
            conditioning_llama3=comfyui.Want((_llama_layers, "text_tokens", "caption_projection.0.linear")),
        )
    },
)
