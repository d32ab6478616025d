"""Noise in place of prompts: what a model is shown when there is no data.

A flow model starts from noise, so noise stands in for latents exactly at sigma 1, and the model's own steps lead to
latents like its own below. Nothing stands in for a text encoder as well. Its outputs have a size of their own and are
often loud in a few channels (Qwen-Image's text stream reaches 4e4), so conditioning is drawn in three ways: none, which
is also the empty prompt of guidance; noise with a few channels `LOUD` times the others; and noise of four times the
usual size. Louder noise (both at once) gives ranges that real prompts never reach, and those cost fidelity.

Pooled vectors are tamer than token streams: they leave their encoder through a norm or a projection, without loud
channels. One vector steers every block through its modulation, so too loud a vector raises the range of all layers:
with vectors drawn as streams are, the emoji model's ranges lay 2.2 octaves above those of real prompts, which cost up
to 0.6 dB (docs/accuracy.md). So a vector has no loud channels, and at most `VECTOR_MAGNITUDE`.

Everything is drawn on the CPU with numpy from (seed, number of the trajectory), so a run shows the same inputs on any
machine, in any batch size and in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..families.running import Signal

LOUD = 30.0
LOUD_SHARE = 1 / 64
"""How many times louder the loud channels are, and how many they are: one at least."""


VECTOR_MAGNITUDE = 2.0
"""Largest standard deviation of a pooled vector."""


@dataclass(frozen=True)
class Conditioning:
    """One way to draw noise conditioning.

    Attributes:
        name: for reports.
        magnitude: standard deviation of the ordinary channels.
        loud: whether some channels are `LOUD` times that.
    """

    name: str
    magnitude: float
    loud: bool = False


SILENT = Conditioning("silent", 0.0)
LOUD_CHANNELS = Conditioning("loud channels", 1.0, loud=True)
STRONG = Conditioning("strong", 4.0)
CONDITIONINGS = (SILENT, LOUD_CHANNELS, STRONG)
"""What a model is shown in turn. The last two have about the same mean square."""

LATENTS_STREAM, CONDITIONING_STREAM = 0, 1


def latents(shape: tuple[int, ...], seed: int, number: int) -> Tensor:
    """Pure noise, the state of a trajectory at sigma 1.

    Args:
        shape: without the batch.
        seed: of the run.
        number: of the trajectory.

    Returns:
        float32 [1, *shape], on the CPU.
    """
    rng = np.random.default_rng((seed, number, LATENTS_STREAM))
    return torch.from_numpy(rng.standard_normal((1, *shape), np.float32))


def conditioning(signals: Mapping[str, Signal], way: Conditioning, seed: int, number: int) -> dict[str, Tensor]:
    """Noise in the shape of a text encoder's outputs.

    Args:
        signals: the model's conditioning tensors by name.
        way: how loud.
        seed: of the run.
        number: of the trajectory.

    Returns:
        {name: [1, *shape]}, float32 (masks int64), on the CPU.
    """
    rng = np.random.default_rng((seed, number, CONDITIONING_STREAM))
    return {name: _signal(signal, way, rng) for name, signal in signals.items()}


def _signal(signal: Signal, way: Conditioning, rng: np.random.Generator) -> Tensor:
    shape = (1, *signal.shape)
    if signal.kind == "mask":
        return torch.ones(shape, dtype=torch.int64)
    if signal.kind == "value":
        return torch.full(shape, signal.value)
    if len(signal.shape) == 1:
        way = replace(way, magnitude=min(way.magnitude, VECTOR_MAGNITUDE), loud=False)
    values = rng.standard_normal(shape, np.float32)
    if way.loud:
        channels = shape[-1]
        values[..., rng.choice(channels, max(round(channels * LOUD_SHARE), 1), replace=False)] *= np.float32(LOUD)
    values *= np.float32(way.magnitude)
    return torch.from_numpy(values)
