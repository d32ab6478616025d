"""`convert_to_quant merge STATS... -o OUT`: several statistics files as one."""

from __future__ import annotations

import argparse

from .output import note, say

DESCRIPTION = "Merge statistics of the same model: maxima and sums, the same in any order."
EPILOG = """\
example:
  convert_to_quant merge portraits.safetensors landscapes.safetensors -o all.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("statistics", nargs="+", metavar="STATS", help="statistics files")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the merged file")
    parser.add_argument("--force", action="store_true", help="keep the layers that all files share")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from pathlib import Path

    from ..checkpoint import refuse_same_file
    from ..stats import Statistics, merge

    refuse_same_file(Path(args.output), [Path(path) for path in args.statistics])
    merged = merge(*(Statistics.load(path) for path in args.statistics), force=args.force)
    merged.save(args.output)
    if not args.quiet:
        for name in merged.left_out:
            note(f"left out: {name}")
        say(
            f"merged {len(args.statistics)} files, {merged.samples} samples, {len(merged.layers)} layers: {args.output}"
        )
    return 0
