"""`convert_to_quant apply MODEL STATS...`: choose scales from what was observed, and write them into the checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import OptionError
from .calibration import check_written_files, recover_input
from .patching import add_patching_arguments, check_target, finish

DESCRIPTION = "Choose the scale and precision of every FP8 layer from statistics, and write them into the checkpoint."
EPILOG = """\
examples:
  convert_to_quant apply flux_fp8.safetensors stats.safetensors -o flux_fp8_calibrated.safetensors
  convert_to_quant apply flux_fp8.safetensors monday.safetensors tuesday.safetensors --in-place -v
  convert_to_quant apply flux_fp8.safetensors stats.safetensors -o out.safetensors --full-precision-budget 0.05
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("input", metavar="MODEL", help="an FP8 checkpoint")
    parser.add_argument("statistics", nargs="+", metavar="STATS", help="statistics files; several are merged")
    add_patching_arguments(parser)
    solving = parser.add_argument_group("solving")
    solving.add_argument("--method", choices=("absmax", "mse", "percentile"), default="absmax",
                         help="largest value seen, least squared error, or a percentile (absmax)")  # fmt: skip
    solving.add_argument("--percentile", type=float, default=99.9, metavar="P", help="for that method (99.9)")
    solving.add_argument("--margin", type=float, default=1.0, metavar="M", help="factor on ranges (1)")
    solving.add_argument("--full-precision-budget", type=float, default=0.0, metavar="SHARE",
                         help="share of the multiply-adds that may move to full precision (0)")  # fmt: skip
    solving.add_argument("--row-loss-limit", type=float, default=0.01, metavar="SHARE",
                         help="a layer that would lose more of its rows computes in full precision (0.01)")  # fmt: skip
    solving.add_argument("--keep", action="append", default=[], metavar="REGEX",
                         help="leave layers alone in which this is found; may be repeated")  # fmt: skip
    solving.add_argument("--float16-safe", action="store_true", help="no scale below 2⁻¹⁵")
    solving.add_argument("--force", action="store_true", help="use the layers that match, if not all do")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..calibrate_activation_scales import apply_statistics
    from ..checkpoint import open_checkpoint
    from ..solve import SolveOptions
    from ..stats import Statistics, merge

    if args.output is None and not (args.in_place or args.dry_run):
        raise OptionError("name the new file with -o OUT", hint="or --in-place, or --dry-run")
    options = SolveOptions(
        method=args.method,
        margin=args.margin,
        percentile=args.percentile,
        float16_safe=args.float16_safe,
        row_loss_limit=args.row_loss_limit,
        full_precision_budget=args.full_precision_budget,
        keep=tuple(args.keep),
    )
    recover_input(args)
    statistics = merge(*(Statistics.load(path) for path in args.statistics), force=args.force)
    with open_checkpoint(args.input) as checkpoint:
        check_target(checkpoint, args)
        check_written_files(checkpoint, args, [Path(path) for path in args.statistics])
        calibration = apply_statistics(checkpoint, statistics, options, force=args.force)
        return finish(checkpoint, calibration, args)
