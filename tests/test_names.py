"""Names of layers: prefixes, diffusers' module names held against diffusers' own converters, and LoRA names."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_to_quant import names
from convert_to_quant.families import RECORDS, Target, diffusers_targets, lora_names
from convert_to_quant.families.rules import rules
from convert_to_quant.names import strip_prefix

Layers = dict[str, tuple[int, int]]


def layers_of(table: str, hidden: int, **fused: int) -> Layers:
    """Layers by lines of "patterns out in": `{a,b}` stands for both; 4h is four times the hidden size."""
    found: Layers = {}

    def number(size: str) -> int:
        return int(size[:-1] or 1) * hidden if size.endswith("h") else fused.get(size) or int(size)

    for line in filter(str.strip, table.splitlines()):
        *patterns, rows, columns = line.split()
        shape = number(rows), number(columns)
        found |= {rule.layer: shape for pattern in patterns for rule in rules((pattern, pattern))}
    return found


FLUX_BLOCKS = """
    img_in h 16
    txt_in h 24
    final_layer.linear 16 h
    double_blocks.{0,1}.{img,txt}_attn.qkv 3h h
    double_blocks.{0,1}.{img,txt}_attn.proj h h
    double_blocks.{0,1}.{img,txt}_mlp.0 4h h
    double_blocks.{0,1}.{img,txt}_mlp.2 h 4h
    single_blocks.{0,1}.linear1 7h h
    single_blocks.{0,1}.linear2 h 5h
"""
FLUX_1 = """
    double_blocks.{0,1}.{img,txt}_mod.lin 6h h
    single_blocks.{0,1}.modulation.lin 3h h
    final_layer.adaLN_modulation.1 2h h
    {time,vector,guidance}_in.in_layer h 32
    {time,vector,guidance}_in.out_layer h h
"""
FLUX_2 = """
    single_blocks.{0,1}.linear1 9h h
    single_blocks.{0,1}.linear2 h 4h
    double_blocks.{0,1}.{img,txt}_mlp.0 double_stream_modulation_{img,txt}.lin 6h h
    double_blocks.{0,1}.{img,txt}_mlp.2 h 3h
    {time,guidance}_in.in_layer h 32
    {time,guidance}_in.out_layer h h
    single_stream_modulation.lin 3h h
    final_layer.adaLN_modulation.1 2h h
"""
CHROMA = """
    distilled_guidance_layer.{in,out}_proj distilled_guidance_layer.layers.{0,1}.{in,out}_layer h h
"""
# The last block's text side is cut short, the first one has a second attention.
SD3 = """
    context_embedder h 24
    final_layer.linear 16 h
    {t,y}_embedder.mlp.0 h 32
    {t,y}_embedder.mlp.2 h h
    joint_blocks.{0,1}.{x,context}_block.attn.qkv joint_blocks.0.x_block.attn2.qkv 3h h
    joint_blocks.0.{x,context}_block.attn.proj joint_blocks.1.x_block.attn.proj joint_blocks.0.x_block.attn2.proj h h
    joint_blocks.0.{x,context}_block.mlp.fc1 joint_blocks.1.x_block.mlp.fc1 4h h
    joint_blocks.0.{x,context}_block.mlp.fc2 joint_blocks.1.x_block.mlp.fc2 h 4h
    joint_blocks.0.x_block.adaLN_modulation.1 9h h
    joint_blocks.1.x_block.adaLN_modulation.1 joint_blocks.0.context_block.adaLN_modulation.1 6h h
    joint_blocks.1.context_block.adaLN_modulation.1 final_layer.adaLN_modulation.1 2h h
"""
# In its authors' spelling, then how ComfyUI's differs.
HUNYUAN_VIDEO = """
    {time,guidance}_in.mlp.0 txt_in.t_embedder.mlp.0 h 32
    {time,guidance}_in.mlp.2 txt_in.t_embedder.mlp.2 h h
    vector_in.in_layer h 24
    vector_in.out_layer txt_in.c_embedder.linear_2 h h
    txt_in.input_embedder txt_in.c_embedder.linear_1 h 48
    final_layer.linear 64 h
    final_layer.adaLN_modulation.1 txt_in.individual_token_refiner.blocks.{0,1}.adaLN_modulation.1 2h h
    double_blocks.{0,1}.{img,txt}_attn_qkv txt_in.individual_token_refiner.blocks.{0,1}.self_attn_qkv 3h h
    double_blocks.{0,1}.{img,txt}_attn_proj txt_in.individual_token_refiner.blocks.{0,1}.self_attn_proj h h
    double_blocks.{0,1}.{img,txt}_mod.linear 6h h
    double_blocks.{0,1}.{img,txt}_mlp.fc1 txt_in.individual_token_refiner.blocks.{0,1}.mlp.fc1 4h h
    double_blocks.{0,1}.{img,txt}_mlp.fc2 txt_in.individual_token_refiner.blocks.{0,1}.mlp.fc2 h 4h
    single_blocks.{0,1}.linear1 7h h
    single_blocks.{0,1}.linear2 h 5h
    single_blocks.{0,1}.modulation.linear 3h h
"""
COMFYUI_SPELLING = {
    "attn_": "attn.", "_mod.linear": "_mod.lin", ".modulation.linear": ".modulation.lin",
    "_in.mlp.0": "_in.in_layer", "_in.mlp.2": "_in.out_layer", "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
    "c_embedder.linear_1": "c_embedder.in_layer", "c_embedder.linear_2": "c_embedder.out_layer",
}  # fmt: skip
WAN = """
    time_embedding.0 h 32
    {time,text}_embedding.2 vace_blocks.0.{before,after}_proj h h
    time_projection.1 6h h
    text_embedding.0 img_emb.proj.3 h 48
    img_emb.proj.1 48 48
    head.head 64 h
    face_adapter.fuser_blocks.0.{linear1_q,linear2} motion_encoder.enc.fc.0 h h
    face_adapter.fuser_blocks.0.linear1_kv 2h h
    {blocks.0,blocks.1,vace_blocks.0}.{self,cross}_attn.{q,k,v,o} h h
    {blocks.0,blocks.1,vace_blocks.0}.cross_attn.{k,v}_img h h
    {blocks.0,blocks.1,vace_blocks.0}.ffn.0 4h h
    {blocks.0,blocks.1,vace_blocks.0}.ffn.2 h 4h
"""
LUMINA = """
    x_embedder h 64
    cap_embedder.1 h 48
    t_embedder.mlp.{0,2} 32 32
    final_layer.linear 64 h
    final_layer.adaLN_modulation.1 h 32
    {layers.0,layers.1,noise_refiner.0,context_refiner.0}.attention.qkv QKV h
    {layers.0,layers.1,noise_refiner.0,context_refiner.0}.attention.out h h
    {layers.0,layers.1,noise_refiner.0,context_refiner.0}.feed_forward.{w1,w3} 96 h
    {layers.0,layers.1,noise_refiner.0,context_refiner.0}.feed_forward.w2 h 96
"""
LTX = """
    patchify_proj adaln_single.emb.timestep_embedder.linear_1 32 16
    adaln_single.linear 192 32
    caption_projection.linear_1 32 24
    transformer_blocks.0.attn1.to_q 32 32
    transformer_blocks.0.ff.net.0.proj 128 32
    proj_out 16 32
"""
LTX_2 = """
    audio_patchify_proj av_ca_audio_scale_shift_adaln_single.emb.timestep_embedder.linear_1 32 16
    audio_adaln_single.linear av_ca_video_scale_shift_adaln_single.linear 192 32
    av_ca_{a2v,v2a}_gate_adaln_single.linear 32 32
"""
AURAFLOW = """
    init_x_linear h 16
    cond_seq_linear h 24
    t_embedder.mlp.0 h 32
    t_embedder.mlp.2 h h
    modF.1 2h h
    final_linear 16 h
    double_layers.{0,1}.attn.w{1,2}{q,k,v,o} single_layers.0.attn.w1{q,k,v,o} h h
    double_layers.{0,1}.mlp{X,C}.c_fc{1,2} single_layers.0.mlp.c_fc{1,2} 4h h
    double_layers.{0,1}.mlp{X,C}.c_proj single_layers.0.mlp.c_proj h 4h
    double_layers.{0,1}.mod{X,C}.1 single_layers.0.modCX.1 6h h
"""
MODULATED = "{layers.0,layers.1,noise_refiner.0}.adaLN_modulation"
LUMINA_2 = layers_of(LUMINA + f"{MODULATED}.1 4h 32", 2304, QKV=2304 + 2 * 768)
Z_IMAGE = layers_of(LUMINA + f"{MODULATED}.0 4h 32", 48, QKV=3 * 48)


# (converter in diffusers, layers); the hidden sizes 3072 and 2304 are constants in the converters, not in our tables.
CONVERTED: dict[str, tuple[str, Layers]] = {
    "flux.1": ("convert_flux_transformer_checkpoint_to_diffusers", layers_of(FLUX_BLOCKS + FLUX_1, 3072)),
    "flux.2": ("convert_flux2_transformer_checkpoint_to_diffusers", layers_of(FLUX_BLOCKS + FLUX_2, 48)),
    "chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", layers_of(FLUX_BLOCKS + CHROMA, 3072)),
    "sd3": ("convert_sd3_transformer_checkpoint_to_diffusers", layers_of(SD3, 48)),
    "hunyuan_video": ("convert_hunyuan_video_transformer_to_diffusers", layers_of(HUNYUAN_VIDEO, 3072)),
    "wan": ("convert_wan_transformer_to_diffusers", layers_of(WAN, 48)),
    "lumina_2": ("convert_lumina2_to_diffusers", LUMINA_2),
    "z_image": ("convert_z_image_transformer_checkpoint_to_diffusers", Z_IMAGE),
    "ltx": ("convert_ltx_transformer_checkpoint_to_diffusers", layers_of(LTX, 0)),
    "ltx_2": ("convert_ltx2_transformer_to_diffusers", layers_of(LTX + LTX_2, 0)),
    "auraflow": ("convert_auraflow_transformer_checkpoint_to_diffusers", layers_of(AURAFLOW, 48)),
}


class Checkpoint(dict[str, Any]):
    """A state dict that makes up the norms and tables that a converter insists on."""

    def pop(self, key: str, *default: Any) -> Any:
        import torch

        return super().pop(key, *default or [torch.full((12, 1), -1)])


@pytest.fixture(scope="module")
def converters() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders import single_file_utils
    return single_file_utils


@pytest.mark.parametrize("family", CONVERTED)
def test_every_row_goes_where_diffusers_own_converter_puts_it(family: str, converters: ModuleType) -> None:
    import torch

    converter, layers = CONVERTED[family]
    checkpoint = Checkpoint()
    rows_of: dict[str, Any] = {}
    first = 0
    for layer, (out_features, _) in layers.items():  # every row of the model carries its own number
        rows_of[layer] = torch.arange(first, first + out_features)
        checkpoint[f"{layer}.weight"] = rows_of[layer][:, None]
        checkpoint[f"{layer}.bias"] = rows_of[layer]
        first += out_features
    converted = getattr(converters, converter)(checkpoint)

    targets = diffusers_targets(layers)
    seen: list[Any] = []
    for key, weight in converted.items():
        module = key.removesuffix(".weight")
        if module == key or weight.min() < 0:
            continue
        target = targets[module]
        start, stop = target.rows or (0, layers[target.layer][0])
        expected = rows_of[target.layer][start:stop]
        if target.swap_halves:
            expected = torch.cat([expected[len(expected) // 2 :], expected[: len(expected) // 2]])
        assert torch.equal(weight[:, 0], expected), module
        seen.append(weight[:, 0])
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(first))  # the map loses no row and doubles none


@pytest.mark.parametrize("hidden", [16, 256, 3072, 6144])
def test_flux_slices_follow_the_hidden_size(hidden: int) -> None:
    targets = diffusers_targets(layers_of(FLUX_BLOCKS + FLUX_1, hidden))
    qkv = "double_blocks.1.txt_attn.qkv"
    assert targets["transformer_blocks.1.attn.add_v_proj"] == Target(qkv, (2 * hidden, 3 * hidden))
    linear1 = "single_blocks.0.linear1"
    assert targets["single_transformer_blocks.0.attn.to_k"] == Target(linear1, (hidden, 2 * hidden))
    assert targets["single_transformer_blocks.0.proj_mlp"] == Target(linear1, (3 * hidden, 7 * hidden))
    assert targets["norm_out.linear"] == Target("final_layer.adaLN_modulation.1", None, swap_halves=True)


def test_grouped_queries_give_keys_and_values_the_smaller_slices() -> None:
    targets = diffusers_targets({"layers.3.attention.qkv": (96 + 2 * 32, 96)})
    assert [targets[f"layers.3.attn.to_{part}"].rows for part in "qkv"] == [(0, 96), (96, 128), (128, 160)]


@pytest.mark.parametrize("shape", [(64, 32), (31, 32), (97, 32), (98, 32), (32, 32), (8, 32), (128, 32), (129, 32)])
def test_a_layer_whose_shape_is_not_fused_is_not_sliced(shape: tuple[int, int]) -> None:
    sliced = [target for target in diffusers_targets({"double_blocks.0.img_attn.qkv": shape}).values() if target.rows]
    fits = shape == (64, 32)  # 32 query rows, 16 rows each of keys and values
    assert [target.rows for target in sliced] == ([(0, 32), (32, 48), (48, 64)] if fits else [])


def test_a_single_block_without_mlp_rows_is_not_sliced() -> None:
    assert "single_transformer_blocks.0.attn.to_q" not in diffusers_targets({"single_blocks.0.linear1": (96, 32)})


def test_only_a_layer_of_two_pieces_has_its_halves_swapped() -> None:
    targets = diffusers_targets(layers_of(SD3, 48))
    assert not targets["transformer_blocks.0.norm1_context.linear"].swap_halves
    assert targets["transformer_blocks.1.norm1_context.linear"].swap_halves


def test_names_that_are_diffusers_names_already_mean_themselves() -> None:
    layers = {"transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.59.img_mlp.net.0.proj": (128, 32)}
    assert diffusers_targets(layers) == {layer: Target(layer) for layer in layers}


@pytest.mark.parametrize("root", ["double_blocks.0.extra", "double_blocks.zero", "double_blocks", "my_double_blocks.0"])
def test_a_block_number_is_one_number_and_patterns_cover_whole_names(root: str) -> None:
    layers = {f"{root}.img_attn.qkv": (96, 32)}
    assert diffusers_targets(layers) == {layer: Target(layer) for layer in layers}


def test_both_spellings_of_hunyuan_video_mean_the_same_rows() -> None:
    authors = layers_of(HUNYUAN_VIDEO, 48)
    renamed = {}
    for layer in authors:
        renamed[layer] = layer
        for theirs, comfyuis in COMFYUI_SPELLING.items():
            renamed[layer] = renamed[layer].replace(theirs, comfyuis)
    comfyui = {renamed[layer]: shape for layer, shape in authors.items()}
    by_authors, by_comfyui = diffusers_targets(authors), diffusers_targets(comfyui)
    expected = {name: Target(renamed[t.layer], t.rows, t.swap_halves) for name, t in by_authors.items()}
    assert len(set(authors) - set(comfyui)) == 38
    assert by_comfyui == expected  # so each also knows the other's names


def test_unet_blocks_are_counted_as_diffusers_counts_them() -> None:
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


def test_a_name_that_could_mean_two_layers_is_left_out_by_diffusers_targets_and_listed_by_lora_names() -> None:
    layers = {"head.head": (16, 32), "final_layer.linear": (16, 32)}  # of two families, both "proj_out"
    assert "proj_out" not in diffusers_targets(layers)
    assert set(lora_names(layers).find("transformer.proj_out")) == {Target("head.head"), Target("final_layer.linear")}


@pytest.mark.parametrize("layers", [layers for _, layers in CONVERTED.values()], ids=list(CONVERTED))
def test_no_lora_name_of_a_real_family_is_ambiguous(layers: Layers) -> None:
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


@pytest.mark.parametrize("layers", [layers for _, layers in CONVERTED.values()], ids=list(CONVERTED))
def test_every_layer_answers_to_its_own_name_under_every_prefix(layers: Layers) -> None:
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
"""Who writes LoRA files -> how they spell a layer, and whether they have diffusers' names for it."""


def covered(layers: Layers, spelling: str, diffusers: bool) -> str:
    """How many layers are found, all of their rows, under the names that one of the writers gives them."""
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


def test_the_table_of_spellings_in_the_documentation_is_true() -> None:
    """`GOLDEN=write` writes it anew."""
    families = {name.replace("_", "-"): layers for name, (_, layers) in CONVERTED.items()}
    lines = [["", "", *families], ["---"] * (2 + len(families))]
    for who, (spelling, diffusers) in WRITERS.items():
        shown = spelling.replace("NAME", "transformer_blocks.0.attn.to_q" if diffusers else "blocks.0.attn.q")
        shown = shown if "." in spelling or spelling == "NAME" else shown.replace(".", "_")
        lines.append([who, f"`{shown}`", *(covered(layers, spelling, diffusers) for layers in families.values())])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path = Path(__file__).parents[1] / "docs" / "adapters.md"
    before, rest = path.read_text(encoding="utf-8").split("<!-- spellings -->\n")
    _, after = rest.split("\n<!-- end -->\n")
    page = f"{before}<!-- spellings -->\n{table}\n<!-- end -->\n{after}"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(page, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == page


def test_flattened_names_that_coincide_are_both_listed() -> None:
    known = lora_names({"a.b_c": (4, 4), "a_b.c": (4, 4)})
    assert {target.layer for target in known.find("lora_unet_a_b_c")} == {"a.b_c", "a_b.c"}
    assert known.find("a.b_c") == (Target("a.b_c"),)


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_block_numbers_are_kept_whole(blocks: list[int]) -> None:
    known = lora_names({f"blocks.{block}.self_attn.q": (8, 8) for block in blocks})
    for block in range(100):
        name = f"lora_unet_blocks_{block}_self_attn_q"
        assert [target.layer for target in known.find(name)] == [f"blocks.{block}.self_attn.q"] * (block in blocks)


@pytest.mark.parametrize("prefix", ["", *names.DECISIVE_PREFIXES, *names.FREQUENT_PREFIXES, "transformer."])
def test_each_prefix_is_found_and_stripped(prefix: str) -> None:
    listed = [prefix + "img_in.weight", prefix + "blocks.0.x.weight"]
    assert strip_prefix(listed) == (prefix, dict(zip(listed, ["img_in.weight", "blocks.0.x.weight"], strict=True)))


def test_a_vae_beside_the_diffusion_model_is_left_out() -> None:
    prefix, bare = strip_prefix(["first_stage_model.conv_in", "model.diffusion_model.x", "cond_stage_model.y"])
    assert (prefix, bare) == ("model.diffusion_model.", {"model.diffusion_model.x": "x"})


def test_an_ordinary_word_is_a_prefix_only_where_every_name_has_it() -> None:
    assert strip_prefix(["net.x", "proj.y"])[0] == ""
    assert strip_prefix(["net.x", "net.y", "scaled_fp8"]) == ("net.", {"net.x": "x", "net.y": "y"})
    assert strip_prefix([]) == ("", {})


def test_suffixes_are_written_once() -> None:
    assert len(set(names.LAYER_SUFFIXES)) == len(names.LAYER_SUFFIXES)


def test_rules_hold_the_same_wildcards_on_both_sides() -> None:
    def wildcards(pattern: str) -> Any:
        return np.array([word for word in pattern.split(".") if "*" in word])

    for record in RECORDS:
        for rule in (*record.names, *record.spellings, *record.lora):
            assert np.array_equal(wildcards(rule.layer), wildcards(rule.other)), rule
