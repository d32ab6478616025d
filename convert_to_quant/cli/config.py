"""`--config FILE.toml`: the options of a call in a file, so that a calibration can be done again from one file.

One table per command; keys are the long flags without their dashes in front, or what the help calls an argument:

    [convert]
    input = "flux_bf16.safetensors"
    output = "flux_fp8.safetensors"
    actcal = true
    actcal-lora = ["style.safetensors:0.8"]

    [comfyui.observe]
    server = "http://127.0.0.1:8188"

The values go through the parser of the command, so they mean what they mean on the command line, which wins where both
say something: a list there replaces the file's, `--no-legacy` undoes the file's `legacy = true`. Relative paths are
relative to the configuration file, so that a folder with a model and its recipe can be moved.

`--save-config FILE.toml` writes such a table: everything that a call said and that is not the default.
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
from ..errors import MOST_NAME, OptionError, cut
from ..untrusted import is_deep
from .parsing import Parser, did_you_mean, flag_spelling, follow
from .shared import NO_KEYS, NO_PATHS, kind_of, read_text
from .terminal import value_of

Table = dict[str, Any]

MOST_BYTES = 1 << 16
MOST_DOTS = 500
"""Of a configuration, and of a line in it: a key of a thousand parts takes seconds, one of a million hours."""


def read(path: str, known: Sequence[str]) -> Table:
    """A configuration file's content: tables of commands.

    Raises:
        OptionError: it cannot be read, is not TOML, or has something else in it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    text = read_text(Path(path), lambda problem: OptionError(f"the configuration {problem}", path=path), MOST_BYTES)
    if any(part.count(".") > MOST_DOTS for line in text.splitlines() for part in line.split("=")):
        raise OptionError(f"not TOML of options: more than {MOST_DOTS} dots in a line", path=path)
    try:
        content: Table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"not TOML: {error}", path=path) from None
    except RecursionError:
        raise OptionError("not TOML: nested too deeply", path=path) from None
    if is_deep(content):
        raise OptionError("not TOML: nested too deeply", path=path)
    for name, table in content.items():
        if name not in known and not isinstance(table, dict):
            raise OptionError(f"{name!r} stands outside of a table", path=path, hint="put [convert] above it")
        if name not in known:
            hint = did_you_mean(name, known) or f"commands: {', '.join(known)}"
            raise OptionError(f"[{name}] is no command", path=path, hint=hint)
        if not isinstance(table, dict):
            raise OptionError(f"{name!r} should be a table: [{name}]", path=path)
    return content


def only_command(path: str, known: Sequence[str]) -> str:
    """The command whose table is the only one of a file.

    Raises:
        OptionError: there is none, or there are several; see `read`.
    """
    content = read(path, known)
    if not content:
        raise OptionError("no table of a command in it", path=path, hint="begin with [convert]")
    first, *others = content
    if others:
        hint = f"name one: convert_to_quant {first} ..."
        raise OptionError(f"tables of several commands: {', '.join(content)}", path=path, hint=hint)
    return first


def keys(parser: Parser) -> dict[str, argparse.Action]:
    """Everything that a table of a command may say."""
    actions = [
        action
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        and action.dest not in NO_KEYS
        and not isinstance(action, argparse._SubParsersAction)
    ]
    return {_key(action): action for action in actions}


def _key(action: argparse.Action) -> str:
    if action.option_strings:
        return action.option_strings[-1].lstrip("-")
    return str(action.metavar or action.dest).lower()


def _in_file(table: Table, path: str, names: Sequence[str], parser: Parser) -> dict[argparse.Action, Any]:
    """What a file says of a command, read as a command line would be.

    Args:
        table: of the command.
        path: of the file.
        names: the command, and its action if it has some.
        parser: of the command or action.

    Raises:
        OptionError: a key is unknown, or its value cannot be.
    """
    known, found = keys(parser), {}
    for key, value in table.items():
        name = flag_spelling("--" + key)[2:]
        try:
            if name not in known:
                hint = did_you_mean(name, known) or f"convert_to_quant help {' '.join(names)} names them"
                raise argparse.ArgumentError(None, f"unknown key ({hint})")
            found[known[name]] = _value(known[name], value, path, parser)
            for group in parser._mutually_exclusive_groups:
                said = [action for action in group._group_actions if found.get(action)]
                if len(said) > 1:
                    other = next(action for action in said if action is not known[name])
                    raise argparse.ArgumentError(None, f"not allowed with argument --{_key(other)}")
        except argparse.ArgumentError as error:
            raise OptionError(error.message, path=path, tensor=f"[{'.'.join(names)}] {key}") from None
    return found


def _value(action: argparse.Action, value: Any, path: str, parser: Parser) -> Any:
    """A value of a file as the parser would make it of words.

    Raises:
        ArgumentError: it cannot be.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise argparse.ArgumentError(None, f"should be true or false, found {cut(repr(value), MOST_NAME)}")
        return value
    many = _takes_several(action)
    values = value if many and isinstance(value, list) else [value]
    if wrong := [one for one in values if isinstance(one, bool) or not isinstance(one, (str, int, float))]:
        raise argparse.ArgumentError(None, f"should be one value, found {cut(repr(wrong[0]), MOST_NAME)}")
    if not values and not action.option_strings:
        raise argparse.ArgumentError(None, "should name at least one")
    texts = [str(one) for one in values]
    if kind_of(action) is not None:
        texts = [text if text in NO_PATHS else str(Path(path).parent / text) for text in texts]
    made = [parser._get_value(action, text) for text in texts]
    for one in made:
        parser._check_value(action, one)
    return made if many else made[0]


def _takes_several(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+")


def parse(
    parser: Parser, words: Sequence[str], command: str, known: Sequence[str]
) -> tuple[argparse.Namespace, Parser, list[str]]:
    """Parse a command line together with the configuration file that it names.

    Args:
        parser: of the command.
        words: what follows the command.
        command: its name.
        known: the names that tables may have.

    Returns:
        The options, the parser of the command or of its action, and the names of both.

    Raises:
        OptionError: the file cannot be used.
    """
    path = value_of("--config", words)
    leaf, actions = follow(parser, words)
    if path is None:
        return parser.parse_args(words), leaf, [command, *actions]
    content = read(path, known)
    inner = leaf.subcommands()
    if inner is not None:  # no action is named, so the file's only one is meant
        said = list(content.get(command, ()))
        if len(said) != 1 or said[0] not in inner.choices:
            hint = f"tables are called {', '.join(f'[{command}.{name}]' for name in inner.choices)}"
            problem = f"name an action: convert_to_quant {command} ACTION ..."
            raise OptionError(problem, path=path, hint=hint)
        words = [*said, *words]
        leaf, actions = follow(parser, words)
    names = [command, *actions]
    table, where = content, f"[{'.'.join(names)}]"
    for name in names:
        if name not in table:
            hint = f"it has {', '.join(f'[{name}]' for name in content) or 'nothing'}"
            raise OptionError(f"no table {where}", path=path, hint=hint)
        table = table[name]
        if not isinstance(table, dict):
            raise OptionError(f"{where} should be a table", path=path)
    named = {leaf._option_string_actions.get(word.partition("=")[0]) for word in words}
    for group in leaf._mutually_exclusive_groups:
        if named.intersection(group._group_actions):
            named.update(group._group_actions)
    in_file = {action: value for action, value in _in_file(table, path, names, leaf).items() if action not in named}
    usual = {action: action.default for action in in_file}
    for action, value in in_file.items():  # what the file says is the default of what the line leaves out
        action.default, action.required = value, False
        if not action.option_strings:
            action.nargs = "*" if _takes_several(action) else "?"
    args = parser.parse_args(words)
    for action, default in usual.items():
        action.default = default
    return args, leaf, names


def options_in_force(parser: Parser, args: argparse.Namespace, folder: Path | None = None) -> Table:
    """What a call says that is not the default, as a table of a configuration file would.

    Args:
        parser: of the command or action.
        args: the options.
        folder: what paths become relative to; None leaves them as they are.
    """

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
        if value is None or value == action.default:
            continue
        found[key] = [relative(action, one) for one in value] if isinstance(value, list) else relative(action, value)
    return found


def write(path: str, names: Sequence[str], parser: Parser, args: argparse.Namespace) -> None:
    """Write the options of a call into a configuration file, in place of an older one.

    Raises:
        OutputError: it cannot be written.
    """
    from ..checkpoint import write_bytes
    from ..errors import OutputError

    table = options_in_force(parser, args, Path(path).parent)
    lines = [f"# convert_to_quant {__version__}", f"[{'.'.join(names)}]"]
    lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    try:
        content = ("\n".join(lines) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        raise OutputError("TOML cannot hold a file name that is not UTF-8", path=path) from None
    write_bytes(Path(path), content)


def _toml(value: Any) -> str:
    r"""A value as TOML: its texts are those of JSON, but for one letter.

    >>> _toml(["a\x7f", 0.5, True])
    '["a\\u007f", 0.5, true]'
    """
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()
