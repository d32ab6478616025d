"""Formats beside FP8 with one scale per tensor: those that ComfyUI reads, and what other programs pack weights in.

Facts as tables. A format of ComfyUI is found by its mark alone; the tables say which tensors it then needs. What other
programs pack has no mark: it shows by the tensors that stand beside the packed ones, and ComfyUI cannot read it.
The formats are those of ComfyUI's `comfy/quant_ops.py` and comfy-kitchen 0.2.40.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from . import names


@dataclass(frozen=True)
class Packing:
    """A format that ComfyUI reads.

    Attributes:
        dtypes: what the weight is stored as.
        scales: suffixes of the tensors that it cannot be loaded without.
        ranged_by: the suffix of its float32 scale.
        max: the largest real weight that a scale of 1 allows.
    """

    dtypes: tuple[str, ...]
    scales: tuple[str, ...]
    ranged_by: str | None = None
    max: float = 0.0


S_REL, S_CHANNEL, ZEROS = ".weight_s_rel", ".weight_s_channel", ".weight_zeros"

PACKINGS: Mapping[str, Packing] = {
    "asym_w4a8_int8": Packing(("I8", "U8"), (S_REL, S_CHANNEL), S_CHANNEL, 127.0),
    "awq_w4a16": Packing(("I8", "U8", "I32"), (names.WEIGHT_SCALE, ZEROS)),
    "nvfp4": Packing(("U8",), (names.WEIGHT_SCALE, names.WEIGHT_SCALE_2), names.WEIGHT_SCALE_2, 448.0 * 6.0),
    "mxfp8": Packing(("F8_E4M3",), (names.WEIGHT_SCALE,)),
    "int8_tensorwise": Packing(("I8",), (names.WEIGHT_SCALE,), names.WEIGHT_SCALE, 127.0),
    "convrot_w4a4": Packing(("I8", "U8"), (names.WEIGHT_SCALE,), names.WEIGHT_SCALE, 7.0),
}
"""By the name in the mark. Those that more tensors tell apart come first."""


@dataclass(frozen=True)
class Program:
    """How another program packs weights.

    Attributes:
        title: the program, for people.
        weight: suffix of the packed weight.
        beside: suffixes of which one stands beside it; none where the packed weight's own name says it.
    """

    title: str
    weight: str
    beside: tuple[str, ...] = ()


PROGRAMS = (
    Program("bitsandbytes 4-bit", names.WEIGHT, (".weight.quant_map", ".weight.absmax")),
    Program("bitsandbytes 8-bit", names.WEIGHT, (".SCB", ".weight_format")),
    Program("Nunchaku (SVDQuant)", ".qweight", (".wscales", ".wtscale", ".proj_down", ".smooth_factor")),
    Program("GPTQ or AWQ", ".qweight"),
    Program("compressed-tensors", ".weight_packed"),
    Program("HQQ", ".W_q"),
    Program("Quanto", ".weight._data"),
    Program("TorchAO", "._weight_qdata"),
)


def recognize(name: str, dtype: str, tensors: Container[str]) -> str | None:
    """The format of ComfyUI that an unmarked layer's dtype and tensors fit, the first of `PACKINGS`.

    Args:
        name: of the layer.
        dtype: of its weight.
        tensors: names of all tensors of the file.
    """
    return next(
        (form for form, packing in PACKINGS.items()
         if dtype in packing.dtypes and all(name + suffix in tensors for suffix in packing.scales)),
        None,
    )  # fmt: skip


def packed_by(tensor: str, tensors: Container[str]) -> tuple[str, str] | None:
    """The layer and the program, where a tensor is a weight that another program packed.

    >>> packed_by("a.qweight", {"a.qweight", "a.wscales"})
    ('a', 'Nunchaku (SVDQuant)')
    """
    for program in PROGRAMS:
        layer = tensor.removesuffix(program.weight)
        if layer != tensor and (not program.beside or any(layer + suffix in tensors for suffix in program.beside)):
            return layer, program.title
    return None
