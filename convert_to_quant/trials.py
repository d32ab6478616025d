"""What trial runs of a model found: how much each number format would damage each layer. See `engines.trials`.

Everything is a sum over images, so parts of a run, and runs on other images, add up.
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
COLUMNS = {"trial_error": "F64", "trial_damage": "F64", "trial_count": "I64"}


def decibels(damage: NDArray[np.float64]) -> float:
    """The mean over moments of the ratio of signal to error, in dB."""
    return float(np.mean(-10 * np.log10(damage + TINY)))


@dataclass(frozen=True)
class Trials:
    """Sums of relative error energies of L layers in F formats at M moments (a way of conditioning, a noise level).

    Attributes:
        layers: names.
        formats: keys of `formats.FORMATS`.
        moments: what they are called.
        error: of the layer's own output, float64 [L, F, M]; 0 where a layer cannot be in a format.
        damage: of the velocity, where that layer alone is in that format, float64 [L, F, M].
        count: images that `damage` sums, int64 [L, F, M]; 0 where a format was not run to the end.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    moments: tuple[str, ...]
    error: NDArray[np.float64]
    damage: NDArray[np.float64]
    count: NDArray[np.int64]

    @staticmethod
    def empty(layers: tuple[str, ...], formats: tuple[str, ...], moments: tuple[str, ...]) -> Trials:
        """Nothing tried yet."""
        shape = len(layers), len(formats), len(moments)
        return Trials(layers, formats, moments, np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64))

    def mean_damage(self, layer: str, fmt: str) -> NDArray[np.float64] | None:
        """The damage at every moment, [M]; None where it was not measured."""
        if layer not in self.layers or fmt not in self.formats:
            return None
        place = self.layers.index(layer), self.formats.index(fmt)
        count = self.count[place]
        return self.damage[place] / count if count.all() else None

    def estimated_damage(self, layer: str, fmt: str) -> NDArray[np.float64] | None:
        """The damage of a format that was not run to the end, [M]; None where nothing tells.

        It is that of a format of the same size which was, times the ratio of their output errors.
        """
        if layer not in self.layers or fmt not in self.formats:
            return None
        errors = self.error[self.layers.index(layer)]
        for name, error in zip(self.formats, errors, strict=True):
            damage = self.mean_damage(layer, name)
            if damage is not None and error.all() and FORMATS[name].bits == FORMATS[fmt].bits:
                own = errors[self.formats.index(fmt)]
                return damage * own / error if own.all() else None
        return None

    def plus(self, other: Trials) -> Trials:
        """Both together.

        Raises:
            StatisticsError: they are of other layers, formats or moments.
        """
        for what in ("layers", "formats", "moments"):
            if getattr(self, what) != getattr(other, what):
                raise StatisticsError(f"trials of other {what} do not add up")
        sums = {what: getattr(self, what) + getattr(other, what) for what in ("error", "damage", "count")}
        return replace(self, **sums)

    def entries(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """Tensors and a header entry, to stand in a file of statistics."""
        head = {what: list(getattr(self, what)) for what in ("layers", "formats", "moments")}
        arrays = (self.error, self.damage, self.count)
        tensors = {name: Entry.of(array) for name, array in zip(COLUMNS, arrays, strict=True)}
        return tensors, {METADATA_KEY: json.dumps({"format_version": 1, **head})}

    @staticmethod
    def load(path: StrPath) -> Trials | None:
        """The trials in a file of statistics; None where it has none.

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
            said = head if isinstance(head, dict) else {}
            names: list[Any] = [said.get(what) for what in ("layers", "formats", "moments")]
            if not all(isinstance(each, list) and is_texts(each) for each in names):
                raise damaged("without their layers, formats or moments")
            layers, formats, moments = (tuple(each) for each in names)
            shape = (len(layers), len(formats), len(moments))
            for name, dtype in COLUMNS.items():
                info = checkpoint.tensors.get(name)
                if info is None or (info.dtype, info.shape) != (dtype, shape):
                    raise damaged(f"not {dtype} {list(shape)}")
            error, damage, count = map(checkpoint.bits, COLUMNS)
        if not all(np.isfinite(each).all() and (each >= 0).all() for each in (error, damage)):
            raise damaged("not finite, or less than 0")
        return Trials(layers, formats, moments, error, damage, count)
