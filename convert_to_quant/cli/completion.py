"""`convert_to_quant completion SHELL`: print a script that completes commands, flags, choices and files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from .output import write_json
from .parsing import Parser
from .shared import kind_of

SHELLS = ("bash", "zsh", "tcsh", "fish")

DESCRIPTION = "Print a script that lets a shell complete commands, flags, choices and files."
EPILOG = """\
examples:
  source <(convert_to_quant completion bash)
  convert_to_quant completion zsh > ~/.zfunc/_convert_to_quant
  convert_to_quant completion fish | source

Add the line to ~/.bashrc or config.fish; for zsh, write the script to a folder in fpath. In bash, ctq is completed too.
"""

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "checkpoint": ("*.safetensors", "*.safetensors.index.json"),
    "adapter": ("*.safetensors",),
    "config": ("*.toml",),
}
"""File name patterns by kind of path."""

ALIAS = "complete -o filenames -F _shtab_convert_to_quant ctq\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"{', '.join(SHELLS[:-1])} or {SHELLS[-1]}")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import shtab

    script = shtab.complete(whole_parser(shtab), args.shell) + "\n" + (ALIAS if args.shell == "bash" else "")
    if args.json != "-":
        print(script, end="")
    write_json(args.json, {"shell": args.shell, "script": script})
    return 0


def whole_parser(shtab: Any) -> Parser:
    """One parser with the options of the default command and all commands as subcommands.

    Args:
        shtab: the module, for its kinds of files.
    """
    from ..formats import WRITTEN
    from . import COMMANDS, DEFAULT_COMMAND, build_parser

    whole = build_parser(DEFAULT_COMMAND)
    whole.prog = "convert_to_quant"
    commands = whole.add_subparsers()
    parsers = [whole]
    for name, what in COMMANDS.items():
        parser = build_parser(name)
        added = commands.add_parser(name, help=what, parents=[parser])
        inner = parser.subcommands()
        parsers += [added, *(inner.choices.values() if inner is not None else ())]
    for parser in parsers:
        for action in parser._actions:
            kind = kind_of(action)
            if action.dest == "format":
                action.choices = WRITTEN  # not loaded for --help
            if kind == "folder":
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif kind is not None:
                action.complete = shtab.glob(*SUFFIXES[kind]) if kind in SUFFIXES else shtab.FILE  # type: ignore[attr-defined]
    return whole
