"""Guesses input ranges from the weight alone, one layer at a time, for models that cannot be run.

A weight does not determine its input range, since a factor can move between them. But it shows how its input channels
relate: a trained layer uses all of them, so channels with small weights have large values. The input is simulated as

    x_j = z_j · sqrt(out / in) / ‖W_:j‖        z of unit variance

so that every channel contributes equally to an output of unit variance: Var(y) = (1/out) Σ_j ‖W_:j‖² · Var(x_j) = 1.
The range is a percentile of |x| times a margin (8 by default, since FP8 tolerates headroom but not clipping).

z is normal. For layers with a LoRA, z is the rows of its A with small noise and both signs, at unit variance: real
inputs had these directions. No weight is ever completely in memory, and FP8 needs no torch.
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
from ..layers import Layer, dequantize
from ..telling import Advance

DEFAULT_MARGIN = 8.0
NOISE_LEVELS = (0.0, 0.1, 0.2)
"""Noise added to each copy of a LoRA's rows, in their standard deviations."""

_ROWS = 64
"""Rows of a weight per step: 64 × 15,360 values in float32 are 4 MB."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Simulation:
    """How inputs are simulated.

    Attributes:
        samples: rows of random input; a LoRA has its own number of rows.
        percentile: of the simulated magnitudes, in (0, 100].
        seed: of the random numbers, together with the name of the layer.
    """

    samples: int = 64
    percentile: float = 99.9
    seed: int = 42


def generator(seed: int, layer: str) -> np.random.Generator:
    """Random numbers of one layer, independent of other layers and their order."""
    return np.random.default_rng([seed, zlib.crc32(layer.encode("utf-8"))])


def column_squares(checkpoint: Checkpoint, layer: Layer) -> NDArray[np.float64]:
    """Sum of squares of every column of a layer's real weight: float64 [in].

    Raises:
        TensorError: the weight has NaN or infinite values.
    """
    total = np.zeros(layer.in_features)
    for rows in spans(layer.out_features, _ROWS):
        weight_OI = dequantize(checkpoint, layer, rows)
        # einsum, not @: BLAS would start its own threads under each of ours and take three times as long.
        total += np.einsum("oi,oi->i", weight_OI, weight_OI, dtype=np.float64)
    if not np.isfinite(total).all():
        name = layer.weight.name
        raise TensorError("the weight has NaN or infinite values", path=checkpoint.path_of(name), tensor=name)
    return total


def unit_rows(
    random: np.random.Generator, simulation: Simulation, in_features: int, lora_rows_RI: Float32 | None = None
) -> Float32:
    """Float32 rows of unit variance: normal, [samples, in], or a LoRA's A with noise and both signs, [4 · rank, in]."""
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
    """A percentile of |x| of the balanced input of a layer, from rows of unit variance and squares of columns.

    It is 0 if the weight is all zero. Channels whose weights are all zero are left out: they have no effect, and
    nothing shows their values.
    """
    used = squares_I > 0
    if not used.any():
        return 0.0
    factors = np.sqrt(out_features / np.count_nonzero(used) / squares_I[used])
    largest = float(factors.max())  # factored out so that the rest fits float32
    relative_RI = unit_RI[:, used] * (factors / largest).astype(np.float32)
    return percentile_of(np.abs(relative_RI, out=relative_RI), percentile) * largest


def simulate(
    checkpoint: Checkpoint,
    layers: Mapping[str, Layer],
    simulation: Simulation,
    lora_rows: Callable[[str], Float32 | None] | None = None,
    progress: Advance | None = None,
) -> dict[str, float]:
    """Guess the ranges of many layers, in parallel threads.

    `lora_rows` gives the LoRA's A of a layer, or None; `progress` gets the bytes of each finished weight.

    Returns:
        Range by layer name, without margin, in the order of `layers`; 0 if a weight is empty or all zero.

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
