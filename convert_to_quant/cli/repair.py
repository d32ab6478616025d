"""`convert_to_quant repair MODEL`: repair missing or broken quantization configs, in place or in a new file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..telling import plural
from .calibration import recover_input
from .output import print_table, say, write_json, wrote

DESCRIPTION = """\
Repair missing or broken quantization configs, in place or, with -o, in a new file. Only layers whose tensors identify
their format are changed."""
EPILOG = """\
examples:
  convert_to_quant repair flux_fp8.safetensors --dry-run
  convert_to_quant repair flux_fp8.safetensors -o repaired.safetensors

A config is broken if it is missing, empty, all NUL, not JSON, or names an unknown format.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.usage = "convert_to_quant repair MODEL [-o OUT] [options]"
    parser.add_argument("input", metavar="MODEL", help="checkpoint, or the index of its shards")
    parser.add_argument("-o", "--output", metavar="OUT", help="write a new file instead")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from dataclasses import asdict

    from ..checkpoint import open_checkpoint
    from ..patch import apply_in_place, in_place_edits, rewrite
    from ..repair import plan_repair

    args.in_place = args.output is None
    recover_input(args)
    with open_checkpoint(args.input) as checkpoint:
        repairs, patch = plan_repair(checkpoint, in_place=args.in_place)
        if args.in_place:
            in_place_edits(patch)  # fails before anything is printed if something does not fit
        if repairs:
            cells = [(one.layer, one.found, one.becomes, one.where) for one in repairs]
            print_table(("layer", "found", "repaired to", "location"), cells, optional=(3,), talk=args.json == "-")
        done = f"{plural(len(repairs), 'broken quantization config')} in {checkpoint.path}"
        if args.dry_run or not repairs:
            say(f"{'dry run: ' if args.dry_run else ''}{done}; nothing was written")
        else:
            apply_in_place(patch) if args.in_place else rewrite(patch, Path(args.output))
            say(f"repaired {done}; {wrote(args.output or checkpoint.path)}")
        write_json(args.json, {"repairs": [asdict(one) for one in repairs]})
    return 0
