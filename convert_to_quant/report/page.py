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
from collections.abc import Iterator, Mapping, Sequence
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


def render(document: Document) -> str:
    """Render the result of `Report.document()` as one HTML page. The same document always gives the same page."""
    scripts = {
        "early": _asset("early.js"),
        "echarts": _asset("echarts.min.js"),
        "script": "\n".join(['(() => {\n"use strict";', *map(_asset, SCRIPTS), "})();\n"]),
    }
    style, verdict = _asset("page.css"), document["verdict"]
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
        bars=_bars(document),
        points=_list(verdict["points"]),
        made=_made(document),
        kept=_kept(document),
        apply=_apply(document),
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


def _sides(document: Document) -> Iterator[tuple[str, Mapping[str, Any], list[tuple[str, Mapping[str, Any]]]]]:
    """Each side: its letter if there are two, the side, and the names and measurements of its layers."""
    for number, side in enumerate(document["sides"]):
        figures = [(layer["name"], layer["sides"][number]) for layer in document["layers"]]
        letter = "AB"[number] if len(document["sides"]) > 1 else ""
        yield letter, side, [(name, one) for name, one in figures if one is not None]


def _about(document: Document) -> str:
    """The files and what was observed, in one line."""
    parts = [plural(len(document["layers"]), "layer")]
    for letter, side, _ in _sides(document):
        images = f"{plural(side['samples'], 'image')} observed" if side["samples"] else ""
        said = ", ".join(filter(None, (side["family"], images, side["conditioning"] and f"on {side['conditioning']}")))
        parts.append(f"{side['label']}: {said}" if said and letter else said)
    return " · ".join(filter(None, parts))


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def _state(figures: Mapping[str, Any], when: str) -> str:
    """The segment of a bar that counts a layer."""
    state = figures[when]
    if state["full_precision"]:
        return "precise"
    if state["risk"]:
        return "risky"
    if figures["inputs"]:
        return "dynamic"
    return "unknown" if figures["unused"] or figures["source"] == "none" else "fine"


def _bars(document: Document) -> str:
    """The number of layers in each state, as one bar for now and one for after calibration."""
    bars = []
    for letter, side, layers in _sides(document):
        if side["mix"] and not side["statistics"]:
            continue  # its scales were measured together with its formats
        moments = {"before": "current scales" if side["model"] else "scale 1.0"}
        if any(figures["changed"] for _, figures in layers):
            moments["after"] = "after calibration"
        for when, words in moments.items():
            label = f"{letter} {words}" if letter else words.capitalize()
            bars.append(_bar(label, Counter(_state(figures, when) for _, figures in layers)))
    return f'<dl class="bars">{"".join(bars)}</dl>' if document["layers"] and bars else ""


def _bar(label: str, counts: Counter[str]) -> str:
    said, segments, start = [], "", 0
    for state, words in _STATES.items():
        if count := counts[state]:
            said.append(f"<b>{count:,}</b> {words}")
            segments += f'<rect class="seg {state}" x="{start}" width="{count}" height="1"/>'
            start += count
    return (
        f'<dt>{escape(label)}</dt><dd><svg viewBox="0 0 {max(start, 1)} 1" preserveAspectRatio="none" '
        f'aria-hidden="true">{segments}</svg><span class="said">{", ".join(said) or "no layers"}</span></dd>'
    )


def _made(document: Document) -> str:
    """How it was made: files, run, options, notes; collapsed."""
    parts = []
    for letter, side, _ in _sides(document):
        if letter:
            parts.append(f"<h3>{letter}: {escape(side['label'])}</h3>")
        lines = {
            "checkpoint": side["model"],
            "family": side["family"],
            "statistics": side["statistics"],
            "images": f"{side['samples']:,}" if side["samples"] else None,
            **_prefixed("observed", side["provenance"]),
            **_prefixed("mix", {key: side["mix"].get(key) for key in ("gpu", "bits", "expected_db", "measured_db")}),
            **_prefixed("chosen by", side["options"]),
            "notes": side["notes"],
        }
        parts.append(_terms(lines))
    parts.append(_terms({"convert_to_quant": document["version"], **_prefixed("report", document["options"])}))
    return f'<details class="made"><summary>How this was made</summary>{"".join(parts)}</details>'


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}: {key.replace('_', ' ')}": value for key, value in values.items()}


def _text(value: Any) -> str:
    """A JSON value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _terms(lines: Mapping[str, Any]) -> str:
    """Names and texts. Empty entries are left out, long ones are collapsed."""
    said = []
    for name, value in lines.items():
        texts = [_text(one) for one in (value if isinstance(value, list) else [value]) if one not in (None, "")]
        body = escape(texts[0]) if len(texts) == 1 else _list(texts)
        if len(texts) > _LISTED // 2:
            body = f"<details><summary>{len(texts):,}</summary>{body}</details>"
        if texts:
            said.append(f"<dt>{escape(name)}</dt><dd>{body}</dd>")
    return f"<dl>{''.join(said)}</dl>"


def _kept(document: Document) -> str:
    """Layers in full precision and unchanged layers, grouped by reason."""
    parts = []
    for letter, side, layers in _sides(document):
        reasons = [(why, name) for name, figures in layers for why in _whys(figures)]
        groups: dict[str, list[str]] = {}
        for why, name in reasons:
            groups.setdefault(why, []).append(name)
        if letter:
            parts.append(f'<p class="side">{letter}: {escape(side["label"])}</p>')
        for why, names in groups.items():
            count = f"<b>{len(names):,}</b> {'layer' if len(names) == 1 else 'layers'}"
            opened = " open" if len(names) <= _LISTED else ""
            parts.append(f"<details{opened}><summary>{count} {escape(why)}</summary>{_list(names)}</details>")
        if not groups:
            parts.append("<p>None: all layers compute in FP8 with a measured scale.</p>")
    return f'<div class="kept">{"".join(parts)}</div>'


def _apply(document: Document) -> str:
    """The commands that write the new scales, to be copied."""
    commands = ""
    for letter, side, _ in _sides(document):
        if side["apply"]:
            commands += f'<p class="side">{letter}: {escape(side["label"])}</p>' if letter else ""
            commands += f'<div class="command"><code>{escape(side["apply"])}</code>'
            commands += '<button type="button" class="quiet copy" hidden>Copy</button></div>'
    said = "This command writes a new file with the new scales. To change the file itself, replace -o by --in-place."
    title = '<h2 id="apply-title">Apply</h2>'
    section = f'<section id="apply" aria-labelledby="apply-title">{title}<p class="how">{said}</p>{commands}</section>'
    return section if commands else ""


def _whys(figures: Mapping[str, Any]) -> Iterator[str]:
    """Why a layer is in full precision, or keeps its scale."""
    if figures["inputs"]:
        yield f"unchanged: {figures['stored']}, {figures['unused']}"
        return
    if figures["after"]["full_precision"]:
        yield CAUSES.get(figures["cause"], "in full precision already")
    if figures["unused"]:
        yield f"unchanged: {figures['unused']}"
    elif not figures["absmax"]:
        yield f"unchanged: {figures['reason']}"
