"""How to run a family of models, as data: its diffusers class, its configuration, and its inputs.

diffusers runs most families, but expects a configuration file from the internet and inputs that a pipeline prepares.
Both follow from the checkpoint: sizes are tensor shapes, and a transformer's inputs are latents, a time, and some
conditioning, packed in one of a few ways. An `Architecture` states them: the class, its configuration as a function of
tensor shapes, the shapes of latents and conditioning, and the arguments of `forward`. Conditioning tensors are named as
in `forward`.

Conventions. sigma runs from 1 (noise) to 0. Latents have the layout that the class expects, tokens or maps, without its
extra condition channels. The velocity points from the image to the noise:
x_sigma = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0.

Limits. Variants that need parts unknown to diffusers are listed in `Family.elsewhere`; `engines.comfyui.inprocess` runs
them inside ComfyUI. torch is imported only where tensors are computed, so recognizing a family does not need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .rules import Rule

if TYPE_CHECKING:
    from torch import Tensor, nn

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

CONDITION_LATENTS = "condition_latents"
"""Conditioning concatenated to the latents as extra channels: a second image, a mask (Fill, Depth, image-to-video)."""


@dataclass(frozen=True)
class Geometry:
    """The size of an image or video, in the model's own tokens.

    Attributes:
        height, width: image tokens (patches) per dimension.
        frames: latent frames; 1 for images.
        text_tokens: length of the text.
    """

    height: int = 32
    width: int = 32
    frames: int = 1
    text_tokens: int = 64

    @property
    def tokens(self) -> int:
        """Tokens per sample, text included."""
        return self.height * self.width * self.frames + self.text_tokens

    @property
    def quarter(self) -> Geometry:
        """The same with half the height and width, and a quarter of the text."""
        half_height, half_width = -(-self.height // 2), -(-self.width // 2)
        return Geometry(half_height, half_width, self.frames, -(-self.text_tokens // 4))


@dataclass(frozen=True)
class Signal:
    """One conditioning tensor.

    Attributes:
        shape: without the batch dimension.
        kind: random noise, a mask of ones, or the constant `value`.
    """

    shape: tuple[int, ...]
    kind: Literal["noise", "mask", "value"] = "noise"
    value: float = 1.0


@dataclass(frozen=True)
class Inputs:
    """The inputs of one evaluation: latents [batch, *latent shape] at noise level sigma, conditioning [batch, ...]."""

    config: Config
    geometry: Geometry
    latents: Tensor
    sigma: float
    conditioning: Mapping[str, Tensor]

    def time(self, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """The noise level × `scale` + `offset` for every sample, [batch], in the latents' dtype."""
        return self.latents.new_full((len(self.latents),), self.sigma * scale + offset)

    def usual(self, scale: float = 1.0, offset: float = 0.0, *, channels: int = 1) -> dict[str, Any]:
        """The arguments that most classes share; condition latents are concatenated along the dimension `channels`."""
        import torch

        conditioning = dict(self.conditioning)
        extra = [conditioning.pop(CONDITION_LATENTS)] if CONDITION_LATENTS in conditioning else []
        latents = torch.cat([self.latents, *extra], channels)
        return {"hidden_states": latents, "timestep": self.time(scale, offset), **conditioning}

    def image_ids(self, axes: int) -> Tensor:
        """Positions of image tokens: 0, row, column, and zeros up to `axes` numbers; float32 [tokens, axes]."""
        import torch

        height, width = self.geometry.height, self.geometry.width
        ids = torch.zeros(height, width, axes, device=self.latents.device)
        ids[:, :, 1] = torch.arange(height)[:, None]
        ids[:, :, 2] = torch.arange(width)
        return ids.flatten(0, 1)

    def text_ids(self, axes: int) -> Tensor:
        """Positions of text tokens: zeros; float32 [text tokens, axes]."""
        return self.latents.new_zeros(self.conditioning["encoder_hidden_states"].shape[1], axes).float()


Latents = Callable[[Config, Geometry], tuple[int, ...]]
"""The shape of one sample's latents."""

Want = Callable[[Config, Geometry], Signal | None]
"""A conditioning tensor, or None where a model of this configuration has none."""


def tokens(channels: str) -> Latents:
    """Image latents as a sequence of tokens; `channels` is the configuration entry with their channels."""
    return lambda config, geometry: (geometry.height * geometry.width, config[channels])


def image(config: Config, geometry: Geometry) -> tuple[int, ...]:
    """Image latents as a map that the model cuts into 2 by 2 patches."""
    return config["in_channels"], 2 * geometry.height, 2 * geometry.width


def video(*patch: str) -> Latents:
    """Video latents as a map; `patch` are the configuration entries with the patch's size: one or three numbers."""

    def shape(config: Config, geometry: Geometry) -> tuple[int, ...]:
        said = config[patch[0]] if len(patch) == 1 else [config[size] for size in patch]
        frames, height, width = (1, said, said) if isinstance(said, int) else said
        return config["out_channels"], frames * geometry.frames, height * geometry.height, width * geometry.width

    return shape


def text(width: str, tokens: int | None = None) -> Want:
    """A text encoder's output, one vector per token; `width` is the configuration entry with its channels."""
    return lambda config, geometry: Signal((tokens or geometry.text_tokens, config[width]))


def mask(_: Config, geometry: Geometry) -> Signal:
    """A mask over the whole text."""
    return Signal((geometry.text_tokens,), "mask")


def vector(width: str) -> Want:
    """An encoder's output for the whole prompt."""
    return lambda config, _: Signal((config[width],))


def guidance(value: float) -> Want:
    """The guidance scale, an input of distilled models."""
    return if_there("guidance_embeds", lambda *_: Signal((), "value", value))


def if_there(entry: str, want: Want) -> Want:
    """`want` for models whose configuration has this entry."""
    return lambda config, geometry: want(config, geometry) if config.get(entry) else None


def beside(latents: Latents, axis: int) -> Want:
    """The input channels beyond the latents' own, along `axis`; most models have none."""

    def want(config: Config, geometry: Geometry) -> Signal | None:
        shape, extra = latents(config, geometry), config["in_channels"] - config["out_channels"]
        return Signal((*shape[:axis], extra, *shape[axis + 1 :])) if extra > 0 else None

    return want


def as_it_is(output: Any) -> Any:
    """The output of models that predict the velocity."""
    return output


def build(transformer: Callable[..., nn.Module], config: Config) -> nn.Module:
    """Construct the class from its configuration."""
    return transformer(**config)


Prediction = Literal["velocity", "noise", "v"]
"""What a model predicts for x = a x_0 + s noise: the velocity noise - x_0 of a flow (a = 1 - sigma, s = sigma); or,
where a² + s² = 1, the noise, or v = a noise - s x_0."""

BETAS = 0.0001, 0.02
"""Noise added in the first and the last of the thousand steps of models that predict noise or v."""


def diffusion_time(signal: float) -> float:
    """The time, from 0 (clean) to 1, at which `BETAS` leave this share a of an image's signal.

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
        config: the class's arguments, from the shapes of its tensors under diffusers' names.
        wants: the conditioning tensors.
        latents: shape of a sample's latents.
        arguments: arguments of the class's `forward`.
        velocity: extracts the prediction from the output of `forward`.
        prediction: what is predicted.
        names: names that only this class has; they take precedence over those of the family.
        ignored: tensors that the model does not use.
        optional: pattern of tensors that the model runs without: further conditions, each added to the others.
        build: constructs the model, without weights.
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
        """The conditioning tensors of a model with this configuration."""
        found = {name: want(config, geometry) for name, want in self.wants.items()}
        return {name: signal for name, signal in found.items() if signal is not None}


EMBEDDERS = (
    "x_embedder.proj",
    "x_embedder",
    "img_in",
    "patch_embedding",
    "patch_embed.proj",
    "pos_embed.proj",
    "proj_in",
)
"""Layers that embed the latents in diffusers' classes."""

HEAD_NORMS = tuple(f"transformer_blocks.0.{name}.weight" for name in ("attn.norm_q", "attn1.norm_q"))
"""Norms over the channels of one attention head."""

INPUTS = {
    "caption_channels": "caption_projection.linear_1",
    "cross_attention_dim": "transformer_blocks.0.attn2.to_k",
    "joint_attention_dim": "context_embedder",
    "pooled_projection_dim": "time_text_embed.text_embedder.linear_1",
}
"""Configuration entry -> the layer whose input features it counts, the same in all classes that have the entry."""


def measured(
    shapes: Shapes, *inputs: str, area: int = 0, head: int = 0, end: str = "proj_out", lacks: Collection[str] = ()
) -> dict[str, Any]:
    """The configuration entries that most classes share, measured on the model's tensors.

    Args:
        shapes: of all tensors, by diffusers' names.
        inputs: keys of `INPUTS` that the class has.
        area: latent positions per token, where the embedder is a linear layer over flattened patches.
        head: channels of an attention head, or their largest common divisor with the width; by default as a norm shows.
        end: the last layer.
        lacks: shared entries that the class does not have.
    """
    hidden, channels, *patch = embedder(shapes)
    area = area or math.prod(patch)
    head = math.gcd(hidden, head) if head else next(shapes[name][0] for name in HEAD_NORMS if name in shapes)
    config = {
        "in_channels": channels if patch else channels // area,
        "out_channels": shapes[f"{end}.weight"][0] // area,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": blocks(shapes, "transformer_blocks.") or blocks(shapes, "blocks."),
        **{entry: shapes[f"{INPUTS[entry]}.weight"][1] for entry in inputs},
    }
    return {entry: value for entry, value in config.items() if entry not in lacks}


def embedder(shapes: Shapes) -> tuple[int, ...]:
    """The shape of the layer that embeds the latents: (hidden, channels, *patch)."""
    return next(shapes[f"{name}.weight"] for name in EMBEDDERS if f"{name}.weight" in shapes)


def blocks(shapes: Shapes, prefix: str) -> int:
    """Number of blocks under a prefix such as "transformer_blocks."."""
    return len({name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)})


def has(shapes: Shapes, module: str) -> bool:
    """Whether the model has a module or tensor of this name anywhere."""
    return any(f".{module}." in f".{name}." for name in shapes)


def rotary_axes(head: int, share: int = 7) -> tuple[int, int, int]:
    """A head's rotary dimensions for index, row and column: row and column have `share` of 16 pairs each.

    >>> rotary_axes(128), rotary_axes(128, 6)
    ((16, 56, 56), (32, 48, 48))
    """
    side = 2 * (share * head // 32)
    return head - 2 * side, side, side
