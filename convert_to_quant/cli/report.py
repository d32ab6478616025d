"""`convert_to_quant report STATS [MODEL]`: what calibration would change, as a page, image, table, or text."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import OptionError
from ..options import SolveOptions, add_options, options_of
from ..telling import size
from .output import decibels, print_table, say, write_json, wrote
from .parsing import Parser, flag_spelling
from .terminal import Styled, fitted, paint, printable, text_width

if TYPE_CHECKING:
    from ..report.document import Report, State
    from ..report.figures import Source
    from ..stats import Statistics

DESCRIPTION = (
    "Show what calibration would change, and why: layers at risk at their current scales, the inputs of every layer "
    "over the range of FP8 before and after, and layers that need full precision. Or compare two files."
)
EPILOG = """\
examples:
  convert_to_quant report stats.safetensors flux_fp8.safetensors -o report.html
  convert_to_quant report stats.safetensors --png report.png --csv report.csv
  convert_to_quant report faces.safetensors with_lora.safetensors -o both.html
  convert_to_quant report stats.safetensors --against "margin=2 keep=mlp"

Two statistics files: does calibration on the first fit the second? Two checkpoints: their scales side by side. With two
of each, the first statistics belong to the first checkpoint. Without an output, prints the verdict.
"""

LEVEL_STYLES = {"good": "good", "warning": "warn", "bad": "bad"}
STDOUT = "-"
OTHER_OUTPUTS = {".png": "--png", ".csv": "--csv", ".json": "--json"}
"""Extensions of other outputs, which `-o` refuses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.usage = f"{parser.prog} STATS... [MODEL...] [options]"
    parser.add_argument("files", nargs="+", metavar="STATS",
                        help="statistics and FP8 files, up to two of each")  # fmt: skip
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument("-o", "--output", metavar="FILE", help="interactive page (HTML)")
    outputs.add_argument("--png", metavar="FILE", help="image for sharing")
    outputs.add_argument("--csv", metavar="FILE", help="table with one line per layer (- for stdout)")
    comparing = parser.add_argument_group("comparing")
    comparing.add_argument("--against", metavar="OPTIONS", help='compare with other options: "margin=2 keep=mlp"')
    comparing.add_argument("--merge", action="store_true", help="merge the statistics files")
    solving = parser.add_argument_group("choice of scales")
    add_options(solving, SolveOptions)
    solving.add_argument("--force", action="store_true", help="ignore layers that do not match")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    options = options_of(SolveOptions, args)
    check_outputs(args)
    statistics, models = read_inputs(args)
    sources = sides_of(statistics, models, args, options)

    from ..checkpoint import write_bytes
    from ..report import figures

    asked = {"files": [Path(name).name for name in args.files], "against": args.against, "merge": args.merge,
             "force": args.force}  # fmt: skip
    report = figures.build(*sources, force=args.force, options=asked)
    outputs = outputs_of(report, args)
    tell(report, args)
    for place, content in outputs.items():
        if args.dry_run:
            say(f"dry run: {wrote(place, would=True)} ({size(len(content))}); nothing was written")
        else:
            write_bytes(Path(place), content, stream=place == args.csv)
            say(wrote(place))
    return 0


def read_inputs(args: argparse.Namespace) -> tuple[list[Statistics], list[Path]]:
    """Separate statistics files from checkpoints by their content.

    Returns:
        The loaded statistics, and the paths of checkpoints.

    Raises:
        CheckpointError: a file cannot be read.
        OutputError: an output is a shard of an input.
        StatisticsError: a statistics file is damaged.
    """
    from ..checkpoint import open_checkpoint
    from ..stats import METADATA_KEY, Statistics

    statistics, models = [], []
    for name in args.files:
        with open_checkpoint(name) as checkpoint:
            observed = METADATA_KEY in checkpoint.metadata
        if observed:
            statistics.append(Statistics.load(name))
        else:
            models.append(Path(name))
    return statistics, models


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse outputs that do not match their names.

    Raises:
        OptionError: a binary file or two outputs would go to stdout, or the page has another extension.
    """
    for flag, place in (("-o", args.output), ("--png", args.png)):
        if place == STDOUT:
            raise OptionError(f"{flag} needs a file", hint="only --csv and --json can write to stdout (-)")
    meant = OTHER_OUTPUTS.get(Path(args.output or "").suffix.lower())
    if meant is not None:
        raise OptionError(f"-o writes HTML, found {args.output}", hint=f"use {meant} {args.output}")
    if [args.csv, args.json] == [STDOUT, STDOUT]:
        raise OptionError("--csv and --json cannot both write to stdout", hint="write one to a file")


def sides_of(
    statistics: list[Statistics], models: list[Path], args: argparse.Namespace, options: SolveOptions
) -> list[Source]:
    """The side to show, or the two to compare.

    Raises:
        OptionError: too many files, or nothing to show.
        StatisticsError: statistics cannot be merged.
    """
    from ..report.figures import Source
    from ..stats import merge
    from ..trials import Trials

    files: tuple[str, ...] = ()
    trials = [None if one.path is None else Trials.load(one.path) for one in statistics]
    if args.merge and statistics:
        files = tuple(one.path.name for one in statistics if one.path is not None)
        statistics = [merge(*statistics, force=args.force)]
        tried = [one for one in trials if one is not None]
        trials = [reduce(Trials.plus, tried) if tried else None]
    if len(statistics) > 2:
        raise OptionError(f"expected at most two statistics files, found {len(statistics)}", hint="--merge merges them")
    if len(models) > 2:
        raise OptionError(f"expected at most two checkpoints, found {len(models)}")
    if not statistics and len(models) == 1 and not is_mix(models[0]):
        raise OptionError(
            f"no statistics of the layer inputs of {models[0].name}",
            hint=f"convert_to_quant observe {models[0].name} -o stats.safetensors, or add a second checkpoint",
        )
    chosen = [options]
    if args.against is not None:
        if len(statistics) != 1 or len(models) > 1:
            raise OptionError("--against needs one statistics file (or --merge) and at most one checkpoint")
        chosen.append(other_options(args))

    sides: dict[str, list[Any]] = {"statistics": statistics, "model": models, "options": chosen, "trials": trials}
    return [
        Source(files=files, **{name: given[min(number, len(given) - 1)] for name, given in sides.items() if given})
        for number in range(max(map(len, sides.values())))
    ]


def is_mix(path: Path) -> bool:
    """Whether a file's formats were chosen by --best."""
    from ..checkpoint import open_checkpoint
    from ..inspection import made_of

    with open_checkpoint(path) as checkpoint:
        made = made_of(checkpoint.metadata)
    return made is not None and made.mix is not None


def other_options(args: argparse.Namespace) -> SolveOptions:
    """The options of the call, updated by those in --against.

    Raises:
        OptionError: --against is empty, or a value is out of range.
    """
    parser = Parser(prog="convert_to_quant report")
    add_options(parser, SolveOptions)
    own = {action.dest: getattr(args, action.dest) for action in parser._actions}
    try:
        words = shlex.split(args.against)
    except ValueError as error:
        raise OptionError(f"--against {args.against!r} cannot be split into options: {error}") from None
    if not words:
        raise OptionError("--against needs options", hint='--against "margin=2 keep=mlp"')
    spelled = [flag_spelling("--" + word.removeprefix("--")) for word in words]
    return options_of(SolveOptions, parser.parse_args(spelled, argparse.Namespace(**own)))


def outputs_of(report: Report, args: argparse.Namespace) -> dict[str, bytes]:
    """The content of every output file by name; writes outputs for stdout."""
    from ..report import page, table

    outputs = {}
    if args.output is not None:
        outputs[args.output] = page.render(report.document()).encode("utf-8", "backslashreplace")
    if args.png is not None:
        from ..report import picture  # needs matplotlib

        outputs[args.png] = picture.png(report)
    if args.csv == STDOUT:
        sys.stdout.write(table.render(report))
    elif args.csv is not None:
        outputs[args.csv] = table.render(report).encode("utf-8", "backslashreplace")
    write_json(args.json, report.document())
    return outputs


def tell(report: Report, args: argparse.Namespace) -> None:
    """Print the verdict: on stdout if it is the only output, else on stderr."""
    alone = (args.output, args.png, args.csv, args.json) == (None, None, None, None)
    stream = sys.stdout if alone else sys.stderr
    if alone or not args.quiet:
        for line in verdict_lines(report, stream):
            print(line, file=stream)
        paths = {Path(name).name: name for name in args.files}
        for side in report.sides:
            if side.apply:  # with the paths of the call, and not wrapped, so that it can be copied
                said = shlex.join(paths.get(word, word) for word in shlex.split(side.apply))
                print(printable(f"to apply: {said}"), file=stream)
    if args.verbose:
        print_layers(report, talk=not alone)
        print_mix(report, talk=not alone)


def verdict_lines(report: Report, stream: TextIO) -> Iterator[str]:
    """The verdict as text."""
    verdict = report.verdict
    headline = fitted(printable(f"{report.title}: {verdict.headline}"), stream)
    yield paint(headline, LEVEL_STYLES[verdict.level], stream)
    for point in verdict.points:
        yield from textwrap.wrap(
            printable(point), text_width(stream), initial_indent="- ", subsequent_indent="  ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip


def print_layers(report: Report, *, talk: bool) -> None:
    """Print every layer of each side; see `print_table`."""
    several = len(report.sides) > 1
    lines = [
        (
            layer.name,
            side.label if several else "",
            "-" if figures.absmax is None else f"{figures.absmax:.5g}",
            *("-" if state.scale is None else f"{state.scale:.5g}" for state in states),
            *(decibels(state.sqnr_db) for state in states),
            *map(risk_cell, states),
            figures.unused or figures.reason,
        )
        for layer in map(report.layers.__getitem__, report.riskiest)
        for side, figures in zip(report.sides, layer.sides, strict=True)
        if figures is not None
        for states in [(figures.before, figures.after)]
    ]
    print_table(
        ("layer", "side" if several else "", "range", "scale before", "scale after", "SQNR before", "SQNR after",
         "risk before", "risk after", "why"),
        lines,
        right=(2, 3, 4, 5, 6),
        optional=(9, 5, 6, 2),
        talk=talk,
    )  # fmt: skip


def print_mix(report: Report, *, talk: bool) -> None:
    """Print each layer's format, its format at half a bit more, and the model's dB with it alone in each format."""
    formats = list(dict.fromkeys(name for layer in report.layers for name in layer.alone_db))
    rows = []
    for layer in report.layers if formats else ():
        sides = [one for one in layer.sides if one is not None]
        keeps = (decibels(layer.alone_db.get(name)) for name in formats)
        rows.append(
            (layer.name, *(" | ".join(getattr(one, what) for one in sides) for what in ("stored", "more")), *keeps)
        )
    if rows:
        print_table(("layer alone, dB in", "format", "half a bit more", *formats), rows,
                    right=tuple(range(3, len(formats) + 3)), talk=talk)  # fmt: skip


def risk_cell(state: State) -> str:
    """The risk of a layer in a word."""
    if state.full_precision:
        return Styled("full precision", "dim")
    return Styled(state.risk, "bad") if state.risk else "-"
