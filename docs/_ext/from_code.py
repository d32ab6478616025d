"""Parts of pages that are written from the code: a page asks for one with the line `<!-- from code: NAME -->`.

The commands come from their own parsers, tables from the tables that the package works with. So what the site says of a
flag, a family or a problem is what the program does, and a flag that is gone takes every link to it along: Sphinx then
says so. Each flag is an `option` of Sphinx that pages link to as {option}`convert_to_quant observe --samples`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping

from sphinx.application import Sphinx

from convert_to_quant import inspection
from convert_to_quant.cli import COMMANDS, DEFAULT_COMMAND, build_parser
from convert_to_quant.engines.architectures import ARCHITECTURES
from convert_to_quant.families import FAMILIES
from convert_to_quant.stats import COLUMNS, Statistics

MARK = re.compile(r"^<!-- from code: (\w+) -->$", re.MULTILINE)
FENCE = "`" * 4
USAGE_COLUMNS = 88


def commands() -> Iterator[str]:
    """Every command: what it does, how it is called, its arguments, its examples."""
    for command, summary in COMMANDS.items():
        yield f"({command}-command)="
        yield f"## {command}" + (" (the command that needs no name)" if command == DEFAULT_COMMAND else "")
        yield f"{summary[0].upper()}{summary[1:]}."
        yield from parser_sections(build_parser(command), level=3, said=summary)


def parser_sections(parser: argparse.ArgumentParser, level: int, said: str = "") -> Iterator[str]:
    """One parser, and below it those of its subcommands."""
    parser.formatter_class = wide_formatter
    description = (parser.description or "").strip()
    if description and description.rstrip(".").casefold() != said.casefold():
        yield " ".join(description.split())
    yield fenced("text", parser.format_usage().removeprefix("usage: "))
    yield f"```{{program}} {parser.prog}\n```"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        subcommands = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
        plain = [action for action in actions if action not in subcommands and action.dest not in ("help", "version")]
        if plain:
            title = {"positional arguments": "arguments"}.get(group.title or "", group.title or "")
            yield f"**{title[:1].upper()}{title[1:]}**"
            yield from (option(action, parser) for action in plain)
        for subparsers in subcommands:
            for name, subparser in subparsers.choices.items():
                yield f"{'#' * level} {parser.prog.removeprefix('convert_to_quant ')} {name}"
                yield from parser_sections(subparser, level + 1)
    if parser.epilog:
        yield fenced("text", textwrap.dedent(parser.epilog).strip("\n"))


def wide_formatter(prog: str) -> argparse.HelpFormatter:
    """The layout of argparse, with lines for a page and not for a terminal."""
    return argparse.RawDescriptionHelpFormatter(prog, width=USAGE_COLUMNS)


def option(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """One flag or argument, as an `option` of Sphinx."""
    formatter = parser._get_formatter()
    names = action.option_strings or [formatter._metavar_formatter(action, action.dest)(1)[0]]
    values = formatter._format_args(action, action.dest.upper()) if action.option_strings and action.nargs != 0 else ""
    spelled = ", ".join(f"{name} {values}".strip() for name in names)
    help_text = formatter._expand_help(action) if action.help else ""
    return f"{FENCE}{{option}} {spelled}\n{markdown(help_text)}\n{FENCE}"


def fenced(language: str, text: str) -> str:
    """A block of code."""
    return f"{FENCE}{language}\n{text.rstrip()}\n{FENCE}"


def markdown(text: str) -> str:
    """A plain text, with what Markdown would obey instead of show escaped."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; cells are Markdown."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def families() -> Iterator[str]:
    """The model families, and how each is calibrated."""
    yield table(
        ("`--preset`", "models", "the model engine runs it"),
        ((f"`{name}`", markdown(family.title), "yes" if name in ARCHITECTURES else "no: each layer is simulated")
         for name, family in FAMILIES.items()),
    )  # fmt: skip


def readings() -> Iterator[str]:
    """What ComfyUI does with a layer, in the words of `inspect`."""
    yield table(
        ("in `--layers`", "what ComfyUI does"),
        ((f"`{name}`", markdown(text)) for name, text in inspection.READINGS.items()),
    )


def problems() -> Iterator[str]:
    """What `inspect` may find."""
    yield table(
        ("problem", "what is wrong", "what to do"),
        ((f"`{name}`", markdown(kind.title), markdown(kind.remedy)) for name, kind in inspection.KINDS.items()),
    )


def statistics() -> Iterator[str]:
    """The columns of a statistics file."""
    meaning = attributes(Statistics)
    merged = {"maximum": "maximum", "add": "sum"}
    yield table(
        ("column", "dtype", "shape", "merged by", "meaning"),
        (
            (
                f"`{name}`",
                column.dtype.__name__,
                f"[{', '.join(['L', *map(str, column.shape)])}]",
                merged[column.merge.__name__],
                markdown(meaning[name]),
            )
            for name, column in COLUMNS.items()
        ),
    )


def attributes(cls: type) -> Mapping[str, str]:
    """What a class's docstring says of its attributes, each in one line."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


PARTS: Mapping[str, Callable[[], Iterator[str]]] = {
    part.__name__: part for part in (commands, families, readings, problems, statistics)
}


def insert(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Put the parts that a page asks for where it asks for them."""
    source[0] = MARK.sub(lambda mark: "\n\n".join(PARTS[mark[1]]()), source[0])


def setup(app: Sphinx) -> Mapping[str, bool]:
    """Connect it to Sphinx."""
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
