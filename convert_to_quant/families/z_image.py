"""Z-Image: Lumina 2's network with its own names in diffusers, where "2-1" is its patch size, 2 in space, 1 in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import lumina2
from .base import Family, signature
from .folds import given, normed
from .rules import QKV, rules, under
from .running import Architecture, Inputs, Shapes, blocks, rotary_axes, text

if TYPE_CHECKING:
    from torch import Tensor


def _config(shapes: Shapes) -> dict[str, Any]:
    hidden, patched = shapes["all_x_embedder.2-1.weight"]
    head = shapes["layers.0.attention.norm_q.weight"][0]
    return {
        "in_channels": patched // lumina2.PATCH**2,
        "dim": hidden,
        "n_layers": blocks(shapes, "layers."),
        "n_refiner_layers": blocks(shapes, "noise_refiner."),
        "n_heads": hidden // head,
        "n_kv_heads": hidden // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "axes_dims": list(rotary_axes(head, 6)),
    }


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """Samples are a list of videos of one frame; time is 0 for noise."""
    return {
        "x": list(inputs.latents.unsqueeze(2)),
        "t": inputs.time(-1, 1),
        "cap_feats": list(inputs.conditioning["cap_feats"]),
    }


def _velocity(output: list[Tensor]) -> Tensor:
    import torch

    return -torch.stack(output).squeeze(2)


FAMILY = Family(
    name="z-image",
    title="Z-Image (Base, Turbo, Edit)",
    signatures=(
        signature("noise_refiner.0.attention cap_embedder layers.0.adaLN_modulation.0 layers.0.feed_forward.w1"),
    ),
    blocks=lumina2.BLOCKS,
    keep=lumina2.KEEP,
    names=(
        *under(lumina2.TOWERS)(
            ("attention.qkv", "attention.to_{q,k,v}", QKV),
            ("attention.out", "attention.to_out.0"),
            ("attention.{q,k}_norm", "attention.norm_{q,k}"),
        ),
        *rules(
            ("x_embedder", "all_x_embedder.2-1"),
            ("final_layer.{linear,adaLN_modulation.1}", "all_final_layer.2-1.{linear,adaLN_modulation.1}"),
        ),
    ),
    architecture=Architecture(
        transformer="ZImageTransformer2DModel",
        config=_config,
        wants={"cap_feats": text("cap_feat_dim")},
        arguments=_arguments,
        velocity=_velocity,
        ignored=("norm_final.weight",),
    ),
    folds=(
        normed("layers.*.attention_norm1", "layers.*.attention.to_{q,k,v}"),
        normed("layers.*.ffn_norm1", "layers.*.feed_forward.{w1,w3}"),
        given("layers.*.attention.to_v", "layers.*.attention.to_out.0"),
        given("layers.*.feed_forward.w3", "layers.*.feed_forward.w2"),
    ),
)
