"""Diffusion model families as data: one file per family contains all that is known of it.

In FP8 every layer has about the same relative error, but not the same effect. The repeated blocks contain most weights,
and each adds its error to a residual stream with many other inputs. Layers outside the blocks are small but affect
everything: embedders of image, text, time and guidance feed all blocks, and the final layer writes the image. Other
converters therefore quantize the blocks and keep the rest, and so do these tables. To calibrate a model, we also need
to run it, or to find its layers under other names.

Each module of this package that defines a `FAMILY` (a `base.Family`) is found by listing the folder, so a new family is
one new file. The record has

    signatures, blocks, keep      recognition; layers that stay in high precision, and why (`base`)
    names, lora, spellings        names in diffusers and in LoRA files (`rules`)
    architecture                  how diffusers' class is run (`running`)
    comfyui                       inputs of its classes in ComfyUI, besides latents (`comfyui`)

Every layer outside the blocks is kept, known or not: an unknown layer in high precision costs a little memory, in FP8
it can ruin the image. `blocks` is set where other converters publish what they quantize in a family (some quantize its
modulations); otherwise `structure` finds the blocks. A family knows its authors' names, which ComfyUI uses, and
diffusers'.

Sources, read in November 2026, and named where they decided:
    ModelOpt       NVIDIA/Model-Optimizer, examples/diffusers/quantization: filter functions per model
    musubi         kohya-ss/musubi-tuner: FP8 target and exclude keys per model
    dit-quantizer  bedovyy/comfy-dit-quantizer: rules per model
    silveroxides   silveroxides/convert_to_quant: filter presets per model
    Lightricks     its own LTX-2 FP8 files, as their readers list them

Names follow diffusers' converters (`diffusers/loaders/single_file_utils.py`; for PixArt, ComfyUI's), and tests compare
them; LoRA names follow what trainers write and ComfyUI reads.

Limits. A name shows where a layer is, not how large its inputs grow; Z-Image's MLP inputs reach 6.6e4 in layers that
are quantized here. Calibration finds layers that lose small tokens in FP8 and sets full-precision matmuls for them.
Name rules apply to all layers of all families.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from itertools import accumulate, chain
from pkgutil import iter_modules

from ..errors import OptionError
from ..names import squeezed, without_lora_prefixes
from .base import Family, Shape, module_names
from .comfyui import Conditions
from .rules import Index, Part, Rule, Target, Targets, both_ways, index, spelled, targets, translations, turned

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
"""All records, in the order of their files; some only hold names or ComfyUI classes."""

GENERIC = Family(name="generic", title="unknown model")
"""Any model that fits no family: its structure decides. Never detected."""

FAMILIES: Mapping[str, Family] = {record.name: record for record in RECORDS if record.signatures}
"""Every family that can be recognized, by its `--preset` name."""

CONDITIONS: Mapping[str, Conditions] = {name: takes for record in RECORDS for name, takes in record.comfyui.items()}
"""Class of `comfy.model_base` -> the inputs of its models."""


def detect(names: Collection[str], shapes: Mapping[str, Shape]) -> Family | None:
    """The family of a checkpoint by its tensor names without prefix, and, for U-Nets, their shapes.

    Returns:
        None if no family fits (use `GENERIC`). No checkpoint fits two.
    """
    modules = module_names(names)
    fitting = (known for known in RECORDS if any(signature.fits(modules, shapes) for signature in known.signatures))
    return next(fitting, None)


def family(name: str) -> Family:
    """Look up a family, or `GENERIC`, by its `--preset` name; case, `_` and spaces do not matter.

    Raises:
        OptionError: There is no such family.
    """
    known = {re.sub(r"[-.]", "", record.name): record for record in (*FAMILIES.values(), GENERIC)}
    wanted = re.sub(r"[-_. ]", "", name.lower())
    if wanted in known:
        return known[wanted]
    close = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {known[close[0]].name!r}? " if close else ""
    presets = (record.name for record in known.values() if record.architecture or record is GENERIC)
    raise OptionError(f"unknown preset {name!r}", hint=f"{hint}presets: {', '.join(presets)}")


@cache
def _index(*columns: str, arranged: Callable[[Iterable[Rule]], Iterable[Rule]] = tuple) -> Index:
    """The rules of all families in some of their columns."""
    return index(arranged(rule for record in RECORDS for column in columns for rule in getattr(record, column)))


def _targets(layers: Mapping[str, tuple[int, int]], *columns: str) -> Targets:
    return targets(layers, _index(*columns), _index("spellings", arranged=both_ways))


def diffusers_targets(layers: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
    """Say which part of which layer (name without prefix -> (out, in)) every diffusers module name means.

    Returns:
        {diffusers module name: `Target`}, including each layer's own name (many checkpoints use diffusers' names) and
        the names that other families would use. Names that may mean two parts are left out.

    >>> targets = diffusers_targets({"double_blocks.3.img_attn.qkv": (96, 32)})
    >>> targets["transformer_blocks.3.attn.to_k"]
    Target(layer='double_blocks.3.img_attn.qkv', rows=(32, 64), swap_halves=False)
    """
    return {name: meant[0] for name, meant in _targets(layers, "names").items() if len(meant) == 1}


@dataclass(frozen=True)
class LoraNames:
    """What names in a LoRA file mean.

    Names are built from the layers, never parsed: `_` for `.` cannot be undone (`img_attn_qkv` is `img_attn.qkv` in one
    model and one word in another), and matching endings would confuse `blocks.11` with `blocks.1`.

    Attributes:
        exact: Every name of a layer or of a part of one -> what it may mean.
        squeezed: The same without separators.
        fused: Fused layers in the authors' names that the checkpoint stores in parts -> the parts, in row order.
        of_fused: What names mean for those.
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
        names = list(without_lora_prefixes(name))
        found = chain(map(self.exact.get, names), map(self.squeezed.get, map(squeezed, names)))
        return next(filter(None, found), ())

    def meant(self, name: str) -> list[tuple[Target, ...]]:
        """All that a name may mean; each possibility is the parts that it means together."""
        whole = () if self.of_fused is None else self.of_fused.find(name)
        return [(target,) for target in self.find(name)] or [tuple(self._parts(target)) for target in whole]

    def _parts(self, target: Target) -> Iterator[Target]:
        """The parts of the checkpoint that contain some rows of a fused layer."""
        for part in self.fused[target.layer]:
            assert part.rows is not None
            size = part.rows[1]
            start, stop = target.rows or (0, part.first + size)
            low, high = max(start, part.first), min(stop, part.first + size)
            if low < high:
                rows = None if high - low == size else (low - part.first, high - part.first)
                yield Target(part.layer, rows, part.swap_halves != target.swap_halves, low - start)


def lora_names(layers: Mapping[str, tuple[int, int]]) -> LoraNames:
    """What LoRA files' names mean for a checkpoint's linear layers: name without prefix -> (out, in) features."""
    fused = _fused(layers)
    shapes = {name: (parts[-1].first + layers[parts[-1].layer][0], layers[parts[0].layer][1])
              for name, parts in fused.items()}  # fmt: skip
    return replace(_names_of(layers), fused=fused, of_fused=_names_of(shapes))


def _names_of(layers: Mapping[str, tuple[int, int]]) -> LoraNames:
    exact: dict[str, dict[Target, None]] = {}
    loose: dict[str, dict[Target, None]] = {}
    for name, meant in _targets(layers, "names", "lora").items():
        # diffusers' first LoRA files name the attention processor; it has one output projection, not a list of them.
        processor = name.replace(".to_", ".processor.to_")
        if processor.endswith(".to_out.0"):
            processor = processor.removesuffix(".0")
        for spelling in {name, processor}:
            exact.setdefault(spelling, {}).update(dict.fromkeys(meant))
            loose.setdefault(squeezed(spelling), {}).update(dict.fromkeys(meant))
    exact_targets, loose_targets = ({name: tuple(meant) for name, meant in found.items()} for found in (exact, loose))
    return LoraNames(exact_targets, loose_targets)


def _parts(modules: Iterable[str], authors: Index) -> dict[str, dict[Part, str]]:
    """The authors' layers that some modules are parts of -> part -> module."""
    found: dict[str, dict[Part, str]] = {}
    for module in modules:
        for layer, part in translations(module, authors):
            found.setdefault(layer, {}).setdefault(part, module)
    return found


def _fused(layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Target, ...]]:
    """The authors' layers of which diffusers' names cover every row -> their parts, in row order."""
    fused = {}
    for layer, module_of in _parts(layers, _index("names", arranged=turned)).items():
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
    """Say which layers of a checkpoint in its authors' names the linear modules of a diffusers class correspond to.

    Returns:
        {module: ((layer name, (out, in) features of the layer), ...)} with every known name, and the whole layer for
        parts of a fused one. Modules whose names are the authors' own are left out.

    >>> parts = {f"transformer_blocks.3.attn.to_{part}": (32, 32) for part in "qkv"}
    >>> checkpoint_layers(parts, "FluxTransformer2DModel")["transformer_blocks.3.attn.to_k"]
    (('double_blocks.3.img_attn.qkv', (96, 32)),)
    """
    records = [record for record in RECORDS if transformer in record.transformers]
    layers = index(turned(rule for record in records for rule in record.names))
    same = index(both_ways(rule for record in records for rule in record.spellings))
    found: dict[str, tuple[tuple[str, tuple[int, int]], ...]] = {}
    for layer, modules_of_parts in _parts(modules, layers).items():
        out_features = sum(modules[module][0] for module in modules_of_parts.values())
        for module in modules_of_parts.values():
            shape = (out_features, modules[module][1])
            found[module] = (*found.get(module, ()), *((name, shape) for name in dict.fromkeys(spelled(layer, same))))
    return found
