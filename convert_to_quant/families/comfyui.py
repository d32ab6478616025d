"""Inputs of ComfyUI's models besides latents, as data: shapes and kinds of prompts, images and audio.

ComfyUI loads any model that it knows, but does not state what a model needs besides latents: its nodes attach values to
the conditioning under names of their own (`cross_attn`, `pooled_output`, `clip_vision_output`, `audio_embed`, ...), and
each class of `comfy.model_base` turns them into arguments of the network. `Conditions` list these names, shapes and
kinds per class; everything after that is ComfyUI's own code. A class inherits the conditions of its base classes.

Shapes are measured on the loaded network ("the inputs of `txt_in`"), so other sizes need no entry; only what no weight
shows is a number here.

    noise    an encoder's output, as `engines.noise` draws it: a stream of tokens, or, of one dimension, a vector
    encoded  latents of another image or video: noise of unit variance once ComfyUI has scaled it
    signal   pixels, poses and the like: noise of unit variance
    ids      token numbers
    ones     masks, and scales

Limits. Control signals (poses, masks, depth) are noise, wilder than any real one. Layers that run only with two or more
reference images, or with a controlnet, are not reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

BASE = "BaseModel"
"""The base class of all others, which do not inherit its conditions."""

VISION_TOKENS = 257
"""CLIP vision: 16 by 16 patches and the class."""


@dataclass(frozen=True)
class Scene:
    """The size of an image or video, and the network that generates it.

    Attributes:
        network: ComfyUI's `diffusion_model`.
        config: ComfyUI's `unet_config`.
        channels, height, width, frames: of the latents.
        tokens: length of latents that have one dimension: patches of 16 by 16 pixels in an image of this size.
        text_tokens: length of a prompt.
    """

    network: nn.Module
    config: Mapping[str, Any]
    channels: int
    height: int
    width: int
    frames: int
    tokens: int
    text_tokens: int

    def part(self, path: str) -> Any:
        """A module or attribute of the network by its dotted path; None if missing."""
        part: Any = self.network
        for name in path.split("."):
            part = getattr(part, name, None)
        return part


Size = int | str | Callable[[Scene], int]
"""A number, a name that `measure` resolves, or a function."""

Shape = tuple[Size, ...]
Kind = Literal["noise", "encoded", "signal", "ids", "ones"]
Wrap = Callable[["Tensor"], Any]


def as_it_is(values: Tensor) -> Any:
    """The values themselves."""
    return values


@dataclass(frozen=True)
class Want:
    """One entry of a conditioning.

    Attributes:
        shape: without the batch dimension.
        kind: of the values.
        form: converts a tensor [1, *shape] to what ComfyUI's nodes attach.
        only_with: the part of the network that uses it.
        below: upper bound of token numbers.
    """

    shape: Shape
    kind: Kind = "noise"
    form: Wrap = as_it_is
    only_with: str | None = None
    below: Size = 1


@dataclass(frozen=True)
class Conditions:
    """Inputs of a class's models.

    Attributes:
        wants: name in the conditioning -> its value; None removes an inherited one.
        settings: constant entries of the conditioning.
        latents: shapes of the latents, if they are not the latent format's.
        batch: latents per trajectory: one per frame where a video's frames are the batch.
        multiple: height and width of the latents are multiples of this.
        smallest: smallest height and width of the latents.
        frames: fewest latent frames.
    """

    wants: Mapping[str, Want | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    latents: tuple[Shape, ...] = ()
    batch: Size = 1
    multiple: int = 1
    smallest: int = 1
    frames: int = 1

    def over(self, inherited: Conditions) -> Conditions:
        """These, with inherited values where they have none."""
        said = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}
        said |= {name: {**getattr(inherited, name), **getattr(self, name)} for name in ("wants", "settings")}
        return replace(inherited, **said)


def takes(prompt: Size | None = None, **said: Any) -> Conditions:
    """`Conditions` from keywords: its own fields, and wants by name; `prompt` is the width of a text."""
    own = {each.name: said.pop(each.name) for each in fields(Conditions) if each.name in said}
    return Conditions(said if prompt is None else {"cross_attn": text(prompt), **said}, **own)


def measure(size: Size, scene: Scene) -> int:
    """A size in numbers.

    A name is a size of the scene ("height"), the path of a number in the network, that of a layer, which means its
    input features, or an entry of ComfyUI's configuration.

    Raises:
        UnsupportedModelError: there is nothing of this name.
    """
    if not isinstance(size, str):
        return size if isinstance(size, int) else size(scene)
    part = vars(scene).get(size, scene.part(size))
    shape = getattr(getattr(part, "weight", None), "shape", (None,))
    numbers = (getattr(part, name, None) for name in ("in_features", "in_channels", "num_embeddings"))
    for number in (part, *numbers, shape[-1], scene.config.get(size)):
        if isinstance(number, int):
            return number
    raise UnsupportedModelError(f"the size of its conditioning is not known: the network has no {size}")


def over(size: Size, divisor: Size) -> Size:
    """A size divided by another, rounded up."""
    return lambda scene: -(-measure(size, scene) // measure(divisor, scene))


def times(size: Size, factor: Size, more: int = 0) -> Size:
    """`factor` times a size, plus `more`."""
    return lambda scene: measure(size, scene) * measure(factor, scene) + more


SOUND: Shape = ("channels", "tokens")
IMAGE: Shape = ("channels", "height", "width")
VIDEO: Shape = ("channels", "frames", "height", "width")
FIRST_FRAME: Shape = ("channels", 1, "height", "width")


def text(width: Size, **how: Any) -> Want:
    """A text encoder's output: one vector per token."""
    return Want(("text_tokens", width), **how)


def pooled(width: Size, **how: Any) -> Want:
    """A text encoder's output for the whole prompt."""
    return Want((width,), **how)


def encoded(shape: Shape = IMAGE, **how: Any) -> Want:
    """Latents of another image or video."""
    return Want(shape, "encoded", **how)


def signal(*shape: Size, **how: Any) -> Want:
    """Pixels, or other values that come from no encoder."""
    return Want(shape, "signal", **how)


def ids(below: Size, **how: Any) -> Want:
    """Numbers of text tokens."""
    return Want(("text_tokens",), "ids", below=below, **how)


def ones(*shape: Size, **how: Any) -> Want:
    """A mask, or a scale."""
    return Want(shape, "ones", **how)


def vision(module: str, width: Size | None = None, tokens: Size = VISION_TOKENS) -> Want:
    """Output of CLIP's vision encoder, if the model has a layer for it."""
    return Want((tokens, width or module), form=vision_output, only_with=module)


def vision_output(values: Tensor) -> Any:
    """`values` as each output of CLIP's vision encoder."""
    return SimpleNamespace(
        last_hidden_state=values,
        penultimate_hidden_states=values,
        image_embeds=values,
        image_sizes=[(3, 16 * 16, 16 * 16)],
    )


def listed(values: Tensor) -> Any:
    """One of several images."""
    return [values]
