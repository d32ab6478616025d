"""Names of layers: prefixes, diffusers' module names, and LoRA names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from released import hunyuan_authors, small

from convert_to_quant import names
from convert_to_quant.families import RECORDS, Target, diffusers_targets, lora_names
from convert_to_quant.names import strip_prefix

Layers = dict[str, tuple[int, int]]


def layers_of(layout: str, authors: Callable[[str], str] = str) -> Layers:
    """The linear layers of a released model, with the first and last block of each stack."""
    _, bare = strip_prefix(shapes := small(layout, "1 to 1"))
    linear = {bare[name]: shape for name, shape in shapes.items() if name in bare and len(shape) == 2}
    return {authors(name).removesuffix(".weight"): shape for name, shape in linear.items() if name.endswith(".weight")}


MODELS: dict[str, Layers] = {
    "flux.1": layers_of("flux1_dev"),
    "flux.2": layers_of("flux2_dev"),
    "chroma": layers_of("chroma"),
    "sd3": layers_of("sd35_medium"),
    "hunyuan-video": layers_of("hunyuanvideo", hunyuan_authors),
    "wan": layers_of("wan22_animate_14b") | layers_of("wan21_vace_14b"),
    "lumina-2": layers_of("lumina2"),
    "z-image": layers_of("z_image"),
    "ltx": layers_of("ltxv_13b"),
    "ltx-2": layers_of("full_ltx2_dev"),
    "auraflow": layers_of("auraflow"),
}


@pytest.mark.parametrize("hidden", [16, 3072])
@pytest.mark.parametrize(
    ("layer", "shape", "name", "rows"),
    [
        ("double_blocks.1.txt_attn.qkv", (3, 1), "transformer_blocks.1.attn.add_v_proj", (2, 3)),
        ("single_blocks.0.linear1", (7, 1), "single_transformer_blocks.0.attn.to_k", (1, 2)),
        ("single_blocks.0.linear1", (7, 1), "single_transformer_blocks.0.proj_mlp", (3, 7)),
        ("layers.3.attention.qkv", (1.5, 1), "layers.3.attn.to_v", (1.25, 1.5)),  # grouped queries
        ("face_adapter.fuser_blocks.2.linear1_kv", (2, 3), "face_adapter.2.to_v", (1, 2)),
    ],
)
def test_parts_of_a_layer_follow_its_size(hidden, layer, shape, name, rows):
    (out_features, in_features), (first, stop) = ([int(hidden * each) for each in pair] for pair in (shape, rows))
    assert diffusers_targets({layer: (out_features, in_features)})[name] == Target(layer, (first, stop))


@pytest.mark.parametrize("shape", [(31, 32), (97, 32), (98, 32), (32, 32), (8, 32), (128, 32), (129, 32)])
def test_a_layer_whose_shape_is_not_fused_is_not_sliced(shape):
    assert not [t for t in diffusers_targets({"double_blocks.0.img_attn.qkv": shape}).values() if t.rows]
    assert "single_transformer_blocks.0.attn.to_q" not in diffusers_targets({"single_blocks.0.linear1": (96, 32)})


@pytest.mark.parametrize(("pieces", "swapped"), [(6, False), (2, True)])
def test_only_a_layer_of_two_pieces_has_its_halves_swapped(pieces, swapped):
    targets = diffusers_targets({"joint_blocks.1.context_block.adaLN_modulation.1": (pieces * 48, 48)})
    assert targets["transformer_blocks.1.norm1_context.linear"].swap_halves is swapped


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.attn.to_q",
        *(f"{root}.img_attn.qkv" for root in ("double_blocks.0.extra", "double_blocks.zero", "my_double_blocks.0")),
    ],
)
def test_a_name_that_no_rule_covers_as_a_whole_means_itself(name):
    assert diffusers_targets({name: (96, 32)}) == {name: Target(name)}


def test_both_spellings_of_hunyuan_video_mean_the_same_rows():
    authors, comfyui = MODELS["hunyuan-video"], layers_of("hunyuanvideo")
    renamed = dict(zip(authors, comfyui, strict=True))
    by_authors, by_comfyui = diffusers_targets(authors), diffusers_targets(comfyui)
    assert len(set(authors) - set(comfyui)) == 38
    assert by_comfyui == {  # so each also knows the other's names
        name: Target(renamed[t.layer], t.rows, t.swap_halves) for name, t in by_authors.items()
    }


def test_unet_blocks_are_counted_as_diffusers_counts_them():
    inside = "transformer_blocks.7.attn2.to_k"
    same = {
        f"down_blocks.2.attentions.1.{inside}": f"input_blocks.8.1.{inside}",
        f"mid_block.attentions.0.{inside}": f"middle_block.1.{inside}",
        f"up_blocks.1.attentions.2.{inside}": f"output_blocks.5.1.{inside}",
        "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.4.0.emb_layers.1",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    targets = diffusers_targets(dict.fromkeys(same.values(), (64, 96)))
    assert {name: targets[name].layer for name in same} == same


def test_a_name_that_could_mean_two_layers_is_left_out_by_diffusers_targets_and_listed_by_lora_names():
    layers = {"head.head": (16, 32), "final_layer.linear": (16, 32)}  # of two families, both "proj_out"
    assert "proj_out" not in diffusers_targets(layers)
    assert set(lora_names(layers).find("transformer.proj_out")) == {Target("head.head"), Target("final_layer.linear")}


@pytest.mark.parametrize("layers", MODELS.values(), ids=MODELS)
def test_no_lora_name_of_a_real_family_is_ambiguous(layers):
    known = lora_names(layers)
    assert {name: meant for name, meant in (known.exact | known.squeezed).items() if len(meant) > 1} == {}


PREFIXES = (
    "", "diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "net.", "module.", "pipe.dit.", "model.",
    "base_model.model.", "base_model.model.transformer.", "transformer.base_model.model.", "transformer._orig_mod.",
    "diffusion_model.transformer.", "_fsdp_wrapped_module.",
)  # fmt: skip
FLAT_PREFIXES = (
    "lora_unet_", "lora_unet__", "lora_transformer_", "lora_prior_unet_", "lycoris_", "lora_", "lora_unet_net_",
    "Hunyuan_video_I2V_lora_", "lora_unet__orig_mod_",
)  # fmt: skip


@pytest.mark.parametrize("layers", MODELS.values(), ids=MODELS)
def test_every_layer_answers_to_its_own_name_under_every_prefix(layers):
    known = lora_names(layers)
    for layer in layers:
        spellings = [prefix + layer for prefix in PREFIXES]
        spellings += [prefix + layer.replace(".", "_") for prefix in FLAT_PREFIXES]
        assert {spelling: known.find(spelling) for spelling in spellings} == dict.fromkeys(spellings, (Target(layer),))


WRITERS: dict[str, tuple[str, bool]] = {
    "ComfyUI, ai-toolkit, diffusion-pipe": ("diffusion_model.NAME", False),
    "kohya, musubi": ("lora_unet_NAME", False),
    "PEFT": ("base_model.model.NAME", False),
    "LyCORIS": ("lycoris_NAME", False),
    "diffusers, ai-toolkit, SimpleTuner": ("transformer.NAME", True),
    "DiffSynth": ("NAME", True),
    "PEFT on diffusers": ("base_model.model.NAME", True),
    "kohya on diffusers": ("lora_unet_NAME", True),
    "OneTrainer": ("lora_transformer_NAME", True),
    "LyCORIS on diffusers, SimpleTuner": ("lycoris_NAME", True),
}
"""Writer of LoRA files -> how it writes a layer's name, and whether that is diffusers' name."""


def covered(layers: Layers, spelling: str, diffusers: bool) -> str:
    """How many layers are found, with all of their rows, under a writer's names."""
    known, others = lora_names(layers), diffusers_targets(layers)
    found = 0
    for layer, (out_features, _) in layers.items():
        names_of = [name for name, target in others.items() if target.layer == layer and name != layer]
        rows = set()
        for name in (names_of if diffusers else []) or [layer]:
            asked = spelling.replace("NAME", name if "." in spelling else name.replace(".", "_"))
            if spelling == "NAME":
                asked = name
            (target,) = known.find(asked)
            assert target.layer == layer
            rows |= set(range(*(target.rows or (0, out_features))))
        found += rows == set(range(out_features))
    return "all" if found == len(layers) else f"{found} of {len(layers)}"


def test_the_table_of_spellings_in_the_documentation_is_true():
    """`GOLDEN=write` updates it."""
    lines = [["", "", *MODELS], ["---"] * (2 + len(MODELS))]
    for who, (spelling, diffusers) in WRITERS.items():
        shown = spelling.replace("NAME", "transformer_blocks.0.attn.to_q" if diffusers else "blocks.0.attn.q")
        shown = shown if "." in spelling or spelling == "NAME" else shown.replace(".", "_")
        lines.append([who, f"`{shown}`", *(covered(layers, spelling, diffusers) for layers in MODELS.values())])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path = Path(__file__).parents[1] / "docs" / "adapters.md"
    before, rest = path.read_text(encoding="utf-8").split("<!-- spellings -->\n")
    _, after = rest.split("\n<!-- end -->\n")
    page = f"{before}<!-- spellings -->\n{table}\n<!-- end -->\n{after}"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(page, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == page


def test_flattened_names_that_coincide_are_both_listed():
    known = lora_names({"a.b_c": (4, 4), "a_b.c": (4, 4)})
    assert {target.layer for target in known.find("lora_unet_a_b_c")} == {"a.b_c", "a_b.c"}
    assert known.find("a.b_c") == (Target("a.b_c"),)


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_block_numbers_are_kept_whole(blocks):
    known = lora_names({f"blocks.{block}.self_attn.q": (8, 8) for block in blocks})
    for block in range(100):
        name = f"lora_unet_blocks_{block}_self_attn_q"
        assert [target.layer for target in known.find(name)] == [f"blocks.{block}.self_attn.q"] * (block in blocks)


@pytest.mark.parametrize("prefix", ["", *names.DECISIVE_PREFIXES, *names.FREQUENT_PREFIXES, "transformer."])
def test_each_prefix_is_found_and_stripped(prefix):
    listed = [prefix + "img_in.weight", prefix + "blocks.0.x.weight"]
    assert strip_prefix(listed) == (prefix, dict(zip(listed, ["img_in.weight", "blocks.0.x.weight"], strict=True)))


def test_a_vae_in_the_same_file_is_left_out():
    found = strip_prefix(["first_stage_model.conv_in", "model.diffusion_model.x", "cond_stage_model.y"])
    assert found == ("model.diffusion_model.", {"model.diffusion_model.x": "x"})


def test_an_ordinary_word_is_a_prefix_only_where_every_name_has_it():
    assert strip_prefix(["net.x", "proj.y"])[0] == ""
    assert strip_prefix(["net.x", "net.y", "scaled_fp8"]) == ("net.", {"net.x": "x", "net.y": "y"})
    assert strip_prefix([]) == ("", {})


def test_rules_hold_the_same_wildcards_on_both_sides():
    for record in RECORDS:
        for rule in (*record.names, *record.spellings, *record.lora):
            assert re.findall(r"\*+", rule.layer) == re.findall(r"\*+", rule.other), rule
