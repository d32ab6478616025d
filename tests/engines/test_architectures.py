"""Every family, tiny, under its authors' names, against diffusers' own class filled by diffusers' own converter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from convert_to_quant import families
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.engines import noise
from convert_to_quant.engines.provenance import Piece
from convert_to_quant.families.running import Geometry, Inputs
from convert_to_quant.layers import dequantize, find_layers

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself

SIZE = Geometry(height=2, width=3, frames=2, text_tokens=5)

Shapes = dict[str, tuple[int, ...]]


def matrix(name: str, out_features: int, in_features: int, bias: bool = True) -> Shapes:
    """A linear layer's tensors."""
    shapes: Shapes = {f"{name}.weight": (out_features, in_features)}
    return shapes | ({f"{name}.bias": (out_features,)} if bias else {})


def pair(first: str, second: str, sizes: tuple[int, int, int], bias: bool = True) -> Shapes:
    """Two layers in a row, and the sizes before, between and behind them."""
    return matrix(first, sizes[1], sizes[0], bias) | matrix(second, sizes[2], sizes[1], bias)


def flux_blocks(hidden: int, head: int, gate: int = 1, modulated: bool = True, bias: bool = True) -> Shapes:
    """Two double and two single blocks of Flux.1, Chroma (not modulated) or Flux.2 (gated, MLP of 3)."""
    mlp = 4 if gate == 1 else 3
    shapes: Shapes = {}
    for index in range(2):
        for stream in ("img", "txt"):
            root = f"double_blocks.{index}.{stream}_"
            shapes |= matrix(root + "attn.qkv", 3 * hidden, hidden, bias) | matrix(
                root + "attn.proj", hidden, hidden, bias
            )
            shapes |= {root + "attn.norm.query_norm.scale": (head,), root + "attn.norm.key_norm.scale": (head,)}
            shapes |= matrix(root + "mlp.0", gate * mlp * hidden, hidden, bias)
            shapes |= matrix(root + "mlp.2", hidden, mlp * hidden, bias)
            shapes |= matrix(root + "mod.lin", 6 * hidden, hidden) if modulated else {}
        root = f"single_blocks.{index}."
        shapes |= matrix(root + "linear1", (3 + gate * mlp) * hidden, hidden, bias)
        shapes |= matrix(root + "linear2", hidden, (1 + mlp) * hidden, bias)
        shapes |= {root + "norm.query_norm.scale": (head,), root + "norm.key_norm.scale": (head,)}
        shapes |= matrix(root + "modulation.lin", 3 * hidden, hidden) if modulated else {}
    return shapes


def flux_1(channels: int = 8) -> Shapes:
    hidden = 32
    return (
        flux_blocks(hidden, 16)
        | matrix("img_in", hidden, channels)
        | matrix("txt_in", hidden, 24)
        | pair("time_in.in_layer", "time_in.out_layer", (256, hidden, hidden))
        | pair("vector_in.in_layer", "vector_in.out_layer", (20, hidden, hidden))
        | pair("guidance_in.in_layer", "guidance_in.out_layer", (256, hidden, hidden))
        | matrix("final_layer.linear", 8, hidden)
        | matrix("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    )


def chroma() -> Shapes:
    hidden, inner = 32, 48
    shapes = flux_blocks(hidden, 16, modulated=False)
    shapes |= matrix("img_in", hidden, 8) | matrix("txt_in", hidden, 24) | matrix("final_layer.linear", 8, hidden)
    shapes |= matrix("distilled_guidance_layer.in_proj", inner, 16)
    shapes |= matrix("distilled_guidance_layer.out_proj", hidden, inner)
    for index in range(2):
        root = f"distilled_guidance_layer.layers.{index}."
        shapes |= pair(root + "in_layer", root + "out_layer", (inner, inner, inner))
        shapes[f"distilled_guidance_layer.norms.{index}.scale"] = (inner,)
    return shapes


def flux_2(guidance: bool = True) -> Shapes:
    hidden = 32
    shapes = flux_blocks(hidden, 16, gate=2, modulated=False, bias=False)
    for name, (out_features, in_features) in {
        "img_in": (hidden, 8),
        "txt_in": (hidden, 24),
        "double_stream_modulation_img.lin": (6 * hidden, hidden),
        "double_stream_modulation_txt.lin": (6 * hidden, hidden),
        "single_stream_modulation.lin": (3 * hidden, hidden),
        "final_layer.linear": (8, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }.items():
        shapes |= matrix(name, out_features, in_features, bias=False)
    for name in ("time_in", "guidance_in") if guidance else ("time_in",):
        shapes |= pair(f"{name}.in_layer", f"{name}.out_layer", (256, hidden, hidden), bias=False)
    return shapes


def sd3(dual: bool = True) -> Shapes:
    hidden, blocks = 64, 2
    shapes: Shapes = {"pos_embed": (1, 36, hidden), "x_embedder.proj.weight": (hidden, 4, 2, 2)}
    shapes |= {"x_embedder.proj.bias": (hidden,)} | matrix("context_embedder", hidden, 24)
    shapes |= pair("t_embedder.mlp.0", "t_embedder.mlp.2", (256, hidden, hidden))
    shapes |= pair("y_embedder.mlp.0", "y_embedder.mlp.2", (20, hidden, hidden))
    for index in range(blocks):
        for stream in ("x_block", "context_block"):
            root = f"joint_blocks.{index}.{stream}."
            last = index == blocks - 1 and stream == "context_block"
            twice = dual and index == 0 and stream == "x_block"
            for attention in ("attn", "attn2") if twice else ("attn",):
                shapes |= matrix(root + f"{attention}.qkv", 3 * hidden, hidden)
                if dual:  # only 3.5 has norms
                    shapes |= {root + f"{attention}.ln_q.weight": (64,), root + f"{attention}.ln_k.weight": (64,)}
                shapes |= {} if last else matrix(root + f"{attention}.proj", hidden, hidden)
            shapes |= {} if last else pair(root + "mlp.fc1", root + "mlp.fc2", (hidden, 4 * hidden, hidden))
            pieces = 2 if last else 9 if twice else 6
            shapes |= matrix(root + "adaLN_modulation.1", pieces * hidden, hidden)
    shapes |= matrix("final_layer.linear", 4 * 4, hidden) | matrix("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return shapes


def qwen_image() -> Shapes:
    hidden, head = 32, 16
    shapes: Shapes = matrix("img_in", hidden, 8) | matrix("txt_in", hidden, 24) | {"txt_norm.weight": (24,)}
    time = "time_text_embed.timestep_embedder.linear_"
    shapes |= pair(time + "1", time + "2", (256, hidden, hidden))
    for index in range(2):
        root = f"transformer_blocks.{index}."
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes |= matrix(root + f"attn.{layer}", hidden, hidden)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[root + f"attn.{norm}.weight"] = (head,)
        for stream in ("img", "txt"):
            shapes |= pair(
                root + f"{stream}_mlp.net.0.proj", root + f"{stream}_mlp.net.2", (hidden, 4 * hidden, hidden)
            )
            shapes |= matrix(root + f"{stream}_mod.1", 6 * hidden, hidden)
    return shapes | matrix("norm_out.linear", 2 * hidden, hidden) | matrix("proj_out", 8, hidden)


def wan(image: bool = False) -> Shapes:
    hidden, channels = 128, 6 if image else 4
    shapes: Shapes = {"patch_embedding.weight": (hidden, channels, 1, 2, 2), "patch_embedding.bias": (hidden,)}
    shapes |= pair("text_embedding.0", "text_embedding.2", (24, hidden, hidden))
    shapes |= pair("time_embedding.0", "time_embedding.2", (32, hidden, hidden))
    shapes |= matrix("time_projection.1", 6 * hidden, hidden)
    for index in range(2):
        root = f"blocks.{index}."
        for attention in ("self_attn", "cross_attn"):
            for layer in "qkvo":
                shapes |= matrix(root + f"{attention}.{layer}", hidden, hidden)
            shapes |= {root + f"{attention}.norm_{part}.weight": (hidden,) for part in "qk"}
        if image:
            shapes |= matrix(root + "cross_attn.k_img", hidden, hidden) | matrix(
                root + "cross_attn.v_img", hidden, hidden
            )
            shapes[root + "cross_attn.norm_k_img.weight"] = (hidden,)
        shapes |= pair(root + "ffn.0", root + "ffn.2", (hidden, 48, hidden))
        shapes |= {
            root + "norm3.weight": (hidden,),
            root + "norm3.bias": (hidden,),
            root + "modulation": (1, 6, hidden),
        }
    if image:
        shapes |= {"img_emb.proj.0.weight": (20,), "img_emb.proj.0.bias": (20,)}
        shapes |= pair("img_emb.proj.1", "img_emb.proj.3", (20, 20, hidden))
        shapes |= {"img_emb.proj.4.weight": (hidden,), "img_emb.proj.4.bias": (hidden,)}
    return shapes | matrix("head.head", 4 * 4, hidden) | {"head.modulation": (1, 2, hidden)}


def hunyuan_video() -> Shapes:
    hidden, head = 32, 16
    shapes: Shapes = {"img_in.proj.weight": (hidden, 4, 1, 2, 2), "img_in.proj.bias": (hidden,)}
    shapes |= matrix("txt_in.input_embedder", hidden, 24)
    shapes |= pair("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2", (256, hidden, hidden))
    shapes |= pair("txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2", (24, hidden, hidden))
    for index in range(2):
        root = f"txt_in.individual_token_refiner.blocks.{index}."
        shapes |= {root + f"norm{n}.{kind}": (hidden,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= matrix(root + "self_attn_qkv", 3 * hidden, hidden) | matrix(root + "self_attn_proj", hidden, hidden)
        shapes |= pair(root + "mlp.fc1", root + "mlp.fc2", (hidden, 4 * hidden, hidden))
        shapes |= matrix(root + "adaLN_modulation.1", 2 * hidden, hidden)
    for name in ("time_in", "guidance_in"):
        shapes |= pair(f"{name}.mlp.0", f"{name}.mlp.2", (256, hidden, hidden))
    shapes |= pair("vector_in.in_layer", "vector_in.out_layer", (20, hidden, hidden))
    for index in range(2):
        for stream in ("img", "txt"):
            root = f"double_blocks.{index}.{stream}_"
            shapes |= matrix(root + "mod.linear", 6 * hidden, hidden)
            shapes |= matrix(root + "attn_qkv", 3 * hidden, hidden) | matrix(root + "attn_proj", hidden, hidden)
            shapes |= {root + f"attn_{part}_norm.weight": (head,) for part in "qk"}
            shapes |= pair(root + "mlp.fc1", root + "mlp.fc2", (hidden, 4 * hidden, hidden))
        root = f"single_blocks.{index}."
        shapes |= matrix(root + "linear1", 7 * hidden, hidden) | matrix(root + "linear2", hidden, 5 * hidden)
        shapes |= {root + f"{part}_norm.weight": (head,) for part in "qk"}
        shapes |= matrix(root + "modulation.linear", 3 * hidden, hidden)
    return (
        shapes
        | matrix("final_layer.linear", 4 * 4, hidden)
        | matrix("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    )


def ltx() -> Shapes:
    hidden = 64
    shapes: Shapes = matrix("patchify_proj", hidden, 8) | {"scale_shift_table": (2, hidden)}
    time = "adaln_single.emb.timestep_embedder.linear_"
    shapes |= pair(time + "1", time + "2", (256, hidden, hidden)) | matrix("adaln_single.linear", 6 * hidden, hidden)
    shapes |= pair("caption_projection.linear_1", "caption_projection.linear_2", (24, hidden, hidden))
    for index in range(2):
        root = f"transformer_blocks.{index}."
        shapes[root + "scale_shift_table"] = (6, hidden)
        for attention in ("attn1", "attn2"):
            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= matrix(root + f"{attention}.{layer}", hidden, hidden)
            shapes |= {root + f"{attention}.{part}_norm.weight": (hidden,) for part in "qk"}
        shapes |= pair(root + "ff.net.0.proj", root + "ff.net.2", (hidden, 4 * hidden, hidden))
    return shapes | matrix("proj_out", 8, hidden)


def next_dit(*, hidden: int, head: int, qkv: int, inner: int, modulation: int, time: int, middle: int) -> Shapes:
    """Blocks and ends that Lumina 2 and Z-Image share; `modulation` is the number of adaLN's linear layer."""
    shapes: Shapes = matrix("x_embedder", hidden, 16) | {"cap_embedder.0.weight": (24,)}
    shapes |= matrix("cap_embedder.1", hidden, 24) | pair("t_embedder.mlp.0", "t_embedder.mlp.2", (256, middle, time))
    for tower in ("layers", "noise_refiner", "context_refiner"):
        for index in range(2):
            root = f"{tower}.{index}."
            shapes |= matrix(root + "attention.qkv", qkv, hidden, bias=False)
            shapes |= matrix(root + "attention.out", hidden, hidden, bias=False)
            shapes |= {root + f"attention.{part}_norm.weight": (head,) for part in "qk"}
            shapes |= {root + f"{part}_norm{n}.weight": (hidden,) for part in ("attention", "ffn") for n in (1, 2)}
            for layer, (out_features, in_features) in {
                "w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)
            }.items():  # fmt: skip
                shapes |= matrix(root + f"feed_forward.{layer}", out_features, in_features, bias=False)
            if tower != "context_refiner":
                shapes |= matrix(root + f"adaLN_modulation.{modulation}", 4 * hidden, time)
    shapes |= matrix("final_layer.linear", 16, hidden) | matrix("final_layer.adaLN_modulation.1", hidden, time)
    return shapes | {"norm_final.weight": (hidden,)}


def lumina_2() -> Shapes:
    return next_dit(hidden=36, head=12, qkv=60, inner=100, modulation=1, time=36, middle=36)


def z_image() -> Shapes:
    shapes = next_dit(hidden=48, head=16, qkv=144, inner=128, modulation=0, time=48, middle=1024)
    return shapes | {"x_pad_token": (1, 48), "cap_pad_token": (1, 48)}


CASES: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "flux.1 dev": ("flux1", flux_1),
    "flux.1 fill": ("flux1", lambda: flux_1(channels=20)),
    "flux.2 dev": ("flux2", flux_2),
    "flux.2 klein": ("flux2", lambda: flux_2(guidance=False)),
    "chroma": ("chroma", chroma),
    "sd 3": ("sd3", lambda: sd3(dual=False)),
    "sd 3.5": ("sd3", sd3),
    "qwen-image": ("qwen-image", qwen_image),
    "wan text to video": ("wan", wan),
    "wan image to video": ("wan", lambda: wan(image=True)),
    "hunyuan video": ("hunyuan-video", hunyuan_video),
    "ltx": ("ltx", ltx),
    "lumina 2": ("lumina2", lumina_2),
    "z-image": ("z-image", z_image),
}


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    """Weights that keep signals at ordinary sizes; norms near 1, everything different."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            state[name] = 1 + 0.3 * values if "norm" in name or "scale" in name else 0.3 * values
        else:
            state[name] = values / np.sqrt(np.prod(shape[1:]))
    return state


@pytest.fixture(params=CASES, ids=[case.replace(" ", "-") for case in CASES])
def case(request: pytest.FixtureRequest) -> tuple[str, Shapes]:
    """Family and the shapes of a tiny checkpoint."""
    family, shapes = CASES[request.param]
    return family, shapes()


@pytest.fixture
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' converters split some tensors at the sizes of one published model; the shares are the same here."""
    split = torch.split

    def proportional(tensor: Tensor, sizes: Any, dim: int = 0) -> Any:
        shares = {3072: (1, 1, 1, 4), 2304: (3, 1, 1)}.get(sizes[0]) if isinstance(sizes, (tuple, list)) else None
        if shares is not None:
            sizes = [share * len(tensor) // sum(shares) for share in shares]
        return split(tensor, sizes, dim)

    monkeypatch.setattr(single_file_utils.torch, "split", proportional)


def own_model(path: Path, family: str, config: Any) -> nn.Module:
    """diffusers' class with a checkpoint's real weights, by diffusers' own converter."""
    architecture = families.FAMILIES[family].architecture
    with open_checkpoint(path) as checkpoint:
        layers = {layer.weight.name: layer for layer in find_layers(checkpoint).linear()}
        state = {
            name: torch.from_numpy(dequantize(checkpoint, layers[name]) if name in layers else checkpoint.float32(name))
            for name in checkpoint.tensors
            if name in layers or not name.endswith((".weight_scale", ".comfy_quant"))
        }
    for name in architecture.ignored:
        state.pop(name, None)
    if architecture.converter is not None:
        state = getattr(single_file_utils, architecture.converter)(state)
    model: nn.Module = getattr(diffusers, architecture.transformer)(**config).eval()
    model.load_state_dict(state, strict=True)
    return model


def run(model: nn.Module, family: str, inputs: Inputs) -> Tensor:
    architecture = families.FAMILIES[family].architecture
    with torch.no_grad():
        return architecture.velocity(model(**architecture.arguments(inputs), return_dict=False)[0])


@pytest.mark.usefixtures("_any_size")
def test_recorded_ranges_are_those_of_hooks_on_diffusers_own_model(case: tuple[str, Shapes], save_model: Any) -> None:
    family, shapes = case
    path = save_model(random_state(shapes), lambda _: True)
    absmax: dict[str, float] = {}

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: absmax.__setitem__(layer, max(absmax.get(layer, 0.0), float(inputs[0].abs().max())))

    with open_checkpoint(path) as checkpoint:
        table = find_layers(checkpoint)
        assert engine.plan(checkpoint, table).family == family
        seen = engine.observe(checkpoint, table, samples=3, steps=1, seed=9, geometry=SIZE)
        denoiser = engine.load(checkpoint, table)
        config = denoiser.plan.config
        model = own_model(path, family, config)
        targets = families.diffusers_targets({layer.name: layer.weight.shape for layer in table.quantized.values()})
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(watch(targets[name].layer))
        for turn, way in enumerate(noise.CONDITIONINGS):
            latents, conditioning = engine.draw(denoiser, SIZE, way, 9, [turn])
            velocity = run(model, family, Inputs(config, SIZE, latents, 1.0, conditioning))
            assert velocity.shape == latents.shape
            ours = denoiser.velocity(latents, 1.0, conditioning, SIZE)
            assert torch.allclose(ours, velocity, rtol=1e-3, atol=1e-3 * float(velocity.abs().max()))

    assert set(seen.statistics.layers) == set(table.quantized) == set(absmax)
    assert seen.unvisited == ()
    wanted = [absmax[name] for name in seen.statistics.names]
    assert np.allclose(seen.statistics.absmax, wanted, rtol=1e-3)


def test_traced_rows_are_those_of_the_name_table(case: tuple[str, Shapes], save_model: Any) -> None:
    _, shapes = case
    with open_checkpoint(save_model(random_state(shapes))) as checkpoint:
        plan = engine.plan(checkpoint)
        matrices = {layer.name: (layer.out_features, layer.in_features) for layer in plan.table.plain.values()}
    targets = families.diffusers_targets(matrices)
    compared = 0
    for name, pieces in plan.sources.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias") or pieces[0].tensor.removesuffix(f".{kind}") not in matrices:
            continue
        target = targets[module]
        first, stop = target.rows or (0, matrices[target.layer][0])
        middle = (first + stop) // 2
        spans = [(middle, stop), (first, middle)] if target.swap_halves else [(first, stop)]
        assert pieces == tuple(Piece(f"{target.layer}.{kind}", *span) for span in spans)
        compared += 1
    assert compared >= len(matrices)


def test_noise_level_and_conditioning_reach_the_model(case: tuple[str, Shapes], save_model: Any) -> None:
    _, shapes = case
    with open_checkpoint(save_model(random_state(shapes))) as checkpoint:
        denoiser = engine.load(checkpoint)
        latents, conditioning = engine.draw(denoiser, SIZE, noise.Conditioning("test", 1.0), 1, [0, 1])
        base = denoiser.velocity(latents, 0.5, conditioning, SIZE)
        assert not torch.allclose(base, denoiser.velocity(latents, 0.9, conditioning, SIZE), rtol=1e-3)
        for name, signal in denoiser.signals(SIZE).items():
            if signal.kind == "noise":
                changed = {**conditioning, name: conditioning[name].flip(0)}
                assert not torch.allclose(base, denoiser.velocity(latents, 0.5, changed, SIZE), rtol=1e-4), name
        # A batch is its samples.
        alone = denoiser.velocity(latents[1:], 0.5, {name: v[1:] for name, v in conditioning.items()}, SIZE)
        assert torch.allclose(base[1:], alone, rtol=1e-3, atol=1e-4)


def test_it_runs_in_bfloat16(case: tuple[str, Shapes], save_model: Any) -> None:
    _, shapes = case
    with open_checkpoint(save_model(random_state(shapes))) as checkpoint:
        full, half = (engine.load(checkpoint, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        latents, conditioning = engine.draw(full, SIZE, noise.Conditioning("test", 1.0), 1, [0])
        if "guidance" in conditioning:  # the classes round it to bfloat16, which 4 and 4000 survive
            conditioning["guidance"] = torch.where(conditioning["guidance"] < 100, 4.0, 4000.0)
        wanted, found = (model.velocity(latents, 0.5, conditioning, SIZE) for model in (full, half))
    assert float((wanted - found).norm() / wanted.norm()) < 0.1


def diffusers_spelling(state: dict[str, Tensor], family: str) -> Iterator[tuple[str, Tensor]]:
    architecture = families.FAMILIES[family].architecture
    kept = {name: value for name, value in state.items() if name not in architecture.ignored}
    assert architecture.converter is not None
    for name, value in getattr(single_file_utils, architecture.converter)(kept).items():
        yield name, value.contiguous()


def run_alike(one: Path, other: Path) -> engine.Denoiser:
    """Assert that two checkpoints compute the same; gives the second model."""
    with open_checkpoint(one) as first_file, open_checkpoint(other) as second_file:
        first, second = engine.load(first_file), engine.load(second_file)
        assert first.plan.config == second.plan.config
        latents, conditioning = engine.draw(first, SIZE, noise.Conditioning("test", 1.0), 1, [0])
        velocities = [model.velocity(latents, 0.5, conditioning, SIZE) for model in (first, second)]
    assert torch.equal(*velocities)
    return second


@pytest.mark.usefixtures("_any_size")
def test_a_checkpoint_in_diffusers_own_names_runs_alike(case: tuple[str, Shapes], save_model: Any) -> None:
    family, shapes = case
    if families.FAMILIES[family].architecture.converter is None:
        pytest.skip("its authors' names are diffusers' names")
    state = random_state(shapes)
    run_alike(save_model(state), save_model(dict(diffusers_spelling(dict(state), family))))


NORMS = r"\b(query_norm|key_norm)\.scale$"


@pytest.mark.parametrize("name", ["flux.1 dev", "flux.2 dev", "chroma"])
def test_norms_named_as_comfyui_saves_them_run_alike(name: str, save_model: Any) -> None:
    state = random_state(CASES[name][1]())
    saved = {re.sub(NORMS, r"\1.weight", key): value for key, value in state.items()}
    assert set(saved) != set(state)
    run_alike(save_model(state), save_model(saved))


@pytest.mark.parametrize("norm", ["scale", "weight"])
def test_comfyuis_spelling_of_hunyuan_video_runs_alike(norm: str, save_model: Any) -> None:
    state = random_state(hunyuan_video())
    comfyui = {}
    for name, value in state.items():
        for pattern, replacement in (  # as ComfyUI renames them when it loads the authors' file
            (r"txt_in\.t_embedder\.mlp\.0\.", "txt_in.t_embedder.in_layer."),
            (r"txt_in\.t_embedder\.mlp\.2\.", "txt_in.t_embedder.out_layer."),
            (r"txt_in\.c_embedder\.linear_1\.", "txt_in.c_embedder.in_layer."),
            (r"txt_in\.c_embedder\.linear_2\.", "txt_in.c_embedder.out_layer."),
            (r"_mod\.linear\.", "_mod.lin."),
            (r"_attn_qkv\.", "_attn.qkv."),
            (r"mlp\.fc1\.", "mlp.0."),
            (r"mlp\.fc2\.", "mlp.2."),
            (r"_attn_q_norm\.weight", f"_attn.norm.query_norm.{norm}"),
            (r"_attn_k_norm\.weight", f"_attn.norm.key_norm.{norm}"),
            (r"\.q_norm\.weight", f".norm.query_norm.{norm}"),
            (r"\.k_norm\.weight", f".norm.key_norm.{norm}"),
            (r"_attn_proj\.", "_attn.proj."),
            (r"\.modulation\.linear\.", ".modulation.lin."),
            (r"_in\.mlp\.2\.", "_in.out_layer."),
            (r"_in\.mlp\.0\.", "_in.in_layer."),
        ):
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901 - one rule after the other
        comfyui[name] = value
    assert sum(name not in state for name in comfyui) > 60
    model = run_alike(save_model(state), save_model(comfyui))
    assert set(model.layers) <= {name.removesuffix(".weight") for name in comfyui}


def test_qwen_image_edit_2511_tells_the_picture_to_edit_no_time(save_model: Any) -> None:
    state = random_state(qwen_image())
    state["__index_timestep_zero__"] = torch.zeros(0)
    with open_checkpoint(save_model(state)) as checkpoint:
        denoiser = engine.load(checkpoint)
        assert denoiser.plan.config["zero_cond_t"] is True
        latents, conditioning = engine.draw(denoiser, SIZE, noise.SILENT, 1, [0])
        assert denoiser.velocity(latents, 0.5, conditioning, SIZE).isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "extra"),
    [
        (flux_1, {"single_blocks.0.linear3.weight": (8, 8)}),
        (wan, {"vace_blocks.0.before_proj.weight": (128, 128)}),
        (hunyuan_video, {"byt5_in.fc1.weight": (32, 24)}),
    ],
)
def test_relatives_that_diffusers_class_does_not_know_are_not_run(
    save_model: Any, shapes: Callable[[], Shapes], extra: Shapes
) -> None:
    with open_checkpoint(save_model(random_state(shapes() | extra))) as checkpoint:
        assert next(iter(extra)) in (engine.supports(checkpoint) or "")


def test_module_names_lead_back_to_the_authors_layers(case: tuple[str, Shapes], save_model: Any) -> None:
    family, shapes = case
    with open_checkpoint(save_model(random_state(shapes))) as checkpoint:
        denoiser = engine.load(checkpoint)
    modules = {name: (module.out_features, module.in_features) for name, module in denoiser.linears.items()}
    found = families.checkpoint_layers(modules, families.FAMILIES[family].architecture.transformer)
    layers = modules | {layer: shape for spellings in found.values() for layer, shape in spellings}
    plain = denoiser.plan.table.plain
    wanted = {name: (plain[name].out_features, plain[name].in_features) for name in denoiser.layers}
    assert {name: layers.get(name) for name in wanted} == wanted
    for name, module in denoiser.linears.items():  # each module's own layers are among those it stands for
        fed = {layer.name for layer, _ in module.stored.pieces}
        assert fed <= {name, *(layer for layer, _ in found.get(name, ()))}
