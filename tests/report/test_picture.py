"""The PNG: colors that show the measurements, texts that stay on it, and names that break nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from observing import NORMAL, observed
from PIL import Image

from convert_to_quant import __version__
from convert_to_quant.options import SolveOptions
from convert_to_quant.report import picture
from convert_to_quant.report.document import MIX_WORDS
from convert_to_quant.report.figures import Source, build


@pytest.fixture
def hot():
    return build(Source(observed({"blocks.0.a": {1.0: 1000 * NORMAL, 0.4: 300 * NORMAL}, "blocks.0.b": NORMAL})))


def drawn(report):
    image = picture.draw(report)
    assert (image.mode, image.width) == ("RGB", 1600)
    return np.asarray(image).astype(int)


def texts(report):
    """Every text with its color."""
    page = picture.figure(report)
    FigureCanvasAgg(page).draw()
    return {text.get_text(): text.get_color() for text in page.findobj(Text) if text.get_visible()}


def strips(report, panel):
    """The colors of one panel's rows, [layers, points, 3], 0 to 255."""
    (image,) = picture.figure(report).axes[panel].images
    return np.asarray(image.get_array()).astype(float)


def reds(strips):
    """How many points of each row are clipped: the color of that zone, and no amber."""
    red, green, blue = strips[..., 0], strips[..., 1], strips[..., 2]
    return ((red - green > 40) & (red - green > green - blue)).sum(-1)


def test_only_the_strip_that_is_clipped_is_red_and_only_before_calibration(hot):
    first, second = reds(strips(hot, 0))
    assert first > 20, "the large inputs reach into the red zone"
    assert second == reds(strips(hot, 1)).sum() == 0
    colors = texts(hot)
    assert (colors["blocks.0.a"], colors["blocks.0.b"]) == (picture.BAD, picture.INK)
    outcomes = {text[:6]: color for text, color in colors.items() if text.endswith(" dB")}
    assert (outcomes.pop("clips "), *outcomes.values()) == (picture.BAD, picture.FADED)
    pixels = drawn(hot)
    red = (pixels[..., 0] - pixels[..., 1] > 60) & (pixels[..., 0] + pixels[..., 2] > 2 * pixels[..., 1])
    assert red[:, 300:760].sum() > 20 * 10, "what is computed is also what is drawn"


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
        replace(one, alone_db={"int8": 40.0, "w4a8": 30.0}, sides=(replace(one.sides[0], stored="int8"),))
        for one in hot.layers
    )
    made = replace(hot, layers=layers, sides=(replace(hot.sides[0], mix=mix),))
    chart, alone, *_ = picture.figure(made).axes
    found = texts(made)
    assert {"Quality by size", "Each layer alone", "int8", *MIX_WORDS.values()} <= found.keys()
    assert [len(line.get_xdata()) for line in chart.lines] == [2, 2, 1, 2, 1]
    assert sum(len(marks.get_offsets()) for marks in alone.collections) == 4
    assert [text for text in found if text.startswith("int8: ")], "outcomes name the format"
    assert drawn(made).shape[0] > drawn(hot).shape[0] + 300
    bare = replace(made, layers=tuple(replace(one, sides=(None,)) for one in layers))
    assert texts(bare).keys().isdisjoint({"As it is", "Noise levels", "not recorded"})


@pytest.mark.parametrize("count", [0, 1, 57, 300, 1000])
def test_any_number_of_layers_fits(count):
    one = build(Source(observed({"a": NORMAL})))
    layers = tuple(replace(one.layers[0], name=f"blocks.{number}.attn.to_q") for number in range(count))
    height = drawn(replace(one, layers=layers)).shape[0]
    assert count < height < 3200


def test_two_sides_and_layers_of_one_of_them():
    first = observed({"a": NORMAL, "b": NORMAL, "unseen": None})
    report = build(Source(first), Source(observed({"a": 8 * NORMAL, "c": NORMAL, "unseen": None})))
    assert "only on one side" in texts(report)
    assert reds(strips(report, 0)).sum() == 0, "its own inputs fit"
    assert reds(strips(report, 1)).sum() > 20, "the others do not"


def test_two_ways_to_solve():
    statistics = observed({"a": NORMAL})
    report = build(Source(statistics), Source(statistics, options=SolveOptions(margin=16)))
    both = [strips(report, panel)[0] for panel in (0, 1)]
    edges = [np.flatnonzero((strip[:, 0] < 90) & (strip[:, 2] > strip[:, 0]))[-1] for strip in both]
    assert edges[1] < edges[0], "a margin leaves room under 448"


def test_scales_without_statistics_are_ranges(save, build):
    paths = [
        save(f"{scale}.safetensors", *build.quantized(["a", "b"], "tensor", input_scale=scale)) for scale in (64.0, 0.0)
    ]
    report = made_of(*(Source(model=path) for path in paths))
    assert [bar.get_x() for bar in picture.figure(report).axes[0].patches[:2]] == [6 + picture.VANISHING, 0]
    made_of(*(Source(model=paths[1]),) * 2)
    made_of(Source(observed({"a": NORMAL, "b": NORMAL}), paths[1]))


def made_of(*sources):
    report = build(*sources)
    drawn(report)
    return report


def test_the_file_says_what_made_it(hot):
    chunks = Image.open(io.BytesIO(picture.png(hot))).text
    assert chunks["Software"] == f"convert_to_quant {__version__}"
    said = json.loads(chunks["convert_to_quant"])
    assert said["version"] == __version__
    assert said["sides"][0]["options"]["method"] == "absmax"
    assert said["verdict"][0] == hot.verdict.headline


@pytest.mark.parametrize("name", ["$\\frac{1}{2$", "模型.层", "a\x1b[2Jb", "W" * 200, "i" * 200, "", " ", "🎨"])
def test_any_name_is_drawn_without_a_warning_and_stays_on_the_page(hot, name):
    layers = tuple(replace(layer, name=name) for layer in hot.layers)
    pixels = drawn(replace(hot, layers=layers, title=name[:20]))
    assert (pixels[:, [0, 1, 2, -3, -2, -1]] == 255).all()


def test_a_long_name_keeps_its_end(hot):
    layers = (replace(hot.layers[0], name="x" * 100 + ".attn.proj"), hot.layers[1])
    assert any(text.startswith("…x") and text.endswith(".attn.proj") for text in texts(replace(hot, layers=layers)))


def test_long_labels_of_sides_do_not_overlap():
    first, second = observed({"a": NORMAL}), observed({"a": 8 * NORMAL})
    page = picture.figure(build(Source(first, label="n" * 60), Source(second, label="w" * 60)))
    FigureCanvasAgg(page).draw()
    found = [text for text in page.findobj(Text) if text.get_size() == picture.HEADING and text.get_text()]
    assert len(found) == 4
    boxes = sorted((text.get_window_extent() for text in found), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


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
