"""The options that every command has, and what its values are: files, folders, patterns of both.

They stand in one place so that they mean the same everywhere. A command that is quiet says errors only; its data stays.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import __version__
from ..errors import CheckpointError, Error, OptionError, OutputError
from .output import foresee, note
from .parsing import Parser
from .terminal import COLOR_CHOICES

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

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
"""What a value is that is called so in the help: shells complete it, and a configuration file may say it relatively."""

NO_PATHS = frozenset({"-", "noise"})
"""Values of such options that name no file."""

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
    ("-h", "--help"): {"action": "help", "help": "this"},
}  # fmt: skip
NO_KEYS = frozenset({"config", "save_config", "color", "version", "help"})
"""Options about the call itself, which a configuration file cannot say."""
WRITTEN = frozenset({"-o", "--png", "--csv", "--save-conditioning", "--json", "--save-config"})
"""Options that name what is written."""
STREAMS = frozenset({"--csv", "--json"})
"""Those whose text may go into a pipe or a device."""
INPUTS = frozenset({"-i", "MODEL"})
"""Options that name the model."""
TALK = frozenset({"json", "verbose", "quiet"})
"""Options about what is said, which change nothing in what is written."""


MOST_TEXT_BYTES = 1 << 25
"""Of a workflow or a list of prompts."""


def add_shared_options(parser: Parser, *, writes: bool) -> None:
    """Add what every command has, except what this one has already, and the hidden opposite of every switch.

    Args:
        parser: of a command; where it has actions, each of them gets the options.
        writes: whether the command writes anything but a report, so that there is something to try dry.
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
    """What file or folder an option's value is; None where it is none."""
    return PATHS.get(action.metavar) if isinstance(action.metavar, str) else None


def paths_of(parser: Parser, args: argparse.Namespace) -> Iterator[tuple[str, Path, Kind]]:
    """Every file and folder that a call names: the option that names it, the path, and what it is.

    Raises:
        OutputError: a file that is to be written has the name of a folder.
    """
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
                    raise OutputError("cannot be written: a file was expected, and this names a folder", path=place)
                yield option, Path(place), kind


def read_text(path: Path, refuse: Callable[[str], Error], most_bytes: int = MOST_TEXT_BYTES) -> str:
    """The content of a text file in UTF-8, without a byte order mark.

    Args:
        path: the file; a pipe, a device or a socket is not opened, since a pipe would wait for a writer.
        refuse: makes the error from what is wrong: "cannot be read: ...".
        most_bytes: a larger file is refused.

    Raises:
        Error: whatever `refuse` makes.
    """
    from ..checkpoint.reader import refuse_special

    try:
        refuse_special(path, path)
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) <= most_bytes:
            return content.decode("utf-8-sig")
        problem = f"it is larger than {most_bytes:,} bytes"
    except CheckpointError as error:
        problem = error.problem
    except OSError as error:
        problem = error.strerror or str(error)
    except UnicodeDecodeError:
        problem = "it is no text in UTF-8"
    raise refuse(f"cannot be read: {problem}")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        OptionError: it cannot be read, or has none.
    """
    text = read_text(path, lambda problem: OptionError(f"the prompts {problem}", path=path))
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise OptionError("no prompts", path=path, hint="one per line")
    return prompts


def check_paths(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse, before any work, outputs that cannot be written or would replace another file of the call.

    The shards of a checkpoint, which no call names, are `check_shards`'s.

    Raises:
        OutputError: a folder is missing, an output is a folder or a special file (a report may be a pipe or a character
            device), it is another file of the call, or a file is where a folder is to be.
    """
    named = list(paths_of(parser, args))
    in_place = getattr(args, "in_place", False)
    outputs = []
    for flag, output, kind in named:
        if flag not in WRITTEN or (flag == "-o" and in_place):
            continue
        if kind == "folder":
            if output.exists() and not output.is_dir():
                raise OutputError("the folder cannot be made: a file is there", path=output)
            continue
        from ..checkpoint import check_output, is_one_file

        for name, other, _ in named:
            if name == flag or (flag == "-o" and name in WRITTEN) or not is_one_file(output, other):
                continue
            if flag == "-o":
                calibrates = name in ("-i", "MODEL") and getattr(args, "actcal", hasattr(args, "in_place"))
                hint = "name another output" + (", or add --in-place" if calibrates else "")
                raise OutputError(f"the output is the same file as the input {other}", path=output, hint=hint)
            hint = f"name another file for {flag}"
            raise OutputError(f"{flag} and {name} are the same file", path=output, hint=hint)
        if kind == "checkpoint" and output.is_file():
            lacking = next((path for name, path, _ in named if name in INPUTS and not path.exists()), None)
            if lacking is not None:
                hint = f"{output}, which would be written, is there: {flag} names the new file"
                raise CheckpointError("no such file", path=lacking, hint=hint)
        check_output(output, stream=flag in STREAMS)
        if output.is_file() or not output.exists():
            outputs.append(output)
    foresee(outputs, dry=getattr(args, "dry_run", False))
    adapters = Counter((flag, path.resolve()) for flag, path, kind in named if kind == "adapter")
    for (flag, path), count in adapters.items():
        if count > 1:
            note(f"{flag} names {path.name} {count} times, so its strengths add up")


def check_shards(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Refuse, before any work, outputs that are files of a checkpoint.

    Raises:
        OutputError: one is.
    """
    from ..checkpoint import refuse_same_file

    named = {f"file for --{name}": getattr(args, name, None) for name in ("json", "png", "csv")}
    named["output"] = None if getattr(args, "in_place", False) else getattr(args, "output", None)
    for what, place in named.items():
        if place is not None and place not in NO_PATHS:
            refuse_same_file(Path(place), [file.path for file in checkpoint.files], hint=f"name another {what}")
