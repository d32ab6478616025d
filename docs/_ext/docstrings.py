"""Converts our docstrings to reStructuredText.

Prose is plain text (|x| is a magnitude, not a substitution), and indented paragraphs in module docstrings are shown
verbatim. Sections are Google's: entries are `name: text` or `lower, upper: text`, and `Returns:` has text without a
type. Signatures have the types.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

NAMED: Mapping[str, str] = {"Args:": "param", "Attributes:": "ivar", "Raises:": "raises"}
"""Sections of entries, and the field for each entry."""

WHOLE: Mapping[str, str] = {"Returns:": "returns", "Yields:": "yields"}
"""Sections of text."""

ENTRY = re.compile(r"(?:\\\*){0,2}(\w+(?:, \w+)*): (.*)")
OBEYED = re.compile(r"([*|\\]|_(?!\w))")
"""Markup of reStructuredText."""


def converted(lines: Sequence[str], *, module: bool) -> Iterator[str]:
    """Convert a docstring.

    Args:
        lines: its lines, without indentation.
        module: whether it is a module's, where indented text is verbatim.
    """
    number = 0
    shown = doctest = False
    while number < len(lines):
        line = lines[number]
        number += 1
        if line in NAMED or line in WHOLE:
            end = number
            while end < len(lines) and (not lines[end] or lines[end].startswith("    ")):
                end += 1
            yield ""
            yield from fields(line, [text[4:] for text in lines[number:end]])
            yield ""
            number = end
        elif module and line.startswith("    "):
            if not shown:
                yield from ("::", "")
            shown = True
            yield line
        else:
            shown = shown and not line
            doctest = (doctest and bool(line)) or line.startswith(">>>")
            yield line if doctest else escaped(line)


def fields(section: str, lines: Sequence[str]) -> Iterator[str]:
    """Convert a section to a field list."""
    text = [escaped(line) for line in lines]
    if section in WHOLE:
        yield f":{WHOLE[section]}: {text[0]}"
        yield from ("    " + line for line in text[1:])
        return
    starts = [number for number, line in enumerate(text) if line and not line.startswith(" ")]
    for start, end in pairwise([*starts, len(text)]):
        found = ENTRY.fullmatch(text[start])
        if found is None:
            raise ValueError(f"{section} 'name: text' expected in a docstring, found {text[start]!r}")
        for name in found[1].split(", "):
            yield f":{NAMED[section]} {name}: {found[2]}"
            yield from ("    " + line for line in text[start + 1 : end])


def escaped(line: str, obeyed: re.Pattern[str] = OBEYED) -> str:
    """Escape markup in a line of prose, outside of backticks."""
    parts = line.split("`")
    return "`".join(part if number % 2 else obeyed.sub(r"\\\1", part) for number, part in enumerate(parts))


def convert(_app: Sphinx, what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Convert each docstring for autodoc."""
    lines[:] = converted(lines, module=what == "module")


def defaults(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, arguments: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Make signatures parseable: the default factory of a dataclass is not an expression."""
    return arguments and arguments.replace("<factory>", "..."), result


def dashes(_app: Sphinx, document: nodes.document) -> None:
    """Replace the two hyphens between a parameter and its text by a dash."""
    for text in list(document.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> Mapping[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", convert)
    app.connect("autodoc-process-signature", defaults)
    app.connect("doctree-read", dashes)
    return {"parallel_read_safe": True}
