from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert_to_quant import __version__
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import check
from convert_to_quant.engines.denoiser import load
from convert_to_quant.engines.quantized_linear import ARITHMETICS
from convert_to_quant.engines.sizes import geometry
from convert_to_quant.families.running import Geometry
from convert_to_quant.fidelity import Fidelity, Level, Size, noise_scenes, scenes_fidelity

SMALL = ("--height", 32, "--width", 48, "--text-tokens", 5, "--steps", 2, "--samples", 2)
SIZE = geometry("flux1", 32, 48, text_tokens=5)


def measured(reference: Path, quantized: Path, **options: Any) -> Fidelity:
    with open_checkpoint(reference) as first, open_checkpoint(quantized) as second:
        one, other = load(first), load(second, arithmetic=options.pop("arithmetic", "comfyui"))
        return scenes_fidelity(one, other, noise_scenes(one, SIZE, 2, seed=check.SEED), steps=2, **options)


def test_every_arithmetic_has_its_spelling_here():
    assert {name.replace("-", "_") for name in check.ARITHMETICS} == set(ARITHMETICS)


CLOSE = "the same image, details differ on close inspection"
NOISE = "measured on noise; real prompts can differ by 13 dB (use --pipeline or --conditioning)"


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (25.0, CLOSE), (24.9, "the same image, with small changes"), (20.0, "the same image, with small changes"),
        (19.9, "the same image, with small changes (convert_to_quant inspect b.safetensors may find the cause)"),
        (7.0, "the subject is there, the image is damaged (convert_to_quant inspect"), (-1.0, "ruin ("),
    ],
)  # fmt: skip
def test_the_mean_is_told_in_words(capsys, mean, said):
    found = Fidelity(mean, 0.1, mean - 3, (), (), 30.0, 0.1, 2, 2, 1.0)
    check.say_meaning(found, argparse.Namespace(quantized="b.safetensors", pipeline=None, conditioning=[]))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{mean:.1f} dB on average, {mean - 3:.1f} at worst: {said}")
    assert second == NOISE
    for pipeline, conditioning in ((None, ["a.safetensors"]), ("FLUX.1-dev", [])):
        args = argparse.Namespace(quantized="b.safetensors", pipeline=pipeline, conditioning=conditioning)
        check.say_meaning(found, args)
        assert NOISE not in capsys.readouterr().err


@pytest.mark.parametrize(("prompts", "spread"), [(1, "-"), (2, "0.10 dB")])  # one prompt has no spread
def test_the_worst_is_told_per_level_per_size_and_of_all(capsys, prompts, spread):
    sizes = (Size(Geometry(4, 6, 1, 8), 31.0, 21.0), Size(Geometry(2, 3, 1, 2), 29.0, 19.0))
    check.print_levels(Fidelity(30.0, 0.1, 19.0, (Level(1.0, 30.0, 0.1, 19.0),), sizes, 35.0, 0.1, prompts, 1, 1.0))
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "sigma SQNR standard error worst",
        f"1.000 30.00 dB {spread} 19.00 dB",
        "4 x 6 + 8 tokens 31.00 dB - 21.00 dB",
        "2 x 3 + 2 tokens 29.00 dB - 19.00 dB",
        f"mean 30.00 dB {spread} 19.00 dB",
        f"final PSNR 35.00 dB {spread} -",
    ]


def test_models_in_the_wrong_order_are_refused(refused, flux_file, fp8_file):
    problem = f"the reference has quantized layers, but {flux_file} has none (swap them: check {flux_file} {fp8_file})"
    refused(f"{fp8_file}: {problem}\n", "check", fp8_file, flux_file, *SMALL)


def test_a_pair_without_an_original_or_without_fp8_is_noted(done, flux_file, fp8_file):
    assert done("check", fp8_file, fp8_file, *SMALL).err.startswith("note: both models have quantized layers")
    assert done("check", flux_file, flux_file, *SMALL).err.startswith("note: neither model has quantized")


@pytest.mark.parametrize("arithmetic", ["comfyui", "comfyui-divide", "dequantize"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_says_what_the_fidelity_is(ctq, flux_file, fp8_file, arithmetic, guidance):
    wanted = measured(flux_file, fp8_file, arithmetic=arithmetic.replace("-", "_"), guidance=guidance)
    document = fp8_file.with_name("report.json")
    words = (*SMALL, "--arithmetic", arithmetic, "--guidance", guidance, "--json", document)
    outcome = ctq("check", flux_file, fp8_file, *words)
    mean = f"{wanted.sqnr_db:.1f} dB on average, {wanted.worst_db:.1f} at worst: {CLOSE}"
    assert (outcome.code, outcome.err.splitlines()) == (0, [mean, NOISE])
    found = json.loads(document.read_text())
    made_by = found.pop("made_by")
    assert (made_by["command"], made_by["version"], made_by["options"]["steps"]) == ("check", __version__, 2)
    assert found == json.loads(json.dumps(wanted.to_json()))
    rows = [line.split() for line in outcome.out.splitlines()]
    assert [row[0] for row in rows[1:3]] == [f"{level.sigma:.3f}" for level in wanted.levels]
    error = f"{wanted.standard_error_db:.2f}"
    assert ["mean", f"{wanted.sqnr_db:.2f}", "dB", error, "dB", f"{wanted.worst_db:.2f}", "dB"] in rows


def test_layers_come_worst_first_and_all_where_all_are_asked_for(ctq, flux_file, fp8_file, flux, monkeypatch):
    wanted = [
        [error.layer, str(error.rows), f"{error.mean:.3%}", f"{error.worst:.3%}", f"{error.whole:.3%}"]
        for error in measured(flux_file, fp8_file, layer_errors=True).layers
    ]
    assert len(wanted) == len(flux.quantized)
    monkeypatch.setattr(check, "WORST_LAYERS", 3)
    for more, count in ((), 3), (("-v",), len(wanted)):
        lines = ctq("check", flux_file, fp8_file, *SMALL, "--layers", *more).out.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("layer"))
        assert [line.split() for line in lines[start + 1 :]] == wanted[:count]


def test_a_model_is_exactly_itself(done, flux_file):
    outcome = done("check", flux_file, flux_file, *SMALL, "--at-least", 200)
    assert [line.split()[-3:] for line in outcome.out.splitlines()[1:-1]] == [["exact", "-", "exact"]] * 5
    assert outcome.out.splitlines()[-1].split() == ["final", "PSNR", "exact", "-", "-"]


def test_a_model_below_what_was_asked_for_fails(ctq, done, flux_file, fp8_file):
    mean = measured(flux_file, fp8_file).sqnr_db
    done("check", flux_file, fp8_file, *SMALL, "-q", "--at-least", mean - 0.1)
    outcome = ctq("check", flux_file, fp8_file, *SMALL, "-q", "--at-least", mean + 0.1)
    assert outcome.code == 1
    assert outcome.err == f"error: {fp8_file}: {mean:.2f} dB, expected at least {mean + 0.1:g} dB\n"
    assert outcome.out.startswith("sigma"), "quiet does not suppress data"


ONE_SIZE = ("--height", 32, "--width", 48, "--steps", 2, "--json", "-")


def figures(outcome: Any) -> dict[str, Any]:
    """A report without what was called."""
    document = json.loads(outcome.out)
    del document["made_by"]
    return document


@pytest.fixture
def shown(done, flux_file, fp8_file, save):
    """The figures on embeddings: shown(tensors of a file, of another, words=...)."""

    def run(*files: dict[str, Any], words: tuple[Any, ...] = ()) -> dict[str, Any]:
        paths = [save(f"{number}.safetensors", tensors) for number, tensors in enumerate(files)]
        given = [word for path in paths for word in ("--conditioning", path)]
        return figures(done("check", flux_file, fp8_file, *ONE_SIZE, *words, *given))

    return run


def test_prompt_embeddings_take_the_place_of_noise(shown, embeddings):
    given = embeddings(3, 5)
    assert shown(given)["prompts"] == 3
    first = shown(given, words=("--samples", 1))
    assert first == shown({name: value[:1] for name, value in given.items()})
    assert first["sqnr_db"] != shown({name: value[1:2] for name, value in given.items()})["sqnr_db"]
    # Prompts are taken in turn, each time on another noise.
    assert shown(given, words=("--samples", 4))["prompts"] == 4


def test_the_empty_prompt_of_guidance_can_be_given(shown, embeddings):
    given = embeddings(2, 5)
    empty = {f"negative_{name}": np.zeros_like(value[:1]) for name, value in given.items()}
    loud = {name: value + 3 for name, value in empty.items()}
    means = [shown(tensors, words=("--guidance", 4))["sqnr_db"] for tensors in (given, given | empty, given | loud)]
    assert means[0] == means[1] != means[2]


@pytest.mark.parametrize("samples", [(), ("--samples", 1), ("--samples", 7)])
def test_files_of_embeddings_are_shown_like_one(shown, embeddings, samples):
    given = embeddings(3, 5)
    one = shown(given, words=samples)
    parts = ({name: value[part] for name, value in given.items()} for part in (slice(0, 1), slice(1, 3)))
    several = shown(*parts, words=samples)
    assert several["prompts"] == one["prompts"]
    assert several["sqnr_db"] == pytest.approx(one["sqnr_db"], abs=0.01)


def test_prompts_and_the_empty_prompt_may_differ_in_length(shown, embeddings):
    short = embeddings(1, 5)
    empty = {f"negative_{name}": 0 * value for name, value in short.items()}
    found = shown(short | empty, embeddings(1, 10) | empty, words=("--guidance", 3))
    assert [size["geometry"]["text_tokens"] for size in found["sizes"]] == [5, 10]


@pytest.mark.parametrize("guidance", [1, 3])
def test_a_pipeline_embeds_prompts(done, flux_file, fp8_file, pipeline, prompts, save, guidance):
    import torch

    from convert_to_quant.engines.pipeline import load as load_pipeline

    kept = flux_file.with_name("kept.safetensors")
    words = ("check", flux_file, fp8_file, *ONE_SIZE, "--guidance", guidance)
    encoders = flux_file.with_name("encoders")  # the rest is not read
    shutil.copytree(pipeline, encoders, ignore=shutil.ignore_patterns("transformer", "vae"))
    made = ("--pipeline", encoders, "--prompts", prompts, "--text-tokens", 6)
    outcome = done(*words, *made, "--save-conditioning", kept)

    pipe = load_pipeline(pipeline)
    texts = {"": prompts.read_text().split("\n")[1:-1]} | ({"negative_": [""]} if guidance != 1 else {})
    by_hand = {}
    with torch.no_grad():
        for prefix, some in texts.items():
            context, pooled, _ = pipe.encode_prompt(some, some, max_sequence_length=6)
            by_hand |= {f"{prefix}prompt_embeds": context.numpy(), f"{prefix}pooled_prompt_embeds": pooled.numpy()}
    wanted = figures(done(*words, "--conditioning", save("by_hand.safetensors", by_hand)))
    assert f"wrote {kept}: the embeddings of 2 prompts" in outcome.err
    assert "noise" not in outcome.err
    found = figures(outcome)
    assert found["prompts"] == 2
    assert found["sqnr_db"] == pytest.approx(wanted["sqnr_db"], abs=0.01)
    assert figures(done(*words, "--conditioning", kept)) == found


def test_embeddings_of_several_lengths_are_not_kept_in_one_file(refused, flux_file, pipeline, prompts, monkeypatch):
    from convert_to_quant.engines import pipeline as engine
    from convert_to_quant.engines.prompts import Prompts

    monkeypatch.setattr(engine, "encode", lambda *_, **__: [Prompts({}), Prompts({})])
    kept = flux_file.with_name("kept.safetensors")
    words = ("--pipeline", pipeline, "--prompts", prompts, "--save-conditioning", kept)
    message = f"{prompts}: one file cannot hold embeddings of 2 different lengths"
    refused(message, "check", flux_file, flux_file, *words, code=2)


def test_another_model_is_refused(refused, flux_file, flux_tensors, save):
    tensors = flux_tensors()
    dtype, weight = tensors["txt_in.weight"]
    wider = save("wider.safetensors", {**tensors, "txt_in.weight": (dtype, np.concatenate([weight, weight], 1))})
    more = {name.replace("single_blocks.0.", "single_blocks.1."): tensor for name, tensor in tensors.items()}
    deeper, strange = save("deeper.safetensors", tensors | more), save("strange.safetensors", {"a.weight": weight})
    norm = "single_transformer_blocks.1.attn.norm_k.weight"
    for one, other, tensor, wanted, found in (
        (flux_file, wider, "context_embedder.weight", "[32, 32]", "[32, 64]"),
        (flux_file, deeper, norm, "missing", "[16]"),
        (deeper, flux_file, norm, "[16]", "missing"),
    ):
        said = f"not the same model: {tensor}: expected {wanted} as in {one}, found {found}"
        refused(f"{other}: {said}", "check", one, other, *SMALL)
    refused(f"{strange}: its tensor names fit no known family", "check", flux_file, strange, *SMALL)


@pytest.mark.parametrize(
    ("key", "value", "more"),
    [("weight", np.uint8(0x7F), ()), ("weight_scale", np.float32(1e38), ("--layers", "--json", "-", "--guidance", 3))],
    ids=["a NaN code", "a huge scale"],
)
def test_a_file_that_gives_nan_or_infinity_is_refused(refused, flux_file, fp8_file, save, key, value, more):
    with open_checkpoint(fp8_file) as checkpoint:
        tensors = {name: (info.dtype, checkpoint.bits(name).copy()) for name, info in checkpoint.tensors.items()}
        _, bits = tensors[f"double_blocks.0.img_attn.qkv.{key}"]
        bits.reshape(-1)[:1].view(value.dtype)[:] = value
        bad = save("bad.safetensors", tensors, checkpoint.metadata)
    problem = f"{bad}: double_blocks.0.img_attn.qkv: the output of this layer in the {{}} is not finite at sigma 1 "
    refused(problem.format("quantized model"), "check", flux_file, bad, *SMALL, *more)
    refused(problem.format("reference"), "check", bad, bad, *SMALL, *more)
