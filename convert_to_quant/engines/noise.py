"""Noise that replaces prompts when there is no data.

A flow model starts from noise, so noise latents are exact at sigma 1, and the model's own steps produce its latents
below. No noise imitates a text encoder as well: its outputs have a size of their own, and often a few outlier channels
(Qwen-Image's text stream reaches 4e4). So conditioning is drawn in three ways: zeros, which are also the empty prompt
of guidance; noise with a few outlier channels; and noise of four times the usual size. Both at once would give ranges
that real prompts never reach, which cost fidelity.

Pooled vectors leave their encoder through a norm or a projection, so they have no outlier channels, and they modulate
every block: with vectors drawn like streams, the emoji model's ranges were 2.2 octaves above those of real prompts,
which cost up to 0.6 dB (docs/accuracy.md).

Everything is drawn on the CPU with numpy from (seed, number of the trajectory), so a run has the same inputs on any
machine, in any batch size and in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..families.running import Signal

OUTLIER_FACTOR = 30.0
OUTLIER_SHARE = 1 / 64
"""Size of outlier channels relative to the others, and their share: at least one channel."""

VECTOR_MAGNITUDE = 2.0
"""Largest standard deviation of a pooled vector."""


@dataclass(frozen=True)
class Conditioning:
    """One way to draw noise: the standard deviation of ordinary channels, and whether there are outlier channels."""

    name: str
    magnitude: float
    outliers: bool = False


SILENT = Conditioning("silent", 0.0)
OUTLIERS = Conditioning("loud channels", 1.0, outliers=True)
STRONG = Conditioning("strong", 4.0)
CONDITIONINGS = (SILENT, OUTLIERS, STRONG)
"""Used in turn. The last two have about the same mean square."""

LATENTS_STREAM, CONDITIONING_STREAM = 0, 1


def way_of(number: int) -> Conditioning:
    """The conditioning of a trajectory."""
    return CONDITIONINGS[number % len(CONDITIONINGS)]


def ways(samples: int) -> dict[str, range]:
    """The numbers of all trajectories by the name of their conditioning.

    >>> ways(4)
    {'silent': range(0, 4, 3), 'loud channels': range(1, 4, 3), 'strong': range(2, 4, 3)}
    """
    count = len(CONDITIONINGS)
    return {way.name: range(turn, samples, count) for turn, way in enumerate(CONDITIONINGS[:samples])}


def latents(shape: tuple[int, ...], seed: int, number: int) -> Tensor:
    """Pure noise, the state of trajectory `number` at sigma 1: float32 [1, *shape], on the CPU."""
    rng = np.random.default_rng((seed, number, LATENTS_STREAM))
    return torch.from_numpy(rng.standard_normal((1, *shape), np.float32))


def conditioning(signals: Mapping[str, Signal], way: Conditioning, seed: int, number: int) -> dict[str, Tensor]:
    """Noise for the conditioning of trajectory `number`: {name: [1, *shape]}, float32 (masks int64), on the CPU."""
    rng = np.random.default_rng((seed, number, CONDITIONING_STREAM))
    return {name: _signal(signal, way, rng) for name, signal in signals.items()}


def _signal(signal: Signal, way: Conditioning, rng: np.random.Generator) -> Tensor:
    shape = (1, *signal.shape)
    if signal.kind == "mask":
        return torch.ones(shape, dtype=torch.int64)
    if signal.kind == "value":
        return torch.full(shape, signal.value)
    if len(signal.shape) == 1:
        way = replace(way, magnitude=min(way.magnitude, VECTOR_MAGNITUDE), outliers=False)
    values = rng.standard_normal(shape, np.float32)
    if way.outliers:
        count = max(round(shape[-1] * OUTLIER_SHARE), 1)
        values[..., rng.choice(shape[-1], count, replace=False)] *= np.float32(OUTLIER_FACTOR)
    values *= np.float32(way.magnitude)
    return torch.from_numpy(values)
