"""`convert_to_quant migrate MODEL -o OUT --to TARGET`: other marks for the same weights."""

from __future__ import annotations

import argparse

from ..names import TARGETS
from .dequantize import write_layout
from .output import note

DESCRIPTION = "Mark quantized layers in another way. Nothing is rounded: weights stay as they are."
EPILOG = """\
examples:
  convert_to_quant migrate theirs.safetensors -o mine.safetensors --to comfy
  convert_to_quant migrate flux_fp8.safetensors -o new.safetensors --to header

targets:
  comfy      comfy_quant tensors, and a header that agrees; any format
  header     the header alone; any format
  legacy     scaled_fp8; FP8 with one scale per tensor
  diffusers  no mark, read by diffusers 0.42; FP8 with a scale per tensor or row
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("input", metavar="MODEL", help="a quantized checkpoint, or the index of its shards")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the new file, or index for shards")
    parser.add_argument("--to", required=True, choices=TARGETS, metavar="TARGET",
                        help=", ".join(TARGETS))  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..checkpoint import open_checkpoint
    from ..migration import plan_migration

    with open_checkpoint(args.input) as checkpoint:
        layout, done, notes = plan_migration(checkpoint, args.to)
        note(*notes)
        return write_layout(checkpoint, layout, (), done, args)
