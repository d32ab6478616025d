"""A tiny random model of every family that ComfyUI detects, in the layout that its detection expects of a real file.

Each row of `MODELS` has the sizes of ComfyUI's network that differ from its defaults and from those that its class
requires. Sizes that detection reads from the tensors are as in the file. Sizes that detection assumes ("a HiDream has
48 blocks") are in `assumed`, and are patched while the test runs.

Runs inside ComfyUI's process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch


@dataclass(frozen=True)
class Tiny:
    """How to make a tiny model.

    Attributes:
        config: of the network; sizes that its class requires override it.
        assumed: smaller values of what detection assumes.
        prefix: of the network's names in the file.
        renamed: prefix of a tensor's name in the network -> in the file.
        others: further tensors: name -> shape.
        marks: empty tensors that detection looks for.
        size: height, width, frames of a sample.
    """

    config: Mapping[str, Any]
    assumed: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    size: tuple[int, int, int] = (64, 64, 1)


WHOLE = "model.diffusion_model."

UNET = {
    "image_size": 32, "use_spatial_transformer": True, "in_channels": 4, "out_channels": 4, "num_res_blocks": [1, 1],
    "channel_mult": [1, 1], "transformer_depth": [1, 0], "transformer_depth_output": [1, 0, 0, 0],
    "transformer_depth_middle": 1,
}  # fmt: skip


def levels(count: int, blocks: int, **more: Any) -> dict[str, Any]:
    """A U-Net of `count` levels with numeric labels, without transformers in its middle and its up path."""
    return {
        **UNET, "num_classes": "sequential", "num_res_blocks": [blocks] * count, "channel_mult": [1] * count,
        "transformer_depth_output": [0] * count * (blocks + 1), "transformer_depth_middle": -1, **more,
    }  # fmt: skip


SVD = levels(4, 2, use_spatial_context=True, merge_strategy="learned_with_images", video_kernel_size=[3, 1, 1])

FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 40, "hidden_size": 128, "mlp_ratio": 4.0,
    "num_heads": 1, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "txt_ids_dims": [],
}  # fmt: skip
CHROMA = {**FLUX, "in_channels": 64, "out_channels": 64, "in_dim": 64, "vec_in_dim": None}
CHROMA_SIZES = {"hidden_dim": 64, "out_dim": 128, "n_layers": 2}
RADIANCE = {
    "nerf_hidden_size": 64, "nerf_mlp_ratio": 4, "nerf_max_freqs": 8, "nerf_tile_size": 512,
    "nerf_final_head_type": "conv", "nerf_embedder_dtype": None, "use_x0": False, "use_sequential_txt_ids": False,
}  # fmt: skip

HUNYUAN = {
    "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16, "vec_in_dim": 768, "axes_dim": [16, 56, 56],
    "meanflow": False, "context_in_dim": 48, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1,
    "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "byt5": False, "guidance_embed": True,
    "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
HUNYUAN_15 = {
    **HUNYUAN, "in_channels": 65, "vec_in_dim": None, "patch_size": [1, 1, 1], "out_channels": 32, "byt5": True,
    "guidance_embed": False, "use_cond_type_embedding": True, "meanflow_sum": True, "depth_single_blocks": 0,
}  # fmt: skip

WAN = {"dim": 128, "num_heads": 1, "ffn_dim": 64, "num_layers": 2}
SHORT_TEXT = {"text_dim": 48}

COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 128, "pos_emb_cls": "rope3d", "use_adaln_lora": True,
}  # fmt: skip
COSMOS_1 = {
    **COSMOS, "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
COSMOS_1_SIZES = {"num_blocks": 1, "num_heads": 1, "crossattn_emb_channels": 64}
COSMOS_2 = {**COSMOS, "num_blocks": 1}
COSMOS_2_SIZES = {"num_heads": 1, "crossattn_emb_channels": 64}

LUMINA = {
    "in_channels": 16, "dim": 2304, "cap_feat_dim": 40, "n_layers": 1, "qk_norm": True, "n_heads": 24, "n_kv_heads": 8,
    "axes_dims": [32, 32, 32],
}  # fmt: skip
Z_IMAGE = {
    "in_channels": 16, "dim": 3840, "cap_feat_dim": 40, "n_layers": 1, "qk_norm": True, "n_heads": 30,
    "z_image_modulation": True, "pad_tokens_multiple": 32,
}  # fmt: skip
LUMINA_SIZES = {"n_refiner_layers": 1, "ffn_dim_multiplier": 0.05, "multiple_of": 16}

LTX = {"num_layers": 1, "cross_attention_dim": 64}
LTX_SIZES = {"caption_channels": 40, "attention_head_dim": 64, "num_attention_heads": 1}

PIXART = {"depth": 1, "patch_size": 2, "in_channels": 4, "model_max_length": 300, "micro_condition": False}
PIXART_SIZES = {"hidden_size": 96, "num_heads": 2, "caption_channels": 40}

COG = {
    "num_attention_heads": 1, "time_embed_dim": 64, "num_layers": 1, "text_embed_dim": 40,
    "use_rotary_positional_embeddings": True,
}  # fmt: skip

DIT_AUDIO = {"project_cond_tokens": True, "embed_dim": 64, "num_heads": 1, "depth": 1}
NUMBERS = "conditioner.conditioners.seconds_"
NUMBER_TENSORS = {"embedder.embedding.0.weights": (128,), "embedder.embedding.1.weight": (768, 257),
                  "embedder.embedding.1.bias": (768,)}  # fmt: skip

VIDEO = (64, 64, 5)

MODELS: Mapping[str, Tiny] = {
    # U-Nets
    "LotusD": Tiny({**UNET, "context_dim": 1024}),
    "Stable_Zero123": Tiny(
        UNET, prefix=WHOLE, others={"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)}
    ),
    "SD15_instructpix2pix": Tiny(UNET),
    "SD15": Tiny(UNET, prefix=WHOLE),
    "SD20": Tiny(UNET),
    "SD21UnclipL": Tiny({**UNET, "num_classes": "sequential"}),
    "SD21UnclipH": Tiny({**UNET, "num_classes": "sequential"}),
    "SDXL_instructpix2pix": Tiny(levels(3, 2)),
    "SDXLRefiner": Tiny(levels(4, 2)),
    "SDXL": Tiny(levels(3, 2)),
    "SSD1B": Tiny(levels(3, 2)),
    "KOALA_700M": Tiny(levels(3, 1)),
    "KOALA_1B": Tiny(levels(3, 1)),
    "Segmind_Vega": Tiny(levels(3, 2)),
    "SD_X4Upscaler": Tiny(
        {**UNET, "num_res_blocks": [1, 1, 1, 1], "channel_mult": [1, 1, 1, 1], "transformer_depth": [0, 1, 1, 1],
         "transformer_depth_output": [0, 0, 1, 1, 1, 1, 1, 1]}
    ),
    "SVD_img2vid": Tiny(SVD, size=(64, 64, 2)),
    "SV3D_u": Tiny(SVD, size=(64, 64, 2)),
    "SV3D_p": Tiny(SVD, size=(64, 64, 2)),
    # Stable Cascade
    "Stable_Cascade_C": Tiny(
        {}, {"c_cond": 64, "c_hidden": [64, 64], "nhead": [1, 1], "blocks": [[1, 1], [1, 1]]}, size=(256, 256, 1)
    ),
    "Stable_Cascade_B": Tiny(
        {},
        {"c_hidden": [64, 64, 64, 64], "nhead": [-1, -1, 1, 1], "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
         "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]], "c_cond": 64}, size=(256, 256, 1),
    ),
    # images
    "SD3": Tiny(
        {"depth": 1, "adm_in_channels": 24, "num_patches": 36864, "qk_norm": "rms",
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 64}}},
    ),
    "AuraFlow": Tiny(
        {"max_seq": 64, "n_double_layers": 1, "n_layers": 2}, {"global_conddim": 64, "dim": 64, "n_heads": 1}
    ),
    "PixArtAlpha": Tiny({**PIXART, "micro_condition": True}, PIXART_SIZES),
    "PixArtSigma": Tiny(PIXART, PIXART_SIZES),
    "HunyuanDiT": Tiny({"depth": 4, "hidden_size": 64}, {"num_heads": 1}),
    "HunyuanDiT1": Tiny({"depth": 4, "hidden_size": 1408, "size_cond": True, "use_style_cond": True}),
    "FluxInpaint": Tiny(FLUX),
    "Flux": Tiny(FLUX),
    "LongCatImage": Tiny(FLUX),
    "FluxSchnell": Tiny(FLUX),
    "Flux2": Tiny(
        {**FLUX, "axes_dim": [32, 32, 32, 32], "mlp_ratio": 3.0, "in_channels": 128, "out_channels": 128,
         "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "txt_ids_dims": [3],
         "patch_size": 1, "vec_in_dim": None, "guidance_embed": False},
    ),
    "Lens": Tiny(
        {"num_layers": 1, "num_attention_heads": 1, "enc_hidden_dim": 40, "selected_layer_index": (0, 1)}
    ),
    "Chroma": Tiny(CHROMA, CHROMA_SIZES),
    "ChromaRadiance": Tiny(
        {**CHROMA, **RADIANCE, "in_channels": 3, "out_channels": 3, "patch_size": 16}, {**CHROMA_SIZES, "nerf_depth": 2}
    ),
    "Lumina2": Tiny(LUMINA, LUMINA_SIZES),
    "ZImage": Tiny(Z_IMAGE, LUMINA_SIZES),
    "ZImagePixelSpace": Tiny(
        {**Z_IMAGE, "patch_size": 4, "in_channels": 3, "decoder_hidden_size": 64, "decoder_num_res_blocks": 1,
         "decoder_max_freqs": 4}, LUMINA_SIZES,
    ),
    "PixelDiTT2I": Tiny(
        {},
        {"hidden_size": 64, "num_groups": 1, "pixel_attn_hidden_size": 64, "pixel_num_groups": 1, "patch_depth": 2,
         "pixel_depth": 1, "txt_embed_dim": 40}, renamed={"": "core."},
    ),
    "PiD": Tiny(
        {"lq_hidden_dim": 64},
        {"hidden_size": 64, "num_groups": 1, "pixel_attn_hidden_size": 64, "pixel_num_groups": 1, "patch_depth": 2,
         "pixel_depth": 1, "txt_embed_dim": 40, "lq_interval": 2, "lq_num_res_blocks": 1},
    ),
    "HiDream": Tiny(
        {"in_channels": 16, "patch_size": 2},
        {"num_attention_heads": 1, "num_layers": 1, "num_single_layers": 1, "caption_channels": [40, 48],
         "llama_layers": [0, 1], "text_emb_dim": 24},
    ),
    "HiDreamO1": Tiny(
        {},
        {"text_config_overrides": {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1,
                                   "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128},
         "vision_config_overrides": {"hidden_size": 64, "num_heads": 1, "intermediate_size": 64, "depth": 1,
                                     "num_position_embeddings": 16}},
    ),
    "Omnigen2": Tiny(
        {},
        {"axes_dim_rope": [8, 12, 12], "hidden_size": 64, "multiple_of": 16, "num_attention_heads": 2,
         "num_kv_heads": 1, "num_layers": 1, "num_refiner_layers": 1, "text_feat_dim": 40},
    ),
    "Boogu": Tiny(
        {"hidden_size": 64, "num_layers": 1, "num_double_stream_layers": 1, "num_refiner_layers": 1,
         "instruction_feat_dim": 40},
        {"axes_dim_rope": (8, 12, 12), "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16},
    ),
    "MageFlow": Tiny({"num_layers": 1}, {"num_attention_heads": 1}),
    "QwenImage": Tiny({"num_layers": 1}, {"num_attention_heads": 1, "joint_attention_dim": 40}),
    "JoyImage": Tiny({"hidden_size": 128, "num_layers": 1, "num_attention_heads": 1}, {"text_dim": 40}),
    "Ideogram4": Tiny(
        {"num_layers": 1},
        {"num_attention_heads": 1, "attention_head_dim": 128, "intermediate_size": 64, "adaln_dim": 32,
         "llm_features_dim": 40},
    ),
    "Krea2": Tiny(
        {"features": 128, "layers": 1, "heads": 1, "kvheads": 1, "txtlayers": 2, "txtdim": 128},
        {"txtheads": 1, "txtkvheads": 1},
    ),
    "Kandinsky5Image": Tiny(
        {"axes_dims": (32, 48, 48), "time_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1},
        {"in_text_dim": 40, "in_text_dim2": 24},
    ),
    "ErnieImage": Tiny(
        {}, {"hidden_size": 128, "num_attention_heads": 1, "num_layers": 1, "ffn_hidden_size": 64, "text_in_dim": 40}
    ),
    "HunyuanImage21": Tiny(
        {**HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [64, 64], "byt5": True,
         "meanflow": True}, size=(128, 128, 1),
    ),
    "HunyuanImage21Refiner": Tiny({**HUNYUAN, "in_channels": 128, "out_channels": 64, "meanflow": True}),
    # videos
    "GenmoMochi": Tiny(
        {"learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False, "use_t5": True},
        {"depth": 2, "num_heads": 1, "mlp_ratio_x": 96.0, "hidden_size_x": 128, "hidden_size_y": 64,
         "t5_feat_dim": 40}, size=(64, 64, 7),
    ),
    "LTXV": Tiny(LTX, LTX_SIZES, size=(64, 64, 9)),
    "LTXAV": Tiny(
        LTX,
        {**LTX_SIZES, "attention_head_dim": 128, "audio_attention_head_dim": 64, "audio_num_attention_heads": 1,
         "audio_cross_attention_dim": 64, "cross_attention_dim": 128, "connector_attention_head_dim": 40,
         "connector_num_attention_heads": 1, "connector_num_layers": 1}, size=(64, 64, 9),
    ),
    "MiniMaxH3": Tiny(
        {"num_layers": 1, "token_refiner_num_layers": 1, "hidden_size": 64, "num_attention_heads": 1,
         "ffn_hidden_size": 64, "text_dim": 40, "time_embed_hidden_size": 64, "time_embed_dim": 32}, size=VIDEO,
    ),
    "HunyuanVideo15_SR_Distilled": Tiny({**HUNYUAN_15, "meanflow": True}, size=VIDEO),
    "HunyuanVideo15": Tiny(HUNYUAN_15, size=VIDEO),
    "HunyuanVideoSkyreelsI2V": Tiny(HUNYUAN, size=VIDEO),
    "HunyuanVideoI2V": Tiny(HUNYUAN, size=VIDEO),
    "HunyuanVideo": Tiny(HUNYUAN, size=VIDEO),
    "CosmosT2V": Tiny(COSMOS_1, COSMOS_1_SIZES, size=(64, 64, 9)),
    "CosmosI2V": Tiny(COSMOS_1, COSMOS_1_SIZES, size=(64, 64, 9)),
    "CosmosT2IPredict2": Tiny(COSMOS_2, COSMOS_2_SIZES),
    "CosmosI2VPredict2": Tiny(
        COSMOS_2,
        {**COSMOS_2_SIZES, "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 3.0,
         "rope_w_extrapolation_ratio": 3.0}, size=VIDEO,
    ),
    "Anima": Tiny(COSMOS_2, {"num_heads": 1}),
    "WAN22_T2V": Tiny({**WAN, "in_dim": 48}, SHORT_TEXT, size=VIDEO),
    "WAN21_CausalAR_T2V": Tiny(WAN, {**SHORT_TEXT, "causal_ar": True}, size=VIDEO),
    "WAN21_T2V": Tiny(WAN, SHORT_TEXT, size=VIDEO),
    "WAN21_I2V": Tiny(WAN, SHORT_TEXT, size=VIDEO),
    "WAN21_FunControl2V": Tiny({**WAN, "in_dim_ref_conv": 16}, SHORT_TEXT, size=VIDEO),
    "WAN21_Vace": Tiny({**WAN, "vace_layers": 1, "vace_in_dim": 96}, SHORT_TEXT, size=VIDEO),
    "WAN21_Camera": Tiny(WAN, SHORT_TEXT, size=VIDEO),
    "WAN22_Camera": Tiny(WAN, SHORT_TEXT, size=VIDEO),
    "WAN22_S2V": Tiny(WAN, {**SHORT_TEXT, "audio_dim": 40, "audio_inject_layers": [0, 1]}, size=VIDEO),
    "WAN21_HuMo": Tiny(WAN, SHORT_TEXT, size=VIDEO),
    "WAN22_Animate": Tiny({**WAN, "in_dim": 36, "num_layers": 5}, SHORT_TEXT, size=VIDEO),
    "WAN_Animate2": Tiny(WAN, {**SHORT_TEXT, "model_type": "animate2"}, size=VIDEO),
    "WAN21_FlowRVS": Tiny(WAN, {**SHORT_TEXT, "model_type": "flow_rvs"}, size=VIDEO),
    "WAN21_SCAIL": Tiny(WAN, SHORT_TEXT, size=VIDEO),
    "WAN21_SCAIL2": Tiny(WAN, SHORT_TEXT, size=VIDEO),
    "WAN22_WanDancer": Tiny(WAN, {**SHORT_TEXT, "audio_inject_layers": [0, 1]}, size=VIDEO),
    "Kandinsky5": Tiny(
        {"time_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1},
        {"in_text_dim": 40, "in_text_dim2": 24}, size=VIDEO,
    ),
    "CogVideoX_Inpaint": Tiny(COG, size=VIDEO),
    "CogVideoX_I2V": Tiny(COG, size=VIDEO),
    "CogVideoX_T2V": Tiny(COG, size=VIDEO),
    "SeedVR2": Tiny(
        {"norm_eps": 1e-5, "mlp_type": "swiglu", "vid_out_norm": True},
        {"vid_dim": 128, "heads": 1, "num_layers": 2, "mm_layers": 1},
        marks=("blocks.31.mlp.all.proj_in_gate.weight",), size=VIDEO,
    ),
    # sounds
    "StableAudio3": Tiny(
        {**DIT_AUDIO, "global_cond_dim": 768, "timestep_features_type": "learned", "io_channels": 256,
         "global_cond_type": "adaLN", "local_add_cond_dim": 257,
         "attn_kwargs": {"qk_norm": "rms", "differential": False}},
        prefix="model.model.",
        others={f"{NUMBERS}total.{name}": shape for name, shape in NUMBER_TENSORS.items()},
    ),
    "StableAudio": Tiny(
        DIT_AUDIO, {"num_heads": 1}, prefix="model.model.",
        others={f"{NUMBERS}{what}.{name}": shape for what in ("start", "total")
                for name, shape in NUMBER_TENSORS.items()},
    ),
    "ACEStep": Tiny(
        {},
        {"attention_head_dim": 64, "inner_dim": 64, "mlp_ratio": 1.0, "num_attention_heads": 1, "num_layers": 1,
         "text_embedding_dim": 40, "ssl_encoder_depths": [1, 1], "ssl_latent_dims": [32, 32],
         "lyric_encoder_vocab_size": 32, "lyric_hidden_size": 1024},
    ),
    "MiniMaxMusic3": Tiny({}),
    "ACEStep15": Tiny(
        {"hidden_size": 128, "intermediate_size": 64, "num_heads": 1, "encoder_hidden_size": 128,
         "encoder_num_heads": 1, "encoder_intermediate_size": 64, "num_dit_layers": 2},
        {"num_kv_heads": 1, "num_lyric_layers": 1, "num_timbre_layers": 1, "num_tokenizer_layers": 1, "fsq_dim": 128,
         "text_hidden_dim": 40},
    ),
    # shapes
    "Hunyuan3Dv2mini": Tiny({"context_in_dim": 40, "hidden_size": 128, "depth_single_blocks": 1}, {"num_heads": 2}),
    "Hunyuan3Dv2": Tiny(
        {"context_in_dim": 40, "hidden_size": 128, "depth": 1, "depth_single_blocks": 1}, {"num_heads": 2}
    ),
    "Hunyuan3Dv2_1": Tiny(
        {"hidden_size": 64, "depth": 3, "guidance_cond_proj_dim": None},
        {"context_dim": 40, "num_heads": 1, "num_moe_layers": 1, "num_experts": 2},
    ),
    "TripoSplat": Tiny(
        {}, {"q_token_length": 64, "model_channels": 128, "cond_channels": 40, "num_blocks": 1, "num_refiner_blocks": 1,
             "cond2_channels": 24}
    ),
}  # fmt: skip
"""By class of `comfy.supported_models`."""

LEFT_OUT: Mapping[str, str] = {
    "RT_DETR_v4": "no diffusion model",
    "SAM3": "no diffusion model",
    "SAM31": "no diffusion model",
    "DepthAnything3": "no diffusion model",
    "Trellis2": "three models for voxels in one, newer than 0.33.0",
}
"""Families without a tiny model, and why."""


@contextmanager
def shrunk(name: str) -> Iterator[None]:
    """Patch the sizes that ComfyUI's code assumes of a family."""
    import comfy.ldm.minimax_music.dit
    import comfy.supported_models

    said = getattr(comfy.supported_models, name).unet_extra_config
    fewer = {key: value for key, value in MODELS[name].assumed.items() if key in said}
    with (
        patch.dict(said, fewer),
        patch.object(
            comfy.ldm.minimax_music.dit,
            "range",
            lambda *ends: range(1 if ends == (36,) else ends[0], *ends[1:]),
            create=True,
        ),
    ):
        yield


def network(name: str) -> Any:
    """The network of a tiny model, with random weights."""
    import comfy.supported_models
    import torch

    tiny = MODELS[name]
    random = torch.Generator().manual_seed(0)
    with shrunk(name):
        kind = getattr(comfy.supported_models, name)
        config = kind({**tiny.config, **kind.unet_config, **tiny.assumed})
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({key: torch.randn(shape, generator=random) for key, shape in tiny.others.items()})
    for key, values in model.diffusion_model.state_dict().items():
        if not values.is_floating_point():
            continue
        if values.ndim > 1:
            values.copy_(torch.randn(values.shape, generator=random) * values[0].numel() ** -0.5)
        elif key.endswith(("weight", "scale", "gamma")):  # of a norm
            values.fill_(1.0)
        else:
            values.copy_(torch.randn(values.shape, generator=random) * 0.1)
    return model.diffusion_model


def save(name: str, path: Path) -> None:
    """Write a tiny model as a file."""
    import torch
    from safetensors.torch import save_file

    tiny = MODELS[name]
    tensors = {}
    for key, values in network(name).state_dict().items():
        for start, other in tiny.renamed.items():
            if key.startswith(start):
                key = other + key.removeprefix(start)  # noqa: PLW2901
                break
        dtype = torch.bfloat16 if values.is_floating_point() else values.dtype
        tensors[tiny.prefix + key] = values.to(dtype).contiguous().clone()
    random = torch.Generator().manual_seed(1)
    tensors |= {key: torch.randn(shape, generator=random) for key, shape in tiny.others.items()}
    tensors |= {tiny.prefix + key: torch.zeros(1) for key in tiny.marks}
    save_file(tensors, path, {"made": json.dumps(name)})


@contextmanager
def assuming(name: str) -> Iterator[None]:
    """Patch the sizes that detection assumes."""
    from comfy import model_detection

    detect = model_detection.detect_unet_config

    def smaller(*args: Any, **kwargs: Any) -> Any:
        found = detect(*args, **kwargs)
        return None if found is None else {**found, **MODELS[name].assumed}

    with shrunk(name), patch.object(model_detection, "detect_unet_config", smaller):
        yield
