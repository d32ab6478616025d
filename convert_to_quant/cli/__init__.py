"""The command line: the only place that prints, and the boundary between errors and exit codes.

    convert_to_quant -i MODEL -o OUT ...     convert, calibrate, or both (the command that needs no name)
    convert_to_quant COMMAND ...             everything else
    convert_to_quant --config FILE.toml      what the file says (`config`)

stdout is data (tables, JSON), stderr is talk (progress, notes, errors). Exit codes: 0 done, 1 failed, 2 misused; 130
and 143 where a signal ended it. Nothing heavy is imported before a command runs: `--help` answers without torch and
without numpy.

A command is the module `cli.NAME` with DESCRIPTION, EPILOG, `add_arguments(parser)` and `run(args) -> exit code`. What
every command has (`shared`) is added here; what it prints it prints through `output`.
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
from .interrupts import Interrupted, exit_code, interruptible
from .neighbour import FLAGS, neighbour
from .overview import GROUPS, overview
from .parsing import Parser, did_you_mean, flag_spelling

__all__ = ["COMMANDS", "build_parser", "flag_spelling", "guarded", "main"]

COMMANDS = {name: words for group in GROUPS.values() for name, words in group.items()}
"""What each command does."""

DEFAULT_COMMAND = "convert"
READERS = frozenset({"inspect", "check", "completion"})
"""Commands that write nothing but a report."""

STREAM_ENDS = frozenset({errno.EPIPE, errno.ENOSPC, errno.EIO})
"""Why a stream takes no more: its reader went away, or the disk behind it is full or failed."""

NO_MEMORY = re.compile(
    r"out of memory|allocate memory|not enough memory|bad_?alloc|failed to map segment|can't start new thread"
    r"|error return without exception set",  # Python's own word, where its import runs out of memory
    re.I,
)
"""What libraries say where the system gives them no memory, or no thread, and raise no MemoryError."""

WANTED = re.compile(r"(?:allocate|allocating) ([\d.,]+ ?\w*)")
"""How much they wanted at once."""

BALLAST_BYTES = 1 << 22
"""Room to say that there is none."""

FILE_SUFFIXES = (".safetensors", ".sft", ".json", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""What shows that a word was meant as a file."""


def build_parser(command: str) -> Parser:
    """The parser of one command."""
    module = importlib.import_module(f"{__name__}.{command}")
    program = getattr(module, "PROGRAM", f"convert_to_quant {command}")
    parser = Parser(prog=program, description=module.DESCRIPTION, epilog=module.EPILOG)
    module.add_arguments(parser)
    if command == DEFAULT_COMMAND:
        parser.foreign = FLAGS
    shared.add_shared_options(parser, writes=command not in READERS)
    return parser


def main(arguments: Sequence[str] | None = None, command: str = "") -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.
        command: the only one, where the program is one command.

    Returns:
        The exit code.
    """
    words = [flag_spelling(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    prepare(words)
    return guarded(lambda: dispatch(words, command), last=arguments is None)


def prepare(words: Sequence[str]) -> None:
    """Make the streams fit to be written to: colours as asked for, and no letter that they cannot show is an error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us; `print` would take stdout for stderr
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    terminal.choose_color(words)
    output.configure()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def dispatch(words: list[str], command: str) -> int:
    """Run a command, the one that a command line names if none is given, with what every command has around it.

    Returns:
        The exit code.
    """
    if not command:
        if words and words[0] == "help":
            words = [*words[1:], "--help"]
        if words in ([], ["--help"], ["-h"]):
            print(overview(), end="")
            return 0
        command = command_of(words)
        words = words[1:] if words[0] == command else words
    args, parser, names = config.parse(build_parser(command), words, command, list({**COMMANDS, command: ""}))
    args.in_force = config.options_in_force(parser, args)
    options = {key: value for key, value in args.in_force.items() if key not in shared.TALK}
    made_by = {"tool": "convert_to_quant", "version": __version__, "command": " ".join(names), "options": options}
    output.configure(quiet=args.quiet, made_by=made_by)
    if warning := neighbour():
        output.note(warning)
    shared.check_paths(parser, args)
    module = importlib.import_module(f"{__name__}.{command}")
    code = int(module.run(argparse.Namespace(**vars(args))))  # which settles what the call leaves open
    if code == 0 and args.save_config and not getattr(args, "dry_run", False):
        config.write(args.save_config, names, parser, args)
    return code


def command_of(words: Sequence[str]) -> str:
    """The command that a command line means.

    Raises:
        OptionError: there is no such command.
    """
    word, path = words[0], terminal.value_of("--config", words)
    if word in COMMANDS:
        return word
    if word.startswith("-"):
        named_by_file = path is not None and not {"-i", "--input"} & {word.partition("=")[0] for word in words}
        return config.only_command(str(path), list(COMMANDS)) if named_by_file else DEFAULT_COMMAND
    if word.endswith(FILE_SUFFIXES) or Path(word).exists():
        hint = f"convert_to_quant -i {word} converts it, convert_to_quant inspect {word} looks at it"
        raise OptionError(f"{word} is a file, not a command", hint=hint)
    hint = did_you_mean(word, [*COMMANDS, "help"]) or "convert_to_quant --help lists them"
    raise OptionError(f"unknown command {word!r}", hint=hint)


def guarded(run: Callable[[], int], *, last: bool = False) -> int:
    """Run something, and turn our errors and signals, and only those, into one line and an exit code.

    Args:
        run: gives the exit code.
        last: whether it is all that the process does.
    """
    ballast = bytearray(BALLAST_BYTES)
    try:
        with interruptible(last=last):
            code = run()
            sys.stdout.flush()  # here, where a reader that went away is expected, and not when Python ends
        return code
    except Error as error:
        output.error(str(error))
        return error.exit_code
    except KeyboardInterrupt as stop:
        with contextlib.suppress(BrokenPipeError):  # whoever ended us may be gone
            print("interrupted: an output is written whole or not at all", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Interrupted) else exit_code(signal.SIGINT)
    except Exception as failure:
        if lacks_memory(failure):
            del ballast
            output.error(f"out of memory{_wanted(failure)} (close other programs, or ask for fewer or smaller samples)")
            return 1
        if not isinstance(failure, OSError):
            raise
        where = "" if failure.filename is None else f"{failure.filename}: "
        what = "the output cannot be written" if failure.errno in STREAM_ENDS else "the system refused"
        if failure.errno != errno.EPIPE:  # whose reader has seen enough
            output.error(f"{where}{what}: {failure.strerror}")
        with contextlib.suppress(OSError):  # keep Python from complaining when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def lacks_memory(failure: BaseException) -> bool:
    """Whether an error, or what it was raised from, is that the system or a GPU had no more memory.

    >>> lacks_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    True
    >>> lacks_memory(RuntimeError("shapes cannot be multiplied"))
    False
    """
    if isinstance(failure, MemoryError) or getattr(failure, "errno", None) == errno.ENOMEM:
        return True
    before = failure.__cause__ or failure.__context__
    return bool(NO_MEMORY.search(str(failure))) or (before is not None and lacks_memory(before))


def _wanted(failure: BaseException) -> str:
    """How much was asked for at once, where the error says it: ": 31.0 MiB more could not be had"."""
    found = WANTED.search(str(failure))
    return f": {found[1]} more could not be had" if found else ""
