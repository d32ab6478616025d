"""What it takes to run one family of models, and what all families share.

Conventions. sigma runs from 1 (noise) to 0. Latents have the layout that the transformer class takes, tokens or maps,
without its extra condition channels. A velocity points from the picture to the noise:
x_sigma = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import Geometry, Signal
from ..provenance import Fused, Shapes

Config = Mapping[str, Any]

CONDITION = "condition_latents"
"""Conditioning that joins the latents as further channels: a second picture, a mask (Fill, Depth, image-to-video)."""


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

    def time(self, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """The noise level times `scale`, plus `offset`, for every sample, [batch], in the latents' dtype."""
        time = self.sigma * scale + offset
        return torch.full((len(self.latents),), time, dtype=self.latents.dtype, device=self.latents.device)

    def signals(self) -> dict[str, Tensor]:
        """The conditioning that `forward` takes under its own names."""
        return {name: value for name, value in self.conditioning.items() if name != CONDITION}

    def joined(self, dimension: int) -> Tensor:
        """The latents with the condition channels behind them, if there are any."""
        condition = self.conditioning.get(CONDITION)
        return self.latents if condition is None else torch.cat([self.latents, condition], dimension)

    def image_ids(self, axes: int) -> Tensor:
        """Positions of image tokens: 0, row, column, and zeros up to `axes` numbers; float32 [tokens, axes]."""
        device, geometry = self.latents.device, self.geometry
        ids = torch.zeros(geometry.height * geometry.width, axes, device=device)
        ids[:, 1] = torch.arange(geometry.height, device=device).repeat_interleave(geometry.width)
        ids[:, 2] = torch.arange(geometry.width, device=device).repeat(geometry.height)
        return ids


def as_it_is(output: Any) -> Any:
    """The velocity of models that predict it."""
    return output


def negated(output: Any) -> Any:
    """The velocity of models that predict picture minus noise."""
    return -output


def nothing(model: nn.Module, config: Config) -> None:
    """No change to a model after it was built."""


@dataclass(frozen=True)
class Architecture:
    """How one family is run.

    Attributes:
        transformer: name of the class in `diffusers`.
        converter: name of the function in `diffusers.loaders.single_file_utils`; None where names agree already.
        native: a tensor of the class that no checkpoint in its authors' names has: with it, names agree already.
        config: arguments of the class, from the shapes of its tensors by diffusers' names.
        latents: shape of a sample's latents.
        signals: the conditioning tensors.
        arguments: arguments of the class's `forward`.
        velocity: the velocity in what `forward` gives.
        fused: what the converter splits at published row numbers.
        spellings: regular expressions and replacements that turn other spellings of a tensor's name into the
            converter's.
        ignored: tensors that have no use in the model.
        stand_ins: arguments for the class in place of the configuration's, where those would make it compute what the
            checkpoint holds.
        adjust: mends what the stand-ins did, after the model was built without weights.
    """

    transformer: str
    converter: str | None
    native: str
    config: Callable[[Shapes], dict[str, Any]]
    latents: Callable[[Config, Geometry], tuple[int, ...]]
    signals: Callable[[Config, Geometry], dict[str, Signal]]
    arguments: Callable[[Inputs], dict[str, Any]]
    velocity: Callable[[Any], Tensor] = as_it_is
    fused: tuple[Fused, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    stand_ins: Mapping[str, Any] = field(default_factory=dict)
    adjust: Callable[[nn.Module, Config], None] = nothing


def blocks(shapes: Shapes, prefix: str) -> int:
    """Number of blocks under a prefix such as "transformer_blocks."."""
    return len({name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)})


def rotary_axes(head: int) -> tuple[int, int, int]:
    """How a head's rotary dimensions are shared between index, row and column in Flux.1 and its kin.

    >>> rotary_axes(128)
    (16, 56, 56)
    """
    side = 2 * (7 * head // 32)
    return head - 2 * side, side, side


def condition_signal(config: Config, shape: tuple[int, ...], axis: int) -> dict[str, Signal]:
    """The condition channels that a model takes beyond its latents' `shape`, along `axis`; none for most."""
    extra = config["in_channels"] - config["out_channels"]
    if extra <= 0:
        return {}
    return {CONDITION: Signal((*shape[:axis], extra, *shape[axis + 1 :]))}
