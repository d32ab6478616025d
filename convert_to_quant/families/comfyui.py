"""What ComfyUI's models take besides latents, as data: what stands in for prompts, images and sounds.

Why it exists. ComfyUI can load any model that it knows, but it does not say what a model wants besides latents: its
nodes attach that to the conditioning under names of their own (`cross_attn`, `pooled_output`, `clip_vision_output`,
`audio_embed`, ...), and each class of `comfy.model_base` turns them into arguments of the network. So `Conditions` say,
for each such class, the names, shapes and kinds. What they hold is put where a node would put it; all that follows is
ComfyUI's own code.

How it works. A class has the conditions of those that it derives from, too, and its own go before theirs. Shapes are
measured on the loaded network ("as wide as `txt_in` takes"), so a file of another size needs no other entry; only what
no weight tells is a number here.

    stream   what an encoder gives per token: drawn as `noise.py` draws it, in three ways
    vector   what an encoder gives per image: the same, without loud channels
    encoded  latents of another image or video, as a VAE gives them: noise of unit variance once ComfyUI has scaled it
    signal   pixels, poses and the like: noise of unit variance
    ids      token numbers
    ones     masks, and scales that nothing says

Limits. Control signals (poses, masks, depth) are noise here, and are never so wild in practice. Layers of branches that
take part only with two or more reference images, or with a controlnet, are not reached.
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
"""The class that all others derive from: its own conditions are for those models alone that are nothing more."""

VISION_TOKENS = 257
"""Of CLIP's vision encoder: 16 by 16 patches and the class."""


@dataclass(frozen=True)
class Scene:
    """What is painted, and the network that paints it.

    Attributes:
        network: ComfyUI's `diffusion_model`.
        config: ComfyUI's `unet_config`.
        channels: of the latents.
        height, width, frames: of the latents.
        tokens: of an image of this size, in patches of 16 by 16 pixels: the length of what has only a length.
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
        """A module or attribute of the network by its dotted path; None where there is none."""
        part: Any = self.network
        for name in path.split("."):
            part = getattr(part, name, None)
        return part

    def number(self, path: str) -> int:
        """A number that the network has.

        Raises:
            UnsupportedModelError: it does not.
        """
        value = self.part(path)
        if not isinstance(value, int):
            raise UnsupportedModelError(f"the size of its conditioning is not known: it has no number {path}")
        return value

    def inputs(self, path: str) -> int:
        """How many features a layer of the network takes.

        Raises:
            UnsupportedModelError: there is no such layer.
        """
        part = self.part(path)
        for name in ("in_features", "in_channels", "num_embeddings"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
        shape = getattr(getattr(part, "weight", None), "shape", ())
        if shape:
            return int(shape[-1])
        raise UnsupportedModelError(f"the size of its conditioning is not known: it has no layer {path}")


Size = int | str | Callable[[Scene], int]
"""A number, one that the scene has ("height"), the path of the layer that takes as many, or what measures it."""

Shape = tuple[Size, ...]
Kind = Literal["noise", "encoded", "signal", "ids", "ones"]
Wrap = Callable[["Tensor"], Any]


def as_it_is(values: Tensor) -> Any:
    """What needs no form of its own."""
    return values


@dataclass(frozen=True)
class Want:
    """One entry of a conditioning.

    Attributes:
        shape: without the batch.
        kind: what it is filled with; "noise" of one dimension is a vector, of more a stream.
        form: makes what ComfyUI's nodes put there of a tensor [1, *shape].
        only_with: wanted only where the network has this part.
        below: token numbers are below this.
    """

    shape: Shape
    kind: Kind = "noise"
    form: Wrap = as_it_is
    only_with: str | None = None
    below: Size = 1


@dataclass(frozen=True)
class Conditions:
    """What the models of a class take.

    Attributes:
        wants: name in the conditioning -> what stands there; None takes an inherited one away.
        settings: further entries of the conditioning, as they are.
        latents: shapes of the latents, each without the batch, where they are not what the latent format says.
        batch: how many latents a trajectory has: models that take the frames of a video as a batch have one each.
        multiple: height and width of the latents are multiples of this.
        smallest: least height and width of the latents that the model can take.
        frames: fewest latent frames that it can take.
    """

    wants: Mapping[str, Want | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    latents: tuple[Shape, ...] = ()
    batch: Size = 1
    multiple: int = 1
    smallest: int = 1
    frames: int = 1

    def over(self, inherited: Conditions) -> Conditions:
        """These, and what is inherited where they say nothing."""
        said = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}
        said |= {name: {**getattr(inherited, name), **getattr(self, name)} for name in ("wants", "settings")}
        return replace(inherited, **said)


def takes(
    prompt: Size | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    latents: tuple[Shape, ...] = (),
    batch: Size = 1,
    multiple: int = 1,
    smallest: int = 1,
    frames: int = 1,
    **wants: Want | None,
) -> Conditions:
    """`Conditions` whose wants are keywords, beside a text as wide as `prompt` under ComfyUI's name for it."""
    wants = wants if prompt is None else {"cross_attn": text(prompt), **wants}
    return Conditions(wants, settings or {}, latents, batch, multiple, smallest, frames)


def measure(size: Size, scene: Scene) -> int:
    """A size in a scene."""
    if isinstance(size, str):
        return int(vars(scene)[size]) if size in vars(scene) else scene.inputs(size)
    return size if isinstance(size, int) else size(scene)


def number(path: str) -> Size:
    """A number that the network has."""
    return lambda scene: scene.number(path)


def over(size: Size, divisor: Size) -> Size:
    """A size over a divisor, rounded up."""
    return lambda scene: -(-measure(size, scene) // measure(divisor, scene))


def times(size: Size, factor: int, more: int = 0) -> Size:
    """A multiple of a size, and some more."""
    return lambda scene: measure(size, scene) * factor + more


def setting(name: str) -> Size:
    """A number of ComfyUI's configuration."""

    def read(scene: Scene) -> int:
        value = scene.config.get(name)
        if not isinstance(value, int):
            raise UnsupportedModelError(f"the size of its conditioning is not known: ComfyUI found no {name}")
        return value

    return read


SOUND: Shape = ("channels", "tokens")
IMAGE: Shape = ("channels", "height", "width")
VIDEO: Shape = ("channels", "frames", "height", "width")
FIRST_FRAME: Shape = ("channels", 1, "height", "width")


def text(width: Size, **how: Any) -> Want:
    """What a text encoder gives: one vector per token."""
    return Want(("text_tokens", width), **how)


def pooled(width: Size, **how: Any) -> Want:
    """What a text encoder says of the whole prompt."""
    return Want((width,), **how)


def encoded(shape: Shape = IMAGE, **how: Any) -> Want:
    """Latents of another image or video."""
    return Want(shape, "encoded", **how)


def signal(*shape: Size, **how: Any) -> Want:
    """Pixels, or what else no VAE and no text encoder gives."""
    return Want(shape, "signal", **how)


def ids(below: Size, **how: Any) -> Want:
    """Numbers of text tokens."""
    return Want(("text_tokens",), "ids", below=below, **how)


def ones(*shape: Size, **how: Any) -> Want:
    """A mask, or a scale."""
    return Want(shape, "ones", **how)


def vision(module: str, width: Size | None = None, tokens: Size = VISION_TOKENS) -> Want:
    """What CLIP's vision encoder says, where the model has a layer for it."""
    return Want((tokens, width or module), form=vision_output, only_with=module)


def vision_output(values: Tensor) -> Any:
    """What CLIP's vision encoder gives, whichever of its outputs is asked for."""
    return SimpleNamespace(
        last_hidden_state=values,
        penultimate_hidden_states=values,
        image_embeds=values,
        image_sizes=[(3, 16 * 16, 16 * 16)],
    )


def listed(values: Tensor) -> Any:
    """One of several images."""
    return [values]
