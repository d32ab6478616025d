"""`convert_to_quant demo`: make five files of the embedded emoji model and generate images with each."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .output import decibels, foresee, print_table, progress_bar, say, write_json, wrote

DESCRIPTION = """\
Convert the package's small text-to-image model to FP8, calibrate it, find the best mixes of formats, generate images
with each file, and report how close each stays to the original: as trained, and with the activation ranges of large
models. Takes a minute or two on two cores and 160 MB."""
EPILOG = """\
examples:
  convert_to_quant demo
  convert_to_quant demo -o somewhere/else --json report.json
  convert_to_quant check demo/plain_bf16.safetensors \\
      demo/plain_fp8_calibrated.safetensors \\
      --conditioning demo/prompts.safetensors \\
      --height 128 --width 128 --steps 8 --guidance 2

Results are the SQNR of the predicted velocity in dB. Higher is better: 30 is good, 10 is ruin. The folder then
contains the image and all models of the table.
The demo measures on 4 prompts; the check above, on the 48 in demo/prompts.safetensors, gives the README's number.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("-o", "--output", metavar="FOLDER", default="demo", help="folder for its files (demo)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    # GNU OpenMP threads that busy-wait slow a machine with other work down up to four times; those that sleep at once
    # leave the second of two cores idle. A short wait costs a fifth if two demos run, and saves a sixth if one does
    # (2026-11-27). Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    folder = Path(args.output)
    if args.dry_run:
        say(f"dry run: would write the image and the models into {folder}; nothing was written")
        write_json(args.json, {"folder": str(folder), "dry_run": True})
        return 0
    say("making five files of three variants of the emoji model and generating images with each; a minute or two")
    with progress_bar("demo") as progress:
        from .. import demo

        foresee([folder / demo.PICTURE], dry=True)
        found = demo.run(folder, progress=progress)
    if args.json != "-":
        sizes = demo.sizes(found.rows)
        print_table(
            ("model", "", "size", *(row.variant for row in found.rows)),
            [
                (way.name, " ".join(way.explanation.split()), sizes[key],
                 *(decibels(row.fidelity[key].sqnr_db) for row in found.rows))
                for key, way in demo.WAYS.items()
            ],
            right=range(2, len(found.rows) + 3),
        )  # fmt: skip
    write_json(args.json, found.to_json())
    options = found.options
    shown = f"{len(options.names)} prompts at {options.steps} noise levels"
    say(f"dB: how close each file stays to the original, on {shown}; 30 is close, 10 is ruin")
    say("hot, cold: the same model with much larger, much smaller layer inputs")
    say(f"{wrote(found.picture)} and the models beside it; {found.seconds:.0f} s")
    return 0
