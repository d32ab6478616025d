"""The command line: the only place that prints, and where errors become messages and exit codes.

    convert_to_quant -i MODEL -o OUT ...     the default command: convert, calibrate, or both
    convert_to_quant COMMAND ...             all others
    convert_to_quant --config FILE.toml      the command in a configuration file (`config`)

Data (tables, JSON) go to stdout; progress, notes and errors go to stderr. Exit codes: 0 success, 1 failure, 2 usage
error, 130 and 143 ended by a signal. Heavy modules are imported only when a command runs, so `--help` needs neither
torch nor numpy.

A command is a module `cli.NAME` with DESCRIPTION, EPILOG, `add_arguments(parser)` and `run(args) -> exit code`.
`shared` adds the options that all commands have; commands print through `output`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from ..errors import Error, OptionError
from . import config, output, shared, terminal
from .conflict import FLAGS, conflicting_package
from .interrupts import Interrupted, exit_code, interruptible
from .overview import GROUPS, overview
from .parsing import Parser, did_you_mean, flag_spelling

__all__ = ["COMMANDS", "build_parser", "flag_spelling", "guarded", "main"]

COMMANDS = {name: words for group in GROUPS.values() for name, words in group.items()}
"""Commands and their one-line descriptions."""

DEFAULT_COMMAND = "convert"
READERS = frozenset({"inspect", "check", "completion"})
"""Commands that write nothing except reports."""

STREAM_ENDS = frozenset({errno.EPIPE, errno.ENOSPC, errno.EIO})
"""Errors of a closed pipe, a full disk and a failed one."""

NO_MEMORY = re.compile(
    r"out of memory|allocate memory|not enough memory|bad_?alloc|failed to map segment|can't start new thread"
    r"|error return without exception set",  # Python, if its import runs out of memory
    re.I,
)
"""Messages of libraries that are out of memory but raise no MemoryError."""

BALLAST_BYTES = 1 << 22
"""Memory that is kept for the message about lacking memory."""

FILE_SUFFIXES = (".safetensors", ".sft", ".json", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""Suffixes of words that are files, not commands."""


def build_parser(command: str) -> Parser:
    """The parser of one command."""
    module = importlib.import_module(f"{__name__}.{command}")
    program = getattr(module, "PROGRAM", f"convert_to_quant {command}")
    parser = Parser(prog=program, description=module.DESCRIPTION, epilog=module.EPILOG)
    module.add_arguments(parser)
    if command == DEFAULT_COMMAND:
        parser.hints = FLAGS
    shared.add_shared_options(parser, writes=command not in READERS)
    return parser


def main(arguments: Sequence[str] | None = None, command: str = "") -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of the process.
        command: the command, if the program has only one.

    Returns:
        The exit code.
    """
    words = [flag_spelling(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    prepare(words)
    return guarded(lambda: dispatch(words, command), last=arguments is None)


def prepare(words: Sequence[str]) -> None:
    """Configure the streams: colors, and escapes for characters that they cannot encode."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    terminal.choose_color(words)
    output.configure()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def dispatch(words: list[str], command: str) -> int:
    """Run the given command, or the one that the command line names; return the exit code."""
    if not command:
        if words and words[0] == "help":
            words = [*words[1:], "--help"]
        if words in ([], ["--help"], ["-h"]):
            print(overview(), end="")
            return 0
        command, *words = with_command(words)
    args, parser, names = config.parse(build_parser(command), words, command, list({**COMMANDS, command: ""}))
    args.in_force = config.options_in_force(parser, args)
    options = {key: value for key, value in args.in_force.items() if key not in shared.TALK}
    made_by = {"tool": "convert_to_quant", "version": __version__, "command": " ".join(names), "options": options}
    output.configure(quiet=args.quiet, made_by=made_by)
    if warning := conflicting_package():
        output.note(warning)
    shared.check_paths(parser, args)
    module = importlib.import_module(f"{__name__}.{command}")
    code = int(module.run(argparse.Namespace(**vars(args))))  # a copy, as commands change it
    if code == 0 and args.save_config and not getattr(args, "dry_run", False):
        config.write(args.save_config, names, parser, args)
    return code


def with_command(words: list[str]) -> list[str]:
    """A command line with an explicit command; unknown ones are refused."""
    word, path = words[0], terminal.value_of("--config", words)
    if word in COMMANDS:
        return words
    if word.startswith("-"):
        given = {"-i", "--input"} & {word.partition("=")[0] for word in words}
        return [*([DEFAULT_COMMAND] if path is None or given else config.only_command(path, list(COMMANDS))), *words]
    if word.endswith(FILE_SUFFIXES) or Path(word).exists():
        hint = f"to convert it: convert_to_quant -i {word}; to inspect it: convert_to_quant inspect {word}"
        raise OptionError(f"{word} is a file, not a command", hint=hint)
    hint = did_you_mean(word, [*COMMANDS, "help"]) or "see convert_to_quant --help"
    raise OptionError(f"unknown command {word!r}", hint=hint)


def guarded(run: Callable[[], int], *, last: bool = False) -> int:
    """Run a function, and turn our errors and signals into one line and an exit code; bugs show their traceback.

    `last` says that the process ends afterwards.
    """
    ballast = bytearray(BALLAST_BYTES)
    try:
        with interruptible(last=last):
            code = run()
            sys.stdout.flush()  # a closed pipe is an error here, and not when Python exits
        return code
    except Error as error:
        output.error(str(error))
        return error.exit_code
    except KeyboardInterrupt as stop:
        with contextlib.suppress(BrokenPipeError):
            print("interrupted: outputs are never left incomplete", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Interrupted) else exit_code(signal.SIGINT)
    except Exception as failure:
        if lacks_memory(failure):
            del ballast
            output.error("out of memory (close other programs, or use fewer or smaller samples)")
            return 1
        if not isinstance(failure, OSError):
            raise
        where = "" if failure.filename is None else f"{failure.filename}: "
        what = "the output cannot be written" if failure.errno in STREAM_ENDS else "the operating system reports"
        if failure.errno != errno.EPIPE:  # the reader has seen enough
            output.error(f"{where}{what}: {failure.strerror}")
        with contextlib.suppress(OSError):  # Python would complain when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def lacks_memory(failure: BaseException) -> bool:
    """Whether an error, or one that caused it, means that the system or a GPU is out of memory.

    >>> lacks_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    True
    >>> lacks_memory(RuntimeError("shapes cannot be multiplied"))
    False
    """
    if isinstance(failure, MemoryError) or getattr(failure, "errno", None) == errno.ENOMEM:
        return True
    before = failure.__cause__ or failure.__context__
    return bool(NO_MEMORY.search(str(failure))) or (before is not None and lacks_memory(before))
