"""The page, without a browser and in one."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import replace
from html import unescape
from itertools import pairwise

import numpy as np
import pytest

from convert_to_quant.report import page
from convert_to_quant.report.document import CELLS, Figures, Layer, Report, Side, State, Verdict

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<!--<script>.\u2028🙂"


def figures(largest, *, full=False):
    """A layer whose inputs spread over six octaves below the largest one; its current scale is 1."""
    density = np.zeros(CELLS, np.uint8)
    top = int((np.log2(largest) + 32) * 4)
    density[top - 24 : top + 1] = np.linspace(80, 210, 25)
    clips = State(1.0, False, 6.9, 0.3, 0.001, 0.0, "clips")
    return Figures(
        before=clips if largest > 464 else State(1.0, False, 31.0, 0.0, 0.001, 0.0),
        after=State(largest / 448, full, 31.5, 0.0, 0.002, 0.0),
        source="model",
        reason="full precision: one token per image, which costs nothing" if full else "absmax",
        cause="one row" if full else "",
        rows=4096,
        multiply_adds=1000,
        zeros=0.01,
        **{name: largest / part for name, part in {"absmax": 1, "rms": 4, "median": 8, "p999": 1.5}.items()},
        density=density,
        sigma_absmax=tuple(largest / (1 + level) for level in range(8)),
        sigma_rms=(largest / 4,) * 8,
    )


def side(label):
    return Side(label, (label,), label, "Flux.1", 8, "diffusers", "noise", {"seed": ("42",)})


def report(layers, count=1, **changes):
    labels = ("plain.safetensors", "hot.safetensors")[:count]
    made = Report(
        title=" against ".join(labels),
        sides=tuple(map(side, labels)),
        layers=tuple(layers),
        verdict=Verdict("bad", "2 of 4 layers are at risk.", ("Two layers clip.",)),
    )  # fmt: skip
    return replace(made, **changes).document()


def layer(name, *sides, crossed=None):
    return Layer(name, (64, 32), sides, crossed)


def small(*more):
    """Two layers that clip, one that fits, one in full precision, and more."""
    largest = {"blocks.0.mlp.0": 100.0, "blocks.1.mlp.0": 9000.0, "blocks.2.attn.qkv": 2000.0}
    full = layer("blocks.10.mod", figures(4.0, full=True))
    return [*(layer(name, figures(size)) for name, size in largest.items()), full, *more]


SMALL = small()
UNSEEN = Figures(State(1.0, False), State(1.0, False), reason="never visited: keeps its scale")


def tokens(stored, **changes):
    """A layer whose inputs need no scale."""
    unscaled = State(None, False)
    made = replace(figures(10.0), before=unscaled, after=unscaled, unused="inputs scaled per token", stored=stored)
    return replace(made, **{"inputs": "scaled per token", "bits": 4.5, "more": "zz9", **changes})


MIX = {
    "gpu": "rtx40", "bits": 6.5, "expected_db": 32.0, "measured_db": [30.1, 33.2], "more": [7.0, 34.0],
    "weights": 10**6, "other_bytes": 10**5, "curve": [[5, 20.0], [6.5, 32.0], [8, 38.0]],
    "uniform": {"zz9": [8.0, 30.0], "yy4": [4.1, 2.0]},
}  # fmt: skip
"""Of formats that nobody knows: what a page shows comes from its document."""


def mixed(**changes):
    """A mix of two formats that need no input scale, and FP8."""
    tried = {"zz9": 50.0, "yy4": 30.0}
    layers = [replace(layer(f"blocks.{n}.a", tokens(name)), alone_db=tried) for n, name in enumerate(("zz9", "yy4"))]
    fp8 = layer("blocks.2.a", replace(figures(100.0), stored="fp8", bits=8.0, more="fp8"))
    return report([*layers, replace(fp8, alone_db={"fp8": 44.0})], sides=(replace(side("mix"), mix=MIX),), **changes)


HOSTILE_SIDE = Side(
    HOSTILE, (HOSTILE,), HOSTILE, HOSTILE, 8, "", "", {HOSTILE: (HOSTILE,)}, {HOSTILE: HOSTILE}, (HOSTILE,),
    mix={**MIX, "gpu": HOSTILE, "uniform": {HOSTILE: [4.0, 1.0]}},
)  # fmt: skip
HOSTILE_DOCUMENT = report(
    small(replace(layer(HOSTILE, tokens(HOSTILE, unused=HOSTILE, more=HOSTILE)), alone_db={HOSTILE: 1.0})),
    title=HOSTILE,
    verdict=Verdict("warning", HOSTILE, (HOSTILE,)),
    sides=(HOSTILE_SIDE,),
)
HOSTILE_PAIR = report([layer(HOSTILE, figures(10.0), None)], count=2, sides=(HOSTILE_SIDE, HOSTILE_SIDE))


def compared(largest=1280.0):
    cold, hot = figures(10.0), figures(largest)
    crossed = State(10 / 448, False, 2.0, 0.9, 0.0, 0.0, "clips")
    first = layer("blocks.0.a", cold, hot, crossed=crossed)
    second = layer("blocks.1.b", cold, cold, crossed=cold.after)
    return report([first, second, layer("blocks.2.only", cold, None)], count=2)


def thousand():
    """As large as it gets: every cell of every density is used."""
    random = np.random.default_rng(0)

    def full(number):
        density = random.integers(1, 255, CELLS).astype(np.uint8)
        made = figures(float(2.0 ** random.uniform(-4, 14)), full=number % 40 == 0)
        return replace(made, density=density, row_density=density)

    names = [f"transformer_blocks.{number}.attn.to_out.0" for number in range(1000)]
    return report([layer(name, full(number), full(number)) for number, name in enumerate(names)], count=2)


def markup(text):
    """A page without the contents of its scripts and its style."""
    return re.sub(r"(<(script|style)\b[^>]*>).*?(?=</\2>)", r"\1", text, flags=re.DOTALL)


# ---- without a browser


def test_echarts_is_the_official_file_with_its_licences():
    content = (page.ASSETS / "echarts.min.js").read_bytes()
    assert hashlib.sha256(content).hexdigest() == page.ECHARTS_SHA256
    assert f'version="{page.ECHARTS_VERSION}"'.encode() in content
    assert b"Apache License" in (page.ASSETS / "echarts.LICENSE").read_bytes()
    assert b"Apache Software Foundation" in (page.ASSETS / "echarts.NOTICE").read_bytes()
    assert b"Redistribution" in (page.ASSETS / "echarts.LICENSE-d3").read_bytes()


def part(pattern, text):
    """What the group of a pattern matches."""
    found = re.search(pattern, text, re.DOTALL)
    return found.group(1)


def test_the_policy_allows_these_scripts_and_this_style_and_nothing_else():
    text = page.render(report(SMALL))
    policy = part(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    blocks = re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL)
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for _, body in blocks}
    assert len(hashes) == 4
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert set(rules["script-src"].split()) | set(rules["style-src"].split()) == hashes
    assert rules["default-src"] == "'none'"
    assert not re.search("unsafe|http", policy)


@pytest.mark.parametrize("document", [HOSTILE_DOCUMENT, HOSTILE_PAIR])
def test_untrusted_names_are_text_that_fetches_and_runs_nothing(document):
    text = page.render(document)
    html = markup(text)
    assert (html.count("<script"), html.count("<img")) == (4, 0)
    assert unescape(html).count(HOSTILE) >= 8
    tags = " ".join(re.findall(r"<[a-z][^>]*>", html))
    assert not re.search(r"\s(on\w+|style)=", tags)
    assert all(link.startswith(("#", "data:image/svg+xml,")) for link in re.findall(r'\b(?:src|href)="(.*?)"', tags))
    embedded = part(r'<script id="document" type="application/json">(.*?)</script>', text)
    assert not set("<>&\u2028") & set(embedded)
    assert json.loads(embedded) == json.loads(json.dumps(document))


def test_it_begins_with_the_verdict_and_ends_with_the_command():
    html = markup(page.render(report(SMALL)))
    ids = re.findall(r'<section id="(\w+)"', html)
    assert ids == ["verdict", "mix", "alone", "picture", "levels", "kept", "figures", "apply"]
    headings = re.findall(r"<h\d", html)
    assert (headings[0], headings.count("<h1")) == ("<h1", 1)


def test_bars_count_layers_now_and_calibrated():
    text = page.render(report(SMALL))
    bars = part(r'<dl class="bars">(.*?)</dl>', text)
    said = [re.sub("<[^>]*>", "", one) for one in re.findall(r'class="said">(.*?)</span>', bars)]
    assert said == ["2 at risk, 2 fine", "3 fine, 1 in full precision"]


def test_layers_in_full_precision_and_left_alone_are_listed_with_the_reasons():
    zeros = replace(UNSEEN, source="model", absmax=0.0, reason="seen only as zeros: keeps its scale")
    text = page.render(report(small(layer("never", UNSEEN), layer("zeros", zeros), layer("other", tokens("nvfp4")))))
    groups = re.findall(r"<summary><b>(\d+)</b> layers? (.*?)</summary><ul><li>(.*?)</li></ul>", text)
    assert groups == [
        ("1", "with one token per image, where it costs no time", "blocks.10.mod"),
        ("1", "unchanged: never visited: keeps its scale", "never"),
        ("1", "unchanged: seen only as zeros: keeps its scale", "zeros"),
        ("1", "unchanged: nvfp4, inputs scaled per token", "other"),
    ]


def test_it_says_how_it_was_made():
    text = page.render(report(SMALL, options={"margin": 1.5, "one_row": False, "limit": 0.0, "against": None}))
    made = part(r'<details class="made">(.*?)</details>', text)
    assert {"plain.safetensors", "Flux.1", "42"} <= set(re.findall(r"<dd>(.*?)</dd>", made))
    assert re.findall(r"<dt>report: ([a-z ]+)</dt><dd>(.*?)</dd>", made) == [
        ("margin", "1.5"), ("one row", "no"), ("limit", "0")]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_a_report_without_layers_is_a_page_and_the_same_every_time(count):
    text = page.render(report([], count=count))
    assert "None: all layers" in text
    assert text == page.render(report([], count=count))


def test_a_thousand_layers_on_two_sides_stay_under_5_mb():
    assert len(page.render(thousand()).encode()) < 5e6


def luminance(color):
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_color_of_text_has_the_contrast_that_wcag_requires(theme):
    css = (page.ASSETS / "page.css").read_text()
    block = part(rf'data-theme="{theme}"\] {{(.*?)}}', css)
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    texts = [name for name in colors if re.fullmatch(".*-text|ink|soft|link|good|warning|bad", name)]
    assert len(texts) == 10
    for ground in ("paper", "raised", "sunken", "pick"):
        for text in texts:
            light, dark = sorted((luminance(colors[ground]), luminance(colors[text])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, text)


# ---- in a browser

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; CHROMIUM names one elsewhere")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a document's page; at the end, nothing may have been said on the console, and nothing fetched."""
    troubles = []
    contexts = []

    def opened(document, state="", width=1200, **options):
        path = tmp_path / f"report{len(contexts)}.html"
        path.write_text(page.render(document), encoding="utf-8")
        options.setdefault("reduced_motion", "reduce")
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(5000)

        def decide(route):
            if route.request.url.partition("#")[0] == path.as_uri():
                route.continue_()
            else:
                troubles.append(f"fetched {route.request.url}")
                route.abort()

        tab.route("**/*", decide)
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.goto(path.as_uri() + state)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


ROWS = """rows => rows.map(row => [parseFloat(row.style.top), row.querySelector(".name").textContent])
.sort((a, b) => a[0] - b[0]).map(row => row[1])"""


def orders(tab):
    """The layers in the order of the strips, the noise levels and the table."""
    return (
        tab.locator("#picture-plot .row").evaluate_all(ROWS),
        tab.locator("#levels-plot .row").evaluate_all(ROWS),
        tab.locator("#figures-table tbody th .name").all_text_contents(),
    )


def said(tab):
    return tab.evaluate("decodeURIComponent(location.hash)")


NAMES = [one.name for one in SMALL]
RISKIEST = ["blocks.1.mlp.0", "blocks.2.attn.qkv", "blocks.0.mlp.0", "blocks.10.mod"]
"""Clipped at the current scale, the worst first; fine; in full precision."""


def test_it_opens_on_the_riskiest_layers_before_and_after(show):
    tab = show(report(SMALL))
    assert orders(tab) == (RISKIEST,) * 3
    assert tab.locator("#views [aria-pressed=true]").inner_text() == "current and new"
    assert (tab.locator("#sort").input_value(), said(tab)) == ("risk", "")
    assert tab.locator("#mix").is_hidden(), "no formats were tried"
    assert tab.locator("#alone").is_hidden()
    assert "format" not in tab.locator("#figures-table thead th").all_inner_texts()


def test_it_ends_with_the_command_that_applies_it(show):
    command = "convert_to_quant apply fp8.safetensors stats.safetensors -o '<b>.safetensors'"
    tab = show(report(SMALL, sides=(Side("a", ("stats.safetensors",), "fp8.safetensors", apply=command),)))
    assert tab.locator("main > section").last.locator("code").inner_text() == command
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.locator("#apply button").click()
    tab.get_by_text("Copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == command


def test_a_mix_shows_quality_by_size_and_format_and_has_a_row_for_every_layer(show):
    tab = show(mixed())
    chart = tab.locator("#mix .mix").get_attribute("aria-label")
    assert "Best mix: 20.0 dB at 5 bits, 32.0 dB at 6.5 bits, 38.0 dB at 8 bits." in chart
    assert "zz9: 30.0 dB at 8.00 bits" in chart
    assert "this file: 32.0 dB at 6.50 bits" in chart
    assert "half a bit more per weight: 34.0 dB" in chart
    assert len(tab.locator("#mix .legend > span").all()) == 5
    picture, _, table = orders(tab)
    assert picture == ["blocks.2.a"], "the others need no input scale"
    assert tab.locator("#alone-plot .row").evaluate_all(ROWS) == table
    assert sorted(table) == ["blocks.0.a", "blocks.1.a", "blocks.2.a"]
    line = tab.locator("#figures-table tbody tr", has_text="blocks.1.a").locator("td").all_inner_texts()
    assert line[1:6] == ["yy4", "4.50", "zz9", "50.0", "30.0"]
    for name in ("yy4", "fp8"):
        tab.locator(f"#filters [data-key='is {name}']").click()
    assert sorted(orders(tab)[2]) == ["blocks.1.a", "blocks.2.a"]


def test_a_table_that_is_cut_off_says_how_much_it_hides(show):
    tab = show(report(SMALL))
    hint = tab.locator("#more")
    assert re.fullmatch(r"Scroll sideways for \d+ more columns →", hint.inner_text())
    tab.locator(".table").evaluate("box => box.scrollLeft = box.scrollWidth")
    hint.wait_for(state="hidden")


def test_it_opens_without_errors_or_requests_whatever_the_names(show):
    tab = show(HOSTILE_DOCUMENT, "#sort=order")
    assert orders(tab) == (NAMES, [*NAMES, HOSTILE], [*NAMES, HOSTILE])
    tab.mouse.wheel(0, 3000)
    tab.locator("#views button").last.click()
    tab.locator("#alone-plot .plot").focus()
    tab.keyboard.press("End")
    assert HOSTILE in tab.locator("#card").inner_text()
    assert tab.locator("img").count() == 0


def test_a_click_on_a_heading_sorts_charts_and_table(show):
    tab = show(report(SMALL))
    heading = tab.locator("th[data-key=absmax]")
    heading.locator("button").click()
    by_size = ["blocks.1.mlp.0", "blocks.2.attn.qkv", "blocks.0.mlp.0", "blocks.10.mod"]
    assert orders(tab) == (by_size,) * 3
    assert heading.get_attribute("aria-sort") == "descending"
    assert tab.locator("#sort").input_value() == "absmax"
    heading.locator("button").press("Enter")  # headings are reached by keyboard too
    assert orders(tab) == (by_size[::-1],) * 3
    assert tab.locator("[aria-sort]").count() == 1
    assert said(tab) == "#sort=absmax"
    tab.locator("#sort").select_option("name")
    assert orders(tab) == (NAMES,) * 3, "block 2 before block 10"
    tab.locator("#direction").click()
    assert orders(tab) == (NAMES[::-1],) * 3


@pytest.mark.parametrize("state", ["#sort=absmax", "#sort=-absmax"])
def test_layers_without_a_value_come_last_in_either_direction(show, state):
    layers = [layer("unseen", UNSEEN), *SMALL[:2], layer("unseen too", UNSEEN), *SMALL[2:]]
    assert orders(show(report(layers), state))[0][-2:] == ["unseen", "unseen too"]


def test_search_and_filters_apply_to_charts_and_table(show):
    tab = show(report(SMALL), "#sort=order")
    tab.locator("#search").fill("MLP")
    assert orders(tab) == (["blocks.0.mlp.0", "blocks.1.mlp.0"],) * 3
    assert tab.locator("#count").inner_text() == "2 of 4 layers"
    tab.locator("#filters [data-key=now]").click()
    assert orders(tab) == (["blocks.1.mlp.0"],) * 3
    assert said(tab) == "#q=MLP&only=now&sort=order"
    tab.locator("#reset").click()
    assert orders(tab) == (NAMES,) * 3
    assert tab.locator("#filters b").all_text_contents() == ["2", "0", "1", "4"]


def test_search_takes_regular_expressions_and_says_when_they_are_none(show):
    tab = show(report(SMALL), "#sort=order")
    tab.locator("#search").fill(r"\.(1|10)\.")
    assert orders(tab) == ([],) * 3
    assert "No layer matches" in tab.locator("#picture-plot").inner_text()
    tab.locator("#regex").click()
    assert orders(tab) == (["blocks.1.mlp.0", "blocks.10.mod"],) * 3
    tab.locator("#search").fill("(")
    assert tab.locator("#search-problem").inner_text() == "not a regular expression"
    assert orders(tab) == (NAMES,) * 3


def test_the_hash_brings_everything_back(show):
    tab = show(report(SMALL), "#view=real&heat=all&q=mlp&only=changed&sort=-sqnr_before&theme=dark")
    assert orders(tab) == (["blocks.0.mlp.0", "blocks.1.mlp.0"],) * 3
    pressed = [one.inner_text() for one in tab.locator(".segments [aria-pressed=true]:visible").all()]
    assert pressed == ["real values", "same scale for all layers"]
    assert tab.locator("#filters [data-key=changed]").get_attribute("aria-pressed") == "true"
    assert tab.locator("html").get_attribute("data-theme") == "dark"
    tab.evaluate("location.hash = '#q=attn'")  # as the Back button does
    tab.wait_for_function("document.querySelector('#search').value === 'attn'")
    assert orders(tab) == (["blocks.2.attn.qkv"],) * 3


@pytest.mark.parametrize(
    "state", ["#view=nonsense&sort=--&only=a,b&heat=&theme=red", "#%", "#__proto__=1&sort=constructor"]
)
def test_a_hash_that_says_nothing_does_no_harm(show, state):
    assert orders(show(report(SMALL), state)) == (RISKIEST,) * 3


PIXELS = """const { width, height } = canvas, copy = Object.assign(document.createElement('canvas'), { width, height });
const context = copy.getContext('2d');
context.drawImage(canvas, 0, 0);
"""
RED = f"""canvas => {{ {PIXELS}
context.globalCompositeOperation = 'destination-over';
context.fillStyle = 'white';
context.fillRect(0, 0, copy.width, copy.height);
const {{ data }} = context.getImageData(0, 0, copy.width, copy.height);
let red = 0;
for (let i = 0; i < data.length; i += 4) red += data[i] > 200 && data[i + 1] < 190 && data[i + 2] < 150;
return red; }}"""


def test_clipped_values_are_red_at_the_current_scale_and_not_at_the_new_one(show):
    tab = show(report(SMALL))
    canvas = tab.locator("#picture-plot canvas").first
    tab.wait_for_timeout(50)
    before = canvas.evaluate(RED)
    tab.locator("#views [data-key=after]").click()
    tab.wait_for_timeout(50)
    after = canvas.evaluate(RED)
    assert before > after + 500  # the line at 448 is red too
    assert tab.locator("#picture-plot .state").all_inner_texts() == ["fine", "fine", "fine", "full precision"]


STRONGEST = f"""(canvas, y) => {{ {PIXELS}
const {{ data }} = context.getImageData(0, y, copy.width, 1);
let best = -1, most = 0;
for (let x = 0; x < copy.width; x++) {{
  const [red, green, blue, opacity] = data.slice(4 * x, 4 * x + 4);
  if (blue > 100 && red < 120 && opacity > most) [best, most] = [x, opacity];
}}
return best; }}"""


def test_strips_lie_where_their_values_lie_on_the_axis(show):
    """Two layers of one shape, the second 2³ times as large, at the same scale, and each at its own."""
    tab = show(report([layer("a", figures(4.0)), layer("b", figures(32.0))]), "#view=before&sort=order")
    canvas = tab.locator("#picture-plot canvas").first
    middle = {
        text: tab.locator("#picture-plot .tick", has_text=re.compile(f"^{text}$")).bounding_box()
        for text in ("1", "16")
    }
    left = tab.locator("#picture-plot .plot").bounding_box()["x"]
    one, sixteen = (box["x"] + box["width"] / 2 - left for box in middle.values())
    octave = (sixteen - one) / 4

    def ends():
        """Where the strips are strongest, which is their upper end, in octaves of |x| / scale."""
        return [(canvas.evaluate(STRONGEST, y) - one) / octave for y in (10, 30)]

    assert ends() == pytest.approx([2, 5], abs=0.3)
    tab.locator("#views [data-key=after]").click()
    assert ends() == pytest.approx([np.log2(448)] * 2, abs=0.3)


def test_colors_follow_the_system_and_the_switch(show):
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    tab = show(report(SMALL), color_scheme="dark")
    assert tab.locator("html").get_attribute("data-theme") == "dark"
    dark = tab.evaluate(ground)
    tab.locator("#theme").click()
    assert tab.evaluate(ground) != dark
    assert said(tab) == "#theme=light"
    assert show(report(SMALL), color_scheme="light").evaluate(ground) == tab.evaluate(ground)


def test_pointer_touch_and_keyboard_show_a_layers_measurements(show):
    tab = show(report(SMALL), "#view=before&sort=order", has_touch=True)
    card = tab.locator("#card")
    box = tab.locator("#picture-plot .row").nth(1).bounding_box()
    tab.mouse.move(box["x"] + 500, box["y"] + 8)
    assert "blocks.1.mlp.0" in card.inner_text()
    assert "clipped\t30 %\t0 %" in card.inner_text()
    tab.mouse.move(box["x"] + 500, box["y"] - box["height"] - 10)  # the axis
    assert card.is_hidden()
    tab.touchscreen.tap(box["x"] + 500, box["y"] + 8)
    assert "blocks.1.mlp.0" in card.inner_text()
    card.get_by_label("Close").click()
    assert card.is_hidden()
    tab.locator("#picture-plot .plot").focus()
    tab.keyboard.press("ArrowUp")
    assert "blocks.10.mod" in card.inner_text()
    tab.keyboard.press("Escape")
    for _ in range(3):
        tab.keyboard.press("ArrowDown")
    assert "blocks.2.attn.qkv" in card.inner_text()
    assert "clips at the current scale 1" in tab.locator("#spoken").inner_text()
    tab.keyboard.press("Escape")
    assert card.is_hidden()


def test_words_are_explained_to_pointer_touch_and_keyboard(show):
    tab = show(report(SMALL), has_touch=True)
    word = tab.locator(".term", has_text="saturated")
    for reach, leave in (
        (word.hover, lambda: tab.mouse.move(0, 0)),
        (word.tap, lambda: tab.keyboard.press("Escape")),
    ):
        reach()
        assert "FP8 clips these values" in tab.locator("#card").inner_text()
        leave()
        assert tab.locator("#card").is_hidden()
    tab.locator("#picture-how .term").hover()
    assert "The factor from stored FP8 numbers" in tab.locator("#card").inner_text()
    tab.locator("th[data-key=sqnr_before] button").focus()
    tab.keyboard.press("Tab")
    assert "Signal-to-quantization-noise" in tab.locator("#card").inner_text()


def test_two_sides_stand_beside_or_over_each_other_with_the_difference(show):
    tab = show(compared())
    assert tab.locator("#picture-plot .head .side").all_inner_texts() == ["A: plain.safetensors", "B: hot.safetensors"]
    assert tab.locator("#picture-plot .state").all_inner_texts() == ["+7.00 octaves", "equal", "–"]
    height = tab.locator("#picture-plot .row").first.bounding_box()["height"]
    tab.locator("#layouts [data-key=over]").click()
    assert tab.locator("#picture-plot .row").first.bounding_box()["height"] > height
    assert said(tab) == "#layout=over"
    tab.locator("#views [data-key=crossed]").click()
    assert tab.locator("#picture-plot .state").all_inner_texts() == ["clips 90 %", "fine", "–"]
    tab.locator("#filters [data-key=crossed]").click()
    assert orders(tab) == (["blocks.0.a"],) * 3
    assert {"A: risk now", "B: risk now"} <= set(tab.locator("thead th").all_text_contents())


def test_files_without_statistics_are_compared_by_what_their_scales_hold(show):
    known = [replace(UNSEEN, before=State(scale, False), after=State(scale, False)) for scale in (1.0, 4.0)]
    tab = show(report([layer("blocks.0.a", *known), layer("txt_in", known[0], known[0])], count=2))
    assert tab.locator("#levels").is_hidden()
    assert tab.locator("#views button").all_inner_texts() == ["real values"]
    assert tab.locator("#picture-plot .state").all_inner_texts() == ["+2.00 octaves", "equal"]
    assert tab.locator("#picture-plot canvas").first.evaluate(RED) > 100


def test_a_thousand_layers_are_quick_to_scroll_and_sort(show):
    tab = show(thousand())
    assert tab.locator("#picture-plot .row").count() < 60
    assert tab.locator("#figures-table tbody tr").count() < 80
    tab.locator("#picture-plot .plot").focus()
    tab.keyboard.press("End")
    assert orders(tab)[0][-1] == "transformer_blocks.999.attn.to_out.0"
    tab.locator("#figures-table .table").evaluate("box => box.scrollTop = 1e9")
    tab.locator("#figures-table", has_text="transformer_blocks.999.").wait_for()
    tab.locator("#search").fill("blocks.77")
    assert orders(tab)[0] == orders(tab)[1] == orders(tab)[2]
    assert tab.locator("#count").inner_text() == "11 of 1,000 layers"


def test_long_names_of_sides_do_not_overlap(show):
    sides = side("long " * 30), side("name " * 30)
    tab = show(report([layer("a", figures(1.0), figures(1.0))], count=2, sides=sides))
    for plot in ("#picture-plot", "#levels-plot"):
        first, second = (one.bounding_box() for one in tab.locator(f"{plot} .head .side").all())
        assert first["x"] + first["width"] <= second["x"]


@pytest.mark.parametrize("width", [660, 768, 1280])
@pytest.mark.parametrize("largest", [1280.0, 4000.0])
def test_labels_over_a_narrow_chart_do_not_overlap(show, width, largest):
    tab = show(compared(largest), width=width)
    for line, gap in ((".label", -1), (".tick", 3)):
        boxes = [one.bounding_box() for one in tab.locator(f"#picture-plot .head {line}").all() if one.inner_text()]
        boxes.sort(key=lambda box: box["x"])
        for left, right in pairwise(boxes):
            assert left["x"] + left["width"] + gap <= right["x"], line


def test_a_name_without_room_keeps_its_number_and_its_end(show):
    name = "transformer_double_blocks.17.img_attn.proj"
    tab = show(report([layer(name, figures(1.0), figures(1.0))], count=2), width=700)
    front = tab.locator("#picture-plot .name .front")
    assert front.evaluate("node => node.scrollWidth > node.clientWidth")
    number = """node => { const text = node.querySelector("bdi").firstChild, range = document.createRange();
range.setStart(text, text.length - 3); range.setEnd(text, text.length);
const [inner, outer] = [range.getBoundingClientRect(), node.getBoundingClientRect()];
return inner.left >= outer.left && inner.right <= outer.right + 1 }"""
    assert front.evaluate(number)
    assert front.inner_text() == "transformer_double_blocks.17"


@pytest.mark.parametrize("document", [report(SMALL), compared(), mixed()])
def test_a_phone_needs_no_scrolling_sideways(show, document):
    tab = show(document, width=360, has_touch=True)
    for view in tab.locator("#views button").all():
        view.click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.locator(".made summary").click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert len(orders(tab)[2]) == len(document["layers"])


def saved(tab, folder):
    """What the button saves as CSV."""
    with tab.expect_download() as download:
        tab.locator("#save").click()
    download.value.save_as(folder / "figures.csv")
    return (folder / "figures.csv").read_text(encoding="utf-8-sig")


def test_the_layers_shown_are_saved_as_csv(show, tmp_path):
    tab = show(report(small(layer('=2+2,"x"', figures(1.0)))), "#sort=-absmax")
    lines = list(csv.DictReader(io.StringIO(saved(tab, tmp_path))))
    assert [line["layer"] for line in lines][::4] == ["blocks.1.mlp.0", '\'=2+2,"x"']
    assert [float(line["largest |x|"]) for line in lines] == [9000.0, 2000.0, 100.0, 4.0, 1.0]


def test_without_noise_levels_there_is_no_chart_of_them(show):
    unknown = replace(figures(100.0), sigma_absmax=(None,) * 8)
    assert not show(report([layer("a", unknown)])).locator("#levels").is_visible()
    assert show(report([layer("a", unknown), *SMALL])).locator("#levels").is_visible()


def test_what_a_side_does_not_have_is_a_dash_and_in_csv_nothing(show, tmp_path):
    tab = show(compared())
    line = tab.locator("#figures-table tbody tr", has_text="blocks.2.only").locator("td").all_inner_texts()
    assert "null" not in line
    assert line.count("–") > 10
    assert not {"null", "–"} & set(saved(tab, tmp_path).split(","))


def test_a_print_is_light_and_has_all_layers(show):
    tab = show(report([layer(f"blocks.{number}", figures(8.0)) for number in range(120)]), "#theme=dark")
    assert tab.locator("#figures-table tbody th").count() < 60
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("html").get_attribute("data-theme") == "light"
    assert tab.locator("#figures-table tbody th").count() == 120
    tab.emulate_media(media="print")
    assert tab.locator("#tools").is_hidden()
    tab.emulate_media(media="screen")
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator("html").get_attribute("data-theme") == "dark"
    assert tab.locator("#figures-table tbody th").count() < 60


def test_without_scripts_the_verdict_and_the_reasons_can_be_read(show):
    tab = show(report(SMALL), java_script_enabled=False)
    text = tab.locator("body").inner_text()
    assert "2 of 4 layers are at risk." in text
    assert "blocks.10.mod" in text
    assert "need JavaScript" in text
