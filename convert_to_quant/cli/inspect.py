"""`convert_to_quant inspect FILE`: what a checkpoint is, what ComfyUI does with it, and what is wrong with it."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Error
from ..telling import plural, size
from .output import error, print_table, write_json
from .terminal import Styled, paint, printable, text_width

if TYPE_CHECKING:
    from ..inspection import Inspection, LayerView, Made, Mix
    from ..problems import Problem

DESCRIPTION = (
    "Report what a checkpoint is, what ComfyUI does with it, and what is wrong with it. Reads only headers and scales."
)
EPILOG = """\
examples:
  convert_to_quant inspect flux_fp8.safetensors
  convert_to_quant inspect flux_fp8.safetensors --layers
  convert_to_quant inspect *.safetensors --json -
  convert_to_quant inspect ComfyUI/models/diffusion_models

Reports the model family, formats, quantization configs, input scales, how ComfyUI runs the layers, and problems with
their fixes. For a folder, prints one line per file.
"""

KEY_WIDTH = 14
INDENT = "  "

_COMMAND = re.compile(r"convert_to_quant(?: [a-z]+)?(?: --?[a-z][\w-]*| [A-Z]+\b| comfy\b)+")
"""A command in a sentence, which is never wrapped so that it can be copied."""

_HARD_SPACE = "\N{NO-BREAK SPACE}"

NOT_READ = frozenset({"cast", "dynamic", "error", "marker", "scale-dropped"})
"""Readings for which ComfyUI's version and the GPU do not matter."""

READING_STYLES = {"fp8": "good", "fp8-at-one": "warn", "marker": "warn", "cuda-error": "bad", "error": "bad",
                  "packed": "bad", "scale-dropped": "bad"}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("inputs", nargs="+", metavar="MODEL",
                        help=".safetensors file, shard index, or folder")  # fmt: skip
    wanted = parser.add_argument_group("report")
    wanted.add_argument("--layers", action="store_true", help="list every layer, as -v does")
    wanted.add_argument("--strict", action="store_true", help="exit code 1 on problems or unmeasured scales")


def run(args: argparse.Namespace) -> int:
    """Run the command; an unreadable file does not stop it from showing the others."""
    from dataclasses import replace

    from ..checkpoint import open_checkpoint
    from ..inspection import inspect_checkpoint

    found: list[Inspection] = []
    documents: list[dict[str, Any]] = []
    for name in args.inputs:
        listed = files_of(Path(name))
        lines: list[tuple[str, ...]] = []
        for path in listed or [name]:
            try:
                with open_checkpoint(path) as checkpoint:
                    one = inspect_checkpoint(checkpoint)
            except Error as problem:
                error(str(problem))
                documents.append({"path": str(path), "error": str(problem)})
                continue
            documents.append(one.to_json())
            if args.strict:
                one = replace(one, problems=one.problems + one.doubts)
            if listed:
                lines.append(line(one))
            elif args.json != "-":
                if found:
                    print()
                show(one, layers=args.layers or args.verbose)
            found.append(one)
        if lines and args.json != "-":
            print_table(("file", "size", "model", "layers", "input scales", "problems"), lines, right=(1,),
                        optional=(1, 4, 2))  # fmt: skip
    if found:
        write_json(args.json, documents[0] if len(documents) == 1 else {"files": documents})
    return int((args.strict and any(one.problems for one in found)) or len(found) < len(documents))


def files_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder by name, with shards replaced by their index; empty if it is no folder."""
    if not folder.is_dir():
        return []
    from ..checkpoint.reader import INDEX_SUFFIX, SHARD_NAME

    indexes = {path.name.removesuffix(INDEX_SUFFIX): path for path in folder.glob("*" + INDEX_SUFFIX)}
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".sft") and not path.is_dir()]
    shards = {path for path in files if (part := SHARD_NAME.fullmatch(path.name)) and part["stem"] in indexes}
    return sorted({*files, *indexes.values()} - shards)


def line(found: Inspection) -> tuple[str, ...]:
    """A file's line in the table of a folder."""
    kinds = "; ".join(problem.title for problem in found.problems)
    return (
        found.path.name,
        size(found.size_bytes),
        found.title,
        "; ".join(format_lines(found)) or "none",
        _input_scales(found) or "-",
        Styled(kinds, "bad") if kinds else Styled("none", "good"),
    )


def show(found: Inspection, *, layers: bool) -> None:
    """Print a file's report, and every layer if asked for."""
    files = f"{found.files} files, " if found.sharded else ""
    head = printable(f"{found.path.name}: {size(found.size_bytes)}, {files}{found.tensors:,} tensors")
    print(paint(head, "head", sys.stdout))
    problems = [line for problem in found.problems for line in _problem(problem)]
    for key, style, paragraphs in (
        ("model", "", [_model(found)]),
        ("layers", "", format_lines(found) or ["none"]),
        ("config", "", [_configs(found)]),
        ("input scales", "", [_input_scales(found)]),
        ("made by", "", [] if found.made is None else [made_line(found.made)]),
        ("in ComfyUI", "", [*_readings(found), *_readers(found)]),
        ("advice", "warn", found.advice),
        ("problems", "bad" if problems else "good", problems or ["none"]),
    ):
        for line in _entry(key, paragraphs):
            print(line[:KEY_WIDTH] + paint(line[KEY_WIDTH:], style, sys.stdout))
    if layers:
        print()
        print_layers(found)


def _entry(key: str, paragraphs: Sequence[str]) -> Iterator[str]:
    """Wrapped paragraphs behind a key; nothing if all are empty."""
    width = text_width(sys.stdout)
    for paragraph in filter(None, paragraphs):
        text = printable(paragraph)
        hanging = 2 * INDENT if text.startswith(INDENT) else ""
        unbroken = _COMMAND.sub(lambda command: command[0].replace(" ", _HARD_SPACE), text)
        lines = textwrap.wrap(unbroken, width, initial_indent=key.ljust(KEY_WIDTH), break_long_words=False,
                              subsequent_indent=" " * KEY_WIDTH + hanging, break_on_hyphens=False)  # fmt: skip
        yield from (line.replace(_HARD_SPACE, " ") for line in lines)
        key = ""


def _model(found: Inspection) -> str:
    facts = [found.title + (f": {found.variant}" if found.variant else "")]
    facts += [f"repeated blocks: {', '.join(found.blocks)}"] if found.blocks else []
    facts += [f"{plural(found.banks, 'bank')} of experts"] if found.banks else []
    facts += [f"name prefix {found.prefix}"] if found.prefix else []
    facts += [f"also in the file: {', '.join(found.parts)}"] if found.parts else []
    return "; ".join(facts)


def format_lines(found: Inspection) -> list[str]:
    """The number of layers in each format, quantized formats first."""
    counts = Counter((layer.read_as or "", layer.title, _scaling(layer)) for layer in found.layers)
    order = sorted(counts, key=lambda kind: (not kind[0], -counts[kind]))
    bits = {name: f", {fmt.bits:g} bits" for name, fmt in found.formats.items()}
    lines = [f"{counts[kind]:,} {kind[1]}{kind[2]}{bits.get(kind[0], '')}" for kind in order]
    if len(found.formats) > 1:
        lines.append(f"(quantized layers: {found.bits_per_weight:.3g} bits per weight on average)")
    return lines


def _scaling(layer: LayerView) -> str:
    """The granularity of a layer's scales, to append to its format."""
    if layer.scaling == "block":
        assert layer.block is not None
        rows, columns = layer.block
        return f", one scale per {columns} weights" if rows == 1 else f", one scale per block of {rows} × {columns}"
    if layer.scaling is not None:
        return f", one scale per {layer.scaling}"
    return {"cast": ", without scale", "error": ", not readable (see problems)"}.get(layer.reading, "")


def _configs(found: Inspection) -> str:
    """Where the quantization configs are; "" if no layer is quantized."""
    places = []
    if found.header_marks:
        version = "" if found.header_version in ("1.0", None) else f" {found.header_version}"
        places.append(f"header{version} ({plural(found.header_marks, 'layer')})")
    if found.tensor_marks:
        places.append(f"comfy_quant tensors ({found.tensor_marks:,})")
    if not places and not found.input_states:
        return ""
    places += [f"legacy marker {name} ({plural(count, 'element')})" for name, count in found.legacy_markers.items()]
    return " and ".join(places) or "none"


def _input_scales(found: Inspection) -> str:
    words = {"calibrated": "calibrated", "guessed": "guessed", "one": "at 1.0", "missing": "missing (read as 1.0)",
             "suspicious": "suspicious", "unused": "not used"}  # fmt: skip
    for state in ("calibrated", "guessed"):
        scales = [layer.input_scale for layer in found.layers if layer.input_state == state and layer.input_scale]
        ends = dict.fromkeys(f"{scale:.3g}" for scale in (min(scales), max(scales))) if scales else {}
        words[state] += f" ({' to '.join(ends)})" if ends else ""
    counts = found.input_states
    return ", ".join(f"{counts[state]:,} {word}" for state, word in words.items() if state in counts)


def _run(made: Made | Mix) -> str:
    """The samples and seed of a run, in parentheses."""
    facts = [plural(made.samples, "sample")] if made.samples is not None else []
    facts += [f"seed {made.seed}"] if made.seed is not None else []
    return f" ({', '.join(facts)})" if facts else ""


def made_line(made: Made) -> str:
    """How this tool made a file."""
    steps = ["converted"] if made.converted else []
    if (mix := made.mix) is not None:
        from ..choose import keeps

        steps.append(
            f"best mix of formats{f' for {mix.gpu}' if mix.gpu else ''}, chosen by running the model on "
            f"{mix.conditioning or 'given conditioning'}{_run(mix)}"
            + (f": {mix.figures['bits']:.2f} bits per weight" if "bits" in mix.figures else "")
            + (f", {told}" if (told := keeps(mix.figures)) else "")
        )
    if made.engine is not None:
        how = {
            "model": f"calibrated by running the model on {made.conditioning or 'given conditioning'}",
            "layer": "input scales guessed by simulating each layer",
            "statistics": "calibrated from observed statistics",
        }.get(made.engine, f"calibrated by {made.engine}")
        steps.append(how + _run(made))
    if made.guessed:
        steps.append(f"input scales of {plural(len(made.guessed), 'layer')} guessed (first: {made.guessed[0]})")
    if made.lora:
        steps.append(f"for use with {', '.join(made.lora)}")
    if moving := made.depends_on_conditioning:
        steps.append(f"ranges of {plural(len(moving), 'layer')} depend on the conditioning (first: {moving[0]})")
    version = "" if made.version is None else f" {made.version}"
    return f"convert_to_quant{version}" + (f": {'; '.join(steps)}" if steps else "")


def _readings(found: Inspection) -> list[str]:
    from ..problems import READINGS

    return [f"{plural(count, 'layer')}: {READINGS[reading]}" for reading, count in found.readings.items()]


def _readers(found: Inspection) -> list[str]:
    """Which ComfyUI reads the formats and which GPUs run them fast; one line for formats with the same answer."""
    from ..formats.int8 import INTEGERS

    shared: dict[str, list[str]] = {}
    read = {layer.read_as for layer in found.layers if layer.reading not in NOT_READ}
    for fmt in (fmt for name, fmt in found.formats.items() if name in read):
        words = fmt.read_by + (f", fast on {fmt.cards}" if fmt.cards else "")
        words += ", in full precision elsewhere" if fmt.cards and fmt.input_grid is not INTEGERS else ""
        shared.setdefault(words, []).append(fmt.title)
    return [f"{', '.join(dict.fromkeys(titles))}: {words}" for words, titles in shared.items()]


def _problem(problem: Problem) -> list[str]:
    """A problem, where it is, and how to fix it."""
    first, *others = problem.tensors
    detail = f": {problem.detail}" if problem.detail else ""
    more = f" (and {len(others):,} more)" if others else ""
    return [problem.title, f"{INDENT}in {first}{more}{detail}", f"{INDENT}fix: {problem.remedy}"]


def print_layers(found: Inspection) -> None:
    """Print every layer; see `print_table`."""
    print_table(
        ("layer", "shape", "format", "scale", "config", "input scale", "", "in ComfyUI"),
        [
            (
                layer.name,
                " × ".join(map(str, layer.shape)),
                layer.title,
                " × ".join(map(str, layer.block)) if layer.scaling == "block" and layer.block else layer.scaling or "-",
                " and ".join(layer.marked_by) or "-",
                "-" if layer.input_scale is None else f"{layer.input_scale:.5g}",
                {"unused": "not used", "one": "not measured", None: ""}.get(layer.input_state, layer.input_state or ""),
                Styled(layer.reading, READING_STYLES.get(layer.reading, "")),
            )
            for layer in found.layers
        ],
        right=(5,),
        optional=(4, 1, 3, 2, 6, 5),
    )
