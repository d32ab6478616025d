"""The model engine: what a model's layers receive while it paints, from noise alone or from given prompts.

Why it exists. A layer's input range cannot be read off a weight matrix; only running the network shows it, and running
it on noise is enough (`noise.py`). So this must be as easy as a data-free command.

How it works. The model (`denoiser.py`) takes Euler steps of flow matching from pure noise, and the recorder takes down
the input of every layer under the checkpoint's own names. The run is cut into parts: some trajectories that share a
kind of conditioning, with or without adapters. A part's statistics depend on nothing but the part, and statistics add
up exactly, so parts can be done in any order, over any processes (`session.py`).

Defaults, measured on the emoji model (`docs/experiments.md`): ranges hardly depend on the number of steps or the size
of the picture. Three trajectories of one step each already calibrate it as well as a hundred evaluations; noise levels
are covered since in larger models a quarter of the layers peak away from pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import CalibrationError, OptionError, StrPath
from ..families.running import Geometry
from ..layers import LayerTable
from ..lora import LoraMatch
from ..options import SAMPLES, STEPS, CalibrationOptions, RunOptions
from ..recorder import record
from ..stats import Statistics
from ..telling import Advance, Progress
from ..trials import Trials
from . import noise, sizes
from .denoiser import Denoiser, Plan, load, plan, supports
from .prompts import Prompts
from .session import Session, Unit

__all__ = ["Denoiser", "Observation", "Plan", "draw", "load", "observe", "plan", "supports", "trajectory"]

GEOMETRY = Geometry(height=16, width=16, frames=1, text_tokens=64)
"""What `observe` shows by default."""

BATCH_TOKENS = 4096
"""Trajectories run together up to this many rows per layer."""

MOVES = 2.0
"""A layer depends on the conditioning if strong conditioning moves its range by this factor against none."""


@dataclass(frozen=True)
class Observation:
    """What a run saw.

    Attributes:
        statistics: of every layer asked for, over everything that was run.
        trials: of formats, where they were asked for.
        moments: the entry of the statistics' header, where second moments were asked for.
    """

    statistics: Statistics
    trials: Trials | None = None
    moments: Mapping[str, str] = field(default_factory=dict)

    @property
    def conditioned(self) -> tuple[str, ...]:
        """Layers whose range moves with the noise in place of prompts; none after a run on prompts."""
        return self.statistics.provenance.get("depends_on_conditioning", ())

    @property
    def unvisited(self) -> tuple[str, ...]:
        """Layers that the model never ran, or that have no place in it."""
        names = self.statistics.names
        return tuple(name for name, visited in zip(names, self.statistics.visited, strict=True) if not visited)


@dataclass(frozen=True)
class Part:
    """Trajectories that run together.

    Attributes:
        way: how their conditioning is drawn; None where prompts are given.
        numbers: of the trajectories.
        adapted: whether adapters are on.
    """

    way: noise.Conditioning | None
    numbers: tuple[int, ...]
    adapted: bool = False

    @property
    def group(self) -> str:
        """What its way of conditioning is called."""
        return "prompts" if self.way is None else self.way.name

    @property
    def name(self) -> str:
        """What it is known by in a saved run."""
        return f"{self.group}{' adapted' if self.adapted else ''}, from {self.numbers[0]}"


def observe_shown(
    checkpoint: Checkpoint,
    table: LayerTable,
    shown: RunOptions | CalibrationOptions,
    *,
    dtype: torch.dtype | None = None,
    layers: Collection[str] | None = None,
    adapters: LoraMatch | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """What layers receive of a model that is shown what options say, and defaults for what they leave open.

    Args:
        checkpoint: the open checkpoint.
        table: its layers.
        shown: samples, noise levels, sizes, seed and device.
        dtype: as `observe` takes it, like what follows.
        layers: names.
        adapters: LoRA adapters.
        progress: told how far it is.

    Raises:
        OptionError, UnsupportedModelError, CalibrationError: as `observe`.
    """
    return observe(
        checkpoint, table, samples=shown.samples or SAMPLES, steps=shown.steps or STEPS, seed=shown.seed,
        device=shown.device, dtype=dtype, layers=layers, adapters=adapters, progress=progress,
        geometry=sizes.geometry(plan(checkpoint, table).family, *shown.size) if any(shown.size) else None,
    ).statistics  # fmt: skip


def observe(
    checkpoint: Checkpoint,
    table: LayerTable | None = None,
    *,
    samples: int = SAMPLES,
    steps: int = STEPS,
    seed: int = 42,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    geometry: Geometry | None = None,
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
        samples: images, `steps` evaluations of the network each; one at least for each of `noise.CONDITIONINGS`, or for
            each prompt.
        steps: noise levels on the way from noise to picture.
        seed: of all noise.
        device: where to compute.
        dtype: in what to compute; see `load`.
        geometry: size of the images; `GEOMETRY` by default.
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
        OptionError: fewer than one sample or step, or an unknown device.
        UnsupportedModelError: the checkpoint cannot be run.
        CalibrationError: a layer asked for does not exist, its inputs are not finite, or the prompts do not fit.
        StatisticsError: the session cannot be resumed.
    """
    for option, number in (("samples", samples), ("steps", steps)):
        if number < 1:
            raise OptionError(f"{option} should be at least 1, found {number}")
    denoiser = load(checkpoint, table, device=device, dtype=dtype)
    geometry = geometry or GEOMETRY
    if prompts is not None:
        prompts = prompts.fitted(denoiser, geometry)
        geometry = prompts.geometry
    shapes, feeds = watched(denoiser, layers)
    trajectories = max(samples, len(noise.CONDITIONINGS) if prompts is None else prompts.count)
    work = parts(trajectories, geometry, prompted=prompts is not None, adapted=adapters is not None)
    with record(denoiser.model, shapes, feeds) as recording:

        def paint(part: Part, tick: Advance) -> None:
            latents, conditioning = shown_of(denoiser, geometry, part, seed, prompts)
            recording.batch = len(latents)
            with denoiser.adapted(adapters if part.adapted else None):
                for _ in trajectory(denoiser, latents, conditioning, geometry, steps, at=recording.at):
                    tick(len(latents))

        seen = (session or Session()).run(
            recording,
            [
                Unit(part.name, part.group, len(part.numbers), steps * len(part.numbers), partial(paint, part))
                for part in work
            ],
            progress=progress,
            check=partial(expect_finite, checkpoint.path),
            engine="model",
            family=denoiser.plan.family,
            conditioning="noise" if prompts is None else "prompts",
            seed=seed,
            steps=steps,
            lora=_files(adapters),
        )
    statistics = seen.statistics
    if prompts is None:
        statistics = statistics.with_facts(depends_on_conditioning=conditioned(statistics.names, seen.ranges))
    return Observation(statistics)


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


def parts(trajectories: int, geometry: Geometry, *, prompted: bool = False, adapted: bool = False) -> list[Part]:
    """All work of a run, in parts of up to `BATCH_TOKENS` rows.

    Args:
        trajectories: how many images; number n has the n-th way of conditioning, in turn.
        geometry: of the images.
        prompted: prompts are given, so nothing is drawn but latents.
        adapted: do everything again with adapters.

    Returns:
        The parts; those of one way stand together.
    """
    ways: Sequence[noise.Conditioning | None] = (None,) if prompted else noise.CONDITIONINGS
    size = max(BATCH_TOKENS // geometry.tokens, 1)
    return [
        Part(way, tuple(range(trajectories)[turn :: len(ways)][start : start + size]), setting)
        for setting in ((False, True) if adapted else (False,))
        for turn, way in enumerate(ways)
        for start in range(0, len(range(trajectories)[turn :: len(ways)]), size)
    ]


def _files(adapters: LoraMatch | None) -> list[str]:
    """Names of the files of some adapters."""
    deltas = [] if adapters is None else [delta for matched in adapters.matched.values() for delta in matched]
    return sorted({delta.lora.path.name for delta in deltas})


def shown_of(
    denoiser: Denoiser, geometry: Geometry, part: Part, seed: int, prompts: Prompts | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents and conditioning of a part's trajectories, as one batch."""
    if part.way is None:
        return take(denoiser, prompts, seed, part.numbers)
    return draw(denoiser, geometry, part.way, seed, part.numbers)


def take(
    denoiser: Denoiser, prompts: Prompts | None, seed: int, numbers: Iterable[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents and prompts of some trajectories, as one batch; prompts are taken in turn."""
    assert prompts is not None
    chosen = list(numbers)
    shape = denoiser.latent_shape(prompts.geometry)
    rows = [number % prompts.count for number in chosen]
    return (
        torch.cat([noise.latents(shape, seed, number) for number in chosen]),
        {name: value[rows] for name, value in prompts.tensors.items()},
    )


def draw(
    denoiser: Denoiser, geometry: Geometry, way: noise.Conditioning, seed: int, numbers: Iterable[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents and conditioning of some trajectories, as one batch: [batch, ...] each."""
    shape, signals = denoiser.latent_shape(geometry), denoiser.signals(geometry)
    pairs = [(noise.latents(shape, seed, n), noise.conditioning(signals, way, seed, n)) for n in numbers]
    conditioning = {name: torch.cat([values[name] for _, values in pairs]) for name in signals}
    return torch.cat([latents for latents, _ in pairs]), conditioning


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


def conditioned(layers: Sequence[str], ranges: Mapping[str, NDArray[np.float32]]) -> tuple[str, ...]:
    """Layers whose range with strong conditioning is more than `MOVES` times that without any, or the reverse.

    Args:
        layers: their names.
        ranges: name of the way of conditioning -> absmax per layer, [layers]; without both there is nothing to compare.
    """
    low, high = ranges.get(noise.SILENT.name), ranges.get(noise.STRONG.name)
    if low is None or high is None:
        return ()
    moves = (high > low * MOVES) | (low > high * MOVES)
    return tuple(name for name, moved in zip(layers, moves, strict=True) if moved)


def expect_finite(path: StrPath, statistics: Statistics) -> None:
    """Refuse statistics of inputs that were not finite.

    Raises:
        CalibrationError: the first such layer, and how many there are.
    """
    bad = [name for name, count in zip(statistics.names, statistics.nonfinite, strict=True) if count]
    if bad:
        raise CalibrationError(
            f"the inputs of {len(bad)} layers have infinities or NaN",
            path=path,
            tensor=bad[0],
            hint="try float32, or check the checkpoint's weights",
        )
