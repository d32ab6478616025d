"""Computes the factor of each channel, so that inputs and weights share the differences between channels.

For a channel with the largest input x and the size w of the column that reads it, x is divided by sqrt(x / w) and the
column multiplied by it, so that both become sqrt(x w). Other shares gave worse results (docs/experiments.md). Rows of a
weight are measured relative to their own largest value, since most formats have a scale per row.

One factor for all channels of a group remains free. If a layer also reads other channels (attention beside an MLP), it
brings x / w to their level. Factors of a modulation's scale must not be below 1: where 1 + scale is near 0, bfloat16
loses it (docs/experiments.md). Channels that were always zero get the median.

The error of a rounded matmul grows with Σ x² of its inputs and with Σ w² of its weights, so the gain is the reduction
of Σ x² · Σ w². Where it is small, channels stay unchanged: rotation gains more from them (docs/experiments.md).
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
"""Least reduction of Σ x² · Σ w², on average over the layers that read the channels. It is 0.1 to 1.8 dB on the trained
emoji model, and 15 to 40 dB if every channel has a range of its own."""

MOST_OCTAVES = 60
BAND_VALUES = 1 << 22


def find_exponents(
    checkpoint: Checkpoint, groups: Sequence[Group], statistics: Statistics, prefix: str
) -> list[Exponents]:
    """The exponents of factors by group, int8, one per channel; a channel is scaled by 2^exponent.

    They are 0 if the inputs are unknown or the channels already equal. `statistics` are of the layers that read the
    channels, and `prefix` is that of the diffusion model's tensor names.
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
        # The largest of channels that share a factor, and of layers that share channels.
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
        """The logarithm of the factor by which Σ x² · Σ w² of one layer shrinks."""
        squares = inputs[place.tensor] ** 2, columns[place.tensor] ** 2
        before = np.log(squares[0].sum() * squares[1].sum())
        for each, sign in zip(squares, (1, -1), strict=True):
            each[_run(place)] *= np.exp2(2.0 * sign * column_exponents)
        return float(before - np.log(squares[0].sum() * squares[1].sum()))

    return [exponents(group) for group in groups]


def column_sizes(checkpoint: Checkpoint, tensor: str) -> Float:
    """The largest value in each column of a weight, after dividing every row by its largest, float64 [in]."""
    info = checkpoint.tensors[tensor]
    largest = np.zeros(info.shape[1], np.float32)
    for band in spans(info.shape[0], max(1, BAND_VALUES // info.shape[1])):
        weight_OI = np.abs(to_float32(checkpoint.bits(tensor, band), info.dtype))
        tops = weight_OI.max(1, keepdims=True)
        np.maximum(largest, np.divide(weight_OI, tops, out=weight_OI, where=tops > 0).max(0), out=largest)
    return largest.astype(np.float64)


def _run(place: Place) -> slice:
    return slice(place.start, place.start + place.count)
