"""The record of one family of diffusion models.

A pattern of layers is a regular expression that matches a name without prefix from its start to its end or to a dot:
``proj_out`` keeps the model's own ``proj_out``, not ``single_transformer_blocks.0.proj_out``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from .comfyui import Conditions
from .folds import Fold
from .rules import Rule
from .running import Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """The tensor names of one family, in one naming.

    Attributes:
        has: Modules or tensors that must exist; "a|b" is either of two.
        lacks: Modules or tensors that must not exist.
        size: (regular expression over whole tensor names, axis, sizes): the alphabetically first match has one of these
            sizes along this axis. None if names suffice.
    """

    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    size: tuple[str, int, tuple[int, ...]] | None = None

    def fits(self, modules: Collection[str], shapes: Mapping[str, Shape]) -> bool:
        """Whether a checkpoint matches, by `module_names` of its tensors and by their shapes."""
        found = all(any(name in modules for name in either.split("|")) for either in self.has)
        if not found or any(name in modules for name in self.lacks):
            return False
        if self.size is None:
            return True
        pattern, axis, sizes = self.size
        shape = next((shapes[name] for name in sorted(shapes) if re.fullmatch(pattern, name)), ())
        return axis < len(shape) and shape[axis] in sizes


def signature(*has: str, lacks: str = "", size: tuple[str, int, tuple[int, ...]] | None = None) -> Signature:
    """A `Signature` of names separated by spaces.

    >>> signature("img_in txt_in", lacks="time_in").has
    ('img_in', 'txt_in')
    """
    return Signature(tuple(" ".join(has).split()), tuple(lacks.split()), size)


@dataclass(frozen=True)
class Family:
    """One family of diffusion models.

    Attributes:
        name: The value of `--preset`.
        title: Name for people, with members that are easily mistaken for another family.
        signatures: Ways to recognize it; a record without any is not a preset.
        blocks: Pattern of modules whose linear layers are quantized, as published for this family; "" lets the
            structure decide, which keeps modulations, routers and adapters.
        keep: Pattern of layers that stay in high precision -> the reason; only what neither the structure nor the first
            word of a name (`WORDS`) shows.
        names: diffusers' names of its layers, norms and tables.
        lora: Names that only LoRA files use.
        spellings: The authors' names of whole layers -> other names in checkpoints.
        architecture: How it is run; None if diffusers cannot.
        architectures: Variant -> how it is run, for variants with parts of their own.
        elsewhere: Variants that diffusers' classes cannot run.
        comfyui: Class of `comfy.model_base` -> inputs of its models.
        variants: Name of each variant for people, and its signature; the first match counts.
        folds: Channels that can be scaled, in variants without parts of their own.
    """

    name: str
    title: str
    signatures: tuple[Signature, ...] = ()
    blocks: str = ""
    keep: Mapping[str, str] = field(default_factory=dict)
    names: tuple[Rule, ...] = ()
    lora: tuple[Rule, ...] = ()
    spellings: tuple[Rule, ...] = ()
    architecture: Architecture | None = None
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    comfyui: Mapping[str, Conditions] = field(default_factory=dict)
    variants: tuple[tuple[str, Signature], ...] = ()
    folds: tuple[Fold, ...] = ()

    def kept_because(self, layer: str) -> str | None:
        """Why a linear layer, by its name without prefix, stays in high precision.

        Returns:
            The reason, or None for a layer that is quantized or left to the structure.
        """
        reason = next((reason for pattern, reason in self.keep.items() if _covers(pattern, layer)), None)
        return reason or (None if not self.blocks or _covers(self.blocks, layer) else outside(layer))

    def variant(self, shapes: Mapping[str, Shape]) -> str:
        """The variant of a model, for people; "" if there is only one."""
        modules = module_names(shapes)
        return next((title for title, known in self.variants if known.fits(modules, shapes)), "")

    def runs(self, variant: str) -> Architecture | None:
        """How a variant is run."""
        return None if variant in self.elsewhere else self.architectures.get(variant, self.architecture)

    @property
    def transformers(self) -> tuple[str, ...]:
        """Its classes in diffusers."""
        known = (self.architecture, *self.architectures.values())
        return tuple(way.transformer for way in known if way is not None)


def _covers(pattern: str, name: str) -> bool:
    return re.match(rf"(?:{pattern})(?:\.|$)", name) is not None


def module_names(names: Iterable[str]) -> set[str]:
    """Tensor names, and the names of all modules that contain them.

    >>> sorted(module_names(["img_in.weight"]))
    ['img_in', 'img_in.weight']
    """
    return {name[:end] for name in names for end, letter in enumerate(name + ".") if letter == "."}


# Reasons that several families share.
OUTSIDE = "outside the repeated blocks"
IMAGE = "image embedder: feeds every block"
TEXT = "text embedder: feeds every block, and text encoders have outlier channels"
VECTOR = "time, guidance or pooled-text embedder: one vector steers all blocks"
CONDITION = "embedder of an extra condition (image, audio, face, glyphs)"
FINAL = "final layer: its error goes straight into the image"
MODULATION = "modulation: one vector scales every token of its blocks, and keeping it costs no time"
REFINER = "token refiner: few weights, and its error reaches every block"

WORDS = {
    r"\w*(?:modulation|adaln|t_block|[a-z]mod|modf)\w*": MODULATION,
    r"(?:final|head|out_|norm_out|proj_out|project_out|lm_head)\w*": FINAL,
    r"(?:t_|time|vector_|guidance_|pooled|p_emb|label_|global|add_emb)\w*|to_(?:timestep|global)\w*": VECTOR,
    r"\w*(?:txt|text|cap|caption|context|cond_seq|y_proj|y_embedder|lyric|t5)\w*": TEXT,
    r"\w*(?:img_in|x_emb|patch|pos_embed|latent_in|init_x|proj_in|project_in|visual_emb|conv_in)\w*": IMAGE,
}
"""The first word of a name outside the blocks -> the reason shown. Nothing else depends on it."""


def outside(layer: str) -> str:
    """Why a layer outside the blocks stays in high precision.

    >>> outside("img_in"), outside("brand_new_adapter.3")
    ('image embedder: feeds every block', 'outside the repeated blocks')
    """
    return reason_of(layer.partition(".")[0], WORDS) or OUTSIDE


def reason_of(part: str, table: Mapping[str, str]) -> str:
    """The reason that a table gives for one word of a name; "" if it has none."""
    return next((reason for pattern, reason in table.items() if re.fullmatch(pattern, part, re.IGNORECASE)), "")
