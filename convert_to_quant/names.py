"""What tensors, layers and modules are called: every spelling this package knows, as tables.

Why it exists. One linear layer has several names. Its authors' checkpoint calls a fused projection
``double_blocks.0.img_attn.qkv``; diffusers splits it into ``transformer_blocks.0.attn.to_q``, ``to_k`` and ``to_v``;
LoRA trainers take either, prefix it, and some write ``_`` for ``.``. Whoever runs the model or merges an adapter has to
know which rows of which checkpoint layer a foreign name means. Those facts live here once, as data, and are looked up,
never parsed.

How it works. A `Rule` pairs two patterns and says which part of the checkpoint's layer the other name denotes. In a
pattern ``*`` stands for a block number and ``**`` for any rest; both sides hold the same ones in the same order. A part
is measured from the layer's own shape [out, in], never from a constant, so any hidden size works:

    qkv      [in + 2 k, in]   q is the first ``in`` rows, k and v share the rest (k < in: grouped queries)
    qkv_mlp  [3 in + m, in]   q, k, v of ``in`` rows each, then the MLP's m rows
    kv       [2 k, in]        two halves
    shift, scale [2 in, in]   diffusers stores scale, shift; a layer of any other shape is taken as it is

The diffusers names follow its own converters (`diffusers/loaders/single_file_utils.py`; ComfyUI's for PixArt, which it
has none for), and the tests hold them to those; the LoRA names follow what trainers write and what ComfyUI reads.

Limits. All rules are tried on all layers: a family is recognized by its layer names alone, and a name that fits nothing
has no other spelling. Only 2-D linear layers matter here; norms, tables and convolutions have no entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from .errors import OptionError

# The tensors of one layer: suffixes behind the layer's name. "Legacy" is the older ComfyUI spelling that a `scaled_fp8`
# tensor marks. `weight_scale_inv` multiplies like any other scale, despite its name (DeepSeek, 128 x 128 blocks).
WEIGHT = ".weight"
BIAS = ".bias"
WEIGHT_SCALE = ".weight_scale"
WEIGHT_SCALE_LEGACY = ".scale_weight"
WEIGHT_SCALE_INV = ".weight_scale_inv"
WEIGHT_SCALE_2 = ".weight_scale_2"
INPUT_SCALE = ".input_scale"
INPUT_SCALE_LEGACY = ".scale_input"
PRE_QUANT_SCALE = ".pre_quant_scale"
COMFY_QUANT = ".comfy_quant"

LEGACY_MARKER = "scaled_fp8"
"""Name of the marker tensor behind the checkpoint's prefix."""

QUANTIZATION_METADATA = "_quantization_metadata"
"""Header entry (JSON) that says per layer what `.comfy_quant` would say."""

LAYER_SUFFIXES = (
    WEIGHT,
    BIAS,
    WEIGHT_SCALE,
    WEIGHT_SCALE_LEGACY,
    WEIGHT_SCALE_INV,
    WEIGHT_SCALE_2,
    INPUT_SCALE,
    INPUT_SCALE_LEGACY,
    PRE_QUANT_SCALE,
    COMFY_QUANT,
)

# What stands before the diffusion model's own names. The first two say it aloud: next to them a file may hold a VAE and
# text encoders under other names. The last two are ordinary words, so they count only where every name carries them.
DECISIVE_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
UNANIMOUS_PREFIXES = ("net.", "transformer.")
CHECKPOINT_PREFIXES = ("", *DECISIVE_PREFIXES, *UNANIMOUS_PREFIXES)


def check_patterns(flag: str, patterns: Iterable[str]) -> None:
    """Refuse patterns of layer names that are no regular expressions.

    Args:
        flag: the option that they were given with, for the message.
        patterns: as the user wrote them.

    Raises:
        OptionError: one of them cannot be compiled.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptionError(f"{flag} {pattern!r} is no regular expression: {error}") from None


def strip_prefix(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Find the prefix of a checkpoint's diffusion model and take it off.

    Args:
        names: Layer or tensor names of one checkpoint, as the file spells them.

    Returns:
        The prefix (one of `CHECKPOINT_PREFIXES`) and {name in the file: bare name} of the names that carry it, in the
        order given. Names without it (a VAE or text encoder in the same file) are left out.

    >>> strip_prefix(["model.diffusion_model.img_in", "first_stage_model.conv_in"])
    ('model.diffusion_model.', {'model.diffusion_model.img_in': 'img_in'})
    """
    listed = list(names)
    for prefix in DECISIVE_PREFIXES:
        if any(name.startswith(prefix) for name in listed):
            return prefix, {name: name[len(prefix) :] for name in listed if name.startswith(prefix)}
    inside = [name for name in listed if name != LEGACY_MARKER]
    for prefix in UNANIMOUS_PREFIXES:
        if inside and all(name.startswith(prefix) for name in inside):
            return prefix, {name: name[len(prefix) :] for name in inside}
    return "", {name: name for name in listed}


@dataclass(frozen=True)
class Target:
    """The part of a checkpoint's layer that a foreign name denotes.

    Attributes:
        layer: Name of the checkpoint's layer, as it was given.
        rows: First row and row after the last, of the weight [out, in]; None for all of them.
        swap_halves: The foreign tensor holds the upper and the lower half of these rows in the other order. Swapping
            the halves turns either form into the other.
    """

    layer: str
    rows: tuple[int, int] | None = None
    swap_halves: bool = False


def _qkv_sizes(out_features: int, in_features: int) -> tuple[int, ...]:
    key_rows, odd = divmod(out_features - in_features, 2)
    return () if odd or not 0 < key_rows <= in_features else (in_features, key_rows, key_rows)


def _qkv_mlp_sizes(out_features: int, in_features: int) -> tuple[int, ...]:
    mlp_rows = out_features - 3 * in_features
    return () if mlp_rows <= 0 else (in_features, in_features, in_features, mlp_rows)


def _half_sizes(out_features: int, _in_features: int) -> tuple[int, ...]:
    return () if out_features % 2 else (out_features // 2, out_features // 2)


# Row counts of the pieces of a fused layer from its (out, in); () where the shape is not of this kind.
_SIZES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "qkv": _qkv_sizes,
    "qkv_mlp": _qkv_mlp_sizes,
    "kv": _half_sizes,
}


@dataclass(frozen=True)
class Part:
    """A run of pieces of a fused layer, or all of any layer.

    Attributes:
        fused: How the layer is fused, a key of the table above; "" takes all of it.
        first: The first piece.
        stop: The piece after the last.
        scale_shift: The whole layer, halves swapped where it is [2 in, in].
    """

    fused: str = ""
    first: int = 0
    stop: int = 0
    scale_shift: bool = False

    def target(self, layer: str, out_features: int, in_features: int) -> Target | None:
        """The rows of `layer` [out, in] that this part means, or None where its shape is not fused in this way."""
        if self.scale_shift:
            return Target(layer, swap_halves=out_features == 2 * in_features)
        if not self.fused:
            return Target(layer)
        sizes = _SIZES[self.fused](out_features, in_features)
        if not sizes:
            return None
        return Target(layer, (sum(sizes[: self.first]), sum(sizes[: self.stop])))


WHOLE = Part()
SHIFT_SCALE = Part(scale_shift=True)
Q, K, V = (Part("qkv", piece, piece + 1) for piece in range(3))
Q_OF_MLP, K_OF_MLP, V_OF_MLP, MLP = (Part("qkv_mlp", piece, piece + 1) for piece in range(4))
QKV_OF_MLP = Part("qkv_mlp", 0, 3)


@dataclass(frozen=True)
class Rule:
    """`other` is another name for the part `part` of the checkpoint's layer `layer`; both are patterns."""

    layer: str
    other: str
    part: Part = WHOLE


def _under(layer_root: str, other_root: str, *rules: tuple[str, str] | tuple[str, str, Part]) -> tuple[Rule, ...]:
    return tuple(Rule(layer_root + rule[0], other_root + rule[1], *rule[2:]) for rule in rules)


_SWAPPED_FINAL_LAYER = _under(
    "",
    "",
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear", SHIFT_SCALE),
)

# Flux.1, and what Chroma, HunyuanVideo and Flux.2 share with it.
FLUX_1 = (
    *_under(
        "double_blocks.*.",
        "transformer_blocks.*.",
        ("img_attn.qkv", "attn.to_q", Q),
        ("img_attn.qkv", "attn.to_k", K),
        ("img_attn.qkv", "attn.to_v", V),
        ("txt_attn.qkv", "attn.add_q_proj", Q),
        ("txt_attn.qkv", "attn.add_k_proj", K),
        ("txt_attn.qkv", "attn.add_v_proj", V),
        ("img_attn.proj", "attn.to_out.0"),
        ("txt_attn.proj", "attn.to_add_out"),
        ("img_mod.lin", "norm1.linear"),
        ("txt_mod.lin", "norm1_context.linear"),
        ("img_mlp.0", "ff.net.0.proj"),
        ("img_mlp.2", "ff.net.2"),
        ("txt_mlp.0", "ff_context.net.0.proj"),
        ("txt_mlp.2", "ff_context.net.2"),
    ),
    *_under(
        "single_blocks.*.",
        "single_transformer_blocks.*.",
        ("linear1", "attn.to_q", Q_OF_MLP),
        ("linear1", "attn.to_k", K_OF_MLP),
        ("linear1", "attn.to_v", V_OF_MLP),
        ("linear1", "proj_mlp", MLP),
        ("linear2", "proj_out"),
        ("modulation.lin", "norm.linear"),
    ),
    *_under(
        "",
        "",
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ),
    *_SWAPPED_FINAL_LAYER,
)

# Flux.2 has one modulation for all blocks and fuses the single block's attention and MLP in diffusers too.
FLUX_2 = _under(
    "",
    "",
    ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    ("single_stream_modulation.lin", "single_stream_modulation.linear"),
    ("double_blocks.*.img_mlp.0", "transformer_blocks.*.ff.linear_in"),
    ("double_blocks.*.img_mlp.2", "transformer_blocks.*.ff.linear_out"),
    ("double_blocks.*.txt_mlp.0", "transformer_blocks.*.ff_context.linear_in"),
    ("double_blocks.*.txt_mlp.2", "transformer_blocks.*.ff_context.linear_out"),
    ("single_blocks.*.linear1", "single_transformer_blocks.*.attn.to_qkv_mlp_proj"),
    ("single_blocks.*.linear2", "single_transformer_blocks.*.attn.to_out"),
)

# Chroma is Flux.1 without modulation layers, plus a small network that makes all of them.
CHROMA = _under(
    "distilled_guidance_layer.layers.*.",
    "distilled_guidance_layer.layers.*.",
    ("in_layer", "linear_1"),
    ("out_layer", "linear_2"),
)

# The last block's context_block is cut short: its modulation has two pieces, which diffusers stores as scale, shift.
SD3 = (
    *_under(
        "joint_blocks.*.",
        "transformer_blocks.*.",
        ("x_block.attn.qkv", "attn.to_q", Q),
        ("x_block.attn.qkv", "attn.to_k", K),
        ("x_block.attn.qkv", "attn.to_v", V),
        ("x_block.attn2.qkv", "attn2.to_q", Q),
        ("x_block.attn2.qkv", "attn2.to_k", K),
        ("x_block.attn2.qkv", "attn2.to_v", V),
        ("context_block.attn.qkv", "attn.add_q_proj", Q),
        ("context_block.attn.qkv", "attn.add_k_proj", K),
        ("context_block.attn.qkv", "attn.add_v_proj", V),
        ("x_block.attn.proj", "attn.to_out.0"),
        ("x_block.attn2.proj", "attn2.to_out.0"),
        ("context_block.attn.proj", "attn.to_add_out"),
        ("x_block.adaLN_modulation.1", "norm1.linear"),
        ("context_block.adaLN_modulation.1", "norm1_context.linear", SHIFT_SCALE),
        ("x_block.mlp.fc1", "ff.net.0.proj"),
        ("x_block.mlp.fc2", "ff.net.2"),
        ("context_block.mlp.fc1", "ff_context.net.0.proj"),
        ("context_block.mlp.fc2", "ff_context.net.2"),
    ),
    *_under(
        "",
        "time_text_embed.",
        ("t_embedder.mlp.0", "timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "timestep_embedder.linear_2"),
        ("y_embedder.mlp.0", "text_embedder.linear_1"),
        ("y_embedder.mlp.2", "text_embedder.linear_2"),
    ),
    *_SWAPPED_FINAL_LAYER,
)

# HunyuanVideo has Flux.1's blocks and a refiner of the text tokens. Names are ComfyUI's; SAME_LAYER has its authors'.
HUNYUAN_VIDEO = _under(
    "txt_in.",
    "context_embedder.",
    ("input_embedder", "proj_in"),
    ("t_embedder.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("c_embedder.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("c_embedder.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("individual_token_refiner.blocks.*.self_attn.qkv", "token_refiner.refiner_blocks.*.attn.to_q", Q),
    ("individual_token_refiner.blocks.*.self_attn.qkv", "token_refiner.refiner_blocks.*.attn.to_k", K),
    ("individual_token_refiner.blocks.*.self_attn.qkv", "token_refiner.refiner_blocks.*.attn.to_v", V),
    ("individual_token_refiner.blocks.*.self_attn.proj", "token_refiner.refiner_blocks.*.attn.to_out.0"),
    ("individual_token_refiner.blocks.*.mlp.0", "token_refiner.refiner_blocks.*.ff.net.0.proj"),
    ("individual_token_refiner.blocks.*.mlp.2", "token_refiner.refiner_blocks.*.ff.net.2"),
    ("individual_token_refiner.blocks.*.adaLN_modulation.1", "token_refiner.refiner_blocks.*.norm_out.linear"),
)

WAN = (
    *(
        rule
        for tower in ("blocks.*.", "vace_blocks.*.")
        for rule in _under(
            tower,
            tower,
            *(
                (f"{ours}.{layer}", f"{theirs}.{module}")
                for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for layer, module in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
            ),
            ("cross_attn.k_img", "attn2.add_k_proj"),
            ("cross_attn.v_img", "attn2.add_v_proj"),
            ("ffn.0", "ffn.net.0.proj"),
            ("ffn.2", "ffn.net.2"),
        )
    ),
    *_under(
        "vace_blocks.*.",
        "vace_blocks.*.",
        ("before_proj", "proj_in"),
        ("after_proj", "proj_out"),
    ),
    *_under(
        "",
        "condition_embedder.",
        ("time_embedding.0", "time_embedder.linear_1"),
        ("time_embedding.2", "time_embedder.linear_2"),
        ("text_embedding.0", "text_embedder.linear_1"),
        ("text_embedding.2", "text_embedder.linear_2"),
        ("time_projection.1", "time_proj"),
        ("img_emb.proj.1", "image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "image_embedder.ff.net.2"),
    ),
    Rule("head.head", "proj_out"),
    *_under(
        "face_adapter.fuser_blocks.*.",
        "face_adapter.*.",
        ("linear1_q", "to_q"),
        ("linear1_kv", "to_k", Part("kv", 0, 1)),
        ("linear1_kv", "to_v", Part("kv", 1, 2)),
        ("linear2", "to_out"),
    ),
    Rule("motion_encoder.enc.fc.*", "motion_encoder.motion_network.*"),
)

_LUMINA_TOWERS = ("layers.*.", "noise_refiner.*.", "context_refiner.*.")

LUMINA_2 = (
    *(
        rule
        for tower in _LUMINA_TOWERS
        for rule in _under(
            tower,
            tower,
            ("attention.qkv", "attn.to_q", Q),
            ("attention.qkv", "attn.to_k", K),
            ("attention.qkv", "attn.to_v", V),
            ("attention.out", "attn.to_out.0"),
            ("feed_forward.w1", "feed_forward.linear_1"),
            ("feed_forward.w2", "feed_forward.linear_2"),
            ("feed_forward.w3", "feed_forward.linear_3"),
            ("adaLN_modulation.1", "norm1.linear"),
        )
    ),
    *_under(
        "",
        "",
        ("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
        ("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
        ("final_layer.linear", "norm_out.linear_2"),
    ),
)

# Z-Image is Lumina 2's code with its own names in diffusers. "2-1" is its patch size, 2 in space and 1 in time.
Z_IMAGE = (
    *(
        rule
        for tower in _LUMINA_TOWERS
        for rule in _under(
            tower,
            tower,
            ("attention.qkv", "attention.to_q", Q),
            ("attention.qkv", "attention.to_k", K),
            ("attention.qkv", "attention.to_v", V),
            ("attention.out", "attention.to_out.0"),
        )
    ),
    *_under(
        "",
        "",
        ("x_embedder", "all_x_embedder.2-1"),
        ("final_layer.linear", "all_final_layer.2-1.linear"),
        ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    ),
)

LTX = _under(
    "",
    "",
    ("patchify_proj", "proj_in"),
    ("adaln_single.**", "time_embed.**"),
    ("audio_patchify_proj", "audio_proj_in"),
    ("audio_adaln_single.**", "audio_time_embed.**"),
    ("prompt_adaln_single.**", "prompt_adaln.**"),
    ("audio_prompt_adaln_single.**", "audio_prompt_adaln.**"),
    ("av_ca_video_scale_shift_adaln_single.**", "av_cross_attn_video_scale_shift.**"),
    ("av_ca_audio_scale_shift_adaln_single.**", "av_cross_attn_audio_scale_shift.**"),
    ("av_ca_a2v_gate_adaln_single.**", "av_cross_attn_video_a2v_gate.**"),
    ("av_ca_v2a_gate_adaln_single.**", "av_cross_attn_audio_v2a_gate.**"),
)

# AuraFlow's blocks of two streams count 2 for the picture and 1 for the text; its other blocks have only 1.
AURAFLOW = (
    *_under(
        "double_layers.*.",
        "joint_transformer_blocks.*.",
        *(
            (f"attn.w{number}{part}", f"attn.{module}")
            for number, modules in (
                (2, ("to_q", "to_k", "to_v", "to_out.0")),
                (1, ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
            )
            for part, module in zip("qkvo", modules, strict=True)
        ),
        *(
            (f"{ours}.{layer}", f"{theirs}.{module}")
            for ours, theirs in (("mlpX", "ff"), ("mlpC", "ff_context"))
            for layer, module in (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection"))
        ),
        ("modX.1", "norm1.linear"),
        ("modC.1", "norm1_context.linear"),
    ),
    *_under(
        "single_layers.*.",
        "single_transformer_blocks.*.",
        ("attn.w1q", "attn.to_q"),
        ("attn.w1k", "attn.to_k"),
        ("attn.w1v", "attn.to_v"),
        ("attn.w1o", "attn.to_out.0"),
        ("mlp.c_fc1", "ff.linear_1"),
        ("mlp.c_fc2", "ff.linear_2"),
        ("mlp.c_proj", "ff.out_projection"),
        ("modCX.1", "norm1.linear"),
    ),
    *_under(
        "",
        "",
        ("init_x_linear", "pos_embed.proj"),
        ("cond_seq_linear", "context_embedder"),
        ("t_embedder.mlp.0", "time_step_proj.linear_1"),
        ("t_embedder.mlp.2", "time_step_proj.linear_2"),
        ("final_linear", "proj_out"),
        ("modF.1", "norm_out.linear", SHIFT_SCALE),
    ),
)

PIXART = (
    *_under(
        "blocks.*.",
        "transformer_blocks.*.",
        ("attn.qkv", "attn1.to_q", Q),
        ("attn.qkv", "attn1.to_k", K),
        ("attn.qkv", "attn1.to_v", V),
        ("attn.proj", "attn1.to_out.0"),
        ("cross_attn.q_linear", "attn2.to_q"),
        ("cross_attn.kv_linear", "attn2.to_k", Part("kv", 0, 1)),
        ("cross_attn.kv_linear", "attn2.to_v", Part("kv", 1, 2)),
        ("cross_attn.proj", "attn2.to_out.0"),
        ("mlp.fc1", "ff.net.0.proj"),
        ("mlp.fc2", "ff.net.2"),
    ),
    *(
        rule
        for ours, theirs in (("t", "timestep"), ("csize", "resolution"), ("ar", "aspect_ratio"))
        for rule in _under(
            f"{ours}_embedder.mlp.",
            f"adaln_single.emb.{theirs}_embedder.",
            ("0", "linear_1"),
            ("2", "linear_2"),
        )
    ),
    *_under(
        "",
        "",
        ("t_block.1", "adaln_single.linear"),
        ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
        ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
        ("final_layer.linear", "proj_out"),
    ),
)

# Stable Diffusion 1 to XL: both sides count the U-Net's blocks, the authors in one row, diffusers by level with two
# blocks each on the way down and three on the way up.
UNET = (
    *(
        Rule(f"{side}_blocks.{3 * level + block + first}.{layer}", f"{way}_blocks.{level}.{kind}.{block}.{module}")
        for side, way, blocks, first in (("input", "down", 2, 1), ("output", "up", 3, 0))
        for level in range(4)
        for block in range(blocks)
        for layer, kind, module in (("1.**", "attentions", "**"), ("0.emb_layers.1", "resnets", "time_emb_proj"))
    ),
    *_under(
        "",
        "",
        ("middle_block.1.**", "mid_block.attentions.0.**"),
        ("middle_block.0.emb_layers.1", "mid_block.resnets.0.time_emb_proj"),
        ("middle_block.2.emb_layers.1", "mid_block.resnets.1.time_emb_proj"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("label_emb.0.2", "add_embedding.linear_2"),
        ("label_emb.0.0", "class_embedding.linear_1"),
        ("label_emb.0.2", "class_embedding.linear_2"),
    ),
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "flux.1": FLUX_1,
    "flux.2": FLUX_2,
    "chroma": CHROMA,
    "sd3": SD3,
    "hunyuan_video": HUNYUAN_VIDEO,
    "wan": WAN,
    "lumina_2": LUMINA_2,
    "z_image": Z_IMAGE,
    "ltx": LTX,
    "auraflow": AURAFLOW,
    "pixart": PIXART,
    "unet": UNET,
}
"""diffusers' module names, by model family. Qwen-Image needs no rules: its checkpoints use diffusers' names."""

# Spellings of whole layers that two kinds of checkpoint use for the same layer: HunyuanVideo's authors', then
# ComfyUI's. Either may be the checkpoint's, so these are read in both directions and before the rules above.
SAME_LAYER = (
    *_under(
        "double_blocks.*.",
        "double_blocks.*.",
        *(
            (f"{stream}_{authors}", f"{stream}_{comfyui}")
            for stream in ("img", "txt")
            for authors, comfyui in (
                ("attn_qkv", "attn.qkv"),
                ("attn_proj", "attn.proj"),
                ("mod.linear", "mod.lin"),
                ("mlp.fc1", "mlp.0"),
                ("mlp.fc2", "mlp.2"),
            )
        ),
    ),
    Rule("single_blocks.*.modulation.linear", "single_blocks.*.modulation.lin"),
    *_under(
        "txt_in.individual_token_refiner.blocks.*.",
        "txt_in.individual_token_refiner.blocks.*.",
        ("self_attn_qkv", "self_attn.qkv"),
        ("self_attn_proj", "self_attn.proj"),
        ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"),
    ),
    *_under(
        "",
        "",
        ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
        ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
        ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
        ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
        ("time_in.mlp.0", "time_in.in_layer"),
        ("time_in.mlp.2", "time_in.out_layer"),
        ("guidance_in.mlp.0", "guidance_in.in_layer"),
        ("guidance_in.mlp.2", "guidance_in.out_layer"),
    ),
)
_EITHER_WAY = (*SAME_LAYER, *(Rule(rule.other, rule.layer) for rule in SAME_LAYER))

# Names that only LoRA files use: XLabs' attention processors (its `qkv_lora.down` loses "_lora" with the suffix) and
# ComfyUI's name for the attention rows of a single block.
LORA_ONLY = (
    *_under(
        "double_blocks.*.",
        "double_blocks.*.processor.",
        ("img_attn.qkv", "qkv_lora1"),
        ("txt_attn.qkv", "qkv_lora2"),
        ("img_attn.proj", "proj_lora1"),
        ("txt_attn.proj", "proj_lora2"),
    ),
    *_under(
        "single_blocks.*.",
        "single_blocks.*.",
        ("linear1", "processor.qkv", QKV_OF_MLP),
        ("linear2", "processor.proj"),
        ("linear1", "linear1_qkv", QKV_OF_MLP),
    ),
)

# What stands before a layer's name in a LoRA file, as it is and with "_" for ".".
LORA_PREFIXES = (
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "transformer.",
    "unet.",
    "net.",
    "base_model.model.",
    "base_model.model.diffusion_model.",
    "base_model.model.transformer.",
    "unet.base_model.model.",
    "transformer.base_model.model.",
)
LORA_FLAT_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lora_prior_unet_", "lycoris_")

TEXT_ENCODER_PREFIXES = (
    *(f"lora_te{number}_" for number in ("", 1, 2, 3, 4)),
    "lora_prior_te_",
    *(f"text_encoder{number}." for number in ("", "_2", "_3", "_4", "s")),
    "base_model.model.text_encoder.",
    "cond_stage_model.",
    "conditioner.",
)
"""Beginnings of the names of a text encoder's adapters, which are never the diffusion model's."""

# Suffixes of the two factors, down [r, in] and up [out, r], of a low-rank adapter. Where two fit, the longer one holds.
LORA_FACTORS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_down", ".lora_up"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".down.weight", ".up.weight"),
)
LORA_ALPHAS = (".alpha", ".lora_alpha")

UNSUPPORTED_SUFFIXES: dict[str, str] = {
    **dict.fromkeys((".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "DoRA"),
    **dict.fromkeys((".lora_magnitude_vector.default.weight",), "DoRA"),
    **dict.fromkeys((f".hada_{factor}" for factor in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")), "LoHa"),
    **dict.fromkeys((f".lokr_{factor}" for factor in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")), "LoKr"),
    **dict.fromkeys((f".{factor}.weight" for factor in ("a1", "a2", "b1", "b2")), "GLoRA"),
    **dict.fromkeys((".oft_blocks", ".oft_diag", ".oft_R.weight"), "OFT"),
    **dict.fromkeys((".lora_mid.weight", ".lora_mid"), "lora_mid (convolution)"),
    **dict.fromkeys((".diff", ".set_weight", ".w_norm"), "full difference"),
    **dict.fromkeys((".diff_b", ".b_norm", ".lora_B.bias", ".lora_up.bias", ".lora_B.default.bias"), "bias difference"),
    ".reshape_weight": "reshaped weight",
}
"""Suffixes of adapter tensors that are recognized but not applied, with the name of their kind."""

BIAS_ONLY = "bias difference"
"""The one of these kinds that leaves the low-rank factors beside it as they are: a bias does not change a weight."""


_WILDCARD = re.compile(r"\*\*|\*")


@cache
def _matcher(pattern: str) -> re.Pattern[str]:
    pieces: list[str] = []
    end = 0
    for wildcard in _WILDCARD.finditer(pattern):
        pieces += re.escape(pattern[end : wildcard.start()]), "(.+)" if wildcard[0] == "**" else "([0-9]+)"
        end = wildcard.end()
    return re.compile("".join(pieces) + re.escape(pattern[end:]))


def _translate(name: str, pattern: str, other: str) -> str | None:
    """`name` rewritten from `pattern` to `other`, or None where it is not of that pattern."""
    found = _matcher(pattern).fullmatch(name)
    if found is None:
        return None
    groups = iter(found.groups())
    return _WILDCARD.sub(lambda _: next(groups), other)


@cache
def _by_root(rules: tuple[Rule, ...]) -> dict[str, list[Rule]]:
    """Rules by the first word of their layer's name, so that a layer meets a few dozen of them instead of hundreds."""
    found: dict[str, list[Rule]] = {}
    for rule in rules:
        found.setdefault(rule.layer.partition(".")[0], []).append(rule)
    return found


def _translations(name: str, rules: tuple[Rule, ...]) -> Iterator[tuple[str, Part]]:
    for rule in _by_root(rules).get(name.partition(".")[0], ()):
        other = _translate(name, rule.layer, rule.other)
        if other is not None:
            yield other, rule.part


Targets = dict[str, tuple[Target, ...]]
"""{name: every part it may mean}; more than one is an ambiguity, for the caller to report."""


def _collect(layers: Mapping[str, tuple[int, int]], rules: tuple[Rule, ...]) -> Targets:
    """Every name that is a layer's own, or another spelling of it, or that a rule makes of either."""
    found: Targets = {}

    def add(name: str, target: Target | None) -> None:
        known = found.get(name, ())
        if target is not None and target not in known:
            found[name] = (*known, target)

    for layer, (out_features, in_features) in layers.items():
        for spelling in (layer, *(other for other, _ in _translations(layer, _EITHER_WAY))):
            add(spelling, Target(layer))
            for other, part in _translations(spelling, rules):
                add(other, part.target(layer, out_features, in_features))
    return found


_ALL_FAMILIES = tuple(rule for family in FAMILIES.values() for rule in family)


def diffusers_targets(layers: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
    """Say which part of which layer every diffusers module name means.

    Args:
        layers: Bare (prefix-stripped, without ``.weight``) names of a checkpoint's linear layers -> (out, in) features.

    Returns:
        {diffusers module name without ``.weight``: `Target`}. A layer's own name is in it too, since many checkpoints
        use diffusers' names for some or all layers, and so are names that other families would use for such a layer.
        Names that could mean two different parts are left out.

    >>> targets = diffusers_targets({"double_blocks.3.img_attn.qkv": (96, 32)})
    >>> targets["transformer_blocks.3.attn.to_k"]
    Target(layer='double_blocks.3.img_attn.qkv', rows=(32, 64), swap_halves=False)
    """
    return {name: targets[0] for name, targets in _collect(layers, _ALL_FAMILIES).items() if len(targets) == 1}


TRANSFORMERS: dict[str, tuple[Rule, ...]] = {
    "FluxTransformer2DModel": FLUX_1,
    "Flux2Transformer2DModel": (*FLUX_2, *FLUX_1),
    "ChromaTransformer2DModel": (*CHROMA, *FLUX_1),
    "SD3Transformer2DModel": SD3,
    "HunyuanVideoTransformer3DModel": (*HUNYUAN_VIDEO, *FLUX_1),
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN,
    "Lumina2Transformer2DModel": LUMINA_2,
    "ZImageTransformer2DModel": (*Z_IMAGE, *LUMINA_2),
    "LTXVideoTransformer3DModel": LTX,
    "UNet2DConditionModel": UNET,
}
"""By diffusers' class: the rules that hold for its modules."""

RESPELLED = frozenset({"HunyuanVideoTransformer3DModel"})
"""Classes whose checkpoints come in both spellings of SAME_LAYER."""


def checkpoint_layers(
    modules: Mapping[str, tuple[int, int]], transformer: str
) -> dict[str, tuple[tuple[str, tuple[int, int]], ...]]:
    """Say which layers of a checkpoint in its authors' names each module of a diffusers model stands for.

    Args:
        modules: Names of all its linear modules -> (out, in) features.
        transformer: Name of its class.

    Returns:
        {module: ((bare layer name, (out, in) features of the layer), ...)}: every spelling that is known, in which the
        parts of a fused layer are one. Without modules whose names are the authors' own.

    >>> parts = {f"transformer_blocks.3.attn.to_{part}": (32, 32) for part in "qkv"}
    >>> checkpoint_layers(parts, "FluxTransformer2DModel")["transformer_blocks.3.attn.to_k"]
    (('double_blocks.3.img_attn.qkv', (96, 32)),)
    """
    rules = TRANSFORMERS.get(transformer, ())
    same = _EITHER_WAY if transformer in RESPELLED else ()
    parts: dict[str, dict[Part, str]] = {}
    for module in modules:
        for rule in rules:
            layer = _translate(module, rule.other, rule.layer)
            if layer is not None:
                parts.setdefault(layer, {}).setdefault(rule.part, module)
    found: dict[str, tuple[tuple[str, tuple[int, int]], ...]] = {}
    for layer, modules_of_parts in parts.items():
        out_features = sum(modules[module][0] for module in modules_of_parts.values())
        for module in modules_of_parts.values():
            shape = (out_features, modules[module][1])
            spellings = dict.fromkeys((layer, *(other for other, _ in _translations(layer, same))))
            found[module] = (*found.get(module, ()), *((name, shape) for name in spellings))
    return found


def lora_targets(layers: Mapping[str, tuple[int, int]]) -> Targets:
    """Say what every name that a LoRA file may use for a layer means.

    The names are built from the layers and never taken apart: ``_`` for ``.`` cannot be undone (``img_attn_qkv`` is
    ``img_attn.qkv`` in one model and one word in another), and a match by ending would take ``blocks.11`` for
    ``blocks.1``.

    Args:
        layers: Bare names of a checkpoint's linear layers -> (out, in) features.

    Returns:
        {name without its LoRA suffix: the parts it may mean}. More than one part is an ambiguity.

    >>> lora_targets({"blocks.1.ffn.0": (8, 4)})["lora_unet_blocks_1_ffn_net_0_proj"]
    (Target(layer='blocks.1.ffn.0', rows=None, swap_halves=False),)
    """
    found: dict[str, tuple[Target, ...]] = {}
    for name, targets in _collect(layers, (*_ALL_FAMILIES, *LORA_ONLY)).items():
        # diffusers' first LoRA files name the attention processor; it has one output projection, not a list of them.
        processor = name.replace(".to_", ".processor.to_")
        if processor.endswith(".to_out.0"):
            processor = processor.removesuffix(".0")
        spellings = {prefix + name for prefix in LORA_PREFIXES} | {prefix + processor for prefix in LORA_PREFIXES}
        spellings |= {prefix + name.replace(".", "_") for prefix in LORA_FLAT_PREFIXES}
        for spelling in spellings:
            found[spelling] = tuple(dict.fromkeys((*found.get(spelling, ()), *targets)))
    return found
