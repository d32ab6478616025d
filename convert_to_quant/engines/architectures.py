"""What running a family of models takes, as data: its diffusers class, its configuration, and its inputs.

Why it exists. diffusers can run every family here, but asks for a configuration file from the internet and for inputs
that a pipeline prepares. Both follow from the checkpoint itself: sizes are tensor shapes, and the inputs of a
transformer are latents, a time and some conditioning, packed in one of a few ways.

How it works. An `Architecture` holds, for a family of `convert_to_quant.families`: the transformer class and its
single-file converter by name, a function from shapes to the class's configuration, the shapes of latents and of every
conditioning tensor, and a function that makes the arguments of `forward` from them. Conditioning tensors have the
names that the class's `forward` gives them.

Conventions. sigma runs from 1 (noise) to 0. Latents have the layout that the class takes, tokens or maps, without its
extra condition channels. A velocity points from the picture to the noise: x_sigma = (1 - sigma) x_0 + sigma noise,
velocity = noise - x_0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .noise import Geometry, Signal
from .provenance import Fused, Shapes, qkv_mlp_rows

Config = Mapping[str, Any]

GUIDANCE = 3.5
"""Guidance that distilled models are told; their pipelines' default."""


@dataclass(frozen=True)
class Inputs:
    """One evaluation of a model.

    Attributes:
        config: the model's configuration.
        geometry: of the latents.
        latents: [batch, *latent shape].
        sigma: noise level, one for the whole batch.
        conditioning: by name, each [batch, ...].
    """

    config: Config
    geometry: Geometry
    latents: Tensor
    sigma: float
    conditioning: Mapping[str, Tensor]

    def time(self, scale: float = 1.0) -> Tensor:
        """The noise level times `scale` for every sample, [batch], in the latents' dtype."""
        return torch.full(
            (len(self.latents),), self.sigma * scale, dtype=self.latents.dtype, device=self.latents.device
        )


@dataclass(frozen=True)
class Architecture:
    """How one family is run.

    Attributes:
        transformer: name of the class in `diffusers`.
        converter: name of the function in `diffusers.loaders.single_file_utils`; None where names agree already.
        config: arguments of the class, from the bare tensors' shapes.
        latents: shape of a sample's latents.
        signals: the conditioning tensors.
        arguments: arguments of the class's `forward`.
        velocity: the velocity in what `forward` gives; as it is, for most.
        fused: what the converter splits at published row numbers.
    """

    transformer: str
    converter: str | None
    config: Callable[[Shapes], dict[str, Any]]
    latents: Callable[[Config, Geometry], tuple[int, ...]]
    signals: Callable[[Config, Geometry], dict[str, Signal]]
    arguments: Callable[[Inputs], dict[str, Any]]
    velocity: Callable[[Any], Tensor] = lambda output: output
    fused: tuple[Fused, ...] = ()


def blocks(shapes: Shapes, prefix: str) -> int:
    """Number of blocks under a prefix such as "double_blocks."."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
    return len(numbers)


def image_ids(geometry: Geometry, device: torch.device) -> Tensor:
    """Positions of image tokens: (0, row, column), float32 [height · width, 3]."""
    rows = torch.arange(geometry.height, device=device).repeat_interleave(geometry.width)
    columns = torch.arange(geometry.width, device=device).repeat(geometry.height)
    return torch.stack([torch.zeros_like(rows), rows, columns], 1).float()


# --- Flux.1 ----------------------------------------------------------------------------------------------------------


def _flux_1_axes(head: int) -> tuple[int, int, int]:
    """How a head's rotary dimensions are shared between index, row and column: (16, 56, 56) for 128.

    >>> _flux_1_axes(128)
    (16, 56, 56)
    """
    side = 2 * (7 * head // 32)
    return head - 2 * side, side, side


def _flux_1_config(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": blocks(shapes, "double_blocks."),
        "num_single_layers": blocks(shapes, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": _flux_1_axes(head),
    }


def _flux_1_latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return geometry.height * geometry.width, config["out_channels"]


def _flux_1_signals(config: Config, geometry: Geometry) -> dict[str, Signal]:
    signals = {
        "encoder_hidden_states": Signal((geometry.text_tokens, config["joint_attention_dim"])),
        "pooled_projections": Signal((config["pooled_projection_dim"],)),
    }
    if config["guidance_embeds"]:
        signals["guidance"] = Signal((), "value", GUIDANCE)
    if config["in_channels"] > config["out_channels"]:  # Fill, Canny, Depth: a second picture in more channels
        extra = config["in_channels"] - config["out_channels"]
        signals["condition_latents"] = Signal((geometry.height * geometry.width, extra))
    return signals


def _flux_1_arguments(inputs: Inputs) -> dict[str, Any]:
    arguments = dict(inputs.conditioning)
    latents = inputs.latents
    if "condition_latents" in arguments:
        latents = torch.cat([latents, arguments.pop("condition_latents")], -1)
    text_tokens = inputs.conditioning["encoder_hidden_states"].shape[1]
    return {
        "hidden_states": latents,
        "timestep": inputs.time(),
        "img_ids": image_ids(inputs.geometry, latents.device),
        "txt_ids": torch.zeros(text_tokens, 3, device=latents.device),
        **arguments,
    }


FLUX_1 = Architecture(
    transformer="FluxTransformer2DModel",
    converter="convert_flux_transformer_checkpoint_to_diffusers",
    config=_flux_1_config,
    latents=_flux_1_latents,
    signals=_flux_1_signals,
    arguments=_flux_1_arguments,
    fused=(Fused(r"single_blocks\.\d+\.linear1", (3072, 3072, 3072, 12288), qkv_mlp_rows),),
)

ARCHITECTURES: Mapping[str, Architecture] = {"flux1": FLUX_1}
"""By family name of `convert_to_quant.families`."""
