"""Blocks, modulations, routers and adapters of models without a table, by shapes and repetition."""

from __future__ import annotations

import pytest

from convert_to_quant.families.base import MODULATION, REFINER, VECTOR
from convert_to_quant.families.structure import ADAPTER, EMBEDDING, ROUTER, study

WIDTH = 64
ATTENTION = {"mix.qkv": (3 * WIDTH, WIDTH), "mix.out": (WIDTH, WIDTH)}
BLOCK = {**ATTENTION, "wide.up": (4 * WIDTH, WIDTH), "wide.down": (WIDTH, 4 * WIDTH)}


def blocks(stack: str, count: int = 4, **more: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Layers of a stack of blocks, and `more`, in whose names "_in_" is a dot."""
    added = {name.replace("_in_", "."): shape for name, shape in more.items()}
    return {f"{stack}.{n}.{name}.weight": shape for n in range(count) for name, shape in {**BLOCK, **added}.items()}


MAIN = blocks("tower")


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        pytest.param({}, {}, id="blocks alone"),
        pytest.param({"t_block.1.weight": (384, 64)}, {"t_block.1": MODULATION}, id="an entry of a Sequential"),
        pytest.param(blocks("tower", vec=(6 * 64, 64)), {f"tower.{n}.vec": MODULATION for n in range(4)},
                     id="a modulation by what nobody reads"),
        pytest.param(blocks("tower", vec=(2 * 64, 8)), {f"tower.{n}.vec": MODULATION for n in range(4)},
                     id="a modulation from a narrow vector"),
        pytest.param(blocks("tower", gated_in_up=(8 * 64, 64), gated_in_down=(64, 4 * 64)), {}, id="a gated MLP"),
        pytest.param(blocks("tower", all=(7 * 64, 64), back=(64, 5 * 64)), {}, id="attention and MLP in one"),
        pytest.param(blocks("tower", qkv=(9 * 40, 64), back=(64, 3 * 40)), {}, id="attention of another width"),
        pytest.param(blocks("tower", choice=(2, 64)), {f"tower.{n}.choice": ROUTER for n in range(4)}, id="a router"),
        pytest.param(blocks("tower", pick=(16, 64), **{f"experts_in_{n}_in_up": (64, 64) for n in range(16)}),
                     {f"tower.{n}.pick": ROUTER for n in range(4)}, id="a router with an output per expert"),
        pytest.param(blocks("tower", cond_in_0=(64, 64), cond_in_2=(6 * 64, 64)),
                     {f"tower.{n}.cond.{layer}": MODULATION for n in range(4) for layer in (0, 2)},
                     id="a modulation of two layers"),
        pytest.param(blocks("tower", vec=(4 * 64, 40)), {f"tower.{n}.vec": MODULATION for n in range(4)},
                     id="a modulation as wide as the MLP, from a vector"),
        pytest.param(blocks("tower", to_out_in_1=(64, 64), ff_in_1=(4 * 64, 64), ff_in_4=(64, 4 * 64)), {},
                     id="layers behind a dropout or a norm"),
        pytest.param(blocks("tower", relative_attention_bias=(32, 64)),
                     {f"tower.{n}.relative_attention_bias": EMBEDDING for n in range(4)}, id="an embedding in a block"),
        pytest.param(blocks("bridge.tower", 1), dict.fromkeys((f"bridge.tower.0.{name}" for name in BLOCK), ADAPTER),
                     id="an adapter, by where it is"),
        pytest.param(blocks("text_adapter.tower"),
                     {f"text_adapter.tower.{n}.{name}": ADAPTER for n in range(4) for name in BLOCK},
                     id="an adapter, by its name"),
        pytest.param(blocks("tower", labels_in_embedding_table=(100, 64)),
                     {f"tower.{n}.labels.embedding_table": EMBEDDING for n in range(4)}, id="a table in every block"),
        pytest.param(blocks("tower", time_embedder_in_1=(64, 64)),
                     {f"tower.{n}.time_embedder.1": VECTOR for n in range(4)}, id="the time in every block"),
        pytest.param(blocks("tower", attn_in_to_k=(2, 64), attn_in_to_v=(2, 64)), {}, id="keys of one narrow head"),
        pytest.param({"head.weight": (16, 64)}, {"head": "final layer: its error goes straight into the image"},
                     id="what is outside"),
    ],
)  # fmt: skip
def test_what_stays_in_high_precision(layers: dict[str, tuple[int, int]], kept: dict[str, str]) -> None:
    big = blocks("tower", 16) if any(name.startswith(("bridge", "text")) for name in layers) else MAIN
    assert study({**big, **layers}).kept == kept


def test_a_small_stack_beside_the_main_one_is_a_refiner() -> None:
    found = study({**blocks("tower", 30), **blocks("before", 2)})
    assert {stack.name: stack.kept for stack in found.stacks} == {"tower": "", "before": REFINER}


def test_a_heavier_stack_whose_name_says_refiner_or_adapter_is_not_the_main_one() -> None:
    found = study({**blocks("tower", 1), **blocks("text_adapter.tower", 4), **blocks("noise_refiner", 2)})
    assert {stack.name: stack.kept for stack in found.stacks} == {
        "tower": "",
        "text_adapter.tower": ADAPTER,
        "noise_refiner": REFINER,
    }


def test_levels_of_a_u_net_are_no_blocks_but_the_transformers_in_them_are() -> None:
    level = {f"level.{n}.1.{name}.weight": (WIDTH, WIDTH) for n in range(3) for name in ("into", "out_of")}
    inner = {
        f"level.{n}.1.tower.0.{half}{name}.weight": s for n in range(3) for half in "ab" for name, s in BLOCK.items()
    }
    found = study({**level, **inner})
    assert [stack.name for stack in found.main] == ["level.#.#.tower"]
    assert set(found.kept) == {name.removesuffix(".weight") for name in level}


def test_levels_called_encoder_and_decoder_are_one_network() -> None:
    found = study({**blocks("encoder_levels.0.tower", 2), **blocks("decoder_levels.0.tower", 4)})
    assert [stack.kept for stack in found.stacks] == ["", ""]


def test_what_the_last_block_lacks_does_not_make_its_other_layers_modulations() -> None:
    layers = {
        name: shape
        for name, shape in blocks("tower", x=(6 * 64, 64), y=(64, 6 * 64)).items()
        if name != "tower.3.y.weight"
    }
    assert study(layers).kept == {}
