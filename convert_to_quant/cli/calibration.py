"""How calibration options are asked for, and how a calibration is told; shared by the commands that calibrate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import note, print_table, progress_bar, require_folder, say, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..calibrate_activation_scales import Calibration, CalibrationOptions
    from ..checkpoint import Checkpoint
    from ..lora import Lora
    from ..solve import LayerResult


def add_calibration_arguments(group: Any, prefix: str) -> None:
    """The options of a calibration, each behind a prefix ("actcal-" or nothing)."""

    def add(name: str, **settings: Any) -> None:
        group.add_argument(f"--{prefix}{name}", dest=name.replace("-", "_"), **settings)

    add("engine", choices=("auto", "model", "layer"), default="auto",
        help="run the network on noise (model), simulate each layer (layer), or whichever works (auto)")  # fmt: skip
    add("samples", type=int, default=64, metavar="N", help="inputs shown to the model or to each layer (64)")
    add("percentile", type=float, metavar="P", help="of simulated magnitudes (99.9); real ranges are never cut")
    add("lora", action="append", default=[], metavar="FILE[:STRENGTH]",
        help="adapter that will be used with the model; may be given more than once")  # fmt: skip
    add("seed", type=int, default=42, metavar="S", help="of all noise (42)")
    add("device", default="cpu", metavar="DEVICE", help="where the model runs: cpu, cuda, cuda:1, ... (cpu)")
    add("margin", type=float, metavar="M", help="factor on ranges (1 for what was seen, 8 for what was simulated)")
    add("estimator", choices=("input", "output"), default="input",
        help="of the layer engine; output is the range of X·Wᵀ, kept for comparison")  # fmt: skip


def options_of(args: argparse.Namespace) -> CalibrationOptions:
    """The options that were asked for."""
    from ..calibrate_activation_scales import CalibrationOptions

    return CalibrationOptions(
        engine=args.engine,
        samples=args.samples,
        percentile=args.percentile,
        seed=args.seed,
        device=args.device,
        margin=args.margin,
        estimator=args.estimator,
        float16_safe=args.float16_safe,
    )


def split_strength(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH.

    >>> split_strength("a.safetensors:0.8"), split_strength("C:/a.safetensors")
    (('a.safetensors', 0.8), ('C:/a.safetensors', 1.0))
    """
    path, colon, strength = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return path, float(strength)
        except ValueError:
            return text, 1.0
    return text, 1.0


def recover_input(args: argparse.Namespace) -> None:
    """Put back what an interrupted in-place change of the input left half done; a dry run only says so.

    Raises:
        OutputError: a dry run found such a change, or the undo file is damaged or belongs to another file.
    """
    from ..patch import recover, refuse_unrecovered

    if args.dry_run:
        refuse_unrecovered(Path(args.input))
    elif recover(Path(args.input)) and not args.quiet:
        note(f"{args.input}: an interrupted change in place was undone")


def adapter_files(args: argparse.Namespace) -> list[Path]:
    """The adapters that were asked for."""
    return [Path(split_strength(text)[0]) for text in args.lora]


def check_written_files(checkpoint: Checkpoint, args: argparse.Namespace, others: Sequence[Path]) -> None:
    """Refuse, before any work, what cannot be written, and files that would overwrite each other.

    Args:
        checkpoint: the model.
        args: with `output` and `json`.
        others: the further files that are read.

    Raises:
        OutputError: the output is a folder or one of `others`; the report is the model, the output or one of them, or
            has no folder.
    """
    from ..checkpoint import refuse_same_file
    from ..errors import OutputError

    outputs = [Path(args.output)] if args.output is not None else []
    for output in outputs:
        refuse_same_file(output, others, hint="name another output")
        if output.is_dir():
            raise OutputError("cannot be written: it is a folder", path=output)
    if args.json in (None, "-"):
        return
    report = Path(args.json)
    inputs = [checkpoint.path, *(file.path for file in checkpoint.files), *others]
    refuse_same_file(report, inputs, hint="name another file for --json")
    if any(report.resolve() == output.resolve() for output in outputs):
        raise OutputError("--json and -o are the same file", path=report)
    require_folder(report)


@contextmanager
def loras_of(args: argparse.Namespace) -> Iterator[list[Lora]]:
    """The adapters that were asked for, open."""
    from ..calibrate_activation_scales import load_lora_tensors

    opened: list[Lora] = []
    try:
        for text in args.lora:
            path, strength = split_strength(text)
            opened.append(load_lora_tensors(path, strength))
        yield opened
    finally:
        for adapter in opened:
            adapter.checkpoint.close()


def calibrate(
    checkpoint: Checkpoint, args: argparse.Namespace, options: CalibrationOptions, adapters: Sequence[Lora]
) -> Calibration:
    """Calibrate with a progress bar."""
    from ..calibrate_activation_scales import calibrate_model

    with progress_bar("calibrating", quiet=args.quiet) as progress:
        return calibrate_model(checkpoint, options, loras=adapters, progress=progress)


def tell(calibration: Calibration, args: argparse.Namespace) -> None:
    """Say what a calibration found: a summary, with -v the table, with --json the document."""
    if not args.quiet:
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
        "layer": "simulating each layer",
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
                _decibels(result.sqnr_before_db),
                _decibels(result.sqnr_after_db),
                _shares(result.clipped_before, result.clipped_after),
                _shares(result.vanished_before, result.vanished_after),
                _share(result.rows_lost),
                result.source,
                result.reason + (" (depends on the conditioning)" if result.conditioning_dependent else ""),
            )
            for result in results
        ],
        right=(1, 2, 3, 4, 5, 6, 7, 8),
        talk=talk,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _shares(before: float | None, after: float | None) -> str:
    return "-" if before is None else f"{_share(before)} > {_share(after)}"
