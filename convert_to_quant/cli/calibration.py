"""How calibrations are asked for, told and written; shared by the commands that calibrate a checkpoint."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..options import CalibrationOptions, add_options, options_of
from ..telling import duration, plural, size
from .output import decibels, note, print_table, progress_bar, say, seconds_taken, write_json, wrote
from .shared import check_shards
from .terminal import Styled

if TYPE_CHECKING:
    from ..calibrate_activation_scales import Calibration
    from ..checkpoint import Checkpoint, CheckpointWriter
    from ..lora import Lora
    from ..solve import LayerResult


FULL_PRECISION = Styled("full precision", "good")
"""In place of an SQNR: nothing is lost where inputs are not quantized."""

READ_AS_SAFETENSORS = (".safetensors", ".sft", ".safetensors.index.json")
"""How names end that ComfyUI reads as safetensors (`comfy.utils.load_torch_file`), and an index, which others read."""


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and the marker of legacy files."""
    target = parser.add_argument_group("output")
    target.add_argument("-o", "--output", metavar="OUT", help="new file")
    target.add_argument("--in-place", action="store_true", help="write input scales into MODEL itself")
    target.add_argument("--enable-fp8-matmul", action="store_true",
                        help="replace a legacy marker that disables FP8")  # fmt: skip


def add_calibration_arguments(group: Any, prefix: str) -> None:
    """The options of a calibration, each that takes a value behind a prefix ("actcal-" or nothing)."""
    group.add_argument(f"--{prefix}lora", dest="lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                       help="apply a LoRA while calibrating; repeatable")  # fmt: skip
    add_options(group, CalibrationOptions, prefix)
    group.add_argument("--mark", action="store_true", help="add missing quantization configs")


def recover_input(args: argparse.Namespace) -> None:
    """Put back what an interrupted change in place left half done, where the input will be changed in place.

    Everything else leaves the input as it is; opening it says what is wrong with it.

    Raises:
        OutputError: the undo file is damaged or belongs to another file.
    """
    from ..patch import recover

    if args.in_place and not args.dry_run and recover(Path(args.input)):
        note(f"{args.input}: an interrupted change in place was undone")


def note_damage(checkpoint: Checkpoint) -> None:
    """Refuse a model that lost its weights, and say which weights another one lost; see `damaged`."""
    from ..damaged import refuse_damaged
    from ..layers import find_layers

    note(*refuse_damaged(checkpoint, find_layers(checkpoint)))


def require_target(args: argparse.Namespace) -> None:
    """Refuse a call that names nothing to write, or marks where they have no room.

    Raises:
        OptionError: it does.
    """
    if args.output is None and not (args.in_place or args.dry_run):
        raise OptionError("name the new file with -o OUT", hint="or --in-place, or --dry-run")
    if getattr(args, "mark", False) and (args.in_place or not args.actcal):
        raise OptionError("--mark is for --actcal with -o OUT: marks have no room in place")


def check_target(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Refuse, before minutes of work, a target that the open checkpoint forbids.

    Raises:
        OutputError: an output is one of its shards.
        OptionError: in place, and yet another output was named.
    """
    from ..checkpoint import is_one_file

    check_shards(checkpoint, args)
    if args.in_place and args.output is not None and not is_one_file(Path(args.output), checkpoint.path):
        path = checkpoint.path
        raise OptionError(f"--in-place changes {path}; leave -o out, or drop --in-place to write {args.output}")


def calibrate(checkpoint: Checkpoint, args: argparse.Namespace, adapters: Sequence[Lora]) -> Calibration:
    """Calibrate with a progress bar."""
    from ..calibrate_activation_scales import calibrate_model

    options = options_of(CalibrationOptions, args)
    with progress_bar("calibrating") as progress:
        return calibrate_model(checkpoint, options, loras=adapters, progress=progress)


def calibrate_output(
    checkpoint: Checkpoint, args: argparse.Namespace, adapters: Sequence[Lora]
) -> Callable[[CheckpointWriter], None]:
    """What calibrates a new file before it gets its name, and tells what was found; the file has places for scales."""
    from ..calibrate_activation_scales import calibrate_written

    def finishing(writer: CheckpointWriter) -> None:
        found, patch = calibrate_written(writer, checkpoint.path, lambda made: calibrate(made, args, adapters))
        tell(found, args)
        note(*patch.notes)

    return finishing


def tell(calibration: Calibration, args: argparse.Namespace) -> None:
    """Say what a calibration found: a summary, with -v the table, with --json the document."""
    note(*calibration.notes)
    say(summary(calibration))
    if args.verbose:
        print_calibration(calibration.results, talk=args.json == "-")
    write_json(args.json, calibration.to_json())


def finish(checkpoint: Checkpoint, calibration: Calibration, args: argparse.Namespace) -> int:
    """Say what a calibration found and, unless this is a dry run, write it: into a new file, or the checkpoint itself.

    A dry run plans everything, so that what cannot be done shows.
    """
    from ..calibrate_activation_scales import plan, plan_in_place
    from ..layers import find_layers
    from ..patch import apply_in_place, rewrite

    tell(calibration, args)
    how = plan_in_place if args.in_place else plan
    patch = how(checkpoint, find_layers(checkpoint), calibration, enable_fp8_matmul=args.enable_fp8_matmul)
    target = checkpoint.path if args.in_place else Path(args.output or "")
    note(*patch.notes)
    if args.dry_run:
        would = f"would write {len(calibration.scales)} scales into {target}; " if args.in_place or args.output else ""
        say(f"dry run: {would}nothing was written")
    elif args.in_place and not apply_in_place(patch):
        say(f"{target} has these scales already; nothing was written")
    else:
        if not args.in_place:
            rewrite(patch, target)
        say(wrote(target))
        note_ending(target)
    note_unmarked(checkpoint, target, args)
    if not (args.in_place or args.dry_run):
        say_totals(checkpoint, target)
    return 0


def say_totals(checkpoint: Checkpoint, output: Path) -> None:
    """Say, last of all, what became of the size, and how long the command took."""
    from ..checkpoint import open_checkpoint

    with open_checkpoint(output) as written:
        before, after = (size(one.size_bytes) for one in (checkpoint, written))
    say(f"{before} → {after} in {duration(seconds_taken())}")


def note_unmarked(checkpoint: Checkpoint, target: Path, args: argparse.Namespace) -> None:
    """Say, behind what was written, that ComfyUI drops the scales of layers without a mark, and what adds marks."""
    from ..layers import find_layers

    count = sum(layer.marking == "none" for layer in find_layers(checkpoint).diffusion.values())
    if count:
        elsewhere = f"convert_to_quant migrate {shlex.quote(str(target))} -o NEW --to comfy"
        adds = "--mark" if hasattr(args, "mark") and not args.in_place else elsewhere
        note(f"ComfyUI drops the scales of {plural(count, 'layer')} without a mark ({adds} adds marks)")


def note_ending(path: Path) -> None:
    """Say that ComfyUI takes a file for something else, where it does: it goes by how names end."""
    if not path.name.lower().endswith(READ_AS_SAFETENSORS):
        note(f"ComfyUI does not read {path.name} as safetensors; it goes by how a name ends")


def summary(calibration: Calibration) -> str:
    """One line: how many layers, by which engine, over which scales."""
    scales = calibration.scales
    how = {
        "model": "running the model on noise",
        "layer": "guessing from the weights",
        "statistics": "what was observed",
    }[calibration.engine]
    text = f"calibrated {len(scales)} of {len(calibration.results)} layers by {how}"
    if scales:
        text += f": scales {min(scales.values()):.3g} to {max(scales.values()):.3g}"
    full = sum(result.full_precision_after for result in calibration.results)
    return text + (f", {full} in full precision" if full else "")


def print_calibration(results: Sequence[LayerResult], *, talk: bool = False) -> None:
    """Old scale, new scale, source and range of every layer; see `print_table`."""
    print_table(
        ("layer", "range", "scale before", "scale after", "SQNR before", "SQNR after", "clipped", "vanished",
         "tokens lost", "source", "why"),
        [
            (
                result.layer,
                _number(result.range),
                _number(result.scale_before),
                _number(result.scale_after),
                FULL_PRECISION if result.full_precision_before else decibels(result.sqnr_before_db),
                FULL_PRECISION if result.full_precision_after else decibels(result.sqnr_after_db),
                _shares(result, result.clipped_before, result.clipped_after),
                _shares(result, result.vanished_before, result.vanished_after),
                "-" if result.full_precision_after else _share(result.rows_lost),
                result.source,
                result.reason + (" (depends on the conditioning)" if result.conditioning_dependent else ""),
            )
            for result in results
        ],
        right=(1, 2, 3, 4, 5, 6, 7, 8),
        optional=(4, 2, 7, 6, 1, 9, 8, 5, 3),
        talk=talk,
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _shares(result: LayerResult, before: float | None, after: float | None) -> str:
    """Before and after, as far as the layer's inputs are quantized."""
    then = "-" if result.full_precision_before else _share(before)
    now = "-" if result.full_precision_after else _share(after)
    return "-" if then == now == "-" else f"{then} > {now}"
