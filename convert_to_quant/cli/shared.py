"""The options that all commands share, and checks of the files and folders that options name."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from ..errors import CheckpointError, Error, OptionError, OutputError
from .output import foresee, note
from .parsing import Parser
from .terminal import COLOR_CHOICES

Kind = Literal["checkpoint", "adapter", "file", "config", "folder"]

PATHS: Mapping[str, Kind] = {
    "MODEL": "checkpoint",
    "REFERENCE": "checkpoint",
    "QUANTIZED": "checkpoint",
    "STATS": "checkpoint",
    "OUT": "checkpoint",
    "FILE[:STRENGTH]": "adapter",
    "noise|FILE": "checkpoint",
    "FILE": "file",
    "FILE.toml": "config",
    "DIR": "folder",
    "FOLDER": "folder",
}
"""Placeholder in the help -> kind of path. Shells complete these values; configuration files resolve them."""

NO_PATHS = frozenset({"-", "noise"})
"""Values of such options that are not paths."""

DRY_RUN = "--dry-run"
SHARED: Mapping[tuple[str, ...], Mapping[str, Any]] = {
    (DRY_RUN,): {"action": "store_true", "help": "check everything, write nothing"},
    ("--json",): {"metavar": "FILE", "help": "write the report as JSON (- for stdout)"},
    ("-v", "--verbose"): {"action": "store_true", "help": "list every layer"},
    ("-q", "--quiet"): {"action": "store_true", "help": "print only errors and data"},
    ("--config",): {"metavar": "FILE.toml", "help": "read options from this file"},
    ("--save-config",): {"metavar": "FILE.toml", "help": "save the options to this file"},
    ("--color",): {"choices": COLOR_CHOICES, "default": "auto", "metavar": "WHEN",
                   "help": "auto, always or never (auto)"},
    ("--version",): {"action": "version", "version": f"convert_to_quant {__version__}", "help": argparse.SUPPRESS},
    ("-h", "--help"): {"action": "help", "help": "show this help"},
}  # fmt: skip
NO_KEYS = frozenset({"config", "save_config", "color", "version", "help"})
"""Options that a configuration file cannot contain."""
WRITTEN = frozenset({"-o", "--png", "--csv", "--save-conditioning", "--json", "--save-config"})
"""Options that name outputs."""
STREAMS = frozenset({"--csv", "--json"})
"""Outputs that may be pipes or devices."""
INPUTS = frozenset({"-i", "MODEL"})
"""Options that name the model."""
TALK = frozenset({"json", "verbose", "quiet"})
"""Options that do not change what is written."""

MOST_TEXT_BYTES = 1 << 25
"""Maximum size of a workflow or a list of prompts."""


def add_shared_options(parser: Parser, *, writes: bool) -> None:
    """Add the shared options that a command or its actions lack, and the hidden opposite of every switch.

    A command that writes more than a report also gets --dry-run.
    """
    actions = parser.subcommands()
    if actions is not None:
        for child in actions.choices.values():
            add_shared_options(child, writes=writes)
        writes = False
    group = parser.add_argument_group("common")
    there = parser._option_string_actions
    for flags, settings in SHARED.items():
        own = actions is None or settings.get("action") in ("version", "help")
        if own and (writes or flags != (DRY_RUN,)) and not any(flag in there for flag in flags):
            group.add_argument(*flags, **settings)
    for action in list(parser._actions):
        if isinstance(action, argparse._StoreTrueAction):
            opposite = "--no-" + action.option_strings[-1].lstrip("-")
            parser.add_argument(opposite, dest=action.dest, action="store_false", default=argparse.SUPPRESS,
                                help=argparse.SUPPRESS)  # fmt: skip


def kind_of(action: argparse.Action) -> Kind | None:
    """The kind of path that an option names, or None."""
    return PATHS.get(action.metavar) if isinstance(action.metavar, str) else None


def paths_of(parser: Parser, args: argparse.Namespace) -> Iterator[tuple[str, Path, Kind]]:
    """The paths in a command line: option, path and kind; an output file with the name of a folder is refused."""
    for action in parser._actions:
        kind = kind_of(action)
        if action.help == argparse.SUPPRESS or kind is None:
            continue
        value = getattr(args, action.dest, None)
        for text in value if isinstance(value, list) else [value]:
            if text is not None and text not in NO_PATHS:
                place = text
                if action.metavar == "FILE[:STRENGTH]":
                    from ..lora import split_strength

                    place, _ = split_strength(text)
                option = action.option_strings[0] if action.option_strings else str(action.metavar)
                if option in WRITTEN and kind != "folder" and place.endswith(("/", os.sep)):
                    raise OutputError("cannot be written: expected a file, found the name of a folder", path=place)
                yield option, Path(place), kind


def read_text(path: Path, refuse: Callable[[str], Error], most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Read a text file in UTF-8, without a byte order mark.

    If it cannot be read, `refuse` makes the error. Pipes, which would block, devices and sockets are refused.
    """
    from ..checkpoint.reader import refuse_special

    try:
        refuse_special(path, path)
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) <= most_bytes:
            return content.decode("utf-8-sig")
        problem = f"larger than {most_bytes:,} bytes"
    except CheckpointError as error:
        problem = error.problem
    except OSError as error:
        problem = error.strerror or str(error)
    except UnicodeDecodeError:
        problem = "not UTF-8 text"
    raise refuse(f"cannot be read: {problem}")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty; a file without any is refused."""
    text = read_text(path, lambda problem: OptionError(f"the prompts {problem}", path=path))
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise OptionError("no prompts", path=path, hint="write one per line")
    return prompts


def check_paths(parser: Parser, args: argparse.Namespace) -> None:
    """Before any work, refuse outputs that cannot be written, or that are other files of the command line.

    Shards of a checkpoint and the checkpoints in a folder count as such files.
    """
    from ..checkpoint import check_output
    from ..checkpoint.reader import PICKLE_SUFFIXES, checkpoint_files

    named = list(paths_of(parser, args))
    for flag, path, kind in [one for one in named if one[0] not in WRITTEN and one[2] == "checkpoint"]:
        with suppress(CheckpointError):  # which opening it reports
            files = path.glob("*.s*") if path.is_dir() else checkpoint_files(path)
            named += [(flag, file, kind) for file in files if file != path]
    written = [one for one in named if one[0] in WRITTEN and not (one[0] == "-o" and getattr(args, "in_place", False))]
    for flag, output, kind in written:
        if kind == "folder":
            if output.exists() and not output.is_dir():
                raise OutputError("the folder cannot be created: a file has its name", path=output)
            continue
        _refuse_named(flag, output, named, args)
        if kind == "checkpoint" and output.is_file():
            missing = next((path for name, path, _ in named if name in INPUTS and not path.exists()), None)
            if missing is not None:
                hint = f"{output} exists; were input and output swapped? {flag} names the output"
                raise CheckpointError("no such file", path=missing, hint=hint)
        if kind == "checkpoint" and output.suffix.lower() in PICKLE_SUFFIXES:
            problem = f"cannot be written: {output.suffix} means a pickle"
            raise OutputError(problem, path=output, hint="use .safetensors")
        check_output(output, stream=flag in STREAMS)
    outputs = [output for _, output, kind in written if kind != "folder" and (output.is_file() or not output.exists())]
    foresee(outputs, dry=getattr(args, "dry_run", False))
    adapters = Counter((flag, path.resolve()) for flag, path, kind in named if kind == "adapter")
    for (flag, path), count in adapters.items():
        if count > 1:
            note(f"{flag} names {path.name} {count} times: the strengths add up")


def _refuse_named(flag: str, output: Path, named: Iterable[tuple[str, Path, Kind]], args: argparse.Namespace) -> None:
    """Refuse an output that is another file of the command line."""
    from ..checkpoint import is_one_file

    for name, other, _ in named:
        if name == flag or (flag == "-o" and name in WRITTEN) or not is_one_file(output, other):
            continue
        if flag != "-o":
            raise OutputError(f"{flag} and {name} are the same file", path=output, hint=f"name another file for {flag}")
        calibrates = name in INPUTS and getattr(args, "actcal", hasattr(args, "in_place"))
        hint = "name another output" + (", or add --in-place" if calibrates else "")
        raise OutputError(f"the output is the same file as the input {other}", path=output, hint=hint)
