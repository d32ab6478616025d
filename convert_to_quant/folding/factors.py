"""How much each channel is scaled: so that inputs and weights share what the channels differ by.

Of a channel's largest input x and the size w of the column that reads it, x is divided by sqrt(x / w), and the column
multiplied by it, so that both become sqrt(x w); other shares keep less (docs/experiments.md). Each row of a weight is
measured by its own largest value, since a scale per row is what most formats have: so it does not matter that other
factors scale rows.

What is left is one factor for all channels of a group. Where a layer reads other channels beside them (attention beside
an MLP), it brings x / w to the level of those. A modulation's scale must not have factors under 1: where 1 + scale is
near 0, bfloat16 keeps nothing of it (docs/experiments.md). Channels that never held anything get the median.

Channels that are even already stay as they are. The error of a rounded product grows with Σ x² of its inputs and with
Σ w² of its weights, so what factors gain is what they take from Σ x² · Σ w²; and where that is little, rotation keeps
more of the channels as they are (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..checkpoint import Checkpoint, to_float32
from ..formats.record import spans
from ..stats import Statistics
from .groups import Exponents, Group, Place

Float = NDArray[np.float64]

LEAST_GAIN = 2.0
"""What factors have to take from Σ x² · Σ w², on average over the layers that read the channels: 0.1 to 1.8 dB on the
emoji model as it was trained, 15 to 40 dB where every channel has a range of its own."""

MOST_OCTAVES = 60
BAND_VALUES = 1 << 22


def find_exponents(
    checkpoint: Checkpoint, groups: Sequence[Group], statistics: Statistics, prefix: str
) -> list[Exponents]:
    """The exponents of factors: each channel is scaled by 2^exponent.

    Args:
        checkpoint: the open checkpoint.
        groups: all that will be scaled.
        statistics: of what layers received.
        prefix: what stands before the diffusion model's names.

    Returns:
        For each group int8, one for each row that gives a channel; all 0 where nothing is known of the inputs, or the
        channels are even already.
    """
    inputs: dict[str, Float] = {}
    columns: dict[str, Float] = {}
    fixed: dict[str, NDArray[np.bool_]] = {}
    for place in (place for group in groups for place in group.columns):
        layer = prefix + place.tensor.removesuffix(names.WEIGHT)
        channels = statistics.channel_absmax[statistics.index(layer)] if layer in statistics.layers else ()
        if place.tensor not in inputs and len(channels):
            inputs[place.tensor] = np.array(channels, np.float64)
            columns[place.tensor] = column_sizes(checkpoint, prefix + place.tensor)
            fixed[place.tensor] = (inputs[place.tensor] > 0) & (columns[place.tensor] > 0)
        if place.tensor in inputs:
            fixed[place.tensor][_run(place)] = False

    def exponents(group: Group) -> Exponents:
        known = [place for place in group.columns if place.tensor in inputs]
        nothing = np.zeros(group.columns[0].count // group.repeat, np.int8)
        if not known:
            return nothing
        # Of channels that share a factor, and of layers that share channels, the largest counts.
        x, w = (
            np.maximum.reduce([size[place.tensor][_run(place)] for place in known])
            .reshape(-1, group.repeat, group.head)
            .max(1)
            .reshape(-1)
            for size in (inputs, columns)
        )
        used = (x > 0) & (w > 0)
        if not used.any():
            return nothing
        levels = np.log2(x[used] / w[used])
        octaves = np.zeros(len(x))
        octaves[used] = -levels / 2
        octaves[~used] = np.median(octaves[used])
        if group.ones:
            octaves -= octaves.min()
        else:
            others = [(place.tensor, fixed[place.tensor]) for place in known]
            beside = [np.log2(inputs[tensor][free] / columns[tensor][free]) for tensor, free in others]
            octaves += np.median(np.concatenate(beside) if any(map(len, beside)) else levels) / 2
        found = replace(group, exponents=np.rint(octaves).clip(-MOST_OCTAVES, MOST_OCTAVES).astype(np.int8))
        gains = [gain(place, found.column_exponents) for place in known]
        return found.exponents if np.mean(gains) >= np.log(LEAST_GAIN) else nothing

    def gain(place: Place, column_exponents: Exponents) -> float:
        """The natural logarithm of what is left of Σ x² · Σ w² of one layer, with the sign turned."""
        squares = inputs[place.tensor] ** 2, columns[place.tensor] ** 2
        before = np.log(squares[0].sum() * squares[1].sum())
        for each, sign in zip(squares, (1, -1), strict=True):
            each[_run(place)] *= np.exp2(2.0 * sign * column_exponents)
        return float(before - np.log(squares[0].sum() * squares[1].sum()))

    return [exponents(group) for group in groups]


def column_sizes(checkpoint: Checkpoint, tensor: str) -> Float:
    """The largest value in each column of a weight, where every row is divided by its own largest, float64 [in]."""
    info = checkpoint.tensors[tensor]
    largest = np.zeros(info.shape[1], np.float32)
    for band in spans(info.shape[0], max(1, BAND_VALUES // info.shape[1])):
        weight_OI = np.abs(to_float32(checkpoint.bits(tensor, band), info.dtype))
        tops = weight_OI.max(1, keepdims=True)
        np.maximum(largest, np.divide(weight_OI, tops, out=weight_OI, where=tops > 0).max(0), out=largest)
    return largest.astype(np.float64)


def _run(place: Place) -> slice:
    return slice(place.start, place.start + place.count)
