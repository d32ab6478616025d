"""`python -m convert_to_quant.calibrate_activation_scales MODEL -o OUT`: calibration as a program of its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import cli
from .calibration import add_calibration_arguments, add_target_arguments, opened
from .running import settle

PROGRAM = "python -m convert_to_quant.calibrate_activation_scales"
DESCRIPTION = "Measure the input scale of every FP8 layer and write a calibrated checkpoint."
EPILOG = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; see `cli.main`."""
    return cli.main(arguments, "calibrate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("input", metavar="MODEL", help="FP8 checkpoint")
    add_target_arguments(parser)
    add_calibration_arguments(parser.add_argument_group("calibration"), "")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from .convert import calibrate_file

    args.actcal = True
    with opened(args) as (checkpoint, adapters):
        settle(args, checkpoint, runs=args.engine != "layer")
        return calibrate_file(checkpoint, args, adapters)
