"""The screen of `convert_to_quant` without arguments: two examples, and every command in one line."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from .terminal import paint

GROUPS: Mapping[str, Mapping[str, str]] = {
    "create and modify checkpoints": {
        "convert": "convert to another format, calibrate FP8, or both (the default)",
        "apply": "set the input scales of an FP8 checkpoint from statistics",
        "dequantize": "convert quantized layers to BF16",
        "repair": "repair missing or broken quantization configs in place",
        "migrate": "rewrite quantization configs in another convention",
        "lora": "convert a LoRA for a checkpoint made with --fold",
    },
    "inspect and measure": {
        "inspect": "show what a file contains, how ComfyUI runs it, and its problems",
        "check": "compare a quantized model with its original",
        "card": "write a model card with measurements and sample images",
        "report": "show what calibration changes per layer, or compare two runs",
        "observe": "run a model and record statistics of its layer inputs",
        "merge": "merge statistics files",
        "comfyui": "install our ComfyUI nodes, or record a model in a running ComfyUI",
    },
    "get started": {
        "demo": "quantize a small model in five ways and generate images with each",
        "completion": "print a shell completion script",
    },
}
"""Commands by purpose, with their one-line descriptions."""


def overview() -> str:
    """The screen."""
    blocks = {
        "examples": [
            "convert_to_quant -i flux_bf16.safetensors -o flux_fp8.safetensors --actcal",
            "convert_to_quant -i flux_bf16.safetensors -o flux_best.safetensors --best",
        ],
        **{title: [f"{name:<12}{words}" for name, words in group.items()] for title, group in GROUPS.items()},
    }
    lines = ["Quantize diffusion models for ComfyUI: FP8, INT8, NVFP4 and other formats.", ""]
    for title, entries in blocks.items():
        lines += [paint(f"{title}:", "head", sys.stdout), *(f"  {entry}" for entry in entries)]
    return "\n".join([*lines, "For details: convert_to_quant help COMMAND. For the version: --version.", ""])
