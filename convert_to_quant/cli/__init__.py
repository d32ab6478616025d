"""The command line: the only place that prints, and the boundary between errors and exit codes.

    convert_to_quant -i MODEL -o OUT ...     convert, calibrate, or both (the command that needs no name)
    convert_to_quant COMMAND ...             everything else

stdout is data (tables, JSON), stderr is talk (progress, notes, errors). Exit codes: 0 done, 1 failed, 2 misused.
Nothing heavy is imported before a command runs: `--help` answers without torch and without numpy.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import Error

COMMANDS = {
    "convert": "convert to FP8, calibrate an FP8 file, or both (the default)",
    "inspect": "say what a file is, what ComfyUI does with it, and what is wrong with it",
    "observe": "run a model and keep what its layers receive as a statistics file",
    "apply": "choose scales from statistics and write them into a checkpoint",
    "merge": "merge statistics files",
    "comfyui": "install our nodes into a ComfyUI, or remove them",
    "check": "compare a quantized model with its reference while both paint",
    "demo": "convert, calibrate and check the embedded emoji model; writes a picture",
}
"""What each command does. The module `cli.NAME` has it: `add_arguments(parser)` and `run(args) -> exit code`."""

DEFAULT_COMMAND = "convert"
INTERRUPTED = 130


def flag_spelling(argument: str) -> str:
    """An argument with the dashes that the parsers know: `--scaling_mode` and `--scaling-mode` are the same.

    >>> flag_spelling("--actcal_lora=my_lora.safetensors")
    '--actcal-lora=my_lora.safetensors'
    """
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    module = importlib.import_module(f"{__name__}.{command}")
    named = "" if command == DEFAULT_COMMAND else f" {command}"
    parser = argparse.ArgumentParser(
        prog=f"convert_to_quant{named}",
        description=module.DESCRIPTION,
        epilog=module.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"convert_to_quant {__version__}")
    module.add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    words = [flag_spelling(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    command = words.pop(0) if words and words[0] in COMMANDS else DEFAULT_COMMAND
    args = build_parser(command).parse_args(words)
    run = importlib.import_module(f"{__name__}.{command}").run
    return guarded(lambda: int(run(args)))


def guarded(run: Callable[[], int]) -> int:
    """Run something, and turn our errors, and only ours, into one line and an exit code."""
    try:
        code = run()
        sys.stdout.flush()  # here, where a reader that went away is expected, and not when Python ends
        return code
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: an output is written whole or not at all", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. Keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
