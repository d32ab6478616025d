"""`convert_to_quant inspect FILE`: what a checkpoint is, what ComfyUI does with it, and what is wrong with it."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .calibration import check_written_files
from .output import print_table, write_json

if TYPE_CHECKING:
    from ..inspection import Inspection, LayerView, Made, Problem

DESCRIPTION = (
    "Say what a checkpoint is, what ComfyUI does with it, and what is wrong with it. Reads headers and scales."
)
EPILOG = """\
examples:
  convert_to_quant inspect flux_fp8.safetensors
      family, formats, marks, input scales, problems with what to do about each
  convert_to_quant inspect flux_fp8.safetensors --layers
      and every layer: its shape, format, scales, and what ComfyUI does with it
  convert_to_quant inspect flux_fp8.safetensors --strict --json -
      for scripts: one JSON document, and exit code 1 where there are problems
"""

WIDTH = 80
"""Columns of the narrowest usual terminal. The screen is the same everywhere, so that it can be compared."""

KEY_WIDTH = 14

_COMMAND = re.compile(r"convert_to_quant(?: --?[a-z]\S*(?: [A-Z]+\b)?)+")
"""A command in a sentence: it is not broken over lines, so that it can be copied."""

_HARD_SPACE = "\N{NO-BREAK SPACE}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("input", metavar="FILE",
                        help="a .safetensors file, or the .safetensors.index.json of a sharded model")  # fmt: skip
    parser.add_argument("--layers", action="store_true", help="print every layer")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON (- for stdout, instead of the text)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where there are problems")
    parser.set_defaults(output=None)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..checkpoint import open_checkpoint
    from ..inspection import inspect_checkpoint

    with open_checkpoint(args.input) as checkpoint:
        check_written_files(checkpoint, args, [])
        found = inspect_checkpoint(checkpoint)
    if args.json != "-":
        for line in screen(found):
            print(line)
        if args.layers:
            print()
            print_layers(found)
    if args.json:
        write_json(args.json, found.to_json())
    return 1 if args.strict and found.problems else 0


def screen(found: Inspection) -> Iterator[str]:
    """The lines of the summary."""
    files = f"{found.files} files, " if found.sharded else ""
    yield printable(f"{found.path.name}: {_bytes(found.size_bytes)}, {files}{found.tensors:,} tensors")
    yield from _entry("model", [_model(found)])
    yield from _entry("layers", _formats(found) or ["none"])
    if any(layer.input_state is not None for layer in found.layers) or found.header_marks or found.tensor_marks:
        yield from _entry("marked by", [_marks(found)])
    if found.input_states:
        yield from _entry("input scales", [_input_scales(found)])
    if found.made is not None:
        yield from _entry("made by", [_made(found.made)])
    if found.layers:
        yield from _entry("in ComfyUI", _readings(found))
    yield from _entry("advice", found.advice)
    yield from _entry("problems", [line for problem in found.problems for line in _problem(problem)] or ["none"])


def printable(text: str) -> str:
    r"""A text with everything escaped that a terminal would obey instead of show: names come from the file.

    >>> printable("a\x1b[2J × b")
    'a\\x1b[2J × b'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _entry(key: str, paragraphs: list[str] | tuple[str, ...]) -> Iterator[str]:
    """Paragraphs behind a key, wrapped; nothing where there are none."""
    for paragraph in paragraphs:
        text = printable(paragraph)
        hanging = 4 if text.startswith("  ") else 0
        unbroken = _COMMAND.sub(lambda command: command[0].replace(" ", _HARD_SPACE), text)
        lines = textwrap.wrap(
            unbroken,
            WIDTH,
            initial_indent=key.ljust(KEY_WIDTH),
            subsequent_indent=" " * (KEY_WIDTH + hanging),
            break_long_words=False,
            break_on_hyphens=False,
        )
        yield from (line.replace(_HARD_SPACE, " ") for line in lines)
        key = ""


def _bytes(count: int) -> str:
    unit, power = next((unit, power) for unit, power in (("GB", 9), ("MB", 6), ("kB", 3), ("bytes", 0))
                       if count >= 10**power or not power)  # fmt: skip
    return f"{count / 10**power:.1f} {unit}" if power else f"{count} {unit}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _model(found: Inspection) -> str:
    text = found.title
    if found.prefix:
        text += f"; names begin with {found.prefix}"
    if found.parts:
        text += f"; also in the file: {', '.join(found.parts)}"
    return text


def _formats(found: Inspection) -> list[str]:
    """How many layers of each format, quantized ones first."""
    counts = Counter((layer.input_state is None, layer.format, _scaling(layer)) for layer in found.layers)
    order = sorted(counts, key=lambda kind: (kind[0], -counts[kind]))
    return [f"{counts[kind]:,} {kind[1]}{kind[2]}" for kind in order]


def _scaling(layer: LayerView) -> str:
    """How finely a layer is scaled, behind its format."""
    if layer.scaling == "block":
        assert layer.block is not None
        return f", one scale per block of {layer.block[0]} × {layer.block[1]}"
    if layer.scaling is not None:
        return f", one scale per {layer.scaling}"
    return {"cast": ", without scale", "error": ", not readable (see problems)"}.get(layer.reading, "")


def _marks(found: Inspection) -> str:
    marks = []
    if found.header_marks:
        marks.append(f"header ({_plural(found.header_marks, 'layer')})")
    if found.tensor_marks:
        marks.append(f"comfy_quant tensors ({found.tensor_marks:,})")
    if found.legacy_marker is not None:
        assert found.legacy_marker_elements is not None
        marks.append(f"legacy marker {found.legacy_marker} ({_plural(found.legacy_marker_elements, 'element')})")
    text = " and ".join(marks) or "nothing"
    if found.quantization_config is not None:
        text += f"; config.json beside it has a quantization_config ({found.quantization_config})"
    return text


def _input_scales(found: Inspection) -> str:
    scales = [layer.input_scale for layer in found.layers
              if layer.input_state == "calibrated" and layer.input_scale is not None]  # fmt: skip
    words = {
        "calibrated": "calibrated" + (f" ({min(scales):.3g} to {max(scales):.3g})" if scales else ""),
        "one": "at 1.0",
        "missing": "missing (read as 1.0)",
        "suspicious": "suspicious",
        "unused": "not used",
    }
    counts = found.input_states
    return ", ".join(f"{counts[state]:,} {word}" for state, word in words.items() if state in counts)


def _made(made: Made) -> str:
    steps = ["converted"] if made.converted else []
    if made.engine is not None:
        how = {
            "model": f"by running the model on {made.conditioning or 'given conditioning'}",
            "layer": "by simulating each layer (ranges are guesses)",
            "statistics": "from observed statistics",
        }.get(made.engine, f"by {made.engine}")
        figures = [_plural(made.samples, "sample")] if made.samples is not None else []
        figures += [f"seed {made.seed}"] if made.seed is not None else []
        steps.append(f"calibrated {how}" + (f" ({', '.join(figures)})" if figures else ""))
    if made.lora:
        steps.append(f"for use with {', '.join(made.lora)}")
    moving = made.depends_on_conditioning
    if moving:
        steps.append(f"the ranges of {_plural(len(moving), 'layer')} depend on the conditioning (first: {moving[0]})")
    version = "" if made.version is None else f" {made.version}"
    return f"convert_to_quant{version}" + (f": {'; '.join(steps)}" if steps else "")


def _readings(found: Inspection) -> list[str]:
    from ..inspection import PRODUCTS, READINGS

    lines = [f"{_plural(count, 'layer')}: {READINGS[reading]}" for reading, count in found.readings.items()]
    if PRODUCTS & found.readings.keys():
        lines.append("(with FP8 hardware; elsewhere all in full precision)")
    return lines


def _problem(problem: Problem) -> list[str]:
    """A problem with the first that has it, and below it what to do."""
    detail = "" if problem.detail is None else f", {problem.detail}"
    first = f"first: {problem.tensors[0]}" if len(problem.tensors) > 1 else problem.tensors[0]
    count = f"{len(problem.tensors):,} times, " if len(problem.tensors) > 1 else ""
    return [f"{problem.title} ({count}{first}{detail})", f"  do: {problem.remedy}"]


def print_layers(found: Inspection) -> None:
    """Every layer; see `print_table`."""
    print_table(
        ("layer", "shape", "format", "scale", "marked by", "input scale", "", "in ComfyUI"),
        [
            (
                printable(layer.name),
                " × ".join(map(str, layer.shape)),
                printable(layer.format),
                " × ".join(map(str, layer.block)) if layer.scaling == "block" and layer.block else layer.scaling or "-",
                " and ".join(layer.marked_by) or "-",
                "-" if layer.input_scale is None else f"{layer.input_scale:.5g}",
                {"unused": "not used", "one": "not measured", None: ""}.get(layer.input_state, layer.input_state or ""),
                layer.reading,
            )
            for layer in found.layers
        ],
        right=(5,),
    )
