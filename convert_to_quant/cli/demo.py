"""`convert_to_quant demo`: convert, calibrate and check the embedded emoji model, and paint with it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .output import print_table, progress_bar, say, write_json

DESCRIPTION = """\
Convert and calibrate a small text-to-image model that comes with this package, paint with it, and say how much of it
FP8 keeps: as it was trained, and with the activation ranges of large models. Takes about a minute on two cores."""
EPILOG = """\
The figures are the SQNR of the predicted velocity in dB, higher is better, 30 is good, 10 is ruin. The folder then
has the picture and every model that was run, each in BF16, in FP8 with an input scale of 1.0, and in FP8 calibrated.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("-o", "--output", metavar="FOLDER", default="demo", help="where files go (./demo)")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON (- for stdout, instead of the table)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print the table only")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    # Threads that wait in a busy loop slow a machine with other work down: measured 40 s for a part that takes more
    # than 150 s otherwise, on two shared cores (2026-11-22). Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = Path(args.output)
    if not args.quiet:
        say("converting, calibrating and running the embedded emoji model as three files; about a minute")
    with progress_bar("demo", quiet=args.quiet) as progress:
        from .. import demo

        found = demo.run(folder, progress=lambda done, total: progress(round(done), round(total)))
    if args.json != "-":
        print_table(
            ("model", *(heading.name for heading in demo.COLUMNS.values())),
            [
                (row.variant, *(f"{row.fidelity[column].sqnr_db:.1f} dB" for column in demo.COLUMNS))
                for row in found.rows
            ],
            right=range(1, len(demo.COLUMNS) + 1),
        )
    if args.json:
        write_json(args.json, found.to_json())
    if not args.quiet:
        say(f"wrote {found.picture} and the models beside it; {found.seconds:.0f} s")
    return 0
