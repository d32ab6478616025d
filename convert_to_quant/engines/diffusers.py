"""The model engine: records the inputs of a model's layers while it generates images, on noise or on prompts.

A weight matrix does not show the range of a layer's inputs; only running the network does, and noise is enough for that
(`noise.py`). The model (`denoiser.py`) takes Euler steps of flow matching from pure noise, and the recorder measures
the input of every layer under the checkpoint's own names. The run is cut into batches (`session.py`).

Defaults, measured on the emoji model (`docs/experiments.md`): ranges hardly depend on the number of steps or the size
of the image. Three trajectories of one step each calibrate it as well as a hundred evaluations. The default has more
noise levels because a quarter of the layers of larger models peak away from pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import CalibrationError
from ..families.running import Geometry
from ..layers import LayerTable
from ..lora import LoraMatch
from ..options import SAMPLES, STEPS, CalibrationOptions, RunOptions
from ..recorder import layers_to_record, record
from ..stats import Shape
from ..telling import Advance, Progress
from . import noise, sizes
from .denoiser import Denoiser, Plan, load, plan, supports
from .prompts import Prompts
from .session import Batch, Observation, Session

__all__ = ["Denoiser", "Observation", "Plan", "load", "observe", "plan", "start", "supports", "trajectory"]

GEOMETRY = Geometry(height=16, width=16, frames=1, text_tokens=64)
"""Default size of the images of `observe`."""

BATCH_TOKENS = 4096
"""Trajectories run together up to this many tokens per layer."""


@dataclass(frozen=True)
class Images:
    """The images that a model generates while it is observed.

    Their conditioning is the prompts in turn, which are fitted to the model, or else the `noise.CONDITIONINGS` in turn.
    """

    denoiser: Denoiser
    geometry: Geometry
    samples: int
    steps: int
    seed: int
    prompts: Prompts | None = None

    @staticmethod
    def of(
        denoiser: Denoiser,
        shown: RunOptions | CalibrationOptions,
        samples: int,
        prompts: Prompts | None = None,
        geometry: Geometry | None = None,
    ) -> Images:
        """The images that options ask for: `samples`, or one per prompt if these are more.

        Raises:
            CalibrationError: the prompts do not fit the model.
        """
        geometry = geometry or sizes.asked(denoiser.plan.family, shown.size) or GEOMETRY
        if prompts is not None:
            prompts = prompts.fitted(denoiser, geometry)
            geometry, samples = prompts.geometry, max(samples, prompts.count)
        return Images(denoiser, geometry, samples, shown.steps or STEPS, shown.seed, prompts)

    @property
    def ways(self) -> dict[str, range]:
        """The numbers of all images by the name of their conditioning."""
        return noise.ways(self.samples) if self.prompts is None else {"prompts": range(self.samples)}

    @property
    def batches(self) -> list[Batch]:
        """The images that run together, up to `BATCH_TOKENS`."""
        size = max(BATCH_TOKENS // self.geometry.tokens, 1)
        return [
            Batch(way, numbers[first : first + size])
            for way, numbers in self.ways.items()
            for first in range(0, len(numbers), size)
        ]

    def start(self, numbers: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents at sigma 1 and conditioning of some images, as one batch: [batch, ...] each."""
        shape, signals = self.denoiser.latent_shape(self.geometry), self.denoiser.signals(self.geometry)
        latents = torch.cat([noise.latents(shape, self.seed, number) for number in numbers])
        if self.prompts is not None:
            rows = [number % self.prompts.count for number in numbers]
            return latents, {name: value[rows] for name, value in self.prompts.tensors.items()}
        drawn = [noise.conditioning(signals, noise.way_of(number), self.seed, number) for number in numbers]
        return latents, {name: torch.cat([values[name] for values in drawn]) for name in signals}

    def trajectory(
        self, numbers: Sequence[int], at: Callable[[float], object] | None = None
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Generate some images as one batch; see `trajectory`."""
        return trajectory(self.denoiser, *self.start(numbers), self.geometry, self.steps, at=at)


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
        table: its layers, if already known.
        shown: images, noise levels, size, seed and device. There is at least one image for each of
            `noise.CONDITIONINGS`, or for each prompt.
        geometry: size of the images; by default that of `shown`, or `GEOMETRY`.
        dtype: to compute in; see `load`.
        layers: names of the layers to record; by default the quantized ones, or all matrices if there are none.
        prompts: conditioning from the model's own text encoders; noise by default.
        adapters: LoRA adapters; the ranges then cover the model with and without them.
        session: saves, resumes and shares the run; by default it runs in one go.
        progress: called after every evaluation.

    Returns:
        The observation. The same seed gives the same noise anywhere. The last bits of matrix multiplications depend on
        the number of threads.

    Raises:
        OptionError: an unknown device.
        UnsupportedModelError: the checkpoint cannot be run.
        CalibrationError: a layer does not exist, its inputs are not finite, or the prompts do not fit.
        StatisticsError: the session cannot be resumed.
    """
    denoiser = load(checkpoint, table, device=shown.device, dtype=dtype)
    samples = max(shown.samples or SAMPLES, len(noise.CONDITIONINGS) if prompts is None else 1)
    images = Images.of(denoiser, shown, samples, prompts, geometry)
    shapes, feeds = watched(denoiser, layers)
    with record(denoiser.model, shapes, feeds) as recording:

        def generate(batch: Batch, tick: Advance) -> None:
            recording.batch = len(batch.numbers)
            with denoiser.adapted(adapters if batch.adapted else None):
                for _ in images.trajectory(batch.numbers, recording.at):
                    tick(len(batch.numbers))

        batches = images.batches
        return (session or Session()).run(
            recording,
            batches + ([replace(batch, adapted=True) for batch in batches] if adapters else []),
            generate,
            checkpoint.path,
            steps=images.steps,
            progress=progress,
            engine="model",
            family=denoiser.plan.family,
            conditioning="noise" if prompts is None else "prompts",
            seed=images.seed,
            lora={delta.lora.path.name for some in (adapters.matched if adapters else {}).values() for delta in some},
        )


def watched(denoiser: Denoiser, layers: Collection[str] | None = None) -> tuple[dict[str, Shape], dict[str, list[str]]]:
    """The arguments of `recorder.record` for a model: {layer: (out, in)}, {module: the layers that its input feeds}.

    The layers are the quantized ones by default, or all of a model without any.

    Raises:
        CalibrationError: a layer does not exist.
    """
    feeds = {name: [layer.name for layer, _ in module.stored.pieces] for name, module in denoiser.linears.items()}
    known = denoiser.plan.table.shapes()
    if layers is None:
        layers = layers_to_record(known, denoiser.plan.table.diffusion, feeds)
    for name in layers:
        if name not in known:
            raise CalibrationError("no such layer in the checkpoint", tensor=name)
    return {name: known[name] for name in layers}, feeds


def start(
    denoiser: Denoiser, geometry: Geometry, seed: int, numbers: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents at sigma 1 and noise conditioning of some trajectories, as one batch: [batch, ...] each."""
    return Images(denoiser, geometry, len(numbers), 1, seed).start(numbers)


def trajectory(
    denoiser: Denoiser,
    latents: Tensor,
    conditioning: Mapping[str, Tensor],
    geometry: Geometry,
    steps: int,
    *,
    at: Callable[[float], object] | None = None,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Take Euler steps of flow matching from latents at sigma 1: the model runs at 1, 1 - 1/steps, ... 1/steps.

    `at` is called with each noise level before the model runs.

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
