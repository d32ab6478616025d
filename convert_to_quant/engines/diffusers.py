"""The model engine: what a model's layers receive while it paints, from noise alone or from given prompts.

Why it exists. A layer's input range cannot be read off a weight matrix; only running the network shows it, and running
it on noise is enough (`noise.py`). So this must be as easy as a data-free command.

How it works. The model (`denoiser.py`) takes Euler steps of flow matching from pure noise, and the recorder takes down
the input of every layer under the checkpoint's own names. The run is cut into units: some trajectories that share a
kind of conditioning, with or without adapters. Statistics of a unit depend on nothing but the unit, and add up exactly,
so units can be done in any order, over any processes (`session.py`).

Defaults, measured on the emoji model (`docs/experiments.md`): ranges hardly depend on the number of steps or the size
of the picture. Three trajectories of one step each already calibrate it as well as a hundred evaluations; noise levels
are covered since in larger models a quarter of the layers peak away from pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import CalibrationError
from ..families.running import Geometry
from ..layers import LayerTable
from ..lora import LoraMatch
from ..options import SAMPLES, STEPS, CalibrationOptions, RunOptions
from ..recorder import record
from ..telling import Advance, Progress
from . import noise, sizes
from .denoiser import Denoiser, Plan, load, plan, supports
from .prompts import Prompts
from .session import Observation, Session, Unit

__all__ = ["Denoiser", "Observation", "Plan", "load", "observe", "plan", "start", "supports", "trajectory"]

GEOMETRY = Geometry(height=16, width=16, frames=1, text_tokens=64)
"""What `observe` shows by default."""

BATCH_TOKENS = 4096
"""Trajectories run together up to this many rows per layer."""


def observe(
    checkpoint: Checkpoint,
    table: LayerTable | None,
    shown: RunOptions | CalibrationOptions,
    *,
    geometry: Geometry | None = None,
    dtype: torch.dtype | None = None,
    layers: Collection[str] | None = None,
    prompts: Prompts | None = None,
    adapters: LoraMatch | None = None,
    session: Session | None = None,
    progress: Progress | None = None,
) -> Observation:
    """Run a checkpoint and record the inputs of its layers.

    Args:
        checkpoint: the open checkpoint.
        table: its layers, where they are known already.
        shown: images, noise levels, size, seed and device. Images are one at least for each of `noise.CONDITIONINGS`,
            or for each prompt.
        geometry: of the images, in place of the size that `shown` names; `GEOMETRY` where it names none.
        dtype: in what to compute; see `load`.
        layers: names of the layers to record; by default the quantized ones, or all matrices of a checkpoint that has
            none.
        prompts: conditioning made by the model's own text encoders, in place of noise.
        adapters: LoRA adapters; ranges then cover the model with and without them.
        session: what saves, resumes and shares the run; by default it is made in one go.
        progress: called after every evaluation with what is done and what there is to do.

    Returns:
        The observation. The same seed gives the same noise anywhere; sums in matrix products still depend on the
        number of threads, in the last bits.

    Raises:
        OptionError: an unknown device.
        UnsupportedModelError: the checkpoint cannot be run.
        CalibrationError: a layer asked for does not exist, its inputs are not finite, or the prompts do not fit.
        StatisticsError: the session cannot be resumed.
    """
    denoiser = load(checkpoint, table, device=shown.device, dtype=dtype)
    geometry = geometry or sizes.asked(denoiser.plan.family, shown.size) or GEOMETRY
    if prompts is not None:
        prompts = prompts.fitted(denoiser, geometry)
        geometry = prompts.geometry
    images, steps = shown.samples or SAMPLES, shown.steps or STEPS
    images = max(images, len(noise.CONDITIONINGS) if prompts is None else prompts.count)
    shapes, feeds = watched(denoiser, layers)
    with record(denoiser.model, shapes, feeds) as recording:

        def paint(numbers: range, adapted: bool, tick: Advance) -> None:
            latents, conditioning = start(denoiser, geometry, shown.seed, numbers, prompts)
            recording.batch = len(latents)
            with denoiser.adapted(adapters if adapted else None):
                for _ in trajectory(denoiser, latents, conditioning, geometry, steps, at=recording.at):
                    tick(len(latents))

        return (session or Session()).run(
            recording,
            [
                Unit(
                    f"{way}{' adapted' * adapted}, from {numbers[0]}",
                    way,
                    len(numbers),
                    steps * len(numbers),
                    partial(paint, numbers, adapted),
                )
                for adapted in ((False, True) if adapters else (False,))
                for way, numbers in batches(images, geometry, prompts)
            ],
            checkpoint.path,
            progress=progress,
            engine="model",
            family=denoiser.plan.family,
            conditioning="noise" if prompts is None else "prompts",
            seed=shown.seed,
            steps=steps,
            lora=_files(adapters),
        )


def watched(
    denoiser: Denoiser, layers: Collection[str] | None = None
) -> tuple[dict[str, tuple[int, int]], dict[str, list[str]]]:
    """What to record, as `recorder.record` takes it.

    Args:
        denoiser: the model.
        layers: names of the checkpoint's layers; by default the model's quantized ones, or all of it where none is.

    Returns:
        {layer: (out, in)} and {module: the layers that its input feeds}.

    Raises:
        CalibrationError: a layer does not exist.
    """
    table = denoiser.plan.table
    known = table.shapes()
    if layers is None:
        layers = list(table.diffusion) or [name for name in known if name in denoiser.layers]
    unknown = [name for name in layers if name not in known]
    if unknown:
        raise CalibrationError(f"{len(unknown)} layers do not exist in the checkpoint", tensor=unknown[0])
    feeds = {
        name: [layer.name for layer, _ in module.stored.pieces if layer.name in set(layers)]
        for name, module in denoiser.linears.items()
    }
    return {name: known[name] for name in layers}, {name: fed for name, fed in feeds.items() if fed}


def ways(images: int, prompts: Prompts | None = None) -> dict[str, range]:
    """The numbers of all trajectories, by what their way of conditioning is called.

    >>> ways(4)
    {'silent': range(0, 4, 3), 'loud channels': range(1, 4, 3), 'strong': range(2, 4, 3)}
    """
    if prompts is not None:
        return {"prompts": range(images)}
    count = len(noise.CONDITIONINGS)
    return {way.name: range(turn, images, count) for turn, way in enumerate(noise.CONDITIONINGS[:images])}


def batches(images: int, geometry: Geometry, prompts: Prompts | None = None) -> list[tuple[str, range]]:
    """All trajectories, as those of `ways` that run together: up to `BATCH_TOKENS` rows."""
    size = max(BATCH_TOKENS // geometry.tokens, 1)
    return [
        (way, numbers[first : first + size])
        for way, numbers in ways(images, prompts).items()
        for first in range(0, len(numbers), size)
    ]


def _files(adapters: LoraMatch | None) -> list[str]:
    """Names of the files of some adapters."""
    deltas = [] if adapters is None else [delta for matched in adapters.matched.values() for delta in matched]
    return sorted({delta.lora.path.name for delta in deltas})


def start(
    denoiser: Denoiser, geometry: Geometry, seed: int, numbers: Sequence[int], prompts: Prompts | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents at sigma 1 and conditioning of some trajectories, as one batch: [batch, ...] each.

    Args:
        denoiser: the model.
        geometry: of the images.
        seed: of all noise.
        numbers: of the trajectories.
        prompts: fitted to the model, and taken in turn; without any, the ways of `noise.CONDITIONINGS` are.
    """
    shape, signals = denoiser.latent_shape(geometry), denoiser.signals(geometry)
    latents = torch.cat([noise.latents(shape, seed, number) for number in numbers])
    if prompts is not None:
        rows = [number % prompts.count for number in numbers]
        return latents, {name: value[rows] for name, value in prompts.tensors.items()}
    count = len(noise.CONDITIONINGS)
    drawn = [noise.conditioning(signals, noise.CONDITIONINGS[number % count], seed, number) for number in numbers]
    return latents, {name: torch.cat([values[name] for values in drawn]) for name in signals}


def trajectory(
    denoiser: Denoiser,
    latents: Tensor,
    conditioning: Mapping[str, Tensor],
    geometry: Geometry,
    steps: int,
    *,
    at: Callable[[float], object] | None = None,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Euler steps of flow matching from sigma 1 to 0.

    Args:
        denoiser: the model.
        latents: [batch, *latent shape] at sigma 1.
        conditioning: by name, each [batch, ...].
        geometry: of the latents.
        steps: how many; the model sees sigma 1, 1 - 1/steps, ... 1/steps.
        at: told each noise level before the model runs.

    Yields:
        (sigma, latents there, velocity there) after each evaluation.
    """
    for step in range(steps, 0, -1):
        sigma = step / steps
        if at is not None:
            at(sigma)
        velocity = denoiser.velocity(latents, sigma, conditioning, geometry)
        yield sigma, latents, velocity
        latents = latents - velocity / steps
