"""A sheet of small images to compare: labelled rows, columns of cells, a caption under every cell.

Drawn with Pillow and its font, which has ASCII only. Images are enlarged by whole factors without smoothing, to show
the model's pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Pixels = NDArray[np.uint8]

INK: Color = (31, 35, 40)
FADED: Color = (89, 99, 110)
PAGE: Color = (246, 248, 250)
WHITE: Color = (255, 255, 255)
FRAME: Color = (209, 217, 224)
GOOD: Color = (26, 127, 55)
BAD: Color = (207, 34, 46)

ENLARGED, SPACE = 3, 2
"""Screen pixels per pixel, and white pixels around each image."""

MARGIN, GAP, PADDING = 32, 24, 12
HEAD_HEIGHT, TITLE_HEIGHT, CAPTION_HEIGHT = 76, 150, 48
TITLE_SIZE, HEAD_SIZE, TEXT_SIZE = 42, 32, 24


@dataclass(frozen=True)
class Cell:
    """Images of equal size, uint8 [height, width, 3], and a caption of one line."""

    images: Sequence[Pixels]
    caption: str
    color: Color = INK


@dataclass(frozen=True)
class Heading:
    """A name and its explanation, which may have several lines."""

    name: str
    explanation: str


def draw(
    title: Heading, columns: Sequence[Heading], rows: Sequence[tuple[Heading, Sequence[Cell]]], lines: int = 2
) -> Image.Image:
    """Draw an RGB sheet with one cell per row and column; all have the same number of images, in `lines` lines."""
    from PIL import Image, ImageDraw

    blocks = [[_block(cell.images, lines) for cell in cells] for _, cells in rows]
    block_height, block_width, _ = blocks[0][0].shape
    captions = [_width(cell.caption, HEAD_SIZE) for _, cells in rows for cell in cells]
    inner_width = max(block_width, *captions, *(_heading_width(column, HEAD_SIZE) for column in columns))
    cell_width, cell_height = inner_width + 2 * PADDING, block_height + 2 * PADDING + CAPTION_HEIGHT
    label_width = max(_heading_width(heading, HEAD_SIZE) for heading, _ in rows)
    lefts = [MARGIN + label_width + number * (cell_width + GAP) for number in range(len(columns))]
    tops = [TITLE_HEIGHT + HEAD_HEIGHT + MARGIN + number * (cell_height + GAP) for number in range(len(rows))]
    width = max(lefts[-1] + cell_width, MARGIN + _heading_width(title, TITLE_SIZE)) + MARGIN
    sheet = Image.new("RGB", (width, tops[-1] + cell_height + MARGIN), PAGE)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN, MARGIN), title, TITLE_SIZE)
    for left, column in zip(lefts, columns, strict=True):
        _write(pen, (left, TITLE_HEIGHT + MARGIN), column, HEAD_SIZE)
    for top, (heading, cells), row_blocks in zip(tops, rows, blocks, strict=True):
        _write(pen, (MARGIN, top + PADDING), heading, HEAD_SIZE)
        for left, cell, block in zip(lefts, cells, row_blocks, strict=True):
            frame = (left, top, left + cell_width - 1, top + cell_height - 1)
            pen.rounded_rectangle(frame, PADDING, fill=WHITE, outline=FRAME, width=2)
            sheet.paste(Image.fromarray(block), (left + (cell_width - block_width) // 2, top + PADDING))
            middle = (left + cell_width // 2, top + cell_height - PADDING - CAPTION_HEIGHT // 2 + 4)
            pen.text(middle, cell.caption, cell.color, _font(HEAD_SIZE), anchor="mm")
    return sheet


def _block(images: Sequence[Pixels], lines: int) -> Pixels:
    """Lines of images, enlarged: uint8 [height, width, 3]."""
    in_line = -(-len(images) // lines)
    blanks = [np.full_like(images[0], 255)] * (lines * in_line - len(images))
    shown = [
        np.pad(picture, ((SPACE, SPACE), (SPACE, SPACE), (0, 0)), constant_values=255) for picture in (*images, *blanks)
    ]
    block: Pixels = np.concatenate(
        [np.concatenate(shown[start : start + in_line], 1) for start in range(0, len(shown), in_line)]
    )
    # Seven bits per color look the same and make the file an eighth smaller, since noise compresses badly.
    block = (block & np.uint8(0xFE)) | (block >> np.uint8(7))
    return block.repeat(ENLARGED, 0).repeat(ENLARGED, 1)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], heading: Heading, size: int) -> None:
    left, top = place
    pen.text((left, top), heading.name, INK, _font(size))
    pen.multiline_text((left, top + round(1.25 * size)), heading.explanation, FADED, _font(TEXT_SIZE), spacing=4)


def _heading_width(heading: Heading, size: int) -> int:
    """Width in pixels of a heading with its name in this size, and a gap; 0 if empty."""
    lines = heading.explanation.split("\n")
    widest = max(_width(heading.name, size), *(_width(line, TEXT_SIZE) for line in lines))
    return widest + GAP if widest else 0


def _width(text: str, size: int) -> int:
    """Width of a line in pixels."""
    return math.ceil(_font(size).getlength(text))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)
