"""Diffusion model families as data: how to recognize one, and which of its linear layers stay in high precision.

Why it exists. In FP8 a layer's error is about the same everywhere (the step is relative), but what it costs is not.
The repeated blocks hold most of the weights and add their errors to a residual stream that many others feed. What lies
outside them is small and touches everything: embedders of pixels, text, time and guidance feed all blocks at once, the
final layer is the picture itself. So converters in the field quantize the blocks and keep the rest, and so does this
table.

How it works. A `Family` has signatures (module names that a checkpoint must and must not contain, and where names do
not decide, the size of one tensor), the modules whose layers are quantized (`blocks`), and the layers that are kept
with the reason for each (`keep`). Everything outside `blocks` is kept, also a layer that this table has never heard
of: an unknown layer in high precision costs a little memory, an unknown layer in FP8 can cost the picture. Models come
in the naming of their authors (which ComfyUI keeps) and in that of diffusers; a family knows both.

A pattern is a regular expression that covers a bare name (without the checkpoint's prefix) from its start up to its
end or up to a dot: ``proj_out`` keeps the model's own ``proj_out``, not ``single_transformer_blocks.0.proj_out``.

Where the choices come from (neighbours, read in November 2026; named where they decided):
    ModelOpt       NVIDIA/Model-Optimizer, examples/diffusers/quantization: filter functions per model
    musubi         kohya-ss/musubi-tuner: FP8 target and exclude keys per model
    dit-quantizer  bedovyy/comfy-dit-quantizer: rules per model
    silveroxides   silveroxides/convert_to_quant: filter presets per model
    Lightricks     its own LTX-2 FP8 files, as their readers list them

Limits. A name says where a layer sits, not how large its inputs grow; Z-Image's MLP inputs reach 6.6e4 in layers that
this table quantizes. Layers that lose their small rows in FP8 are found by calibration, which keeps their weights in
FP8 and their matrix product in full precision.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from convert_to_quant.errors import OptionError


def _covers(pattern: str, name: str) -> bool:
    return re.match(rf"(?:{pattern})(?:\.|$)", name) is not None


@dataclass(frozen=True)
class Keep:
    """Layers that stay in high precision.

    Attributes:
        pattern: Regular expression over bare layer names, matched as the module's docstring says.
        reason: Half a sentence for the user.
    """

    pattern: str
    reason: str


@dataclass(frozen=True)
class Signature:
    """What the tensor names of one family, in one naming, look like.

    Attributes:
        has: Modules or tensors that are all there.
        lacks: Modules or tensors none of which is there.
        size: (regular expression over whole tensor names, axis, sizes): the first tensor, in order of names, that
            matches has one of these sizes along this axis. None where names suffice.
    """

    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    size: tuple[str, int, tuple[int, ...]] | None = None

    def fits(self, modules: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a checkpoint is of this kind.

        Args:
            modules: Bare names of its tensors and of all modules above them.
            shapes: Bare tensor name -> shape.
        """
        if not all(name in modules for name in self.has) or any(name in modules for name in self.lacks):
            return False
        if self.size is None:
            return True
        pattern, axis, sizes = self.size
        shape = next((shapes[name] for name in sorted(shapes) if re.fullmatch(pattern, name)), ())
        return axis < len(shape) and shape[axis] in sizes


@dataclass(frozen=True)
class Family:
    """One family of diffusion models.

    Attributes:
        name: The spelling of `--preset`.
        title: Name for people, with the members that are easily taken for something else.
        blocks: Pattern of the modules whose linear layers are quantized.
        keep: Layers that stay in high precision, inside the blocks and outside, with reasons.
        signatures: Ways to recognize it.
    """

    name: str
    title: str
    blocks: str
    keep: tuple[Keep, ...]
    signatures: tuple[Signature, ...]

    def kept_because(self, layer: str) -> str | None:
        """Why a linear layer stays in high precision.

        Args:
            layer: Bare layer name, without the checkpoint's prefix and without `.weight`.

        Returns:
            The reason, or None for a layer that is quantized.

        >>> family("flux1").kept_because("img_in")
        'image embedder: feeds every block'
        >>> family("flux1").kept_because("single_blocks.37.linear2") is None
        True
        """
        for kept in self.keep:
            if _covers(kept.pattern, layer):
                return kept.reason
        return None if _covers(self.blocks, layer) else "outside the repeated blocks"


# Reasons that several families share.
_IMAGE = "image embedder: feeds every block"
_TEXT = "text embedder: feeds every block, and text encoders are loud in a few channels"
_VECTOR = "time, guidance or pooled-text embedder: one row steers all blocks"
_CONDITION = "embedder of an extra condition (image, audio, face, glyphs)"
_FINAL = "final layer: its error is in the picture as it is"
_MODULATION = "modulation: one row scales every token of its blocks, and it costs nothing in time"
_REFINER = "token refiner: few weights, and its error reaches every block"

# How the authors of Flux name their blocks (Chroma and HunyuanVideo follow them), and how diffusers names them.
_DOUBLE_AND_SINGLE = r"(?:double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.\d+"

# diffusers has the same names for the ends of Flux.1, Flux.2, Chroma, SD3 and HunyuanVideo.
_DIFFUSERS_ENDS = (
    Keep(r"x_embedder|pos_embed", _IMAGE),
    Keep(r"context_embedder|context_embedder_2", _TEXT),
    Keep(r"time_text_embed|time_guidance_embed|time_embed", _VECTOR),
    Keep(r"norm_out|proj_out", _FINAL),
)

# Z-Image is Lumina 2's network with another modulation: the same layers stay. musubi quantizes the refiners (weights
# only), dit-quantizer keeps them and silveroxides has a preset for it; with FP8 activations keeping them is the safer
# choice, for an eighth of the weights. musubi and silveroxides keep the modulation: 256 inputs, so it hardly weighs
# anything.
_NEXT_DIT_KEEP = (
    Keep(r"x_embedder|all_x_embedder", _IMAGE),
    Keep(r"cap_embedder|time_caption_embed\.caption_embedder|clip_text_pooled_proj", _TEXT),
    Keep(r"t_embedder|time_caption_embed|time_text_embed", _VECTOR),
    Keep(r"siglip_embedder", _CONDITION),
    Keep(r"noise_refiner|context_refiner|siglip_refiner", _REFINER),
    Keep(r"layers\.\d+\.(?:adaLN_modulation|norm1)", _MODULATION),
    Keep(r"final_layer|all_final_layer|norm_out|dec_net", _FINAL),
)

_ALL = (
    # ModelOpt quantizes the modulation of Flux.1 (27 % of its weights), musubi keeps it (to train on).
    # A layer of one row per picture is no risk in FP8 weights: calibration gives it full precision where it multiplies.
    Family(
        name="flux1",
        title="Flux.1 (dev, schnell, Kontext, Fill, Krea)",
        blocks=_DOUBLE_AND_SINGLE,
        keep=(
            Keep(r"img_in", _IMAGE),
            Keep(r"txt_in", _TEXT),
            Keep(r"time_in|vector_in|guidance_in", _VECTOR),
            Keep(r"final_layer", _FINAL),
            *_DIFFUSERS_ENDS,
        ),
        signatures=(
            Signature(
                has=("double_blocks.0.img_attn", "img_in", "txt_in", "time_in", "vector_in"),
                lacks=("txt_in.individual_token_refiner", "distilled_guidance_layer", "double_stream_modulation_img"),
            ),
            Signature(
                has=(
                    "transformer_blocks.0.attn.add_q_proj",
                    "single_transformer_blocks.0.attn",
                    "time_text_embed.text_embedder",
                    "x_embedder.weight",
                ),
                lacks=("context_embedder.token_refiner", "distilled_guidance_layer"),
            ),
        ),
    ),
    # One modulation for all blocks: ModelOpt, musubi and silveroxides keep it.
    Family(
        name="flux2",
        title="Flux.2 (dev, klein)",
        blocks=_DOUBLE_AND_SINGLE,
        keep=(
            Keep(r"img_in", _IMAGE),
            Keep(r"txt_in", _TEXT),
            Keep(r"time_in|guidance_in", _VECTOR),
            Keep(r"double_stream_modulation_(?:img|txt)|single_stream_modulation", _MODULATION),
            Keep(r"final_layer", _FINAL),
            *_DIFFUSERS_ENDS,
        ),
        signatures=(
            Signature(
                has=("double_blocks.0.img_attn", "double_stream_modulation_img.lin", "single_stream_modulation.lin")
            ),
            Signature(
                has=(
                    "transformer_blocks.0.attn.add_q_proj",
                    "double_stream_modulation_img.linear",
                    "single_stream_modulation.linear",
                )
            ),
        ),
    ),
    # silveroxides' larger Chroma preset; Radiance replaces the ends by small networks over pixels ("nerf").
    Family(
        name="chroma",
        title="Chroma (HD, Radiance)",
        blocks=_DOUBLE_AND_SINGLE,
        keep=(
            Keep(r"distilled_guidance_layer", _MODULATION),
            Keep(r"img_in|img_in_patch", _IMAGE),
            Keep(r"txt_in", _TEXT),
            Keep(r"nerf_image_embedder|nerf_blocks|nerf_final_layer|nerf_final_layer_conv", _FINAL),
            Keep(r"final_layer", _FINAL),
            *_DIFFUSERS_ENDS,
        ),
        signatures=(
            Signature(has=("double_blocks.0.img_attn", "distilled_guidance_layer")),
            Signature(has=("transformer_blocks.0.attn.add_q_proj", "distilled_guidance_layer")),
        ),
    ),
    # ModelOpt quantizes the modulation inside the blocks.
    Family(
        name="sd3",
        title="Stable Diffusion 3 and 3.5",
        blocks=r"(?:joint_blocks|transformer_blocks)\.\d+",
        keep=(
            Keep(r"x_embedder", _IMAGE),
            Keep(r"context_embedder|context_processor", _TEXT),
            Keep(r"t_embedder|y_embedder", _VECTOR),
            Keep(r"final_layer", _FINAL),
            *_DIFFUSERS_ENDS,
        ),
        signatures=(
            Signature(has=("joint_blocks.0.context_block", "joint_blocks.0.x_block", "y_embedder")),
            Signature(
                has=(
                    "transformer_blocks.0.attn.add_q_proj",
                    "transformer_blocks.0.norm1_context.linear",
                    "pos_embed.proj",
                    "time_text_embed.text_embedder",
                ),
                lacks=("single_transformer_blocks",),
            ),
        ),
    ),
    # silveroxides keeps the first image modulation on top of the ends; musubi quantizes all of it; ModelOpt keeps the
    # first two and last two blocks whole, which calibration can still decide.
    Family(
        name="qwen-image",
        title="Qwen-Image (also Edit, Layered)",
        blocks=r"transformer_blocks\.\d+",
        keep=(
            Keep(r"img_in", _IMAGE),
            Keep(r"txt_in", _TEXT),
            Keep(r"time_text_embed", _VECTOR),
            Keep(
                r"transformer_blocks\.0\.img_mod",
                "first image modulation: one row, and its error starts the residual stream",
            ),
            Keep(r"norm_out|proj_out", _FINAL),
        ),
        signatures=(
            Signature(
                has=(
                    "transformer_blocks.0.img_mod",
                    "transformer_blocks.0.txt_mod",
                    "transformer_blocks.0.img_mlp.net",
                    "transformer_blocks.0.attn.add_q_proj",
                    "txt_norm",
                )
            ),
        ),
    ),
    # musubi's and silveroxides' lists, which agree; the extra conditions are those of VACE, Animate, S2V, HuMo,
    # Fun-Control.
    Family(
        name="wan",
        title="Wan 2.1 and 2.2 (also VACE, Animate, S2V, SkyReels V2)",
        blocks=r"(?:blocks|vace_blocks)\.\d+",
        keep=(
            Keep(r"patch_embedding(?:_\w+)?|vace_patch_embedding|pose_patch_embedding|ref_conv", _IMAGE),
            Keep(r"text_embedding|condition_embedder\.text_embedder", _TEXT),
            Keep(r"img_emb|condition_embedder\.image_embedder", _CONDITION),
            Keep(r"time_embedding|time_projection|condition_embedder", _VECTOR),
            Keep(r"audio_\w+|casual_audio_encoder|face_\w+|motion_encoder|frame_packer|cond_encoder", _CONDITION),
            Keep(r"control_adapter|trainable_cond_mask", _CONDITION),
            Keep(r"head|proj_out", _FINAL),
        ),
        signatures=(
            Signature(
                has=(
                    "blocks.0.self_attn.q",
                    "blocks.0.cross_attn.q",
                    "blocks.0.ffn.0",
                    "time_projection.1",
                    "head.head",
                )
            ),
            Signature(has=("blocks.0.attn1.to_q", "blocks.0.attn2.to_q", "condition_embedder.time_proj")),
        ),
    ),
    # musubi quantizes the blocks, modulation included.
    Family(
        name="hunyuan-video",
        title="HunyuanVideo 1.0 and 1.5 (also HunyuanImage 2.1, FramePack)",
        blocks=_DOUBLE_AND_SINGLE,
        keep=(
            Keep(r"img_in", _IMAGE),
            Keep(r"txt_in\.individual_token_refiner|context_embedder\.token_refiner", _REFINER),
            Keep(r"txt_in", _TEXT),
            Keep(r"time_in|time_r_in|vector_in|guidance_in", _VECTOR),
            Keep(r"byt5_in|vision_in|cond_type_embedding|image_embedder|image_projection|cond_type_embed", _CONDITION),
            Keep(r"final_layer", _FINAL),
            *_DIFFUSERS_ENDS,
        ),
        signatures=(
            Signature(has=("double_blocks.0", "txt_in.individual_token_refiner")),
            Signature(has=("transformer_blocks.0.attn.add_q_proj", "context_embedder.token_refiner")),
        ),
    ),
    Family(
        name="z-image",
        title="Z-Image (Base, Turbo, Edit)",
        blocks=r"layers\.\d+",
        keep=_NEXT_DIT_KEEP,
        signatures=(
            Signature(
                has=(
                    "noise_refiner.0.attention",
                    "cap_embedder",
                    "layers.0.adaLN_modulation.0",
                    "layers.0.feed_forward.w1",
                )
            ),
        ),
    ),
    Family(
        name="lumina2",
        title="Lumina-Image 2.0 (also NewBie)",
        blocks=r"layers\.\d+",
        keep=_NEXT_DIT_KEEP,
        signatures=(
            Signature(
                has=(
                    "noise_refiner.0.attention",
                    "cap_embedder",
                    "layers.0.adaLN_modulation.1",
                    "layers.0.feed_forward.w1",
                )
            ),
            Signature(
                has=(
                    "noise_refiner.0.attn.to_q",
                    "context_refiner.0.attn.to_q",
                    "time_caption_embed",
                    "layers.0.norm1.linear",
                ),
                lacks=("ref_image_refiner",),  # OmniGen 2
            ),
        ),
    ),
    # The ends as in silveroxides and ModelOpt. Blocks 0, 1, 46 and 47 of the 48 in LTX-Video 13B and LTX-2 are kept by
    # silveroxides, dit-quantizer and ModelOpt (which adds 2 and 45); Lightricks' own files keep 0 and 43 to 47.
    Family(
        name="ltx",
        title="LTX-Video and LTX-2",
        blocks=r"transformer_blocks\.\d+",
        keep=(
            Keep(r"patchify_proj|audio_patchify_proj|proj_in|audio_proj_in", _IMAGE),
            Keep(r"(?:audio_)?caption_projection|(?:audio|video)_embeddings_connector|connectors", _TEXT),
            Keep(r"\w*adaln_single|time_embed|audio_time_embed|\w*prompt_adaln|av_cross_attn_\w+", _VECTOR),
            Keep(r"transformer_blocks\.(?:0|1|46|47)", "first or last two of 48 blocks, which others keep as well"),
            Keep(
                r"transformer_blocks\.\d+\.\w+\.to_gate_logits",
                "attention gate: one row per head, and it scales whole heads",
            ),
            Keep(r"proj_out|audio_proj_out", _FINAL),
        ),
        signatures=(
            Signature(has=("patchify_proj", "adaln_single.linear", "transformer_blocks.0.attn1.to_q", "proj_out")),
            Signature(
                has=(
                    "proj_in.weight",
                    "time_embed.linear",
                    "transformer_blocks.0.attn2.to_q",
                    "transformer_blocks.0.ff",
                    "proj_out",
                ),
                lacks=("patch_embed", "transformer_blocks.0.attn1.add_q_proj"),
            ),
        ),
    ),
    # dit-quantizer quantizes the transformer blocks; ModelOpt keeps the embedders. Their neighbours Stable Diffusion 1
    # and 2 have the same names and context vectors of 768 and 1024; SDXL has 2048 and its refiner 1280.
    Family(
        name="sdxl",
        title="Stable Diffusion XL (base, refiner, and models tuned from it)",
        blocks=r".*\.transformer_blocks\.\d+",
        keep=(
            Keep(r"time_embed|time_embedding|label_emb|add_embedding", _VECTOR),
            Keep(r".*\.(?:emb_layers|time_emb_proj)", _VECTOR),
            Keep(
                r".*\d+\.(?:proj_in|proj_out)", "edge of a transformer: carries the residual stream of its whole level"
            ),
            Keep(r"encoder_hid_proj", _TEXT),
        ),
        signatures=(
            Signature(
                has=("input_blocks.0.0", "label_emb.0.0", "output_blocks.0.0"),
                size=(r"(?:input|output)_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight", 1, (2048, 1280)),
            ),
            Signature(
                has=("conv_in", "add_embedding.linear_1", "down_blocks.0", "up_blocks.0"),
                size=(
                    r"(?:down|up)_blocks\.\d+\.attentions\.0\.transformer_blocks\.0\.attn2\.to_k\.weight",
                    1,
                    (2048, 1280),
                ),
            ),
        ),
    ),
)

FAMILIES: Mapping[str, Family] = {entry.name: entry for entry in _ALL}
"""Every family by its `--preset` name."""

GENERIC = Family(
    name="generic",
    title="unknown model",
    blocks=r"(?:.*\.)?[a-z_]*(?:block|blocks|layer|layers)\.\d+",
    keep=(
        Keep(r".*refiner[a-z_]*", _REFINER),
        Keep(r".*emb(?:ed|_)[a-z_]*", "embedder, by its name"),
        Keep(r".*(?:modulation|adaln|adaLN)[A-Za-z_]*", _MODULATION),
    ),
    signatures=(),
)
"""For a model that no family fits: repeated blocks are quantized, except what sounds like an embedder, a refiner or a
modulation in them. It is never detected; the caller falls back to it and says so."""


@dataclass(frozen=True)
class OtherPart:
    """A part of a full checkpoint that is no diffusion model.

    Attributes:
        prefix: Beginning of its tensor names, as the file spells them.
        title: Name for people.
    """

    prefix: str
    title: str


# Text encoders run in full precision in ComfyUI, so FP8 there would only lose; a VAE is convolutions and paints the
# pixels.
OTHER_PARTS = (
    OtherPart("text_encoders.", "text encoder"),
    OtherPart("text_encoder.", "text encoder"),
    OtherPart("text_encoder_2.", "text encoder"),
    OtherPart("text_encoder_3.", "text encoder"),
    OtherPart("cond_stage_model.", "text encoder"),
    OtherPart("conditioner.", "text encoder"),
    OtherPart("text_embedding_projection.", "text encoder"),  # LTX-2: between Gemma and the transformer
    OtherPart("clip_vision.", "image encoder"),
    OtherPart("image_encoder.", "image encoder"),
    OtherPart("first_stage_model.", "VAE"),
    OtherPart("vae.", "VAE"),
    OtherPart("audio_vae.", "VAE"),
    OtherPart("vocoder.", "vocoder"),
    OtherPart("model_ema.", "second copy of the model (moving average)"),
)
"""Parts of a full checkpoint that are never quantized by default."""


def other_part(name: str) -> OtherPart | None:
    """Find out whether a tensor or layer belongs to a text encoder, a VAE, or another part that is not quantized.

    Args:
        name: Its full name, as the file spells it.

    Returns:
        The part, or None for the diffusion model's own layers.

    >>> other_part("first_stage_model.decoder.mid.attn_1.q").title
    'VAE'
    """
    return next((part for part in OTHER_PARTS if name.startswith(part.prefix)), None)


def detect(names: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> Family | None:
    """Recognize a checkpoint's family.

    Args:
        names: Bare tensor names: without the checkpoint's prefix, with `.weight`.
        shapes: Bare tensor name -> shape; only SDXL needs it.

    Returns:
        The family, or None where no family fits (`GENERIC` is then the table to use). No checkpoint fits two.
    """
    modules = module_names(names)
    return next((entry for entry in _ALL if any(known.fits(modules, shapes) for known in entry.signatures)), None)


def module_names(names: Collection[str]) -> set[str]:
    """List tensor names and the names of all modules above them.

    >>> sorted(module_names(["img_in.weight"]))
    ['img_in', 'img_in.weight']
    """
    return {name[:end] for name in names for end, letter in enumerate(name + ".") if letter == "."}


def family(name: str) -> Family:
    """Look a family up by its `--preset` name; case, `_` and spaces do not matter.

    Args:
        name: A key of `FAMILIES`, or "generic".

    Raises:
        OptionError: There is no such family.
    """
    known = {**FAMILIES, GENERIC.name: GENERIC}
    plain = {key.replace("-", ""): key for key in known}
    wanted = re.sub(r"[-_. ]", "", name.lower())
    if wanted in plain:
        return known[plain[wanted]]
    close = difflib.get_close_matches(wanted, plain, n=1)
    hint = f"did you mean {plain[close[0]]!r}? " if close else ""
    raise OptionError(f"unknown preset {name!r}", hint=f"{hint}presets: {', '.join(known)}")
