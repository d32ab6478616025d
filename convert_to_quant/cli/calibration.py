"""Options, messages and outputs of calibration, shared by the commands that calibrate a checkpoint."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..options import CalibrationOptions, add_options, options_of
from ..telling import duration, plural, size
from .output import decibels, note, print_table, progress_bar, say, seconds_taken, write_json, wrote
from .running import check_device
from .terminal import Styled

if TYPE_CHECKING:
    from ..calibrate_activation_scales import Calibration
    from ..checkpoint import Checkpoint, CheckpointWriter
    from ..lora import Lora
    from ..solve import LayerResult


FULL_PRECISION = Styled("full precision", "good")
"""Replaces the SQNR of layers whose inputs are not quantized."""

READ_AS_SAFETENSORS = (".safetensors", ".sft", ".safetensors.index.json")
"""Suffixes that ComfyUI reads as safetensors (`comfy.utils.load_torch_file`), and that of an index."""

ENGINES = {
    "model": "running the model on noise",
    "layer": "guessing from the weights",
    "statistics": "recorded statistics",
}


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the output."""
    target = parser.add_argument_group("output")
    target.add_argument("-o", "--output", metavar="OUT", help="new file")
    target.add_argument("--in-place", action="store_true", help="write input scales into MODEL itself")
    target.add_argument("--enable-fp8-matmul", action="store_true",
                        help="replace a legacy marker that disables FP8")  # fmt: skip


def add_calibration_arguments(group: Any, prefix: str) -> None:
    """Add the options of calibration; those with values get the prefix ("actcal-" or nothing)."""
    group.add_argument(f"--{prefix}lora", dest="lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                       help="apply a LoRA while calibrating; repeatable")  # fmt: skip
    add_options(group, CalibrationOptions, prefix)
    group.add_argument("--mark", action="store_true", help="add missing quantization configs")


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[tuple[Checkpoint, Sequence[Lora]]]:
    """Check the options, and open the model and the LoRAs to calibrate with."""
    from ..checkpoint import open_checkpoint
    from ..damaged import refuse_damaged
    from ..layers import find_layers
    from ..lora import open_loras

    require_target(args)
    if args.actcal:
        options_of(CalibrationOptions, args)  # checks the ranges
    check_device(args.device)
    recover_input(args)
    with open_checkpoint(args.input) as checkpoint, open_loras(args.lora) as adapters:
        note(*refuse_damaged(checkpoint, find_layers(checkpoint)))
        yield checkpoint, adapters


def recover_input(args: argparse.Namespace) -> None:
    """Undo an interrupted in-place change if the input will be changed in place.

    Otherwise the input is left alone, and opening it reports the interruption.
    """
    from ..patch import recover

    if args.in_place and not args.dry_run and recover(Path(args.input)):
        note(f"{args.input}: an interrupted in-place change was undone")


def require_target(args: argparse.Namespace) -> None:
    """Refuse a call without an output or with two, or --mark without a new file."""
    from ..checkpoint import is_one_file

    if args.output is None and not (args.in_place or args.dry_run):
        raise OptionError("no output: add -o OUT", hint="or --in-place, or --dry-run")
    if args.in_place and args.output is not None and not is_one_file(Path(args.output), Path(args.input)):
        raise OptionError(f"--in-place changes {args.input}, but -o names {args.output}; give one")
    if getattr(args, "mark", False) and args.in_place:
        raise OptionError("--mark needs -o OUT: quantization configs cannot be added in place")


def calibrate(checkpoint: Checkpoint, args: argparse.Namespace, adapters: Sequence[Lora]) -> Calibration:
    """Calibrate with a progress bar."""
    from ..calibrate_activation_scales import calibrate_model

    options = options_of(CalibrationOptions, args)
    with progress_bar("calibrating") as progress:
        return calibrate_model(checkpoint, options, loras=adapters, progress=progress)


def calibrate_output(
    checkpoint: Checkpoint, args: argparse.Namespace, adapters: Sequence[Lora]
) -> Callable[[CheckpointWriter], None]:
    """A function that calibrates a new file, which has places for scales, before it is renamed to its final name."""
    from ..calibrate_activation_scales import calibrate_written

    def finishing(writer: CheckpointWriter) -> None:
        found, patch = calibrate_written(writer, checkpoint.path, lambda made: calibrate(made, args, adapters))
        tell(found, args)
        note(*patch.notes)

    return finishing


def tell(calibration: Calibration, args: argparse.Namespace) -> None:
    """Print the summary, with -v the table, and write the document of --json."""
    note(*calibration.notes)
    say(summary(calibration))
    if args.verbose:
        print_calibration(calibration.results, talk=args.json == "-")
    write_json(args.json, calibration.to_json())


def finish(checkpoint: Checkpoint, calibration: Calibration, args: argparse.Namespace) -> int:
    """Print a calibration and write it into a new file or in place. A dry run only plans it."""
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
        say(f"{target} already has these scales; nothing was written")
    else:
        if not args.in_place:
            rewrite(patch, target)
        say(wrote(target))
    note_unmarked(checkpoint, target, args)
    if not (args.in_place or args.dry_run):
        say_totals(checkpoint, target)
    return 0


def say_totals(checkpoint: Checkpoint, output: Path) -> None:
    """Print the size before and after, and the command's duration; warn about an unusual suffix."""
    from ..checkpoint import open_checkpoint

    note_ending(output)
    with open_checkpoint(output) as written:
        before, after = (size(one.size_bytes) for one in (checkpoint, written))
    say(f"{before} → {after} in {duration(seconds_taken())}")


def note_unmarked(checkpoint: Checkpoint, target: Path, args: argparse.Namespace) -> None:
    """Warn about layers without a quantization config: ComfyUI ignores their scales."""
    from ..layers import find_layers

    count = sum(layer.marking == "none" for layer in find_layers(checkpoint).diffusion.values())
    if count:
        elsewhere = f"convert_to_quant migrate {shlex.quote(str(target))} -o NEW --to comfy"
        adds = "--mark" if hasattr(args, "mark") and not args.in_place else elsewhere
        layers = plural(count, "layer")
        note(f"ComfyUI ignores the scales of {layers} without a quantization config (to add configs: {adds})")


def note_ending(path: Path) -> None:
    """Warn about a name that ComfyUI does not read as safetensors."""
    if not path.name.lower().endswith(READ_AS_SAFETENSORS):
        note(f"ComfyUI does not read {path.name} as safetensors, because of its suffix")


def summary(calibration: Calibration) -> str:
    """The number of layers, the engine and the range of scales in one line."""
    scales = calibration.scales
    text = f"calibrated {len(scales)} of {len(calibration.results)} layers by {ENGINES[calibration.engine]}"
    if scales:
        text += f": scales {min(scales.values()):.3g} to {max(scales.values()):.3g}"
    full = sum(result.full_precision_after for result in calibration.results)
    return text + (f", {full} in full precision" if full else "")


def print_calibration(results: Sequence[LayerResult], *, talk: bool = False) -> None:
    """Print range, scales, SQNR and losses of every layer."""
    print_table(
        ("layer", "range", "scale before", "scale after", "SQNR before", "SQNR after", "clipped", "vanished",
         "tokens lost", "source", "reason"),
        [
            (
                result.layer,
                *(_number(value) for value in (result.range, result.scale_before, result.scale_after)),
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
    """The shares before and after; "-" for full precision."""
    then = "-" if result.full_precision_before else _share(before)
    now = "-" if result.full_precision_after else _share(after)
    return "-" if then == now == "-" else f"{then} > {now}"
