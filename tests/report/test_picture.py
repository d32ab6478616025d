"""The picture: its size, its colours where figures say so, what it carries, and that nothing in a file breaks it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from observing import NORMAL, observed
from PIL import Image

from convert_to_quant import __version__
from convert_to_quant.options import SolveOptions
from convert_to_quant.report import figures, picture
from convert_to_quant.report.document import MIX_WORDS
from convert_to_quant.report.figures import Source, build

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.fixture
def hot():
    return build(Source(observed({"blocks.0.a": {1.0: 1000 * NORMAL, 0.4: 300 * NORMAL}, "blocks.0.b": NORMAL})))


def drawn(report):
    image = picture.draw(report)
    assert (image.mode, image.width) == ("RGB", 1600)
    return np.asarray(image).astype(int)


def strips(report, panel):
    """The colours of one panel's rows, [layers, points, 3], 0 to 255."""
    (image,) = picture.figure(report).axes[panel].images
    return np.asarray(image.get_array()).astype(float)


def reds(strips):
    """How many points of each row are cut off: the colour of that zone, and no amber."""
    red, green, blue = strips[..., 0], strips[..., 1], strips[..., 2]
    return ((red - green > 40) & (red - green > green - blue)).sum(-1)


def test_only_the_strip_that_is_clipped_is_red_and_only_before_calibration(hot):
    first, second = reds(strips(hot, 0))
    assert first > 20, "the loud layer reaches into the red zone"
    assert second == 0
    assert reds(strips(hot, 1)).sum() == 0, "calibrated, nothing is cut off"
    colors = {text.get_text(): text.get_color() for text in picture.figure(hot).texts}
    bad = picture.LEVEL_COLORS["bad"]
    assert (colors["blocks.0.a"], colors["blocks.0.b"]) == (bad, picture.INK)
    outcomes = {text: color for text, color in colors.items() if text.endswith(" dB")}
    assert [color for text, color in outcomes.items() if text.startswith("clips ")] == [bad]
    assert list(outcomes.values()) == [bad, picture.FADED]


def test_what_a_picture_draws_is_what_it_shows(hot):
    pixels = drawn(hot)
    red = (pixels[..., 0] - pixels[..., 1] > 60) & (pixels[..., 0] + pixels[..., 2] > 2 * pixels[..., 1])
    assert red[:, 300:760].sum() > 20 * 10, "the strip that is cut off"


def test_a_layer_in_full_precision_is_gray():
    report = build(Source(observed({"one_row": 1000 * NORMAL[:1], "rows": 1000 * NORMAL})))
    after = strips(report, 1)
    colorful = (after.max(-1) - after.min(-1)).max(-1)
    assert colorful[1] < 60 < colorful[0]
    assert reds(strips(report, 0))[1] > 0, "before, it is in FP8"


def test_a_mix_has_its_chart_and_a_mark_for_every_format_that_was_tried(hot):
    mix = {
        "bits": 6.5, "expected_db": 32.0, "measured_db": [30.1, 33.2], "more": [7.0, 34.0], "weights": 10**6,
        "curve": [[5, 20.0], [8, 38.0]], "uniform": {"int8": [8.0, 30.0], "$x_{\x1b模": [4.1, -2.0]},
    }  # fmt: skip
    layers = tuple(
        replace(
            one, alone_db={"int8": 40.0, "w4a8": 30.0}, sides=tuple(replace(side, stored="int8") for side in one.sides)
        )
        for one in hot.layers
    )
    made = replace(hot, layers=layers, sides=(replace(hot.sides[0], mix=mix),))
    page = picture.figure(made)
    chart, alone, *_ = page.axes
    texts = [text.get_text() for text in (*page.texts, *chart.texts)]
    assert {"What each size keeps", "Each layer alone", "int8", *MIX_WORDS.values()} <= set(texts)
    assert [len(line.get_xdata()) for line in chart.lines] == [2, 2, 1, 2, 1]
    assert sum(len(marks.get_offsets()) for marks in alone.collections) == 4
    assert [text for text in texts if text.startswith("int8: ")], "outcomes name the format"
    assert drawn(made).shape[0] > drawn(hot).shape[0] + 400

    bare = tuple(replace(one, sides=(None,) * len(one.sides)) for one in layers)
    alone_only = picture.figure(replace(made, layers=bare))
    assert {text.get_text() for text in alone_only.texts}.isdisjoint({"As it is", "Noise levels", "not recorded"})
    assert alone_only.axes[1].get_position().width > 2 * alone.get_position().width


@pytest.mark.parametrize("count", [0, 1, 57, 300, 1000])
def test_any_number_of_layers_fits(count):
    one = build(Source(observed({"a": NORMAL})))
    layers = tuple(replace(one.layers[0], name=f"blocks.{number}.attn.to_q") for number in range(count))
    height = drawn(replace(one, layers=layers)).shape[0]
    assert count < height < 3200


def test_two_sides_and_layers_of_one_of_them():
    first = observed({"a": NORMAL, "b": NORMAL, "unseen": None})
    report = build(Source(first), Source(observed({"a": 8 * NORMAL, "c": NORMAL, "unseen": None})))
    drawn(report)
    assert reds(strips(report, 0)).sum() == 0, "its own inputs fit"
    assert reds(strips(report, 1)).sum() > 20, "the others do not"


def test_two_ways_to_solve():
    statistics = observed({"a": NORMAL})
    report = build(Source(statistics), Source(statistics, options=SolveOptions(margin=16)))
    both = [strips(report, panel)[0] for panel in (0, 1)]
    edges = [np.flatnonzero((strip[:, 0] < 90) & (strip[:, 2] > strip[:, 0]))[-1] for strip in both]
    assert edges[1] < edges[0], "a margin leaves room under 448"


def test_scales_without_statistics_and_scales_of_0(save, build):
    paths = [
        save(f"{scale}.safetensors", *build.quantized(["a", "b"], "tensor", input_scale=scale)) for scale in (64.0, 0.0)
    ]
    drawn(figures.build(*(figures.Source(model=path) for path in paths)))
    drawn(figures.build(*(figures.Source(model=paths[1]),) * 2))
    drawn(figures.build(figures.Source(observed({"a": NORMAL, "b": NORMAL}), paths[1])))


def test_the_file_says_what_made_it(hot):
    texts = Image.open(io.BytesIO(picture.png(hot))).text
    assert texts["Software"] == f"convert_to_quant {__version__}"
    said = json.loads(texts["convert_to_quant"])
    assert said["version"] == __version__
    assert said["sides"][0]["options"]["method"] == "absmax"
    assert said["verdict"][0] == hot.verdict.headline


@pytest.mark.parametrize("name", ["$\\frac{1}{2$", "模型.层", "a\x1b[2Jb", "x" * 500, "", " ", "🎨"])
def test_any_name_is_drawn_without_a_warning(hot, name):
    layers = (replace(hot.layers[0], name=name), hot.layers[1])
    drawn(replace(hot, layers=layers, title=name))


@pytest.mark.parametrize("name", ["W" * 200, "i" * 200, "a"])
def test_names_and_outcomes_stay_on_the_page(hot, name):
    pixels = drawn(replace(hot, layers=tuple(replace(layer, name=name) for layer in hot.layers)))
    assert (pixels[:, [0, 1, 2, -3, -2, -1]] == 255).all()


@given(TEXTS, st.floats(0.5, 4))
def test_a_shortened_name_keeps_its_end_and_only_letters_of_the_font(text, inches):
    shown = picture.drawable(text)
    assert len(shown) == len(text)
    assert shown == picture.drawable(shown)
    short = picture._end(shown, inches)
    assert picture._inches(short) <= inches
    assert short == shown or shown.endswith(short[1:])


def test_long_labels_of_sides_do_not_run_into_each_other():
    first, second = observed({"a": NORMAL}), observed({"a": 8 * NORMAL})
    page = picture.figure(build(Source(first, label="W" * 60), Source(second, label="V" * 60)))
    FigureCanvasAgg(page)
    (height,) = [text.get_position()[1] for text in page.texts if text.get_text() == "Outcome"]
    boxes = [text.get_window_extent() for text in page.texts if text.get_position()[1] == height]
    assert len(boxes) == 6
    for left, right in pairwise(sorted(boxes, key=lambda box: box.x0)):
        assert left.x1 < right.x0


def test_the_same_report_is_the_same_file_whatever_the_user_s_styles_which_stay(hot):
    import matplotlib as mpl

    wanted = picture.png(hot)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "text.color": "red", "figure.dpi": 20}):
        before = dict(mpl.rcParams)
        assert picture.png(hot) == wanted
        assert dict(mpl.rcParams) == before


def test_nothing_of_pyplot_is_touched():
    code = (
        "import sys\nimport convert_to_quant.report.picture\n"
        "print([name in sys.modules for name in ('matplotlib.pyplot', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[False, False]\n"
