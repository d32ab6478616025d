"""Number formats of linear layers: one file per family, each with a tuple `FORMATS`, found by listing the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from .. import names
from . import fp8
from .record import Format, Grid

FORMATS: Mapping[str, Format] = {
    fmt.name: fmt
    for found in iter_modules(__path__)
    for fmt in getattr(import_module(f"{__name__}.{found.name}"), "FORMATS", ())
}
"""Every format that is read, written or recognized, by its name in `--format`."""

DEFAULT = FORMATS["fp8"]
"""The default of `--format`, and the format of legacy files."""

FLOAT_GRIDS: Mapping[str, Grid] = {grid.dtype: grid for grid in (fp8.E4M3FN, fp8.E5M2)}
"""Grids of float dtypes that numpy lacks, by dtype."""

DEFAULT_GRID = fp8.E4M3FN
"""The grid of its inputs."""

GRIDS: Mapping[str, Grid] = {fmt.input_grid.name: fmt.input_grid for fmt in FORMATS.values() if fmt.input_grid}
"""Grids of inputs, by name."""

WRITTEN = tuple(name for name, fmt in FORMATS.items() if fmt.granularity is not None)
"""The formats that can be written."""


def of_mark(config: Mapping[str, Any], parts: Mapping[str, tuple[int, ...]] | None = None) -> Format | None:
    """The format that a quantization config declares, if it is known; `parts` are shapes of the layer's tensors.

    >>> of_mark({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).name, of_mark({"format": "banana"})
    ('fp8', None)
    """
    nested = config.get("params")
    said = {**(nested if isinstance(nested, dict) else {}), **config}
    fitting = [fmt for fmt in FORMATS.values() if fmt.mark.items() <= said.items()]
    most = max((len(fmt.mark) for fmt in fitting), default=0)
    return _shaped([fmt for fmt in fitting if len(fmt.mark) == most], parts or {})


def recognize(name: str, dtype: str, tensors: Mapping[str, Any]) -> Format | None:
    """The format that fits a layer's dtype and tensors; of several, the one that requires most tensors.

    FP8 without a scale also fits: its codes are the weights. `tensors` are those of the whole file, by name.
    """
    stored = [fmt for fmt in FORMATS.values() if dtype in fmt.dtypes]
    fitting = [fmt for fmt in stored if all(name + suffix in tensors for suffix in fmt.scales)]
    if not fitting:
        return next((fmt for fmt in stored if dtype in FLOAT_GRIDS), None)
    fitting = [fmt for fmt in fitting if tensors[name + fmt.scales[0]].dtype in fmt.scale_dtypes] or fitting
    most = max(len(fmt.scales) for fmt in fitting)
    fitting = [fmt for fmt in fitting if len(fmt.scales) == most]
    parts = {suffix: tensors[name + suffix].shape for suffix in (names.WEIGHT, *fitting[0].scales)}
    return _shaped(fitting, parts)


def _shaped(fitting: Sequence[Format], parts: Mapping[str, tuple[int, ...]]) -> Format | None:
    """The first of some formats that fits these shapes, else the first."""
    shaped = [fmt for fmt in fitting if parts and fmt.shape(parts[names.WEIGHT], parts) is not None]
    return next(iter(shaped or fitting), None)
