"""What products cost on cards, by format: measured (`benchmarks/step_cost.py`) or quoted, in `speeds.json`.

Speed belongs to the card: on an H100 no format beats 16 bits by much, on an L40S INT8 is twice as fast. So a card that
is not in the table has no speed here, and none is assumed.
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
"""What layers that are not quantized compute in, as the table calls it."""


@cache
def table() -> Mapping[str, Any]:
    """Card -> device, source, and what its products cost."""
    found: Mapping[str, Any] = parse_json(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def of_card(gpu: str) -> Mapping[str, Any]:
    """What is known of a card.

    Raises:
        OptionError: nothing.
    """
    if gpu not in table():
        known = ", ".join(f"{name} ({each['source'].partition(' ')[0].rstrip(':')})" for name, each in table().items())
        raise OptionError(
            f"no speed of {GPUS[gpu]} was measured, so --speed cannot be held to it",
            hint=f"known: {known}; benchmarks/step_cost.py measures a card",
        )
    found: Mapping[str, Any] = table()[gpu]
    return found


def formats(gpu: str) -> frozenset[str]:
    """The formats whose speed on a card is known."""
    known = of_card(gpu)
    return frozenset(known.get("times_as_fast") or known["products"][0]["microseconds"])


def microseconds(gpu: str, fmt: str, shape: tuple[int, int]) -> float:
    """What a layer's product takes, quantizing its input included; of quoted speeds, in units of their own.

    Args:
        gpu: a card in the table.
        fmt: one of `formats`, or "" for high precision.
        shape: (out, in) of the weight. What was measured at the nearest shape is scaled by the multiply-adds.
    """
    known, name, products = of_card(gpu), fmt or HIGH_PRECISION, math.prod(shape)
    if "times_as_fast" in known:
        return products / float(known["times_as_fast"][name])

    def distance(each: Mapping[str, Any]) -> float:
        return abs(math.log(float(each["out"]) / shape[0])) + abs(math.log(float(each["in"]) / shape[1]))

    nearest = min(known["products"], key=distance)
    return float(nearest["microseconds"][name]) * products / int(nearest["out"] * nearest["in"])
