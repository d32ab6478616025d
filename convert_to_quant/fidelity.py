"""How close a quantized model stays to its reference, measured by running both.

Errors of single layers say little about the image: they cancel, add up, or hit what does not matter. A sampler uses the
predicted velocity, so velocities are compared at the states that the reference passes through, and finally the latents
that each model reaches by its own steps.

Maths. Euler steps of flow matching from sigma 1 to 0: x -= velocity / steps. At every noise level both models see the
same state. With the predictions v of the reference and u of the quantized model for one prompt

    SQNR = 10 log10(Σ v² / Σ (v - u)²) dB

and, under classifier-free guidance, its mean over both predictions (with the prompt and without). Averages are over
prompts, in dB; spreads are standard errors of that mean. The state moves by v_negative + guidance · (v - v_negative).
The PSNR of the final latents is 10 log10(range² / mean squared difference), with the range of the reference's latents.

On noise. A check on the data of the calibration checks nothing, so `noise_scenes` shares only white latents with
`engines.noise`: it draws from other random streams whatever the seed, gives each prompt a magnitude anywhere in
`MAGNITUDES` where calibration has fixed ones, pads every second prompt with zeros from a random length on, and uses two
sizes. Its results differ from those of real prompts: see `OFF_BY_DB`.

Per layer, on request, the reference's layer and the quantized one get the reference's input, and their outputs are
compared token by token: ‖y - y'‖ / ‖y‖. An error over the whole tensor hides lost tokens behind a few outlier tokens,
so the means over all tokens and over the worst 1 % are reported too.

NaN and infinity in the output of a linear layer, a velocity, or the final latents of either model are refused, even if
the rest of the model hides them; the error names the file, the first such layer, and the noise level. Ratios are
limited to ±`EXACT_DB`: no difference, and any difference from zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .engines import noise
from .engines.diffusers import BATCH_TOKENS, Denoiser
from .engines.quantized_linear import CheckpointLinear
from .errors import CalibrationError, OptionError
from .families.running import Geometry
from .kernels import BINS, NONFINITE_BIN
from .stats import BIN_CENTRES
from .telling import Progress

TINY = torch.finfo(torch.float32).tiny
"""Replaces the square of an output that is zero."""

LATENTS_STREAM, CONDITIONING_STREAM = 2, 3
"""Random streams; calibration uses 0 and 1 (`engines.noise`)."""

OFF_BY_DB = 13
"""Largest difference seen between noise and real prompts: 19.9 dB against 33.1 on a Z-Image-shaped model."""

MAGNITUDES = (0.5, 3.0)
"""Standard deviations of noise prompts, log-uniform; calibration uses 0, 1 with outlier channels, and 4."""

WORST_SHARE = 0.01
"""Share of a layer's tokens that count as its worst."""

EXACT_DB = 300.0
"""Ratio of equal tensors, for which the formula gives infinity; negative, of zeros and anything else."""


@dataclass(frozen=True)
class Level:
    """Velocity fidelity at one noise level.

    Attributes:
        sqnr_db: mean over prompts.
        standard_error_db: of that mean; 0 for one prompt.
        worst_db: of the worst prompt.
    """

    sigma: float
    sqnr_db: float
    standard_error_db: float
    worst_db: float


@dataclass(frozen=True)
class Size:
    """Velocity fidelity at one size, over all noise levels.

    Attributes:
        sqnr_db: mean over prompts and noise levels.
        worst_db: of the worst prompt and noise level.
    """

    geometry: Geometry
    sqnr_db: float
    worst_db: float


@dataclass(frozen=True)
class Scene:
    """Inputs of both models at one size.

    Attributes:
        latents: at sigma 1, [prompts, ...].
        conditioning: by name, each [prompts, ...].
        geometry: of the images.
        negative: conditioning of the empty prompt under guidance, each [1, ...] or [prompts, ...]. By default zeros for
            embeddings, and the masks and numbers of the first prompt.
        batch: prompts that run together.
    """

    latents: Tensor
    conditioning: Mapping[str, Tensor]
    geometry: Geometry
    negative: Mapping[str, Tensor] | None = None
    batch: int = 8


@dataclass(frozen=True)
class LayerError:
    """Error of one layer's output, given the reference's inputs.

    Attributes:
        layer: the quantized checkpoint's layer.
        rows: tokens compared; each part of a fused layer counts.
        mean: mean over tokens of ‖y - y'‖ / ‖y‖.
        worst: the same over the worst 1 % of tokens.
        whole: ‖Y - Y'‖ / ‖Y‖ over the whole tensor.
    """

    layer: str
    rows: int
    mean: float
    worst: float
    whole: float


@dataclass(frozen=True)
class Fidelity:
    """How close a quantized model stays to its reference.

    Attributes:
        sqnr_db: of the velocity, mean over prompts, sizes and noise levels.
        standard_error_db: of that mean, over prompts.
        worst_db: of the worst prompt and noise level.
        levels: per noise level, from noise to image.
        sizes: per size, in the order of the scenes.
        psnr_db: of the final latents, mean over prompts.
        psnr_standard_error_db: of that mean.
        prompts, steps, guidance: as run.
        layers: per-layer errors, the worst layer first; empty if not requested.
    """

    sqnr_db: float
    standard_error_db: float
    worst_db: float
    levels: tuple[Level, ...]
    sizes: tuple[Size, ...]
    psnr_db: float
    psnr_standard_error_db: float
    prompts: int
    steps: int
    guidance: float
    layers: tuple[LayerError, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)


def sqnr_db(reference: Tensor, other: Tensor) -> Tensor:
    """10 log10(Σ reference² / Σ (reference - other)²) per sample.

    Args:
        reference: [batch, ...].
        other: the same shape.

    Returns:
        float64 [batch]; `EXACT_DB` if equal, NaN if either is not finite.

    >>> sqnr_db(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]])).item()
    20.0
    """
    signal = reference.double().flatten(1).square().sum(1)
    error = (reference.double() - other.double()).flatten(1).square().sum(1)
    return _ratio_db(signal, error)


def psnr_db(reference: Tensor, other: Tensor, peak: float | None = None) -> Tensor:
    """10 log10(peak² / mean squared difference) per sample.

    Args:
        reference: [batch, ...].
        other: the same shape.
        peak: by default the range of the reference.

    Returns:
        float64 [batch]; `EXACT_DB` if equal, NaN if either is not finite.
    """
    flat = reference.double().flatten(1)
    error = (flat - other.double().flatten(1)).square().mean(1)
    signal = (flat.amax(1) - flat.amin(1)).square() if peak is None else torch.full_like(error, peak**2)
    return _ratio_db(signal, error)


def _ratio_db(signal: Tensor, error: Tensor) -> Tensor:
    """10 log10(signal / error) within ±`EXACT_DB`; NaN if either is not finite."""
    ratio = torch.where(error == 0, EXACT_DB, 10 * torch.log10(signal / error)).clamp(-EXACT_DB, EXACT_DB)
    return torch.where(signal.isfinite() & error.isfinite(), ratio, math.nan)


def velocity_fidelity(
    reference: Denoiser,
    quantized: Denoiser,
    conditioning: Mapping[str, Tensor],
    geometry: Geometry,
    *,
    negative: Mapping[str, Tensor] | None = None,
    guidance: float = 1.0,
    steps: int = 8,
    seed: int = 43,
    batch: int = 8,
    layer_errors: bool = False,
    progress: Progress | None = None,
) -> Fidelity:
    """Compare two models on prompts at one size, as `check` does, from latents that calibration never uses.

    Args:
        reference: the original model.
        quantized: the same model, quantized.
        conditioning: see `Scene`.
        geometry: see `Scene`.
        negative: see `Scene`.
        guidance: strength of classifier-free guidance; 1 is off.
        steps: noise levels.
        seed: of the latents.
        batch: see `Scene`.
        layer_errors: also compare the output of every quantized layer.
        progress: called with the evaluated noise levels over all prompts.

    Returns:
        The comparison.

    Raises:
        OptionError, CalibrationError: see `scenes_fidelity`.
    """
    prompts = len(next(iter(conditioning.values()), ()))
    latents = check_latents(reference, geometry, prompts, seed) if prompts else torch.empty(0)
    scene = Scene(latents, conditioning, geometry, negative, batch)
    return scenes_fidelity(
        reference, quantized, [scene], guidance=guidance, steps=steps, layer_errors=layer_errors, progress=progress
    )


@torch.no_grad()
def scenes_fidelity(
    reference: Denoiser,
    quantized: Denoiser,
    scenes: Sequence[Scene],
    *,
    guidance: float = 1.0,
    steps: int = 8,
    layer_errors: bool = False,
    progress: Progress | None = None,
    finished: Callable[[Tensor, Tensor], None] | None = None,
) -> Fidelity:
    """Run a reference and a quantized model side by side and compare them.

    Args:
        reference: the original model.
        quantized: the same model, quantized.
        scenes: their inputs, one or more.
        guidance: strength of classifier-free guidance; 1 is off and halves the work.
        steps: noise levels.
        layer_errors: also compare the output of every quantized layer.
        progress: called with the evaluated noise levels over all prompts.
        finished: called with the final latents of the reference and the quantized model, batch by batch.

    Returns:
        The comparison.

    Raises:
        OptionError: no prompts, fewer than one step, or a batch below 1.
        CalibrationError: a layer's output, a velocity or the final latents are not finite.
    """
    counts = [len(scene.latents) for scene in scenes]
    prompts, least = sum(counts), min([steps, len(counts), *counts, *(scene.batch for scene in scenes)])
    if least < 1:
        raise OptionError(f"prompts, steps and batch should be at least 1, found {least}")
    ratios_db = torch.zeros(prompts, steps, dtype=torch.float64)
    final_db = torch.zeros(prompts, dtype=torch.float64)
    done, errors = 0, _TokenErrors()
    with ExitStack() as hooks:
        sides = _Side("reference", reference, hooks), _Side("quantized model", quantized, hooks)
        if layer_errors:
            errors.compare_layers(reference, quantized, hooks)
        for place, start, guided in _batches(scenes, guidance):
            chosen, state, own_state = slice(place, place + len(start)), start, start
            for step in range(steps):
                sigma = 1 - step / steps
                wanted = guided.predictions(reference, state, sigma)
                sides[0].require_finite(wanted, "the velocity", sigma)
                found = guided.predictions(quantized, state, sigma)
                own = found if own_state is state else guided.predictions(quantized, own_state, sigma)
                for velocity in (found, own):
                    sides[1].require_finite(velocity, "the velocity", sigma)
                ratios = sqnr_db(wanted.flatten(0, 1), found.flatten(0, 1))
                ratios_db[chosen, step] = ratios.reshape(wanted.shape[:2]).mean(1).cpu()
                state = state - guided.velocity(wanted) / steps
                own_state = own_state - guided.velocity(own) / steps
                done += len(state)
                if progress is not None:
                    progress(done, prompts * steps)
            for side, latents in zip(sides, (state, own_state), strict=True):
                side.require_finite(latents, "a latent", 0.0)
            final_db[chosen] = psnr_db(state, own_state).cpu()
            if finished is not None:
                finished(state, own_state)
    levels = tuple(
        Level(1 - step / steps, *mean_and_error(ratios_db[:, step]), float(ratios_db[:, step].min()))
        for step in range(steps)
    )
    sizes = tuple(
        Size(scene.geometry, float(part_db.mean()), float(part_db.min()))
        for scene, part_db in zip(scenes, torch.split(ratios_db, counts), strict=True)
    )
    return Fidelity(
        *mean_and_error(ratios_db.mean(1)),
        float(ratios_db.min()),
        levels,
        sizes,
        *mean_and_error(final_db),
        prompts,
        steps,
        guidance,
        errors.results(),
    )


def _batches(scenes: Sequence[Scene], guidance: float) -> Iterator[tuple[int, Tensor, _Guided]]:
    """The number of the first prompt, latents and conditioning of each batch."""
    place = 0
    for scene in scenes:
        prompts, sides = len(scene.latents), [scene.conditioning]
        if guidance != 1:
            negative = scene.negative or {name: _empty_prompt(value) for name, value in scene.conditioning.items()}
            sides.append({n: negative[n].expand(prompts, *negative[n].shape[1:]) for n in scene.conditioning})
        for start in range(0, prompts, scene.batch):
            chosen = slice(start, start + scene.batch)
            shown = [{name: value[chosen] for name, value in side.items()} for side in sides]
            yield place + start, scene.latents[chosen], _Guided(shown, guidance, scene.geometry)
        place += prompts


class _Side:
    """One of the two models, whose layers are watched, since attention may hide NaN."""

    def __init__(self, name: str, model: Denoiser, hooks: ExitStack) -> None:
        self.name = name
        self.model = model
        self.finite: dict[str, Tensor] = {}
        for module in model.linears.values():
            hook = partial(self.watch, module.stored.layer.name)
            hooks.callback(module.register_forward_hook(hook).remove)

    def watch(self, layer: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.finite[layer] = output.isfinite().all() & self.finite.get(layer, True)

    def require_finite(self, values: Tensor, what: str, sigma: float) -> None:
        """Refuse values, and outputs of layers since the last call, that are not finite.

        Raises:
            CalibrationError: some are not.
        """
        bad = next((layer for layer, finite in self.finite.items() if not finite), None)
        if bad is None and values.isfinite().all():
            self.finite.clear()
            return
        raise CalibrationError(
            f"{'the output of this layer' if bad else what} in the {self.name} is not finite at sigma {sigma:.3g}",
            path=next((module.stored.checkpoint.path for module in self.model.linears.values()), None),
            tensor=bad,
            hint="convert_to_quant inspect may find the cause",
        )


def _empty_prompt(value: Tensor) -> Tensor:
    """The empty prompt's conditioning [1, ...]: zeros for embeddings, the first prompt's for masks and numbers."""
    is_embedding = value.is_floating_point() and value.ndim > 1
    return torch.zeros_like(value[:1]) if is_embedding else value[:1]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of [samples] and its standard error, which is 0 for one sample."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), error


@dataclass(frozen=True)
class _Guided:
    """The conditioning of a batch: the prompts and, under classifier-free guidance, the empty prompt."""

    sides: Sequence[Mapping[str, Tensor]]
    guidance: float
    geometry: Geometry

    def predictions(self, model: Denoiser, state: Tensor, sigma: float) -> Tensor:
        """The velocity predicted with each conditioning, [batch, 1 or 2, *latent shape]."""
        first, count = self.sides[0], len(self.sides)
        if any(side[name].shape != value.shape for side in self.sides for name, value in first.items()):
            # texts of different lengths
            return torch.stack([model.velocity(state, sigma, side, self.geometry) for side in self.sides], 1)
        together = {name: torch.cat([side[name] for side in self.sides]) for name in first}
        velocities = model.velocity(torch.cat([state] * count), sigma, together, self.geometry)
        return torch.stack(velocities.chunk(count), 1)

    def velocity(self, predictions: Tensor) -> Tensor:
        """The guided velocity, [batch, *latent shape]."""
        positive, negative = predictions[:, 0], predictions[:, -1]
        return negative + self.guidance * (positive - negative)


class _TokenErrors:
    """Token errors of every quantized layer, collected while the reference runs.

    Attributes:
        gathered: per layer, a histogram of relative errors, their sum, and the sums of squared errors and outputs.
    """

    def __init__(self) -> None:
        self.gathered: dict[str, Tensor] = {}

    def compare_layers(self, reference: Denoiser, quantized: Denoiser, hooks: ExitStack) -> None:
        """Compare outputs whenever the reference runs."""
        for name, twin in quantized.linears.items():
            if name in reference.linears and twin.stored.layer.format is not None:
                hook = partial(self.compare, twin)
                hooks.callback(reference.linears[name].register_forward_hook(hook).remove)

    def compare(self, twin: CheckpointLinear, _module: nn.Module, inputs: tuple[Tensor, ...], wanted: Tensor) -> None:
        self.add(twin.stored.layer.name, wanted, twin(inputs[0].to(twin.stored.device)).to(wanted.device))

    def add(self, layer: str, wanted: Tensor, found: Tensor) -> None:
        wanted_RO = wanted.reshape(-1, wanted.shape[-1]).double()  # float32 would overflow when squared
        squared = (found.reshape(wanted_RO.shape).double() - wanted_RO).square().sum(-1)
        signal = wanted_RO.square().sum(-1)
        relative = (squared / signal.clamp(min=TINY)).sqrt()
        bins = (relative.float().nan_to_num(math.inf).view(torch.int32) >> 19).clamp(max=NONFINITE_BIN - 1)
        sums = torch.stack([relative.sum(), squared.sum(), signal.sum()])
        gathered = torch.cat([torch.bincount(bins, minlength=BINS), sums])
        self.gathered[layer] = gathered + self.gathered.get(layer, 0)

    def results(self) -> tuple[LayerError, ...]:
        found = [self._result(layer) for layer in self.gathered]
        return tuple(sorted(found, key=lambda error: -error.worst))

    def _result(self, layer: str) -> LayerError:
        gathered = self.gathered[layer].cpu().numpy()
        counts, (relative, squared, signal) = gathered[:NONFINITE_BIN], gathered[BINS:].tolist()
        rows = int(counts.sum())
        wanted = max(1, round(rows * WORST_SHARE))
        above = counts[::-1].cumsum()[::-1] - counts
        taken = (wanted - above).clip(0, counts)
        worst = float((taken * BIN_CENTRES).sum() / wanted)
        return LayerError(layer, rows, relative / rows, worst, math.sqrt(squared / max(signal, TINY)))


def check_latents(model: Denoiser, geometry: Geometry, count: int, seed: int) -> Tensor:
    """White noise that calibration never uses, float32 [count, *latent shape], on the CPU."""
    shape = model.latent_shape(geometry)
    drawn = [
        np.random.default_rng((seed, number, LATENTS_STREAM)).standard_normal(shape, np.float32)
        for number in range(count)
    ]
    return torch.from_numpy(np.stack(drawn))


def noise_prompts(model: Denoiser, geometry: Geometry, count: int, *, seed: int = 43) -> dict[str, Tensor]:
    """Noise instead of prompts, unlike that of calibration: by name, each [count, ...]."""
    signals = model.signals(geometry)
    drawn = []
    for number in range(count):
        rng = np.random.default_rng((seed, number, CONDITIONING_STREAM))
        magnitude = float(np.exp(rng.uniform(*np.log(MAGNITUDES))))
        values = noise.conditioning(signals, noise.SILENT, seed, number)  # for its masks and numbers
        for name in [name for name, signal in signals.items() if signal.kind == "noise"]:
            shape = signals[name].shape
            size = magnitude if len(shape) > 1 else min(magnitude, noise.VECTOR_MAGNITUDE)
            values[name] = torch.from_numpy(rng.standard_normal((1, *shape), np.float32) * np.float32(size))
            if len(shape) > 1 and number % 2:
                values[name][:, int(rng.integers(1, shape[0] + 1)) :] = 0
        drawn.append(values)
    return {name: torch.cat([values[name] for values in drawn]) for name in signals}


def noise_scenes(model: Denoiser, geometry: Geometry, count: int, *, seed: int = 43) -> list[Scene]:
    """Inputs without prompts: noise at the given size and at a quarter of its tokens."""
    return [
        Scene(
            check_latents(model, size, count, seed),
            noise_prompts(model, size, count, seed=seed),
            size,
            noise.conditioning(model.signals(size), noise.SILENT, seed, 0),
            max(BATCH_TOKENS // size.tokens, 1),
        )
        for size in (geometry, geometry.quarter)
    ]
