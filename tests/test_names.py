"""Names of layers: prefixes, diffusers' module names held against diffusers' own converters, and LoRA names."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_to_quant import names
from convert_to_quant.families import RECORDS, Target, diffusers_targets, lora_targets
from convert_to_quant.names import strip_prefix

Layers = dict[str, tuple[int, int]]


def flux_like(hidden: int, *, modulation: bool = True) -> Layers:
    """A model of two double and two single blocks with Flux.1's layer names."""
    layers: Layers = {
        "img_in": (hidden, 16),
        "txt_in": (hidden, 24),
        "final_layer.linear": (16, hidden),
    }
    for block in range(2):
        for stream in ("img", "txt"):
            root = f"double_blocks.{block}.{stream}_"
            layers[root + "attn.qkv"] = (3 * hidden, hidden)
            layers[root + "attn.proj"] = (hidden, hidden)
            layers[root + "mlp.0"] = (4 * hidden, hidden)
            layers[root + "mlp.2"] = (hidden, 4 * hidden)
            if modulation:
                layers[root + "mod.lin"] = (6 * hidden, hidden)
        layers[f"single_blocks.{block}.linear1"] = (7 * hidden, hidden)
        layers[f"single_blocks.{block}.linear2"] = (hidden, 5 * hidden)
        if modulation:
            layers[f"single_blocks.{block}.modulation.lin"] = (3 * hidden, hidden)
    if modulation:
        layers["final_layer.adaLN_modulation.1"] = (2 * hidden, hidden)
        for embedder in ("time_in", "vector_in", "guidance_in"):
            layers[f"{embedder}.in_layer"] = (hidden, 32)
            layers[f"{embedder}.out_layer"] = (hidden, hidden)
    return layers


def flux_2(hidden: int) -> Layers:
    layers = flux_like(hidden, modulation=False)
    for block in range(2):
        layers[f"single_blocks.{block}.linear1"] = (9 * hidden, hidden)
        layers[f"single_blocks.{block}.linear2"] = (hidden, 4 * hidden)
        for stream in ("img", "txt"):
            layers[f"double_blocks.{block}.{stream}_mlp.0"] = (6 * hidden, hidden)
            layers[f"double_blocks.{block}.{stream}_mlp.2"] = (hidden, 3 * hidden)
    for embedder in ("time_in", "guidance_in"):
        layers[f"{embedder}.in_layer"] = (hidden, 32)
        layers[f"{embedder}.out_layer"] = (hidden, hidden)
    layers["double_stream_modulation_img.lin"] = (6 * hidden, hidden)
    layers["double_stream_modulation_txt.lin"] = (6 * hidden, hidden)
    layers["single_stream_modulation.lin"] = (3 * hidden, hidden)
    layers["final_layer.adaLN_modulation.1"] = (2 * hidden, hidden)
    return layers


def chroma(hidden: int) -> Layers:
    layers = flux_like(hidden, modulation=False)
    for end in ("in_proj", "out_proj"):
        layers[f"distilled_guidance_layer.{end}"] = (hidden, hidden)
    for block in range(2):
        layers[f"distilled_guidance_layer.layers.{block}.in_layer"] = (hidden, hidden)
        layers[f"distilled_guidance_layer.layers.{block}.out_layer"] = (hidden, hidden)
    return layers


def sd3(hidden: int) -> Layers:
    """Two blocks, the last one's text side cut short, the first one with a second attention."""
    layers: Layers = {
        "context_embedder": (hidden, 24),
        "final_layer.linear": (16, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
        "joint_blocks.0.x_block.attn2.qkv": (3 * hidden, hidden),
        "joint_blocks.0.x_block.attn2.proj": (hidden, hidden),
        "joint_blocks.0.x_block.adaLN_modulation.1": (9 * hidden, hidden),
        "joint_blocks.1.x_block.adaLN_modulation.1": (6 * hidden, hidden),
        "joint_blocks.0.context_block.adaLN_modulation.1": (6 * hidden, hidden),
        "joint_blocks.1.context_block.adaLN_modulation.1": (2 * hidden, hidden),
    }
    for embedder in ("t_embedder", "y_embedder"):
        layers[f"{embedder}.mlp.0"] = (hidden, 32)
        layers[f"{embedder}.mlp.2"] = (hidden, hidden)
    for block in range(2):
        for side in ("x_block", "context_block"):
            root = f"joint_blocks.{block}.{side}"
            layers[f"{root}.attn.qkv"] = (3 * hidden, hidden)
            if (block, side) != (1, "context_block"):
                layers[f"{root}.attn.proj"] = (hidden, hidden)
                layers[f"{root}.mlp.fc1"] = (4 * hidden, hidden)
                layers[f"{root}.mlp.fc2"] = (hidden, 4 * hidden)
    return layers


def hunyuan_video(hidden: int) -> Layers:
    """The authors' spelling."""
    layers: Layers = {
        "time_in.mlp.0": (hidden, 32),
        "time_in.mlp.2": (hidden, hidden),
        "guidance_in.mlp.0": (hidden, 32),
        "guidance_in.mlp.2": (hidden, hidden),
        "vector_in.in_layer": (hidden, 24),
        "vector_in.out_layer": (hidden, hidden),
        "txt_in.input_embedder": (hidden, 48),
        "txt_in.t_embedder.mlp.0": (hidden, 32),
        "txt_in.t_embedder.mlp.2": (hidden, hidden),
        "txt_in.c_embedder.linear_1": (hidden, 48),
        "txt_in.c_embedder.linear_2": (hidden, hidden),
        "final_layer.linear": (64, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }
    for block in range(2):
        for stream in ("img", "txt"):
            root = f"double_blocks.{block}.{stream}_"
            layers[root + "attn_qkv"] = (3 * hidden, hidden)
            layers[root + "attn_proj"] = (hidden, hidden)
            layers[root + "mod.linear"] = (6 * hidden, hidden)
            layers[root + "mlp.fc1"] = (4 * hidden, hidden)
            layers[root + "mlp.fc2"] = (hidden, 4 * hidden)
        layers[f"single_blocks.{block}.linear1"] = (7 * hidden, hidden)
        layers[f"single_blocks.{block}.linear2"] = (hidden, 5 * hidden)
        layers[f"single_blocks.{block}.modulation.linear"] = (3 * hidden, hidden)
        root = f"txt_in.individual_token_refiner.blocks.{block}."
        layers[root + "self_attn_qkv"] = (3 * hidden, hidden)
        layers[root + "self_attn_proj"] = (hidden, hidden)
        layers[root + "mlp.fc1"] = (4 * hidden, hidden)
        layers[root + "mlp.fc2"] = (hidden, 4 * hidden)
        layers[root + "adaLN_modulation.1"] = (2 * hidden, hidden)
    return layers


def comfyui_spelling(layers: Layers) -> Layers:
    """HunyuanVideo's layers as ComfyUI names them."""
    swaps = {
        "attn_qkv": "attn.qkv",
        "attn_proj": "attn.proj",
        "_mod.linear": "_mod.lin",
        ".modulation.linear": ".modulation.lin",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
        "_in.mlp.0": "_in.in_layer",
        "_in.mlp.2": "_in.out_layer",
        "t_embedder.mlp.0": "t_embedder.in_layer",
        "t_embedder.mlp.2": "t_embedder.out_layer",
        "c_embedder.linear_1": "c_embedder.in_layer",
        "c_embedder.linear_2": "c_embedder.out_layer",
    }
    renamed = {}
    for layer, shape in layers.items():
        name = layer
        for old, new in swaps.items():
            name = name.replace(old, new)
        renamed[name] = shape
    return renamed


def wan(hidden: int) -> Layers:
    layers: Layers = {
        "time_embedding.0": (hidden, 32),
        "time_embedding.2": (hidden, hidden),
        "time_projection.1": (6 * hidden, hidden),
        "text_embedding.0": (hidden, 48),
        "text_embedding.2": (hidden, hidden),
        "img_emb.proj.1": (48, 48),
        "img_emb.proj.3": (hidden, 48),
        "head.head": (64, hidden),
        "vace_blocks.0.before_proj": (hidden, hidden),
        "vace_blocks.0.after_proj": (hidden, hidden),
        "face_adapter.fuser_blocks.0.linear1_q": (hidden, hidden),
        "face_adapter.fuser_blocks.0.linear1_kv": (2 * hidden, hidden),
        "face_adapter.fuser_blocks.0.linear2": (hidden, hidden),
        "motion_encoder.enc.fc.0": (hidden, hidden),
    }
    for root in ("blocks.0.", "blocks.1.", "vace_blocks.0."):
        for attention in ("self_attn", "cross_attn"):
            for layer in "qkvo":
                layers[f"{root}{attention}.{layer}"] = (hidden, hidden)
        for layer in ("k_img", "v_img"):
            layers[f"{root}cross_attn.{layer}"] = (hidden, hidden)
        layers[root + "ffn.0"] = (4 * hidden, hidden)
        layers[root + "ffn.2"] = (hidden, 4 * hidden)
    return layers


def lumina(hidden: int, key_rows: int, modulation: str, final_rows: int) -> Layers:
    layers: Layers = {
        "x_embedder": (hidden, 64),
        "cap_embedder.1": (hidden, 48),
        "t_embedder.mlp.0": (32, 32),
        "t_embedder.mlp.2": (32, 32),
        "final_layer.linear": (64, hidden),
        "final_layer.adaLN_modulation.1": (final_rows, 32),
    }
    for tower in ("layers.0.", "layers.1.", "noise_refiner.0.", "context_refiner.0."):
        layers[tower + "attention.qkv"] = (hidden + 2 * key_rows, hidden)
        layers[tower + "attention.out"] = (hidden, hidden)
        for layer, shape in (("w1", (96, hidden)), ("w2", (hidden, 96)), ("w3", (96, hidden))):
            layers[f"{tower}feed_forward.{layer}"] = shape
        if not tower.startswith("context"):
            layers[tower + modulation] = (4 * hidden, 32)
    return layers


LTX: Layers = {
    "patchify_proj": (32, 16),
    "adaln_single.linear": (192, 32),
    "adaln_single.emb.timestep_embedder.linear_1": (32, 16),
    "caption_projection.linear_1": (32, 24),
    "transformer_blocks.0.attn1.to_q": (32, 32),
    "transformer_blocks.0.ff.net.0.proj": (128, 32),
    "proj_out": (16, 32),
}
LTX_2: Layers = {
    **LTX,
    "audio_patchify_proj": (32, 16),
    "audio_adaln_single.linear": (192, 32),
    "av_ca_video_scale_shift_adaln_single.linear": (192, 32),
    "av_ca_audio_scale_shift_adaln_single.emb.timestep_embedder.linear_1": (32, 16),
    "av_ca_a2v_gate_adaln_single.linear": (32, 32),
    "av_ca_v2a_gate_adaln_single.linear": (32, 32),
}


def auraflow(hidden: int) -> Layers:
    layers: Layers = {
        "init_x_linear": (hidden, 16),
        "cond_seq_linear": (hidden, 24),
        "t_embedder.mlp.0": (hidden, 32),
        "t_embedder.mlp.2": (hidden, hidden),
        "modF.1": (2 * hidden, hidden),
        "final_linear": (16, hidden),
    }
    for root, streams, attentions in (
        ("double_layers.0.", (("mlpX", "modX"), ("mlpC", "modC")), (1, 2)),
        ("double_layers.1.", (("mlpX", "modX"), ("mlpC", "modC")), (1, 2)),
        ("single_layers.0.", (("mlp", "modCX"),), (1,)),
    ):
        for part in "qkvo":
            layers |= {f"{root}attn.w{number}{part}": (hidden, hidden) for number in attentions}
        for mlp, modulation in streams:
            layers |= {f"{root}{mlp}.{layer}": (4 * hidden, hidden) for layer in ("c_fc1", "c_fc2")}
            layers[f"{root}{mlp}.c_proj"] = (hidden, 4 * hidden)
            layers[f"{root}{modulation}.1"] = (6 * hidden, hidden)
    return layers


# (converter in diffusers, layers); the hidden sizes 3072 and 2304 are constants in the converters, not in our tables.
CONVERTED: dict[str, tuple[str, Layers]] = {
    "flux.1": ("convert_flux_transformer_checkpoint_to_diffusers", flux_like(3072)),
    "flux.2": ("convert_flux2_transformer_checkpoint_to_diffusers", flux_2(48)),
    "chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", chroma(3072)),
    "sd3": ("convert_sd3_transformer_checkpoint_to_diffusers", sd3(48)),
    "hunyuan_video": ("convert_hunyuan_video_transformer_to_diffusers", hunyuan_video(3072)),
    "wan": ("convert_wan_transformer_to_diffusers", wan(48)),
    "lumina_2": ("convert_lumina2_to_diffusers", lumina(2304, 768, "adaLN_modulation.1", 2304)),
    "z_image": ("convert_z_image_transformer_checkpoint_to_diffusers", lumina(48, 48, "adaLN_modulation.0", 48)),
    "ltx": ("convert_ltx_transformer_checkpoint_to_diffusers", LTX),
    "ltx_2": ("convert_ltx2_transformer_to_diffusers", LTX_2),
    "auraflow": ("convert_auraflow_transformer_checkpoint_to_diffusers", auraflow(48)),
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
    targets = diffusers_targets(flux_like(hidden))
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
    targets = diffusers_targets(sd3(48))
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
    authors, comfyui = hunyuan_video(48), comfyui_spelling(hunyuan_video(48))
    renamed = dict(zip(authors, comfyui, strict=True))
    by_authors, by_comfyui = diffusers_targets(authors), diffusers_targets(comfyui)
    expected = {name: Target(renamed[t.layer], t.rows, t.swap_halves) for name, t in by_authors.items()}
    assert len(set(authors) - set(comfyui)) == 38
    assert by_comfyui == expected  # so each also knows the other's names


def test_unet_blocks_are_counted_as_diffusers_counts_them() -> None:
    inside = "transformer_blocks.7.attn2.to_k"
    targets = diffusers_targets(
        {
            f"input_blocks.8.1.{inside}": (64, 96),
            f"middle_block.1.{inside}": (64, 96),
            f"output_blocks.5.1.{inside}": (64, 96),
            "input_blocks.4.0.emb_layers.1": (64, 64),
            "label_emb.0.2": (64, 64),
        }
    )
    assert targets[f"down_blocks.2.attentions.1.{inside}"].layer == f"input_blocks.8.1.{inside}"
    assert targets[f"mid_block.attentions.0.{inside}"].layer == f"middle_block.1.{inside}"
    assert targets[f"up_blocks.1.attentions.2.{inside}"].layer == f"output_blocks.5.1.{inside}"
    assert targets["down_blocks.1.resnets.0.time_emb_proj"].layer == "input_blocks.4.0.emb_layers.1"
    assert targets["add_embedding.linear_2"].layer == "label_emb.0.2"


def test_a_name_that_could_mean_two_layers_is_left_out_by_diffusers_targets_and_listed_by_lora_targets() -> None:
    layers = {"head.head": (16, 32), "final_layer.linear": (16, 32)}  # of two families, both "proj_out"
    assert "proj_out" not in diffusers_targets(layers)
    assert set(lora_targets(layers)["transformer.proj_out"]) == {Target("head.head"), Target("final_layer.linear")}


@pytest.mark.parametrize("layers", [layers for _, layers in CONVERTED.values()], ids=list(CONVERTED))
def test_no_lora_name_of_a_real_family_is_ambiguous(layers: Layers) -> None:
    assert {name: targets for name, targets in lora_targets(layers).items() if len(targets) > 1} == {}


@pytest.mark.parametrize("layers", [layers for _, layers in CONVERTED.values()], ids=list(CONVERTED))
def test_every_layer_answers_to_its_own_name_under_every_prefix(layers: Layers) -> None:
    targets = lora_targets(layers)
    for layer in layers:
        spellings = [prefix + layer for prefix in names.LORA_PREFIXES]
        spellings += [prefix + layer.replace(".", "_") for prefix in names.LORA_FLAT_PREFIXES]
        assert all(targets[spelling] == (Target(layer),) for spelling in spellings)


def test_flattened_names_that_coincide_are_both_listed() -> None:
    found = lora_targets({"a.b_c": (4, 4), "a_b.c": (4, 4)})
    assert {target.layer for target in found["lora_unet_a_b_c"]} == {"a.b_c", "a_b.c"}
    assert found["a.b_c"] == (Target("a.b_c"),)


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_block_numbers_are_kept_whole(blocks: list[int]) -> None:
    found = lora_targets({f"blocks.{block}.self_attn.q": (8, 8) for block in blocks})
    for block in range(100):
        name = f"lora_unet_blocks_{block}_self_attn_q"
        assert (name in found) == (block in blocks)
        assert all(target.layer == f"blocks.{block}.self_attn.q" for target in found.get(name, ()))


@pytest.mark.parametrize("prefix", names.CHECKPOINT_PREFIXES)
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
    down, up = zip(*names.LORA_FACTORS, strict=True)
    suffixes = [*down, *up, *names.LORA_ALPHAS, *names.UNSUPPORTED_SUFFIXES]
    assert len(set(suffixes)) == len(suffixes)
    assert len(set(names.LAYER_SUFFIXES)) == len(names.LAYER_SUFFIXES)


def test_rules_hold_the_same_wildcards_on_both_sides() -> None:
    def wildcards(pattern: str) -> Any:
        return np.array([word for word in pattern.split(".") if "*" in word])

    for record in RECORDS:
        for rule in (*record.names, *record.spellings, *record.lora):
            assert np.array_equal(wildcards(rule.layer), wildcards(rule.other)), rule
