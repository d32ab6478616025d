"""`python -m convert_to_quant.calibrate_activation_scales MODEL -o OUT`: the hand-off's own command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..options import CalibrationOptions, options_of
from . import COMMANDS, config, enter, perform
from .calibration import (
    add_calibration_arguments,
    add_target_arguments,
    note_damage,
    recover_input,
    require_target,
)
from .parsing import Parser
from .running import check_device, settle, settle_at_rest
from .shared import add_shared_options

NAME = "calibrate"
"""Of its table in a configuration file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit code.
    """

    def call(words: list[str]) -> int:
        args, parser, names = config.parse(build_parser(), words, NAME, [NAME, *COMMANDS])
        args.actcal = True
        return perform(run, parser, names, args)

    return enter(arguments, call)


def build_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m convert_to_quant.calibrate_activation_scales",
        description="Find the input scale of every FP8 layer of a checkpoint and write it into a new one.",
    )
    parser.add_argument("input", metavar="MODEL", help="an FP8 checkpoint")
    add_target_arguments(parser)
    add_calibration_arguments(parser.add_argument_group("calibration"), "")
    add_shared_options(parser, writes=True)
    return parser


def run(args: argparse.Namespace) -> int:
    """Calibrate the file."""
    from ..checkpoint import open_checkpoint
    from ..lora import open_loras
    from .convert import calibrate_file

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
