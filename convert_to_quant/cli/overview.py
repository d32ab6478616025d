"""What `convert_to_quant` alone says: the way through by example, and every command in one line."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from .terminal import paint

EXAMPLES = (
    "convert_to_quant -i flux_bf16.safetensors -o flux_fp8.safetensors --actcal",
    "convert_to_quant inspect flux_fp8.safetensors",
    "convert_to_quant check flux_bf16.safetensors flux_fp8.safetensors",
    "convert_to_quant demo",
)

GROUPS: Mapping[str, tuple[str, ...]] = {
    "make a file": ("convert", "apply"),
    "look at it": ("inspect", "check", "report"),
    "see what its layers receive": ("observe", "merge", "comfyui"),
    "begin": ("demo", "completion"),
}
"""Commands by what they are for."""


def overview(commands: Mapping[str, str]) -> str:
    """The screen.

    Args:
        commands: what each does.
    """
    blocks: dict[str, tuple[str, ...]] = {"examples": EXAMPLES}
    for title, names in GROUPS.items():
        blocks[title] = tuple(f"{name:<12}{commands[name]}" for name in names if name in commands)
    lines = ["FP8 for diffusion models that keeps the picture.", ""]
    for title, entries in blocks.items():
        lines += [paint(f"{title}:", "head", sys.stdout), *(f"  {entry}" for entry in entries)]
    lines += ["", "convert needs no name. More: convert_to_quant help COMMAND, or --version."]
    return "\n".join(lines) + "\n"
