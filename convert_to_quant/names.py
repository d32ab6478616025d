"""Names of tensors and layers in files: suffixes, prefixes, and parts of LoRA names, each written once.

Names that depend on the family are in `families`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from .errors import OptionError

# Suffixes of a layer's tensors. "Legacy" is the older ComfyUI convention, declared by a `scaled_fp8` tensor.
# `weight_scale_inv` is multiplied like any other scale, despite its name (DeepSeek, 128 x 128 blocks).
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
"""Name of the legacy marker tensor, after the checkpoint's prefix."""

PROVENANCE_KEY = "convert_to_quant"
"""Header entry (JSON) with the history of every file that this tool writes."""

FOLDING_KEY = "convert_to_quant.folding"
"""Header entry (JSON) of a folded file: the channels and their factors, see `folding`."""

FOLDED_FOR_KEY = "convert_to_quant.folded_for"
"""Header entry of a LoRA: the SHA-256 of the folding it was adapted to."""

MOMENTS_KEY = "convert_to_quant.moments"
"""Header entry (JSON) of second moments, and of the statistics they belong to: see `rounding.kept`."""

STATISTICS_KEY = "convert_to_quant.statistics"
"""Header entry (JSON) of a statistics file."""

TARGETS = ("comfy", "header", "legacy", "diffusers")
"""Conventions that `migrate` writes: comfy_quant tensors with a header that agrees, a header alone, `scaled_fp8`,
none."""

WEIGHT_SCALES = (WEIGHT_SCALE, WEIGHT_SCALE_LEGACY, WEIGHT_SCALE_INV)
INPUT_SCALES = (INPUT_SCALE, INPUT_SCALE_LEGACY)
SCALES = (*WEIGHT_SCALES, WEIGHT_SCALE_2, S_REL, S_CHANNEL, CODEBOOK, *INPUT_SCALES, PRE_QUANT_SCALE)
WEIGHT_PARTS = (WEIGHT_SCALE, WEIGHT_SCALE_2, S_REL, S_CHANNEL, CODEBOOK, PRE_QUANT_SCALE)
"""Of these, what a weight may consist of besides its codes."""
WHOLE_WEIGHT = (WEIGHT_SCALE_2, CODEBOOK, PRE_QUANT_SCALE)
"""Of these, what is not split by rows."""
LAYER_SUFFIXES = (WEIGHT, BIAS, *SCALES, COMFY_QUANT)
CHANGED_IN_PLACE = (*INPUT_SCALES, COMFY_QUANT)
"""Of these, what an in-place change may modify."""

COPY = "second copy of the model (moving average)"
OTHER_PARTS = {
    prefix: title
    for title, prefixes in {
        # text_embedding_projection: LTX-2's, between Gemma and the transformer.
        "text encoder": "text_encoders. text_encoder. text_encoder_2. text_encoder_3. cond_stage_model. conditioner. "
        "text_embedding_projection.",
        "image encoder": "clip_vision. image_encoder.",
        "VAE": "first_stage_model. vae. audio_vae. pretransform.",
        "vocoder": "vocoder.",
        COPY: "model_ema. ema_model. module_ema. net_ema. ema.",
    }.items()
    for prefix in prefixes.split()
}
"""Prefixes of the other parts of a full checkpoint -> their names for people. ComfyUI runs text encoders in full
precision, so FP8 would only lose accuracy there; a VAE consists of convolutions."""

# Prefixes of the diffusion model's names. The first two are unambiguous. ComfyUI accepts the next two if many names
# have them. The others are ordinary words, so they count only if all names have them, except those of other parts; some
# are left by wrappers.
DECISIVE_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FREQUENT_PREFIXES = ("model.model.", "net.")
MANY = 5
"""More names than this are many."""
UNANIMOUS_PREFIXES = (
    *("net.", "transformer.", "model.", "module.", "unet.", "dit.", "denoiser.", "backbone.", "student.", "generator."),
    *(prefix for prefix, title in OTHER_PARTS.items() if title == COPY),
)

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_fpw_module.", "_forward_module.")
"""Words that torch.compile, FSDP and activation checkpointing insert into names."""

NO_WEIGHT = re.compile(
    r"(?:.*\.)?(?:(?:global_)?step|epoch|num_updates|(?:log_)?sigmas|betas|alphas_cumprod(?:_prev)?|inv_freq"
    r"|pos_embedder\.(?:seq|dim_\w+_range)|model_sampling\..*|logvar\..*|accum_\w+|v_pred|ztsnr|edm_\w+)"
)
"""Names of training state, and of tables that the model computes: no reader uses them."""

UNREAD_PREFIXES = (
    *WRAPPERS,
    *(prefix for prefix in UNANIMOUS_PREFIXES if prefix not in ("net.", "transformer.", "model.")),
)
"""Those that no reader removes."""


def check_patterns(flag: str, patterns: Iterable[str]) -> None:
    """Raises OptionError, naming the flag, for an invalid regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptionError(f"{flag} {pattern!r} is not a regular expression: {error}") from None


def strip_prefix(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Find and remove the prefix of a checkpoint's diffusion model, and words of wrappers.

    Returns:
        The prefix, and {name in the file: name without it} in the order given. Names without the prefix (a VAE or text
        encoder in the same file) are left out.

    >>> strip_prefix(["model.diffusion_model.img_in", "first_stage_model.conv_in"])
    ('model.diffusion_model.', {'model.diffusion_model.img_in': 'img_in'})
    >>> strip_prefix(["module.img_in", "module.blocks.0._orig_mod.q"])[1]["module.blocks.0._orig_mod.q"]
    'blocks.0.q'
    """
    prefix, bare = "", {name: name for name in names}
    while found := _outermost_prefix(bare.values()):
        prefix += found
        bare = {name: rest[len(found) :] for name, rest in bare.items() if rest.startswith(found)}
    unwrapped = {name: unwrap(rest) for name, rest in bare.items()}
    return prefix, unwrapped if len(set(unwrapped.values())) == len(bare) else bare


def unwrap(name: str) -> str:
    """A name without the words of wrappers."""
    for word in WRAPPERS:
        name = name.replace(word, "")
    return name


def unread_words(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    """Words in a checkpoint's names that no reader removes.

    >>> unread_words("module.", ["module.blocks.0._orig_mod.q"])
    ('_orig_mod.', 'module.')
    """
    said = " ".join(names)
    return tuple(word for word in UNREAD_PREFIXES if word in (said if word in WRAPPERS else prefix))


def other_part(name: str) -> str | None:
    """The part of a full checkpoint that a tensor or layer belongs to; None for the diffusion model.

    >>> other_part("first_stage_model.decoder.mid.attn_1.q")
    'VAE'
    """
    return next((title for prefix, title in OTHER_PARTS.items() if name.startswith(prefix)), None)


def _outermost_prefix(names: Collection[str]) -> str:
    """The next word of a prefix; "" if there is none."""
    for prefix in (*DECISIVE_PREFIXES, *FREQUENT_PREFIXES):
        if sum(name.startswith(prefix) for name in names) > (MANY if prefix in FREQUENT_PREFIXES else 0):
            return prefix
    inside = [name for name in names if name != LEGACY_MARKER]
    parts = {name: other_part(name) for name in inside}
    inside = [name for name in inside if parts[name] is None] or [name for name in inside if parts[name] == COPY]
    for prefix in (*WRAPPERS, *UNANIMOUS_PREFIXES):
        if inside and all(name.startswith(prefix) for name in inside):
            language_model = prefix == "model." and any(name.endswith("embed_tokens.weight") for name in inside)
            return "" if language_model else prefix
    return ""


# Prefixes of a layer's name in a LoRA file, which may be repeated (`diffusion_model.transformer.`), and words of
# wrappers anywhere in it. A flattened name ("_" for ".") begins with its writer and target.
_LORA_WORDS = "diffusion_model|base_model|model|transformer|prior_unet|unet|net|module|pipe|dit"
_LORA_PREFIX = re.compile(rf"(?:{_LORA_WORDS})\.")
_LORA_FLAT_PREFIX = re.compile(r"\w*?(?:lora|lycoris)_+")
_LORA_FLAT_WORD = re.compile(rf"(?:{_LORA_WORDS})_+")
_LORA_WRAPPER = re.compile(rf"(?:{'|'.join(word[:-1] for word in WRAPPERS)})[._]")

_TEXT_ENCODER = re.compile(
    rf"(?:(?:{_LORA_WORDS})\.)*(?:\w*?(?:lora|lycoris)_(?:prior_)?te\d*_|"
    r"(?:text_encoders?(?:_\d)?|te\d?|cond_stage_model|conditioner|clip_[lgh]|t5xxl)\.)"
)


def for_text_encoder(name: str) -> bool:
    """Whether a name in a LoRA file belongs to a text encoder.

    >>> for_text_encoder("lora_te1_text_model_encoder_layers_0_mlp_fc1"), for_text_encoder("text_embedder.linear_1")
    (True, False)
    """
    return _TEXT_ENCODER.match(name) is not None


def without_lora_prefixes(name: str) -> Iterator[str]:
    """A name in a LoRA file, then the same without prefixes, one by one.

    >>> list(without_lora_prefixes("transformer._orig_mod.blocks.0.q"))
    ['transformer.blocks.0.q', 'blocks.0.q']
    >>> list(without_lora_prefixes("lora_transformer_blocks_0_q"))
    ['lora_transformer_blocks_0_q', 'transformer_blocks_0_q', 'blocks_0_q']
    """
    name = _LORA_WRAPPER.sub("", name)
    yield name
    while found := _LORA_PREFIX.match(name):
        name = name[found.end() :]
        yield name
    found = _LORA_FLAT_PREFIX.match(name)
    while found:
        name = name[found.end() :]
        yield name
        found = _LORA_FLAT_WORD.match(name)


def squeezed(name: str) -> str:
    """A name without separators, except between digits: the same however it was flattened.

    >>> squeezed("blocks.1.ffn.net.0.proj"), squeezed("_blocks_1_ffn_net_0_proj_"), squeezed("blocks.1.1.q")
    ('blocks1ffnnet0proj', 'blocks1ffnnet0proj', 'blocks1_1q')
    """
    return re.sub(r"(?<!\d)_|_(?!\d)", "", re.sub(r"[._]+", "_", name))


# Roles of an adapter's tensors (see `adapters`) -> suffixes of their names. PEFT may insert the adapter's own name.
_NAMED = r"(?:\.(?!(?:weight|bias)$)[^.]+)?"
ADAPTER_ROLES: Mapping[str, str] = {
    **{
        role: rf"\.lora_(?:{letter}|{role}){_NAMED}(?:\.weight)?|(?:[._]lora|\.lora_linear_layer)?\.{role}\.weight"
        for role, letter in (("down", "A"), ("up", "B"))
    },
    "mid": r"\.lora_mid(?:\.weight)?|\.lora\.mid\.weight",
    "alpha": rf"\.alpha|\.lora_alpha{_NAMED}",
    "magnitude": rf"\.(?:dora_scale|lora_magnitude_vector{_NAMED}(?:\.weight)?)",
    **{f"hada_{part}": rf"\.hada_{part}{_NAMED}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": rf"\.lokr_{part}{_NAMED}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    "diff": r"\.(?:diff|w_norm)",
    "bias": rf"\.(?:diff_b|b_norm)|\.lora_(?:B|up){_NAMED}\.bias",
    "reshape": r"\.reshape_weight",
}

UNSUPPORTED_ADAPTERS: Mapping[str, str] = {
    "GLoRA": r"\.[ab][12]\.weight",
    "OFT": rf"\.oft_(?:blocks|diag|R){_NAMED}(?:\.weight)?",
    "IA3": rf"\.(?:ia3_l{_NAMED}|on_input)",
    "VeRA": rf"\.vera_lambda_[bd]{_NAMED}",
    "a replaced weight": r"\.set_weight",
}
"""Kinds that are recognized but not applied -> suffixes of their tensors."""
