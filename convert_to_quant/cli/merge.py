"""`convert_to_quant merge STATS... -o OUT`: merge statistics files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..telling import plural
from .output import note, say, write_json, wrote

if TYPE_CHECKING:
    from ..stats import Statistics

DESCRIPTION = "Merge statistics of one model into one file. The order does not matter."
EPILOG = """\
examples:
  convert_to_quant merge faces.safetensors places.safetensors -o all.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("statistics", nargs="+", metavar="STATS", help="statistics files")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="merged file")
    parser.add_argument("--force", action="store_true", help="merge only the layers that all files share")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..rounding import KeptMoments, merge_moments
    from ..stats import merge

    distinct = load_distinct(args.statistics)
    merged = merge(*distinct, force=args.force)
    for name in merged.left_out:
        note(f"omitted: {name}")
    kept = [(one, KeptMoments.of(one)) for one in distinct]
    moments = [own for _, own in kept if own is not None]
    if moments and len(moments) < len(kept):
        without = next(one.path for one, own in kept if own is None)
        note(f"second moments are omitted: {without} has none")
    found = f"{plural(len(distinct), 'file')}, {merged.samples} samples, {len(merged.layers)} layers"
    if args.dry_run:
        say(f"dry run: would merge {found} into {args.output}; nothing was written")
    else:
        complete = len(moments) == len(kept)
        merged.save(args.output, merge_moments(moments, Path(args.output), merged.names).entry() if complete else None)
        say(f"merged {found}; {wrote(args.output)}")
    report(merged, args)
    return 0


def load_distinct(paths: Sequence[str]) -> list[Statistics]:
    """Load statistics files, skipping duplicates with a note."""
    from ..stats import Statistics

    distinct: list[Statistics] = []
    for path in paths:
        loaded = Statistics.load(path)
        twin = next((one for one in distinct if one == loaded), None)
        if twin is None:
            distinct.append(loaded)
        else:
            note(f"{path} is a duplicate of {twin.path} and is ignored")
    return distinct


def report(statistics: Statistics, args: argparse.Namespace) -> None:
    """Write the document of --json."""
    columns = (statistics.absmax.tolist(), statistics.visited.tolist(), statistics.calls.tolist())
    document = {
        "statistics": str(args.output),
        "fingerprint": statistics.fingerprint,
        "samples": statistics.samples,
        "provenance": {name: list(texts) for name, texts in statistics.provenance.items()},
        "layers": [
            {"layer": name, "absmax": absmax if visited else None, "calls": calls}
            for name, absmax, visited, calls in zip(statistics.names, *columns, strict=True)
        ],
    }
    write_json(args.json, document)
