"""How much of a model's picture survives quantization, measured on the model itself.

Why it exists. An error of a layer says little about the picture: errors cancel, add up, or hit what does not matter.
What a sampler uses is the predicted velocity, so that is what is compared, at the states that the reference itself
passes through; and, at the end, the latents that each model reaches by its own steps.

Maths. Euler steps of flow matching from sigma 1 to 0: x -= velocity / steps. At every noise level both models see the
same state of the reference's way. Over the predictions v of the reference and u of the quantized model for one prompt

    SQNR = 10 log10(Σ v² / Σ (v - u)²) dB

and, under classifier-free guidance, the mean of that over both predictions (with the prompt and without). Averages are
over prompts, in dB; spreads are standard errors of that mean. The state moves by the guided velocity
v_negative + guidance · (v - v_negative). The final latents' PSNR is 10 log10(range² / mean squared difference), with
the range (largest minus smallest value) of the reference's latents.

On noise. Whoever checks a calibration on what it was calibrated on checks nothing, so `noise_scenes` shares nothing
with `engines.noise` but white latents: other random streams whatever the seed, a magnitude for each prompt anywhere in
`MAGNITUDES` where calibration has fixed ones, text of any length with zeros behind it in every second prompt, and two
sizes. Its level is not that of real prompts: see `OFF_BY_DB`.

Per layer, on request: the reference's layer and the quantized one are given the same input, the reference's, and their
outputs are compared row by row. The error of a row is ‖y - y'‖ / ‖y‖. A tensor-wide error hides lost rows behind a few
loud ones, so the mean over rows and the mean over the worst 1 % of rows are given beside it.

NaN and infinity. No figure is made of them. One such value in a linear layer's output, a velocity or the final latents
of either model is refused, whether or not the rest of the model hides it: the message names the file, the first such
layer and the noise level. So every figure is finite. A ratio is at most `EXACT_DB`, which stands for no difference, and
at least `-EXACT_DB`, which stands for any difference from zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
"""Stands for the square of an output that is zero."""

LATENTS_STREAM, CONDITIONING_STREAM = 2, 3
"""Of random numbers; calibration draws from 0 and 1 (`engines.noise`)."""

OFF_BY_DB = 13
"""How far figures on noise have been from those of real prompts: 19.9 dB against 33.1 on a Z-Image-shaped model."""

MAGNITUDES = (0.5, 3.0)
"""Standard deviations of noise prompts, log-uniform; calibration has 0, 1 with loud channels, and 4."""

WORST_SHARE = 0.01
"""Share of a layer's rows that count as its worst."""

EXACT_DB = 300.0
"""What stands for "no difference at all", where the formula gives infinity; negative, for any difference from zeros."""


@dataclass(frozen=True)
class Level:
    """Velocity fidelity at one noise level.

    Attributes:
        sqnr_db, standard_error_db: mean over prompts, and of that mean; 0 for one prompt.
        worst_db: of the prompt with the lowest.
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
        worst_db: of one prompt at one noise level.
    """

    geometry: Geometry
    sqnr_db: float
    worst_db: float


@dataclass(frozen=True)
class Scene:
    """What both models are shown at one size.

    Attributes:
        latents: at sigma 1, [prompts, ...].
        conditioning: by name, each [prompts, ...].
        geometry: of the images.
        negative: conditioning without prompt, each [1, ...] or [prompts, ...]; used under guidance. By default zeros
            for embeddings, and masks and numbers as the first prompt has them.
        batch: prompts that run together.
    """

    latents: Tensor
    conditioning: Mapping[str, Tensor]
    geometry: Geometry
    negative: Mapping[str, Tensor] | None = None
    batch: int = 8


@dataclass(frozen=True)
class LayerError:
    """What quantization does to one layer's output, for the reference's inputs.

    Attributes:
        layer: the quantized checkpoint's layer.
        rows: rows compared; the parts of a fused layer count each.
        mean: mean over rows of ‖y - y'‖ / ‖y‖.
        worst: the same over the worst 1 % of rows.
        whole: ‖Y - Y'‖ / ‖Y‖ over everything at once.
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
        worst_db: of one prompt at one noise level.
        levels: per noise level, from noise to picture.
        sizes: per size, in the order of the scenes.
        psnr_db: of the final latents, mean over prompts.
        psnr_standard_error_db: of that mean.
        prompts, steps, guidance: what was run.
        layers: per-layer errors, the worst layer first; empty where not asked for.
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
        """The same as JSON values."""
        return asdict(self)


def sqnr_db(reference: Tensor, other: Tensor) -> Tensor:
    """10 log10(Σ reference² / Σ (reference - other)²) per sample.

    Args:
        reference: [batch, ...].
        other: the same shape.

    Returns:
        float64 [batch]; `EXACT_DB` where they are equal, NaN where either is not finite.

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
        peak: by default the range of the reference's values.

    Returns:
        float64 [batch]; `EXACT_DB` where they are equal, NaN where either is not finite.
    """
    flat = reference.double().flatten(1)
    error = (flat - other.double().flatten(1)).square().mean(1)
    signal = (flat.amax(1) - flat.amin(1)).square() if peak is None else torch.full_like(error, peak**2)
    return _ratio_db(signal, error)


def _ratio_db(signal: Tensor, error: Tensor) -> Tensor:
    """10 log10(signal / error) within ±`EXACT_DB`; NaN where either is not finite."""
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
    """Compare two models on prompts at one size, as `check` does: from latents that no calibration starts from.

    Args:
        reference: the model as it should be.
        quantized: the same model, quantized.
        conditioning: as of a `Scene`.
        geometry: as of a `Scene`.
        negative: as of a `Scene`.
        guidance: as of `scenes_fidelity`, like what follows.
        steps: noise levels.
        seed: of the latents.
        batch: as of a `Scene`.
        layer_errors: compare every quantized layer's output too.
        progress: called after every prompt's noise level.

    Returns:
        The comparison.

    Raises:
        OptionError, CalibrationError: as `scenes_fidelity`.
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
        reference: the model as it should be.
        quantized: the same model, quantized.
        scenes: what they are shown, one or more.
        guidance: strength of classifier-free guidance; 1 is none and halves the work.
        steps: noise levels.
        layer_errors: compare every quantized layer's output too.
        progress: called after every prompt's noise level.
        finished: takes the final latents of the reference and of the quantized model, one batch after the other.

    Returns:
        The comparison.

    Raises:
        OptionError: no prompts, fewer than one step, or a batch below 1.
        CalibrationError: a layer's output, a velocity or the final latents are not finite.
    """
    counts = [len(scene.latents) for scene in scenes]
    for option, number in (
        ("prompts", min(counts, default=0)),
        ("steps", steps),
        ("batch", min((scene.batch for scene in scenes), default=1)),
    ):
        if number < 1:
            raise OptionError(f"{option} should be at least 1, found {number}")
    prompts = sum(counts)
    ratios_db = torch.zeros(prompts, steps, dtype=torch.float64)
    final_db = torch.zeros(prompts, dtype=torch.float64)
    done = 0
    sides = (_Side("reference", reference), _Side("quantized model", quantized))
    with sides[0].watched(), sides[1].watched(), _row_errors(reference, quantized, enabled=layer_errors) as errors:
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
        layers = errors.results()
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
        layers,
    )


def _batches(scenes: Sequence[Scene], guidance: float) -> Iterator[tuple[int, Tensor, _Guided]]:
    """What runs together: the number of the first prompt, latents, and conditioning."""
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
    """One of the two models, with a name for messages, and an eye on what its layers give: attention may hide NaN."""

    def __init__(self, name: str, model: Denoiser) -> None:
        self.name = name
        self.model = model
        self.finite: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at every linear layer's output inside the block."""
        with ExitStack() as stack:
            for module in self.model.linears.values():
                look = partial(self.look, module.stored.layer.name)
                stack.callback(module.register_forward_hook(look).remove)
            yield

    def look(self, layer: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        """Note whether a layer's output is finite."""
        self.finite[layer] = output.isfinite().all() & self.finite.get(layer, True)

    def require_finite(self, values: Tensor, what: str, sigma: float) -> None:
        """Refuse NaN and infinity in values, and in what layers gave since the last call.

        Raises:
            CalibrationError: there are some.
        """
        bad = next((layer for layer, finite in self.finite.items() if not finite), None)
        if bad is None and values.isfinite().all():
            self.finite.clear()
            return
        raise CalibrationError(
            f"{'the output of this layer' if bad else what} in the {self.name} is not finite at sigma {sigma:.3g}",
            path=next((module.stored.checkpoint.path for module in self.model.linears.values()), None),
            tensor=bad,
            hint="convert_to_quant inspect may say why",
        )


def _empty_prompt(value: Tensor) -> Tensor:
    """A conditioning tensor [prompts, ...] without prompt, [1, ...]: masks (integers) and numbers [prompts] stay."""
    is_embedding = value.is_floating_point() and value.ndim > 1
    return torch.zeros_like(value[:1]) if is_embedding else value[:1]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of [samples], and its standard error; 0 for one sample."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), error


@dataclass(frozen=True)
class _Guided:
    """A batch of prompts: with the prompt and, under classifier-free guidance, without it."""

    sides: Sequence[Mapping[str, Tensor]]
    guidance: float
    geometry: Geometry

    def predictions(self, model: Denoiser, state: Tensor, sigma: float) -> Tensor:
        """What the model says of each side, [batch, 1 or 2, *latent shape]."""
        first, count = self.sides[0], len(self.sides)
        if any(side[name].shape != value.shape for side in self.sides for name, value in first.items()):
            # other text lengths
            return torch.stack([model.velocity(state, sigma, side, self.geometry) for side in self.sides], 1)
        together = {name: torch.cat([side[name] for side in self.sides]) for name in first}
        velocities = model.velocity(torch.cat([state] * count), sigma, together, self.geometry)
        return torch.stack(velocities.chunk(count), 1)

    def velocity(self, predictions: Tensor) -> Tensor:
        """What the state moves by, [batch, *latent shape]."""
        positive, negative = predictions[:, 0], predictions[:, -1]
        return negative + self.guidance * (positive - negative)


class _RowErrors:
    """Row errors of every quantized layer, gathered while the reference runs.

    Attributes:
        gathered: per layer, a histogram of relative errors, their sum, and those of squared errors and outputs.
    """

    def __init__(self) -> None:
        self.gathered: dict[str, Tensor] = {}

    def compare(self, twin: CheckpointLinear, _module: nn.Module, inputs: tuple[Tensor, ...], wanted: Tensor) -> None:
        """Compare what a layer of the reference gives with what the quantized one gives for the same input."""
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


@contextmanager
def _row_errors(reference: Denoiser, quantized: Denoiser, *, enabled: bool) -> Iterator[_RowErrors]:
    """Compare every quantized layer's output with the reference's, whenever the reference runs inside the block."""
    errors = _RowErrors()
    with ExitStack() as stack:
        for name, twin in quantized.linears.items():
            if enabled and name in reference.linears and twin.stored.layer.format is not None:
                hook = partial(errors.compare, twin)
                stack.callback(reference.linears[name].register_forward_hook(hook).remove)
        yield errors


def check_latents(model: Denoiser, geometry: Geometry, count: int, seed: int) -> Tensor:
    """White noise that no calibration starts from, float32 [count, *latent shape], on the CPU."""
    shape = model.latent_shape(geometry)
    drawn = [
        np.random.default_rng((seed, number, LATENTS_STREAM)).standard_normal(shape, np.float32)
        for number in range(count)
    ]
    return torch.from_numpy(np.stack(drawn))


def noise_prompts(model: Denoiser, geometry: Geometry, count: int, *, seed: int = 43) -> dict[str, Tensor]:
    """Noise in place of prompts, of another kind than calibration is shown: by name, each [count, ...]."""
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
    """What a check shows models without prompts: noise at the size asked for, and at a quarter of its tokens."""
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
