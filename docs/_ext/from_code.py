"""Generates parts of pages from the code, where a page has the line `<!-- from code: NAME -->`.

Commands come from their parsers, tables from the package's own tables, so the site cannot contradict the program. Each
flag is a Sphinx `option`: pages link to it as {option}`convert_to_quant observe --samples`, and Sphinx reports links to
removed flags.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping

from docstrings import escaped
from sphinx.application import Sphinx

from convert_to_quant.cli import COMMANDS, DEFAULT_COMMAND, build_parser
from convert_to_quant.families import FAMILIES
from convert_to_quant.problems import KINDS, READINGS
from convert_to_quant.report.document import RISKS
from convert_to_quant.stats import COLUMNS, Statistics

MARK = re.compile(r"^<!-- from code: (\w+) -->$", re.MULTILINE)
OBEYED = re.compile(r"([\\*_<>\[\]|])")
FENCE = "`" * 4


COMMON = "common"
"""The group of options that every command has; documented once."""


def commands() -> Iterator[str]:
    """Every command: summary, usage, arguments and examples."""
    for command, summary in COMMANDS.items():
        yield f"({command}-command)="
        yield f"## {command}" + (" (the default command)" if command == DEFAULT_COMMAND else "")
        yield from parser_sections(build_parser(command), level=3, summary=f"{summary[0].upper()}{summary[1:]}.")
    yield "(common-options)="
    yield "## Options of every command"
    yield "```{program} convert_to_quant\n```"
    yield from (option(action) for action in actions_of(build_parser(DEFAULT_COMMAND), COMMON))


def actions_of(parser: argparse.ArgumentParser, title: str) -> list[argparse.Action]:
    """The visible actions of a group of a parser, without --help and --version."""
    return [
        action
        for group in parser._action_groups
        if group.title == title
        for action in group._group_actions
        if action.help is not argparse.SUPPRESS and action.dest not in ("help", "version")
    ]


def parser_sections(parser: argparse.ArgumentParser, level: int, summary: str) -> Iterator[str]:
    """A parser, followed by its subcommands."""
    paragraphs = [block for block in (parser.epilog or "").strip("\n").split("\n\n") if block]
    examples = [block for block in paragraphs if block.startswith("example")]
    yield markdown(" ".join((parser.description or summary).split()))
    yield fenced("text", parser.format_usage().removeprefix("usage: "))
    yield from (fenced("console", textwrap.dedent(block.partition("\n")[2])) for block in examples)
    yield f"```{{program}} {parser.prog}\n```"
    for title in dict.fromkeys(group.title or "" for group in parser._action_groups):
        actions = actions_of(parser, title)
        if title == COMMON and actions:
            names = ", ".join(f"`{action.option_strings[-1]}`" for action in actions)
            yield f"[Options of every command](#common-options): {names}"
            continue
        subcommands = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
        plain = [action for action in actions if action not in subcommands]
        if plain:
            yield f"**{title[:1].upper()}{title[1:]}**"
            yield from (option(action) for action in plain)
        for subparsers in subcommands:
            for name, subparser in subparsers.choices.items():
                yield f"{'#' * level} {parser.prog.removeprefix('convert_to_quant ')} {name}"
                yield from parser_sections(subparser, level + 1, name)
    yield from (note(block) for block in paragraphs if block not in examples)


def note(block: str) -> str:
    """A paragraph of the epilog: a list under a heading verbatim, or prose."""
    heading, _, rest = block.partition("\n")
    if rest and rest.startswith(" "):
        return f"{markdown(heading)}\n\n{fenced('text', textwrap.dedent(rest))}"
    return markdown(" ".join(block.split()))


def option(action: argparse.Action) -> str:
    """A flag or argument as a Sphinx `option`."""
    value = str(action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper())
    spelled = ", ".join(name if action.nargs == 0 else f"{name} {value}" for name in action.option_strings) or value
    text = markdown(action.help or "")
    if action.choices is not None and not all(str(choice) in f"{value} {text}" for choice in action.choices):
        text += f". One of {', '.join(f'`{choice}`' for choice in action.choices)}."
    return f"{FENCE}{{option}} {spelled}\n{text}\n{FENCE}"


def fenced(language: str, text: str) -> str:
    """A code block."""
    return f"{FENCE}{language}\n{text.rstrip()}\n{FENCE}"


def markdown(text: str) -> str:
    """Plain text with Markdown's markup escaped."""
    return escaped(text, OBEYED)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table of Markdown cells."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def families() -> Iterator[str]:
    """Model families, and whether the model engine runs them."""
    yield table(
        ("`--preset`", "models", "the model engine runs it"),
        ((f"`{name}`", markdown(family.title), "yes" if family.architecture else "no: each layer is simulated")
         for name, family in FAMILIES.items() if family.blocks),
    )  # fmt: skip


def readings() -> Iterator[str]:
    """What ComfyUI does with a layer, in the words of `inspect`."""
    rows = ((f"`{name}`", markdown(text)) for name, text in READINGS.items())
    yield table(("in `--layers`", "what ComfyUI does"), rows)


def problems() -> Iterator[str]:
    """Problems that `inspect` reports."""
    rows = ((f"`{name}`", markdown(kind.title), markdown(kind.remedy)) for name, kind in KINDS.items())
    yield table(("problem", "what is wrong", "what to do"), rows)


def risks() -> Iterator[str]:
    """Risks that a report shows."""
    yield table(("risk", "what happens"), ((f"*{name}*", markdown(text)) for name, text in RISKS.items()))


def statistics() -> Iterator[str]:
    """Columns of a statistics file."""
    meaning = attributes(Statistics)
    merged = {"maximum": "maximum", "add": "sum"}
    rows = []
    for name, column in COLUMNS.items():
        shape = ", ".join(["L", *map(str, column.shape)])
        how = merged[column.merge.__name__]
        rows.append((f"`{name}`", column.dtype.__name__, f"[{shape}]", how, markdown(meaning[name])))
    yield table(("column", "dtype", "shape", "merged by", "meaning"), rows)


def attributes(cls: type) -> Mapping[str, str]:
    """Descriptions of attributes in a class docstring, each on one line."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


PARTS: Mapping[str, Callable[[], Iterator[str]]] = {
    part.__name__: part for part in (commands, families, readings, problems, risks, statistics)
}


def insert(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Insert the generated parts of a page."""
    source[0] = MARK.sub(lambda mark: "\n\n".join(PARTS[mark[1]]()), source[0])


def setup(app: Sphinx) -> Mapping[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
