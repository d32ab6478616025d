"""Results of trial runs: how much each number format damages the output in each layer. See `engines.trials`.

All columns are sums over images, so parts of a run and runs on other images can be added.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Entry, open_checkpoint
from .errors import StatisticsError, StrPath
from .formats import FORMATS
from .untrusted import is_texts, parse_json

METADATA_KEY = "convert_to_quant.trials"
TINY = 1e-12
AXES = ("layers", "formats", "moments")
COLUMNS = {"error": "F64", "damage": "F64", "count": "I64"}
"""Fields of `Trials` with their dtypes in a file, where their names begin with "trial_"."""


def decibels(damage: NDArray[np.float64]) -> float:
    """The mean over moments of the SQNR in dB."""
    return float(np.mean(-10 * np.log10(damage + TINY)))


@dataclass(frozen=True)
class Trials:
    """Sums of relative error energies for L layers, F formats and M moments (a way of conditioning, a noise level).

    Attributes:
        layers: their names.
        formats: keys of `formats.FORMATS`.
        moments: their names.
        error: of the layer's own output, float64 [L, F, M]; 0 where a layer cannot be in a format.
        damage: of the velocity, with only that layer in that format, float64 [L, F, M].
        count: the number of images in `damage`, int64 [L, F, M]; 0 where a format was not run to the end.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    moments: tuple[str, ...]
    error: NDArray[np.float64]
    damage: NDArray[np.float64]
    count: NDArray[np.int64]

    @staticmethod
    def empty(layers: tuple[str, ...], formats: tuple[str, ...], moments: tuple[str, ...]) -> Trials:
        """Trials before the first run."""
        shape = len(layers), len(formats), len(moments)
        return Trials(layers, formats, moments, np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64))

    def mean_damage(self, layer: str, fmt: str) -> NDArray[np.float64] | None:
        """The measured damage at each moment, [M]; None where it was not measured."""
        if layer not in self.layers or fmt not in self.formats:
            return None
        place = self.layers.index(layer), self.formats.index(fmt)
        count = self.count[place]
        return self.damage[place] / count if count.all() else None

    def expected_damage(self, layer: str, fmt: str) -> NDArray[np.float64] | None:
        """The measured damage, or an estimate of it, [M]; None where nothing is known.

        The estimate is the damage of another format with the same number of bits, times the ratio of output errors.
        """
        damage = self.mean_damage(layer, fmt)
        if damage is not None or layer not in self.layers or fmt not in self.formats:
            return damage
        errors = dict(zip(self.formats, self.error[self.layers.index(layer)], strict=True))
        for name, error in errors.items():
            damage = self.mean_damage(layer, name)
            if damage is not None and error.all() and FORMATS[name].bits == FORMATS[fmt].bits:
                return damage * errors[fmt] / error if errors[fmt].all() else None
        return None

    def plus(self, other: Trials) -> Trials:
        """The sum of both.

        Raises:
            StatisticsError: they are for different layers, formats or moments.
        """
        for axis in AXES:
            if getattr(self, axis) != getattr(other, axis):
                raise StatisticsError(f"trials of different {axis} cannot be added")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in COLUMNS})

    def entries(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """Tensors and a header entry, to be stored in a statistics file."""
        head = {"format_version": 1, **{axis: list(getattr(self, axis)) for axis in AXES}}
        tensors = {f"trial_{name}": Entry.of(getattr(self, name)) for name in COLUMNS}
        return tensors, {METADATA_KEY: json.dumps(head)}

    @staticmethod
    def load(path: StrPath) -> Trials | None:
        """The trials in a statistics file; None if it has none.

        Raises:
            CheckpointError: it cannot be read as a safetensors file.
            StatisticsError: they are damaged.
        """
        with open_checkpoint(path) as checkpoint:
            if METADATA_KEY not in checkpoint.metadata:
                return None

            def damaged(problem: str) -> StatisticsError:
                return StatisticsError(f"damaged: the trials are {problem}", path=Path(path), hint="run them again")

            head: Any = parse_json(checkpoint.metadata[METADATA_KEY], damaged)
            axes: dict[str, Any] = {axis: head.get(axis) if isinstance(head, dict) else None for axis in AXES}
            if not all(each and is_texts(each) for each in axes.values()):
                raise damaged("without their layers, formats or moments")
            shape = tuple(len(each) for each in axes.values())
            for name, dtype in COLUMNS.items():
                info = checkpoint.tensors.get(f"trial_{name}")
                if info is None or (info.dtype, info.shape) != (dtype, shape):
                    raise damaged(f"not {dtype} {list(shape)}")
            columns: Any = {name: checkpoint.bits(f"trial_{name}") for name in COLUMNS}
        if not all((np.isfinite(each) & (each >= 0)).all() for each in columns.values()):
            raise damaged("not finite, or negative")
        layers, formats, moments = map(tuple, axes.values())
        return Trials(layers, formats, moments, **columns)
