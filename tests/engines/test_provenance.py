from __future__ import annotations

import pytest
import torch

from convert_to_quant.engines.provenance import Piece, trace
from convert_to_quant.errors import UnsupportedModelError
from convert_to_quant.families.rules import qkv_mlp_rows, qkv_rows
from convert_to_quant.families.running import Fused


def test_a_renamed_tensor_keeps_all_its_rows() -> None:
    assert trace(lambda t: {"b": t.pop("a")}, {"a": (3, 5)}) == {"b": (Piece("a", 0, 3),)}


def test_a_split_tensor_says_which_rows_each_part_has() -> None:
    def converter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        q, k, v = tensors["qkv"].chunk(3)
        return {"q": q, "k": k, "v": v}

    assert trace(converter, {"qkv": (12, 7)}) == {
        "q": (Piece("qkv", 0, 4),),
        "k": (Piece("qkv", 4, 8),),
        "v": (Piece("qkv", 8, 12),),
    }


def test_swapped_halves_are_two_pieces() -> None:
    def converter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shift, scale = tensors["a"].chunk(2)
        return {"a": torch.cat([scale, shift])}

    assert trace(converter, {"a": (6,)}) == {"a": (Piece("a", 3, 6), Piece("a", 0, 3))}


def test_joined_tensors_are_one_piece_each() -> None:
    shapes = {"a": (2, 4), "b": (3, 4)}
    assert trace(lambda t: {"ab": torch.cat([t["a"], t["b"]])}, shapes) == {"ab": (Piece("a", 0, 2), Piece("b", 0, 3))}


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


def test_rows_that_are_left_out_or_out_of_order_are_pieces_of_their_own() -> None:
    shapes = {"a": (600, 2), "b": (3,)}
    found = trace(lambda t: {"a": torch.cat([t["a"][:300], t["a"][400:]]), "b": t["b"].flip(0)}, shapes)
    assert found["a"] == (Piece("a", 0, 300), Piece("a", 400, 600))
    assert found["b"] == (Piece("b", 2, 3), Piece("b", 1, 2), Piece("b", 0, 1))


def test_a_converter_that_moves_columns_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="does more than move rows"):
        trace(lambda t: {"a": t["a"].T}, {"a": (4, 4)})


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


def test_a_tensor_that_the_converter_misses_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="converter cannot read it: KeyError: 'b'"):
        trace(lambda t: {"b": t["b"]}, {"a": (2,)})


def test_a_tensor_without_a_place_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="left: diffusers' converter has no place for 1 tensors"):
        trace(lambda t: {"a": t["a"]}, {"a": (2,), "left": (2,)})


def test_a_converter_that_computes_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="does more than move rows"):
        trace(lambda t: {"a": t["a"] * 0.5}, {"a": (4, 4)})
