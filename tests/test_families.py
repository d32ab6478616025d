"""Each family is recognized by the names of its released models, and only by those."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from released import Shapes, layouts, small

import convert_to_quant
from convert_to_quant.errors import OptionError
from convert_to_quant.families import FAMILIES, GENERIC, detect, family, module_names
from convert_to_quant.families.rules import rules
from convert_to_quant.names import other_part, strip_prefix


def own_shapes(layout: str) -> Shapes:
    """The tensors of a released diffusion model, with the first and last block of each stack."""
    _, bare = strip_prefix(shapes := small(layout, "1 to 1"))
    return {bare[name]: shape for name, shape in shapes.items() if name in bare and other_part(name) is None}


# Released models without a layout, and models that share names with a family but do not belong to it.
OTHERS = {
    "pixart": "blocks.0.attn.qkv blocks.0.mlp.fc1 t_block.1 t_embedder.mlp.0 final_layer.linear",  # no cross-attention
    "lumina2": "layers.0.attn.to_q layers.0.norm1.linear {noise,context}_refiner.0.attn.to_q x_embedder "
    "time_caption_embed.timestep_embedder.linear_1",
    "mochi": "transformer_blocks.0.attn1.{to_q,add_q_proj} time_embed.{caption_proj,pooler.to_q} pos_frequencies",
    "sana": "blocks.0.attn.qkv blocks.0.cross_attn.kv_linear t_block.1 blocks.0.mlp.inverted_conv.conv",
    "cosmos-predict2": "transformer_blocks.0.{attn1,attn2}.to_q transformer_blocks.0.norm1.linear_2 patch_embed.proj "
    "time_embed.{t_embedder.linear_1,norm}",
    "krea2": "blocks.0.{attn.wq,mlp.up} first txtfusion.projector txtmlp.1 tproj.1 last.linear",
    "ovis": "double_blocks.0.img_mlp.gate_proj img_in txt_in time_in.in_layer",
    None: "model.layers.0.self_attn.q_proj model.layers.0.mlp.down_proj model.embed_tokens lm_head",
}
BY_NAME = {
    known: {f"{rule.layer}.weight": () for word in text.split() for rule in rules((word, word))}
    for known, text in OTHERS.items()
}
RELEASED = {name: own_shapes(name) for name in layouts() if not name.startswith("te_")}


def fitting(shapes: Shapes) -> set[str]:
    """The families with a signature that matches a model."""
    modules = module_names(shapes)
    return {entry.name for entry in FAMILIES.values() for s in entry.signatures if s.fits(modules, shapes)}


@pytest.mark.parametrize(("known", "shapes"), BY_NAME.items(), ids=map(str, BY_NAME))
def test_a_model_is_recognized_as_its_family_and_no_other(known, shapes):
    found = detect(shapes, shapes)
    assert (found.name if found else None) == known
    assert fitting(shapes) == ({known} if known else set())


@pytest.mark.parametrize("shapes", RELEASED.values(), ids=RELEASED)
def test_a_released_model_is_of_one_family(shapes):
    """docs/models.md shows which, and which layers it keeps: see test_layouts.py."""
    found = detect(shapes, shapes)
    assert found is not None
    assert fitting(shapes) == {found.name}


def test_every_signature_is_needed_by_a_model_above():
    models = [(module_names(shapes), shapes) for shapes in (*RELEASED.values(), *BY_NAME.values())]
    for entry in (entry for entry in FAMILIES.values() if entry.architecture):
        for signature in entry.signatures:
            others = [other for other in entry.signatures if other is not signature]
            assert any(
                signature.fits(*model) and not any(other.fits(*model) for other in others) for model in models
            ), f"no model above is recognized by {signature} alone"


TABLES = [known for known in FAMILIES.values() if known.blocks]


@pytest.mark.parametrize("known", TABLES, ids=[known.name for known in TABLES])
def test_a_layer_outside_the_blocks_that_no_table_knows_is_kept(known):
    assert known.kept_because("brand_new_adapter.3.linear") == "outside the repeated blocks"


def test_the_order_of_names_does_not_matter():
    names = list(RELEASED["flux1_dev"])
    first, second = detect(names, {}), detect(names[::-1], {})
    assert first is second is FAMILIES["flux1"]


def test_sdxl_needs_shapes_because_its_names_are_those_of_older_models():
    shapes = RELEASED["sdxl_unet"]
    assert detect(shapes, {}) is detect([], {}) is None
    assert detect(shapes, {name: shape[:1] for name, shape in shapes.items()}) is None


def test_a_name_is_matched_in_whole_parts():
    flux = family("flux1")
    assert flux.kept_because("img_in") == "image embedder: feeds every block"
    assert flux.kept_because("single_blocks_of.0.linear1") == "outside the repeated blocks"
    assert flux.kept_because("single_transformer_blocks.0.proj_out") is None
    assert family("ltx").kept_because("transformer_blocks.10.attn1.to_q") is None


@pytest.mark.parametrize("spelling", ["qwen-image", "qwen_image", "Qwen-Image", "QwenImage", "qwen image"])
def test_presets_may_be_spelled_freely(spelling):
    assert family(spelling) is FAMILIES["qwen-image"]
    assert family("generic") is GENERIC  # a preset that is never detected
    assert "generic" not in FAMILIES


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(
        OptionError, match=r"unknown preset 'huyuan-video' \(did you mean 'hunyuan-video'\? presets: auraflow, chroma, "
    ):
        family("huyuan-video")
    with pytest.raises(OptionError, match=r"unknown preset 'xyzzy' \(presets: auraflow, .*z-image, generic\)"):
        family("xyzzy")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight", "text encoder"),
        ("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight", "text encoder"),
        ("conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight", "text encoder"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", "VAE"),
        ("vae.decoder.mid_block.attentions.0.to_q.weight", "VAE"),
        ("audio_vae.decoder.conv_in.conv.weight", "VAE"),
        ("vocoder.conv_pre.weight", "vocoder"),
        ("model_ema.diffusion_modelinput_blocks00weight", "second copy of the model (moving average)"),
        ("blocks.0.vae.proj", None),
        ("net.text_encoder.0", None),
    ],
)
def test_text_encoders_and_vaes_in_a_full_checkpoint_are_recognized(name, title):
    assert other_part(name) == title


def test_no_layer_of_a_diffusion_model_counts_as_another_part():
    for prefix, shapes in product(
        ["", "model.diffusion_model.", "diffusion_model.", "net.", "transformer."], RELEASED.values()
    ):
        assert [name for name in shapes if other_part(prefix + name)] == []


NOVA = """\"\"\"A family that was made up, in one file.\"\"\"

from . import comfyui
from .base import VECTOR, Family, signature
from .rules import under
from .running import Architecture, blocks, measured, text


def _config(shapes):
    hidden = shapes["context_embedder.weight"][0]
    return {
        **measured(shapes, "joint_attention_dim", area=4, head=hidden // 2, lacks=["num_layers"]),
        "num_mmdit_layers": blocks(shapes, "joint_transformer_blocks."),
        "num_single_dit_layers": blocks(shapes, "single_transformer_blocks."),
        "caption_projection_dim": hidden,
        "pos_embed_max_size": shapes["pos_embed.pos_embed"][1],
    }


FAMILY = Family(
    name="nova-1",
    title="Nova (made up)",
    signatures=(signature("register_tokens joint_transformer_blocks.0.attn.add_q_proj"),),
    blocks=r"(?:joint|single)_transformer_blocks\\.\\d+",
    keep={r"time_step_proj": VECTOR},
    lora=under("joint_transformer_blocks.*.", "nova.*.")(("attn.to_{q,k,v}", "{query,key,value}")),
    architecture=Architecture(
        transformer="AuraFlowTransformer2DModel",
        config=_config,
        wants={"encoder_hidden_states": text("joint_attention_dim")},
    ),
    comfyui={"Nova": comfyui.takes(cross_attn=comfyui.text("context_embedder"))},
)
"""

USES_OF_NOVA = """
import sys
import warnings

import numpy as np
import torch
from safetensors.torch import save_file

warnings.simplefilter("ignore")
import convert_to_quant
from convert_to_quant import convert, families, inspection
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.engines.comfyui.inprocess_conditions import conditions_of
from convert_to_quant.families.running import Geometry
from convert_to_quant.options import RunOptions
from diffusers import AuraFlowTransformer2DModel

torch.manual_seed(1)
model = AuraFlowTransformer2DModel(
    num_mmdit_layers=2, num_single_dit_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
    caption_projection_dim=32, pos_embed_max_size=16,
).eval()  # fmt: skip
save_file(model.state_dict(), "nova.safetensors")
block = "joint_transformer_blocks.1"
geometry = Geometry(height=2, width=3, text_tokens=5)
with open_checkpoint("nova.safetensors") as checkpoint:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    assert families.detect(shapes, shapes) is families.family("Nova 1")
    assert inspection.inspect_checkpoint(checkpoint).family == "nova-1"
    plan = convert.plan_conversion(checkpoint, convert.ConvertOptions())
    chosen = {decision.layer.name: decision.reason for decision in plan.decisions if not decision.format}
    assert chosen["time_step_proj.linear_1"] == "time, guidance or pooled-text embedder: one vector steers all blocks"
    assert chosen["context_embedder"].startswith("text embedder: ")
    assert f"{block}.attn.to_q" not in chosen
    known = families.lora_names({f"{block}.attn.to_k": (32, 32)})
    assert known.find("lora_unet_nova_1_key") == (families.Target(f"{block}.attn.to_k"),)
    denoiser = engine.load(checkpoint)
    latents, conditioning = engine.start(denoiser, geometry, 1, [2])
    with torch.no_grad():
        wanted = model(latents, timestep=torch.tensor([0.5]), **conditioning, return_dict=False)[0]
    assert torch.allclose(denoiser.velocity(latents, 0.5, conditioning, geometry), wanted, rtol=1e-3, atol=1e-4)
    seen = engine.observe(checkpoint, None, RunOptions(samples=3, steps=1, device="cpu"), geometry=geometry)
    assert seen.unvisited == () and np.all(seen.statistics.absmax[seen.statistics.visited] > 0)
assert set(conditions_of(["Nova", "BaseModel"]).wants) == {"cross_attn"}
print(convert_to_quant.__file__)
"""


def test_a_new_family_is_one_new_file(tmp_path):
    """A family that the package does not know can be used for everything."""
    package = Path(convert_to_quant.__file__).parent
    copy = tmp_path / "convert_to_quant"
    (copy / "families").mkdir(parents=True)
    for folder in ("", "families"):
        for path in (package / folder).iterdir():
            if path.name not in ("families", "__pycache__", "auraflow.py"):  # the model that was taken for it
                (copy / folder / path.name).symlink_to(path)
    (copy / "families" / "a_nova.py").write_text(NOVA)  # before AuraFlow, whose class it is run in

    done = subprocess.run(
        [sys.executable, "-c", USES_OF_NOVA], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
