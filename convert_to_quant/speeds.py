"""The cost of matmuls by GPU and format, measured (`benchmarks/step_cost.py`) or quoted, from `speeds.json`.

Speed depends on the GPU: on an H100 no format is much faster than 16 bits, on an L40S INT8 is twice as fast. So no
speed is assumed for GPUs that are not in the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .errors import OptionError
from .formats.record import GPUS
from .untrusted import parse_json

HIGH_PRECISION = "bf16"
"""The table's name for layers that are not quantized."""


@cache
def table() -> Mapping[str, Any]:
    """GPU -> device, source, and costs."""
    found: Mapping[str, Any] = parse_json(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def of_card(gpu: str) -> Mapping[str, Any]:
    """The entry of a GPU.

    Raises:
        OptionError: it has none.
    """
    if gpu not in table():
        known = ", ".join(f"{name} ({each['source'].partition(' ')[0].rstrip(':')})" for name, each in table().items())
        raise OptionError(
            f"--speed needs measurements, and there are none for {GPUS[gpu]}",
            hint=f"known: {known}; measure a GPU with benchmarks/step_cost.py",
        )
    found: Mapping[str, Any] = table()[gpu]
    return found


def formats(gpu: str) -> frozenset[str]:
    """The formats with a known speed on a GPU."""
    known = of_card(gpu)
    return frozenset(known.get("times_as_fast") or known["products"][0]["microseconds"])


def microseconds(gpu: str, fmt: str, shape: tuple[int, int]) -> float:
    """The time of a layer's matmul, with the quantization of its input; in arbitrary units for quoted speeds.

    Args:
        gpu: a GPU in the table.
        fmt: one of `formats`, or "" for high precision.
        shape: (out, in) of the weight. The measurement of the nearest shape is scaled by compute.
    """
    known, name, products = of_card(gpu), fmt or HIGH_PRECISION, math.prod(shape)
    if "times_as_fast" in known:
        return products / float(known["times_as_fast"][name])

    def distance(each: Mapping[str, Any]) -> float:
        return abs(math.log(float(each["out"]) / shape[0])) + abs(math.log(float(each["in"]) / shape[1]))

    nearest = min(known["products"], key=distance)
    return float(nearest["microseconds"][name]) * products / int(nearest["out"] * nearest["in"])
