"""`convert_to_quant lora fold LORA --like FILE -o OUT`: convert a LoRA for a checkpoint made with --fold."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..telling import advance
from .calibration import note_ending
from .output import progress_bar, say, write_json, wrote

DESCRIPTION = "Convert LoRAs for checkpoints made with --fold."
FOLD = """\
Scale a LoRA exactly as the channels of a folded checkpoint are scaled, so that it has the same effect there as on the
original."""
EPILOG = """\
example:
  convert_to_quant lora fold style.safetensors --like flux_folded.safetensors \\
      -o style_folded.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    one = actions.add_parser("fold", help="scale a LoRA for a folded checkpoint", description=FOLD, epilog=EPILOG)
    one.add_argument("lora", metavar="LORA", help="LoRA for the original")
    one.add_argument("--like", required=True, metavar="FILE", help="folded checkpoint")
    one.add_argument("-o", "--output", required=True, metavar="OUT", help="new LoRA")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..checkpoint import open_checkpoint
    from ..folding import fold_lora
    from ..lora import load_lora

    output = Path(args.output)
    lora = load_lora(args.lora)
    with lora.checkpoint, open_checkpoint(args.like) as like, progress_bar("writing", unit="bytes") as progress:
        total = sum(info.nbytes for info in lora.checkpoint.tensors.values())
        done = fold_lora(lora, like, None if args.dry_run else output, progress=advance(progress, total))
    say(f"dry run: {done}; nothing was written" if args.dry_run else f"{done}; {wrote(output)}")
    if not args.dry_run:
        note_ending(output)
    write_json(args.json, {"done": done})
    return 0
