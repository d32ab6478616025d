"""How the choice of scales is asked for; shared by the commands that solve statistics."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..solve import SolveOptions


def add_solving_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How scales and precisions are chosen from statistics.

    Returns:
        The group, for further flags.
    """
    group = parser.add_argument_group("solving")
    group.add_argument("--method", choices=("absmax", "mse", "percentile"), default="absmax",
                       metavar="METHOD",
                       help="absmax, mse or percentile (absmax)")  # fmt: skip
    group.add_argument("--percentile", type=float, default=99.9, metavar="P", help="for that method (99.9)")
    group.add_argument("--margin", type=float, metavar="M",
                       help="factor on ranges (as much as costs nothing)")  # fmt: skip
    group.add_argument("--full-precision-budget", type=float, default=0.0, metavar="SHARE",
                       help="multiply-adds for full precision (0)")  # fmt: skip
    group.add_argument("--row-loss-limit", type=float, default=0.01, metavar="SHARE",
                       help="full precision where more rows vanish (0.01)")  # fmt: skip
    group.add_argument("--keep", action="append", default=[], metavar="REGEX",
                       help="leave such layers alone; may be repeated")  # fmt: skip
    group.add_argument("--float16-safe", action="store_true", help="no scale below 2⁻¹⁵")
    return group


def solve_options_of(args: argparse.Namespace) -> SolveOptions:
    """The options that were asked for.

    Raises:
        OptionError: one is out of range.
    """
    from ..solve import SolveOptions

    return SolveOptions(
        method=args.method,
        margin=args.margin,
        percentile=args.percentile,
        float16_safe=args.float16_safe,
        row_loss_limit=args.row_loss_limit,
        full_precision_budget=args.full_precision_budget,
        keep=tuple(args.keep),
    )
