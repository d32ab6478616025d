"""Shared by the accuracy benchmarks: six variants of the emoji model, two lists of prompts, and ways to run them.

Five variants come from `convert_to_quant.emoji.rerange`. The sixth, "outlier-tokens", imitates outlier tokens as
published for Z-Image: inputs of its MLP's second layer reach 6.6e4 among others of 1 to 30. One scale per tensor then
generates noise, scales per token do not, and the error over the whole tensor looks harmless.

How "outlier-tokens" is made. In four layers, the two hidden units of an MLP that contribute least to its output are
removed (their mean goes into the bias), and replaced with two that cancel:

    unit i:  K · (u·x - t)        read with weights  w
    unit j:  K/8 · (u·x - t)      read with weights  -8 w

u are the signs of another unit's weights, t is the value that one token in a hundred exceeds, and K = 1024. After GELU
both are 0 for all other tokens. For an outlier token they are K·a and K·a/8, up to GELU's bend near 0, which adds less
than 1.4 · w to the output; the pair adds w·K·a - 8w·K·a/8 = 0. All factors are powers of two, so a pair quantized with
one scale still cancels, unless it is clipped: then the output is off by 7 w · clip. So a scale must cover the outlier
tokens, and then it loses the others. K = 1024 is the limit of the first layer's weights in FP8 with one scale: it costs
them 1 dB.

The change is exact except for the removed units. `python benchmarks/emoji_models.py` measures it.

Limits. u was chosen among units that have outlier tokens about as often on noise. Outlier tokens of real prompts alone
would be missed by a calibration on noise; see docs/accuracy.md for the cost.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convert_to_quant import names
from convert_to_quant.calibrate_activation_scales import calibrate_model
from convert_to_quant.checkpoint import Checkpoint, Entry, open_checkpoint, write_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.emoji import SIDE_TOKENS, WEIGHTS, prompts
from convert_to_quant.emoji.rerange import RERANGINGS, write_reranged
from convert_to_quant.engines import noise
from convert_to_quant.engines.denoiser import Denoiser, load
from convert_to_quant.engines.quantized_linear import Arithmetic
from convert_to_quant.families.running import Geometry
from convert_to_quant.fidelity import Fidelity, velocity_fidelity
from convert_to_quant.formats.record import narrow_bfloat16
from convert_to_quant.headroom import column_energies
from convert_to_quant.layers import find_layers
from convert_to_quant.options import CalibrationOptions, ConvertOptions, SolveOptions
from convert_to_quant.recorder import record
from convert_to_quant.solve import LayerResult, Present, solve
from convert_to_quant.stats import Statistics

Float32 = NDArray[np.float32]

GEOMETRY = Geometry(height=SIDE_TOKENS, width=SIDE_TOKENS, frames=1, text_tokens=prompts.TOKENS)
GUIDANCE = 2.0
LEVELS = 8
HELD_OUT_SEED, CALIBRATION_SEED = 43, 1234  # the first is that of `check`

CALIBRATION_PROMPTS = (
    "rocket", "dog face", "slice of pizza", "red apple", "guitar", "thumbs up sign", "full moon symbol", "cactus",
    "birthday cake", "pig face", "water wave", "ghost", "high-heeled shoe", "alarm clock", "mushroom", "bus",
    "money bag", "smiling face with sunglasses", "octopus", "cherry blossom", "fire engine", "trophy", "koala",
    "candle", "ear of maize", "racing car", "crying face", "envelope", "violin", "lion face", "toolbox",
    "umbrella with rain drops",
)  # fmt: skip
HELD_OUT_PROMPTS = prompts.HELD_OUT

LOUDER = 1024.0
"""K: largest weight of an outlier unit."""
QUIETER = 8.0
"""Ratio of the first unit of a pair to the second."""
READ_WITH = 2.0**-5
"""w: absolute weight that reads the first unit."""


@dataclass(frozen=True)
class OutlierPair:
    """Two hidden units of an MLP that become outliers for one token in a hundred.

    Attributes:
        first, second: layers of the MLP; its hidden units are the last rows of one and the last columns of the other.
        units: the two units with the least output -> their mean over real prompts.
        listens_to: the unit whose weights' signs are u.
        threshold: t, over real prompts.
    """

    first: str
    second: str
    units: Mapping[int, float]
    listens_to: int
    threshold: float


OUTLIER_PAIRS = (
    OutlierPair("double_blocks.1.img_mlp.0", "double_blocks.1.img_mlp.2", {995: -0.0963, 12: -0.0761}, 858, 21.5),
    OutlierPair("single_blocks.0.linear1", "single_blocks.0.linear2", {116: -0.0967, 739: -0.0868}, 185, 18.2),
    OutlierPair("single_blocks.2.linear1", "single_blocks.2.linear2", {299: -0.0841, 159: -0.0795}, 450, 17.5),
    OutlierPair("single_blocks.3.linear1", "single_blocks.3.linear2", {31: -0.1002, 457: -0.0968}, 1018, 14.1),
)

OUTLIER_TOKENS = "outlier-tokens"
VARIANTS = (*RERANGINGS, OUTLIER_TOKENS)


def remove_quiet_units(tensors: dict[str, Float32]) -> None:
    """Remove the units that `add_outlier_units` replaces, in place. Only this step is not exact."""
    for pair in OUTLIER_PAIRS:
        weight_OI, bias_O, hidden = (
            tensors[pair.second + names.WEIGHT],
            tensors[pair.second + names.BIAS],
            _hidden(tensors),
        )
        for unit, mean in pair.units.items():
            column = weight_OI.shape[1] - hidden + unit
            bias_O += np.float32(mean) * weight_OI[:, column]
            weight_OI[:, column] = 0


def add_outlier_units(tensors: dict[str, Float32]) -> None:
    """Replace the removed units with pairs that cancel, in place."""
    hidden = _hidden(tensors)
    for number, pair in enumerate(OUTLIER_PAIRS):
        weight_HI, bias_H = (tensors[pair.first + suffix][-hidden:] for suffix in (names.WEIGHT, names.BIAS))
        read_OH = tensors[pair.second + names.WEIGHT][:, -hidden:]
        signs_I = np.sign(weight_HI[pair.listens_to])
        signs_O = np.sign(np.random.default_rng(number).standard_normal(len(read_OH))).astype(np.float32)
        for unit, quieter in zip(pair.units, (1.0, QUIETER), strict=True):
            weight_HI[unit] = np.float32(LOUDER / quieter) * signs_I
            bias_H[unit] = -LOUDER / quieter * pair.threshold
            read_OH[:, unit] = signs_O * np.float32(READ_WITH if quieter == 1 else -READ_WITH * quieter)


def _hidden(tensors: Mapping[str, Float32]) -> int:
    """Number of hidden units of an MLP."""
    return len(tensors["double_blocks.0.img_mlp.0" + names.WEIGHT])


def write_variant(variant: str, path: Path) -> None:
    """Write a variant of the model: bfloat16 weights, and float32 biases if it is re-ranged."""
    if variant != OUTLIER_TOKENS:
        write_reranged(WEIGHTS, path, RERANGINGS[variant])
        return
    with open_checkpoint(WEIGHTS) as checkpoint:
        tensors = {name: checkpoint.float32(name) for name in checkpoint.tensors}
        remove_quiet_units(tensors)
        add_outlier_units(tensors)
        write_checkpoint(
            path,
            {name: Entry.of(narrow_bfloat16(values), "BF16") for name, values in tensors.items()},
            checkpoint.metadata,
        )


def conditioning(model: Denoiser, prompt_names: Sequence[str], geometry: Geometry = GEOMETRY) -> dict[str, Tensor]:
    """Prompts as a model's inputs, each [prompts, ...]: tokens, and a pooled vector if it has that input."""
    context, pooled = (torch.from_numpy(part) for part in prompts.embed_all(prompt_names))
    return {
        name: torch.ones(len(context), *signal.shape, dtype=torch.int64) if signal.kind == "mask"
        else context if len(signal.shape) > 1 else pooled
        for name, signal in model.signals(geometry).items()
    }  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """How quantized layers compute.

    Attributes:
        scales: input scale by layer; 1.0 if missing.
        full_precision: layers whose inputs are not quantized.
        arithmetic: of the others.
    """

    scales: Mapping[str, float]
    full_precision: Set[str] = frozenset()
    arithmetic: Arithmetic = "comfyui"


class Models:
    """One variant of the model: the reference in float32, and the FP8 model with adjustable layers."""

    def __init__(
        self, variant: str, source: Checkpoint, checkpoint: Checkpoint, device: str, geometry: Geometry = GEOMETRY
    ) -> None:
        self.variant = variant
        self.checkpoint = checkpoint
        self.geometry = geometry
        self.table = find_layers(checkpoint)
        self.present = {
            name: Present(1.0, False, layer.shape, column_energies=column_energies(checkpoint, layer))
            for name, layer in self.table.quantized.items()
        }
        self.reference = load(source, device=device, dtype=torch.float32)
        self.quantized = load(checkpoint, device=device, dtype=torch.float32, arithmetic="comfyui")

    def set(self, choice: Choice) -> Denoiser:
        """The FP8 model with these scales."""
        for module in self.quantized.linears.values():
            name = module.stored.layer.name
            if name in self.present:
                module.arithmetic = choice.arithmetic
                module.full_precision = name in choice.full_precision
                module.input_scale.fill_(choice.scales.get(name, 1.0))
        return self.quantized

    def fidelity(
        self, choice: Choice, prompt_names: Sequence[str] = HELD_OUT_PROMPTS, levels: int = LEVELS
    ) -> Fidelity:
        """Velocity fidelity on prompts.

        With dynamic scales per tensor the model runs one image and its negative at a time, as in a sampler.
        """
        return velocity_fidelity(
            self.reference,
            self.set(choice),
            conditioning(self.reference, prompt_names, self.geometry),
            self.geometry,
            guidance=GUIDANCE,
            steps=levels,
            seed=HELD_OUT_SEED,
            batch=1 if choice.arithmetic == "dynamic_tensor" else len(prompt_names),
        )

    def seen_on(self, prompt_names: Sequence[str] = CALIBRATION_PROMPTS, levels: int = LEVELS) -> Statistics:
        """Statistics of the FP8 layers, with inputs not quantized, while sampling real prompts."""
        model = self.set(Choice({}, frozenset(self.present)))
        feeds = {name: module.stored.layer.name for name, module in model.linears.items()}
        feeds = {name: layer for name, layer in feeds.items() if layer in self.present}
        shapes = {name: state.shape for name, state in self.present.items()}
        with record(model.model, shapes, feeds) as recording:
            for _ in guided_way(model, prompt_names, self.geometry, levels=levels, at=recording.at):
                pass
            return recording.statistics(len(prompt_names))

    def solve(self, statistics: Statistics, options: SolveOptions) -> list[LayerResult]:
        """Scales and precision of the FP8 layers."""
        return solve(statistics, self.present, options)

    def calibrated(self, **options: object) -> list[LayerResult]:
        """Results of `--actcal`."""
        return calibrate_model(self.checkpoint, CalibrationOptions(**options)).results  # type: ignore[arg-type]


@dataclass(frozen=True)
class Guided:
    """One step of sampling under guidance. Tensors are [2 · prompts, ...]: all prompts, then as many empty ones."""

    latents: Tensor
    sigma: float
    conditioning: Mapping[str, Tensor]
    velocity: Tensor


def with_nothing(words: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prompts, then as many empty ones, as under guidance; masks hide nothing."""
    return {
        name: torch.cat([value, torch.zeros_like(value) if value.is_floating_point() else value])
        for name, value in words.items()
    }


def guided_way(
    model: Denoiser, prompt_names: Sequence[str], geometry: Geometry = GEOMETRY, *,
    levels: int = LEVELS, seed: int = CALIBRATION_SEED, latents: Tensor | None = None,
    at: Callable[[float], object] = lambda _: None, batch: int = 8,
) -> Iterator[Guided]:  # fmt: skip
    """Sample emoji under guidance, from given latents or those of a seed; calls `at` with each noise level."""
    shape = model.latent_shape(geometry)
    if latents is None:
        latents = torch.cat([noise.latents(shape, seed, number) for number in range(len(prompt_names))])
    for start in range(0, len(prompt_names), batch):
        fed = with_nothing(conditioning(model, prompt_names[start : start + batch], geometry))
        state = latents[start : start + batch]
        for step in range(levels):
            sigma = 1 - step / levels
            at(sigma)
            both = torch.cat([state, state])
            velocity = model.velocity(both, sigma, fed, geometry)
            yield Guided(both, sigma, fed, velocity)
            positive, negative = velocity.chunk(2)
            state = state - (negative + GUIDANCE * (positive - negative)) / levels


@contextmanager
def checkpoint_of(variant: str) -> Iterator[Checkpoint]:
    """A variant by its name, or the model of a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(variant)
        if variant in VARIANTS:
            path = Path(folder, "source.safetensors")
            write_variant(variant, path)
        with open_checkpoint(path) as checkpoint:
            yield checkpoint


@contextmanager
def models(variant: str, device: str = "cpu", geometry: Geometry = GEOMETRY) -> Iterator[Models]:
    """A variant by its name, or the model of a file: the original and in FP8."""
    with checkpoint_of(variant) as checkpoint, tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "fp8.safetensors")
        convert(checkpoint, plan_conversion(checkpoint, ConvertOptions()), output)
        with open_checkpoint(output) as quantized:
            yield Models(variant, checkpoint, quantized, device, geometry)


def scales_of(results: Sequence[LayerResult]) -> dict[str, float]:
    """Input scale by layer."""
    return {result.layer: result.scale_after for result in results}


def full_precision_of(results: Sequence[LayerResult]) -> frozenset[str]:
    """Layers that compute in full precision."""
    return frozenset(result.layer for result in results if result.full_precision_after)


def choice_of(results: Sequence[LayerResult], *, full_precision: bool = True) -> Choice:
    """Results as they are, or their scales alone."""
    return Choice(scales_of(results), full_precision_of(results) if full_precision else frozenset())


def outlier_tokens_are_close() -> dict[str, float]:
    """Velocity SQNR in dB, in float32, between the original model and the stages of "outlier-tokens"."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        original = stack.enter_context(open_checkpoint(WEIGHTS))
        tensors = {name: original.float32(name) for name in original.tensors}
        stages = [load(original, dtype=torch.float32)]
        for change in (remove_quiet_units, add_outlier_units):
            change(tensors)
            path = Path(folder, f"{len(stages)}.safetensors")
            write_checkpoint(path, {name: Entry.of(values) for name, values in tensors.items()}, {})
            stages.append(load(stack.enter_context(open_checkpoint(path)), dtype=torch.float32))
        trained, removed, added = stages
        pairs = {
            "original, units removed": (trained, removed),
            "units removed, pairs added": (removed, added),
            "original, outlier-tokens": (trained, added),
        }
        given = conditioning(trained, HELD_OUT_PROMPTS[:16])
        return {
            name: velocity_fidelity(
                *pair, given, GEOMETRY, guidance=GUIDANCE, steps=LEVELS, seed=HELD_OUT_SEED
            ).sqnr_db
            for name, pair in pairs.items()
        }  # fmt: skip


if __name__ == "__main__":
    for comparison, sqnr_db in outlier_tokens_are_close().items():
        print(f"{comparison}: {sqnr_db:.1f} dB")
