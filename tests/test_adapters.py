"""Kinds of adapters: changes computed by hand, and by the libraries that train them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from convert_to_quant.errors import LoraError
from convert_to_quant.lora import LoraMatch, load_lora, match_loras

LAYER, OUT, IN, RANK = "blocks.0.q", 64, 48, 2
Tensors = Mapping[str, NDArray[Any]]


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHT = normal(OUT, IN, seed=99)


@pytest.fixture
def match(save):
    """Writes tensors, and matches them with one layer of the weight `WEIGHT`."""

    def of(tensors: Tensors, strength: float = 1.0, weight: NDArray[np.float32] = WEIGHT) -> LoraMatch:
        lora = load_lora(save("x.safetensors", tensors), strength)
        return match_loras([lora], {LAYER: weight.shape}, lambda _, rows: weight[rows].copy())

    return of


def change(found: LoraMatch, weight: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The change of the layer's weight, which for DoRA depends on the weight."""
    before = np.zeros((OUT, IN), np.float32) if weight is None else weight
    after = before.copy()
    found.add_to(after, LAYER)
    return after - before


SHAPES: dict[str, tuple[int, ...]] = {
    "lora_down.weight": (RANK, IN), "lora_up.weight": (OUT, RANK), "lora_mid.weight": (RANK, RANK, 1, 1),
    "hada_w1_a": (OUT, RANK), "hada_w1_b": (RANK, IN), "hada_w2_a": (OUT, RANK), "hada_w2_b": (RANK, IN),
    "lokr_w1": (8, 4), "lokr_w2": (8, 12), "lokr_w1_a": (8, 3), "lokr_w1_b": (3, 4), "lokr_w2_a": (8, RANK),
    "lokr_w2_b": (RANK, 12), "diff": (OUT, IN), "hada_t1": (RANK, RANK), "hada_t2": (RANK, RANK),
    "lokr_t2": (RANK, RANK),
}  # fmt: skip
TUCKER = {"hada_w1_a": (RANK, OUT), "hada_w2_a": (RANK, OUT), "lokr_w2_a": (RANK, 8)}

# Tensors -> the change as numpy has it, and the rank that alpha is divided by.
FORMULAS: dict[str, tuple[str, Callable[..., Any], int | None]] = {
    "LoRA": ("lora_down.weight lora_up.weight", lambda down, up: up @ down, RANK),
    "LoRA, split": ("lora_down.weight lora_up.weight lora_mid.weight",
                    lambda down, up, mid: up @ mid[:, :, 0, 0] @ down, RANK),
    "LoHa": ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b", lambda a, b, c, d: (a @ b) * (c @ d), RANK),
    "LoHa, Tucker": ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
                     lambda a, b, c, d, t, u: (a.T @ t @ b) * (c.T @ u @ d), RANK),
    "LoKr": ("lokr_w1 lokr_w2", np.kron, None),
    "LoKr, first decomposed": ("lokr_w1_a lokr_w1_b lokr_w2", lambda a, b, w: np.kron(a @ b, w), 3),
    "LoKr, second decomposed": ("lokr_w1 lokr_w2_a lokr_w2_b", lambda w, a, b: np.kron(w, a @ b), RANK),
    "LoKr, both decomposed": ("lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b",
                              lambda a, b, c, d: np.kron(a @ b, c @ d), RANK),
    "LoKr, Tucker": ("lokr_w1 lokr_w2_a lokr_w2_b lokr_t2", lambda w, a, b, t: np.kron(w, a.T @ t @ b), RANK),
    "full difference": ("diff", lambda diff: diff, None),
}  # fmt: skip


def tensors_of(kind: str) -> dict[str, NDArray[np.float32]]:
    shapes = SHAPES | (TUCKER if "Tucker" in kind else {})
    roles = enumerate(FORMULAS[kind][0].split())
    return {f"{LAYER}.{role}": normal(*shapes[role], seed=number) for number, role in roles}


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_change_is_the_formula_times_strength_and_alpha_over_rank(kind, match):
    tensors, (_, formula, rank) = tensors_of(kind), FORMULAS[kind]
    wanted = formula(*(each.astype(np.float64) for each in tensors.values()))
    np.testing.assert_allclose(change(match(tensors, 0.5)), 0.5 * wanted, rtol=1e-4, atol=1e-5)
    found = match({**tensors, f"{LAYER}.alpha": np.float32(3)})
    np.testing.assert_allclose(change(found), wanted * (3 / rank if rank else 1), rtol=1e-4, atol=1e-5)
    (delta,) = found.matched[LAYER]
    assert kind.startswith(delta.adapter.kind.title)
    part = np.zeros((7, IN), np.float32)  # across rows of both factors of a Kronecker product
    found.add_to(part, LAYER, 5)
    np.testing.assert_array_equal(part, change(found)[5:12])


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("ending", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("shape", [(OUT,), (OUT, 1), (1, IN)])
def test_a_magnitude_scales_rows_or_columns_of_what_was_added(kind, ending, shape, match):
    tensors, (_, formula, rank) = tensors_of(kind), FORMULAS[kind]
    magnitude = np.abs(normal(*shape)) + 1
    axis = 0 if shape[0] == 1 else 1
    merged = WEIGHT + formula(*tensors.values()) * (3 / rank if rank else 1)
    norms = np.linalg.norm(merged, axis=axis, keepdims=True)
    wanted = magnitude.reshape(norms.shape) * merged / norms
    found = match({**tensors, f"{LAYER}.alpha": np.float32(3), f"{LAYER}.{ending}": magnitude}, 0.5)
    for rows in (slice(0, OUT), slice(5, 12)):
        weight = WEIGHT[rows].copy()
        found.add_to(weight, LAYER, rows.start)
        np.testing.assert_allclose(weight, ((WEIGHT + wanted) / 2)[rows], rtol=1e-4, atol=1e-4)


def test_magnitudes_per_column_see_what_files_before_them_added(save):
    one, two = normal(OUT, IN, seed=5), normal(OUT, IN, seed=6)
    magnitude = np.abs(normal(1, IN)) + 1
    first = save("a.safetensors", {f"{LAYER}.diff": one})
    second = save("b.safetensors", {f"{LAYER}.diff": two, f"{LAYER}.dora_scale": magnitude})
    loras = [load_lora(path) for path in (first, second)]
    found = match_loras(loras, {LAYER: (OUT, IN)}, lambda _, rows: WEIGHT[rows].copy())
    merged = WEIGHT + one + two
    wanted = magnitude * merged / np.linalg.norm(merged, axis=0)
    np.testing.assert_allclose(change(found, WEIGHT) + WEIGHT, wanted, rtol=1e-4, atol=1e-4)


def test_a_magnitude_per_column_needs_the_weights(save):
    path = save("x.safetensors", {**tensors_of("LoRA"), f"{LAYER}.dora_scale": np.ones((1, IN), np.float32)})
    with pytest.raises(LoraError, match="nothing in this LoRA can be applied"):
        match_loras([load_lora(path)], {LAYER: (OUT, IN)})


ONES = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("tensors", "tensor", "message"),
    [
        ({"hada_w1_a": ONES, "hada_w1_b": ONES, "hada_w2_a": ONES}, "hada_w1_a",
         "this hada_w1_a factor has no hada_w2_b factor (the file is incomplete)"),
        ({"lokr_w1": ONES}, "lokr_w1", "this lokr_w1 factor has no lokr_w2 factor (the file is incomplete)"),
        ({"lokr_w1": ONES, "lokr_w2_a": ONES, "lokr_w2_b": np.ones((3, 2), np.float32)}, "lokr_w2_a",
         f"its rank is 2, but {LAYER}.lokr_w2_b has rank 3"),
        ({"hada_w1_a": ONES, "hada_w1_b": ONES, "hada_w2_a": np.ones((3, 2), np.float32), "hada_w2_b": ONES},
         "hada_w1_a", f"it makes [2, 2], but {LAYER}.hada_w2_a makes [3, 2]"),
        ({"diff": ONES, "dora_scale": np.ones(3, np.float32)}, "dora_scale",
         "a magnitude should have 2 values, one per row, or [1, 2], found shape [3]"),
        ({"diff": ONES, "dora_scale": np.float32([1, np.nan])}, "dora_scale",
         "a magnitude should be finite floats (the file is damaged)"),
    ],
)  # fmt: skip
def test_damage_is_named_with_its_tensor(tensors, tensor, message, match):
    with pytest.raises(LoraError) as caught:
        match({f"{LAYER}.{role}": each for role, each in tensors.items()})
    assert str(caught.value).endswith(f"x.safetensors: {LAYER}.{tensor}: {message}")


def test_factors_of_two_kinds_under_one_name_are_reported(match):
    tensors = {**tensors_of("LoRA"), f"{LAYER}.lokr_w1": ONES}
    with pytest.raises(LoraError, match="a mix of down and lokr_w1 and up is not supported"):
        match(tensors)


# what libraries compute


@pytest.mark.parametrize("per", ["no magnitude", "row", "column"])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("locon.LoConModule", {}),
        ("loha.LohaModule", {"alpha": RANK}),  # 4.1.3 multiplies these two by alpha / rank twice where it merges
        ("lokr.LokrModule", {"factor": 8, "alpha": RANK}),
        ("lokr.LokrModule", {"factor": 8, "alpha": RANK, "decompose_both": True}),
        ("lokr.LokrModule", {"factor": 4, "full_matrix": True}),
    ],
)
def test_changes_are_those_of_lycoris(module, options, per, match):
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed: changes are held to its formulas alone")
    where, _, name = module.partition(".")
    made = getattr(importlib.import_module(f"lycoris.modules.{where}"), name)
    layer = nn.Linear(IN, OUT)
    torch.manual_seed(1)
    keywords: dict[str, Any] = {"lora_dim": RANK, "alpha": 3.0, "weight_decompose": per != "no magnitude", **options}
    adapter = made(LAYER, layer, 1.0, wd_on_out=per == "row", **keywords)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = {f"lycoris_blocks_0_q.{key}": each.detach().float().numpy() for key, each in adapter.state_dict().items()}
    weight = layer.weight.detach().numpy()
    with torch.no_grad():
        wanted = adapter.get_merged_weight(1.0)[0].reshape(OUT, IN).numpy()
    found = change(match(tensors, weight=weight), weight)
    np.testing.assert_allclose(weight + found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["LoraConfig", "LoraConfig, DoRA", "LoHaConfig", "LoKrConfig", "LoKrConfig, both"])
@pytest.mark.parametrize("named", ["default", "style_0"])
def test_changes_are_those_of_peft(config, named, match):
    peft = pytest.importorskip("peft", reason="peft is not installed: changes are held to its formulas alone")
    kind, _, more = config.partition(", ")
    options: dict[str, Any] = {"r": RANK, "target_modules": ["q"], "init_weights": False}
    options["lora_alpha" if kind == "LoraConfig" else "alpha"] = RANK  # it keeps alpha in another file
    if kind == "LoraConfig":
        options["init_lora_weights"] = options.pop("init_weights")
    options |= {"DoRA": {"use_dora": True}, "both": {"decompose_both": True, "decompose_factor": 8}}.get(more, {})
    torch.manual_seed(0)
    base = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(IN, OUT)})])})
    weight = base["blocks"][0]["q"].weight.detach().numpy().copy()  # type: ignore[index]
    model = peft.get_peft_model(base, getattr(peft, kind)(**options), adapter_name=named)
    tensors = {
        key: each.detach().numpy().copy()
        for key, each in model.state_dict().items()
        if named in key.split(".") or "magnitude" in key
    }
    saved = {
        key: each.numpy().copy() for key, each in peft.get_peft_model_state_dict(model, adapter_name=named).items()
    }
    wanted = model.merge_and_unload()["blocks"][0]["q"].weight.detach().numpy()
    for names in (tensors, saved):
        found = match(names, weight=weight)
        assert found.left == []
        np.testing.assert_allclose(weight + change(found, weight), wanted, rtol=1e-4, atol=1e-5)
