"""Formats that ComfyUI or its nodes read and this tool only recognizes, by their tensors."""

from __future__ import annotations

from .. import names
from .record import Format

FORMATS = (
    Format("awq-w4a16", "AWQ W4A16", {"format": "awq_w4a16"}, ("I8", "U8", "I32"), 4.5,
           (names.WEIGHT_SCALE, ".weight_zeros"), ranged_by=None, cards="Turing and later",
           since="0.38 or earlier"),
    Format("svdquant-w4a4", "SVDQuant W4A4", {"format": "svdquant_w4a4"}, ("I8", "U8"), 4.5,
           (names.WEIGHT_SCALE, ".proj_down", ".proj_up", ".smooth_factor"), ranged_by=None,
           reader="comfy-quants"),
)  # fmt: skip
