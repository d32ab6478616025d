"""What files are, from names and shapes; released layouts are in test_layouts.py."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import plan_conversion
from convert_to_quant.errors import CheckpointError
from convert_to_quant.identity import of_shapes
from convert_to_quant.names import STATISTICS_KEY
from convert_to_quant.options import ConvertOptions

LLAMA = "model.embed_tokens.weight model.layers.0.self_attn.q_proj.weight model.layers.0.mlp.down_proj.weight"
FLUX = {
    "img_in.weight": (64, 64),
    "txt_in.weight": (64, 64),
    "time_in.in_layer.weight": (64, 64),
    "vector_in.in_layer.weight": (64, 64),
    "double_blocks.0.img_attn.qkv.weight": (192, 64),
    "double_blocks.0.img_attn.norm.query_norm.scale": (32,),
    "single_blocks.0.linear1.weight": (448, 64),
}


@pytest.mark.parametrize(
    ("tensors", "kind", "title"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight shared.weight", "text-encoder", "text encoder (T5)"),
        ("blocks.0.attn.q.weight token_embedding.weight blocks.1.pos_embedding.embedding.weight", "text-encoder",
         "text encoder (UMT5)"),
        ("transformer.resblocks.0.attn.in_proj_weight token_embedding.weight", "text-encoder", "text encoder (CLIP)"),
        (LLAMA, "text-encoder", "text encoder (language model)"),
        (LLAMA + " model.layers.0.self_attn.q_norm.weight", "text-encoder", "text encoder (Qwen 3)"),
        (LLAMA + " model.layers.0.self_attn.q_norm.weight model.layers.0.pre_feedforward_layernorm.weight",
         "text-encoder", "text encoder (Gemma 3)"),
        (LLAMA + " vision_tower.patch_conv.weight", "text-encoder", "text encoder (Mistral 3 or Pixtral)"),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "image-encoder",
         "image encoder (CLIP vision or SigLIP)"),
        ("a.lora_A.weight a.lora_B.weight", "adapter", "adapter (LoRA), not a model"),
        ("lora_unet_x.hada_w1_a", "adapter", "adapter (LoRA), not a model"),
        ("blocks.0.a.qweight blocks.0.a.wscales", "packed", "model packed by Nunchaku (SVDQuant)"),
        ("blocks.0.attn.q.weight blocks.0.attn.o.weight", "diffusion", "unknown"),
        ("step", None, "unknown"),
    ],
)  # fmt: skip
def test_a_file_is_known_by_what_only_its_kind_has(tensors, kind, title):
    found = of_shapes(dict.fromkeys(tensors.split(), (64, 64)))
    assert (found.kind, found.title, found.family) == (kind, title, None)


def test_a_file_of_convolutions_under_an_encoder_and_a_decoder_is_a_vae():
    assert of_shapes(dict.fromkeys(("encoder.conv_in.weight", "decoder.mid.q.weight"), (8, 3, 3, 3))).kind == "vae"


def test_statistics_say_so_in_the_header():
    assert of_shapes(FLUX, {STATISTICS_KEY}).kind == "statistics"


def test_mistral_is_known_by_its_vocabulary():
    shapes = {**dict.fromkeys(LLAMA.split(), (64, 64)), "model.embed_tokens.weight": (131072, 64)}
    assert of_shapes(shapes).title == "text encoder (Mistral)"


def _in_blocks(word):
    return lambda name: re.sub(r"^(\w+_blocks\.\d+)\.", rf"\1.{word}", name)


WRAPPERS: dict[str, Callable[[str], str]] = {
    **{f"before all: {words}": (lambda name, words=words: words + name) for words in (
        "_orig_mod.", "module.", "module._orig_mod.", "model.", "model.diffusion_model._orig_mod.", "ema.", "net.",
        "model_ema.", "_fsdp_wrapped_module.", "_forward_module.model.diffusion_model.", "transformer.",
    )},
    **{f"in blocks: {word}": _in_blocks(word) for word in (
        "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module.",
    )},
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("beside", ["", "vae.decoder.conv_in.weight", "first_stage_model.conv.weight"])
def test_what_savers_put_into_names_changes_nothing(wrap, beside):
    shapes = {wrap(name): shape for name, shape in FLUX.items()} | ({beside: (4, 4)} if beside else {})
    found = of_shapes(shapes)
    assert (found.key, dict(found.shapes)) == ("flux1", FLUX)


@pytest.mark.parametrize("stray", ["step", "global_step", "model_sampling.sigmas", "logvar.0.freqs"])
def test_training_state_and_tables_beside_a_model_change_nothing(stray):
    assert of_shapes({**{"net." + name: shape for name, shape in FLUX.items()}, stray: (4,)}).key == "flux1"


def test_a_moving_average_beside_the_model_is_another_part():
    copies = {prefix + name: shape for name, shape in FLUX.items() for prefix in ("model.", "ema_model.")}
    assert dict(of_shapes(copies).shapes) == FLUX


def test_an_unknown_word_before_all_names_is_told():
    found = of_shapes({"first." + name: shape for name, shape in FLUX.items()})
    assert found.hint in found.notes
    title = "Flux.1 (dev, schnell, Kontext, Fill, Krea)"
    assert found.hint == f"without the prefix first. it would be {title}: remove the prefix from its tensor names"


def test_a_text_encoder_is_converted_without_input_scales_and_embeddings(save):
    layer = "encoder.block.0.layer.0.SelfAttention"
    tensors = {
        f"{layer}.{name}.weight": np.ones((64, 64), np.float16) for name in ("q", "o", "relative_attention_bias")
    }
    with open_checkpoint(save("t5.safetensors", {**tensors, "shared.weight": np.ones((64, 64), np.float16)})) as t5:
        plan = plan_conversion(t5, ConvertOptions())
    assert [one.name for one, _ in plan.quantized] == [f"{layer}.q", f"{layer}.o"]
    assert not plan.options.input_scale
    assert plan.no_input_scales == (
        "text encoder (T5), which ComfyUI runs in full precision, so no input scales are written"
    )


def test_what_is_no_model_is_not_converted(save):
    path = save("lora.safetensors", {f"a.lora_{half}.weight": np.ones((16, 16), np.float16) for half in "AB"})
    with open_checkpoint(path) as lora, pytest.raises(CheckpointError, match="nothing to convert: adapter"):
        plan_conversion(lora, ConvertOptions())
