from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import denoiser
from convert_to_quant.kernels import SIGMA_BINS
from convert_to_quant.stats import Statistics
from convert_to_quant.trials import Trials

SMALL = ("--height", 32, "--width", 48, "--text-tokens", 5, "--steps", 2)
"""2 by 3 tokens."""


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums depend on the number of threads in their last bits; child processes have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def observe(done, tmp_path):
    """Observe a tiny image of three kinds: observe(words...) gives the statistics and what was said."""

    def run(*words: Any, small: tuple[Any, ...] = (*SMALL, "--samples", 3)) -> tuple[Statistics, Any]:
        stats = tmp_path / "stats.safetensors"
        outcome = done("observe", *words, "-o", stats, *small)
        return Statistics.load(stats), outcome

    return run


def test_the_quantized_layers_of_a_model_are_observed_and_applied(done, observe, fp8_file, flux, tmp_path):
    seen, outcome = observe(fp8_file, small=(*SMALL, "--samples", 4, "--seed", 7))
    assert outcome.out == ""
    assert set(seen.layers) == set(seen.weights) == set(flux.quantized)
    assert seen.samples == 4
    assert (seen.calls == 3 * 2).all()  # the images of one kind of conditioning run together
    facts = dict(seen.provenance)
    moving = facts.pop("depends_on_conditioning")
    wanted = {"conditioning": "noise", "engine": "model", "family": "flux1", "seed": "7", "steps": "2"}
    assert {name: facts[name] for name in wanted} == {name: (value,) for name, value in wanted.items()}
    assert moving
    assert set(moving) < set(flux.quantized)
    assert f"the ranges of {len(moving)} layers depend on the conditioning" in outcome.err

    document = tmp_path / "report.json"
    applied = done("apply", fp8_file, tmp_path / "stats.safetensors", "-o", tmp_path / "out", "--json", document)
    assert f"in {len(moving)} layers the range depends on the conditioning" in applied.err
    layers = json.loads(document.read_text())["layers"]
    assert {layer["layer"] for layer in layers if layer["conditioning_dependent"]} == set(moving)


def test_all_layers_of_a_model_in_high_precision_are_observed_and_reported(observe, flux_file, flux):
    seen, outcome = observe(flux_file, "-q", "--json", "-")
    assert outcome.err == ""
    assert set(seen.layers) == set(flux.linear)
    document = json.loads(outcome.out)
    absmax = {layer["layer"]: layer["absmax"] for layer in document["layers"]}
    assert absmax == dict(zip(seen.names, seen.absmax.tolist(), strict=True))
    assert document["samples"] == seen.samples == 3
    tokens = dict(zip(seen.names, seen.rows_per_sample.tolist(), strict=True))
    assert (tokens["img_in"], tokens["txt_in"], tokens["single_blocks.0.linear1"]) == (6, 5, 11), "sizes are in pixels"


def test_a_prefix_and_other_parts_of_a_checkpoint_are_left_aside(
    done, observe, flux_tensors, save, flux, fp8_file, tmp_path
):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in flux_tensors().items()}
    tensors["first_stage_model.decoder.mid.attn.weight"] = np.ones((16, 16), np.float32)
    seen, _ = observe(save("whole.safetensors", tensors))
    assert set(seen.layers) == {f"model.diffusion_model.{name}" for name in flux.linear}
    # They fit the same model under another prefix.
    applied = done("apply", fp8_file, tmp_path / "stats.safetensors", "-o", tmp_path / "out.safetensors")
    assert "the range depends on the conditioning, which noise only approximates (first: double_" in applied.err


def test_adapters_are_named_and_widen_ranges(observe, flux_file, lora):
    without, _ = observe(flux_file)
    with_lora, outcome = observe(flux_file, "--lora", f"{lora}:2")
    assert "LoRA" in outcome.err
    assert with_lora.provenance["lora"] == ("style.safetensors",)
    number = without.index("double_blocks.0.img_mlp.2")
    assert with_lora.absmax[number] > 1.5 * without.absmax[number]
    assert (with_lora.absmax >= without.absmax).all()


def test_prompt_embeddings_take_the_place_of_noise(observe, flux_file, save, embeddings):
    given = embeddings()
    options = ("--height", 32, "--width", 48, "--steps", 2, "--conditioning", save("prompts.safetensors", given))
    seen, _ = observe(flux_file, small=options)
    assert seen.samples == 2
    assert seen.provenance["conditioning"] == ("prompts",)
    assert "depends_on_conditioning" not in seen.provenance


def test_conditioning_that_does_not_fit_is_refused(refused, flux_file, save, embeddings):
    path = save("prompts.safetensors", {**embeddings(), "image": np.zeros((2, 4), np.float32)})
    message = f"{path}: image: the model does not accept this conditioning"
    refused(message, "observe", flux_file, "-o", flux_file.with_name("s.safetensors"), "--conditioning", path)


# --- stopped runs ---

LONG = ("--height", 16, "--width", 32, "--text-tokens", 2000, "--steps", 2, "--samples", 7)
"""Two images run together: four parts of work, eight evaluations."""


@contextmanager
def interrupted_at(owner: Any, name: str, count: int) -> Iterator[None]:
    """A method whose count-th call is interrupted."""
    method, left = getattr(owner, name), count

    def stopping(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return method(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        yield


@pytest.fixture
def interrupted(ctq, fp8_file):
    """The output of a run that was interrupted in its third part."""
    stats = fp8_file.with_name("stats.safetensors")
    with interrupted_at(denoiser.Denoiser, "velocity", 5):
        assert ctq("observe", fp8_file, *LONG, "-o", stats, "--save-every", 0).code == 130
    assert not stats.exists()
    return stats


def test_an_interrupted_run_can_be_used_or_resumed_to_the_same_statistics(ctq, done, interrupted, fp8_file):
    partial, whole = f"{interrupted}.partial", fp8_file.with_name("whole.safetensors")
    done("apply", fp8_file, partial, "--dry-run")
    assert Statistics.load(partial).samples == 3
    assert ctq("observe", fp8_file, *LONG, "-o", interrupted, "--resume", "-q").err == ""
    done("observe", fp8_file, *LONG, "-o", whole)
    assert Statistics.load(interrupted) == Statistics.load(whole)
    assert not Path(partial).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "an unfinished run exists (--resume continues it, or delete it)"),
        (("--resume", "--steps", 3), "made with steps 2, not 3"),
        (("--resume", "--width", 64), "made with size 1 x 1 x 2 tokens, text 2000, not 1 x 1 x 4 tokens, text 2000"),
        (("flux", "--resume"), "cannot resume: made with another model"),
    ],
)
def test_a_run_is_not_resumed_with_other_options_or_on_another_model(ctq, interrupted, fp8_file, words, said):
    model = fp8_file.with_name("flux.safetensors") if "flux" in words else fp8_file
    outcome = ctq("observe", model, *LONG, "-o", interrupted, *(word for word in words if word != "flux"))
    assert outcome.code == 1
    assert said in outcome.err


def test_resuming_a_complete_run_does_nothing(ctq, done, fp8_file, monkeypatch):
    stats = fp8_file.with_name("stats.safetensors")
    words = ("observe", fp8_file, *SMALL, "--samples", 3, "-o", stats, "--resume")
    done(*words)
    before, partial = stats.read_bytes(), Path(f"{stats}.partial")
    partial.write_bytes(before)  # left by a run that was killed at its end
    monkeypatch.setattr(denoiser.Denoiser, "velocity", None)
    outcome = ctq(*words)
    assert (outcome.code, outcome.err) == (0, f"{stats} is already complete\n")
    assert (stats.read_bytes(), partial.exists()) == (before, False)


# --- several processes ---


def by_two(*words):
    """Run a command line in two processes that share the work."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = [
        subprocess.Popen([sys.executable, "-m", "convert_to_quant", *map(str, words)],
                         env=os.environ | shared | dict.fromkeys(("RANK", "LOCAL_RANK"), rank))
        for rank in "01"
    ]  # fmt: skip
    assert [process.wait(300) for process in ranks] == [0, 0]


TRIALS = ("--trials", "--samples", 3, "--steps", 1, "--height", 32, "--width", 32)


@pytest.mark.parametrize(("model", "words"), [("fp8", (*LONG, "--resume", "--save-every", 0)), ("flux", TRIALS)])
def test_two_processes_do_what_one_does(done, fp8_file, monkeypatch, model, words):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source, *outputs = (fp8_file.with_name(f"{name}.safetensors") for name in (model, "together", "single"))
    for run, output in zip((by_two, done), outputs, strict=True):
        run("observe", source, *words, "-o", output)
    one, other = map(Statistics.load, outputs)
    assert one == other
    assert not [path for path in fp8_file.parent.iterdir() if "partial" in path.name]
    two, alone = map(Trials.load, outputs)
    if "--trials" in words:
        assert (alone.layers, alone.formats, alone.moments) == (two.layers, two.formats, two.moments)
        assert np.array_equal(alone.count, two.count)
        assert alone.count.any((1, 2)).all()
        assert np.allclose(alone.damage, two.damage, rtol=0.02, atol=0)  # batches differ in the last bits


# --- pipelines ---


PIXELS = ("--height", 8, "--width", 12, "--text-tokens", 6, "--steps", 4)


def by_hand(folder: Path, prompts: Path) -> dict[str, float]:
    """Largest inputs of the transformer's linear layers, by hooks on diffusers' own pipeline."""
    from convert_to_quant.engines.pipeline import load

    pipe = load(folder)
    absmax: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, inputs: absmax.__setitem__(name, max(absmax.get(name, 0.0), float(inputs[0].abs().max())))

    for name, module in pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    for number, prompt in enumerate(prompts.read_text().split("\n")[1:-1]):
        pipe(
            prompt, height=8, width=12, num_inference_steps=4, max_sequence_length=6, output_type="latent",
            generator=torch.Generator().manual_seed(42 + number),
        )  # fmt: skip
    return absmax


@pytest.fixture
def sampling(pipeline, prompts):
    """The words of a run on the prompts."""
    return ("observe", "--pipeline", pipeline, "--prompts", prompts, *PIXELS)


def test_a_pipeline_records_layers_under_both_kinds_of_names(
    done, sampling, pipeline, prompts, flux, fp8_file, tmp_path
):
    stats, ours = tmp_path / "stats.safetensors", tmp_path / "ours.safetensors"
    outcome = done(*sampling, "-o", stats)
    assert outcome.out == ""
    seen = Statistics.load(stats)
    absmax = dict(zip(seen.names, seen.absmax.tolist(), strict=True))
    wanted = by_hand(pipeline, prompts)
    assert {name: absmax[name] for name in wanted} == wanted
    assert {name: seen.layers[name] for name in flux.linear} == flux.linear
    assert set(seen.layers) == {*wanted, *flux.linear}
    for own, theirs in {
        "double_blocks.0.txt_attn.qkv": "transformer_blocks.0.attn.add_k_proj",
        "single_blocks.0.linear1": "single_transformer_blocks.0.proj_mlp",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }.items():
        assert absmax[own] == absmax[theirs]
    assert seen.samples == 2
    assert seen.visited.all()
    # Four steps of the scheduler, whose noise levels are 1, 0.75, 0.5 and 0.25.
    assert [column for column in range(SIGMA_BINS + 1) if seen.sigma_count[0, column]] == [1, 3, 5, 7]
    tokens = dict(zip(seen.names, seen.rows_per_sample.tolist(), strict=True))
    assert (tokens["txt_in"], tokens["vector_in.in_layer"]) == (6, 1)

    done("apply", fp8_file, stats, "-o", tmp_path / "out.safetensors")
    done(*sampling, fp8_file, "-o", ours)
    under_its_own_names = Statistics.load(ours)
    assert set(under_its_own_names.layers) == set(flux.quantized)
    assert under_its_own_names.replace(weights={}) == seen.take(under_its_own_names.names)

    # They fit a checkpoint in diffusers' names, too.
    source, fp8 = pipeline / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "theirs.safetensors"
    done("-i", source, "-o", fp8)
    with open_checkpoint(fp8) as checkpoint:
        assert any(name.endswith("attn.to_q.weight_scale") for name in checkpoint.tensors)
    applied = done("apply", fp8, stats, "-o", tmp_path / "out.safetensors")
    assert "keeps its scale" not in applied.err


def test_an_interrupted_pipeline_goes_on(ctq, done, sampling, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    whole, stats = tmp_path / "whole.safetensors", tmp_path / "stats.safetensors"
    words = (*sampling, "--samples", 3, "--save-every", 0)
    done(*words, "-o", whole)
    with interrupted_at(FlowMatchEulerDiscreteScheduler, "step", 6):
        assert ctq(*words, "-o", stats).code == 130
    assert Statistics.load(f"{stats}.partial").samples == 1
    done(*words, "-o", stats, "--resume")
    assert Statistics.load(stats) == Statistics.load(whole)
    assert Statistics.load(stats).samples == 3


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--component unet", 2, "the pipeline has no unet (it has "),
        ("--frames 9", 2, "FluxPipeline does not accept num_frames"),
        ("--pipeline gone --dry-run", 1, "gone: no such folder (name a diffusers pipeline; nothing is downloaded)\n"),
        ("--pipeline . --dry-run", 1, ".: not a diffusers pipeline: the folder has no model_index.json\n"),
        ("--pipeline strange", 1, "strange: diffusers cannot load it"),
        ("--prompts none.txt", 2, "none.txt: the prompts cannot be read"),
        ("--prompts empty.txt", 2, "empty.txt: no prompts"),
    ],
)
def test_pipelines_and_prompts_that_cannot_be_used_are_refused(ctq, sampling, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    (tmp_path / "empty.txt").write_text("\n  \n")
    outcome = ctq(*sampling, "-o", "s.safetensors", *words.split())
    assert (outcome.code, outcome.out) == (code, "")
    assert said in outcome.err
    assert not (tmp_path / "s.safetensors").exists()


def test_a_checkpoint_of_another_model_than_the_pipelines_is_refused(ctq, sampling, flux_tensors, save, tmp_path):
    tensors = flux_tensors()
    dtype, weight = tensors["img_in.weight"]
    tensors["img_in.weight"] = (dtype, np.concatenate([weight, weight[:, :4]], 1))
    model = save("other.safetensors", tensors)
    outcome = ctq(*sampling, model, "-o", tmp_path / "s.safetensors")
    assert outcome.code == 1
    assert f"x_embedder: the pipeline's FluxTransformer2DModel is not the model of {model}" in outcome.err


def test_under_torchrun_cuda_is_the_processes_own_card(monkeypatch):
    from convert_to_quant.cli.observing import device_of_this_process

    assert device_of_this_process("cuda") == "cuda"
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "3")
    assert [device_of_this_process(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:3", "cuda:0", "cpu"]
