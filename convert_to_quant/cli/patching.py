"""How commands that change a checkpoint ask where to, and write it; shared by them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .calibration import tell
from .output import note, say

if TYPE_CHECKING:
    from ..calibrate_activation_scales import Calibration
    from ..checkpoint import Checkpoint


READ_AS_SAFETENSORS = (".safetensors", ".sft", ".safetensors.index.json")
"""How names end that ComfyUI reads as safetensors (`comfy.utils.load_torch_file`), and an index, which others read."""


def add_patching_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and the marker of legacy files."""
    target = parser.add_argument_group("the file")
    target.add_argument("-o", "--output", metavar="OUT", help="the new file")
    target.add_argument("--in-place", action="store_true", help="write the scales into MODEL itself")
    target.add_argument("--enable-fp8-matmul", action="store_true",
                        help="undo a legacy marker that turns FP8 off")  # fmt: skip


def check_target(checkpoint: Checkpoint, args: argparse.Namespace) -> Path | None:
    """Refuse a target that cannot be, before minutes of work and not after.

    Returns:
        The new file, or None where the checkpoint itself is changed (or nothing, in a dry run).

    Raises:
        OutputError: the folder is missing, or the output is the input, a folder or a special file.
        OptionError: in place, and yet another output was named.
    """
    from ..checkpoint import check_output, refuse_same_file
    from ..patch import check_in_place

    output = Path(args.output) if args.output is not None else None
    if args.in_place:
        check_in_place(checkpoint, output)
        return None
    if output is None:
        return None
    refuse_same_file(output, [checkpoint.path], hint="name another output, or add --in-place")
    check_output(output)
    return output


def finish(checkpoint: Checkpoint, calibration: Calibration, args: argparse.Namespace) -> int:
    """Say what a calibration found and, unless this is a dry run, write it."""
    tell(calibration, args)
    if not args.dry_run:
        return write_patch(checkpoint, calibration, args)
    would = plan_dry(checkpoint, calibration, args)
    say(f"dry run: {would}nothing was written")
    return 0


def plan_dry(checkpoint: Checkpoint, calibration: Calibration, args: argparse.Namespace) -> str:
    """What writing a calibration would do, in words; everything is planned, so that what cannot be done shows."""
    from ..calibrate_activation_scales import plan, plan_in_place
    from ..layers import find_layers

    how = plan_in_place if args.in_place else plan
    patch = how(checkpoint, find_layers(checkpoint), calibration, enable_fp8_matmul=args.enable_fp8_matmul)
    for text in patch.notes:
        note(text)
    target = checkpoint.path if args.in_place else args.output
    return "" if target is None else f"would write {len(calibration.scales)} scales into {target}; "


def write_patch(checkpoint: Checkpoint, calibration: Calibration, args: argparse.Namespace) -> int:
    """Write a calibration into the new file, or into the checkpoint itself, and say so."""
    from ..calibrate_activation_scales import patch_model_with_scales, plan_in_place
    from ..layers import find_layers
    from ..patch import apply_in_place

    output = check_target(checkpoint, args)
    if output is None:
        table = find_layers(checkpoint)
        patch = plan_in_place(checkpoint, table, calibration, enable_fp8_matmul=args.enable_fp8_matmul)
        changed = apply_in_place(patch) > 0
    else:
        patch = patch_model_with_scales(checkpoint, calibration, output, enable_fp8_matmul=args.enable_fp8_matmul)
        changed = True
    for text in patch.notes:
        note(text)
    if changed:
        say(f"wrote {output or checkpoint.path}")
        note_ending(output or checkpoint.path)
    else:
        say(f"{checkpoint.path} has these scales already; nothing was written")
    return 0


def note_ending(path: Path) -> None:
    """Say that ComfyUI takes a file for something else, where it does: it goes by how names end."""
    if not path.name.lower().endswith(READ_AS_SAFETENSORS):
        note(f"ComfyUI does not read {path.name} as safetensors; it goes by how a name ends")
