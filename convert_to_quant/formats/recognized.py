"""Formats that ComfyUI reads and this tool only recognizes: which tensors they need, and how large weights can get.

As in ComfyUI's `comfy/quant_ops.py` and comfy-kitchen 0.2.40.
"""

from __future__ import annotations

from .. import names
from .record import Format

S_REL, S_CHANNEL, ZEROS = ".weight_s_rel", ".weight_s_channel", ".weight_zeros"
ROTATED = {"format": "int8_tensorwise", "convrot": True}

FORMATS = (
    Format("int8-convrot", "INT8 ConvRot", ROTATED, ("I8",), 8, range=127.0),
    Format("w4a8", "W4A8", {"format": "asym_w4a8_int8"}, ("I8", "U8"), 4.5, (S_REL, S_CHANNEL), ranged_by=S_CHANNEL,
           range=127.0),
    Format("awq-w4a16", "AWQ W4A16", {"format": "awq_w4a16"}, ("I8", "U8", "I32"), 4.5, (names.WEIGHT_SCALE, ZEROS),
           ranged_by=None),
    Format("nvfp4", "NVFP4", {"format": "nvfp4"}, ("U8",), 4.5, (names.WEIGHT_SCALE, names.WEIGHT_SCALE_2),
           ("F8_E4M3", "U8"), ranged_by=names.WEIGHT_SCALE_2, range=448.0 * 6.0),
    Format("convrot-w4a4", "ConvRot W4A4", {"format": "convrot_w4a4"}, ("I8", "U8"), 4, range=7.0),
)  # fmt: skip
