"""Every family, tiny, under its authors' names, against diffusers' own class."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from released import Shapes, hunyuan_authors, small
from torch import Tensor

from convert_to_quant import families, folding
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import denoiser
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.engines.moments import Gathering
from convert_to_quant.errors import UnsupportedModelError
from convert_to_quant.families.running import Geometry
from convert_to_quant.fidelity import sqnr_db
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import RunOptions

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself

SIZE = Geometry(height=2, width=3, frames=2, text_tokens=5)


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


FLUX = {"n128": 16, "n64": 8, "n4096": 24, "n768": 20}
FLUX_1 = small("flux1_dev", "3072 to 32", **FLUX)
FLUX_2 = small("flux2_dev", "6144 to 32", n128=16, n15360=24)
CHROMA = small("chroma", "3072 to 32", n128=16, n64=8, n4096=24, n5120=48)
SD_3_5 = small("sd35_medium", "1536 to 64", n36864=36, n2048=20, n4096=24)
SD_3_5_LARGE = small("sd35_large", "2432 to 64", n36864=36, n2048=20, n4096=24)
SD_3 = {name: shape for name, shape in SD_3_5_LARGE.items() if ".ln_" not in name}
QWEN_IMAGE = small("qwen_image", "3072 to 32", n128=16, n64=8, n3584=24)
WIDTHS = {"n13824": 48, "n4096": 24, "n256": 32, "n64": 16}
WAN = small("wan21_t2v_14b", "5120 to 128", n16=4, **WIDTHS)
WAN_IMAGE = small("wan21_i2v_14b", "5120 to 128", n36=6, n1280=20, **WIDTHS)
HUNYUAN_COMFYUI = small("hunyuanvideo", "3072 to 32", n16=4, **{**FLUX, "n64": 16})
HUNYUAN_VIDEO = {hunyuan_authors(name): shape for name, shape in HUNYUAN_COMFYUI.items()}
LTX = small("ltxv_2b", "2048 to 64", n128=8, n4096=24)
LUMINA_2 = small("lumina2", "2304 to 36", n96=12, n3840=60, n1024=36, n64=16)
Z_IMAGE = small("z_image", "3840 to 288", n128=32, n10240=768, n2560=24, n64=16)

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
    "z-image": ("z-image", Z_IMAGE),
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
def case(request):
    """Family and the shapes of a tiny checkpoint."""
    return CASES[request.param]


def rows_of(path: Path) -> dict[str, Tensor]:
    """A checkpoint's real weights by diffusers' names; test_layouts.py says that its rows are these."""
    with open_checkpoint(path) as checkpoint:
        layers = {layer.weight.name: layer for layer in find_layers(checkpoint).linear()}

        def values(name: str) -> NDArray[np.float32]:
            return dequantize(checkpoint, layers[name]) if name in layers else checkpoint.float32(name)

        sources = engine.plan(checkpoint).sources
        return {
            name: torch.from_numpy(np.concatenate([values(piece.tensor)[piece.start : piece.stop] for piece in pieces]))
            for name, pieces in sources.items()
        }


def test_recorded_ranges_are_those_of_hooks_on_diffusers_own_model(case, save_model, compared):
    family, shapes = case
    path = save_model(random_state(shapes), lambda _: True)
    with open_checkpoint(path) as checkpoint:
        table = find_layers(checkpoint)
        plan = engine.plan(checkpoint, table)
        assert plan.family == family
        model = getattr(diffusers, plan.architecture.transformer)(**plan.config).eval()
        model.load_state_dict(rows_of(path), strict=True)
        targets = families.diffusers_targets({layer.name: layer.weight.shape for layer in table.quantized.values()})
        seen = compared(checkpoint, table, model, SIZE, lambda name: targets[name].layer)
    assert set(seen.statistics.layers) == set(table.quantized)
    assert seen.unvisited == ()


def test_noise_level_and_conditioning_reach_the_model(case, save_model):
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


def test_it_runs_in_bfloat16(case, save_model):
    _, shapes = case
    with open_checkpoint(save_model(random_state(shapes))) as checkpoint:
        full, half = (engine.load(checkpoint, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        latents, conditioning = engine.start(full, SIZE, 1, [1])
        if "guidance" in conditioning:  # the classes round it to bfloat16, which 4 and 4000 survive
            conditioning["guidance"] = torch.where(conditioning["guidance"] < 100, 4.0, 4000.0)
        wanted, found = (model.velocity(latents, 0.5, conditioning, SIZE) for model in (full, half))
    assert float((wanted - found).norm() / wanted.norm()) < 0.1


def run_alike(one: Path, other: Path) -> engine.Denoiser:
    """Assert that two checkpoints compute the same; gives the second model."""
    with open_checkpoint(one) as first_file, open_checkpoint(other) as second_file:
        first, second = engine.load(first_file), engine.load(second_file)
        assert first.plan.config == second.plan.config
        latents, conditioning = engine.start(first, SIZE, 1, [1])
        velocities = [model.velocity(latents, 0.5, conditioning, SIZE) for model in (first, second)]
    assert torch.equal(*velocities)
    return second


def test_a_checkpoint_in_diffusers_own_names_runs_alike(case, save_model):
    path = save_model(random_state(case[1]))
    run_alike(path, save_model(rows_of(path)))


NORMS = r"\b(query_norm|key_norm)\.scale$"


@pytest.mark.parametrize("name", ["flux.1 dev", "flux.2 dev", "chroma"])
def test_norms_named_as_comfyui_saves_them_run_alike(name, save_model):
    state = random_state(CASES[name][1])
    saved = {re.sub(NORMS, r"\1.weight", key): value for key, value in state.items()}
    assert set(saved) != set(state)
    run_alike(save_model(state), save_model(saved))


@pytest.mark.parametrize("norm", ["scale", "weight"])
def test_comfyuis_names_of_hunyuan_video_run_alike(norm, save_model):
    state = random_state(HUNYUAN_VIDEO)
    comfyui = {re.sub(NORMS, rf"\1.{norm}", name): state[hunyuan_authors(name)] for name in HUNYUAN_COMFYUI}
    model = run_alike(save_model(state), save_model(comfyui))
    assert set(model.layers) <= {name.removesuffix(".weight") for name in comfyui}


def test_qwen_image_edit_2511_gives_the_image_to_edit_no_time(save_model):
    state = random_state(QWEN_IMAGE)
    state["__index_timestep_zero__"] = torch.zeros(0)
    with open_checkpoint(save_model(state)) as checkpoint:
        denoiser = engine.load(checkpoint)
        assert denoiser.plan.config["zero_cond_t"] is True
        latents, conditioning = engine.start(denoiser, SIZE, 1, [0])
        assert denoiser.velocity(latents, 0.5, conditioning, SIZE).isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "changes", "reason"),
    [
        (
            FLUX_1,
            {"single_blocks.0.linear3.weight": (8, 8)},
            "single_blocks.0.linear3.weight: is not part of diffusers'",
        ),
        (WAN, {"blocks.0.before_proj.weight": (128, 128)}, "blocks.0.before_proj.weight: is not part of diffusers'"),
        (HUNYUAN_VIDEO, {"txt_in.fc4.weight": (32, 24)}, "txt_in.fc4.weight: is not part of diffusers'"),
        (FLUX_1, {"double_blocks.0.img_mlp.0.weight": (64, 32)}, "shape [128, 32] was expected"),
        (FLUX_1, {"single_blocks.1.linear2.bias": None}, "single_transformer_blocks.1.proj_out.bias: has no source in"),
        (
            QWEN_IMAGE,
            {"proj_out.weight": None},
            "unknown layout of Qwen-Image (also Edit, Layered), without proj_out.weight",
        ),
    ],
)
def test_layouts_that_diffusers_does_not_know_are_refused(save_model, shapes, changes, reason):
    changed = {name: shape for name, shape in {**shapes, **changes}.items() if shape is not None}
    with open_checkpoint(save_model(random_state(changed))) as checkpoint:
        assert reason in (engine.supports(checkpoint) or "")
        with pytest.raises(UnsupportedModelError):
            engine.load(checkpoint)


@pytest.mark.parametrize(
    ("shapes", "extra"),
    [
        (FLUX_1, "step 0"),
        (LUMINA_2, "norm_final.weight 36"),
        (Z_IMAGE, "norm_final.weight 288"),
        (SD_3, "model_sampling.sigmas 100"),
        (WAN, "ref_conv.[weight,bias] 128x4x2x2"),
        (WAN, "control_adapter.conv.[weight,bias] 128x4x2x2"),
        (WAN, "[patch_embedding_pose,pose_patch_embedding].[weight,bias] 128x4x1x2x2"),
        (WAN, "audio_injector.injector.0.q.[weight,bias] 128x128"),
        (HUNYUAN_VIDEO, "[clean_x_embedder.proj,image_projection.up].[weight,bias] 32x4"),
        (LUMINA_2, "[clip_text_pooled_proj,time_text_embed].1.[weight,bias] 36x36"),
    ],
)
def test_what_only_adds_a_condition_is_left_out(save_model, shapes, extra):
    state = random_state(shapes)
    run_alike(save_model(state), save_model(state | random_state(layout(extra))))


@pytest.mark.parametrize(
    ("shapes", "tensor", "title"),
    [
        (WAN, "audio_proj.audio_proj_glob_1.layer.weight", r"Wan 2.1 and 2.2 \(HuMo\)"),
        (CHROMA, "nerf_image_embedder.embedder.0.weight", r"Chroma \(Radiance\)"),
    ],
)
def test_a_released_model_that_only_comfyui_runs_is_named(save_model, shapes, tensor, title):
    with (
        open_checkpoint(save_model(random_state(shapes | {tensor: (32, 32)}))) as checkpoint,
        pytest.raises(UnsupportedModelError, match=rf"{title} is not supported by this engine \(observe --comfyui-dir"),
    ):
        engine.load(checkpoint)


def test_module_names_lead_back_to_the_authors_layers(case, save_model):
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


def test_layers_with_one_input_share_their_moments(save_model):
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
    ("sd3", "3.5 Large"): (SD_3_5_LARGE, 9),
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


def test_every_member_of_families_that_fold_is_proved():
    members = {
        (name, title)
        for name, family in families.FAMILIES.items()
        if family.folds
        for title in dict(family.variants) or [""]
    }
    assert set(FOLDED) == members


@pytest.mark.parametrize(("family", "member"), FOLDED)
def test_a_model_whose_channels_are_scaled_computes_what_it_computed(family, member, save_model):
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
