"""Which checkpoint rows each weight of a diffusers model came from.

Why it exists. diffusers renames a checkpoint's tensors, splits fused ones (qkv), swaps halves (scale and shift), and
drops some. To put a recorded range back onto the checkpoint's own layer, and to read a weight straight from the file
when it runs, we need that map for every tensor, and diffusers' converters (`diffusers.loaders.single_file_utils`) are
functions on tensors, not tables.

How it works. Constants in, provenance out: the converter is fed integer tensors in place of the weights. Row r of
tensor number n holds n · 2^32 + r, all other dimensions are 1. Whatever the converter does along rows, the values that
come out say where each row came from. Runs of consecutive values become `Piece`s.

Some converters split a fused tensor at row numbers of one published size ("hidden is 3072"). Those tensors are fed in
that size and the boundaries found are carried over to the size at hand, part by part (`Fused`): so any hidden size
works.

Limits. A converter may only move whole rows. One that computes with the values, or moves columns, gives values that are
no row numbers or a shape that the model does not have, and both are errors.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from .. import names
from ..errors import UnsupportedModelError
from ..families.rules import Index, Target, translations
from ..families.running import Fused, Shapes

ROW_BITS = 32

Converter = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Piece:
    """A run of rows of one checkpoint tensor.

    Attributes:
        tensor: its name, without the checkpoint's prefix.
        start, stop: first row, and the one after the last.
    """

    tensor: str
    start: int
    stop: int


def trace(converter: Converter, shapes: Shapes, fused: Iterable[Fused] = ()) -> dict[str, tuple[Piece, ...]]:
    """Find where the rows of every converted tensor come from.

    Args:
        converter: takes a dict of tensors by checkpoint name and returns one by model name; may empty its argument.
        shapes: bare checkpoint tensor name -> shape.
        fused: what is split at published row numbers.

    Returns:
        {model tensor name: its pieces, in row order}. A tensor without dimensions has one row.

    Raises:
        UnsupportedModelError: the converter misses a tensor, leaves one over, or does more than move rows.
    """
    rules = tuple(fused)
    tensor_names = list(shapes)
    boundaries = {name: _boundaries(name, shapes, rules) for name in tensor_names}
    fed = {
        name: _row_numbers(number, boundaries[name][0][-1], len(shapes[name]))
        for number, name in enumerate(tensor_names)
    }
    try:
        converted = converter(fed)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"diffusers' converter cannot read it: {type(error).__name__}: {error}") from error

    pieces = {name: tuple(_pieces(name, values, tensor_names, boundaries)) for name, values in converted.items()}
    used = {piece.tensor for parts in pieces.values() for piece in parts}
    left = [name for name in tensor_names if name not in used]
    if left:
        raise UnsupportedModelError(
            f"diffusers' converter has no place for {len(left)} tensors",
            tensor=left[0],
            hint="a variant that diffusers does not know",
        )
    return pieces


def renamed(shapes: Shapes, table: Index) -> dict[str, tuple[Piece, ...]]:
    """Find where every tensor of a model lies by rules for names, where diffusers has no converter.

    Args:
        shapes: bare checkpoint tensor name -> shape.
        table: other names of layers; a tensor that no rule names has the same name in the model.

    Returns:
        As `trace`.
    """
    found: dict[str, tuple[Piece, ...]] = {}
    for tensor, shape in shapes.items():
        layer, _, kind = tensor.rpartition(".")
        rows = shape[0] if shape else 1
        columns = shapes.get(layer + names.WEIGHT, (rows, rows))[-1]
        meant = [(other, part.target(layer, rows, columns)) for other, part in translations(layer, table)]
        pieces = {f"{other}.{kind}": _halves(tensor, rows, target) for other, target in meant if target is not None}
        found |= pieces or {tensor: (Piece(tensor, 0, rows),)}
    return found


def _halves(tensor: str, rows: int, target: Target) -> tuple[Piece, ...]:
    """The rows that a name means, its halves in the model's order."""
    first, stop = target.rows or (0, rows)
    if not target.swap_halves:
        return (Piece(tensor, first, stop),)
    middle = (first + stop) // 2
    return Piece(tensor, middle, stop), Piece(tensor, first, middle)


def _boundaries(name: str, shapes: Shapes, rules: Iterable[Fused]) -> tuple[list[int], list[int]]:
    """Row numbers that the converter sees, beside those that the file has: equal, or part by part."""
    shape = shapes[name]
    rows = shape[0] if shape else 1
    layer, _, kind = name.rpartition(".")
    for rule in rules:
        if kind in ("weight", "bias") and re.fullmatch(rule.pattern, layer):
            parts = rule.rows(rows, shapes[layer + ".weight"][1])
            if sum(parts) == rows:
                return [0, *accumulate(rule.published)], [0, *accumulate(parts)]
    return [0, rows], [0, rows]


def _row_numbers(number: int, rows: int, dimensions: int) -> torch.Tensor:
    values = torch.arange(rows, dtype=torch.int64) + (number << ROW_BITS)
    return values.reshape((rows,) + (1,) * (dimensions - 1) if dimensions else ())


def _pieces(
    name: str, values: torch.Tensor, tensor_names: list[str], boundaries: Mapping[str, tuple[list[int], list[int]]]
) -> Iterable[Piece]:
    """Runs of consecutive rows in what came out."""
    flat = values.reshape(-1)
    if values.dtype != torch.int64 or (values.ndim and len(flat) != len(values)):
        raise UnsupportedModelError("diffusers' converter does more than move rows", tensor=name)
    if not len(flat):
        return
    breaks = (torch.nonzero(flat[1:] != flat[:-1] + 1).flatten() + 1).tolist()
    for start, stop in zip([0, *breaks], [*breaks, len(flat)], strict=True):
        number, row = divmod(int(flat[start]), 1 << ROW_BITS)
        tensor = tensor_names[number]
        seen, real = boundaries[tensor]
        yield Piece(tensor, _carry(row, seen, real, name), _carry(row + stop - start, seen, real, name))


def _carry(row: int, seen: list[int], real: list[int], name: str) -> int:
    """A boundary in the rows that the converter saw, as one in the rows of the file."""
    part = max(bisect.bisect_left(seen, row) - 1, 0)
    share = (row - seen[part]) * (real[part + 1] - real[part])
    size = seen[part + 1] - seen[part]
    if share % max(size, 1):
        raise UnsupportedModelError("diffusers' converter splits it inside one of its parts", tensor=name)
    return real[part] + share // max(size, 1)
