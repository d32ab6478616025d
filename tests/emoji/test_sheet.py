from __future__ import annotations

import numpy as np

from convert_to_quant.emoji.sheet import ENLARGED, Cell, Heading, draw

RED, BLUE = (251, 10, 20), (10, 20, 250)


def picture(color, side=32):
    return np.full((side, side, 3), color, np.uint8)


def pixels(image, color):
    """Rows and columns of the pixels that have a color, [2, pixels]."""
    return np.array(np.nonzero((np.asarray(image) == color).all(-1)))


def test_pictures_are_enlarged_pixel_by_pixel_and_captions_have_their_color():
    rows = [
        (Heading("one", "first"), [Cell([picture(RED)] * 3, "1.0 dB", BLUE), Cell([picture(RED)] * 3, "2.0 dB")]),
        (Heading("two", "second"), [Cell([picture(RED)] * 3, "3.0 dB"), Cell([picture(RED)] * 3, "4.0 dB")]),
    ]
    image = draw(Heading("title", "what it shows"), [Heading("left", ""), Heading("right", "")], rows)
    assert pixels(image, RED).shape[1] == 4 * 3 * (32 * ENLARGED) ** 2
    caption_rows, caption_columns = pixels(image, BLUE)
    red_rows, red_columns = pixels(image, RED)
    assert caption_rows.size
    assert caption_rows.min() > red_rows.min() + 2 * 32 * ENLARGED  # under the two lines of its own cell
    first_cell = red_columns.min() + 2 * 32 * ENLARGED
    assert red_columns.min() < caption_columns.min() < caption_columns.max() < first_cell


def test_a_long_caption_or_title_stays_inside():
    long = "PSNR 32.3 dB, SSIM 0.975"
    cells = [Cell([picture((9, 9, 9))], long, color) for color in (RED, BLUE)]
    image = draw(Heading("title", 6 * long), [Heading("left", ""), Heading("right", long)], [(Heading("", ""), cells)])
    (_, left), (_, right) = pixels(image, RED), pixels(image, BLUE)
    assert 0 < left.min() < left.max() < right.min() < right.max() < image.width
    assert (np.asarray(image)[:, -1] == np.asarray(image)[0, 0]).all()
