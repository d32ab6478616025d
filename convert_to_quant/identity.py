"""What a file is: all commands ask here.

A file is a diffusion model, alone or in a full checkpoint with text encoders and a VAE; a text encoder, VAE, or image
encoder alone; an adapter; statistics; or a model packed by another program. A diffusion model belongs to a family in
`families`, or its repeated blocks are found by structure (`families.structure`).

Text encoders are recognized by layer names that no other kind of file has: `SelfAttention` in numbered pairs of layers
is T5. ComfyUI runs them in full precision, so they are not calibrated and get no input scales; their blocks are
quantized on request, their embeddings never. A file of mostly convolutions under `encoder` and `decoder` is a VAE.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from . import families, names, packings
from .checkpoint import Checkpoint
from .families.base import Signature, signature
from .families.structure import Structure, study
from .layers import LayerTable

Kind = Literal["diffusion", "text-encoder", "image-encoder", "vae", "adapter", "statistics", "packed"]
Shapes = Mapping[str, tuple[int, ...]]


def _is(title: str, *has: str) -> tuple[str, Signature]:
    return title, signature(*has)


_LLAMA = "embed_tokens.weight layers.0.self_attn.q_proj.weight"
_SEES = "visual.blocks.0.attn.qkv.weight"
ENCODERS: Mapping[Literal["image-encoder", "text-encoder"], tuple[tuple[str, Signature], ...]] = {
    "text-encoder": (
        _is("UMT5", "block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
        _is("UMT5", "token_embedding.weight blocks.1.pos_embedding.embedding.weight blocks.0.attn.q.weight"),
        _is("T5", "block.0.layer.0.SelfAttention.q.weight"),
        _is("CLIP", "text_model.encoder.layers.0.self_attn.q_proj.weight"),
        _is("CLIP", "transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"),
        _is("BERT", "encoder.layer.0.attention.self.query.weight"),
        _is("ChatGLM", "layers.0.self_attention.query_key_value.weight"),
        _is("GPT-OSS", "layers.0.self_attn.sinks"),
        _is("Qwen 3.5", "layers.0.linear_attn.in_proj_qkv.weight"),
        _is("Gemma 3", _LLAMA, "layers.0.pre_feedforward_layernorm.weight layers.0.self_attn.q_norm.weight"),
        _is("Gemma 2", _LLAMA, "layers.0.pre_feedforward_layernorm.weight"),
        _is("Qwen 3-VL", _LLAMA, "layers.0.self_attn.q_norm.weight visual.blocks.0.mlp.linear_fc1.weight"),
        _is("Qwen 3", _LLAMA, "layers.0.self_attn.q_norm.weight"),
        _is("Qwen 2.5-VL", _LLAMA, "layers.0.self_attn.q_proj.bias visual.blocks.0.mlp.gate_proj.weight"),
        _is("Qwen 2-VL", _LLAMA, "layers.0.self_attn.q_proj.bias", _SEES),
        _is("Qwen 2", _LLAMA, "layers.0.self_attn.q_proj.bias"),
        _is("Mistral 3 or Pixtral", _LLAMA, "patch_conv.weight"),
        _is("language model", _LLAMA),
    ),
    "image-encoder": (
        _is("CLIP vision or SigLIP", "vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        _is("CLIP vision", "visual.transformer.resblocks.0.attn.in_proj_weight"),
        _is("DINOv2", "encoder.layer.0.attention.attention.query.weight"),
    ),
}
"""Encoders and the endings of tensor names that identify them; the first match counts."""

MISTRAL_WORDS = 131072
"""Size of Mistral's vocabulary, which no other model shares."""

_LORA_PARTS = (
    *(".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.", ".hada_w", ".lokr_w"),
    *(".oft_blocks", ".diff_b", ".lora_magnitude_vector"),
)
_BANK = re.compile(r"(?:.*\.)?\w*experts?(?:\.\w+)*")


@dataclass(frozen=True)
class Identity:
    """What a file is.

    Attributes:
        kind: kind of file; None if it has neither known names nor repeated blocks.
        title: the kind in words.
        family: family of its diffusion model; None if none matches.
        variant: member of the family in words; "" if there is only one.
        shapes: of the model's own tensors by bare name, (out, in) of packed weights; without `names.NO_WEIGHT`.
        hint: what would make the model recognizable, or "".
    """

    kind: Kind | None
    title: str
    family: families.Family | None
    variant: str
    shapes: Shapes
    hint: str = ""

    @property
    def key(self) -> str | None:
        """The `--preset` name of the family, or the kind if it is not a diffusion model; None if unknown."""
        return self.family.name if self.family is not None else None if self.kind == "diffusion" else self.kind

    @property
    def notes(self) -> list[str]:
        """What was recognized of a model of no known family, and why."""
        if self.family is not None or self.kind not in (None, "diffusion"):
            return []
        return [f"the tensor names match no known model family; {self.structure}", *([self.hint] if self.hint else [])]

    @property
    def banks(self) -> list[str]:
        """Bare names of its banks of experts: weights [experts, out, in], which are not quantized."""
        return [name for name, shape in self.shapes.items() if len(shape) == 3 and _BANK.fullmatch(name)]

    @property
    def encoder(self) -> bool:
        """Whether it is a text or image encoder, whose inputs readers never quantize."""
        return self.kind in ("text-encoder", "image-encoder")

    @cached_property
    def structure(self) -> Structure:
        """Its repeated blocks."""
        return study(self.shapes, all_stacks=self.encoder)

    def kept_because(self, layer: str, family: families.Family | None = None) -> str | None:
        """Why a linear layer stays in high precision.

        Args:
            layer: bare name.
            family: the family whose table decides; by default its own. Without blocks in the table, structure decides.

        Returns:
            The reason, or None if the layer is quantized.
        """
        table = family or self.family or families.GENERIC
        reason = table.kept_because(layer)
        return reason if reason is not None or table.blocks else self.structure.kept.get(layer)


def identify(checkpoint: Checkpoint, table: LayerTable) -> Identity:
    """Identify an open checkpoint by its layers; reads no tensor."""
    return of_shapes(table.tensor_shapes(checkpoint), checkpoint.metadata)


def of_shapes(shapes: Shapes, metadata: Collection[str] = ()) -> Identity:
    """Identify a file by the shapes of its tensors and the keys of its header's metadata."""
    prefix, bare = names.strip_prefix(shapes)
    own = {
        rest: shapes[name]
        for name, rest in bare.items()
        if (prefix or names.other_part(name) is None) and not names.NO_WEIGHT.fullmatch(rest)
    }
    said = " ".join(shapes)

    def found(kind: Kind | None, title: str, hint: str = "") -> Identity:
        return Identity(kind, title, None, "", own, hint)

    if names.STATISTICS_KEY in metadata:
        return found("statistics", "activation statistics, not a model (convert_to_quant report shows them)")
    family = families.detect(own, own)
    if family is not None:
        return Identity("diffusion", family.title, family, family.variant(own), own)
    if any(part in said for part in _LORA_PARTS):
        return found("adapter", "adapter (LoRA), not a model")
    ends = {name[place:] for name in own or shapes for place in _starts(name)}
    for kind, known in ENCODERS.items():
        title = next((title for title, ending in known if ending.fits(ends, {})), None)
        if title is not None and not _denoises(own):
            words = next((shape[0] for name, shape in own.items() if name.endswith("embed_tokens.weight")), 0)
            title = "Mistral" if words == MISTRAL_WORDS else title
            return found(kind, f"{kind.replace('-', ' ')} ({title})")
    program = next((packed[1] for name in shapes if (packed := packings.packed_by(name, shapes))), None)
    if program is not None:
        return found("packed", f"model packed by {program}")
    if _is_vae(own):
        return found("vae", "VAE")
    word = next(iter(own), "").partition(".")[0] + "."
    inside = {name.removeprefix(word): shape for name, shape in own.items() if name.startswith(word)}
    family = families.detect(inside, inside)
    hint = (
        ""
        if family is None
        else f"without the prefix {word} it would be {family.title}: remove the prefix from its tensor names"
    )
    return found("diffusion" if study(own).stacks else None, "unknown", hint)


def _starts(name: str) -> list[int]:
    return [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]


def _denoises(shapes: Shapes) -> bool:
    """Whether a model of no known family has a timestep embedder, which no encoder has."""
    return any("time_emb" in name or "t_embed" in name or "timestep" in name for name in shapes)


def _is_vae(shapes: Shapes) -> bool:
    """Whether all weights are under an encoder or a decoder, and most are convolutions."""
    inside = {name.partition(".")[0] for name, shape in shapes.items() if len(shape) > 1}
    convolved = sum(math.prod(shape) for shape in shapes.values() if len(shape) > 2)
    both = inside <= {"encoder", "decoder", "quant_conv", "post_quant_conv", "conv1", "conv2", "quantize"}
    return both and bool(inside & {"encoder", "decoder"}) and 2 * convolved > sum(map(math.prod, shapes.values()))
