"""The report as one HTML file that needs no network.

    head        the files and what was observed
    verdict     a headline, a bar of layers, the points, and how it was made: written here, works without scripts
    sizes       quality by size, if formats were tried
    charts      the riskiest layers first, before and after; drawn by the scripts in `assets/` from the document, which
                the file contains as JSON
    lists       layers in full precision and unchanged layers, with the reasons: written here
    table       all measurements: made by the scripts
    command     to apply the new scales

Style, scripts, Apache ECharts and the document are inside the file. A Content-Security-Policy allows exactly these
scripts and this style, by their hashes, and forbids every request, so that names from untrusted files can neither run
nor load anything. All texts are escaped as well (`html.escape` here, text nodes in the scripts).

Size. ECharts takes 1.1 MB and a layer about 0.9 kB per side: 1,000 layers on two sides make about 2.8 MB.

Limits. The charts need JavaScript, a canvas, and a browser of 2023 or later. Rows are drawn when they come into view; a
print has the first 400 in the charts and all of them in the table.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ..telling import plural
from .verdict import CAUSES

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("data.js", "plot.js", "mix.js", "picture.js", "levels.js", "table.js", "page.js")
"""Our scripts, in the order of their dependencies."""

ECHARTS_VERSION = "6.1.0"
ECHARTS_SHA256 = "b66b25aeb4df84e33199dc21694014d336d222cbd9deb0e5a7c14bd6aa0d0fd0"
"""Of `dist/echarts.min.js` in the npm package `echarts`, which is in `assets/` unchanged, with its licenses."""

LEVELS = {"good": "No risk found", "warning": "Needs attention", "bad": "At risk"}
"""The level of a verdict, beside its color."""

_STATES = {
    "risky": "at risk", "fine": "fine", "dynamic": "without input scale", "precise": "in full precision",
    "unknown": "not observed or not used",
}  # fmt: skip
"""The segments of a bar, in order."""

_LISTED = 12
"""Groups of more layers than this are collapsed."""

Document = Mapping[str, Any]
Layers = Sequence[tuple[str, Mapping[str, Any]]]
"""Names and measurements of the layers of a side."""


def render(document: Document) -> str:
    """Render the result of `Report.document()` as one HTML page. The same document always gives the same page."""
    scripts = {
        "early": _asset("early.js"),
        "echarts": _asset("echarts.min.js"),
        "script": "\n".join(['(() => {\n"use strict";', *map(_asset, SCRIPTS), "})();\n"]),
    }
    style, verdict, commands = _asset("page.css"), document["verdict"], _by_side(document, _apply)
    texts = {
        "version": document["version"],
        "title": document["title"],
        "kicker": "Report on a mix of formats"
        if any(side["mix"] for side in document["sides"])
        else "FP8 activation report",
        "about": _about(document),
        "level": verdict["level"],
        "mark": LEVELS[verdict["level"]],
        "headline": verdict["headline"],
    }
    return Template(_asset("page.html")).substitute(
        {name: escape(text) for name, text in texts.items()},
        **scripts,
        style=style,
        policy=f"default-src 'none'; script-src {' '.join(map(_hash, scripts.values()))}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        echarts_version=ECHARTS_VERSION,
        bars=_by_side(document, _bars),
        points=_list(verdict["points"]),
        made=_by_side(document, _made),
        options=_terms({"convert_to_quant": document["version"], "report": document["options"]}),
        kept=_by_side(document, _kept),
        apply=commands,
        unchanged="" if commands else " hidden",
        document=_embedded(document),
    )


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def palette() -> dict[str, list[str]]:
    """The light colors of the style sheet by name: one, or several for a ramp."""
    light = _asset("page.css").partition("}")[0]
    return {name: colors.split() for name, colors in re.findall(r"--([\w-]+): (#[^;]+);", light)}


@cache
def _hash(text: str) -> str:
    """A source expression of a Content-Security-Policy.

    >>> _hash("")
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(document: Document) -> str:
    r"""JSON without the characters that begin markup.

    >>> _embedded({"name": "</script>"})
    '{"name":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)  # ASCII
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _by_side(document: Document, body: Callable[[Mapping[str, Any], Layers], str]) -> str:
    """The output of `body` for each side and its layers, under the name of the side if there are two."""
    parts = []
    for number, (letter, side) in enumerate(zip("AB", document["sides"], strict=False)):
        layers = [(layer["name"], layer["sides"][number]) for layer in document["layers"]]
        made = body(side, [(name, figures) for name, figures in layers if figures is not None])
        title = f'<p class="side">{letter}: {escape(side["label"])}</p>' if len(document["sides"]) > 1 else ""
        parts += [title, made] if made else []
    return "".join(parts)


def _about(document: Document) -> str:
    """The files and what was observed, in one line."""
    parts = [plural(len(document["layers"]), "layer")]
    for side in document["sides"]:
        images = f"{plural(side['samples'], 'image')} observed" if side["samples"] else ""
        said = ", ".join(filter(None, (side["family"], images, side["conditioning"] and f"on {side['conditioning']}")))
        parts.append(f"{side['label']}: {said}" if said and len(document["sides"]) > 1 else said)
    return " · ".join(filter(None, parts))


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def _state(figures: Mapping[str, Any], when: str) -> str:
    """The segment of a bar that counts a layer."""
    state = figures[when]
    if state["full_precision"] or state["risk"]:
        return "precise" if state["full_precision"] else "risky"
    if figures["inputs"]:
        return "dynamic"
    return "unknown" if figures["unused"] or figures["source"] == "none" else "fine"


def _bars(side: Mapping[str, Any], layers: Layers) -> str:
    """The number of layers in each state, as one bar for now and one for after calibration."""
    if not layers or (side["mix"] and not side["statistics"]):
        return ""  # the scales of a mix were measured together with its formats
    bars = _bar("Current scales" if side["model"] else "Scale 1.0", Counter(_state(one, "before") for _, one in layers))
    if any(figures["changed"] for _, figures in layers):
        bars += _bar("After calibration", Counter(_state(one, "after") for _, one in layers))
    return f'<dl class="bars">{bars}</dl>'


def _bar(label: str, counts: Counter[str]) -> str:
    said, segments, start = [], "", 0
    for state, words in _STATES.items():
        if count := counts[state]:
            said.append(f"<b>{count:,}</b> {words}")
            segments += f'<rect class="seg {state}" x="{start}" width="{count}" height="1"/>'
            start += count
    return (
        f'<dt>{label}</dt><dd><svg viewBox="0 0 {start} 1" preserveAspectRatio="none" aria-hidden="true">{segments}'
        f'</svg><span class="said">{", ".join(said)}</span></dd>'
    )


def _made(side: Mapping[str, Any], _: Layers) -> str:
    """The origin of a side."""
    names = ("model", "family", "statistics", "samples", "provenance", "options", "notes")
    mix = {key: side["mix"].get(key) for key in ("gpu", "bits", "expected_db", "measured_db")}
    known = {name: side[name] for name in names} | {"samples": side["samples"] or None, "mix": mix}
    return f"<dl>{_terms(known)}</dl>"


def _terms(values: Mapping[str, Any]) -> str:
    """JSON values as a list of terms. Empty entries are left out, long ones are collapsed."""
    said = ""
    for name, value in values.items():
        if isinstance(value, Mapping):
            said += _terms({f"{name}: {key}": one for key, one in value.items()})
            continue
        texts = [_text(one) for one in (value if isinstance(value, list) else [value]) if one not in (None, "")]
        body = escape(texts[0]) if len(texts) == 1 else _list(texts)
        if len(texts) > _LISTED:
            body = f"<details><summary>{len(texts):,}</summary>{body}</details>"
        said += f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{body}</dd>" if texts else ""
    return said


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kept(_: Mapping[str, Any], layers: Layers) -> str:
    """Layers in full precision and unchanged layers, grouped by reason."""
    groups: dict[str, list[str]] = {}
    for name, figures in layers:
        for why in _whys(figures):
            groups.setdefault(why, []).append(name)
    said = ""
    for why, names in groups.items():
        opened = " open" if len(names) <= _LISTED else ""
        count, noun = plural(len(names), "layer").split()
        said += f"<details{opened}><summary><b>{count}</b> {noun} {escape(why)}</summary>{_list(names)}</details>"
    return said or "<p>None: all layers compute in FP8 with a measured scale.</p>"


def _apply(side: Mapping[str, Any], _: Layers) -> str:
    """The command that writes the new scales, to be copied."""
    button = '<button type="button" class="quiet copy" hidden>Copy</button>'
    return side["apply"] and f'<div class="command"><code>{escape(side["apply"])}</code>{button}</div>'


def _whys(figures: Mapping[str, Any]) -> Iterator[str]:
    """Why a layer is in full precision, or keeps its scale."""
    if figures["inputs"]:
        yield f"unchanged: {figures['stored']}, {figures['unused']}"
        return
    if figures["after"]["full_precision"]:
        yield CAUSES.get(figures["cause"], "in full precision already")
    if figures["unused"] or not figures["absmax"]:
        yield f"unchanged: {figures['unused'] or figures['reason']}"
