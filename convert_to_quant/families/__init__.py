"""Diffusion model families as data: one file per family holds all that is known of it.

Why it exists. In FP8 a layer's error is about the same everywhere (the step is relative), but what it costs is not.
The repeated blocks hold most of the weights and add their errors to a residual stream that many others feed. What lies
outside them is small and touches everything: embedders of pixels, text, time and guidance feed all blocks at once, the
final layer writes the image itself. So converters in the field quantize the blocks and keep the rest, and so does this
table. And whoever calibrates a model has to run it, or to find its layers under the names that others give them.

How it works. Each file that holds a `FAMILY` (a `base.Family`) is found by listing the folder, so a new family is one
new file. The record says

    signatures, blocks, keep      how it is recognized, and which layers stay in high precision and why (`base`)
    names, lora, spellings        what diffusers and LoRA files call its layers and other tensors (`rules`)
    architecture                  how diffusers' class of it is run (`running`)
    comfyui                       what its classes in ComfyUI take besides latents (`comfyui`)

Everything outside the blocks is kept, also a layer that no table has ever heard of: an unknown layer in high precision
costs a little memory, an unknown layer in FP8 can cost the image. `blocks` names them where neighbours have published
what they quantize in a family (some quantize its modulations); in all others `structure` finds them. Models come in
the naming of their authors (which ComfyUI keeps) and in that of diffusers; a family knows both.

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
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from itertools import accumulate, chain
from pkgutil import iter_modules

from ..errors import OptionError
from ..names import squeezed, without_lora_prefixes
from .base import Family, Shape, module_names
from .comfyui import Conditions
from .rules import Index, Part, Target, Targets, index, spelled, targets, translations, turned

__all__ = [
    "CONDITIONS",
    "FAMILIES",
    "GENERIC",
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
]

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]

RECORDS: tuple[Family, ...] = tuple(
    record for module in _MODULES for record in (getattr(module, "FAMILIES", None) or [getattr(module, "FAMILY", None)])
    if record is not None
)  # fmt: skip
"""All that is known, also of families that are known by their names alone; by the names of their files."""

GENERIC = Family(name="generic", title="unknown model")
"""A model that no family fits; never recognized: its structure decides, and the caller says so."""

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


def family(name: str) -> Family:
    """Look a family up by its `--preset` name; case, `_` and spaces do not matter.

    Args:
        name: A key of `FAMILIES`, or "generic".

    Raises:
        OptionError: There is no such family.
    """
    known = {**FAMILIES, GENERIC.name: GENERIC}
    plain = {re.sub(r"[-.]", "", key): key for key in known}
    wanted = re.sub(r"[-_. ]", "", name.lower())
    if wanted in plain:
        return known[plain[wanted]]
    known = {key: record for key, record in known.items() if record.architecture or record is GENERIC}
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
def _authors_names() -> Index:
    return index(turned(rule for record in RECORDS for rule in record.names))


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
        fused: Layers that the checkpoint's authors have, and that it holds in parts -> these, in order of rows.
        of_fused: What names mean of those.
    """

    exact: Targets
    squeezed: Targets
    fused: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)
    of_fused: LoraNames | None = None

    def find(self, name: str) -> tuple[Target, ...]:
        """The parts of the checkpoint that a name, without its adapter's suffix, may mean; several are an ambiguity.

        >>> lora_names({"blocks.1.ffn.0": (8, 4)}).find("lora_unet_blocks_1_ffn_net_0_proj")
        (Target(layer='blocks.1.ffn.0', rows=None, swap_halves=False),)
        """
        spellings = list(without_lora_prefixes(name))
        found = (self.exact.get(spelling) for spelling in spellings)
        loosely = (self.squeezed.get(squeezed(spelling)) for spelling in spellings)
        return next(filter(None, chain(found, loosely)), ())

    def meant(self, name: str) -> list[tuple[Target, ...]]:
        """All that a name may mean; each possibility as the parts that it means together."""
        whole = () if self.of_fused is None else self.of_fused.find(name)
        return [(target,) for target in self.find(name)] or [tuple(self._parts(target)) for target in whole]

    def _parts(self, target: Target) -> Iterator[Target]:
        """The parts of the checkpoint that some rows of a fused layer are in."""
        for part in self.fused[target.layer]:
            assert part.rows is not None
            size = part.rows[1]
            start, stop = target.rows or (0, part.first + size)
            low, high = max(start, part.first), min(stop, part.first + size)
            if low < high:
                rows = None if high - low == size else (low - part.first, high - part.first)
                yield Target(part.layer, rows, part.swap_halves != target.swap_halves, low - start)


def lora_names(layers: Mapping[str, tuple[int, int]]) -> LoraNames:
    """What the names that LoRA files use for some layers mean.

    Args:
        layers: Bare names of a checkpoint's linear layers -> (out, in) features.
    """
    fused = _fused(layers)
    shapes = {name: (parts[-1].first + layers[parts[-1].layer][0], layers[parts[0].layer][1])
              for name, parts in fused.items()}  # fmt: skip
    return replace(_names_of(layers), fused=fused, of_fused=_names_of(shapes))


def _names_of(layers: Mapping[str, tuple[int, int]]) -> LoraNames:
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
    found = [{name: tuple(meant) for name, meant in names.items()} for names in (exact, loose)]
    return LoraNames(found[0], found[1])


def _parts(modules: Iterable[str], authors: Index) -> dict[str, dict[Part, str]]:
    """Layers of models' authors that modules stand for -> the module of each part."""
    found: dict[str, dict[Part, str]] = {}
    for module in modules:
        for layer, part in translations(module, authors):
            found.setdefault(layer, {}).setdefault(part, module)
    return found


def _fused(layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Target, ...]]:
    """Layers of models' authors that diffusers' names stand for, whole -> their parts, in order of rows."""
    fused = {}
    for layer, module_of in _parts(layers, _authors_names()).items():
        parts = sorted((part for part in module_of if part.fused is not None), key=lambda part: part.first)
        parts = parts if len(parts) == len(module_of) else [next(part for part in module_of if part.fused is None)]
        sizes = [layers[module_of[part]] for part in parts]
        wanted = parts[0].fused(sum(rows for rows, _ in sizes), sizes[0][1]) if parts[0].fused else (sizes[0][0],)
        if layer not in layers and wanted == tuple(rows for rows, _ in sizes):
            firsts = accumulate((rows for rows, _ in sizes), initial=0)
            fused[layer] = tuple(
                Target(module_of[part], (0, rows), part.swapped(rows, columns), first)
                for part, (rows, columns), first in zip(parts, sizes, firsts, strict=False)
            )
    return fused


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
    records = [record for record in RECORDS if transformer in record.transformers]
    alike = [rule for record in records for rule in record.spellings]
    layers = index(turned(rule for record in records for rule in record.names))
    same = index((*alike, *turned(alike)))
    found: dict[str, tuple[tuple[str, tuple[int, int]], ...]] = {}
    for layer, modules_of_parts in _parts(modules, layers).items():
        out_features = sum(modules[module][0] for module in modules_of_parts.values())
        for module in modules_of_parts.values():
            shape = (out_features, modules[module][1])
            found[module] = (*found.get(module, ()), *((name, shape) for name in dict.fromkeys(spelled(layer, same))))
    return found
