"""Packed weights of other programs, recognized by the tensors beside the weight; ComfyUI reads none of them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from . import names


@dataclass(frozen=True)
class Program:
    """A packing of another program.

    Attributes:
        title: name of the program.
        weight: suffix of the packed weight.
        beside: suffixes of tensors, of which one must exist; none if the weight's suffix is enough.
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


def packed_by(tensor: str, tensors: Container[str]) -> tuple[str, str] | None:
    """The layer and the program, if a tensor is a weight packed by another program.

    >>> packed_by("a.qweight", {"a.qweight", "a.wscales"})
    ('a', 'Nunchaku (SVDQuant)')
    """
    for program in PROGRAMS:
        layer = tensor.removesuffix(program.weight)
        if layer != tensor and (not program.beside or any(layer + suffix in tensors for suffix in program.beside)):
            return layer, program.title
    return None
