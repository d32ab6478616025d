from __future__ import annotations

from typing import Any

import pytest
import torch

from convert_to_quant.engines.provenance import Piece, trace
from convert_to_quant.errors import UnsupportedModelError
from convert_to_quant.families.rules import qkv_mlp_rows, qkv_rows
from convert_to_quant.families.running import Fused


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
def test_pieces_say_where_rows_come_from(converter: Any, shapes: Any, wanted: dict[str, Any]) -> None:
    assert trace(converter, shapes) == {name: tuple(Piece(*one) for one in pieces) for name, pieces in wanted.items()}


def test_tensors_of_any_number_of_dimensions_are_followed() -> None:
    shapes = {"scalar": (), "vector": (4,), "table": (1, 6, 8), "convolution": (5, 3, 2, 2)}
    assert trace(dict, shapes) == {
        name: (Piece(name, 0, rows),) for name, rows in {"scalar": 1, "vector": 4, "table": 1, "convolution": 5}.items()
    }


@pytest.mark.parametrize("hidden", [4, 6, 4096])
def test_rows_split_at_a_published_size_are_carried_over_to_the_size_at_hand(hidden: int) -> None:
    rule = Fused(r"x", (8, 8, 8, 32), qkv_mlp_rows)

    def converter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = tensors["x.weight"].split([8, 8, 8, 32])
        biases = tensors["x.bias"].split([8, 8, 8, 32])
        return {**dict(zip("qkvm", parts, strict=True)), "m.bias": biases[3]}

    found = trace(converter, {"x.weight": (6 * hidden, hidden), "x.bias": (6 * hidden,)}, [rule])
    assert found["q"] == (Piece("x.weight", 0, hidden),)
    assert found["v"] == (Piece("x.weight", 2 * hidden, 3 * hidden),)
    assert found["m"] == (Piece("x.weight", 3 * hidden, 6 * hidden),)
    assert found["m.bias"] == (Piece("x.bias", 3 * hidden, 6 * hidden),)


RULES = [Fused(r"x", (2, 2, 2, 8), qkv_mlp_rows), Fused(r"y", (2, 1, 1), qkv_rows)]


def first_row(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a tensor that is fed in the published size it would stand for several rows."""
    return {name: tensor[:1] for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"x.weight": (12, 4)}, "no rows for the MLP"),
        ({"x.weight": (10, 4)}, "fewer rows than the parts"),
        ({"xx.weight": (28, 4)}, "a longer name"),
        ({"x.weight": (28, 4), "x.scale": (28,)}, "neither weight nor bias"),
        ({"x.weight": (28, 4), "x.bias": (12,)}, "a bias of another size than its weight"),
        ({"y.weight": (9, 4)}, "a row more than the parts"),
    ],
)
def test_what_is_not_fused_as_the_rule_says_keeps_its_own_rows(shapes: dict[str, tuple[int, ...]], reason: str) -> None:
    name = list(shapes)[-1]
    assert trace(first_row, shapes, RULES)[name] == (Piece(name, 0, 1),), reason
    assert trace(first_row, {"x.weight": (28, 4)}, RULES)["x.weight"] == (Piece("x.weight", 0, 2),)


def test_a_split_inside_a_part_is_refused_where_it_falls_on_no_row() -> None:
    def converter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first, rest = tensors["x.weight"].split([1, 13])
        return {"first": first, "rest": rest}

    with pytest.raises(UnsupportedModelError, match="splits it inside one of its parts"):
        trace(converter, {"x.weight": (21, 3)}, RULES)  # half of 3 rows


@pytest.mark.parametrize(
    ("converter", "message"),
    [
        (lambda t: {"b": t["b"]}, "converter cannot read it: KeyError: 'b'"),
        (lambda t: {"a": t["a"]}, "left: diffusers' converter has no place for 1 tensors"),
        (lambda t: {**t, "a": t["a"] * 0.5}, "does more than move rows"),
        (lambda t: {**t, "a": t["a"].T}, "does more than move rows"),
    ],
    ids=["misses a tensor", "leaves one over", "computes", "moves columns"],
)
def test_a_converter_that_does_other_things_is_refused(converter: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace(converter, {"a": (4, 4), "left": (2,)})
