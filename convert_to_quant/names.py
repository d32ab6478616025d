"""What tensors and layers are called in files: suffixes, prefixes, and the beginnings and endings of LoRA names.

Every spelling is written once, here, as data. What one family's layers are called by others is in `families`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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
S_REL = ".weight_s_rel"
S_CHANNEL = ".weight_s_channel"
CODEBOOK = ".weight_codebook"
COMFY_QUANT = ".comfy_quant"

LEGACY_MARKER = "scaled_fp8"
"""Name of the marker tensor behind the checkpoint's prefix."""

QUANTIZATION_METADATA = "_quantization_metadata"
"""Header entry (JSON) that says per layer what `.comfy_quant` would say."""

PROVENANCE_KEY = "convert_to_quant"
"""Header entry (JSON) in which every file that this tool writes says how it was made."""

STATISTICS_KEY = "convert_to_quant.statistics"
"""Header entry (JSON) that tells a statistics file from a checkpoint."""

TARGETS = ("comfy", "header", "legacy", "diffusers")
"""What `migrate` calls ways of marking: comfy_quant tensors with a header that agrees, a header alone, `scaled_fp8`,
no mark."""

WEIGHT_SCALES = (WEIGHT_SCALE, WEIGHT_SCALE_LEGACY, WEIGHT_SCALE_INV)
INPUT_SCALES = (INPUT_SCALE, INPUT_SCALE_LEGACY)
SCALES = (*WEIGHT_SCALES, WEIGHT_SCALE_2, S_REL, S_CHANNEL, CODEBOOK, *INPUT_SCALES, PRE_QUANT_SCALE)
WEIGHT_PARTS = (WEIGHT_SCALE, WEIGHT_SCALE_2, S_REL, S_CHANNEL, CODEBOOK, PRE_QUANT_SCALE)
"""Of these, what a weight may be made of beside its codes."""
WHOLE_WEIGHT = (WEIGHT_SCALE_2, CODEBOOK, PRE_QUANT_SCALE)
"""Of these, what does not have a part for each row."""
LAYER_SUFFIXES = (WEIGHT, BIAS, *SCALES, COMFY_QUANT)
CHANGED_IN_PLACE = (*INPUT_SCALES, COMFY_QUANT)
"""Of these, what a change in place may touch."""

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
