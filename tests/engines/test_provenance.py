from __future__ import annotations

import pytest
import torch

from convert_to_quant.engines.provenance import Piece, trace
from convert_to_quant.errors import UnsupportedModelError


@pytest.mark.parametrize(
    ("converter", "shapes", "wanted"),
    [
        (lambda t: {"b": t["a"]}, {"a": (3, 5)}, {"b": [("a", 0, 3)]}),
        (
            lambda t: dict(zip("qk", t["a"].chunk(2), strict=True)),
            {"a": (8, 7)},
            {"q": [("a", 0, 4)], "k": [("a", 4, 8)]},
        ),
        (lambda t: {"a": t["a"].roll(3)}, {"a": (6,)}, {"a": [("a", 3, 6), ("a", 0, 3)]}),
        (lambda t: {"ab": torch.cat([t["a"], t["b"]])}, {"a": (2, 4), "b": (3, 4)}, {"ab": [("a", 0, 2), ("b", 0, 3)]}),
        (
            lambda t: {"a": torch.cat([t["a"][:300], t["a"][400:]]), "b": t["b"].flip(0)},
            {"a": (600, 2), "b": (3,)},
            {"a": [("a", 0, 300), ("a", 400, 600)], "b": [("b", 2, 3), ("b", 1, 2), ("b", 0, 1)]},
        ),
    ],
    ids=["renamed", "split", "halves swapped", "joined", "left out and out of order"],
)
def test_pieces_say_where_rows_come_from(converter, shapes, wanted):
    assert trace(converter, shapes) == {name: tuple(Piece(*one) for one in pieces) for name, pieces in wanted.items()}


def test_tensors_of_any_number_of_dimensions_are_followed():
    shapes = {"scalar": (), "vector": (4,), "table": (1, 6, 8), "convolution": (5, 3, 2, 2)}
    assert trace(dict, shapes) == {
        name: (Piece(name, 0, rows),) for name, rows in {"scalar": 1, "vector": 4, "table": 1, "convolution": 5}.items()
    }


@pytest.mark.parametrize(
    ("converter", "message"),
    [
        (lambda t: {"b": t["b"]}, "converter cannot read it: KeyError: 'b'"),
        (lambda t: {"a": t["a"]}, "left: its converter does not use 1 tensor"),
        (lambda t: {**t, "a": t["a"] * 0.5}, "does more than move rows"),
        (lambda t: {**t, "a": t["a"].T}, "does more than move rows"),
    ],
    ids=["lacks a tensor", "leaves one over", "computes", "moves columns"],
)
def test_a_converter_that_does_other_things_is_refused(converter, message):
    with pytest.raises(UnsupportedModelError, match=message):
        trace(converter, {"a": (4, 4), "left": (2,)})
