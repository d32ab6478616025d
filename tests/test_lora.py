"""LoRA files: the layers that names mean, changes computed by hand, and everything that can be wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from convert_to_quant import names
from convert_to_quant.checkpoint import Checkpoint
from convert_to_quant.errors import LoraError
from convert_to_quant.lora import (
    LoraMatch,
    Survival,
    calibration_rows,
    load_lora,
    match_loras,
    merge_rows,
    open_loras,
    split_strength,
)

Tensors = dict[str, NDArray[Any]]
Layers = dict[str, tuple[int, int]]
Write = Callable[..., Path]

LORA_FACTORS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A.style_0.weight", ".lora_B.style_0.weight"),
    (".lora_A", ".lora_B"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_down", ".lora_up"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".down.weight", ".up.weight"),
)

H = 8  # hidden size
R = 2  # rank

FLUX: Layers = {
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.0.txt_attn.qkv": (3 * H, H),
    "double_blocks.0.img_attn.proj": (H, H),
    "double_blocks.0.img_mod.lin": (6 * H, H),
    "double_blocks.0.img_mlp.0": (4 * H, H),
    "double_blocks.0.txt_mlp.2": (H, 4 * H),
    "single_blocks.1.linear1": (7 * H, H),
    "single_blocks.1.linear2": (H, 5 * H),
    "single_blocks.11.linear1": (7 * H, H),
    "final_layer.adaLN_modulation.1": (2 * H, H),
}
WAN: Layers = {
    "blocks.1.self_attn.q": (H, H),
    "blocks.11.self_attn.q": (H, H),
    "blocks.1.cross_attn.k_img": (H, H),
    "blocks.1.self_attn.o": (H, H),
    "blocks.1.ffn.0": (4 * H, H),
}
Z_IMAGE: Layers = {"layers.3.attention.qkv": (3 * H, H), "context_refiner.0.attention.out": (H, H)}


@pytest.fixture
def write(save: Callable[..., Path]) -> Write:
    """Writes a LoRA file."""
    return lambda tensors, name="lora.safetensors": save(name, tensors)


def pair(name: str, out_features: int, in_features: int, *, style: int = 0, seed: int = 0) -> Tensors:
    """Both factors of an adapter, float32."""
    generator = np.random.default_rng(seed)
    down, up = LORA_FACTORS[style]
    return {
        name + down: generator.standard_normal((R, in_features), np.float32),
        name + up: generator.standard_normal((out_features, R), np.float32),
    }


def match_of(path: Path, layers: Layers, strength: float = 1.0) -> LoraMatch:
    return match_loras([load_lora(path, strength)], layers)


def change(match: LoraMatch, layer: str) -> NDArray[np.float32]:
    """All that is added to a layer's weight."""
    added = np.zeros(match.shapes[layer], np.float32)
    match.add_to(added, layer)
    return added


def only(match: LoraMatch) -> tuple[str, tuple[int, int] | None]:
    """The layer and rows of the only adapter of a match that has nothing left over."""
    assert match.left == []
    ((layer, (delta,)),) = match.matched.items()
    return layer, delta.target.rows


QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"

# (name in the file, layers of the checkpoint, the layer meant, its rows); test_names.py tests all names of every layer.
SPELLINGS: list[tuple[str, Layers, str, tuple[int, int] | None]] = [
    ("lora_unet_double_blocks_0_img_attn_qkv", FLUX, QKV, None),
    ("lora_unet_transformer_blocks_0_attn_to_k", FLUX, QKV, (H, 2 * H)),
    ("transformer.single_transformer_blocks.1.proj_mlp", FLUX, LINEAR1, (3 * H, 7 * H)),
    ("transformer.norm_out.linear", FLUX, "final_layer.adaLN_modulation.1", None),
    ("diffusion_model.single_blocks.1.linear1_qkv", FLUX, LINEAR1, (0, 3 * H)),  # ComfyUI
    ("double_blocks.0.processor.qkv_lora1", FLUX, QKV, None),  # XLabs
    ("diffusion_model.double_blocks.0.processor.proj_lora1", FLUX, "double_blocks.0.img_attn.proj", None),
    ("single_blocks.1.processor.qkv", FLUX, LINEAR1, (0, 3 * H)),  # XLabs' suffix is "_lora.down.weight"
    ("single_blocks.1.processor.proj", FLUX, "single_blocks.1.linear2", None),
    ("diffusion_model.layers.3.attention.to_k", Z_IMAGE, "layers.3.attention.qkv", (H, 2 * H)),
    ("lora_unet_blocks_1_self_attn_q", {"blocks.1.attn1.to_q": (H, H)}, "blocks.1.attn1.to_q", None),
]


@pytest.mark.parametrize(("name", "layers", "layer", "rows"), SPELLINGS, ids=[name for name, *_ in SPELLINGS])
def test_each_spelling_finds_its_layer_and_rows(
    name: str, layers: Layers, layer: str, rows: tuple[int, int] | None, write: Write
) -> None:
    out_features = layers[layer][0] if rows is None else rows[1] - rows[0]
    tensors = pair(name, out_features, layers[layer][1])
    match = match_of(write(tensors), layers)
    assert only(match) == (layer, rows)
    down, up = tensors.values()
    expected = np.zeros(layers[layer], np.float32)
    if name.endswith("norm_out.linear"):  # diffusers: scale, shift; the checkpoint: shift, scale
        up = np.concatenate([up[H:], up[:H]])
    expected[slice(*(rows or (0, None)))] = up @ down
    np.testing.assert_allclose(change(match, layer), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", range(len(LORA_FACTORS)), ids=[down for down, _ in LORA_FACTORS])
@pytest.mark.parametrize("alpha", [None, ".alpha", ".lora_alpha", ".lora_alpha.style_0"])
def test_each_suffix_is_read(style: int, alpha: str | None, write: Write) -> None:
    name = "transformer.transformer_blocks.0.attn.to_k"
    tensors = pair(name, H, H, style=style)
    if alpha:
        tensors[name + alpha] = np.float32(5)
    match = match_of(write(tensors), FLUX)
    assert only(match) == (QKV, (H, 2 * H))
    assert match.matched[QKV][0].scale == (5 / R if alpha else 1)


@pytest.mark.parametrize(
    "alpha",
    [
        *(np.full(shape, 6, np.float32) for shape in ((), (1,), (1, 1))),
        *(dtype(6) for dtype in (np.float16, np.float64, np.int64)),
        ("BF16", np.array([0x40C0], np.uint16)),
        ("F8_E4M3", np.array(0x4C, np.uint8)),
    ],
    ids=range(8),
)
def test_alpha_may_be_of_any_dtype_and_have_a_dimension(alpha: Any, write: Write) -> None:
    match = match_of(write({**pair("blocks.1.ffn.0", 4 * H, H), "blocks.1.ffn.0.alpha": alpha}), WAN)
    assert match.matched["blocks.1.ffn.0"][0].scale == 6 / R


def test_factors_of_a_1x1_convolution_fit_a_linear_layer(write: Write) -> None:
    tensors = {key: value[:, :, None, None] for key, value in pair("x", H, H).items()}
    down, up = (value[:, :, 0, 0] for value in tensors.values())
    assert np.array_equal(change(match_of(write(tensors), {"x": (H, H)}), "x"), up @ down)


def test_slices_and_files_add_up_on_one_layer(write: Write) -> None:
    slices: Tensors = {}
    for seed, part in enumerate(["to_q", "to_k", "to_v"]):
        slices |= pair(f"transformer.transformer_blocks.0.attn.{part}", H, H, seed=seed)
    whole = pair("lora_unet_double_blocks_0_img_attn_qkv", 3 * H, H, style=3, seed=9)
    loras = [load_lora(write(slices, "a.safetensors"), 0.5), load_lora(write(whole, "b.safetensors"), -2.0)]
    match = match_loras(loras, FLUX)
    values = list(slices.values())
    expected = np.concatenate([0.5 * up @ down for down, up in zip(values[::2], values[1::2], strict=True)])
    down, up = whole.values()
    np.testing.assert_allclose(change(match, QKV), expected - 2 * up @ down, rtol=1e-4, atol=1e-5)
    rows = calibration_rows(match, QKV)
    assert np.array_equal(rows, np.concatenate([*values[::2], down]))
    assert match.summary() == "4 adapters on 1 layer"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(start=st.integers(0, 7 * H), count=st.integers(1, 7 * H))
@pytest.mark.parametrize("layer", [LINEAR1, "final_layer.adaLN_modulation.1"])
def test_merging_into_any_slice_is_merging_into_the_whole_and_slicing(
    layer: str, start: int, count: int, write: Write
) -> None:
    tensors = pair("transformer.single_transformer_blocks.1.attn.to_k", H, H)
    tensors |= pair("transformer.single_transformer_blocks.1.proj_mlp", 4 * H, H, seed=1)
    match = match_of(write(tensors | pair("norm_out.linear", 2 * H, H, seed=2)), FLUX)
    whole = change(match, layer)
    part = np.ones_like(whole[start : start + count])
    match.add_to(part, layer, start)
    np.testing.assert_allclose(part, 1 + whole[start : start + count], rtol=1e-5, atol=1e-6)


FFN = pair("blocks.1.ffn.0", 4 * H, H)
DOWN, UP = FFN
Q = "blocks.1.self_attn.q"
ONES = np.ones((H, H), np.float32)
PARTS = ("blocks.1.self_attn.k", "lora_unet_blocks_1_self_attn_k", "attn.q", "other.blocks.1.self_attn.q",
         "self_attn.q", "lora_unet_1_self_attn_q")  # fmt: skip
TEXT_ENCODERS = (
    "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_projection",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
)  # fmt: skip
UNSUPPORTED = {
    "GLoRA": (".a1.weight", ".b2.weight"),
    "OFT": (".oft_blocks", ".oft_diag", ".oft_R.weight", ".oft_R.default.weight"),
    "IA3": (".on_input", ".ia3_l"),
    "a replaced weight": (".set_weight",),
}

# (the list of the report, the name that it says, the tensors, why, the layers)
LEFT_OVER: list[tuple[str, str, Tensors, str, tuple[str, ...]]] = [
    *(("unmatched", name, pair(name, H, H), "no linear layer of the checkpoint has this name", ()) for name in PARTS),
    *(("unmatched", name, {name: np.ones(1, np.float32)}, "no known kind of adapter tensor", ())
      for name in ("blocks.1.norm.scale", f"{Q}.alpha", ".alpha")),
    ("unmatched", "conv", {"conv.lora_A.weight": np.ones((R, H, 3, 3)), "conv.lora_B.weight": np.ones((H, R, 1, 1))},
     "changes a convolution, and no linear layer of the checkpoint has this name", ()),
    ("ambiguous", "lora_unet_a_b_c", pair("lora_unet_a_b_c", H, H), "the name may mean 2 parts of the checkpoint",
     ("a.b_c", "a_b.c")),
    *(("text_encoder", name, {**pair(name, H, H), f"{name}.alpha": np.float32(1)}, "belongs to a text encoder", ())
      for name in TEXT_ENCODERS),
    *(("unsupported", "blocks.1.ffn.0", {f"blocks.1.ffn.0{suffix}": np.ones(4 * H, np.float32)},
       "bias difference is not supported", ("blocks.1.ffn.0.bias",)) for suffix in (".diff_b",
       ".lora_B.bias")),
    *(("unsupported", Q, {**factors, Q + suffix: ONES, f"{Q}.alpha": np.float32(1)}, f"{kind} is not supported", (Q,))
      for kind, suffixes in UNSUPPORTED.items() for suffix in suffixes
      for factors in ({}, pair(Q, H, H))),  # factors that are half of a change are not applied
]  # fmt: skip


@pytest.mark.parametrize(("listed", "name", "tensors", "reason", "layers"), LEFT_OVER)
def test_what_cannot_be_applied_is_reported_and_the_rest_applies(
    listed: str, name: str, tensors: Tensors, reason: str, layers: tuple[str, ...], write: Write
) -> None:
    known = {"blocks.11.self_attn.k": (H, H), "a.b_c": (H, H), "a_b.c": (H, H), **WAN}
    for encoder in TEXT_ENCODERS:  # never matched, even where such a layer exists
        known |= {encoder: (H, H), encoder.removeprefix("lora_"): (H, H)}
    match = match_of(write({**FFN, **tensors}), known)
    assert list(match.matched) == ["blocks.1.ffn.0"]
    assert [(each.kind, each.name, each.reason, set(each.layers)) for each in match.left] == [
        (listed, name, reason, set(layers))
    ]


def test_two_names_for_the_same_rows_in_one_file_are_reported_and_not_applied(write: Write) -> None:
    whole, part = "diffusion_model.layers.3.attention.qkv", "diffusion_model.layers.3.attention.to_k"
    other = "context_refiner.0.attention.out"
    match = match_of(write({**pair(whole, 3 * H, H), **pair(part, H, H), **pair(other, H, H)}), Z_IMAGE)
    assert list(match.matched) == [other]
    assert {(found.kind, found.name, found.reason) for found in match.left} == {
        ("ambiguous", one, f"{rival} in the same file means the same rows")
        for one, rival in ((whole, part), (part, whole))
    }


def test_the_report_is_json_and_complete(write: Write) -> None:
    name = "transformer.transformer_blocks.0.attn.to_k"
    tensors = {
        **pair(name, H, H),
        **pair("nowhere", H, H),
        **pair("lora_te_x", H, H),
        "lora_unet_single_blocks_1_linear1.oft_blocks": np.ones((2, 2), np.float32),
    }
    path = write(tensors)
    match = match_of(path, FLUX, strength=0.5)

    def left_over(name: str, reason: str, *layers: str) -> list[dict[str, Any]]:
        return [{"file": str(path), "name": name, "reason": reason, "layers": list(layers)}]

    told = {"kind": "LoRA", "rank": R, "dora": False, "scale": 0.5, "rows": [H, 2 * H]}
    assert json.loads(json.dumps(match.as_json())) == {
        "matched": {QKV: [{"file": str(path), "name": name, **told}]},
        "beside": {},
        "unmatched": left_over("nowhere", "no linear layer of the checkpoint has this name"),
        "ambiguous": [],
        "unsupported": left_over("lora_unet_single_blocks_1_linear1", "OFT is not supported", LINEAR1),
        "text_encoder": left_over("lora_te_x", "belongs to a text encoder"),
    }
    assert match.summary() == "1 adapter on 1 layer, 1 unmatched, 1 unsupported, 1 for text encoders"


def without(tensors: Tensors, key: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name != key}


def with_value(tensors: Tensors, key: str, value: float) -> Tensors:
    changed = tensors[key].copy()
    changed[-1, -1] = value
    return {**tensors, key: changed}


ALPHA = "blocks.1.ffn.0.alpha"
KOHYA_DOWN = "blocks.1.ffn.0.lora_down.weight"
RANK_0 = {DOWN: np.ones((0, H), np.float32), UP: np.ones((4 * H, 0), np.float32)}
ONE_DIMENSION = "a factor should have 2 dimensions, found shape [8]"
TWICE = f"{DOWN} is the same part of the adapter"

# (what is wrong, tensors, the tensor named, the message)
DAMAGED: list[tuple[str, Mapping[str, Any], str, str]] = [
    ("no up", without(FFN, UP), DOWN, "this down factor has no up factor (the file is incomplete)"),
    ("no down", without(FFN, DOWN), UP, "this up factor has no down factor (the file is incomplete)"),
    ("rank", {**FFN, UP: np.ones((4 * H, 3), np.float32)}, UP, f"its rank is 3, but {DOWN} has rank 2"),
    ("rank 0", RANK_0, UP, f"the rank of {DOWN} is 0"),
    ("NaN", with_value(FFN, DOWN, np.nan), DOWN, "has NaN or infinite values (the file is damaged)"),
    ("infinity", with_value(FFN, UP, -np.inf), UP, "has NaN or infinite values (the file is damaged)"),
    ("integers", {**FFN, DOWN: np.ones((R, H), np.int8)}, DOWN, "a factor should be floats, found I8"),
    ("one dimension", {**FFN, DOWN: np.ones(H, np.float32)}, DOWN, ONE_DIMENSION),
    ("alphas", {**FFN, ALPHA: np.ones(2, np.float32)}, ALPHA, "alpha should be one number, found shape [2]"),
    ("alpha is NaN", {**FFN, ALPHA: np.float32(np.nan)}, ALPHA, "alpha is nan (the file is damaged)"),
    ("alpha is a bool", {**FFN, ALPHA: np.array(True)}, ALPHA, "alpha should be a number, found BOOL"),
    ("two spellings", {**FFN, KOHYA_DOWN: FFN[DOWN]}, KOHYA_DOWN, TWICE),
    ("not a LoRA", {"a.weight": np.ones((2, 2), np.float32)}, "a.weight", "not a LoRA: none of its 1 tensors has"),
]


@pytest.mark.parametrize(
    ("tensors", "tensor", "message"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED]
)
def test_a_damaged_file_is_refused_with_file_and_tensor(
    tensors: Mapping[str, Any], tensor: str, message: str, write: Write
) -> None:
    path = write(tensors)
    with pytest.raises(LoraError) as caught:
        load_lora(path)
    assert str(caught.value).startswith(f"{path}: {tensor}: {message}")


TO_K = "transformer.transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("blocks.1.ffn.0", ((R, H + 1), (4 * H, R)), "[32, 9] and would widen blocks.1.ffn.0, which is [32, 8]"),
        ("blocks.1.ffn.0", ((R, H), (3 * H, R)), "[24, 8], but blocks.1.ffn.0 is [32, 8]"),
        ("blocks.1.ffn.0", ((R, H, 3, 3), (H, R, 1, 1)), "[8, 72], but blocks.1.ffn.0 is [32, 8]"),
        (TO_K, ((R, H - 1), (H, R)), f"[8, 7], but the part of {QKV} that it means is [8, 8]"),
    ],
)
def test_shapes_that_do_not_fit_are_left_out_or_refused_where_nothing_else_does(
    name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], message: str, write: Write
) -> None:
    layers = {**WAN, **FLUX}
    tensors = {f"{name}.lora_A.weight": np.ones(shapes[0]), f"{name}.lora_B.weight": np.ones(shapes[1])}
    path = write(tensors)
    with pytest.raises(LoraError) as caught:
        match_of(path, layers)
    assert str(caught.value).startswith(
        f"{path}: {name}: nothing in this LoRA can be applied: 1 unsupported (its change is {message}); the "
    )
    match = match_of(write({**tensors, **pair("blocks.1.self_attn.q", H, H)}), layers)
    assert list(match.matched) == ["blocks.1.self_attn.q"]
    assert [(each.kind, each.name, each.reason) for each in match.left] == [
        ("unsupported", name, f"its change is {message}")
    ]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("diffusion_model.double_blocks.0.img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("lora_unet_double_blocks_0_img_attn_qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("double_blocks.0.processor.proj_lora1", ["attn.to_out.0"]),
    ],
)
def test_names_of_fused_layers_mean_all_their_parts(name: str, parts: list[str], write: Write) -> None:
    """A checkpoint with diffusers' names, and an adapter with the authors' name."""
    layers = {f"transformer_blocks.0.{part}": (H, H) for part in [*parts, "attn.add_q_proj"]}
    tensors = {**pair(name, len(parts) * H, H), f"{name}.diff_b": np.arange(len(parts) * H, dtype=np.float32)}
    down, up = list(tensors.values())[:2]
    biases = {f"{layer}.bias": (H,) for layer in layers}
    match = match_loras([load_lora(write(tensors))], layers, others=biases)
    assert match.left == []
    found = np.concatenate([change(match, f"transformer_blocks.0.{part}") for part in parts])
    np.testing.assert_allclose(found, up @ down, rtol=1e-5, atol=1e-6)
    added = [match.beside[f"transformer_blocks.0.{part}.bias"][0] for part in parts]
    assert [each.target.first for each in added] == [H * number for number in range(len(parts))]
    assert not change(match, "transformer_blocks.0.attn.add_q_proj").any()


@pytest.mark.parametrize("wrapper", names.WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_words_of_wrappers_in_names_of_norms_do_not_matter(write: Write, prefix: str, wrapper: str) -> None:
    block = f"{prefix}blocks.1.{wrapper}"
    tensors = {**pair("blocks.1.self_attn.q", H, H), "blocks.1.self_attn.norm_q.diff": np.ones(H, np.float32)}
    norm = f"{block}self_attn.norm_q.weight"
    match = match_loras([load_lora(write(tensors))], {f"{block}self_attn.q": (H, H)}, others={norm: (H,)})
    assert (list(match.matched), list(match.beside)) == ([f"{block}self_attn.q"], [norm])
    assert match.left == []


def test_halves_are_swapped_for_a_checkpoint_in_diffusers_names_too(write: Write) -> None:
    tensors = pair("final_layer.adaLN_modulation.1", 2 * H, H)
    down, up = tensors.values()
    match = match_of(write(tensors), {"norm_out.linear": (2 * H, H)})
    np.testing.assert_allclose(change(match, "norm_out.linear"), np.concatenate([up[H:], up[:H]]) @ down, rtol=1e-5)


def test_of_a_widened_layer_the_bias_is_left_out_with_the_rest(write: Write) -> None:
    """As in the control LoRAs of Flux.1's authors."""
    tensors = {
        **pair("img_in", H, 2 * H),
        **pair(LINEAR1, 7 * H, H),
        "img_in.lora_B.bias": np.ones(H, np.float32),
        f"{LINEAR1}.lora_B.bias": np.ones(7 * H, np.float32),
    }
    layers = {"img_in": (H, H), LINEAR1: (7 * H, H)}
    biases = {f"{layer}.bias": (rows,) for layer, (rows, _) in layers.items()}
    match = match_loras([load_lora(write(tensors))], layers, others=biases)
    assert (list(match.matched), list(match.beside)) == ([LINEAR1], [f"{LINEAR1}.bias"])
    assert [(found.name, found.reason) for found in match.left] == [
        ("img_in", "its change is [8, 16] and would widen img_in, which is [8, 8]"),
        ("img_in", "bias difference of a layer that is left out"),
    ]


def test_of_two_layers_of_one_name_the_one_whose_shape_fits_is_meant(write: Write) -> None:
    layers = {"head.head": (2 * H, H), "final_layer.linear": (H, H)}  # both are "proj_out" in diffusers
    assert only(match_of(write(pair("transformer.proj_out", H, H)), layers)) == ("final_layer.linear", None)


def test_a_file_that_matches_nothing_is_refused_with_all_reasons_also_behind_another(write: Write) -> None:
    tensors = {
        **pair("nowhere", H, H),
        "blocks.1.self_attn.q.oft_blocks": np.ones((H, R), np.float32),
        **pair("lora_te_x", H, H),
        **pair("blocks.1.self_attn.o", H, H - 1),
        "blocks.1.self_attn.o.diff_b": np.ones(H, np.float32),
        "strange": np.ones(2, np.float32),
    }
    path = write(tensors)
    with pytest.raises(LoraError) as caught:
        match_loras([load_lora(write(FFN, "good.safetensors")), load_lora(path)], WAN)
    assert str(caught.value) == (
        f"{path}: blocks.1.self_attn.o: nothing in this LoRA can be applied: 3 unsupported (its change is [8, 7], but "
        "blocks.1.self_attn.o is [8, 8]), 2 unmatched (no linear layer of the checkpoint has this name), 1 for text "
        "encoders (belongs to a text encoder); the checkpoint's layers have names like blocks.1.self_attn.q "
        "(was it made for this model?)"
    )


def test_an_empty_file_is_not_a_lora(write: Write) -> None:
    with pytest.raises(LoraError, match="not a LoRA: none of its 0 tensors"):
        load_lora(write({}))


# by FILE or FILE:STRENGTH


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        ("a.safetensors:", ("a.safetensors:", 1.0)),
        ("style: night.safetensors", ("style: night.safetensors", 1.0)),
        ("style: night.safetensors:2", ("style: night.safetensors", 2.0)),
        ("C:/loras/a.safetensors", ("C:/loras/a.safetensors", 1.0)),
        ("C:\\loras\\a.safetensors:2", ("C:\\loras\\a.safetensors", 2.0)),
        ("C:1", ("C:1", 1.0)),
    ],
)
def test_a_strength_follows_the_last_colon(text: str, expected: tuple[str, float]) -> None:
    assert split_strength(text) == expected


def test_a_file_whose_own_name_ends_like_a_strength_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "style:0.5"
    path.touch()
    assert split_strength(str(path)) == (str(path), 1.0)
    assert split_strength(f"{path}:0.8") == (str(path), 0.8)


def test_adapters_are_closed_also_where_a_later_one_is_broken(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Path] = []
    monkeypatch.setattr(Checkpoint, "close", lambda self: closed.append(self.path))
    good, bad = write(FFN), write({"x": np.ones(1, np.float32)}, "bad.safetensors")
    with open_loras([f"{good}:0.5", str(good)]) as loras:
        assert [lora.strength for lora in loras] == [0.5, 1.0]
        assert closed == []
    assert closed == [good, good]
    with pytest.raises(LoraError, match="not a LoRA"), open_loras([str(good), str(bad)]):
        pass
    assert closed == [good, good, good]


# merged, and what is left of it


def test_rows_are_merged_at_their_strength_and_the_weight_stays(write: Write) -> None:
    match = match_of(write(pair("x", 4, 3)), {"x": (4, 3), "y": (4, 3)}, strength=-0.5)
    down, up = pair("x", 4, 3).values()
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept = weight.copy()
    merged = merge_rows(match, "x", weight, (1, 3))
    np.testing.assert_allclose(merged, kept - 0.5 * up[1:3] @ down, rtol=1e-6)
    np.testing.assert_array_equal(weight, kept)
    assert merge_rows(match, "y", weight, (1, 3)) is weight
    assert calibration_rows(match, "y").shape == (0, 3)


def survival(*values: Any) -> Survival:
    found = Survival()
    found.add(*(np.asarray(array, np.float32) for array in values))
    return found


def test_what_is_left_is_measured_as_the_formula_says() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(32, 48)).astype(np.float32)
    merged = weight + np.float32(0.05) * generator.normal(size=weight.shape).astype(np.float32)
    stored = np.round(merged * 8) / 8
    found = survival(weight, merged, stored)
    delta, left = merged.astype(np.float64) - weight, stored.astype(np.float64) - weight
    cosine = (left * delta).sum() / np.linalg.norm(left) / np.linalg.norm(delta)
    assert found.correlation == pytest.approx(cosine, rel=1e-9)
    assert found.decibels == pytest.approx(20 * np.log10(np.linalg.norm(delta) / np.linalg.norm(left - delta)))
    assert 0.3 < found.correlation < 0.95
    top, rest = (survival(weight[rows], merged[rows], stored[rows]) for rows in (slice(0, 7), slice(7, 32)))
    assert (top + rest).as_json() == pytest.approx(found.as_json(), rel=1e-12)


def test_what_is_not_finite_has_no_number() -> None:
    assert survival([1.0], [1.0], [2.0]).as_json() == Survival().as_json() == {"correlation": None, "db": None}
    exact = survival([1, 2], [1.5, 1], [1.5, 1])
    assert (exact.decibels, exact.as_json()) == (np.inf, {"correlation": pytest.approx(1), "db": None})
