"""`python -m convert_to_quant.calibrate_activation_scales MODEL -o OUT`: the hand-off's own command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import flag_spelling, guarded
from .calibration import add_calibration_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    import sys

    parser = argparse.ArgumentParser(
        prog="python -m convert_to_quant.calibrate_activation_scales",
        description="Find the input scale of every FP8 layer of a checkpoint and write it into a new one.",
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="MODEL", help="an FP8 checkpoint")
    parser.add_argument("-o", "--output", metavar="OUT", help="the new file")
    parser.add_argument("--in-place", action="store_true", help="write the scales into MODEL itself")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON (- for stdout)")
    add_calibration_arguments(parser, "")
    parser.add_argument("--float16-safe", action="store_true", help="no scale below 2⁻¹⁵")
    parser.add_argument("--enable-fp8-matmul", action="store_true", help="replace a legacy marker that turns FP8 off")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every layer")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    words = [flag_spelling(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    args = parser.parse_args(words)
    args.actcal = True
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Calibrate the file."""
    from ..checkpoint import open_checkpoint
    from .calibration import adapter_files, check_written_files, loras_of, options_of, recover_input
    from .convert import calibrate_file, check_options

    check_options(args)
    options = options_of(args)
    recover_input(args)
    with open_checkpoint(args.input) as checkpoint:
        check_written_files(checkpoint, args, adapter_files(args))
        with loras_of(args) as adapters:
            return calibrate_file(checkpoint, args, options, adapters)
