"""What tensors, layers and modules are called: every spelling this package knows, as tables.

Why it exists. The same linear layer has several names. The checkpoint of its authors calls a fused projection
``double_blocks.0.img_attn.qkv``; diffusers splits it into ``transformer_blocks.0.attn.to_q`` / ``to_k`` / ``to_v``; LoRA
trainers take either, prefix it, and some write ``_`` for ``.``. Whoever runs the model or merges an adapter has to know which
rows of which checkpoint layer a foreign name means. Those facts live here once, as data, and are looked up, never parsed.

How it works. A `Rule` pairs two patterns and says which part of the checkpoint's layer the other name denotes. In a pattern
``*`` stands for a block number and ``**`` for any rest, and both sides hold the same ones in the same order. A part is measured
from the layer's own shape [out, in], never from a constant, so any hidden size works:

    qkv      [in + 2 k, in]       q is the first ``in`` rows, k and v share the rest evenly (k < in: grouped queries)
    qkv_mlp  [3 in + m, in]       q, k, v of ``in`` rows each, then the MLP's m rows
    kv       [2 k, in]            two halves
    shift, scale                  a layer [2 in, in] whose halves diffusers stores as scale, shift; any other shape is taken whole

Limits. All rules are tried on all layers: a family is recognized by its layer names alone, and a name that fits nothing has no
other spelling. Only 2-D linear layers matter here; norms, tables and convolutions have no entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

# The tensors of one layer: suffixes behind the layer's name. "Legacy" is the older ComfyUI spelling that a `scaled_fp8` tensor
# marks. `weight_scale_inv` multiplies like any other scale, despite its name (DeepSeek, 128 x 128 blocks).
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

# What stands before the diffusion model's own names. The first two say it aloud: next to them a file may hold a VAE and text
# encoders under other names. The last two are ordinary words, so they count only where every name carries them.
DECISIVE_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
UNANIMOUS_PREFIXES = ("net.", "transformer.")
CHECKPOINT_PREFIXES = ("", *DECISIVE_PREFIXES, *UNANIMOUS_PREFIXES)


def strip_prefix(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Find the prefix of a checkpoint's diffusion model and take it off.

    Args:
        names: Layer or tensor names of one checkpoint, as the file spells them.

    Returns:
        The prefix (one of `CHECKPOINT_PREFIXES`) and {name in the file: bare name} of the names that carry it, in the order
        given. Names without it (a VAE or text encoder in the same file) are left out.

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
        swap_halves: The foreign tensor holds the upper and the lower half of these rows in the other order. Swapping the
            halves turns either form into the other.
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


def _half_sizes(out_features: int, in_features: int) -> tuple[int, ...]:
    return () if out_features % 2 else (out_features // 2, out_features // 2)


# Row counts of the pieces of a fused layer from its (out, in); () where the shape is not of this kind.
_SIZES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "qkv": _qkv_sizes,
    "qkv_mlp": _qkv_mlp_sizes,
    "kv": _half_sizes,
}


@dataclass(frozen=True)
class Part:
    """Pieces `first` up to but without `stop` of a layer fused as `fused` says (a key of the table above); "" is all of it."""

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

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "flux.1": FLUX_1,
}
"""diffusers' module names, by model family (layer pattern, diffusers pattern, part)."""


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


def _collect(layers: Mapping[str, tuple[int, int]], rules: Iterable[Rule]) -> dict[str, list[Target]]:
    """Every name that is a layer's own or that a rule gives it, with all the parts it may mean."""
    found: dict[str, list[Target]] = {layer: [Target(layer)] for layer in layers}
    listed = list(rules)
    for layer, (out_features, in_features) in layers.items():
        for rule in listed:
            other = _translate(layer, rule.layer, rule.other)
            target = None if other is None else rule.part.target(layer, out_features, in_features)
            if other is not None and target is not None and target not in found.setdefault(other, []):
                found[other].append(target)
    return found


def diffusers_targets(layers: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
    """Say which part of which layer every diffusers module name means.

    Args:
        layers: Bare (prefix-stripped, without ``.weight``) names of a checkpoint's linear layers -> (out, in) features.

    Returns:
        {diffusers module name without ``.weight``: `Target`}. A layer's own name is in it too, since many checkpoints use
        diffusers' names for some or all layers. Names that could mean two different parts are left out.

    >>> targets = diffusers_targets({"double_blocks.3.img_attn.qkv": (96, 32)})
    >>> targets["transformer_blocks.3.attn.to_k"]
    Target(layer='double_blocks.3.img_attn.qkv', rows=(32, 64), swap_halves=False)
    """
    rules = [rule for family in FAMILIES.values() for rule in family]
    return {name: targets[0] for name, targets in _collect(layers, rules).items() if len(targets) == 1}
