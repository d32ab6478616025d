"""Converts image sizes in pixels to the tokens of a model.

An image passes through an encoder (8 times smaller in most families) and is cut into patches (2 by 2 in most), so one
token covers 16 by 16 pixels. Video encoders merge frames after the first in groups of four.

Limits. A checkpoint does not name the encoder it was trained with. A model of a listed family with another encoder gets
another size than asked for, which changes ranges little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from ..families.running import Geometry
from ..options import FRAMES, SIDE_PIXELS, TEXT_TOKENS

GRID = (16, 4)
"""Pixels that one token covers along each side, and frames after the first, which has tokens of its own."""

GRIDS: Mapping[str, tuple[int, int]] = {"ltx": (32, 8), "ltx2": (32, 8), "hunyuan-image": (32, 4), "mochi": (16, 6)}
"""The same for families with another encoder."""


def asked(family: str, size: Sequence[int | None]) -> Geometry | None:
    """The tokens of an image of the size in options (`ShownOptions.size`); None if they have none."""
    return geometry(family, *size) if any(size) else None


def usual(size: Sequence[int | None]) -> tuple[int, ...]:
    """Height and width in pixels, frames, and text tokens of `ShownOptions.size`, with defaults."""
    defaults = SIDE_PIXELS, SIDE_PIXELS, FRAMES, TEXT_TOKENS
    return tuple(one or default for one, default in zip(size, defaults, strict=True))


def geometry(
    family: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    text_tokens: int | None = None,
) -> Geometry:
    """The tokens of an image or video (height and width in pixels) of a model of some family; None means the default.

    Sizes and frames are rounded up to whole tokens.

    >>> geometry("flux1", 1024, 768)
    Geometry(height=64, width=48, frames=1, text_tokens=64)
    >>> geometry("ltx", 512, 768, frames=97).frames
    13
    """
    height, width, frames, text_tokens = usual((height, width, frames, text_tokens))
    pixels, merged = GRIDS.get(family, GRID)
    return Geometry(ceil(height / pixels), ceil(width / pixels), 1 + ceil((frames - 1) / merged), text_tokens)
