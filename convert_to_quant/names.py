"""What tensors and layers are called in files: suffixes, prefixes, and the beginnings and endings of LoRA names.

Every spelling is written once, here, as data. What one family's layers are called by others is in `families`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

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

FOLDING_KEY = "convert_to_quant.folding"
"""Header entry (JSON) in which a folded file says which channels were scaled by what, see `folding`."""

FOLDED_FOR_KEY = "convert_to_quant.folded_for"
"""Header entry of a LoRA: the SHA-256 of the folding that it was scaled for."""

MOMENTS_KEY = "convert_to_quant.moments"
"""Header entry (JSON) of second moments, and of the statistics that they stand beside: see `rounding.kept`."""

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

COPY = "second copy of the model (moving average)"
OTHER_PARTS = {
    prefix: title
    for title, prefixes in {
        # LTX-2's projection stands between Gemma and the transformer.
        "text encoder": "text_encoders. text_encoder. text_encoder_2. text_encoder_3. cond_stage_model. conditioner. "
        "text_embedding_projection.",
        "image encoder": "clip_vision. image_encoder.",
        "VAE": "first_stage_model. vae. audio_vae. pretransform.",
        "vocoder": "vocoder.",
        COPY: "model_ema. ema_model. module_ema. net_ema. ema.",
    }.items()
    for prefix in prefixes.split()
}
"""Parts of a full checkpoint that are no diffusion model: the beginning of their names, and what they are called. Text
encoders run in full precision in ComfyUI, so FP8 there would only lose; a VAE is convolutions and paints the pixels."""

# What stands before the diffusion model's own names. The first two say it aloud: next to them a file may hold anything.
# ComfyUI believes the next two where many names carry them. All others are ordinary words, so they count only where
# every name carries them but those of other parts; some are what savers of wrapped models leave.
DECISIVE_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FREQUENT_PREFIXES = ("model.model.", "net.")
MANY = 5
"""Of names with such a prefix, more than these are many."""
UNANIMOUS_PREFIXES = (
    *("net.", "transformer.", "model.", "module.", "unet.", "dit.", "denoiser.", "backbone.", "student.", "generator."),
    *(prefix for prefix, title in OTHER_PARTS.items() if title == COPY),
)

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_fpw_module.", "_forward_module.")
"""What torch.compile, FSDP and activation checkpointing put anywhere into names."""

NO_WEIGHT = re.compile(
    r"(?:.*\.)?(?:(?:global_)?step|epoch|num_updates|(?:log_)?sigmas|betas|alphas_cumprod(?:_prev)?|inv_freq"
    r"|pos_embedder\.(?:seq|dim_\w+_range)|model_sampling\..*|logvar\..*|accum_\w+|v_pred|ztsnr|edm_\w+)"
)
"""Names of training state, and of tables that a model computes anew: savers leave them, and no reader uses them."""

UNREAD_PREFIXES = (
    *WRAPPERS,
    *(prefix for prefix in UNANIMOUS_PREFIXES if prefix not in ("net.", "transformer.", "model.")),
)
"""Of all these, what no reader takes off."""


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
    """Find the prefix of a checkpoint's diffusion model and take it off, with all words that wrappers left in names.

    Args:
        names: Layer or tensor names of one checkpoint, as the file spells them.

    Returns:
        What stands before the model's own names, as the file has it, and {name in the file: bare name} of the names
        that carry it, in the order given. Names without it (a VAE or text encoder in the same file) are left out.

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
    """A name without the words that wrappers of modules leave in it."""
    for word in WRAPPERS:
        name = name.replace(word, "")
    return name


def unread_words(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    """Words in a checkpoint's names that no reader takes off.

    >>> unread_words("module.", ["module.blocks.0._orig_mod.q"])
    ('_orig_mod.', 'module.')
    """
    said = " ".join(names)
    return tuple(word for word in UNREAD_PREFIXES if word in (said if word in WRAPPERS else prefix))


def other_part(name: str) -> str | None:
    """Find out whether a tensor or layer belongs to a text encoder, a VAE, or another part that is not quantized.

    Args:
        name: Its full name, as the file spells it.

    Returns:
        What the part is called, or None for the diffusion model's own layers.

    >>> other_part("first_stage_model.decoder.mid.attn_1.q")
    'VAE'
    """
    return next((title for prefix, title in OTHER_PARTS.items() if name.startswith(prefix)), None)


def _outermost_prefix(names: Collection[str]) -> str:
    """The next word of a prefix; "" where there is none."""
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


# What may stand before a layer's name in a LoRA file, once or several times (`diffusion_model.transformer.`), and words
# of wrappers that may stand anywhere in it. A flattened name ("_" for ".") begins with who wrote it and for what.
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
    """Whether a name in a LoRA file is a text encoder's, which is never the diffusion model's.

    >>> for_text_encoder("lora_te1_text_model_encoder_layers_0_mlp_fc1"), for_text_encoder("text_embedder.linear_1")
    (True, False)
    """
    return _TEXT_ENCODER.match(name) is not None


def without_lora_prefixes(name: str) -> Iterator[str]:
    """What a name in a LoRA file may be the name of: all of it first, then without what may stand before it.

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
    """A name without its separators, but for those between digits: all ways of flattening it come to the same.

    >>> squeezed("blocks.1.ffn.net.0.proj"), squeezed("_blocks_1_ffn_net_0_proj_"), squeezed("blocks.1.1.q")
    ('blocks1ffnnet0proj', 'blocks1ffnnet0proj', 'blocks1_1q')
    """
    return re.sub(r"(?<!\d)_|_(?!\d)", "", re.sub(r"[._]+", "_", name))


# Roles of an adapter's tensors (see `adapters`) -> endings of their names. PEFT may put the adapter's own name in.
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
"""Kinds that are recognized but not applied -> endings of their tensors."""
