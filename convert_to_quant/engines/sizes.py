"""From pixels, in which people think, to the tokens that a model sees.

A picture passes an encoder (8 times smaller in most families) and is cut into patches (2 by 2 in most): one token
covers 16 by 16 pixels. Video encoders merge frames after the first in groups of four. What differs is in `GRIDS`.

Limits. A checkpoint does not say which encoder it was trained with; a model of a listed family with another one is
shown another size than asked for, which moves ranges little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from ..families.running import Geometry
from ..options import FRAMES, SIDE_PIXELS, TEXT_TOKENS


@dataclass(frozen=True)
class Grid:
    """What one token covers.

    Attributes:
        pixels: along each side.
        frames: of a video, after the first frame, which has tokens of its own.
    """

    pixels: int = 16
    frames: int = 4


GRIDS: Mapping[str, Grid] = {"ltx": Grid(32, 8), "ltx2": Grid(32, 8), "hunyuan-image": Grid(32), "mochi": Grid(16, 6)}
"""By family; `Grid()` for all others."""


def asked(family: str, size: Sequence[int | None]) -> Geometry | None:
    """The tokens of an image of the sizes that options name (`ShownOptions.size`); None where they name none."""
    return geometry(family, *size) if any(size) else None


def geometry(
    family: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    text_tokens: int | None = None,
) -> Geometry:
    """The tokens of an image or video; what is None has the defaults of `engines`.

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
    height, width = (SIDE_PIXELS if side is None else side for side in (height, width))
    frames = FRAMES if frames is None else frames
    text_tokens = TEXT_TOKENS if text_tokens is None else text_tokens
    grid = GRIDS.get(family, Grid())
    return Geometry(
        height=ceil(height / grid.pixels),
        width=ceil(width / grid.pixels),
        frames=1 + ceil((frames - 1) / grid.frames),
        text_tokens=text_tokens,
    )
