"""`convert_to_quant migrate MODEL -o OUT --to TARGET`: the same weights with configs in another convention."""

from __future__ import annotations

import argparse

from ..names import TARGETS
from .dequantize import write_layout
from .output import note

DESCRIPTION = "Rewrite quantization configs in another convention. The weights do not change."
EPILOG = """\
examples:
  convert_to_quant migrate theirs.safetensors -o mine.safetensors --to comfy
  convert_to_quant migrate flux_fp8.safetensors -o new.safetensors --to header

targets:
  comfy      comfy_quant tensors and header entry; any format
  header     header entry only; any format
  legacy     scaled_fp8 marker; FP8 with one scale per tensor
  diffusers  no config (diffusers 0.42); FP8 with one scale per tensor or row
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("input", metavar="MODEL", help="checkpoint, or the index of its shards")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="new file, or a new index for shards")
    parser.add_argument("--to", required=True, choices=TARGETS, metavar="TARGET",
                        help="convention to write; see below")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..checkpoint import open_checkpoint
    from ..migration import plan_migration

    with open_checkpoint(args.input) as checkpoint:
        layout, done, notes = plan_migration(checkpoint, args.to)
        note(*notes)
        return write_layout(checkpoint, layout, (), done, args)
