"""Embeddings of a pipeline. `tests/cli` runs real ones; here are the forms in which diffusers' pipelines give them."""

from types import SimpleNamespace

import pytest
import torch

from convert_to_quant.engines import pipeline
from convert_to_quant.errors import CalibrationError, OptionError
from convert_to_quant.families.running import Signal

TEXT, VECTOR = 4, 3
SIGNALS = {
    "encoder_hidden_states": Signal((64, TEXT)),
    "encoder_attention_mask": Signal((64,), "mask"),
    "pooled_projections": Signal((VECTOR,)),
    "guidance": Signal((), "value", 3.5),
}


def tokens(text):
    """[1, letters + 1, TEXT], of which every number tells the text."""
    return torch.full((1, len(text) + 1, TEXT), float(len(text)))


def mask(text):
    return torch.ones(1, len(text) + 1, dtype=torch.bool)


def pooled(text):
    return torch.full((1, VECTOR), float(len(text)))


def flux(prompt, prompt_2=None, device=None, max_sequence_length=512):
    return tokens(prompt[:max_sequence_length]), pooled(prompt), torch.zeros(len(prompt) + 1, 3)


def sd3(prompt, prompt_2, prompt_3, device=None, do_classifier_free_guidance=True):
    if not do_classifier_free_guidance:
        return tokens(prompt), None, pooled(prompt), None
    return tokens(prompt), tokens(""), pooled(prompt), pooled("")


def ltx(prompt, do_classifier_free_guidance=True, **kwargs):
    if not do_classifier_free_guidance:
        return tokens(prompt), mask(prompt), None, None
    return tokens(prompt), mask(prompt), tokens(""), mask("")


def z_image(prompt, do_classifier_free_guidance=True, prompt_embeds=None):
    return list(tokens(prompt)), list(tokens("")) if do_classifier_free_guidance else []


def chroma(prompt, do_classifier_free_guidance=True):
    texts = (prompt, "") if do_classifier_free_guidance else (prompt,)
    padding = torch.zeros(1, 3, TEXT)
    outputs = [
        (torch.cat([tokens(text), padding], 1), torch.zeros(4, 3), torch.cat([mask(text).float(), padding[..., 0]], 1))
        for text in texts
    ]
    return [value for output in outputs for value in output]


FORMS = {
    flux: ("encoder_hidden_states", "pooled_projections"),
    sd3: ("encoder_hidden_states", "pooled_projections"),
    ltx: ("encoder_hidden_states", "encoder_attention_mask"),
    z_image: ("encoder_hidden_states",),
    chroma: ("encoder_hidden_states",),
}


@pytest.fixture
def encode(monkeypatch):
    """encode(encode_prompt, prompts, names of signals, ...)."""

    def run(how, prompts, names, **options):
        monkeypatch.setattr(pipeline, "load", lambda *_, **__: SimpleNamespace(encode_prompt=how))
        return pipeline.encode("folder", prompts, {name: SIGNALS[name] for name in names}, **options)

    return run


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_embeddings_get_their_names_from_their_widths(encode, form, negative):
    wanted = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "pooled_projections": pooled}

    same, other = encode(form, ("fish", "a red fish", "bear"), (*FORMS[form], "guidance"), negative=negative)

    assert (same.count, other.count, same.source) == (2, 1, "folder")
    for texts, found in ((("fish", "bear"), same), (("a red fish",), other)):
        names = {f"negative_{name}" for name in FORMS[form]} if negative else set()
        assert found.tensors.keys() == {*FORMS[form], *names}
        for name in FORMS[form]:
            assert torch.equal(found.tensors[name], torch.cat([wanted[name](text) for text in texts]))
            if negative:
                assert torch.equal(found.tensors["negative_" + name], wanted[name](""))


def test_the_text_is_as_long_as_asked_for(encode):
    (found,) = encode(flux, ("a red fish",), FORMS[flux], text_tokens=4)
    assert found.tensors["encoder_hidden_states"].shape == (1, 5, TEXT)
    with pytest.raises(OptionError, match="does not accept max_sequence_length"):
        encode(sd3, ("a",), FORMS[sd3], text_tokens=4)


def test_text_encoders_of_another_model_are_refused(encode):
    with pytest.raises(
        CalibrationError, match="pooled_projections: its text encoders give no embeddings of 3 channels"
    ):
        encode(ltx, ("a",), ("encoder_hidden_states", "pooled_projections"))
    with pytest.raises(CalibrationError, match="has no encode_prompt"):
        encode(None, ("a",), ())
