"""From pixels, in which people think, to the tokens that a model sees.

A picture passes an encoder (8 times smaller in most families) and is cut into patches (2 by 2 in most): one token
covers 16 by 16 pixels. Video encoders merge frames after the first in groups of four.

Limits. A checkpoint does not say which encoder it was trained with; a model of a listed family with another one is
shown another size than asked for, which moves ranges little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from ..families.running import Geometry
from ..options import FRAMES, SIDE_PIXELS, TEXT_TOKENS

GRID = (16, 4)
"""What one token covers: pixels along each side, and frames of a video after the first, which has tokens of its own."""

GRIDS: Mapping[str, tuple[int, int]] = {"ltx": (32, 8), "ltx2": (32, 8), "hunyuan-image": (32, 4), "mochi": (16, 6)}
"""The same of families with another encoder."""


def asked(family: str, size: Sequence[int | None]) -> Geometry | None:
    """The tokens of an image of the sizes that options name (`ShownOptions.size`); None where they name none."""
    return geometry(family, *size) if any(size) else None


def usual(size: Sequence[int | None]) -> tuple[int, ...]:
    """Height and width in pixels, frames, and tokens of text: what `ShownOptions.size` names, and else the usual."""
    defaults = SIDE_PIXELS, SIDE_PIXELS, FRAMES, TEXT_TOKENS
    return tuple(one or default for one, default in zip(size, defaults, strict=True))


def geometry(
    family: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    text_tokens: int | None = None,
) -> Geometry:
    """The tokens of an image or video; what is None is the usual.

    Args:
        family: name of the model's family.
        height: in pixels; rounded up to whole tokens, and ≥ 1 as all numbers here are.
        width: like `height`.
        frames: of a video, 1 for an image; rounded up to whole tokens.
        text_tokens: length of the text.

    >>> geometry("flux1", 1024, 768)
    Geometry(height=64, width=48, frames=1, text_tokens=64)
    >>> geometry("ltx", 512, 768, frames=97).frames
    13
    """
    height, width, frames, text_tokens = usual((height, width, frames, text_tokens))
    pixels, merged = GRIDS.get(family, GRID)
    return Geometry(ceil(height / pixels), ceil(width / pixels), 1 + ceil((frames - 1) / merged), text_tokens)
