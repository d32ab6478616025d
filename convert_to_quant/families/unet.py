"""U-Nets from Stable Diffusion 1 to XL.

The authors number blocks from first to last; diffusers by level, with two blocks per level on the way down and three on
the way up. Everything but the transformers is convolutions, which no format here supports.
"""

from __future__ import annotations

from typing import Any

from .base import TEXT, VECTOR, Family, Signature, signature
from .comfyui import BASE, encoded, over, pooled, signal, takes, vision_output
from .comfyui import text as comfyui_text
from .rules import rules
from .running import CONDITION_LATENTS, Architecture, Config, Geometry, Inputs, Shapes, beside, if_there, text, vector

PLACES = [
    (f"{side}_blocks.{3 * level + block + first}", f"{way}_blocks.{level}", block)
    for side, way, blocks, first in (("input", "down", 2, 1), ("output", "up", 3, 0))
    for level in range(4)
    for block in range(blocks)
]
"""A block in its authors' names; its level, and its number there, in diffusers'."""

NAMES = rules(
    *((f"{theirs}.1.**", f"{level}.attentions.{block}.**") for theirs, level, block in PLACES),
    *((f"{theirs}.0.emb_layers.1", f"{level}.resnets.{block}.time_emb_proj") for theirs, level, block in PLACES),
    ("middle_block.1.**", "mid_block.attentions.0.**"),
    ("middle_block.{0,2}.emb_layers.1", "mid_block.resnets.{0,1}.time_emb_proj"),
    ("time_embed.{0,2}", "time_embedding.linear_{1,2}"),
)

_RESNETS = [(f"{theirs}.0", f"{level}.resnets.{block}") for theirs, level, block in PLACES]
_RESNETS += [("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")]
CONVOLUTIONS = rules(
    ("input_blocks.0.0", "conv_in"),
    ("out.{0,2}", "conv_{norm_out,out}"),
    *(
        (f"{theirs}.{{in_layers.0,in_layers.2,out_layers.0,out_layers.3,skip_connection}}",
         f"{ours}.{{norm1,conv1,norm2,conv2,conv_shortcut}}")
        for theirs, ours in _RESNETS
    ),
    *((f"input_blocks.{3 * level + 3}.0.op", f"down_blocks.{level}.downsamplers.0.conv") for level in range(4)),
    *(
        (f"output_blocks.{3 * level + 2}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv")
        for level in range(4)
        for place in (1, 2)
    ),
)  # fmt: skip

BLOCKS = r".*\.(?:(?:temporal_)?transformer_blocks|time_stack)\.\d+"
KEEP = {
    r".*\.(?:emb_layers|time_emb_proj|time_pos_embed)|class_embedding": VECTOR,
    r".*\d+\.(?:proj_in|proj_out)": "end of a transformer: carries the residual stream of its level",
    r"encoder_hid_proj": TEXT,
}

FIRST = r"(?:input_blocks\.0\.0|conv_in)\.weight"
"""The first convolution, whose inputs show what is concatenated to the latents."""

HEAD = 64
"""Channels of an attention head; Stable Diffusion 1 (text of 768 features) has 8 heads of any width."""

FIRST_TEXT = 768


def _counts(shapes: Shapes, prefix: str, module: str) -> list[int]:
    """For each numbered part under a prefix, how many of a module it has."""
    found: dict[int, set[str]] = {}
    for name in shapes:
        if name.startswith(prefix):
            number, part, index, *_ = name.removeprefix(prefix).split(".")
            found.setdefault(int(number), set()).update([index] if part == module else [])
    return [len(found[number]) for number in sorted(found)]


def config(shapes: Shapes) -> dict[str, Any]:
    """Configuration entries of all U-Nets."""
    resnets = _counts(shapes, "down_blocks.", "resnets")
    down, up = (
        [_counts(shapes, f"{way}_blocks.{level}.attentions.", "transformer_blocks") for level in range(len(resnets))]
        for way in ("down", "up")
    )
    middle = _counts(shapes, "mid_block.attentions.", "transformer_blocks")
    channels = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(len(resnets))]
    width = next(shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight"))
    ends = next(shape for name, shape in shapes.items() if name.endswith(".proj_in.weight"))
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": resnets,
        "down_block_types": [f"{'CrossAttn' if depths else ''}DownBlock2D" for depths in down],
        "up_block_types": [f"{'CrossAttn' if depths else ''}UpBlock2D" for depths in up],
        "mid_block_type": f"UNetMidBlock2D{'CrossAttn' if middle else ''}",
        "transformer_layers_per_block": [depths or middle or 1 for depths in down],  # the last is the middle's as well
        "reverse_transformer_layers_per_block": [depths or 1 for depths in up],
        "cross_attention_dim": width,
        "attention_head_dim": 8 if width == FIRST_TEXT else [max(each // HEAD, 1) for each in channels],
        "use_linear_projection": len(ends) == 2,
    }


def _config(shapes: Shapes) -> dict[str, Any]:
    labels = shapes.get("class_embedding.linear_1.weight")
    noised = {} if labels is None else {"class_embed_type": "projection", LABELS: labels[1]}
    return {**config(shapes), **noised}


LABELS = "projection_class_embeddings_input_dim"


def _latents(config: Config, geometry: Geometry) -> tuple[int, ...]:
    return config["out_channels"], 2 * geometry.height, 2 * geometry.width


def arguments(inputs: Inputs) -> dict[str, Any]:
    """As for transformers, but the latents are called `sample`."""
    usual = inputs.usual(1000)
    return {"sample": usual.pop("hidden_states"), **usual}


WANTS = {"encoder_hidden_states": text("cross_attention_dim"), CONDITION_LATENTS: beside(_latents, 0)}
ARCHITECTURE = Architecture(
    transformer="UNet2DConditionModel",
    config=_config,
    latents=_latents,
    wants={**WANTS, "class_labels": if_there(LABELS, vector(LABELS))},  # the image that unCLIP varies
    arguments=arguments,
    prediction="noise",
    names=CONVOLUTIONS,
)


def unclip(values: Any) -> Any:
    """The image that unCLIP varies."""
    return [{"clip_vision_output": vision_output(values), "strength": 1.0, "noise_augmentation": 0.0}]


def _unclip_row(values: Any) -> Any:
    """The same, as one of several images."""
    return unclip(values[:, None])


def _token(values: Any) -> Any:
    """A vector as a prompt of one token."""
    return values[:, None]


PROMPT = comfyui_text("context_dim")
IMAGE_BESIDE = takes(cross_attn=PROMPT, concat_latent_image=encoded())
_CLIP_IMAGE = pooled("context_dim", form=_token)


def signatures(embedding: str, *widths: int) -> tuple[Signature, ...]:
    """Signatures of U-Nets with some widths of text; `embedding` is diffusers' second embedder of vectors."""
    level = r"(?:down|up)_blocks\.\d+\.attentions\.0"
    return tuple(
        signature(names, size=(rf"{place}\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, widths))
        for names, place in (
            (f"input_blocks.0.0 {'label_emb.0.0' if embedding else 'time_embed.0'} output_blocks.0.0",
             r"(?:input|output)_blocks\.\d+\.1"),
            (f"conv_in {embedding or 'time_embedding'}.linear_1 down_blocks.0 up_blocks.0", level),
        )
    )  # fmt: skip


FAMILY = Family(
    name="unet",
    title="Stable Diffusion 1 and 2",
    signatures=signatures("", FIRST_TEXT, 1024),
    blocks=BLOCKS,
    keep=KEEP,
    names=(*NAMES, *rules(("label_emb.0.{0,2}", "class_embedding.linear_{1,2}"))),
    architecture=ARCHITECTURE,
    elsewhere=("Stable Video Diffusion", "ModelScope or I2VGen-XL", "x4 upscaler"),
    comfyui={
        BASE: takes(cross_attn=PROMPT),
        "SD21UNCLIP": takes(
            cross_attn=PROMPT, unclip_conditioning=pooled(over("adm_in_channels", 2), form=_unclip_row)
        ),
        "SVD_img2vid": takes(cross_attn=_CLIP_IMAGE, concat_latent_image=encoded(), batch="frames"),
        "Stable_Zero123": takes(cross_attn=_CLIP_IMAGE, concat_latent_image=encoded()),
        "SD_X4Upscaler": takes(cross_attn=PROMPT, concat_image=signal(3, "height", "width")),
        "SD15_instructpix2pix": IMAGE_BESIDE,
        "Lotus": takes(cross_attn=PROMPT),
    },
    variants=(
        (
            "Stable Video Diffusion",
            signature("input_blocks.1.1.time_stack|down_blocks.0.attentions.0.temporal_transformer_blocks"),
        ),
        ("ModelScope or I2VGen-XL", signature("down_blocks.0.temp_attentions")),
        ("Lotus", signature(size=(r"label_emb\.0\.0\.weight", 1, (4,)))),
        ("unCLIP", signature("label_emb.0.0|class_embedding.linear_1")),
        ("x4 upscaler", signature(size=(FIRST, 1, (7,)))),
        ("InstructPix2Pix or Zero123", signature(size=(FIRST, 1, (8,)))),
        ("inpainting", signature(size=(FIRST, 1, (9,)))),
        ("Stable Diffusion 1", signature(size=(r".*\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (768,)))),
        ("Stable Diffusion 2", signature(size=(r".*\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (1024,)))),
    ),
)
