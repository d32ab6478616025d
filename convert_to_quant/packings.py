"""What other programs pack weights in: it has no mark, shows by tensors beside the weight, and ComfyUI reads none."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from . import names


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
