"""Traces which checkpoint rows each weight of a model comes from.

Models rename a checkpoint's tensors, split fused ones (qkv), swap halves (scale and shift), and drop some. For
diffusers' classes, the rules of `families` tell how (`renamed`). ComfyUI's loader consists of functions on tensors
instead (`trace`). They get integer tensors as weights: row r of tensor number n contains n · 2^32 + r, and all other
dimensions are 1. However the functions move rows, the values show where each row came from. Runs of consecutive values
become `Piece`s.

Limits. Such functions may only move whole rows. A function that computes with the values or moves columns gives values
that are no row numbers, or a shape that the model does not have; both are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .. import names
from ..errors import UnsupportedModelError
from ..families.rules import Index, Target, meanings
from ..families.running import Shapes
from ..telling import plural

ROW_BITS = 32

Converter = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of one checkpoint tensor, by its name without the checkpoint's prefix."""

    tensor: str
    start: int
    stop: int


def trace(converter: Converter, shapes: Shapes) -> dict[str, tuple[Piece, ...]]:
    """The pieces of every converted tensor, in row order, by model name. A tensor without dimensions has one row.

    The converter may empty its argument; `shapes` are by bare checkpoint name.

    Raises:
        UnsupportedModelError: the converter lacks a tensor, does not use one, or does more than move rows.
    """
    tensor_names = list(shapes)
    fed = {name: _row_numbers(number, shape) for number, (name, shape) in enumerate(shapes.items())}
    try:
        converted = converter(fed)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"its converter cannot read it: {type(error).__name__}: {error}") from error

    pieces = {name: tuple(_pieces(name, values, tensor_names)) for name, values in converted.items()}
    used = {piece.tensor for parts in pieces.values() for piece in parts}
    left = [name for name in tensor_names if name not in used]
    if left:
        problem = f"its converter does not use {plural(len(left), 'tensor')}"
        raise UnsupportedModelError(problem, tensor=left[0], hint="it does not know this variant")
    return pieces


def renamed(shapes: Shapes, tables: Sequence[Index], spellings: Index) -> dict[str, tuple[Piece, ...]]:
    """Find every tensor of a model by its family's rules for names; the result is that of `trace`.

    `tables` are other names of layers and tensors; the first table with a name for a tensor decides. A tensor without a
    rule has the same name in the model. `spellings` are other names of layers in checkpoints.
    """
    found: dict[str, tuple[Piece, ...]] = {}
    for tensor, shape in shapes.items():
        layer, _, kind = tensor.rpartition(".")
        if kind not in ("weight", "bias", "scale"):  # a table
            layer = tensor
        rows = shape[0] if shape else 1
        columns = shapes.get(layer + names.WEIGHT, (rows, rows))[-1]
        known = (dict(meanings(layer, (rows, columns), table, spellings)) for table in tables)
        ending = tensor.removeprefix(layer).replace(".scale", names.WEIGHT)
        meant = next(filter(None, known), {})
        pieces = {other + ending: _halves(tensor, rows, target) for other, target in meant.items()}
        found |= pieces or {tensor: (Piece(tensor, 0, rows),)}
    return found


def _halves(tensor: str, rows: int, target: Target) -> tuple[Piece, ...]:
    """The rows that a name refers to, with halves in the model's order."""
    first, stop = target.rows or (0, rows)
    if not target.swap_halves:
        return (Piece(tensor, first, stop),)
    middle = (first + stop) // 2
    return Piece(tensor, middle, stop), Piece(tensor, first, middle)


def _row_numbers(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    rows = shape[0] if shape else 1
    return (torch.arange(rows) + (number << ROW_BITS)).reshape(shape[:1] + (1,) * (len(shape) - 1))


def _pieces(name: str, values: torch.Tensor, tensor_names: list[str]) -> Iterable[Piece]:
    """Runs of consecutive rows in a converted tensor."""
    flat = values.reshape(-1)
    if values.dtype != torch.int64 or (values.ndim and len(flat) != len(values)):
        raise UnsupportedModelError("its converter does more than move rows", tensor=name)
    if not len(flat):
        return
    breaks = (torch.nonzero(flat[1:] != flat[:-1] + 1).flatten() + 1).tolist()
    for start, stop in zip([0, *breaks], [*breaks, len(flat)], strict=True):
        number, row = divmod(int(flat[start]), 1 << ROW_BITS)
        yield Piece(tensor_names[number], row, row + stop - start)
