"""The command line as a function, and files for the tiny Flux.1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tiny_flux import TEXT, VECTOR

from convert_to_quant import cli
from convert_to_quant.checkpoint import open_checkpoint


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Default colors and width, and no progress lines on a slow machine."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli.output, "SECONDS_BETWEEN_LINES", float("inf"))


def kohya() -> dict[str, Any]:
    """An adapter of one layer of the tiny Flux.1, as kohya names it."""
    random, layer = np.random.default_rng(1), "lora_unet_double_blocks_0_img_mlp_0"
    down, up = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 32), (128, 4)))
    return {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}


@pytest.fixture
def lora(save):
    """A file with this adapter."""
    return save("style.safetensors", kohya())


def prompt_embeddings(count: int = 2, tokens: int = 4) -> dict[str, Any]:
    """Prompt embeddings for the tiny Flux.1."""
    random = np.random.default_rng(2)
    return {
        "prompt_embeds": random.standard_normal((count, tokens, TEXT)).astype(np.float32),
        "pooled_prompt_embeds": random.standard_normal((count, VECTOR)).astype(np.float32),
    }


@pytest.fixture
def embeddings():
    """embeddings(number of prompts, tokens per prompt)."""
    return prompt_embeddings


@pytest.fixture
def prompts(tmp_path):
    """A file of prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("\na red fish\na bear\n ")
    return path


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def ctq(capsys):
    """Run the command line in this process: ctq("-i", path, ...)."""

    def run(*words: object, main: Callable[[list[str]], int] = cli.main) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def done(ctq):
    """Run a command that succeeds."""

    def run(*words: object, **options: Any) -> Outcome:
        outcome = ctq(*words, **options)
        assert outcome.code == 0, outcome.err
        return outcome

    return run


@pytest.fixture
def refused(ctq, folder):
    """refused(message, words...): the command fails with a line that starts like this, and changes no file."""

    def check(message: str, *words: object, code: int = 1, **options: Any) -> None:
        before = folder()
        outcome = ctq(*words, **options)
        assert (outcome.code, outcome.out) == (code, "")
        assert f"\nerror: {message}" in f"\n{outcome.err}"
        assert folder() == before

    return check


@pytest.fixture
def fp8_file(done, flux_file):
    """The tiny Flux.1, converted."""
    path = flux_file.with_name("fp8.safetensors")
    done("-i", flux_file, "-o", path)
    return path


@pytest.fixture
def contents():
    """The bytes of every tensor of a file: contents(path)."""

    def read(path: Path) -> dict[str, bytes]:
        with open_checkpoint(path) as checkpoint:
            return {name: checkpoint.raw(name).tobytes() for name in checkpoint}

    return read


@pytest.fixture
def scales():
    """Every input scale of a file by layer, read with the safetensors library: scales(path)."""

    def read(path: Path) -> dict[str, float]:
        with safe_open(path, "np") as file:
            names = [name for name in file.keys() if name.endswith(".input_scale")]  # noqa: SIM118 - no mapping
            found = {name.removesuffix(".input_scale"): file.get_tensor(name) for name in names}
        assert all((scale.dtype, scale.shape) == (np.float32, ()) and 0 < scale < np.inf for scale in found.values())
        return {name: float(scale) for name, scale in found.items()}

    return read


@pytest.fixture
def folder(tmp_path):
    """folder(): the content of all files in the test's folder."""

    def look() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    return look


WORDS = ("<pad>", "<eos>", "<unk>", "a", "red", "fish", "bear")


def save_pipeline(folder: Path) -> None:
    """Save a Flux.1 pipeline of the tiny model's size with random weights."""
    import diffusers
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    def tokenizer() -> Any:
        rules = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
        rules.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=rules, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=8
        )

    torch.manual_seed(0)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, eos_token_id=1, bos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.FluxPipeline(scheduler, vae, clip, tokenizer(), t5, tokenizer(), transformer).save_pretrained(folder)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The folder of a saved pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_pipeline(folder)
    return folder
