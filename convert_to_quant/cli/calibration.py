"""How calibration options are asked for, and how a calibration is told; shared by the commands that calibrate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import CalibrationOptions, add_options
from .output import decibels, note, print_table, progress_bar, say, write_json

if TYPE_CHECKING:
    from ..calibrate_activation_scales import Calibration
    from ..checkpoint import Checkpoint
    from ..lora import Lora
    from ..solve import LayerResult


def add_calibration_arguments(group: Any, prefix: str) -> None:
    """The options of a calibration, each that takes a value behind a prefix ("actcal-" or nothing)."""
    group.add_argument(f"--{prefix}lora", dest="lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                       help="adapter to be used with it; may be repeated")  # fmt: skip
    add_options(group, CalibrationOptions, prefix)


def recover_input(args: argparse.Namespace) -> None:
    """Put back what an interrupted change in place left half done, where the input will be changed in place.

    Everything else leaves the input as it is; opening it says what is wrong with it.

    Raises:
        OutputError: the undo file is damaged or belongs to another file.
    """
    from ..patch import recover

    if args.in_place and not args.dry_run and recover(Path(args.input)):
        note(f"{args.input}: an interrupted change in place was undone")


def adapter_files(args: argparse.Namespace) -> list[Path]:
    """The adapters that were asked for."""
    from ..lora import split_strength

    return [Path(split_strength(text)[0]) for text in args.lora]


def check_written_files(checkpoint: Checkpoint, args: argparse.Namespace, others: Sequence[Path]) -> None:
    """Refuse, before any work, outputs that cannot be written or would replace what is read.

    That reports are no other file of the call has been checked already (`shared.check_reports`); here are the shards,
    which no call names.

    Args:
        checkpoint: the model.
        args: with `output` and `json`.
        others: the further files that are read.

    Raises:
        OutputError: the output is a folder or a special file, has no folder or is one of `others`; the report is a
            shard.
    """
    from ..checkpoint import check_output, refuse_same_file

    if args.output is not None:
        output = Path(args.output)
        refuse_same_file(output, others, hint="name another output")
        check_output(output)
    if args.json not in (None, "-"):
        shards = [file.path for file in checkpoint.files]
        refuse_same_file(Path(args.json), shards, hint="name another file for --json")


def loras_of(args: argparse.Namespace) -> AbstractContextManager[list[Lora]]:
    """The adapters that were asked for, open."""
    from ..lora import open_loras

    return open_loras(args.lora)


def calibrate(checkpoint: Checkpoint, options: CalibrationOptions, adapters: Sequence[Lora]) -> Calibration:
    """Calibrate with a progress bar."""
    from ..calibrate_activation_scales import calibrate_model

    with progress_bar("calibrating") as progress:
        return calibrate_model(checkpoint, options, loras=adapters, progress=progress)


def tell(calibration: Calibration, args: argparse.Namespace) -> None:
    """Say what a calibration found: a summary, with -v the table, with --json the document."""
    for text in calibration.notes:
        note(text)
    say(summary(calibration))
    if args.verbose:
        print_calibration(calibration.results, talk=args.json == "-")
    if args.json:
        write_json(args.json, calibration.to_json())


def summary(calibration: Calibration) -> str:
    """One line: how many layers, by which engine, over which scales."""
    scales = calibration.scales
    how = {
        "model": "running the model on noise",
        "layer": "guessing from the weights",
        "statistics": "what was observed",
    }[calibration.engine]
    text = f"calibrated {len(scales)} of {len(calibration.results)} FP8 layers by {how}"
    if scales:
        text += f": scales {min(scales.values()):.3g} to {max(scales.values()):.3g}"
    full = sum(result.full_precision_after for result in calibration.results)
    return text + (f", {full} in full precision" if full else "")


def print_calibration(results: Sequence[LayerResult], *, talk: bool = False) -> None:
    """Old scale, new scale, source and range of every layer; see `print_table`."""
    print_table(
        (
            "layer",
            "range",
            "scale before",
            "scale after",
            "SQNR before",
            "SQNR after",
            "clipped",
            "vanished",
            "rows lost",
            "source",
            "why",
        ),
        [
            (
                result.layer,
                _number(result.range),
                _number(result.scale_before),
                _number(result.scale_after),
                decibels(result.sqnr_before_db),
                decibels(result.sqnr_after_db),
                _shares(result.clipped_before, result.clipped_after),
                _shares(result.vanished_before, result.vanished_after),
                _share(result.rows_lost),
                result.source,
                result.reason + (" (depends on the conditioning)" if result.conditioning_dependent else ""),
            )
            for result in results
        ],
        right=(1, 2, 3, 4, 5, 6, 7, 8),
        optional=(10, 7, 6, 1, 9, 8, 4, 5),
        talk=talk,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _shares(before: float | None, after: float | None) -> str:
    return "-" if before is None else f"{_share(before)} > {_share(after)}"
