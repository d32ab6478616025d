import numpy as np
import pytest
import torch
from tiny_flux import TEXT, VECTOR, random_flux

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.engines.prompts import Prompts
from convert_to_quant.errors import CalibrationError
from convert_to_quant.families.running import Geometry, Signal
from convert_to_quant.options import RunOptions

SIZE = Geometry(height=2, width=2, frames=1, text_tokens=64)


@pytest.fixture
def flux(save_model):
    return save_model(random_flux(guidance=True))


def embeddings(count, tokens=7, prefix=""):
    rng = np.random.default_rng(count)
    return {
        prefix + "prompt_embeds": rng.standard_normal((count, tokens, TEXT)).astype(np.float32),
        prefix + "pooled_prompt_embeds": rng.standard_normal((count, VECTOR)).astype(np.float32),
    }


def fitted(flux, path):
    with open_checkpoint(flux) as checkpoint:
        return Prompts.load(path).fitted(engine.load(checkpoint), SIZE)


def test_pipelines_names_and_the_models_own_are_understood(flux, save):
    tensors = embeddings(3, tokens=9)
    prompts = fitted(flux, save("prompts.safetensors", tensors))
    assert set(prompts.tensors) == {"encoder_hidden_states", "pooled_projections", "guidance"}
    assert np.array_equal(prompts.tensors["encoder_hidden_states"], tensors["prompt_embeds"])
    assert (prompts.count, prompts.geometry.text_tokens) == (3, 9), "the text is as long as the prompts"
    own = {
        "encoder_hidden_states": tensors["prompt_embeds"],
        "pooled_projections": tensors["pooled_prompt_embeds"],
        "guidance": np.full(3, 2.0, np.float32),
    }
    assert fitted(flux, save("own.safetensors", own)).tensors["guidance"].tolist() == [2.0] * 3


class Takes:
    """Stands for a denoiser: takes an image, a text with its mask, a vector, and a guidance of 3.5."""

    def signals(self, geometry):
        return {
            "encoder_hidden_states": Signal((geometry.text_tokens, 4)),
            "encoder_attention_mask": Signal((geometry.text_tokens,), "mask"),
            "encoder_hidden_states_image": Signal((5, 3)),
            "pooled_projections": Signal((2,)),
            "guidance": Signal((), "value", 3.5),
        }


def test_the_text_is_told_from_the_image_and_what_is_left_out_gets_its_constant():
    given = {  # in the order of their names, as files have them
        "image_embeds": torch.zeros(2, 5, 3),
        "pooled_prompt_embeds": torch.zeros(2, 2),
        "prompt_embeds": torch.zeros(2, 7, 4),
    }
    prompts = Prompts(given).fitted(Takes(), SIZE)
    assert prompts.geometry.text_tokens == 7
    assert set(prompts.tensors) == set(Takes().signals(SIZE))
    assert prompts.tensors["guidance"].tolist() == [3.5, 3.5]
    assert prompts.tensors["encoder_attention_mask"].dtype == torch.int64
    assert prompts.tensors["encoder_attention_mask"].tolist() == [[1] * 7] * 2


def test_a_file_of_empty_prompts_only_has_no_prompts():
    for tensors in ({}, {"negative_prompt_embeds": torch.zeros(1, 7, 4)}):
        with pytest.raises(CalibrationError, match="no prompts"):
            Prompts(tensors).fitted(Takes(), SIZE)


def test_the_empty_prompt_counts_as_one_more(flux, save):
    path = save("prompts.safetensors", embeddings(2) | embeddings(1, prefix="negative_"))
    prompts = fitted(flux, path)
    assert prompts.count == 3
    assert prompts.tensors["pooled_projections"].shape == (3, VECTOR)


def test_bfloat16_embeddings_widen_exactly(flux, save, build):
    tensors = dict(embeddings(1))
    tensors["prompt_embeds"] = ("BF16", build.to_bfloat16(tensors["prompt_embeds"]))
    prompts = fitted(flux, save("prompts.safetensors", tensors))
    wide = np.asarray(tensors["prompt_embeds"][1], np.uint32) << 16
    assert np.array_equal(prompts.tensors["encoder_hidden_states"], wide.view(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": np.zeros((2, 3), np.float32)}, "style: the model does not accept this conditioning"),
        ({"pooled_prompt_embeds": None}, r"pooled_projections: missing; the model needs it as \[prompts, 16\]"),
        ({"prompt_embeds": np.zeros((2, 7, 31), np.float32)}, r"shape \[2, 7, 32\] was expected, found \[2, 7, 31\]"),
        ({"pooled_prompt_embeds": np.zeros((1, VECTOR), np.float32)}, r"found \[1, 16\]"),
        (embeddings(1, tokens=8, prefix="negative_"), r"found \[1, 8, 32\]"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(flux, save, change, message):
    tensors = {name: value for name, value in (embeddings(2) | change).items() if value is not None}
    path = save("prompts.safetensors", tensors)
    with pytest.raises(CalibrationError, match=message):
        fitted(flux, path)


def test_ranges_on_prompts_are_those_of_the_prompts(flux, save):
    tensors = embeddings(2)
    tensors["prompt_embeds"][1, 3, 5] = -77
    prompts = Prompts.load(save("prompts.safetensors", tensors))
    with open_checkpoint(flux) as checkpoint:
        seen = engine.observe(
            checkpoint, None, RunOptions(samples=1, steps=1, device="cpu"), geometry=SIZE, prompts=prompts
        )
    ranges = dict(zip(seen.statistics.names, seen.statistics.absmax, strict=True))
    assert ranges["txt_in"] == 77
    assert ranges["vector_in.in_layer"] == np.abs(tensors["pooled_prompt_embeds"]).max()
    assert seen.conditioned == ()
    assert seen.statistics.samples == 2  # every prompt once, though one sample was asked for
    assert seen.statistics.provenance["conditioning"] == ("prompts",)
