"""`convert_to_quant dequantize MODEL -o OUT`: convert quantized layers to BF16."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..telling import advance
from .calibration import say_totals
from .output import progress_bar, say, write_json, wrote

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint, CheckpointWriter
    from ..layout import Job, Layout

DESCRIPTION = "Convert quantized layers to BF16. This does not restore precision lost to rounding."
EPILOG = """\
examples:
  convert_to_quant dequantize flux_fp8.safetensors -o flux_bf16.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("input", metavar="MODEL", help="checkpoint, or the index of its shards")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="new file, or a new index for shards")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..checkpoint import open_checkpoint
    from ..migration import plan_bfloat16

    with open_checkpoint(args.input) as checkpoint:
        layout, jobs, done = plan_bfloat16(checkpoint)
        return write_layout(checkpoint, layout, jobs, done, args)


def write_layout(
    checkpoint: Checkpoint,
    layout: Layout,
    jobs: Sequence[Job],
    done: str,
    args: argparse.Namespace,
    *,
    before_commit: Callable[[CheckpointWriter], None] | None = None,
) -> int:
    """Write a layout, or with --dry-run say so, and write the document of --json."""
    from ..layout import write

    output = Path(args.output)
    if args.dry_run:
        say(f"dry run: {done}; {wrote(output, would=True)}; nothing was written")
    else:
        with progress_bar("writing", unit="bytes") as progress:
            total = sum(info.nbytes for info in checkpoint.tensors.values())
            write(checkpoint, layout, output, jobs, progress=advance(progress, total), before_commit=before_commit)
        say(f"{done}; {wrote(output)}")
        say_totals(checkpoint, output)
    if before_commit is None:  # calibration writes its own
        write_json(args.json, {"done": done, "tensors": len(layout.specs)})
    return 0
