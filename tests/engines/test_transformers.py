"""Every class of diffusers that a family runs in, tiny and as diffusers saves it, from its tensors alone."""

import diffusers
import numpy as np
import pytest
import torch

from convert_to_quant import families
from convert_to_quant.best import plan_best
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.families.running import Geometry
from convert_to_quant.fidelity import noise_scenes, scenes_fidelity
from convert_to_quant.layers import find_layers
from convert_to_quant.options import BestOptions, ConvertOptions, RunOptions

pytestmark = pytest.mark.filterwarnings(  # diffusers about itself
    "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)

SIZE = Geometry(height=4, width=4, frames=2, text_tokens=5)

FLUX = {"in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 24, "axes_dims_rope": (4, 14, 14)}  # fmt: skip
WAN = {"num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4, "text_dim": 24,
       "freq_dim": 32, "ffn_dim": 96, "num_layers": 2}  # fmt: skip
HUNYUAN = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "num_refiner_layers": 1,
           "text_embed_dim": 24, "text_embed_2_dim": 20}  # fmt: skip
LTX_2 = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 32, "attention_head_dim": 4,
         "cross_attention_dim": 128, "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 32,
         "audio_attention_head_dim": 2, "audio_cross_attention_dim": 64, "num_layers": 3,
         "rope_type": "split"}  # fmt: skip
SANA = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 1,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 64, "cross_attention_dim": 128,
        "caption_channels": 24}  # fmt: skip
SD_3 = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 24,
        "caption_projection_dim": 128, "pooled_projection_dim": 20, "pos_embed_max_size": 12}  # fmt: skip
UNET = {"in_channels": 4, "out_channels": 4, "block_out_channels": (64, 64), "cross_attention_dim": 768,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8}  # fmt: skip
SDXL = UNET | {"block_out_channels": (64, 128), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
               "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (1, 2),
               "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
               "addition_embed_type": "text_time", "addition_time_embed_dim": 256}  # fmt: skip
Z_IMAGE = {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "n_layers": 2, "n_refiner_layers": 1,
           "cap_feat_dim": 24, "axes_lens": [64, 64, 64]}  # fmt: skip

CASES = {
    "flux.1": ("flux1", "FluxTransformer2DModel",
               FLUX | {"out_channels": 8, "guidance_embeds": True, "pooled_projection_dim": 20}),
    "longcat": ("longcat", "LongCatImageTransformer2DModel", FLUX),
    "ovis": ("ovis", "OvisImageTransformer2DModel", FLUX | {"out_channels": 8}),
    "sd 3, heads of 64": ("sd3", "SD3Transformer2DModel", SD_3 | {"attention_head_dim": 64, "num_attention_heads": 2}),
    "sd 3.5, heads of 32": ("sd3", "SD3Transformer2DModel", SD_3 | {
        "attention_head_dim": 32, "num_attention_heads": 4, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
    "z-image, heads of 128": ("z-image", "ZImageTransformer2DModel", Z_IMAGE | {
        "dim": 256, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48]}),
    "z-image, heads of 64": ("z-image", "ZImageTransformer2DModel", Z_IMAGE | {
        "dim": 192, "n_heads": 3, "n_kv_heads": 3, "axes_dims": [16, 24, 24]}),
    "wan, heads of 128": ("wan", "WanTransformer3DModel", WAN | {"attention_head_dim": 128}),
    "wan, three heads of 64": ("wan", "WanTransformer3DModel", WAN | {"num_attention_heads": 3}),
    "wan flf2v": ("wan", "WanTransformer3DModel", WAN | {
        "attention_head_dim": 128, "in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 256,
        "pos_embed_seq_len": 514}),
    "wan vace": ("wan", "WanVACETransformer3DModel", WAN | {
        "attention_head_dim": 128, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 12}),
    "hunyuan image 2.1": ("hunyuan-video", "HunyuanImageTransformer2DModel", HUNYUAN | {
        "in_channels": 8, "out_channels": 8, "num_single_layers": 1, "rope_axes_dim": (16, 16)}),
    "hunyuan video 1.5": ("hunyuan-video", "HunyuanVideo15Transformer3DModel", HUNYUAN | {
        "in_channels": 9, "out_channels": 4, "image_embed_dim": 24, "rope_axes_dim": (4, 14, 14)}),
    "ltx 2": ("ltx", "LTX2VideoTransformer3DModel", LTX_2 | {"caption_channels": 24}),
    "ltx 2.3": ("ltx", "LTX2VideoTransformer3DModel", LTX_2 | {
        "use_prompt_embeddings": False, "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True,
        "audio_cross_attn_mod": True}),
    "auraflow": ("auraflow", "AuraFlowTransformer2DModel", {
        "sample_size": 16, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
        "attention_head_dim": 64, "num_attention_heads": 1, "joint_attention_dim": 24, "caption_projection_dim": 64,
        "out_channels": 4, "pos_embed_max_size": 64}),
    "mochi": ("mochi", "MochiTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "pooled_projection_dim": 32,
        "in_channels": 4, "text_embed_dim": 24, "time_embed_dim": 256}),
    "sana": ("sana", "SanaTransformer2DModel", SANA),
    "sana sprint": ("sana", "SanaTransformer2DModel", SANA | {
        "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}),
    "sana video": ("sana", "SanaVideoTransformer3DModel", SANA | {"num_attention_heads": 2, "attention_head_dim": 64}),
    "hidream": ("hidream", "HiDreamImageTransformer2DModel", {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 128, "num_attention_heads": 1, "caption_channels": [20, 24], "text_emb_dim": 16,
        "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32), "llama_layers": [0, 1]}),
    "cosmos-predict2": ("cosmos-predict2", "CosmosTransformer3DModel", {
        "in_channels": 5, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2,
        "text_embed_dim": 24, "adaln_lora_dim": 16, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None,
        "concat_padding_mask": False}),
    "krea 2": ("krea2", "Krea2Transformer2DModel", {
        "in_channels": 8, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 160, "text_hidden_dim": 32, "num_text_layers": 3,
        "text_num_attention_heads": 1, "text_num_key_value_heads": 1, "text_intermediate_size": 48,
        "axes_dims_rope": (8, 12, 12)}),
    "kandinsky 5": ("kandinsky5", "Kandinsky5Transformer3DModel", {
        "in_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 20, "time_dim": 32, "out_visual_dim": 4,
        "model_dim": 64, "ff_dim": 96, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12),
        "visual_cond": True}),
    "pixart": ("pixart", "PixArtTransformer2DModel", {
        "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "cross_attention_dim": 128, "caption_channels": 24, "use_additional_conditions": False}),
    "sd 1.5": ("unet", "UNet2DConditionModel", UNET),
    "sd 2 unclip": ("unet", "UNet2DConditionModel", UNET | {
        "cross_attention_dim": 1024, "attention_head_dim": 1, "use_linear_projection": True,
        "class_embed_type": "projection", "projection_class_embeddings_input_dim": 24}),
    "sdxl inpainting": ("sdxl", "UNet2DConditionModel", SDXL | {
        "in_channels": 9, "cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 6 * 256 + 20}),
    "sdxl refiner": ("sdxl", "UNet2DConditionModel", SDXL | {
        "cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 5 * 256 + 20}),
    "ssd-1b": ("sdxl", "UNet2DConditionModel", SDXL | {
        "cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 6 * 256 + 20,
        "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": ((1, 1), (2, 2)),
        "reverse_transformer_layers_per_block": ((2, 1, 1), 1)}),
    "cogvideox": ("cogvideox", "CogVideoXTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "time_embed_dim": 32,
        "text_embed_dim": 24, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5}),
    "qwen-image 2.1": ("qwen-image-2.1", "QwenImage21Transformer2DModel", {
        "in_channels": 8, "out_channels": 8, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 1,
        "context_in_dim": 24, "axes_dims_rope": (8, 28, 28)}),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=[name.replace(" ", "-") for name in CASES])
def case(request):
    """Family, and a tiny model of one of its classes."""
    family, transformer, config = request.param
    torch.manual_seed(5)
    model = getattr(diffusers, transformer)(**config).eval()
    for name, values in model.named_parameters():
        with torch.no_grad():
            drawn = torch.randn_like(values)
            if values.ndim > 1:
                values.copy_(drawn / values[0].numel() ** 0.5)
            else:
                values.copy_(("norm" in name and name.endswith("weight")) + 0.2 * drawn)
    return family, model


def test_it_is_recorded_converted_checked_and_mixed(case, save_model, compared, tmp_path):
    family, model = case
    path = save_model(model.state_dict())
    with open_checkpoint(path) as checkpoint:
        table = find_layers(checkpoint)
        denoiser = engine.load(checkpoint, table)
        assert denoiser.plan.family == family
        compared(checkpoint, table, model, SIZE)

        shown = RunOptions(samples=3, steps=1, height=64, width=64, text_tokens=4)
        best = plan_best(checkpoint, ConvertOptions(), BestOptions(), shown)
        assert np.isfinite(best.expected_db)
        for plan in (plan_conversion(checkpoint, ConvertOptions()), best.plan):
            output = tmp_path / "quantized.safetensors"
            convert(checkpoint, plan, output)
            with open_checkpoint(output) as converted:
                assert len(find_layers(converted).quantized) == len(plan.quantized) > 0
                quantized = engine.load(converted, arithmetic="comfyui")
                fidelity = scenes_fidelity(denoiser, quantized, noise_scenes(denoiser, SIZE, 3), steps=1)
                assert 10 < fidelity.sqnr_db < 100


def test_every_class_that_is_run_is_here():
    """All others are in `test_architectures`, under their authors' names."""
    known = {name for record in families.RECORDS for name in record.transformers}
    assert known - {transformer for _, transformer, _ in CASES.values()} == {
        "ChromaTransformer2DModel",
        "Flux2Transformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "Lumina2Transformer2DModel",
        "QwenImageTransformer2DModel",
    }
