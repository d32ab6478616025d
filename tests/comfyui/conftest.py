"""The real ComfyUI as a reader of our files. They need a ComfyUI 0.33 tree and its Python dependencies:

    COMFYUI_DIR=/path/to/ComfyUI python -m pytest tests/comfyui

Without COMFYUI_DIR they skip. With it, ComfyUI runs in its own process (`processes.py`), on the CPU, with FP8
products (`--supports-fp8-compute`). Measured results are printed after pytest's summary.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
import pytest

from convert_to_quant import emoji
from convert_to_quant.checkpoint import Entry, open_checkpoint, write_checkpoint
from convert_to_quant.cli import main
from convert_to_quant.emoji.prompts import embed_all
from convert_to_quant.emoji.rerange import RERANGINGS, Reranging, rerange

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from convert_to_quant.engines.diffusers import Denoiser
    from convert_to_quant.engines.quantized_linear import Arithmetic

PROMPTS = ("strawberry", "grinning cat face with smiling eyes")
SIGMAS = (1.0, 0.75, 0.5, 0.25)
STEPS, GUIDANCE = 8, 2.0
SEED = 7
PREFIX = "model.diffusion_model."
HEADER = "_quantization_metadata"

Change = Callable[[dict[str, Any], dict[str, Any]], object]
"""Changes the tensors of a file, and the layers' quantization configs in its header."""

FIGURES: list[tuple[str, float]] = []

collect_ignore = ["stand_ins.py"]  # it runs inside of a ComfyUI


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if FIGURES:
        terminalreporter.section("measured against ComfyUI")
        for text, value_db in FIGURES:
            terminalreporter.write_line(f"{value_db:7.1f} dB  {text}")


@pytest.fixture(scope="session")
def figure():
    """figure(text, dB): keep a result for the summary."""

    def figure(text: str, value_db: float) -> float:
        FIGURES.append((text, value_db))
        return value_db

    return figure


@pytest.fixture(scope="session")
def tree():
    """The ComfyUI tree."""
    return processes.tree()


@pytest.fixture(scope="session")
def comfyui(tree, tmp_path_factory):
    """The running ComfyUI."""
    with closing(processes.ComfyUI(tree, tmp_path_factory.mktemp("comfyui"))) as running:
        yield running


@dataclass(frozen=True)
class Files:
    """One model, made by our command line.

    Attributes:
        original: in high precision.
        converted: in FP8, without input scales; ComfyUI then uses 1.0.
        calibrated: in FP8, after `--actcal --in-place`.
    """

    original: Path
    converted: Path
    calibrated: Path


def command(*words: str | Path) -> None:
    """Our command line."""
    assert main([*map(str, words), "--quiet"]) == 0


def reranged(path: Path, reranging: Reranging) -> Path:
    """A re-ranging of the emoji model in float32.

    In bfloat16 the cold one is a different network: its norms' scales are 1e-3, stored as 1 + (-0.999), and -0.999 is
    rounded to 1/256. ComfyUI computes in float32 on a CPU, so the file's values are used unchanged.
    """
    with open_checkpoint(emoji.WEIGHTS) as checkpoint:
        tensors = rerange({name: checkpoint.float32(name) for name in checkpoint.tensors}, reranging)
        write_checkpoint(path, {name: Entry.of(values) for name, values in tensors.items()})
    return path


@pytest.fixture(scope="session")
def files(comfyui, tmp_path_factory):
    """files("hot"): a re-ranging of the emoji model, converted and calibrated by our command line."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> Files:
        original = emoji.WEIGHTS
        if name != "plain":
            original = reranged(folder / f"{name}.safetensors", RERANGINGS[name])
        made = Files(original, *(folder / f"{name}_{kind}.safetensors" for kind in ("fp8", "fp8_calibrated")))
        command("-i", original, "-o", made.converted)
        # The least that observes every kind of noise conditioning; more samples change little here.
        # Without headroom every layer has a scale of its own, which a reader cannot mistake for another's.
        tight = ("--actcal-margin", "1") if name == "plain" else ()
        shutil.copy(made.converted, made.calibrated)
        command("-i", made.calibrated, "--in-place", "--actcal", "--actcal-samples", "8", *tight)
        return made

    return make


@pytest.fixture(scope="session")
def server(tree, files, tmp_path_factory):
    """A server with our pack, the emoji model, and its hot re-ranging in 16 bits and FP8, also under the names in the
    example workflows; `stand_ins.py` has its text encoders and VAE.
    """
    work = tmp_path_factory.mktemp("server")
    for folder in (
        "custom_nodes",
        "models/diffusion_models/sub",
        "models/text_encoders",
        "models/vae",
        "input",
        "output",
    ):
        (work / folder).mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("stand_ins.py"), work / "custom_nodes")
    command("comfyui", "install", work)
    for name in ("text_encoders/clip_l", "text_encoders/t5xxl_fp16", "vae/ae"):
        (work / "models" / f"{name}.safetensors").touch()
    made = {"plain": emoji.WEIGHTS}
    for name in ("sub/hot", "flux1-dev"):
        made |= {name: files("hot").original, f"{name}-fp8": files("hot").converted}
    for name, path in made.items():
        shutil.copy(path, work / "models" / "diffusion_models" / f"{name}.safetensors")
    with closing(processes.Server(tree, work, "--supports-fp8-compute")) as running:
        yield running


@pytest.fixture(scope="session")
def changed():
    """changed(path, output, change): a changed copy of a file, made by the safetensors package; without configs,
    it has no header entry.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    def make(path: Path, output: Path, change: Change) -> Path:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {}).get(HEADER, '{"layers": {}}'))
        change(tensors, header["layers"])
        save_file(tensors, output, {HEADER: json.dumps(header)} if header["layers"] else {})
        return output

    return make


def calibrated_like(files: Files, converted: Path, output: Path) -> Path:
    """Copy the calibrated scales and precisions to a file of the same model in another convention."""
    from convert_to_quant.layers import find_layers, input_scale
    from convert_to_quant.patch import LayerChange, plan_patch, rewrite

    with open_checkpoint(files.calibrated) as source, open_checkpoint(converted) as target:
        table, wanted = find_layers(target), find_layers(source).quantized
        changes = {
            table.prefix + name: LayerChange(input_scale(source, layer), layer.full_precision)
            for name, layer in wanted.items()
        }
        rewrite(plan_patch(target, table, changes), output)
    return output


def put_prefixes(tensors: dict[str, Any], _configs: object) -> None:
    for name in list(tensors):
        tensors[PREFIX + name] = tensors.pop(name)


def keep_the_header(tensors: dict[str, Any], _configs: object) -> None:
    for name in [name for name in tensors if name.endswith(".comfy_quant")]:
        del tensors[name]


def disagree(_tensors: object, configs: dict[str, Any]) -> None:
    for number, entry in enumerate(configs.values()):
        entry["full_precision_matrix_mult"] = number % 3 == 0


CHANGES: Mapping[str, Change] = {
    "header only": keep_the_header,
    "tensors only": lambda _, configs: configs.clear(),
    "header disagrees": disagree,
    "without FP8 products": lambda tensors, _: tensors.update(scaled_fp8=tensors["scaled_fp8"].new_zeros(2)),
}


@pytest.fixture(scope="session")
def in_convention(files, changed, tmp_path_factory):
    """in_convention("prefixed header only"): the calibrated plain model in a convention."""
    folder = tmp_path_factory.mktemp("conventions")

    @cache
    def make(name: str) -> Path:
        if name == "default":
            return files("plain").calibrated
        path, source = folder / f"{name.replace(' ', '_')}.safetensors", emoji.WEIGHTS
        if "prefixed" in name:
            source = changed(source, folder / "prefixed_bf16.safetensors", put_prefixes)
        converted, before = folder / "converted.safetensors", folder / "before.safetensors"
        command("-i", source, "-o", converted, *(["--legacy"] if "legacy" in name else []))
        change = next((change for words, change in CHANGES.items() if words in name), None)
        if change is None:
            return calibrated_like(files("plain"), converted, path)
        return changed(calibrated_like(files("plain"), converted, before), path, change)

    return make


def to_tokens(latents: Tensor) -> Tensor:
    """ComfyUI's latents [B, 16, H, W] as the model's tokens [B, H/2 · W/2, 64]."""
    return latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def to_latents(tokens: Tensor) -> Tensor:
    """The inverse of `to_tokens`."""
    side = emoji.SIDE_TOKENS
    split = tokens.unflatten(1, (side, side)).unflatten(3, (-1, 2, 2))
    return split.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Ours:
    """The same runs in our own engine."""

    geometry: Any
    steps, guidance = STEPS, GUIDANCE

    def __init__(self) -> None:
        import torch

        from convert_to_quant.engines import noise
        from convert_to_quant.families.running import Geometry

        self.geometry = Geometry(emoji.SIDE_TOKENS, emoji.SIDE_TOKENS)
        context, pooled = embed_all(PROMPTS)
        self.context, self.pooled = torch.from_numpy(context), torch.from_numpy(pooled)
        size = (emoji.SIDE_TOKENS**2, 64)
        self.noise = torch.cat([noise.latents(size, SEED, number) for number in range(len(PROMPTS))])

    @contextmanager
    def load(self, path: Path, arithmetic: Arithmetic, dtype: torch.dtype, **how: Any) -> Iterator[Denoiser]:
        """The model."""
        from convert_to_quant.engines import diffusers

        with open_checkpoint(path) as checkpoint:
            yield diffusers.load(checkpoint, arithmetic=arithmetic, dtype=dtype, **how)

    def start(self) -> dict[str, Tensor]:
        """ComfyUI's inputs at the start of sampling."""
        return {"x": to_latents(self.noise), "context": self.context, "y": self.pooled}

    def states(self) -> dict[str, Tensor]:
        """Inputs for both engines: noisy latents on the original's trajectory, every prompt at every noise level."""
        import torch

        tokens, prompts = [], []
        with self.load(emoji.WEIGHTS, "dequantize", torch.float32) as model:
            x = self.noise
            for step in range(STEPS):
                sigma = 1 - step / STEPS
                if sigma in SIGMAS:
                    tokens.append(x)
                    prompts += [(sigma, number) for number in range(len(PROMPTS))]
                x = x - self.guided(model, x, sigma) / STEPS
        chosen = [number for _, number in prompts]
        return {
            "x": to_latents(torch.cat(tokens)),
            "sigma": torch.tensor([sigma for sigma, _ in prompts]),
            "context": self.context[chosen],
            "y": self.pooled[chosen],
        }

    @staticmethod
    def db(wanted: Tensor, found: Tensor) -> float:
        """10 log10(Σ wanted² / Σ (wanted - found)²), over everything; infinite where they are equal."""
        error = float((wanted.double() - found.double()).square().sum())
        return 10 * math.log10(float(wanted.double().square().sum()) / error) if error else math.inf

    @staticmethod
    def sqnr_db(wanted: Tensor, found: Tensor) -> float:
        """Mean over evaluations, as in `fidelity`."""
        from convert_to_quant.fidelity import sqnr_db

        return float(sqnr_db(wanted, found).mean())

    def outputs(
        self, path: Path, seen: Mapping[str, Tensor], dtype: torch.dtype, adapters: Any = None,
        in_floats: Collection[str] = (), **how: Any,
    ) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:  # fmt: skip
        """Outputs of ComfyUI (`evaluate` with `record`) and ours for its inputs, by module and first layer."""
        import torch

        found = {}
        with self.load(path, dtype=dtype, **how) as model, model.adapted(adapters):
            for module, linear in model.linears.items():
                pieces = linear.stored.pieces
                if in_floats:
                    linear.full_precision = linear.stored.layer.weight_scale is None or pieces[0][0].name in in_floats
                theirs = torch.cat([seen[f"{layer.name}.out"][..., rows] for layer, rows in pieces], -1)
                found[module, pieces[0][0].name] = (theirs, linear(seen[f"{pieces[0][0].name}.in"]))
        return found

    def evaluate(self, path: Path, states: Mapping[str, Tensor], arithmetic: Arithmetic, dtype: torch.dtype) -> Tensor:
        """Velocities like `states["x"]`."""
        import torch

        tokens, velocities = to_tokens(states["x"]), torch.empty_like(states["x"])
        with self.load(path, arithmetic, dtype) as model:
            for sigma in states["sigma"].unique():
                rows = states["sigma"] == sigma
                found = self.velocity(model, tokens[rows], float(sigma), states["context"][rows], states["y"][rows])
                velocities[rows] = to_latents(found)
        return velocities

    def velocity(self, model: Denoiser, tokens: Tensor, sigma: float, context: Tensor, pooled: Tensor) -> Tensor:
        """One evaluation, of a batch."""
        conditioning = {"encoder_hidden_states": context, "pooled_projections": pooled}
        return model.velocity(tokens, sigma, conditioning, self.geometry)

    def guided(self, model: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """The velocity of all prompts under guidance, with zeros as the negative conditioning."""
        import torch

        context = torch.cat([self.context, torch.zeros_like(self.context)])
        pooled = torch.cat([self.pooled, torch.zeros_like(self.pooled)])
        positive, negative = self.velocity(model, torch.cat([x, x]), sigma, context, pooled).chunk(2)
        return negative + self.guidance * (positive - negative)


@pytest.fixture(scope="session")
def ours(comfyui):
    """Our engine, on one thread, like ComfyUI's process: more are slower on a machine that has other work."""
    import torch

    torch.set_num_threads(1)
    return Ours()


@pytest.fixture(scope="session")
def states(ours):
    """Noisy latents on the original's way with their prompts, as ComfyUI takes them."""
    return ours.states()
