"""Released models that are only recognized; their structure decides which layers are quantized.

Names are those by which ComfyUI 0.33 detects them (`comfy/model_detection.py`), and those of diffusers 0.42's classes.
A model of which more is known has a file of its own.
"""

from .base import Family, Signature, signature


def _row(name: str, title: str, *signatures: str | Signature) -> Family:
    return Family(name, title, tuple(signature(each) if isinstance(each, str) else each for each in signatures))


_IMAGES = (
    _row("bria-fibo", "Bria Fibo",
         "transformer_blocks.0.attn.add_q_proj time_embed.timestep_embedder caption_projection.0",
         "perceiver.latent_queries noise_refiner.0.attention.to_q t_embedder.mlp.0"),
    _row("hidream-o1", "HiDream-O1", "t_embedder1.mlp.0 x_embedder.proj1 language_model.layers.0"),
    _row("omnigen2", "OmniGen2",
         signature("ref_image_refiner.0.attn.to_q time_caption_embed layers.0.norm1", lacks="double_stream_layers")),
    _row("boogu", "Boogu-Image", "double_stream_layers.0.img_instruct_attn.processor.img_to_q ref_image_refiner"),
    _row("ernie-image", "Ernie-Image", "layers.0.mlp.linear_fc2 layers.0.self_attention.to_q x_embedder.proj"),
    _row("ideogram4", "Ideogram 4", "embed_image_indicator llm_cond_proj layers.0.adaln_modulation"),
    _row("joyimage", "JoyImage-Edit", "double_blocks.0.attn.img_attn_qkv condition_embedder.time_embedder"),
    _row("lens", "Lens", "transformer_blocks.0.img_mlp.w1 transformer_blocks.0.attn.img_qkv"),
    _row("hunyuan-dit", "Hunyuan-DiT", "mlp_t5.0 blocks.0.attn1.Wqkv"),
    _row("pixeldit", "PixelDiT", "pixel_blocks.0.compress_to_attn patch_blocks.0.attn.qkv_x",
         "core.pixel_embedder core.patch_blocks.0.attn"),
    _row("stable-cascade", "Stable Cascade", "clf.1 down_blocks.0.0 up_blocks.0.0"),
    _row("cogview4", "CogView 3 and 4", "patch_embed.text_proj time_condition_embed transformer_blocks.0.norm1.linear"),
    _row("glm-image", "GLM-Image", "glyph_projector prior_token_embedding time_condition_embed"),
    _row("prx", "PRX", "blocks.0.attention.img_qkv_proj blocks.0.attention.txt_kv_proj"),
    _row("nucleus", "Nucleus-Image", "transformer_blocks.0.encoder_proj transformer_blocks.0.img_mod.1 txt_norm"),
    _row("dit", "DiT", "transformer_blocks.0.norm1.emb.class_embedder proj_out_1"),
    _row("flux3", "Flux.3", "mode_blocks.image.0.attn.to_q early_stream_modulations single_transformer_blocks.0"),
)  # fmt: skip

_VIDEOS = (
    _row("cosmos", "Cosmos", "blocks.block0.blocks.0.block.attn.to_q.0"),
    _row("kandinsky6", "Kandinsky 6", "visual_transformer_blocks.0.video_dec_block video_text_transformer_blocks.0",
         signature("visual_transformer_blocks.0.self_attention.to_query pooled_bias", lacks="text_transformer_blocks")),
    _row("consisid", "ConsisID", "local_facial_extractor transformer_blocks.0.norm2.linear"),
    _row("motif-video", "Motif-Video", "context_embedder.linear_1 transformer_blocks.0.attn.add_q_proj x_embedder"),
    _row("minimax-h3", "MiniMax H3", "video_patch_proj audio_patch_proj blocks.0.adaln_proj",
         "audio_proj_in token_refiner.refiner_blocks.0 transformer_blocks.0.adaln_proj"),
    _row("seedvr2", "SeedVR2", "blocks.0.attn.proj_qkv vid_in txt_in", "blocks.0.mlp.all.proj_in",
         "blocks.35.mlp.all.proj_in_gate", "blocks.31.mlp.all.proj_in_gate"),
)  # fmt: skip

_SOUNDS_AND_SHAPES = (
    _row("stable-audio", "Stable Audio", "transformer.layers.0.self_attn.to_qkv to_timestep_embed",
         "preprocess_conv global_proj cross_attention_proj transformer_blocks.0.attn1.to_q",
         "to_timestep_embed to_cond_embed transformer_blocks.0.self_attn.to_qkv"),
    _row("ace-step", "ACE-Step", "genre_embedder lyric_encoder transformer_blocks.0.cross_attn.add_q_proj"),
    _row("ace-step-1.5", "ACE-Step 1.5", "encoder.lyric_encoder.layers.0 decoder.layers.0",
         "time_embed_r.time_proj layers.0.self_attn.to_q proj_in_conv"),
    _row("minimax-music", "MiniMax Music 3", "cond_layer_logits latent_conditioners.0 diffusion_transformer",
         "transformer_blocks.0.ff_in preprocess_conv time_embed.linear_1"),
    _row("hunyuan3d", "Hunyuan3D 2", "latent_in cond_in double_blocks.0.img_attn.qkv",
         "blocks.0.attn1.to_q blocks.0.attn1.k_norm t_embedder.mlp.2"),
    _row("triposplat", "TripoSplat", "cam_out_layer repo_layers.0.final_map"),
)  # fmt: skip

FAMILIES = (*_IMAGES, *_VIDEOS, *_SOUNDS_AND_SHAPES)
