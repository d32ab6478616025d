"""Every family, tiny, under its authors' names, against diffusers' own class filled by diffusers' own converter."""

from __future__ import annotations

import itertools
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

from convert_to_quant import families, folding
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import denoiser
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.engines.moments import Gathering
from convert_to_quant.engines.provenance import Piece, trace
from convert_to_quant.errors import UnsupportedModelError
from convert_to_quant.families.running import Geometry, Inputs
from convert_to_quant.fidelity import sqnr_db
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import RunOptions

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself

SIZE = Geometry(height=2, width=3, frames=2, text_tokens=5)

Shapes = dict[str, tuple[int, ...]]


def layout(text: str) -> Shapes:
    """The tensors of a table: a name with [alternatives], and its sizes; a bias has the first of them."""
    shapes: Shapes = {}
    for line in text.strip().splitlines():
        pattern, sizes = line.split()
        shape = tuple(map(int, sizes.split("x")))
        parts = [part.split(",") for part in re.split(r"[\[\]]", pattern)]
        for name in map("".join, itertools.product(*parts)):
            shapes[name] = shape[:1] if name.endswith(".bias") else shape
    return shapes


FLUX_BLOCKS = """
double_blocks.[0,1].[img,txt]_attn.qkv.[weight,bias] 96x32
double_blocks.[0,1].[img,txt]_attn.proj.[weight,bias] 32x32
double_blocks.[0,1].[img,txt]_attn.norm.[query,key]_norm.scale 16
double_blocks.[0,1].[img,txt]_mlp.0.[weight,bias] 128x32
double_blocks.[0,1].[img,txt]_mlp.2.[weight,bias] 32x128
single_blocks.[0,1].linear1.[weight,bias] 224x32
single_blocks.[0,1].linear2.[weight,bias] 32x160
single_blocks.[0,1].norm.[query,key]_norm.scale 16
img_in.[weight,bias] 32x8
txt_in.[weight,bias] 32x24
final_layer.linear.[weight,bias] 8x32
"""

FLUX_1 = layout(
    FLUX_BLOCKS
    + """
double_blocks.[0,1].[img,txt]_mod.lin.[weight,bias] 192x32
single_blocks.[0,1].modulation.lin.[weight,bias] 96x32
[time,guidance]_in.in_layer.[weight,bias] 32x256
vector_in.in_layer.[weight,bias] 32x20
[time,vector,guidance]_in.out_layer.[weight,bias] 32x32
final_layer.adaLN_modulation.1.[weight,bias] 64x32
""".lstrip()
)

CHROMA = layout(
    FLUX_BLOCKS
    + """
distilled_guidance_layer.in_proj.[weight,bias] 48x16
distilled_guidance_layer.out_proj.[weight,bias] 32x48
distilled_guidance_layer.layers.[0,1].[in,out]_layer.[weight,bias] 48x48
distilled_guidance_layer.norms.[0,1].scale 48
""".lstrip()
)

FLUX_2 = layout("""
double_blocks.[0,1].[img,txt]_attn.qkv.weight 96x32
double_blocks.[0,1].[img,txt]_attn.proj.weight 32x32
double_blocks.[0,1].[img,txt]_attn.norm.[query,key]_norm.scale 16
double_blocks.[0,1].[img,txt]_mlp.0.weight 192x32
double_blocks.[0,1].[img,txt]_mlp.2.weight 32x96
single_blocks.[0,1].linear1.weight 288x32
single_blocks.[0,1].linear2.weight 32x128
single_blocks.[0,1].norm.[query,key]_norm.scale 16
double_stream_modulation_[img,txt].lin.weight 192x32
single_stream_modulation.lin.weight 96x32
img_in.weight 32x8
txt_in.weight 32x24
[time,guidance]_in.in_layer.weight 32x256
[time,guidance]_in.out_layer.weight 32x32
final_layer.linear.weight 8x32
final_layer.adaLN_modulation.1.weight 64x32
""")

SD_3 = layout("""
pos_embed 1x36x64
x_embedder.proj.weight 64x4x2x2
x_embedder.proj.bias 64
context_embedder.[weight,bias] 64x24
t_embedder.mlp.0.[weight,bias] 64x256
y_embedder.mlp.0.[weight,bias] 64x20
[t,y]_embedder.mlp.2.[weight,bias] 64x64
joint_blocks.[0,1].[x,context]_block.attn.qkv.[weight,bias] 192x64
joint_blocks.[0,1].x_block.attn.proj.[weight,bias] 64x64
joint_blocks.[0,1].x_block.mlp.fc1.[weight,bias] 256x64
joint_blocks.[0,1].x_block.mlp.fc2.[weight,bias] 64x256
joint_blocks.[0,1].x_block.adaLN_modulation.1.[weight,bias] 384x64
joint_blocks.0.context_block.attn.proj.[weight,bias] 64x64
joint_blocks.0.context_block.mlp.fc1.[weight,bias] 256x64
joint_blocks.0.context_block.mlp.fc2.[weight,bias] 64x256
joint_blocks.0.context_block.adaLN_modulation.1.[weight,bias] 384x64
joint_blocks.1.context_block.adaLN_modulation.1.[weight,bias] 128x64
final_layer.linear.[weight,bias] 16x64
final_layer.adaLN_modulation.1.[weight,bias] 128x64
""")

SD_3_5 = SD_3 | layout("""
joint_blocks.[0,1].[x,context]_block.attn.ln_[q,k].weight 64
joint_blocks.0.x_block.attn2.qkv.[weight,bias] 192x64
joint_blocks.0.x_block.attn2.ln_[q,k].weight 64
joint_blocks.0.x_block.attn2.proj.[weight,bias] 64x64
joint_blocks.0.x_block.adaLN_modulation.1.[weight,bias] 576x64
""")

QWEN_IMAGE = layout("""
img_in.[weight,bias] 32x8
txt_in.[weight,bias] 32x24
txt_norm.weight 24
time_text_embed.timestep_embedder.linear_1.[weight,bias] 32x256
time_text_embed.timestep_embedder.linear_2.[weight,bias] 32x32
transformer_blocks.[0,1].attn.[to_q,to_k,to_v,to_out.0].[weight,bias] 32x32
transformer_blocks.[0,1].attn.[add_q_proj,add_k_proj,add_v_proj,to_add_out].[weight,bias] 32x32
transformer_blocks.[0,1].attn.norm_[q,k,added_q,added_k].weight 16
transformer_blocks.[0,1].[img,txt]_mlp.net.0.proj.[weight,bias] 128x32
transformer_blocks.[0,1].[img,txt]_mlp.net.2.[weight,bias] 32x128
transformer_blocks.[0,1].[img,txt]_mod.1.[weight,bias] 192x32
norm_out.linear.[weight,bias] 64x32
proj_out.[weight,bias] 8x32
""")

WAN = layout("""
patch_embedding.[weight,bias] 128x4x1x2x2
text_embedding.0.[weight,bias] 128x24
time_embedding.0.[weight,bias] 128x32
[text,time]_embedding.2.[weight,bias] 128x128
time_projection.1.[weight,bias] 768x128
blocks.[0,1].[self,cross]_attn.[q,k,v,o].[weight,bias] 128x128
blocks.[0,1].[self,cross]_attn.norm_[q,k].weight 128
blocks.[0,1].ffn.0.[weight,bias] 48x128
blocks.[0,1].ffn.2.[weight,bias] 128x48
blocks.[0,1].norm3.[weight,bias] 128
blocks.[0,1].modulation 1x6x128
head.head.[weight,bias] 16x128
head.modulation 1x2x128
""")

WAN_IMAGE = WAN | layout("""
patch_embedding.weight 128x6x1x2x2
blocks.[0,1].cross_attn.[k,v]_img.[weight,bias] 128x128
blocks.[0,1].cross_attn.norm_k_img.weight 128
img_emb.proj.0.[weight,bias] 20
img_emb.proj.1.[weight,bias] 20x20
img_emb.proj.3.[weight,bias] 128x20
img_emb.proj.4.[weight,bias] 128
""")

HUNYUAN_VIDEO = layout("""
img_in.proj.[weight,bias] 32x4x1x2x2
txt_in.input_embedder.[weight,bias] 32x24
txt_in.t_embedder.mlp.0.[weight,bias] 32x256
txt_in.t_embedder.mlp.2.[weight,bias] 32x32
txt_in.c_embedder.linear_1.[weight,bias] 32x24
txt_in.c_embedder.linear_2.[weight,bias] 32x32
txt_in.individual_token_refiner.blocks.[0,1].norm[1,2].[weight,bias] 32
txt_in.individual_token_refiner.blocks.[0,1].self_attn_qkv.[weight,bias] 96x32
txt_in.individual_token_refiner.blocks.[0,1].self_attn_proj.[weight,bias] 32x32
txt_in.individual_token_refiner.blocks.[0,1].mlp.fc1.[weight,bias] 128x32
txt_in.individual_token_refiner.blocks.[0,1].mlp.fc2.[weight,bias] 32x128
txt_in.individual_token_refiner.blocks.[0,1].adaLN_modulation.1.[weight,bias] 64x32
[time,guidance]_in.mlp.0.[weight,bias] 32x256
[time,guidance]_in.mlp.2.[weight,bias] 32x32
vector_in.in_layer.[weight,bias] 32x20
vector_in.out_layer.[weight,bias] 32x32
double_blocks.[0,1].[img,txt]_mod.linear.[weight,bias] 192x32
double_blocks.[0,1].[img,txt]_attn_qkv.[weight,bias] 96x32
double_blocks.[0,1].[img,txt]_attn_proj.[weight,bias] 32x32
double_blocks.[0,1].[img,txt]_attn_[q,k]_norm.weight 16
double_blocks.[0,1].[img,txt]_mlp.fc1.[weight,bias] 128x32
double_blocks.[0,1].[img,txt]_mlp.fc2.[weight,bias] 32x128
single_blocks.[0,1].linear1.[weight,bias] 224x32
single_blocks.[0,1].linear2.[weight,bias] 32x160
single_blocks.[0,1].[q,k]_norm.weight 16
single_blocks.[0,1].modulation.linear.[weight,bias] 96x32
final_layer.linear.[weight,bias] 16x32
final_layer.adaLN_modulation.1.[weight,bias] 64x32
""")

LTX = layout("""
patchify_proj.[weight,bias] 64x8
scale_shift_table 2x64
adaln_single.emb.timestep_embedder.linear_1.[weight,bias] 64x256
adaln_single.emb.timestep_embedder.linear_2.[weight,bias] 64x64
adaln_single.linear.[weight,bias] 384x64
caption_projection.linear_1.[weight,bias] 64x24
caption_projection.linear_2.[weight,bias] 64x64
transformer_blocks.[0,1].scale_shift_table 6x64
transformer_blocks.[0,1].attn[1,2].[to_q,to_k,to_v,to_out.0].[weight,bias] 64x64
transformer_blocks.[0,1].attn[1,2].[q,k]_norm.weight 64
transformer_blocks.[0,1].ff.net.0.proj.[weight,bias] 256x64
transformer_blocks.[0,1].ff.net.2.[weight,bias] 64x256
proj_out.[weight,bias] 8x64
""")


def next_dit(*, hidden: int, head: int, qkv: int, inner: int, modulation: int, time: int, middle: int) -> Shapes:
    """Blocks and ends that Lumina 2 and Z-Image share; `modulation` is the number of adaLN's linear layer."""
    return layout(f"""
x_embedder.[weight,bias] {hidden}x16
cap_embedder.0.weight 24
cap_embedder.1.[weight,bias] {hidden}x24
t_embedder.mlp.0.[weight,bias] {middle}x256
t_embedder.mlp.2.[weight,bias] {time}x{middle}
[layers,noise_refiner,context_refiner].[0,1].attention.qkv.weight {qkv}x{hidden}
[layers,noise_refiner,context_refiner].[0,1].attention.out.weight {hidden}x{hidden}
[layers,noise_refiner,context_refiner].[0,1].attention.[q,k]_norm.weight {head}
[layers,noise_refiner,context_refiner].[0,1].[attention,ffn]_norm[1,2].weight {hidden}
[layers,noise_refiner,context_refiner].[0,1].feed_forward.w[1,3].weight {inner}x{hidden}
[layers,noise_refiner,context_refiner].[0,1].feed_forward.w2.weight {hidden}x{inner}
[layers,noise_refiner].[0,1].adaLN_modulation.{modulation}.[weight,bias] {4 * hidden}x{time}
final_layer.linear.[weight,bias] 16x{hidden}
final_layer.adaLN_modulation.1.[weight,bias] {hidden}x{time}
norm_final.weight {hidden}
""")


LUMINA_2 = next_dit(hidden=36, head=12, qkv=60, inner=100, modulation=1, time=36, middle=36)
Z_IMAGE = next_dit(hidden=48, head=16, qkv=144, inner=128, modulation=0, time=48, middle=1024)

CASES: dict[str, tuple[str, Shapes]] = {
    "flux.1 dev": ("flux1", FLUX_1),
    "flux.1 fill": ("flux1", FLUX_1 | {"img_in.weight": (32, 20)}),
    "flux.2 dev": ("flux2", FLUX_2),
    "flux.2 klein": ("flux2", {name: shape for name, shape in FLUX_2.items() if "guidance" not in name}),
    "chroma": ("chroma", CHROMA),
    "sd 3": ("sd3", SD_3),
    "sd 3.5": ("sd3", SD_3_5),
    "qwen-image": ("qwen-image", QWEN_IMAGE),
    "wan text to video": ("wan", WAN),
    "wan image to video": ("wan", WAN_IMAGE),
    "hunyuan video": ("hunyuan-video", HUNYUAN_VIDEO),
    "ltx": ("ltx", LTX),
    "lumina 2": ("lumina2", LUMINA_2),
    "z-image": ("z-image", Z_IMAGE | {"x_pad_token": (1, 48), "cap_pad_token": (1, 48)}),
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
    return CASES[request.param]


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
        seen = engine.observe(checkpoint, table, RunOptions(samples=3, steps=1, seed=9, device="cpu"), geometry=SIZE)
        denoiser = engine.load(checkpoint, table)
        config = denoiser.plan.config
        model = own_model(path, family, config)
        targets = families.diffusers_targets({layer.name: layer.weight.shape for layer in table.quantized.values()})
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(watch(targets[name].layer))
        for number in range(3):
            latents, conditioning = engine.start(denoiser, SIZE, 9, [number])
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
        latents, conditioning = engine.start(denoiser, SIZE, 1, [1, 2])
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
        latents, conditioning = engine.start(full, SIZE, 1, [1])
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
        latents, conditioning = engine.start(first, SIZE, 1, [1])
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
    state = random_state(CASES[name][1])
    saved = {re.sub(NORMS, r"\1.weight", key): value for key, value in state.items()}
    assert set(saved) != set(state)
    run_alike(save_model(state), save_model(saved))


@pytest.mark.parametrize("norm", ["scale", "weight"])
def test_comfyuis_spelling_of_hunyuan_video_runs_alike(norm: str, save_model: Any) -> None:
    state = random_state(HUNYUAN_VIDEO)
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
    state = random_state(QWEN_IMAGE)
    state["__index_timestep_zero__"] = torch.zeros(0)
    with open_checkpoint(save_model(state)) as checkpoint:
        denoiser = engine.load(checkpoint)
        assert denoiser.plan.config["zero_cond_t"] is True
        latents, conditioning = engine.start(denoiser, SIZE, 1, [0])
        assert denoiser.velocity(latents, 0.5, conditioning, SIZE).isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "extra"),
    [
        (FLUX_1, {"single_blocks.0.linear3.weight": (8, 8)}),
        (WAN, {"vace_blocks.0.before_proj.weight": (128, 128)}),
        (HUNYUAN_VIDEO, {"byt5_in.fc4.weight": (32, 24)}),
    ],
)
def test_relatives_that_diffusers_class_does_not_know_are_not_run(
    save_model: Any, shapes: Shapes, extra: Shapes
) -> None:
    with open_checkpoint(save_model(random_state(shapes | extra))) as checkpoint:
        assert next(iter(extra)) in (engine.supports(checkpoint) or "")


def test_a_file_that_lacks_what_tells_a_size_is_refused_by_the_name_of_the_tensor(save_model: Any) -> None:
    shapes = {name: shape for name, shape in QWEN_IMAGE.items() if not name.startswith("proj_out")}
    with open_checkpoint(save_model(random_state(shapes))) as checkpoint:
        said = engine.supports(checkpoint)
    assert said is not None
    assert said.endswith("that is known here: it has no proj_out.weight")


@pytest.mark.parametrize(
    ("shapes", "extra"),
    [
        (FLUX_1, "step 0"),
        (SD_3, "model_sampling.sigmas 100"),
        (WAN, "ref_conv.[weight,bias] 128x4x2x2"),
        (WAN, "control_adapter.conv.[weight,bias] 128x4x2x2"),
        (WAN, "[patch_embedding_pose,pose_patch_embedding].[weight,bias] 128x4x1x2x2"),
        (WAN, "audio_injector.injector.0.q.[weight,bias] 128x128"),
        (HUNYUAN_VIDEO, "[clean_x_embedder.proj,image_projection.up].[weight,bias] 32x4"),
        (LUMINA_2, "[clip_text_pooled_proj,time_text_embed].1.[weight,bias] 36x36"),
    ],
)
def test_what_only_adds_a_condition_is_left_out(save_model: Any, shapes: Shapes, extra: str) -> None:
    state = random_state(shapes)
    run_alike(save_model(state), save_model(state | random_state(layout(extra))))


@pytest.mark.parametrize(
    ("shapes", "tensor", "title"),
    [
        (WAN, "audio_proj.audio_proj_glob_1.layer.weight", r"Wan 2.1 and 2.2 \(HuMo\)"),
        (CHROMA, "nerf_image_embedder.embedder.0.weight", r"Chroma \(Radiance\)"),
    ],
)
def test_a_released_model_that_only_comfyui_runs_is_named(
    save_model: Any, shapes: Shapes, tensor: str, title: str
) -> None:
    with (
        open_checkpoint(save_model(random_state(shapes | {tensor: (32, 32)}))) as checkpoint,
        pytest.raises(UnsupportedModelError, match=f"{title} is not run here .observe --comfyui-dir DIR"),
    ):
        engine.load(checkpoint)


AURAFLOW = layout("""
positional_encoding 1x36x64
register_tokens 1x8x64
init_x_linear.[weight,bias] 64x16
cond_seq_linear.weight 64x24
t_embedder.mlp.0.[weight,bias] 64x256
t_embedder.mlp.2.[weight,bias] 64x64
double_layers.0.attn.[w1q,w1k,w1v,w1o,w2q,w2k,w2v,w2o].weight 64x64
double_layers.0.[mlpC,mlpX].[c_fc1,c_fc2].weight 96x64
double_layers.0.[mlpC,mlpX].c_proj.weight 64x96
double_layers.0.[modC,modX].1.weight 384x64
single_layers.0.attn.[w1q,w1k,w1v,w1o].weight 64x64
single_layers.0.mlp.[c_fc1,c_fc2].weight 96x64
single_layers.0.mlp.c_proj.weight 64x96
single_layers.0.modCX.1.weight 384x64
modF.1.weight 128x64
final_linear.weight 16x64
""")


def test_rules_for_names_move_the_rows_that_diffusers_converter_moves(save_model: Any) -> None:
    with open_checkpoint(save_model(random_state(AURAFLOW))) as checkpoint:
        found = engine.plan(checkpoint).sources
    assert found == trace(single_file_utils.convert_auraflow_transformer_checkpoint_to_diffusers, AURAFLOW)


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


def test_layers_that_receive_one_tensor_share_their_moments(save_model: Any) -> None:
    with open_checkpoint(save_model(random_state(WAN))) as checkpoint:
        table = find_layers(checkpoint)
        layers = [table.plain[f"blocks.0.self_attn.{name}"] for name in "qkvo"]
        gathering = Gathering(checkpoint, table, layers, RunOptions(samples=1, steps=1))
        shared = gathering.gather([layer.name for layer in layers])
        alone = gathering.gather([layers[1].name])
    assert sorted(map(len, shared)) == [1, 3]
    together = next(names for names in shared if len(names) == 3)
    assert torch.equal(shared[together], alone[layers[1].name,])


FOLDED: dict[tuple[str, str], tuple[Shapes, int]] = {
    ("flux1", "Kontext, Krea or dev"): (FLUX_1, 14),
    ("flux1", "schnell"): ({name: shape for name, shape in FLUX_1.items() if "guidance" not in name}, 14),
    ("flux1", "Fill"): (CASES["flux.1 fill"][1], 14),
    ("flux1", "Depth or Canny"): (FLUX_1 | {"img_in.weight": (32, 16)}, 14),
    ("flux2", "dev"): (FLUX_2, 10),
    ("flux2", "klein 9B"): (CASES["flux.2 klein"][1], 10),
    ("flux2", "klein 4B"): (CASES["flux.2 klein"][1], 10),
    ("chroma", "Chroma1"): (CHROMA, 4),
    ("chroma", "Radiance"): (CHROMA | layout("nerf_image_embedder.embedder.0.weight 32x32"), 0),
    ("sd3", "3 Medium"): (SD_3, 9),
    ("sd3", "3.5 Medium"): (SD_3_5, 11),
    ("sd3", "3.5 Large"): (SD_3 | layout("joint_blocks.[0,1].[x,context]_block.attn.ln_[q,k].weight 64"), 9),
    ("qwen-image", "Image or Edit"): (QWEN_IMAGE, 10),
    ("qwen-image", "Edit 2511"): (QWEN_IMAGE | layout("__index_timestep_zero__ 0"), 10),
    ("qwen-image", "Layered"): (QWEN_IMAGE | layout("time_text_embed.addition_t_embedding.weight 2x32"), 10),
    ("qwen-image", "Mage-Flow"): (QWEN_IMAGE, 10),
    ("wan", "T2V"): (WAN, 6),
    ("wan", "TI2V 2.2"): (WAN | {"patch_embedding.weight": (128, 12, 1, 2, 2)}, 6),
    ("wan", "I2V 2.2"): (WAN | {"patch_embedding.weight": (128, 9, 1, 2, 2)}, 6),
    ("wan", "I2V 2.1"): (WAN_IMAGE, 6),
    ("wan", "FLF2V"): (WAN_IMAGE | layout("img_emb.emb_pos 1x6x20"), 6),
    ("wan", "VACE"): (WAN | layout("vace_patch_embedding.weight 128x4x1x2x2"), 0),
    ("wan", "Camera"): (WAN | layout("control_adapter.conv.weight 128x4x2x2"), 0),
    ("wan", "S2V"): (WAN | layout("casual_audio_encoder.weights 4"), 0),
    ("wan", "HuMo"): (WAN | layout("blocks.0.audio_cross_attn_wrapper.audio_cross_attn.q.weight 32x32"), 0),
    ("wan", "Animate 2"): (WAN | layout("blocks.0.self_attn.to_q.weight 128x128"), 0),
    ("wan", "Animate"): (WAN | layout("motion_encoder.fc.weight 32x32"), 0),
    ("wan", "SCAIL"): (WAN | layout("patch_embedding_pose.weight 128x4x1x2x2"), 0),
    ("wan", "SCAIL 2"): (WAN | layout("patch_embedding_mask.weight 128x4x1x2x2"), 0),
    ("wan", "Dancer"): (WAN | layout("patch_embedding_global.weight 128x4x1x2x2"), 0),
    ("wan", "Fun"): (WAN | layout("ref_conv.weight 128x4x2x2"), 0),
    ("hunyuan-video", "HunyuanVideo"): (HUNYUAN_VIDEO, 14),
    ("hunyuan-video", "FramePack"): (HUNYUAN_VIDEO | layout("clean_x_embedder.proj.weight 32x4"), 0),
    ("hunyuan-video", "HunyuanVideo 1.5"): (HUNYUAN_VIDEO | layout("cond_type_embedding.weight 3x32"), 0),
    ("hunyuan-video", "HunyuanImage 2.1"): (HUNYUAN_VIDEO | layout("byt5_in.fc4.weight 32x24"), 0),
    ("ltx", "LTX-Video"): (LTX, 4),
    ("ltx", "LTX-2"): (LTX | layout("audio_patchify_proj.weight 32x8"), 0),
    ("lumina2", "Lumina-Image 2.0"): (LUMINA_2, 8),
    ("lumina2", "NewBie"): (LUMINA_2 | layout("clip_text_pooled_proj.1.weight 36x36"), 0),
    ("z-image", ""): (CASES["z-image"][1], 8),
}  # fmt: skip
"""Every member of families with channels that can be scaled: its tensors, and the groups of channels that are found; 0
where scaling is not proved. Members that differ in sizes only have those of others."""


def test_every_member_of_families_that_fold_is_proved() -> None:
    members = {
        (name, title)
        for name, family in families.FAMILIES.items()
        if family.folds
        for title in dict(family.variants) or [""]
    }
    assert set(FOLDED) == members


@pytest.mark.parametrize(("family", "member"), FOLDED)
def test_a_model_whose_channels_are_scaled_computes_what_it_computed(family: str, member: str, save_model: Any) -> None:
    shapes, count = FOLDED[family, member]
    generator = np.random.default_rng(0)
    with open_checkpoint(save_model(random_state(shapes))) as checkpoint:
        plan = None if engine.supports(checkpoint) else engine.plan(checkpoint)
        groups = [] if plan is None else folding.find_groups(checkpoint, plan, list(plan.table.plain))
        assert (plan is None or plan.family == family, len(groups)) == (True, count)
        if not groups:
            return
        for group in groups:
            least = 0 if group.ones else -3
            exponents = generator.integers(least, least + 7, group.columns[0].count // group.repeat)
            group.exponents = exponents.astype(np.int8)
        folded = folding.fold_checkpoint(checkpoint, groups)
        model = denoiser.load(checkpoint, dtype=torch.float32)
        latents, conditioning = engine.start(model, SIZE, 0, [1, 4])
        before, after = (
            each.velocity(latents, 0.7, conditioning, SIZE)
            for each in (model, denoiser.load(folded, dtype=torch.float32))
        )
        changed = [tensor for tensor in folded.computed if (folded.float32(tensor) != checkpoint.float32(tensor)).any()]

    assert len(changed) == len(folded.computed) > len(groups)
    assert float(sqnr_db(before, after).min()) >= 120
