"""Diffusion model families as data: one file per family holds all that is known of it.

Why it exists. In FP8 a layer's error is about the same everywhere (the step is relative), but what it costs is not.
The repeated blocks hold most of the weights and add their errors to a residual stream that many others feed. What lies
outside them is small and touches everything: embedders of pixels, text, time and guidance feed all blocks at once, the
final layer writes the image itself. So converters in the field quantize the blocks and keep the rest, and so does this
table. And whoever calibrates a model has to run it, or to find its layers under the names that others give them.

How it works. Each file that holds a `FAMILY` (a `base.Family`) is found by listing the folder, so a new family is one
new file. The record says

    signatures, blocks, keep      how it is recognized, and which layers stay in high precision and why (`base`)
    names, lora, spellings        what diffusers and LoRA files call its layers (`rules`)
    architecture                  how diffusers' class of it is run (`running`)
    comfyui                       what its classes in ComfyUI take besides latents (`comfyui`)

Everything outside `blocks` is kept, also a layer that no table has ever heard of: an unknown layer in high precision
costs a little memory, an unknown layer in FP8 can cost the image. Models come in the naming of their authors (which
ComfyUI keeps) and in that of diffusers; a family knows both.

Where the choices come from (neighbours, read in November 2026; named where they decided):
    ModelOpt       NVIDIA/Model-Optimizer, examples/diffusers/quantization: filter functions per model
    musubi         kohya-ss/musubi-tuner: FP8 target and exclude keys per model
    dit-quantizer  bedovyy/comfy-dit-quantizer: rules per model
    silveroxides   silveroxides/convert_to_quant: filter presets per model
    Lightricks     its own LTX-2 FP8 files, as their readers list them

The diffusers names follow its own converters (`diffusers/loaders/single_file_utils.py`; ComfyUI's for PixArt, which it
has none for), and the tests hold them to those; the LoRA names follow what trainers write and what ComfyUI reads.

Limits. A name says where a layer sits, not how large its inputs grow; Z-Image's MLP inputs reach 6.6e4 in layers that
this table quantizes. Layers that lose their quiet tokens in FP8 are found by calibration, which keeps their weights in
FP8 and their matrix product in full precision. Rules for names are tried on all layers, whatever the family: a layer is
recognized by its name alone, and a name that fits nothing has no other spelling.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import chain
from pkgutil import iter_modules

from ..errors import OptionError
from ..names import squeezed, without_lora_prefixes
from .base import Family, Shape
from .comfyui import Conditions
from .generic import FAMILY as GENERIC
from .parts import OTHER_PARTS, other_part, text_encoder
from .rules import Index, Part, Target, Targets, index, targets, translations, turned

__all__ = [
    "CONDITIONS",
    "FAMILIES",
    "GENERIC",
    "OTHER_PARTS",
    "RECORDS",
    "Family",
    "LoraNames",
    "Target",
    "checkpoint_layers",
    "detect",
    "diffusers_targets",
    "family",
    "lora_names",
    "module_names",
    "other_part",
    "text_encoder",
]

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]

RECORDS: tuple[Family, ...] = tuple(module.FAMILY for module in _MODULES if hasattr(module, "FAMILY"))
"""All that is known, also of families that are known by their names alone; by the names of their files."""

FAMILIES: Mapping[str, Family] = {record.name: record for record in RECORDS if record.signatures}
"""Every family that can be recognized, by its `--preset` name."""

CONDITIONS: Mapping[str, Conditions] = {name: takes for record in RECORDS for name, takes in record.comfyui.items()}
"""What ComfyUI's models take, by class of `comfy.model_base`."""


def detect(names: Collection[str], shapes: Mapping[str, Shape]) -> Family | None:
    """Recognize a checkpoint's family.

    Args:
        names: Bare tensor names: without the checkpoint's prefix, with `.weight`.
        shapes: Bare tensor name -> shape; only SDXL needs it.

    Returns:
        The family, or None where no family fits (`GENERIC` is then the table to use). No checkpoint fits two.
    """
    modules = module_names(names)
    fitting = (known for known in RECORDS if any(signature.fits(modules, shapes) for signature in known.signatures))
    return next(fitting, None)


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


@cache
def _names() -> Index:
    return index(rule for record in RECORDS for rule in record.names)


@cache
def _lora_names() -> Index:
    return index(rule for record in RECORDS for rule in (*record.names, *record.lora))


@cache
def _spellings() -> Index:
    return index(rule for record in RECORDS for rule in (*record.spellings, *turned(record.spellings)))


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
    return {name: meant[0] for name, meant in targets(layers, _names(), _spellings()).items() if len(meant) == 1}


@dataclass(frozen=True)
class LoraNames:
    """What names in a LoRA file mean.

    Names are built from the layers and never taken apart: `_` for `.` cannot be undone (`img_attn_qkv` is
    `img_attn.qkv` in one model and one word in another), and a match by ending would take `blocks.11` for `blocks.1`.

    Attributes:
        exact: Every name that a layer, or a part of one, may have -> what it may mean.
        squeezed: The same without separators.
    """

    exact: Targets
    squeezed: Targets

    def find(self, name: str) -> tuple[Target, ...]:
        """The parts of the checkpoint that a name, without its adapter's suffix, may mean; several are an ambiguity.

        >>> lora_names({"blocks.1.ffn.0": (8, 4)}).find("lora_unet_blocks_1_ffn_net_0_proj")
        (Target(layer='blocks.1.ffn.0', rows=None, swap_halves=False),)
        """
        spellings = list(without_lora_prefixes(name))
        found = (self.exact.get(spelling) for spelling in spellings)
        loosely = (self.squeezed.get(squeezed(spelling)) for spelling in spellings)
        return next(filter(None, chain(found, loosely)), ())


def lora_names(layers: Mapping[str, tuple[int, int]]) -> LoraNames:
    """What the names that LoRA files use for some layers mean.

    Args:
        layers: Bare names of a checkpoint's linear layers -> (out, in) features.
    """
    exact: dict[str, dict[Target, None]] = {}
    loose: dict[str, dict[Target, None]] = {}
    for name, meant in targets(layers, _lora_names(), _spellings()).items():
        # diffusers' first LoRA files name the attention processor; it has one output projection, not a list of them.
        processor = name.replace(".to_", ".processor.to_")
        if processor.endswith(".to_out.0"):
            processor = processor.removesuffix(".0")
        for spelling in {name, processor}:
            exact.setdefault(spelling, {}).update(dict.fromkeys(meant))
            loose.setdefault(squeezed(spelling), {}).update(dict.fromkeys(meant))
    return LoraNames(*({name: tuple(meant) for name, meant in names.items()} for names in (exact, loose)))


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
    record = next((record for record in RECORDS if transformer in record.transformers), GENERIC)
    layers = index(turned(record.names))
    same = index((*record.spellings, *turned(record.spellings)))
    parts: dict[str, dict[Part, str]] = {}
    for module in modules:
        for layer, part in translations(module, layers):
            parts.setdefault(layer, {}).setdefault(part, module)
    found: dict[str, tuple[tuple[str, tuple[int, int]], ...]] = {}
    for layer, modules_of_parts in parts.items():
        out_features = sum(modules[module][0] for module in modules_of_parts.values())
        for module in modules_of_parts.values():
            shape = (out_features, modules[module][1])
            spellings = dict.fromkeys((layer, *(other for other, _ in translations(layer, same))))
            found[module] = (*found.get(module, ()), *((name, shape) for name in spellings))
    return found
