"""What a number format is: a grid of values, scales, a mark, and what readers do to a layer's inputs.

Everything else takes from here what it needs to know of a format: conversion, reading, calibration, simulation and
reports. A format is a `Format` in its family's file beside this one, and in the table `FORMATS`.

A quantized weight is codes C and scales s with W ≈ grid value of C × s. A `Grid` says what the codes mean and which
code is the nearest to a number; everything that has codes of one byte is derived from the 256 meanings.

Everything is numpy and runs on the CPU. Chunks keep temporaries in the second-level cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import names

CHUNK = 1 << 16
"""Values handled at a time: 64 Ki uint16 values, their int64 indices and their codes stay in a core's L2."""

FLOAT_SCALES = ("F32", "F16", "BF16", "F64")
"""Dtypes of scales that are plain numbers."""

Granularity = Literal["tensor", "row", "block"]


def spans(count: int, step: int = CHUNK) -> Iterator[slice]:
    """Slices that cover range(count) in steps."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact float32 values of bfloat16 bit patterns.

    Args:
        bits: uint16, any shape.

    Returns:
        float32, the same shape.
    """
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def scale_grid(weight_shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Scales per dimension of a weight (out, in) in blocks (b_out, b_in).

    >>> scale_grid((100, 64), (64, 64))
    (2, 1)
    """
    return -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])


@dataclass(frozen=True)
class Grid(ABC):
    """The values that codes of one byte stand for.

    Attributes:
        name: as torch spells the dtype of the codes.
        dtype: as a safetensors header spells it.
        max: the largest finite value.
        smallest_normal: from here on the rounding error is relative to the value, as far as the grid is relative.
    """

    name: str
    dtype: str
    max: float
    smallest_normal: float

    @abstractmethod
    def meanings(self) -> NDArray[np.float64]:
        """What each code means, [256] by the code's byte; NaN and infinity where the grid has them."""

    @abstractmethod
    def encode(self, numbers: NDArray[np.float32]) -> NDArray[Any]:
        """Nearest codes, ties to even, saturating at ±max.

        Args:
            numbers: float32, any shape.

        Returns:
            Codes of one byte, the same shape.
        """

    def decode(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        """What codes mean.

        Args:
            codes: of one byte, any shape.

        Returns:
            float32, the same shape.
        """
        flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
        numbers = np.empty(flat.shape, np.float32)
        for span in spans(len(flat)):
            np.take(self.values, flat[span], out=numbers[span], mode="clip")
        return numbers.reshape(np.shape(codes))

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """`meanings` as float32 [256], read-only."""
        return _read_only(self.meanings().astype(np.float32))

    @cached_property
    def levels(self) -> NDArray[np.float64]:
        """The finite values that are not negative, ascending, from 0 to `max`; float64 [n], read-only."""
        meanings = self.meanings()
        return _read_only(np.unique(np.abs(meanings[np.abs(meanings) <= self.max])))

    @cached_property
    def midpoints(self) -> NDArray[np.float64]:
        """Where rounding goes from one of `levels` to the next; float64 [n - 1], read-only."""
        return _read_only((self.levels[1:] + self.levels[:-1]) / 2)

    @cached_property
    def smallest_step(self) -> float:
        """The least positive value, which is also the least distance between two values."""
        return float(self.levels[1])

    @cached_property
    def largest_rounded(self) -> float:
        """Up to here numbers become `max` by rounding: half a step above it."""
        return self.max + float(self.max - self.levels[-2]) / 2

    @cached_property
    def worst_rounding_db(self) -> float:
        """Least signal to noise of any numbers between `smallest_normal` and `largest_rounded`.

        The worst is a midpoint just above `smallest_normal` times a power of two.
        """
        normal = self.midpoints > self.smallest_normal
        errors = (self.midpoints - self.levels[:-1])[normal] / self.midpoints[normal]
        return -20 * math.log10(float(errors.max()))


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class Format:
    """A number format of linear layers, as ComfyUI or its nodes read it.

    Attributes:
        name: its key in `FORMATS`, as `--format` takes it.
        title: for people, "FP8".
        mark: what a comfy_quant entry says of it; "format" and what else tells it from others.
        dtypes: what its weights are stored as; the first is written.
        bits: per weight, scales included where they are one per some weights.
        scales: suffixes of the tensors that a weight cannot be read without; the first sizes its values.
        scale_dtypes: of the first of `scales`.
        grid: of its weights' codes; None where the format is only recognized, not read.
        granularity: what shares a scale where this format is written; None where it is not written.
        scale_rank: dimensions of a written weight scale: 0 is a scalar, 1 one per row, 2 one per block.
        input_grid: of the codes that readers make of a layer's inputs; None where it is only recognized.
        static: whether files hold a scale of a layer's inputs, `input_scale`, which a calibration finds.
        dynamic: whether readers scale inputs as they come, by absmax / max of each row, and use no `input_scale`.
        side_multiple: both sides of a weight must be multiples of it.
        ranged_by: suffix of the scale that says how large the weights can get.
        range: the largest weight at a scale of 1.
        least_scale: a weight scale is never smaller.
        zero_scale: the weight scale where all weights are 0.
        cards: what multiplies it natively; "" where nothing does.
        since: the ComfyUI that first read it; "" where only the ComfyUI-QuantOps nodes do.
    """

    name: str
    title: str
    mark: Mapping[str, Any]
    dtypes: tuple[str, ...]
    bits: float
    scales: tuple[str, ...] = (names.WEIGHT_SCALE,)
    scale_dtypes: tuple[str, ...] = FLOAT_SCALES
    grid: Grid | None = None
    granularity: Granularity | None = None
    scale_rank: int = 0
    input_grid: Grid | None = None
    static: bool = False
    dynamic: bool = True
    side_multiple: int = 1
    ranged_by: str | None = names.WEIGHT_SCALE
    range: float = 0.0
    least_scale: float = float(np.finfo(np.float32).smallest_subnormal)
    zero_scale: float = 1.0
    cards: str = ""
    since: str = ""

    @property
    def marked(self) -> str:
        """The word of its mark."""
        word: str = self.mark["format"]
        return word

    @property
    def read_by(self) -> str:
        """What reads it, for people."""
        return f"ComfyUI since {self.since}" if self.since else "the ComfyUI-QuantOps nodes"

    @property
    def codes(self) -> Grid:
        """The grid of a format that is read."""
        assert self.grid is not None, self.name
        return self.grid

    def block(self, weight_shape: tuple[int, int], block_size: int) -> tuple[int, int]:
        """The weights (b_out, b_in) that share one scale where a weight (out, in) is written."""
        return {"tensor": weight_shape, "row": (1, weight_shape[1]), "block": (block_size, block_size)}[
            self.granularity or "tensor"
        ]

    def scale_shape(self, weight_shape: tuple[int, int], block_size: int) -> tuple[int, ...]:
        """The shape of the weight scale that is written for a weight (out, in)."""
        return scale_grid(weight_shape, self.block(weight_shape, block_size))[: self.scale_rank]

    def weight_scales(self, absmax: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scales at which nothing is clipped: absmax / max, but never under `least_scale`; float32, the same shape."""
        scale = np.maximum(absmax.astype(np.float32) / np.float32(self.codes.max), np.float32(self.least_scale))
        result: NDArray[np.float32] = np.where(absmax == 0, np.float32(self.zero_scale), scale).astype(np.float32)
        return result

    def config(self, block_size: int) -> dict[str, Any]:
        """What the mark of a layer says that is written in this format."""
        return {**self.mark, **({"group_size": block_size} if self.granularity == "block" else {})}
