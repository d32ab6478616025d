"""Ranges guessed from a weight alone, one layer at a time, for models that cannot be run.

A range cannot be read off a weight: a layer's input can be multiplied by any factor if its weight is divided by it, and
the network stays the same. What a weight does tell is how its input channels relate: a trained layer hears all of them,
so channels with small weights carry large values. So the input is simulated as

    x_j = z_j · sqrt(out / in) / ‖W_:j‖        z of unit variance

which makes every channel contribute equally to an output of unit variance: Var(y) = (1/out) Σ_j ‖W_:j‖² · Var(x_j) = 1.
The percentile of |x|, times a margin (8 by default, since FP8 forgives headroom and not clipping), is the range.

z is normal, or, where a LoRA was trained on this layer, the rows of its A with small noise and both signs, at unit
variance: directions that real inputs had.

One pass over the file: no weight is ever whole in memory, and FP8 needs no torch.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..errors import TensorError
from ..formats.record import spans
from ..layers import Layer, dequantize, scales_per_row
from ..telling import Advance

DEFAULT_MARGIN = 8.0
NOISE_LEVELS = (0.0, 0.1, 0.2)
"""How much noise, in standard deviations of the LoRA's rows, is added to each copy of them."""

_ROWS = 64
"""Rows of a weight per step: 64 × 15,360 values in float32 are 4 MB."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Simulation:
    """How inputs are made up.

    Attributes:
        samples: rows of random input; with a LoRA, its rows set the number.
        percentile: of the simulated magnitudes, in (0, 100].
        seed: of the random numbers; each layer draws its own from it and its name.
    """

    samples: int = 64
    percentile: float = 99.9
    seed: int = 42


def generator(seed: int, layer: str) -> np.random.Generator:
    """Random numbers of one layer: the same whatever other layers are there, and in whatever order they run."""
    return np.random.default_rng([seed, zlib.crc32(layer.encode("utf-8"))])


def column_squares(checkpoint: Checkpoint, layer: Layer) -> NDArray[np.float64]:
    """Sum of squares of every column of a layer's real weight, quantized or not: float64 [in].

    Raises:
        TensorError: the weight has NaN or infinite values.
    """
    grid = None if layer.format is None else layer.format.grid
    scale = None if grid is None or layer.weight_scale is None else checkpoint.float32(layer.weight_scale)
    # einsum, not @: BLAS would start threads of its own under each of ours, which costs three times the time.
    squares_of_codes = None if grid is None else grid.values**2
    total = np.zeros(layer.in_features)
    # Squares of very small or large scales leave float32, so they are taken relative to the largest.
    largest = 1.0 if scale is None else float(scale.max(initial=0.0)) or 1.0
    for rows in spans(layer.out_features, _ROWS):
        if squares_of_codes is None or scale is None:
            weight_OI = dequantize(checkpoint, layer, rows)
            total += np.einsum("oi,oi->i", weight_OI, weight_OI)
            continue
        squares_OI = np.take(squares_of_codes, checkpoint.bits(layer.weight.name, rows).view(np.uint8), mode="clip")
        spread = np.square(scales_per_row(scale, layer, rows) / np.float32(largest))
        total += np.einsum("oi,oi->i", np.broadcast_to(spread, squares_OI.shape), squares_OI)
    total *= largest * largest
    if not np.isfinite(total).all():
        name = layer.weight.name
        raise TensorError("the weight has NaN or infinite values", path=checkpoint.path_of(name), tensor=name)
    return total


def unit_rows(
    random: np.random.Generator, simulation: Simulation, in_features: int, lora_rows_RI: Float32 | None = None
) -> Float32:
    """Float32 rows of unit variance: normal, [samples, in], or a LoRA's with noise and both signs, [4 · rank, in].

    Args:
        random: where from.
        simulation: how many.
        in_features: their length.
        lora_rows_RI: rows of the LoRA's A, float32 [rank, in].
    """
    if lora_rows_RI is None or not np.any(lora_rows_RI):
        return random.standard_normal((simulation.samples, in_features), dtype=np.float32)
    spread = float(lora_rows_RI.std(dtype=np.float64))  # in float32 the squares of small rows are 0
    noisy = [
        lora_rows_RI + np.float32(level * spread) * random.standard_normal(lora_rows_RI.shape, dtype=np.float32)
        for level in NOISE_LEVELS
    ]
    rows: Float32 = np.concatenate([*noisy, -lora_rows_RI])
    rows /= np.float32(rows.std(dtype=np.float64))
    return rows


def percentile_of(magnitudes: Float32, percentile: float) -> float:
    """The k-th smallest magnitude, with k = ⌊n · percentile / 100⌋, at least 1; as `torch.kthvalue` counts.

    >>> percentile_of(np.float32([1, 2, 3, 4]), 50)
    2.0
    """
    flat = magnitudes.reshape(-1)
    rank = min(max(int(len(flat) * percentile / 100), 1), len(flat))
    return float(np.partition(flat, rank - 1)[rank - 1])


def input_range(unit_RI: Float32, squares_I: NDArray[np.float64], out_features: int, percentile: float) -> float:
    """Range of the balanced input of a layer.

    Args:
        unit_RI: rows of unit variance, [rows, in].
        squares_I: sums of squares of the weight's columns, [in].
        out_features: rows of the weight.
        percentile: of |x|.

    Returns:
        The percentile; 0 where the weight is all zero. Channels whose weights are all zero are left out: nothing tells
        what they carry, and nothing hears them.
    """
    heard = squares_I > 0
    if not heard.any():
        return 0.0
    factors = np.sqrt(out_features / np.count_nonzero(heard) / squares_I[heard])
    largest = float(factors.max())  # taken out, so that float32 holds the rest
    relative_RI = unit_RI[:, heard] * (factors / largest).astype(np.float32)
    return percentile_of(np.abs(relative_RI, out=relative_RI), percentile) * largest


def simulate(
    checkpoint: Checkpoint,
    layers: Mapping[str, Layer],
    simulation: Simulation,
    lora_rows: Callable[[str], Float32 | None] | None = None,
    progress: Advance | None = None,
) -> dict[str, float]:
    """Ranges of many layers, side by side in threads.

    Args:
        checkpoint: where they are.
        layers: FP8 layers by name.
        simulation: how.
        lora_rows: layer name -> rows of its LoRA's A, or None.
        progress: told the bytes of weight that were done.

    Returns:
        Range by layer name, margin excluded, in the order of `layers`; 0 where a weight is empty or all zero.

    Raises:
        TensorError: a weight has NaN or infinite values.
    """

    def run(layer: Layer) -> float:
        found = 0.0
        if layer.weight.elements:
            rows_RI = lora_rows(layer.name) if lora_rows else None
            unit_RI = unit_rows(generator(simulation.seed, layer.name), simulation, layer.in_features, rows_RI)
            squares_I = column_squares(checkpoint, layer)
            found = input_range(unit_RI, squares_I, layer.out_features, simulation.percentile)
        if progress is not None:
            progress(layer.weight.nbytes)
        return found

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(layers, pool.map(run, layers.values()), strict=True))
