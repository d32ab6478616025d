"""`--config FILE.toml`: options from a file, so that a conversion or calibration can be repeated.

One table per command. Keys are the long flags without leading dashes, or the names of arguments in the help:

    [convert]
    input = "flux_bf16.safetensors"
    output = "flux_fp8.safetensors"
    actcal = true
    actcal-lora = ["style.safetensors:0.8"]

    [comfyui.observe]
    server = "http://127.0.0.1:8188"

A table becomes words of the command line, before those that the user typed. An option that the user typed replaces the
file's: lists are not joined, and `--no-legacy` cancels `legacy = true`. Relative paths are relative to the
configuration file, so a folder with a model and its recipe can be moved.

`--save-config FILE.toml` writes such a table with every option that differs from its default.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import OptionError
from .parsing import Parser, did_you_mean, flag_spelling, follow
from .shared import NO_KEYS, NO_PATHS, kind_of, read_text
from .terminal import value_of

Table = dict[str, Any]

MOST_BYTES = 1 << 16
MOST_DOTS = 500
"""Limits of a file, and of a line: a key of a thousand parts takes seconds to parse, one of a million takes hours."""


def read(path: str, known: Sequence[str]) -> Table:
    """Read a configuration file; refuse anything but tables of commands."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    text = read_text(Path(path), lambda problem: OptionError(f"the configuration {problem}", path=path), MOST_BYTES)
    if any(part.count(".") > MOST_DOTS for line in text.splitlines() for part in line.split("=")):
        raise OptionError(f"invalid TOML: more than {MOST_DOTS} dots in a line", path=path)
    try:
        content: Table = tomllib.loads(text)
    except ValueError as error:  # also of a number with thousands of digits
        raise OptionError(f"invalid TOML: {error}", path=path) from None
    except RecursionError:
        raise OptionError("invalid TOML: nested too deeply", path=path) from None
    for name, table in content.items():
        if not isinstance(table, dict):
            raise OptionError(f"{name!r} is not in a table", path=path, hint="add a line [convert] above it")
        if name not in known:
            hint = did_you_mean(name, known) or f"commands: {', '.join(known)}"
            raise OptionError(f"[{name}] is not a command", path=path, hint=hint)
    return content


def only_command(path: str, known: Sequence[str]) -> list[str]:
    """The command, and its action if any, of a file with a single table; refuse any other file."""
    content = read(path, known)
    if len(content) != 1:
        problem = f"the file has {len(content)} tables, so the command is ambiguous"
        raise OptionError(problem, path=path, hint="name it: convert_to_quant COMMAND --config FILE")
    ((name, table),) = content.items()
    return [name, *(key for key, value in table.items() if isinstance(value, dict))]


def keys(parser: Parser) -> dict[str, argparse.Action]:
    """The keys that a command's table may have."""
    return {
        (
            action.option_strings[-1].lstrip("-")
            if action.option_strings
            else str(action.metavar or action.dest).lower()
        ): action
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        and action.dest not in NO_KEYS
        and not isinstance(action, argparse._SubParsersAction)
    }


def parse(
    parser: Parser, words: Sequence[str], command: str, known: Sequence[str]
) -> tuple[argparse.Namespace, Parser, list[str]]:
    """Parse a command line together with its configuration file.

    Args:
        parser: of the command.
        words: the command line after the command.
        command: the command's name.
        known: allowed names of tables.

    Returns:
        The options, the parser of the command or of its action, and the names of both.
    """
    path = value_of("--config", words)
    leaf, actions = follow(parser, words)
    names = [command, *actions]
    if path is None:
        return parser.parse_args(words), leaf, names
    table: Any = read(path, known)
    typed = words[len(actions) :]
    if (inner := leaf.subcommands()) is not None:  # no action was typed: use the file's only one
        leaf, actions = follow(parser, [name for name in table.get(command, ()) if name in inner.choices])
        names = [command, *actions]
    for name in names:
        if not isinstance(table, dict) or name not in table:
            raise OptionError(f"the file has no table [{'.'.join(names)}]", path=path)
        table = table[name]
    try:
        words = [*actions, *_with_table(table, path, names, leaf, typed)]
    except ValueError as error:  # a hexadecimal number with thousands of digits
        raise OptionError(f"invalid TOML: {error}", path=path) from None
    return parser.parse_args(words), leaf, names


def _with_table(table: Table, path: str, names: Sequence[str], parser: Parser, typed: Sequence[str]) -> list[str]:
    """The typed words, and as words a table's values for what the user did not type."""
    replaced = {parser._option_string_actions.get(word.partition("=")[0]) for word in typed}
    for group in parser._mutually_exclusive_groups:
        if replaced.intersection(group._group_actions):
            replaced.update(group._group_actions)
    replaced.update(parser._get_positional_actions()[: len([*parser.strays(typed)])])

    def refuse(key: str, problem: str) -> OptionError:
        return OptionError(problem, path=path, tensor=f"[{'.'.join(names)}] {key}")

    known = keys(parser)
    values = {flag_spelling("--" + key)[2:]: value for key, value in table.items()}
    for name in values.keys() - known.keys():
        raise refuse(name, f"unknown key ({did_you_mean(name, known) or f'see convert_to_quant help {names[0]}'})")
    flags, places = [], []
    for name, action in known.items():
        value = values.get(name)
        if value is None or action in replaced:
            continue
        parser.origins[argparse._get_action_name(action) or name] = f"{path}: [{'.'.join(names)}] {name}"
        several = isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+")
        for one in value if several and isinstance(value, list) else [value]:
            if not isinstance(one, (str, int, float)) or isinstance(one, bool) != (action.nargs == 0):
                wanted = "true or false" if action.nargs == 0 else "a string or a number"
                found = repr(one) if isinstance(one, (str, int, float)) else f"a {type(one).__name__}"
                raise refuse(name, f"expected {wanted}, found {found}")
            if "\0" in (text := str(one)):
                raise refuse(name, "found a NUL character")
            if kind_of(action) is not None and text not in NO_PATHS:
                text = str(Path(path).parent / text)
            if not action.option_strings:
                places.append(text)
            elif one is True:
                flags.append(f"--{name}")
            elif one is not False:
                flags.append(f"--{name}={text}")
    return [*flags, *typed, *(["--", *places] if places else [])]


def options_in_force(parser: Parser, args: argparse.Namespace, folder: Path | None = None) -> Table:
    """The options that differ from their defaults, as a table, with paths relative to a folder if one is given."""

    def relative(action: argparse.Action, value: Any) -> Any:
        if folder is None or kind_of(action) is None or value in NO_PATHS:
            return value
        try:
            return os.path.relpath(value, folder)
        except ValueError:  # another drive
            return str(Path(value).absolute())

    found: Table = {}
    for key, action in keys(parser).items():
        value = getattr(args, action.dest, None)
        if value not in (None, action.default):
            found[key] = (
                [relative(action, one) for one in value] if isinstance(value, list) else relative(action, value)
            )
    return found


def write(path: str, names: Sequence[str], parser: Parser, args: argparse.Namespace) -> None:
    """Write the options of a command to a configuration file."""
    from ..checkpoint import write_bytes
    from ..errors import OutputError

    table = options_in_force(parser, args, Path(path).parent)
    lines = [f"# convert_to_quant {__version__}", f"[{'.'.join(names)}]"]
    lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    try:
        content = ("\n".join(lines) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        raise OutputError("TOML cannot contain a file name that is not UTF-8", path=path) from None
    write_bytes(Path(path), content)


def _toml(value: Any) -> str:
    """A value in TOML, which is JSON except for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
