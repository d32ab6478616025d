"""The report as one HTML file that a person understands in a minute, and that contacts no one.

    head        what was looked at
    verdict     one sentence, a bar of layers, the points, and how it all was made: written here, needs no scripts
    charts    drawn by the scripts in `assets/` from the document, which the file carries as JSON
    lists       layers in full precision, and layers left alone, with the reasons: written here
    table       all figures: made by the scripts

One file. Style, scripts, Apache ECharts and the document are inside it. A Content-Security-Policy allows exactly these
scripts and this style, by their hashes, and forbids every request, so what a stranger's file is called can neither run
nor call out; and every text is escaped (`html.escape` here, text nodes in the scripts).

Size. 1.1 MB is ECharts; a layer takes about 0.9 kB a side, so 1,000 layers on two sides make about 2.8 MB.

Limits. The charts need JavaScript, a canvas, and a browser of 2023 or later. Rows are drawn as they come into view;
a print shows the first 400 of them in the charts, and all in the table.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from .verdict import CAUSES

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("data.js", "plot.js", "picture.js", "levels.js", "table.js", "page.js")
"""Ours, in the order in which they build upon each other."""

ECHARTS_VERSION = "6.1.0"
ECHARTS_SHA256 = "b66b25aeb4df84e33199dc21694014d336d222cbd9deb0e5a7c14bd6aa0d0fd0"
"""Of `dist/echarts.min.js` in the package `echarts` on npm, which lies in `assets/` as it is, with its licences."""

LEVELS = {"good": "Fine", "warning": "Worth knowing", "bad": "At risk"}
"""What the colour of a verdict says, in a word."""

_STATES = {"risky": "at risk", "fine": "fine", "precise": "in full precision", "unknown": "not seen or not used"}
"""What a bar counts, in its order."""

_LISTED = 12
"""Groups of more layers than this come folded."""

Document = Mapping[str, Any]


def render(document: Document) -> str:
    """Lay a report out as one HTML page.

    Args:
        document: what `Report.document()` gives.

    Returns:
        The page; the same document is the same page.
    """
    style, early, script, echarts = _style(), _asset("early.js"), _script(), _asset("echarts.min.js")
    verdict = document["verdict"]
    return Template(_asset("page.html")).substitute(
        policy=_policy([early, echarts, script], style),
        version=escape(document["version"]),
        echarts_version=ECHARTS_VERSION,
        title=escape(document["title"]),
        heading=escape(document["title"]),
        about=escape(_about(document)),
        level=escape(verdict["level"]),
        mark=escape(LEVELS[verdict["level"]]),
        headline=escape(verdict["headline"]),
        bars=_bars(document),
        points=_list(verdict["points"], "points"),
        made=_made(document),
        kept=_kept(document),
        document=_embedded(document),
        early=early,
        style=style,
        echarts=echarts,
        script=script,
    )


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    return _asset("page.css")


@cache
def _script() -> str:
    return "\n".join(['(() => {\n"use strict";', *map(_asset, SCRIPTS), "})();\n"])


def _policy(scripts: Iterable[str], style: str) -> str:
    """Nothing but these scripts and this style, and nothing from anywhere."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


@cache
def _hash(text: str) -> str:
    """A source expression of a Content-Security-Policy.

    >>> _hash("")
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(document: Document) -> str:
    r"""JSON that no HTML parser reads as anything else: it has none of the characters that begin markup.

    >>> _embedded({"name": "</script>"})
    '{"name":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)  # ASCII
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _about(document: Document) -> str:
    """What was looked at, in one line."""
    parts = [f"{len(document['layers']):,} layers"]
    for side in document["sides"]:
        known = [side["family"], f"{side['samples']:,} images observed" if side["samples"] else None]
        if side["conditioning"]:
            known.append(f"on {side['conditioning']}")
        said = ", ".join(text for text in known if text)
        parts.append(f"{side['label']}: {said}" if said and len(document["sides"]) > 1 else said)
    return " · ".join(text for text in parts if text)


def _list(texts: Sequence[str], style: str = "") -> str:
    if not texts:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="{style}">{items}</ul>' if style else f"<ul>{items}</ul>"


def _state(figures: Mapping[str, Any], when: str) -> str:
    """Which part of a bar a layer belongs to."""
    state = figures[when]
    if state["full_precision"]:
        return "precise"
    if state["risk"]:
        return "risky"
    return "unknown" if figures["unused"] or figures["source"] == "none" else "fine"


def _bars(document: Document) -> str:
    """How many layers are fine, now and calibrated, as one bar each."""
    sides = document["sides"]
    rows = []
    for number in range(len(sides)):
        seen = [figures for layer in document["layers"] if (figures := layer["sides"][number]) is not None]
        moments = {"before": "present scales" if sides[number]["model"] else "scale 1.0", "after": "calibrated"}
        if not any(figures["changed"] for figures in seen):
            del moments["after"]
        for when, words in moments.items():
            label = f"{'AB'[number]} {words}" if len(sides) > 1 else words.capitalize()
            rows.append(_bar(label, [_state(figures, when) for figures in seen]))
    return f'<dl class="bars">{"".join(rows)}</dl>' if document["layers"] else ""


def _bar(label: str, states: Sequence[str]) -> str:
    counts = {state: states.count(state) for state in _STATES}
    said = ", ".join(f"<b>{count:,}</b> {_STATES[state]}" for state, count in counts.items() if count)
    segments, start = [], 0
    for state, count in counts.items():
        if count:
            segments.append(f'<rect class="seg {state}" x="{start}" width="{count}" height="1"/>')
        start += count
    picture = (
        f'<svg viewBox="0 0 {max(len(states), 1)} 1" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(segments)}</svg>"
    )
    return f'<dt>{escape(label)}</dt><dd>{picture}<span class="said">{said or "no layers"}</span></dd>'


def _made(document: Document) -> str:
    """How it was made, folded: files, run, options, notes."""
    parts = []
    for number, side in enumerate(document["sides"]):
        if len(document["sides"]) > 1:
            parts.append(f"<h3>{'AB'[number]}: {escape(side['label'])}</h3>")
        lines = {
            "checkpoint": side["model"],
            "family": side["family"],
            "statistics": side["statistics"],
            "images": f"{side['samples']:,}" if side["samples"] else None,
            **{f"observed: {key.replace('_', ' ')}": texts for key, texts in side["provenance"].items()},
            **{f"chosen by: {key.replace('_', ' ')}": _plain(value) for key, value in side["options"].items()},
            "notes": side["notes"],
        }
        parts.append(_terms(lines))
    lines = {"convert_to_quant": document["version"]}
    lines |= {f"report: {key.replace('_', ' ')}": _plain(value) for key, value in document["options"].items()}
    parts.append(_terms(lines))
    return f'<details class="made"><summary>How this was made</summary>{"".join(parts)}</details>'


def _plain(value: Any) -> Any:
    """A JSON value as people write it; lists and texts as they are."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return [str(_plain(item)) for item in value]
    return f"{value:g}" if isinstance(value, (int, float)) else json.dumps(value)


def _terms(lines: Mapping[str, Any]) -> str:
    """Names and texts; what is empty is left out, what is long is folded."""
    said = []
    for name, value in lines.items():
        if value in (None, "", [], ()):
            continue
        texts = [value] if isinstance(value, str) else list(value)
        if len(texts) == 1:
            body = escape(texts[0])
        elif len(texts) <= _LISTED // 2:
            body = _list(texts)
        else:
            body = f"<details><summary>{len(texts):,}</summary>{_list(texts)}</details>"
        said.append(f"<dt>{escape(name)}</dt><dd>{body}</dd>")
    return f"<dl>{''.join(said)}</dl>"


def _kept(document: Document) -> str:
    """Layers in full precision and layers left alone, grouped by why."""
    sides = document["sides"]
    parts = []
    for number, side in enumerate(sides):
        groups: dict[str, list[str]] = {}
        for layer in document["layers"]:
            figures = layer["sides"][number]
            if figures is None:
                continue
            for why in _whys(figures):
                groups.setdefault(why, []).append(layer["name"])
        for left in document["left_alone"]:
            if left["side"] == number:
                groups.setdefault(f"left alone: {left['why']}", []).append(left["name"])
        if len(sides) > 1:
            parts.append(f'<p class="side">{"AB"[number]}: {escape(side["label"])}</p>')
        parts += [_group(why, names) for why, names in groups.items()]
        if not groups:
            parts.append("<p>None: every layer multiplies in FP8, with a scale that was measured.</p>")
    return f'<div class="kept">{"".join(parts)}</div>'


def _whys(figures: Mapping[str, Any]) -> Iterable[str]:
    """Why a layer is in full precision, or keeps the scale that it has."""
    if figures["after"]["full_precision"]:
        yield CAUSES.get(figures["cause"], "in full precision in the file already")
    if figures["unused"]:
        yield f"left alone: {figures['unused']}"
    elif not figures["absmax"]:
        yield f"left alone: {figures['reason']}"


def _group(why: str, names: Sequence[str]) -> str:
    count = f"<b>{len(names):,}</b> {'layer' if len(names) == 1 else 'layers'}"
    opened = " open" if len(names) <= _LISTED else ""
    return f"<details{opened}><summary>{count} {escape(why)}</summary>{_list(names)}</details>"
