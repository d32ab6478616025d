"""What every family of ComfyUI's models is shown in place of prompts, pictures and sounds: one table.

Why it exists. ComfyUI can load any model that it knows, but it does not say what a model wants besides latents: its
nodes attach that to the conditioning under names of their own (`cross_attn`, `pooled_output`, `clip_vision_output`,
`audio_embed`, ...), and each class of `comfy.model_base` turns them into arguments of the network. So a table says,
for each such class, the names, shapes and kinds. What it holds is put where a node would put it; all that follows is
ComfyUI's own code.

How it works. `FAMILIES` has a row for a class. A class has the rows of those that it derives from, too, and its own
row goes before theirs. Shapes are measured on the loaded network ("as wide as `txt_in` takes"), so a file of another
size needs no other row; only what no weight tells is a number here.

    stream   what an encoder gives per token: drawn as `noise.py` draws it, in three ways
    vector   what an encoder gives per picture: the same, without loud channels
    picture  latents of another picture, as a VAE gives them: noise of unit variance once ComfyUI has scaled it
    signal   pixels, poses and the like: noise of unit variance
    ids      token numbers
    ones     masks, and scales that nothing says

Limits. Control signals (poses, masks, depth) are noise here, and are never so wild in practice. Layers of branches that
take part only with two or more reference pictures, or with a controlnet, are not reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from .. import noise

BASE = "BaseModel"
"""The class that all others derive from: its own row is for those models alone that are nothing more."""

PICTURES, IDS = 1 << 31, 1 << 32
"""Pictures and token numbers of trajectory n are drawn with the numbers of trajectories that no run reaches."""

QWEN_WORDS = 151643
"""Token numbers of Qwen below this are words; above are signs, such as "a picture starts here"."""

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
        tokens: of a picture of this size, in patches of 16 by 16 pixels: the length of what has only a length.
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
        if isinstance(getattr(part, "weight", None), Tensor):
            return int(part.weight.shape[-1])
        raise UnsupportedModelError(f"the size of its conditioning is not known: it has no layer {path}")


Size = int | Callable[[Scene], int]
Shape = tuple[Size, ...]
Kind = Literal["noise", "picture", "signal", "ids", "ones"]
Wrap = Callable[[Tensor], Any]


def _as_it_is(values: Tensor) -> Any:
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
    form: Wrap = _as_it_is
    only_with: str | None = None
    below: Size = 1


@dataclass(frozen=True)
class Family:
    """What the models of a class take.

    Attributes:
        wants: name in the conditioning -> what stands there; None takes an inherited one away.
        settings: further entries of the conditioning, as they are.
        latents: shapes of the latents, each without the batch, where they are not what the latent format says.
        batch: how many latents a trajectory has: models that take the frames of a film as a batch have one each.
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


def _text(scene: Scene) -> int:
    return scene.text_tokens


def _channels(scene: Scene) -> int:
    return scene.channels


def _height(scene: Scene) -> int:
    return scene.height


def _width(scene: Scene) -> int:
    return scene.width


def _frames(scene: Scene) -> int:
    return scene.frames


def _tokens(scene: Scene) -> int:
    return scene.tokens


def inputs(path: str) -> Size:
    """As many as a layer of the network takes."""
    return lambda scene: scene.inputs(path)


def number(path: str) -> Size:
    """A number that the network has."""
    return lambda scene: scene.number(path)


def over(size: Size, divisor: Size) -> Size:
    """A size over a divisor, rounded up."""
    return lambda scene: -(-measure(size, scene) // measure(divisor, scene))


def times(size: Size, factor: int, more: int = 0) -> Size:
    """A multiple of a size, and some more."""
    return lambda scene: measure(size, scene) * factor + more


def setting(name: str, less: int = 0) -> Size:
    """A number of ComfyUI's configuration."""

    def read(scene: Scene) -> int:
        value = scene.config.get(name)
        if not isinstance(value, int):
            raise UnsupportedModelError(f"the size of its conditioning is not known: ComfyUI found no {name}")
        return value - less

    return read


def measure(size: Size, scene: Scene) -> int:
    """A size in a scene."""
    return size if isinstance(size, int) else size(scene)


def text(width: Size, **how: Any) -> Want:
    """What a text encoder says: one row per token."""
    return Want((_text, width), **how)


def pooled(width: Size, **how: Any) -> Want:
    """What a text encoder says of the whole prompt."""
    return Want((width,), **how)


SOUND: Shape = (_channels, _tokens)
PICTURE: Shape = (_channels, _height, _width)
FILM: Shape = (_channels, _frames, _height, _width)
FIRST_FRAME: Shape = (_channels, 1, _height, _width)


def picture(shape: Shape = PICTURE, **how: Any) -> Want:
    """Latents of another picture."""
    return Want(shape, "picture", **how)


def signal(*shape: Size, **how: Any) -> Want:
    """Pixels, or what else no VAE and no text encoder gives."""
    return Want(shape, "signal", **how)


def _listed(values: Tensor) -> Any:
    return [values]


def _vision(values: Tensor) -> Any:
    """What CLIP's vision encoder gives, whichever of its outputs is asked for."""
    return SimpleNamespace(
        last_hidden_state=values,
        penultimate_hidden_states=values,
        image_embeds=values,
        image_sizes=[(3, 16 * 16, 16 * 16)],
    )


def _unclip(values: Tensor) -> Any:
    """A picture as a prompt."""
    return [{"clip_vision_output": _vision(values), "strength": 1.0, "noise_augmentation": 0.0}]


def _unclip_row(values: Tensor) -> Any:
    """The same, as one of several pictures."""
    return _unclip(values[:, None])


def _token(values: Tensor) -> Any:
    """A vector as a text of one token."""
    return values[:, None]


def _row(values: Tensor) -> Any:
    """Without the batch."""
    return values[0]


def _channels_first(values: Tensor) -> Any:
    """[1, T, layers, C] as [1, layers, C, T]."""
    return values.movedim(1, -1)


def vision(module: str, width: Size | None = None, tokens: Size = VISION_TOKENS) -> Want:
    """What CLIP's vision encoder says, where the model has a layer for it."""
    return Want((tokens, width or inputs(module)), form=_vision, only_with=module)


def _upscaling(scene: Scene) -> int:
    """Pixels of PiD's picture per latent that it is given."""
    return scene.number("lq_proj.sr_scale") * scene.number("lq_proj.latent_spatial_down_factor")


def _last_caption(scene: Scene) -> int:
    """Features of T5 in HiDream, whose projection is the last one."""
    return scene.inputs(f"caption_projection.{len(scene.part('caption_projection')) - 1}.linear")


def _llama_layers(scene: Scene) -> int:
    """Layers of Llama that HiDream is given: up to the last one that it uses."""
    return int(max(scene.part("llama_layers"))) + 1


def _ltxav_text(scene: Scene) -> int:
    """Features of the text in LTX-2: that of the projection before its two connectors, or of these."""
    name = "caption_projection.linear_1"
    if scene.part(name) is not None:
        return scene.inputs(name)
    return scene.number("cross_attention_dim") + scene.number("audio_cross_attention_dim")


def _ernie_text(scene: Scene) -> int:
    """Features of the text in Ernie: that of its projection, or, without one, of the network."""
    return scene.inputs("text_proj") if scene.part("text_proj") is not None else scene.number("hidden_size")


def _krea_text(scene: Scene) -> int:
    """Features of the text in Krea 2: some layers of its encoder side by side."""
    return scene.number("txtlayers") * scene.number("txtdim")


def _unclip_width(scene: Scene) -> int:
    """Features of a picture as a prompt: half of what it is given with, the other half says how noisy it is."""
    return measure(setting("adm_in_channels"), scene) // 2


def _speech_layers(scene: Scene) -> int:
    """Layers of the speech encoder that Wan S2V weighs against each other."""
    return int(scene.part("casual_audio_encoder.weights").shape[1])


def _wan_beside(scene: Scene) -> int:
    """Channels of the latents beside a Wan model's own: pictures of 16 channels each, and often a mask of four."""
    beside = scene.inputs("patch_embedding") - scene.channels
    return max(beside - 4 if beside % scene.channels == 4 else beside, 0) or scene.channels


_UNET_TEXT = text(setting("context_dim"))
_SDXL = Family({"cross_attn": _UNET_TEXT, "pooled_output": pooled(1280)})
_IMAGE_BESIDE = Family({"cross_attn": _UNET_TEXT, "concat_latent_image": picture()})
_CLIP_IMAGE_BESIDE = Family(
    {"cross_attn": pooled(setting("context_dim"), form=_token), "concat_latent_image": picture()}, batch=_frames
)

FAMILIES: Mapping[str, Family] = {
    # U-Nets
    BASE: Family({"cross_attn": _UNET_TEXT}),
    "SD21UNCLIP": Family(
        {
            "cross_attn": _UNET_TEXT,
            "unclip_conditioning": pooled(_unclip_width, form=_unclip_row),
        }
    ),
    "SDXL": _SDXL,
    "SDXLRefiner": _SDXL,
    "SVD_img2vid": _CLIP_IMAGE_BESIDE,
    "Stable_Zero123": Family(
        {"cross_attn": pooled(setting("context_dim"), form=_token), "concat_latent_image": picture()}
    ),
    "SD_X4Upscaler": Family({"cross_attn": _UNET_TEXT, "concat_image": signal(3, _height, _width)}),
    "SD15_instructpix2pix": _IMAGE_BESIDE,
    "SDXL_instructpix2pix": _IMAGE_BESIDE,
    "Lotus": Family({"cross_attn": _UNET_TEXT}),
    # Stable Cascade
    "StableCascade_C": Family(
        {
            "cross_attn": text(inputs("clip_txt_mapper")),
            "pooled_output": pooled(inputs("clip_txt_pooled_mapper")),
            "unclip_conditioning": pooled(inputs("clip_img_mapper"), form=_unclip),
        }
    ),
    "StableCascade_B": Family(
        {
            "pooled_output": pooled(inputs("clip_mapper")),
            "stable_cascade_prior": signal(16, over(times(_height, 4), 42), over(times(_width, 4), 42)),
        }
    ),
    # pictures
    "SD3": Family(
        {"cross_attn": text(inputs("context_embedder")), "pooled_output": pooled(inputs("y_embedder.mlp.0"))}
    ),
    "AuraFlow": Family({"cross_attn": text(inputs("cond_seq_linear"))}),
    "PixArt": Family({"cross_attn": text(inputs("y_embedder.y_proj.fc1"))}, smallest=64),
    "HunyuanDiT": Family(
        {
            "cross_attn": Want((number("text_len"), inputs("blocks.0.attn2.kv_proj"))),
            "attention_mask": Want((number("text_len"),), "ones"),
            "conditioning_mt5xl": Want((number("text_len_t5"), inputs("mlp_t5.0"))),
            "attention_mask_mt5xl": Want((number("text_len_t5"),), "ones"),
        }
    ),
    "Flux": Family(
        {
            "cross_attn": text(inputs("txt_in")),
            "pooled_output": pooled(inputs("vector_in.in_layer"), only_with="vector_in.in_layer"),
            "concat_latent_image": picture(),
        }
    ),
    "Lens": Family({"cross_attn": text(inputs("txt_in"))}),
    "Lumina2": Family(
        {
            "cross_attn": text(inputs("cap_embedder.1")),
            "pooled_output": pooled(inputs("clip_text_pooled_proj.0"), only_with="clip_text_pooled_proj.0"),
        }
    ),
    "PixelDiTT2I": Family({"cross_attn": text(inputs("y_embedder.proj"))}),
    "PiD": Family(
        {
            "lq_latent": signal(number("lq_proj.latent_channels"), over(_height, _upscaling), over(_width, _upscaling)),
            "degrade_sigma": Want((), "ones"),
        }
    ),
    "HiDream": Family(
        {
            "cross_attn": text(_last_caption),
            "pooled_output": pooled(inputs("p_embedder.pooled_embedder.linear_1")),
            "conditioning_llama3": Want((_llama_layers, _text, inputs("caption_projection.0.linear"))),
        }
    ),
    "HiDreamO1": Family(
        {
            "text_input_ids": Want((_text,), "ids", below=QWEN_WORDS),
            "reference_latents": signal(_height, _width, 3, form=_listed),
        },
        multiple=32,
    ),
    "Omnigen2": Family(
        {
            "cross_attn": text(inputs("time_caption_embed.caption_embedder.0")),
            "attention_mask": Want((_text,), "ones"),
            "reference_latents": picture(form=_listed),
        }
    ),
    "QwenImage": Family({"cross_attn": text(inputs("txt_in"))}),
    "JoyImage": Family({"cross_attn": text(inputs("condition_embedder.text_embedder.linear_1"))}),
    "Ideogram4": Family({"cross_attn": text(inputs("llm_cond_proj"))}),
    "Krea2": Family({"cross_attn": text(_krea_text)}),
    "ErnieImage": Family({"cross_attn": text(_ernie_text)}),
    # films
    "GenmoMochi": Family(
        {
            "cross_attn": Want((256, inputs("t5_yproj"))),
            "attention_mask": Want((256,), "ones"),
        }
    ),
    "LTXV": Family(
        {"cross_attn": text(inputs("caption_projection.linear_1")), "attention_mask": Want((_text,), "ones")}
    ),
    "LTXAV": Family(
        {"cross_attn": text(_ltxav_text)},
        latents=(
            FILM,
            (number("num_audio_channels"), times(_frames, 8), number("audio_frequency_bins")),
        ),
    ),
    "HunyuanVideo": Family(
        {
            "cross_attn": text(inputs("txt_in.input_embedder")),
            "pooled_output": pooled(inputs("vector_in.in_layer"), only_with="vector_in.in_layer"),
            "conditioning_byt5small": text(inputs("byt5_in.fc1"), only_with="byt5_in.fc1"),
            "clip_vision_output": vision("vision_in.proj.1", tokens=729),
        },
        {"pooled_output": None},
    ),
    "HunyuanVideo15": Family({"concat_latent_image": picture(FILM)}),
    "HunyuanVideo15_SR_Distilled": Family(
        {"concat_latent_image": signal(times(_channels, 2, 2), _frames, _height, _width)}
    ),
    "HunyuanVideoI2V": Family({"concat_latent_image": picture(FILM)}),
    "HunyuanVideoSkyreelsI2V": Family({"concat_latent_image": picture(FILM)}),
    "HunyuanImage21": Family(
        {
            "cross_attn": text(inputs("txt_in.input_embedder")),
            "conditioning_byt5small": text(inputs("byt5_in.fc1"), only_with="byt5_in.fc1"),
        }
    ),
    "HunyuanImage21Refiner": Family({"concat_latent_image": picture(FILM)}),
    "CosmosVideo": Family({"cross_attn": text(inputs("blocks.block0.blocks.1.block.attn.to_k.0"))}),
    "CosmosPredict2": Family({"cross_attn": text(inputs("blocks.0.cross_attn.k_proj"))}),
    "Anima": Family(
        {
            "cross_attn": text(inputs("llm_adapter.blocks.0.cross_attn.k_proj")),
            "t5xxl_ids": Want((_text,), "ids", _row, below=inputs("llm_adapter.embed")),
            "t5xxl_weights": Want((_text,), "ones", _row),
        }
    ),
    "WAN21": Family(
        {
            "cross_attn": text(inputs("text_embedding.0")),
            "clip_vision_output": vision("img_emb.proj.1", inputs("img_emb.proj.0")),
            "concat_latent_image": picture((_wan_beside, _frames, _height, _width)),
            "reference_latents": picture(FIRST_FRAME, form=_listed, only_with="ref_conv"),
        }
    ),
    "WAN21_Vace": Family({"vace_frames": picture((32, _frames, _height, _width), form=_listed)}),
    "WAN21_Camera": Family(
        {
            "camera_conditions": signal(
                over(inputs("control_adapter.conv"), 64), _frames, times(_height, 8), times(_width, 8)
            )
        }
    ),
    "WAN21_HuMo": Family(
        {
            "audio_embed": Want(
                (_frames, number("audio_proj.seq_len"), number("audio_proj.blocks"), number("audio_proj.channels"))
            ),
            "reference_latents": picture(FIRST_FRAME, form=_listed),
        }
    ),
    "WAN22_Animate": Family(
        {
            "face_video_pixels": signal(3, times(_frames, 4, -3), 512, 512),
            "pose_video_latent": picture(FILM),
        },
        frames=2,
    ),
    "WAN_Animate2": Family(
        {"pose_video_latent": picture((_channels, times(_frames, 1, -1), _height, _width))}, frames=2
    ),
    "WAN22_S2V": Family(
        {
            "audio_embed": Want(
                (times(_frames, 4), _speech_layers, inputs("casual_audio_encoder.encoder.conv1_local.conv")),
                form=_channels_first,
            ),
            "reference_latents": picture(FIRST_FRAME, form=_listed),
            "reference_motion": picture((_channels, 19, _height, _width)),
            "control_video": picture(FILM),
        }
    ),
    "WAN21_SCAIL": Family(
        {
            "concat_latent_image": None,
            "reference_latents": picture(FIRST_FRAME, form=_listed),
            "pose_video_latent": picture((_channels, _frames, over(_height, 2), over(_width, 2))),
        }
    ),
    "WAN22_WanDancer": Family(
        {
            "audio_embed": Want((times(_frames, 8), inputs("music_projection"))),
            "clip_vision_output_ref": vision("img_emb_refimage.proj.1", inputs("img_emb_refimage.proj.0")),
        }
    ),
    "Kandinsky5": Family(
        {
            "cross_attn": text(inputs("text_embeddings.in_layer")),
            "pooled_output": pooled(inputs("pooled_text_embeddings.in_layer")),
        }
    ),
    "CogVideoX": Family(
        {"cross_attn": Want((226, inputs("patch_embed.text_proj"))), "concat_latent_image": picture(FILM)}
    ),
    "SeedVR2": Family(
        {
            "cross_attn": text(inputs("txt_in")),
            "condition": signal(times(_channels, 1, 1), _frames, _height, _width),
        }
    ),
    "MiniMaxH3": Family(
        {"cross_attn": text(inputs("condition_proj"))},
        latents=(
            (number("latents_dim"), _frames, _height, _width),
            (number("audio_latents_dim"), 2, times(_frames, 7)),
        ),
    ),
    # sounds
    "StableAudio1": Family({"cross_attn": text(inputs("to_cond_embed.0"))}),
    "StableAudio3": Family({"cross_attn": text(inputs("to_cond_embed.0")), "concat_latent_image": picture(SOUND)}),
    "ACEStep": Family(
        {
            "cross_attn": text(inputs("genre_embedder")),
            "conditioning_lyrics": Want((_text,), "ids", below=inputs("lyric_embs")),
        },
        latents=((_channels, 16, _tokens),),
    ),
    "ACEStep15": Family(
        {
            "cross_attn": text(inputs("encoder.text_projector")),
            "conditioning_lyrics": text(inputs("encoder.lyric_encoder.embed_tokens")),
            "reference_audio_timbre_latents": picture((_channels, _tokens), form=_listed),
        }
    ),
    "MiniMaxMusic3": Family(
        {
            "cross_attn": Want((_tokens, times(inputs("latent_conditioners.0"), 8))),
            "conditioning_scale": Want((1, 1), "ones"),
        }
    ),
    # shapes
    "Hunyuan3Dv2": Family({"cross_attn": text(inputs("cond_in"))}),
    "Hunyuan3Dv2_1": Family({"cross_attn": text(inputs("blocks.0.attn2.to_k"))}),
    "TripoSplat": Family(
        {
            "cross_attn": Want((times(_tokens, 1, 5), number("cond_channels"))),
            "reference_latents": signal(number("cond2_channels"), 1, _tokens, form=_listed, only_with="cond_embedder2"),
        },
        latents=((number("q_token_length"), number("in_channels")), (1, number("cam_channels"))),
    ),
}
"""By class of `comfy.model_base`."""

NOTHING_TO_PAINT: Mapping[str, str] = {
    "RT_DETR_v4": "it finds objects in pictures",
    "SAM3": "it cuts objects out of pictures",
    "DepthAnything3": "it measures the depth of pictures",
}
"""Models that ComfyUI loads and that make nothing of noise."""


def family_of(classes: Iterable[str]) -> Family:
    """What a model takes.

    Args:
        classes: names of its class of `comfy.model_base` and of those that it derives from, nearest first.

    Returns:
        The rows of all of them in one.

    Raises:
        UnsupportedModelError: there is no row, or the model paints nothing.
    """
    names = list(classes)
    idle = next((NOTHING_TO_PAINT[name] for name in names if name in NOTHING_TO_PAINT), None)
    if idle is not None:
        raise UnsupportedModelError(f"ComfyUI's {names[0]} is no diffusion model: {idle}")
    if names[0] != BASE:
        names = names[: names.index(BASE)] if BASE in names else names
    rows = [FAMILIES[name] for name in names if name in FAMILIES]
    if not rows:
        raise UnsupportedModelError(
            f"what ComfyUI's {names[0]} takes besides latents is not known here",
            hint="record it in ComfyUI with the Record Activations node",
        )
    joined = rows[-1]
    for row in reversed(rows[:-1]):
        joined = Family(
            {**joined.wants, **row.wants},
            {**joined.settings, **row.settings},
            row.latents or joined.latents,
            joined.batch if row.batch == 1 else row.batch,
            max(row.multiple, joined.multiple),
            max(row.smallest, joined.smallest),
            max(row.frames, joined.frames),
        )
    return joined


def wanted(family: Family, scene: Scene) -> dict[str, tuple[Want, tuple[int, ...]]]:
    """What a model in a scene wants, with shapes in numbers.

    Raises:
        UnsupportedModelError: the network does not have a part that tells a size.
    """
    return {
        name: (want, tuple(measure(size, scene) for size in want.shape))
        for name, want in family.wants.items()
        if want is not None and (want.only_with is None or scene.part(want.only_with) is not None)
    }


def draw(
    family: Family, scene: Scene, way: noise.Conditioning, seed: int, number: int, *, as_encoded: Wrap = _as_it_is
) -> dict[str, Any]:
    """A conditioning as ComfyUI's nodes attach it.

    Args:
        family: what the model takes.
        scene: what is painted.
        way: how loud it is.
        seed: of the run.
        number: of the trajectory.
        as_encoded: makes of latents as the network sees them those that a VAE gives.

    Returns:
        {name: what stands there}.
    """
    entries = wanted(family, scene)
    signals = {name: noise.Signal(shape) for name, (want, shape) in entries.items() if want.kind == "noise"}
    values: dict[str, Tensor] = noise.conditioning(signals, way, seed, number)
    for place, (name, (want, shape)) in enumerate(entries.items()):
        if want.kind in ("picture", "signal"):
            drawn = noise.latents(shape, seed, PICTURES + number * len(entries) + place)
            values[name] = as_encoded(drawn) if want.kind == "picture" else drawn
        elif want.kind == "ids":
            rng = np.random.default_rng((seed, IDS + number * len(entries) + place))
            values[name] = torch.from_numpy(rng.integers(measure(want.below, scene), size=(1, *shape)))
        elif want.kind == "ones":
            values[name] = torch.ones((1, *shape), dtype=torch.int64)
    return {**family.settings, **{name: want.form(values[name]) for name, (want, _) in entries.items()}}
