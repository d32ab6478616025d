"""What it takes to run a family of models, as data: its diffusers class, its configuration, and its inputs.

Why it exists. diffusers can run most families here, but asks for a configuration file from the internet and for inputs
that a pipeline prepares. Both follow from the checkpoint itself: sizes are tensor shapes, and the inputs of a
transformer are latents, a time and some conditioning, packed in one of a few ways.

How it works. An `Architecture` holds the transformer class by name, a function from shapes to the class's
configuration, the shapes of latents and of every conditioning tensor, and a function that makes the arguments of
`forward` from them. Conditioning tensors have the names that the class's `forward` gives them.

Conventions. sigma runs from 1 (noise) to 0. Latents have the layout that the transformer class takes, tokens or maps,
without its extra condition channels. A velocity points from the image to the noise:
x_sigma = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0.

Limits. Members of a family with parts that no class of diffusers knows, and without which they cannot run, are named
(`Family.elsewhere`) and not run here. `engines.comfyui.inprocess` runs them inside ComfyUI.

torch is imported only by what computes with tensors, so a family is recognized and named without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .rules import Rule

if TYPE_CHECKING:
    from torch import Tensor, nn

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

CONDITION_LATENTS = "condition_latents"
"""Conditioning that joins the latents as further channels: a second image, a mask (Fill, Depth, image-to-video)."""


@dataclass(frozen=True)
class Geometry:
    """The size of what is painted, in the model's own tokens.

    Attributes:
        height, width: image tokens (patches) per side.
        frames: latent frames; 1 for images.
        text_tokens: length of the text.
    """

    height: int = 32
    width: int = 32
    frames: int = 1
    text_tokens: int = 64

    @property
    def tokens(self) -> int:
        """Rows that a block sees per sample."""
        return self.height * self.width * self.frames + self.text_tokens

    @property
    def quarter(self) -> Geometry:
        """An image of half the sides, with a quarter of the text."""
        half_height, half_width = -(-self.height // 2), -(-self.width // 2)
        return Geometry(half_height, half_width, self.frames, -(-self.text_tokens // 4))


@dataclass(frozen=True)
class Signal:
    """One conditioning tensor of a model.

    Attributes:
        shape: without the batch.
        kind: "noise" is drawn, the others are constant: "mask" is ones, "value" is `value`.
        value: the constant.
    """

    shape: tuple[int, ...]
    kind: Literal["noise", "mask", "value"] = "noise"
    value: float = 1.0


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
        return self.latents.new_full((len(self.latents),), self.sigma * scale + offset)

    def usual(self, scale: float = 1.0, offset: float = 0.0, *, channels: int = 1) -> dict[str, Any]:
        """The arguments that most classes have in common.

        Args:
            scale: see `time`.
            offset: see `time`.
            channels: dimension of the latents along which a condition joins them, if there is one.
        """
        import torch

        condition = self.conditioning.get(CONDITION_LATENTS)
        return {
            "hidden_states": self.latents if condition is None else torch.cat([self.latents, condition], channels),
            "timestep": self.time(scale, offset),
            **{name: value for name, value in self.conditioning.items() if name != CONDITION_LATENTS},
        }

    def image_ids(self, axes: int) -> Tensor:
        """Positions of image tokens: 0, row, column, and zeros up to `axes` numbers; float32 [tokens, axes]."""
        import torch

        device, geometry = self.latents.device, self.geometry
        ids = torch.zeros(geometry.height * geometry.width, axes, device=device)
        ids[:, 1] = torch.arange(geometry.height, device=device).repeat_interleave(geometry.width)
        ids[:, 2] = torch.arange(geometry.width, device=device).repeat(geometry.height)
        return ids

    def text_ids(self, axes: int) -> Tensor:
        """Positions of text tokens: zeros; float32 [text tokens, axes]."""
        import torch

        text_tokens = self.conditioning["encoder_hidden_states"].shape[1]
        return torch.zeros(text_tokens, axes, device=self.latents.device)


Latents = Callable[[Config, Geometry], tuple[int, ...]]
"""The shape of one sample's latents."""

Want = Callable[[Config, Geometry], Signal | None]
"""A conditioning tensor, or None where a model of this configuration takes none."""


def tokens(channels: str) -> Latents:
    """Latents of an image as a sequence of tokens, with as many channels as the configuration says there."""
    return lambda config, geometry: (geometry.height * geometry.width, config[channels])


def image(config: Config, geometry: Geometry) -> tuple[int, ...]:
    """Latents of an image as a map, which the model cuts into patches of 2 by 2."""
    return config["in_channels"], 2 * geometry.height, 2 * geometry.width


def video(*patch: str) -> Latents:
    """Latents of a video as a map; the configuration says there how many frames, rows and columns are a patch."""

    def shape(config: Config, geometry: Geometry) -> tuple[int, ...]:
        frames, height, width = config[patch[0]] if len(patch) == 1 else (config[size] for size in patch)
        return config["out_channels"], frames * geometry.frames, height * geometry.height, width * geometry.width

    return shape


def text(width: str, tokens: int | None = None) -> Want:
    """What a text encoder gives per token, with as many channels as the configuration says there."""
    return lambda config, geometry: Signal((tokens or geometry.text_tokens, config[width]))


def mask(_: Config, geometry: Geometry) -> Signal:
    """That all of the text counts."""
    return Signal((geometry.text_tokens,), "mask")


def vector(width: str) -> Want:
    """What an encoder gives for the whole prompt."""
    return lambda config, _: Signal((config[width],))


def guidance(value: float) -> Want:
    """The guidance that a distilled model is told."""
    return if_there("guidance_embeds", lambda *_: Signal((), "value", value))


def if_there(entry: str, want: Want) -> Want:
    """What only models take whose configuration says something there."""
    return lambda config, geometry: want(config, geometry) if config.get(entry) else None


def beside(latents: Latents, axis: int) -> Want:
    """The condition channels that a model takes beyond its latents, along `axis`; none for most."""

    def want(config: Config, geometry: Geometry) -> Signal | None:
        shape, extra = latents(config, geometry), config["in_channels"] - config["out_channels"]
        return Signal((*shape[:axis], extra, *shape[axis + 1 :])) if extra > 0 else None

    return want


def as_it_is(output: Any) -> Any:
    """The velocity of models that predict it."""
    return output


def build(transformer: Callable[..., nn.Module], config: Config) -> nn.Module:
    """A class with its configuration."""
    return transformer(**config)


Prediction = Literal["velocity", "noise", "v"]
"""What a model says of x = a x_0 + s noise: noise - x_0 of a flow (a = 1 - sigma, s = sigma); or, where a² + s² = 1,
the noise, or v = a noise - s x_0."""

BETAS = 0.0001, 0.02
"""Noise added in the first and the last of the thousand steps of models that predict noise or v."""


def diffusion_time(signal: float) -> float:
    """When an image is left with this share a of its signal by `BETAS`, from 0 (clean) to 1.

    >>> [round(diffusion_time(signal), 2) for signal in (1.0, 0.7, 0.0)]
    [0.0, 0.26, 1.0]
    """
    first, last = (1000 * beta for beta in BETAS)
    lost = -2 * math.log(max(signal, 1e-3))  # first u + (last - first) u² / 2
    return min((math.sqrt(first**2 + 2 * (last - first) * lost) - first) / (last - first), 1.0)


@dataclass(frozen=True)
class Architecture:
    """How one family is run.

    Attributes:
        transformer: name of the class in `diffusers`.
        config: arguments of the class, from the shapes of its tensors by diffusers' names.
        wants: the conditioning tensors.
        latents: shape of a sample's latents.
        arguments: arguments of the class's `forward`.
        velocity: the velocity in what `forward` gives, or what is predicted in its place.
        prediction: what that is.
        names: names that only this class has, which go before those of its family.
        ignored: tensors that have no use in the model.
        optional: pattern of tensors that the model runs without: further conditions, each added to what the others do.
        build: makes the model of the class, without weights.
    """

    transformer: str
    config: Callable[[Shapes], dict[str, Any]]
    wants: Mapping[str, Want]
    latents: Latents = image
    arguments: Callable[[Inputs], dict[str, Any]] = Inputs.usual
    velocity: Callable[[Any], Tensor] = as_it_is
    prediction: Prediction = "velocity"
    names: tuple[Rule, ...] = ()
    ignored: tuple[str, ...] = ()
    optional: str = ""
    build: Callable[[Callable[..., nn.Module], Config], nn.Module] = build

    def signals(self, config: Config, geometry: Geometry) -> dict[str, Signal]:
        """The conditioning tensors that a model of this configuration takes."""
        found = {name: want(config, geometry) for name, want in self.wants.items()}
        return {name: signal for name, signal in found.items() if signal is not None}


def blocks(shapes: Shapes, prefix: str) -> int:
    """Number of blocks under a prefix such as "transformer_blocks."."""
    return len({name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)})


def heads(hidden: int, head: int) -> dict[str, int]:
    """How a configuration says that attention of this width has heads of `head` channels."""
    return {"num_attention_heads": hidden // head, "attention_head_dim": head}


def rotary_axes(head: int, share: int = 7) -> tuple[int, int, int]:
    """How a head's rotary dimensions are shared between index, row and column: both sides have `share` of 16 pairs.

    >>> rotary_axes(128), rotary_axes(128, 6)
    ((16, 56, 56), (32, 48, 48))
    """
    side = 2 * (share * head // 32)
    return head - 2 * side, side, side
