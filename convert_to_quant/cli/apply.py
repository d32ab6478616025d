"""`convert_to_quant apply MODEL STATS...`: set input scales and precision from statistics."""

from __future__ import annotations

import argparse

from ..errors import OptionError
from ..options import SolveOptions, add_options, options_of
from .calibration import add_target_arguments, finish, recover_input, require_target
from .merge import load_distinct

DESCRIPTION = "Set the input scale and precision of every FP8 layer from statistics."
EPILOG = """\
examples:
  convert_to_quant apply fp8.safetensors stats.safetensors -o new.safetensors
  convert_to_quant apply fp8.safetensors a.safetensors b.safetensors --in-place
  convert_to_quant apply fp8.safetensors stats.safetensors --dry-run -v

With --full-precision-budget 0.05 the worst layers compute in full precision, up to 5 % of the compute (MACs).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("input", metavar="MODEL", help="FP8 checkpoint")
    parser.add_argument("statistics", nargs="+", metavar="STATS", help="statistics files, merged if several")
    add_target_arguments(parser)
    solving = parser.add_argument_group("choice of scales")
    add_options(solving, SolveOptions)
    solving.add_argument("--force", action="store_true", help="ignore layers that do not match")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..calibrate_activation_scales import apply_statistics
    from ..checkpoint import open_checkpoint
    from ..stats import METADATA_KEY, merge

    require_target(args)
    options = options_of(SolveOptions, args)
    recover_input(args)
    with open_checkpoint(args.input) as checkpoint:
        if METADATA_KEY in checkpoint.metadata:
            hint = f"convert_to_quant apply {args.statistics[0]} {args.input} ..."
            raise OptionError(f"{args.input} contains statistics, but the model comes first", hint=hint)
        statistics = merge(*load_distinct(args.statistics), force=args.force)
        calibration = apply_statistics(checkpoint, statistics, options, force=args.force)
        return finish(checkpoint, calibration, args)
