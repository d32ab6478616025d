"""What `convert_to_quant` alone says: the way through by example, and every command in one line."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from .terminal import paint

EXAMPLES = (
    "convert_to_quant -i flux_bf16.safetensors -o flux_fp8.safetensors --actcal",
    "convert_to_quant -i flux_bf16.safetensors -o flux_best.safetensors --best",
)

GROUPS: Mapping[str, Mapping[str, str]] = {
    "make a file": {
        "convert": "convert to another format, calibrate FP8, or both (the default)",
        "apply": "choose scales from statistics and write them into a checkpoint",
        "dequantize": "turn quantized layers into BF16",
        "repair": "put broken marks of quantized layers right, in place",
        "migrate": "mark quantized layers in another way, weights as they are",
        "lora": "make a LoRA fit a file whose channels are folded",
    },
    "look at it, and at what its layers receive": {
        "inspect": "say what a file is, what ComfyUI does with it, what is wrong",
        "check": "compare a quantized model with its reference while both paint",
        "card": "compare as check does, and write a page for a model hub",
        "report": "show what calibration changes, layer by layer; or compare two",
        "observe": "run a model and keep what its layers receive as a statistics file",
        "merge": "merge statistics files",
        "comfyui": "put our nodes into a ComfyUI, or record a model on one that runs",
    },
    "begin": {
        "demo": "convert a small model in five ways, and paint with each",
        "completion": "print what makes a shell complete our commands and flags",
    },
}
"""Commands by what they are for, and what each does."""


def overview() -> str:
    """The screen."""
    lines = ["FP8 for diffusion models that keeps the picture, and ComfyUI's other formats.", ""]
    blocks: dict[str, tuple[str, ...]] = {"examples": EXAMPLES}
    blocks |= {title: tuple(f"{name:<12}{words}" for name, words in group.items()) for title, group in GROUPS.items()}
    for title, entries in blocks.items():
        lines += [paint(f"{title}:", "head", sys.stdout), *(f"  {entry}" for entry in entries)]
    lines += ["convert needs no name. More: convert_to_quant help COMMAND, or --version."]
    return "\n".join(lines) + "\n"
