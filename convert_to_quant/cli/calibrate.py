"""`python -m convert_to_quant.calibrate_activation_scales MODEL -o OUT`: the hand-off's own command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import cli
from ..options import CalibrationOptions, options_of
from .calibration import (
    add_calibration_arguments,
    add_target_arguments,
    note_damage,
    recover_input,
    require_target,
)
from .running import check_device, settle, settle_at_rest

PROGRAM = "python -m convert_to_quant.calibrate_activation_scales"
DESCRIPTION = "Measure the input scale of every FP8 layer and write a calibrated checkpoint."
EPILOG = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command as a program of its own; see `cli.main`."""
    return cli.main(arguments, "calibrate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("input", metavar="MODEL", help="FP8 checkpoint")
    add_target_arguments(parser)
    add_calibration_arguments(parser.add_argument_group("calibration"), "")


def run(args: argparse.Namespace) -> int:
    """Calibrate the file."""
    from ..checkpoint import open_checkpoint
    from ..lora import open_loras
    from .convert import calibrate_file

    args.actcal = True
    require_target(args)
    options_of(CalibrationOptions, args)  # says what is out of range
    check_device(args.device)
    recover_input(args)
    with open_checkpoint(args.input) as checkpoint, open_loras(args.lora) as adapters:
        note_damage(checkpoint)
        if args.engine != "layer":
            settle(args, checkpoint)
        else:
            settle_at_rest(args)
        return calibrate_file(checkpoint, args, adapters)
