"""Every family is recognized by real layer names, in both namings, and quantizes what its table says.

The names are those that ComfyUI's and diffusers' own classes give their layers (one block where blocks repeat).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

import convert_to_quant
from convert_to_quant.errors import OptionError
from convert_to_quant.families import FAMILIES, GENERIC, Family, detect, family, module_names
from convert_to_quant.families.rules import rules
from convert_to_quant.names import other_part


def spread(text: str) -> list[str]:
    """Names by patterns: `a.{b,c}.d` stands for `a.b.d` and `a.c.d`."""
    return [rule.layer for word in text.split() for rule in rules((word, word))]


@dataclass(frozen=True)
class Model:
    """Layer names of one model."""

    family: str | None
    quantized: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    other_tensors: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [*(f"{layer}.weight" for layer in self.quantized + self.kept), *self.other_tensors]


# What several models share.
SHARED = """
@joint transformer_blocks.0.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}
    transformer_blocks.0.{ff,ff_context}.{net.0.proj,net.2}
@modulation transformer_blocks.0.{norm1,norm1_context}.linear
@single single_transformer_blocks.{0,37}.{attn.to_q,attn.to_k,attn.to_v,proj_mlp,proj_out}
@time_text time_text_embed.{timestep_embedder,text_embedder}.{linear_1,linear_2}
@flux double_blocks.{0,18}.{img_mod,txt_mod}.lin double_blocks.{0,18}.{img_attn,txt_attn}.{qkv,proj}
    double_blocks.{0,18}.{img_mlp,txt_mlp}.{0,2} single_blocks.{0,37}.{linear1,linear2,modulation.lin}
@hunyuan_ends {time_in,guidance_in,vector_in}.{in_layer,out_layer} txt_in.input_embedder
    txt_in.{t_embedder,c_embedder}.in_layer
    txt_in.individual_token_refiner.blocks.1.{self_attn.qkv,self_attn.proj,mlp.0,mlp.2,adaLN_modulation.1}
    final_layer.{linear,adaLN_modulation.1}
@dit layers.29.{attention.qkv,attention.out,feed_forward.w1,feed_forward.w2,feed_forward.w3}
@ends_of_dit {noise_refiner,context_refiner}.1.{attention.qkv,attention.out,feed_forward.w1,feed_forward.w2}
    t_embedder.mlp.{0,2} cap_embedder.1 final_layer.linear final_layer.adaLN_modulation.1 x_embedder
@sdxl transformer_blocks.{0,1}.{attn1.to_q,attn2.to_k,attn2.to_v,attn2.to_out.0,ff.net.0.proj,ff.net.2}
"""
# Each model and its family; "+" layers that are quantized, "-" layers that are kept, "." other tensors, and the shapes
# that matter. The last ones are neighbours that share names with a family and are none of it.
TABLE = """
Flux.1 = flux1
    + @flux
    - img_in txt_in {time_in,vector_in,guidance_in}.{in_layer,out_layer} final_layer.{linear,adaLN_modulation.1}
Flux.1 schnell, which has no guidance = flux1
    + @flux
    - img_in txt_in {time_in,vector_in}.in_layer
Flux.1, diffusers = flux1
    + @joint @modulation @single single_transformer_blocks.0.norm.linear
    - @time_text time_text_embed.guidance_embedder.linear_1 context_embedder x_embedder norm_out.linear proj_out
Flux.2 = flux2
    + double_blocks.{0,7}.{img_attn,txt_attn}.{qkv,proj} double_blocks.{0,7}.{img_mlp,txt_mlp}.{0,2}
    + single_blocks.{0,47}.{linear1,linear2}
    - img_in txt_in {time_in,guidance_in}.{in_layer,out_layer} final_layer.{linear,adaLN_modulation.1}
    - {double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}.lin
Flux.2, diffusers = flux2
    + transformer_blocks.0.attn.{to_q,add_q_proj,to_out.0,to_add_out}
    + transformer_blocks.0.{ff,ff_context}.{linear_in,linear_out}
    + single_transformer_blocks.0.attn.{to_qkv_mlp_proj,to_out}
    - time_guidance_embed.{timestep_embedder,guidance_embedder}.linear_1 x_embedder context_embedder
    - norm_out.linear proj_out
    - {double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}.linear
Chroma = chroma
    + double_blocks.0.{img_attn,txt_attn}.{qkv,proj} double_blocks.0.{img_mlp,txt_mlp}.{0,2}
    + single_blocks.0.{linear1,linear2}
    - img_in txt_in final_layer.linear
    - distilled_guidance_layer.{in_proj,out_proj,layers.0.in_layer,layers.4.out_layer}
Chroma Radiance = chroma
    + double_blocks.0.{img_attn,txt_attn}.{qkv,proj} single_blocks.0.{linear1,linear2}
    - txt_in distilled_guidance_layer.{in_proj,layers.0.in_layer} nerf_image_embedder.embedder.0
    - nerf_blocks.3.param_generator nerf_final_layer.linear
    . img_in_patch.weight nerf_final_layer_conv.conv.weight
Chroma, diffusers = chroma
    + @joint @single
    - distilled_guidance_layer.{in_proj,layers.0.linear_1,out_proj} context_embedder x_embedder proj_out
SD 3.5 = sd3
    + joint_blocks.0.{context_block,x_block}.{attn.qkv,attn.proj,mlp.fc1,mlp.fc2,adaLN_modulation.1}
    + joint_blocks.0.x_block.attn2.qkv joint_blocks.37.context_block.attn.qkv
    - {t_embedder,y_embedder}.mlp.{0,2} context_embedder final_layer.{linear,adaLN_modulation.1}
    . x_embedder.proj.weight pos_embed
SD 3.5, diffusers = sd3
    + @joint @modulation transformer_blocks.0.attn2.{to_q,to_out.0}
    - @time_text context_embedder norm_out.linear proj_out
    . pos_embed.proj.weight
Qwen-Image = qwen-image
    + transformer_blocks.{0,59}.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}
    + transformer_blocks.{0,59}.{img_mlp,txt_mlp}.{net.0.proj,net.2} transformer_blocks.{0,59}.txt_mod.1
    + transformer_blocks.{1,10,59}.img_mod.1
    - transformer_blocks.0.img_mod.1 img_in txt_in time_text_embed.timestep_embedder.linear_1 norm_out.linear
    - proj_out
    . txt_norm.weight
Wan = wan
    + blocks.{0,39}.{self_attn,cross_attn}.{q,k,v,o} blocks.0.cross_attn.{k_img,v_img} blocks.{0,39}.ffn.{0,2}
    - text_embedding.{0,2} time_embedding.{0,2} time_projection.1 img_emb.proj.{1,3} head.head
    . patch_embedding.weight head.modulation blocks.0.modulation
Wan VACE = wan
    + blocks.0.{self_attn,cross_attn}.q blocks.0.ffn.0 vace_blocks.0.{self_attn.q,before_proj,after_proj,ffn.0}
    - text_embedding.0 time_projection.1 head.head
Wan Animate 2, diffusers = wan
    + blocks.0.{self_attn,cross_attn}.to_q blocks.0.ffn.0
    - text_embedding.0 time_projection.1 head.head
Wan, diffusers = wan
    + blocks.0.{attn1,attn2}.{to_q,to_k,to_v,to_out.0} blocks.0.attn2.{add_k_proj,add_v_proj}
    + blocks.0.ffn.{net.0.proj,net.2}
    - condition_embedder.{time_embedder.linear_1,time_proj,text_embedder.linear_2,image_embedder.ff.net.0.proj}
    - proj_out
HunyuanVideo = hunyuan-video
    + @flux
    - @hunyuan_ends
    . img_in.proj.weight txt_in.individual_token_refiner.blocks.0.norm1.weight
HunyuanVideo as its authors name it = hunyuan-video
    + double_blocks.0.{img_mod.linear,img_attn_qkv,img_attn_proj,img_mlp.fc1,img_mlp.fc2}
    + single_blocks.0.modulation.linear
    - @hunyuan_ends
HunyuanVideo 1.5 = hunyuan-video
    + double_blocks.0.{img_mod.lin,img_attn.qkv,txt_attn.proj,img_mlp.0}
    - time_in.in_layer txt_in.individual_token_refiner.blocks.0.mlp.0 byt5_in.{fc1,fc3} vision_in.proj.{1,3}
    - final_layer.linear
HunyuanVideo, diffusers = hunyuan-video
    + @joint @modulation @single
    - @time_text context_embedder.{time_text_embed.text_embedder.linear_1,proj_in} norm_out.linear proj_out
    - context_embedder.token_refiner.refiner_blocks.0.{attn.to_q,ff.net.2,norm_out.linear}
    . x_embedder.proj.weight
Z-Image = z-image
    + @dit
    - @ends_of_dit noise_refiner.0.attention.qkv noise_refiner.0.adaLN_modulation.0 layers.0.adaLN_modulation.0
    - siglip_embedder.1
    . cap_pad_token x_pad_token layers.0.feed_forward.w1.weight
Z-Image, diffusers = z-image
    + layers.0.attention.{to_q,to_k,to_v,to_out.0} layers.0.feed_forward.{w1,w2,w3}
    - {noise_refiner,context_refiner}.0.attention.to_q layers.0.adaLN_modulation.0 t_embedder.mlp.0
    - cap_embedder.1 all_x_embedder.2-1 all_final_layer.2-1.{linear,adaLN_modulation.1}
Lumina 2 = lumina2
    + @dit
    - @ends_of_dit noise_refiner.0.attention.qkv noise_refiner.0.adaLN_modulation.1 layers.0.adaLN_modulation.1
    . layers.0.feed_forward.w1.weight
Lumina 2, diffusers = lumina2
    + layers.0.attn.{to_q,to_k,to_v,to_out.0} layers.0.feed_forward.{linear_1,linear_2,linear_3}
    - {noise_refiner,context_refiner}.0.{attn.to_q,feed_forward.linear_1} layers.0.norm1.linear x_embedder
    - time_caption_embed.{timestep_embedder.linear_1,caption_embedder.1} norm_out.{linear_1,linear_2}
LTX-Video = ltx
    + transformer_blocks.{2,10,45}.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}
    + transformer_blocks.{2,10,45}.ff.{net.0.proj,net.2}
    - transformer_blocks.{0,1,46,47}.{attn1,attn2}.{to_q,to_k,to_v,to_out.0} patchify_proj
    - caption_projection.{linear_1,linear_2} proj_out adaln_single.{emb.timestep_embedder.linear_1,linear}
LTX-2 = ltx
    + transformer_blocks.20.{attn1,audio_attn1,audio_to_video_attn,video_to_audio_attn}.{to_q,to_out.0}
    - transformer_blocks.{0,1}.{attn1,audio_attn1}.to_q transformer_blocks.20.attn1.to_gate_logits proj_out
    - audio_proj_out {patchify_proj,audio_patchify_proj}
    - {adaln_single,audio_adaln_single,av_ca_a2v_gate_adaln_single}.linear
    - {audio_embeddings_connector,video_embeddings_connector}.transformer_1d_blocks.0.attn1.to_q
    - audio_caption_projection.linear_1
LTX-Video, diffusers = ltx
    + transformer_blocks.10.{attn1,attn2}.to_q transformer_blocks.10.ff.{net.0.proj,net.2}
    - transformer_blocks.0.{attn1.to_q,attn2.to_q,ff.net.2} proj_in proj_out caption_projection.linear_1
    - time_embed.{emb.timestep_embedder.linear_1,linear}
SDXL = sdxl
    + {input_blocks.4.1,middle_block.1,output_blocks.5.1}.@sdxl
    - time_embed.{0,2} label_emb.0.{0,2} {input_blocks.4.1,middle_block.1,output_blocks.5.1}.{proj_in,proj_out}
    - {input_blocks.4.0,middle_block.0,middle_block.2,output_blocks.0.0}.emb_layers.1
    . input_blocks.0.0.weight out.2.weight
    input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight 640 2048
SDXL, diffusers = sdxl
    + {down_blocks.1.attentions.0,mid_block.attentions.0,up_blocks.0.attentions.2}.@sdxl
    - {time_embedding,add_embedding}.{linear_1,linear_2}
    - {down_blocks.1,mid_block,up_blocks.0}.attentions.0.{proj_in,proj_out}
    - {down_blocks.0,mid_block,up_blocks.0}.resnets.0.time_emb_proj
    . conv_in.weight conv_out.weight
    down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight 640 2048
SD 1.5 = unet
    + input_blocks.1.1.@sdxl
    - time_embed.{0,2}
    . input_blocks.0.0.weight output_blocks.0.0.in_layers.2.weight
    input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight 320 768
Stable Video Diffusion, diffusers = unet
    + {down_blocks.0,up_blocks.0}.attentions.0.temporal_transformer_blocks.0.attn1.to_q
    - {time_embedding,add_embedding}.linear_1 down_blocks.0.attentions.0.time_pos_embed.linear_1
    - down_blocks.0.resnets.0.spatial_res_block.time_emb_proj
    . conv_in.weight
    down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight 320 1024
SD 1.5, diffusers = unet
    + down_blocks.0.attentions.0.@sdxl
    - time_embedding.{linear_1,linear_2} {down_blocks.0,mid_block,up_blocks.0}.resnets.0.time_emb_proj
    . conv_in.weight conv_out.weight
    down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight 320 768
Stable Video Diffusion = unet
    + input_blocks.1.1.@sdxl
    - time_embed.{0,2} label_emb.0.{0,2}
    . input_blocks.0.0.weight output_blocks.0.0.in_layers.2.weight
    input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight 320 1024
PixArt = pixart
    + blocks.0.{attn.qkv,cross_attn.kv_linear,mlp.fc1}
    - t_block.1 x_embedder.proj y_embedder.y_proj.fc1 t_embedder.mlp.0 final_layer.linear
PixArt without cross-attention = pixart
    + blocks.0.{attn.qkv,mlp.fc1}
    - t_block.1 t_embedder.mlp.0 final_layer.linear
PixArt, diffusers = pixart
    + transformer_blocks.0.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}
    - adaln_single.{emb.timestep_embedder.linear_1,linear} proj_out caption_projection.linear_1
    . pos_embed.proj.weight
AuraFlow = auraflow
    + double_layers.0.{attn.w1q,attn.w2q,mlpX.c_fc1} single_layers.0.attn.w1q
    - init_x_linear cond_seq_linear t_embedder.mlp.0 modF.1 final_linear
AuraFlow, diffusers = auraflow
    + joint_transformer_blocks.0.attn.{to_q,add_q_proj} single_transformer_blocks.0.attn.to_q
    - pos_embed.proj context_embedder time_step_proj.linear_1 norm_out.linear proj_out
    . register_tokens
Mochi = mochi
    + blocks.0.{attn.qkv_x,attn.qkv_y,mlp_x.w1}
    - t5_y_embedder.to_kv t5_yproj t_embedder.mlp.0 final_layer.{mod,linear}
Mochi, diffusers = mochi
    + transformer_blocks.0.attn1.{to_q,add_q_proj}
    - time_embed.{caption_proj,pooler.to_q,timestep_embedder.linear_1} proj_out
    . pos_frequencies
Sana = sana
    + blocks.0.{attn.qkv,cross_attn.kv_linear}
    - t_block.1 y_embedder.y_proj.fc1 t_embedder.mlp.0 final_layer.linear
    . blocks.0.mlp.inverted_conv.conv.weight attention_y_norm.weight
Sana, diffusers = sana
    + transformer_blocks.0.{attn1,attn2}.to_q
    - time_embed.linear caption_projection.linear_1 proj_out
    . patch_embed.proj.weight caption_norm.weight transformer_blocks.0.ff.conv_inverted.weight
HiDream = hidream
    + {double_stream_blocks,single_stream_blocks}.0.block.{attn1.to_q,ff_i.experts.3.w1,ff_i.shared_experts.w2}
    - caption_projection.0.linear double_stream_blocks.0.block.{ff_i.gate,adaLN_modulation.1} x_embedder.proj
Cosmos-Predict2 = cosmos-predict2
    + blocks.0.{self_attn,cross_attn}.q_proj blocks.0.mlp.layer1
    - blocks.0.{adaln_modulation_self_attn,adaln_modulation_mlp}.1 x_embedder.proj.1 final_layer.linear
    . t_embedding_norm.weight
Anima = cosmos-predict2
    + blocks.0.{self_attn,cross_attn}.q_proj blocks.0.mlp.layer1
    - blocks.0.adaln_modulation_mlp.1 x_embedder.proj.1 llm_adapter.blocks.0.self_attn.q_proj final_layer.linear
Cosmos-Predict2, diffusers = cosmos-predict2
    + transformer_blocks.0.{attn1,attn2}.to_q
    - transformer_blocks.0.norm1.linear_2 patch_embed.proj time_embed.t_embedder.linear_1
    . time_embed.norm.weight
Krea 2 = krea2
    + blocks.0.{attn.wq,mlp.up}
    - first txtfusion.projector txtmlp.1 tproj.1 last.linear
Krea 2, diffusers = krea2
    + transformer_blocks.0.{attn.to_gate,ff.up}
    - img_in text_fusion.projector time_mod_proj txt_in.linear_1 final_layer.linear
Kandinsky 5 = kandinsky5
    + visual_transformer_blocks.0.{self_attention,cross_attention}.to_query
    - text_transformer_blocks.0.self_attention.to_query visual_transformer_blocks.0.visual_modulation.out_layer
    - visual_embeddings.in_layer out_layer.out_layer
CogVideoX = cogvideox
    + blocks.0.{q,ff_proj}
    - blocks.0.norm1.linear patch_embed.{proj,text_proj} time_embedding_linear_1 norm_out.linear proj_out
CogVideoX, diffusers = cogvideox
    + transformer_blocks.0.{attn1.to_q,ff.net.2}
    - transformer_blocks.0.{norm1,norm2}.linear patch_embed.{proj,text_proj} time_embedding.linear_1 norm_out.linear
    - proj_out
Qwen-Image 2.1 = qwen-image-2.1
    + transformer_blocks.0.{attn.to_q,img_mlp.gate_up,img_mlp.out}
    - modulation.1 txt_in.in_layer img_in proj_out
LongCat = longcat
    + @flux
    - img_in txt_in time_in.in_layer final_layer.linear
Ovis = ovis
    + double_blocks.0.img_mlp.gate_proj
    - img_in txt_in time_in.in_layer
Ovis, diffusers = ovis
    + single_transformer_blocks.0.proj_mlp
    - timestep_embedder.linear_1 x_embedder context_embedder
    . context_embedder_norm.weight
Bria, diffusers: Flux.1 without pooled text = longcat
    + @joint @single
    - time_embed.timestep_embedder.linear_1 context_embedder x_embedder norm_out.linear proj_out
a text encoder alone = none
    + model.layers.0.self_attn.q_proj model.layers.0.mlp.down_proj
    - model.embed_tokens lm_head
"""


def read_models() -> dict[str, Model]:
    table = TABLE
    for part in SHARED.strip().replace("\n    ", " ").splitlines():
        name, layers = part.split(" ", 1)
        table = table.replace(name, layers)
    models: dict[str, Model] = {}
    for line in table.strip().splitlines():
        if not line.startswith(" "):
            title, name = line.split(" = ")
            model = models[title] = Model(None if name == "none" else name)
            continue
        sign, rest = line.split(maxsplit=1)
        if sign in "+-.":
            {"+": model.quantized, "-": model.kept, ".": model.other_tensors}[sign].extend(spread(rest))
        else:
            model.shapes[sign] = tuple(map(int, rest.split()))
    return models


MODELS = read_models()
FLUX1 = MODELS["Flux.1"]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model_is_recognized_as_its_family_and_no_other(model: Model) -> None:
    found = detect(model.names(), model.shapes)
    assert (found.name if found else None) == model.family
    modules = module_names(model.names())
    fitting = {entry.name for entry in FAMILIES.values() for s in entry.signatures if s.fits(modules, model.shapes)}
    assert fitting == ({model.family} if model.family else set())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_blocks_are_quantized_and_the_rest_is_kept_with_a_reason(model: Model) -> None:
    table = family(model.family or "generic")
    if not table.blocks:
        return  # the structure decides, see test_structure.py
    assert [layer for layer in model.quantized if table.kept_because(layer) is not None] == []
    assert [layer for layer in model.kept if not table.kept_because(layer)] == []


def test_every_family_is_covered_by_a_model_above() -> None:
    assert {model.family for model in MODELS.values()} - {None} >= {
        name for name, one in FAMILIES.items() if one.architecture
    }


def test_every_signature_is_needed_by_a_model_above() -> None:
    for entry in (entry for entry in FAMILIES.values() if entry.architecture):
        for signature in entry.signatures:
            others = [other for other in entry.signatures if other is not signature]
            for model in MODELS.values():
                modules = module_names(model.names())
                if signature.fits(modules, model.shapes) and not any(o.fits(modules, model.shapes) for o in others):
                    break
            else:
                pytest.fail(f"no model above is recognized by {signature} alone")


TABLES = [known for known in FAMILIES.values() if known.blocks]


@pytest.mark.parametrize("known", TABLES, ids=[known.name for known in TABLES])
def test_a_layer_outside_the_blocks_that_no_table_knows_is_kept(known: Family) -> None:
    assert known.kept_because("brand_new_adapter.3.linear") == "outside the repeated blocks"


def test_the_order_of_names_does_not_matter() -> None:
    names = FLUX1.names()
    first, second = detect(names, {}), detect(names[::-1], {})
    assert first is second is FAMILIES["flux1"]


def test_sdxl_needs_shapes_because_its_names_are_those_of_older_models() -> None:
    assert detect(MODELS["SDXL"].names(), {}) is None
    (key,) = MODELS["SDXL"].shapes
    assert detect(MODELS["SDXL"].names(), {key: (640,)}) is None


def test_an_empty_checkpoint_is_of_no_family() -> None:
    assert detect([], {}) is None


def test_a_name_is_matched_in_whole_parts() -> None:
    flux = family("flux1")
    assert flux.kept_because("img_in") == "image embedder: feeds every block"
    assert flux.kept_because("img_in_patch") == "outside the repeated blocks"
    assert flux.kept_because("single_transformer_blocks.0.proj_out") is None
    assert family("ltx").kept_because("transformer_blocks.10.attn1.to_q") is None


@pytest.mark.parametrize("spelling", ["qwen-image", "qwen_image", "Qwen-Image", "QwenImage", "qwen image"])
def test_presets_may_be_spelled_freely(spelling: str) -> None:
    assert family(spelling) is FAMILIES["qwen-image"]


def test_generic_is_a_preset_but_never_detected() -> None:
    assert family("generic") is GENERIC
    assert "generic" not in FAMILIES


def test_an_unknown_preset_names_the_nearest_and_all() -> None:
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
    ],
)
def test_text_encoders_and_vaes_in_a_full_checkpoint_are_told_apart(name: str, title: str) -> None:
    assert other_part(name) == title


def test_a_part_is_known_by_the_beginning_of_a_name_only() -> None:
    assert other_part("blocks.0.vae.proj") is None
    assert other_part("net.text_encoder.0") is None


def test_no_layer_of_a_diffusion_model_counts_as_another_part() -> None:
    for prefix, model in product(
        ["", "model.diffusion_model.", "diffusion_model.", "net.", "transformer."], MODELS.values()
    ):
        assert [name for name in model.names() if other_part(prefix + name)] == []


NOVA = """\"\"\"A family that was made up, in one file.\"\"\"

from . import comfyui
from .base import VECTOR, Family, signature
from .rules import under
from .running import Architecture, blocks, image, text


def _config(shapes):
    hidden = shapes["context_embedder.weight"][0]
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": blocks(shapes, "joint_transformer_blocks."),
        "num_single_dit_layers": blocks(shapes, "single_transformer_blocks."),
        "num_attention_heads": 2,
        "attention_head_dim": hidden // 2,
        "caption_projection_dim": hidden,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pos_embed_max_size": shapes["pos_embed.pos_embed"][1],
    }


FAMILY = Family(
    name="nova-1",
    title="Nova (made up)",
    signatures=(signature("register_tokens joint_transformer_blocks.0.attn.add_q_proj"),),
    blocks=r"(?:joint|single)_transformer_blocks\\.\\d+",
    keep={r"time_step_proj": VECTOR},
    names=under("joint_transformer_blocks.*.", "nova.*.")(("attn.to_{q,k,v}", "{query,key,value}")),
    architecture=Architecture(
        transformer="AuraFlowTransformer2DModel",
        native="register_tokens",
        config=_config,
        latents=image,
        wants={"encoder_hidden_states": text("joint_attention_dim")},
        arguments=lambda inputs: inputs.usual(),
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
    assert chosen["context_embedder"] == "outside the repeated blocks"
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


def test_a_new_family_is_one_new_file(tmp_path: Path) -> None:
    """Everything that is done with a family is done with one that this package has never heard of."""
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
