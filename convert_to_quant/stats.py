"""What was observed of the inputs of a model's linear layers: columns over layers, mergeable, in one file.

Observing a model is slow and choosing scales is fast. So observations are stored in a form that later choices need and
that adds up over prompts, runs, machines and GPUs: each column is a maximum or a sum, and merging is elementwise `max`
or `+`. Histograms always span the whole range of float32 (`kernels/__init__.py` defines the bins), so they add without
rebinning.

Counts and maxima merge exactly, in any order. Sums of squares are float64; `==` ignores their last bits, which depend
on the order.

Noise levels. Diffusion models run from sigma 1 (noise) to 0 (image). Absmax, count and sum of squares are kept in eight
bins of sigma, and a ninth for inputs of unknown sigma.

Which model. Names and shapes do not distinguish two models of one family, so a few weights of each layer are stored as
well. Quantization, an adapter or a fine-tune changes them slightly, another training run completely (`alike`).

The file is a safetensors file: one tensor per column; names, shapes and provenance are JSON in its header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .checkpoint import Checkpoint, Entry, open_checkpoint, write_checkpoint
from .errors import StatisticsError, StrPath
from .kernels import BINS, NONFINITE_BIN, SIGMA_BINS, UNKNOWN_SIGMA
from .names import STATISTICS_KEY
from .untrusted import is_count, is_texts, parse_json

FORMAT_VERSION = 1
METADATA_KEY = STATISTICS_KEY

SIGMA_COLUMNS = SIGMA_BINS + 1

BIN_EDGES: NDArray[np.float64] = np.append(
    (np.arange(NONFINITE_BIN, dtype=np.uint32) << 19).view(np.float32).astype(np.float64), 2.0**128
)
"""[NONFINITE_BIN + 1]: bin i holds BIN_EDGES[i] <= |x| < BIN_EDGES[i + 1]. Exact."""

BIN_CENTRES: NDArray[np.float64] = (BIN_EDGES[:-1] + BIN_EDGES[1:]) / 2
"""[NONFINITE_BIN]: the mean of values that are uniform within a bin."""

Shape = tuple[int, int]
"""[out_features, in_features] of a layer's weight."""


@dataclass(frozen=True)
class Column:
    """One number, or one array of a shape, per layer; `merge` combines two of them."""

    dtype: type[np.generic]
    shape: tuple[int, ...]
    merge: np.ufunc


COLUMNS: dict[str, Column] = {
    "sigma_absmax": Column(np.float32, (SIGMA_COLUMNS,), np.maximum),
    "sigma_count": Column(np.int64, (SIGMA_COLUMNS,), np.add),
    "sigma_squares": Column(np.float64, (SIGMA_COLUMNS,), np.add),
    "zeros": Column(np.int64, (), np.add),
    "calls": Column(np.int64, (), np.add),
    "rows": Column(np.int64, (), np.add),
    "rows_per_sample": Column(np.int64, (), np.maximum),
    "histogram": Column(np.int64, (BINS,), np.add),
    "row_histogram": Column(np.int64, (BINS,), np.add),
}
"""The stored columns. Everything else follows from them."""

CHANNELS = "channel_absmax"
"""Another column, with one entry per input channel of each layer; older files lack it."""

WEIGHTS = "weights"
"""A further tensor: weights of each layer, float32 [L, SAMPLED], zeros where unknown."""

SAMPLED = 64
"""Stored weights per layer."""

DERIVED = ("absmax", "count", "nonfinite", "sum_of_squares")
"""Columns that a file has for other readers; this module computes them."""


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """What was observed of a model's layers. The first axis of arrays is the layers, in the order of `layers`.

    Attributes:
        layers: layer name -> shape of its weight, [out_features, in_features].
        sigma_absmax: largest finite |x| per noise level; 0 where nothing was observed. Float32 [L, 9].
        sigma_count: finite values per noise level.
        sigma_squares: sum of squares of the finite values per noise level.
        zeros: values that are 0 or -0.
        calls: how often the layer ran.
        rows: tokens observed.
        rows_per_sample: the most tokens per sample of a batch in one call; 1 for layers that see one token per image
            (modulation, time and vector embedders), 0 for layers that never ran.
        histogram: values per bin of |x|; infinities and NaN in `NONFINITE_BIN`.
        row_histogram: tokens per bin of their absmax over finite values.
        channel_absmax: per layer, the largest |x| of each input channel in a sample of tokens, float32 [in]; empty if
            unknown, not finite, or 0.
        samples: images that the model ran for.
        provenance: facts about the run, each a sorted set of texts, so that merging is a union: "tool", "engine",
            "seed", "conditioning", "lora", "unseen", ...
        left_out: layers that a forced merge or selection dropped.
        weights: of some layers, by name: the weights at `sampled_place`, float32 [64].
        metadata: other entries of the file's header; not merged.
        path: of the file they were loaded from.
    """

    layers: Mapping[str, Shape]
    sigma_absmax: NDArray[np.float32]
    sigma_count: NDArray[np.int64]
    sigma_squares: NDArray[np.float64]
    zeros: NDArray[np.int64]
    calls: NDArray[np.int64]
    rows: NDArray[np.int64]
    rows_per_sample: NDArray[np.int64]
    histogram: NDArray[np.int64]
    row_histogram: NDArray[np.int64]
    channel_absmax: tuple[NDArray[np.float32], ...] = ()
    samples: int = 0
    provenance: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        for name, column in COLUMNS.items():
            array = getattr(self, name)
            expected = (len(self.layers), *column.shape)
            assert array.dtype == column.dtype, f"{name}: {array.dtype}"
            assert array.shape == expected, f"{name}: {array.shape}, not {expected}"
        channels = self.channel_absmax or (_UNKNOWN,) * len(self.layers)
        known = (each if np.isfinite(each).all() and each.any() else _UNKNOWN for each in channels)
        object.__setattr__(self, CHANNELS, tuple(known))

    @staticmethod
    def empty(layers: Mapping[str, Shape]) -> Statistics:
        """Statistics before the first observation."""
        columns: dict[str, Any] = {n: np.zeros((len(layers), *c.shape), c.dtype) for n, c in COLUMNS.items()}
        return Statistics(dict(layers), **columns)

    def __eq__(self, other: object) -> bool:
        """Whether both are the same, whatever their files: sums within 1e-12, everything else exactly."""
        if not isinstance(other, Statistics):
            return NotImplemented
        return (
            list(self.layers.items()) == list(other.layers.items())
            and (self.samples, self.left_out) == (other.samples, other.left_out)
            and dict(self.provenance) == dict(other.provenance)
            and np.allclose(self.sigma_squares, other.sigma_squares, rtol=1e-12, atol=0)
            and all(np.array_equal(getattr(self, n), getattr(other, n)) for n in COLUMNS if n != "sigma_squares")
            and all(map(np.array_equal, self.channel_absmax, other.channel_absmax))
            and self.weights.keys() == other.weights.keys()
            and all(np.array_equal(each, other.weights[name]) for name, each in self.weights.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Statistics of {len(self.layers)} layers, {int(self.visited.sum())} visited, {self.samples} samples>"

    @property
    def names(self) -> tuple[str, ...]:
        """Layer names, in the order of the columns."""
        return tuple(self.layers)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.layers)}

    def index(self, layer: str) -> int:
        """The index of a layer.

        Raises:
            StatisticsError: it is missing.
        """
        if layer not in self._index:
            raise StatisticsError("no such layer in the statistics", path=self.path, tensor=layer)
        return self._index[layer]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the observed model: SHA-256 of the names and shapes of its layers in any order."""
        listing = sorted([name, *shape] for name, shape in self.layers.items())
        return hashlib.sha256(json.dumps(listing, separators=(",", ":")).encode()).hexdigest()

    @property
    def absmax(self) -> NDArray[np.float32]:
        """Largest finite |x|, float32 [L]; 0 for layers that never ran or saw only zeros."""
        largest: NDArray[np.float32] = self.sigma_absmax.max(1)
        return largest

    @property
    def count(self) -> NDArray[np.int64]:
        """Number of finite values, [L]."""
        total: NDArray[np.int64] = self.sigma_count.sum(1)
        return total

    @property
    def nonfinite(self) -> NDArray[np.int64]:
        """Number of infinities and NaN, [L]; they count in `histogram` only."""
        return self.histogram[:, NONFINITE_BIN]

    @property
    def sum_of_squares(self) -> NDArray[np.float64]:
        """Sum of squares of finite values, [L]."""
        total: NDArray[np.float64] = self.sigma_squares.sum(1)
        return total

    @property
    def mean_square(self) -> NDArray[np.float64]:
        """Mean of x^2, [L]; 0 where nothing was observed."""
        return self.sum_of_squares / np.maximum(self.count, 1)

    @property
    def sigma_mean_square(self) -> NDArray[np.float64]:
        """Mean of x^2 per noise level, [L, 9]; 0 where nothing was observed."""
        return self.sigma_squares / np.maximum(self.sigma_count, 1)

    @property
    def visited(self) -> NDArray[np.bool_]:
        """Layers that ran at least once, [L]."""
        ran: NDArray[np.bool_] = self.calls > 0
        return ran

    @property
    def unseen(self) -> tuple[str, ...]:
        """Layers that ran but whose inputs could not be observed; see `recorder`."""
        told = set(self.provenance.get("unseen", ()))
        return tuple(name for name, seen in zip(self.layers, self.visited, strict=True) if name in told and not seen)

    @property
    def one_row(self) -> NDArray[np.bool_]:
        """Layers that see one token per sample, [L]."""
        single: NDArray[np.bool_] = self.rows_per_sample == 1
        return single

    def quantiles(self, q: float) -> NDArray[np.float64]:
        """The q-quantile of |x| of each layer, [L], with values uniform within a bin; 0 where nothing was observed.

        It is off by at most one bin (1/16 of an octave); q = 1 gives absmax exactly.
        """
        counts = self.histogram[:, :NONFINITE_BIN]
        cumulative = counts.cumsum(1)
        wanted = q * cumulative[:, -1]
        number = ((cumulative >= wanted[:, None]) & (cumulative > 0)).argmax(1)
        layer = np.arange(len(counts))
        inside = counts[layer, number]
        part = np.clip((wanted - cumulative[layer, number] + inside) / np.maximum(inside, 1), 0, 1)
        values = BIN_EDGES[number] + part * (BIN_EDGES[number + 1] - BIN_EDGES[number])
        found: NDArray[np.float64] = np.minimum(values, self.absmax)
        return found

    def rows_below(self, thresholds: NDArray[Any] | float) -> NDArray[np.float64]:
        """Share of tokens whose absmax is below a threshold but not zero.

        Tokens of zeros lose nothing at any scale, so bin 0 (below 2^-130) never counts.

        Args:
            thresholds: positive, [L] or one number.

        Returns:
            [L]; exact at bin edges, linear in between; 0 for layers without tokens.
        """
        counts = self.row_histogram[:, :NONFINITE_BIN]
        under_edges = counts.cumsum(1) - counts[:, :1]  # of bins, but the first
        limits = np.broadcast_to(thresholds, len(counts))
        below = [np.interp(limit, BIN_EDGES[1:], row) for limit, row in zip(limits, under_edges, strict=True)]
        share: NDArray[np.float64] = np.array(below) / np.maximum(counts.sum(1), 1)
        return share

    def with_facts(self, samples: int | None = None, **facts: object) -> Statistics:
        """A copy with further entries of `provenance`: one value each, or several, stored as texts."""
        provenance = {**self.provenance, **{key: _texts(value) for key, value in facts.items()}}
        return self.replace(samples=self.samples if samples is None else samples, provenance=provenance)

    def replace(self, **changes: Any) -> Statistics:
        """A copy with other values in some of its fields."""
        return Statistics(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **changes})

    def take(self, names: Iterable[str]) -> Statistics:
        """The statistics of some layers, in the given order.

        Raises:
            StatisticsError: one of them is missing.
        """
        chosen = list(names)
        numbers = [self.index(name) for name in chosen]
        return self.replace(layers={name: self.layers[name] for name in chosen}, **self.columns(numbers))

    def columns(self, numbers: Sequence[int]) -> dict[str, Any]:
        """All columns of the layers with these indices, as arguments for `replace`."""
        channels = tuple(self.channel_absmax[number] for number in numbers)
        return {name: getattr(self, name)[list(numbers)] for name in COLUMNS} | {CHANNELS: channels}

    def other_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> set[str]:
        """The layers that had different weights when they were observed; see `alike`."""
        return {name for name in weights.keys() & self.weights.keys() if not alike(weights[name], self.weights[name])}

    def for_layers(
        self,
        layers: Mapping[str, Shape],
        force: bool = False,
        *,
        weights: Mapping[str, NDArray[np.float32]] | None = None,
        model: Path | None = None,
    ) -> Statistics:
        """The statistics of a model's layers, to be used on that model. Further observed layers are dropped.

        Args:
            layers: layer name -> shape of its weight.
            force: keep the layers that match, and list the others in `left_out`, instead of raising.
            weights: current weights of some layers, at `sampled_place`.
            model: the file, for messages.

        Raises:
            StatisticsError: the observed model lacked a layer, or had another shape or other weights there; with
                `force`, no layer matches.
        """
        strange = self.other_weights(weights or {})
        matching = [
            name for name, shape in layers.items() if self.layers.get(name) == tuple(shape) and name not in strange
        ]
        rest = [name for name in layers if name not in set(matching)]
        problem = "made for another model" + ("" if model is None else f" than {model.name}")
        if layers and not matching:
            problem += ": no layer matches in " + ("its weights" if strange else "name and shape")
            raise StatisticsError(problem, path=self.path, hint="observe this model first")
        if rest and not force:
            problem += f": {len(rest)} of {len(layers)} layers {_differ(rest, strange)}"
            hint = "--force uses the layers that match (in ComfyUI: allow_partial)"
            raise StatisticsError(problem, path=self.path, hint=hint)
        return self.take(matching).replace(left_out=tuple(sorted({*self.left_out, *rest})))

    def save(
        self, path: StrPath, metadata: Mapping[str, str] | None = None, further: Mapping[str, Entry] | None = None
    ) -> None:
        """Write everything into one safetensors file, atomically.

        Further entries of the header are loaded as `metadata`; further tensors are for others to read.

        Raises:
            OutputError: it cannot be written.
        """
        head = {
            "format_version": FORMAT_VERSION,
            "tool_version": __version__,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "provenance": {key: list(values) for key, values in sorted(self.provenance.items())},
            "left_out": list(self.left_out),
            "layers": {name: list(shape) for name, shape in self.layers.items()},
        }
        columns = {name: Entry.of(getattr(self, name)) for name in (*DERIVED, *COLUMNS)}
        if any(map(len, self.channel_absmax)):
            pairs = zip(self.channel_absmax, self.layers.values(), strict=True)
            parts = [each if len(each) else np.zeros(shape[1], np.float32) for each, shape in pairs]
            columns[CHANNELS] = Entry.of(np.concatenate(parts))
        if self.weights:
            unknown = np.zeros(SAMPLED, np.float32)
            columns[WEIGHTS] = Entry.of(np.stack([self.weights.get(name, unknown) for name in self.layers]))
        write_checkpoint(
            Path(path), {**columns, **(further or {})}, {**(metadata or {}), METADATA_KEY: json.dumps(head)}
        )

    @staticmethod
    def load(path: StrPath) -> Statistics:
        """Load what `save` wrote.

        Raises:
            CheckpointError: it cannot be read as a safetensors file.
            StatisticsError: it has no statistics, those of a newer version, or contradictory ones.
        """
        path = Path(path)
        with open_checkpoint(path) as checkpoint:
            head = _parse_head(checkpoint.metadata, path)
            layers = {name: (shape[0], shape[1]) for name, shape in head["layers"].items()}
            columns: dict[str, Any] = {
                name: _load_column(checkpoint, name, column.dtype, (len(layers), *column.shape))
                for name, column in COLUMNS.items()
            }
            metadata = {key: text for key, text in checkpoint.metadata.items() if key != METADATA_KEY}
            if CHANNELS in checkpoint.tensors:
                ends = np.cumsum([in_features for _, in_features in layers.values()])
                values = _load_column(checkpoint, CHANNELS, np.float32, (int(ends[-1]),))
                columns[CHANNELS] = tuple(np.split(values, ends[:-1]))
            if WEIGHTS in checkpoint.tensors:
                rows = _load_column(checkpoint, WEIGHTS, np.float32, (len(layers), SAMPLED))
                columns[WEIGHTS] = {name: row for name, row in zip(layers, rows, strict=True) if row.any()}
        loaded = Statistics(
            layers,
            **columns,
            samples=head["samples"],
            provenance={key: tuple(values) for key, values in head["provenance"].items()},
            left_out=tuple(head["left_out"]),
            metadata=metadata,
            path=path,
        )
        loaded._check(head["fingerprint"])
        return loaded

    def _check(self, fingerprint: str) -> None:
        """Refuse columns that contradict each other."""
        contradictions = {
            "the fingerprint is not that of the layers": np.array([self.fingerprint != fingerprint]),
            "the histogram and the counts disagree": self.histogram[:, :NONFINITE_BIN].sum(1) != self.count,
            "the row histogram and the rows disagree": self.row_histogram.sum(1) != self.rows,
        }
        for problem, found in contradictions.items():
            if found.any():
                raise StatisticsError(f"damaged: {problem}", path=self.path, hint="observe the model again")


_UNKNOWN: NDArray[np.float32] = np.zeros(0, np.float32)


def _load_column(checkpoint: Checkpoint, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """A validated tensor of a statistics file."""
    info = checkpoint.tensors.get(name)
    if info is None:
        raise StatisticsError("the column is missing", path=checkpoint.path, tensor=name)
    array: NDArray[Any] = checkpoint.bits(name)
    if array.dtype != dtype or array.shape != shape:
        problem = f"{np.dtype(dtype)} {list(shape)} expected, found {info.dtype} {list(info.shape)}"
        raise StatisticsError(problem, path=checkpoint.path, tensor=name)
    if name not in (CHANNELS, WEIGHTS) and not (np.isfinite(array) & (array >= 0)).all():
        problem = "damaged: finite numbers were expected, none below 0"
        raise StatisticsError(problem, path=checkpoint.path, tensor=name, hint="observe the model again")
    return array


def _merged_channels(parts: Sequence[Statistics]) -> tuple[NDArray[np.float32], ...]:
    """The absmax of each channel, if all that ran the layer have it."""
    merged = []
    for number in range(len(parts[0].layers)):
        seen = [part.channel_absmax[number] for part in parts if part.calls[number]]
        merged.append(reduce(np.maximum, seen) if seen and all(map(len, seen)) else _UNKNOWN)
    return tuple(merged)


def merge(*statistics: Statistics, force: bool = False) -> Statistics:
    """Merge statistics as if one run had observed everything. The order of arguments does not matter.

    Args:
        *statistics: of one model, at least one.
        force: keep the layers that all have with the same shape and weights, and list the others in `left_out`, instead
            of raising.

    Returns:
        New statistics, with the path of the first. Layers are in the common order, or sorted by name if orders differ.

    Raises:
        StatisticsError: they are for different models; with `force`, no layer is common.
    """
    if not statistics:
        raise StatisticsError("no statistics to merge")
    weights: Mapping[str, NDArray[np.float32]] = {}
    strange: set[str] = set()
    for s in statistics:
        strange |= s.other_weights(weights)
        both = {name: np.maximum(weights[name], s.weights[name]) for name in weights.keys() & s.weights.keys()}
        weights = {**weights, **s.weights, **both}
    common = {each for each in set.intersection(*({*s.layers.items()} for s in statistics)) if each[0] not in strange}
    rest = sorted({name for s in statistics for name, shape in s.layers.items() if (name, shape) not in common})
    if rest and not force:
        first = statistics[0]
        other = next(s for s in statistics if s.fingerprint != first.fingerprint or s.other_weights(first.weights))
        than = "different models" if first.path is None else f"another model than {first.path.name}"
        everything = {name for s in statistics for name in s.layers}
        problem = f"made for {than}: {len(rest)} of {len(everything)} layers {_differ(rest, strange)}"
        raise StatisticsError(problem, path=other.path, hint="--force keeps the layers that all of them have")
    if rest and not common:
        raise StatisticsError("made for different models: no layer is common to all of them")
    orders = {tuple(name for name, shape in s.layers.items() if (name, shape) in common) for s in statistics}
    names = orders.pop() if len(orders) == 1 else tuple(sorted(name for name, _ in common))
    parts = [s if s.names == names else s.take(names) for s in statistics]
    return Statistics(
        {name: parts[0].layers[name] for name in names},
        **{name: reduce(column.merge, (getattr(s, name) for s in parts)) for name, column in COLUMNS.items()},
        channel_absmax=_merged_channels(parts),
        samples=sum(s.samples for s in statistics),
        provenance={
            key: _texts({text for s in statistics for text in s.provenance.get(key, ())})
            for key in sorted({key for s in statistics for key in s.provenance})
        },
        left_out=tuple(sorted({*rest, *(name for s in statistics for name in s.left_out)})),
        weights={name: weights[name] for name in names if name in weights},
        path=statistics[0].path,
    )


def sampled_place(shape: Shape) -> tuple[int, NDArray[np.intp]]:
    """Where a weight is sampled: its middle row, and evenly spaced columns, [64]."""
    return shape[0] // 2, np.linspace(0, shape[1] - 1, SAMPLED).astype(np.intp)


def alike(weights: NDArray[np.float32], others: NDArray[np.float32]) -> bool:
    """Whether two samples of a weight come from the same model: 2 Σab / (Σa² + Σb²) is at least 0.5.

    It is 1 for equal weights, about 1 - e² / 2 for a relative error e (4-bit weights: 0.1 to 0.2), near 0 for unrelated
    weights, and 2 f / (1 + f²) for a factor f. Weights that are all zero count as alike.
    """
    a, b = weights.astype(np.float64), others.astype(np.float64)
    return not (a.any() and b.any()) or bool(4 * (a @ b) >= a @ a + b @ b)


def sigma_bin(sigma: float | None) -> int:
    """The column of a noise level.

    >>> sigma_bin(1.0), sigma_bin(0.5), sigma_bin(0.0), sigma_bin(None), sigma_bin(980.0)
    (7, 3, 0, 8, 8)
    """
    if sigma is None or not 0 <= sigma <= 1:
        return UNKNOWN_SIGMA
    return max(0, int(np.ceil(sigma * SIGMA_BINS)) - 1)


def _texts(value: object) -> tuple[str, ...]:
    """One value or several, as a sorted tuple of distinct texts."""
    several = value if isinstance(value, (list, tuple, set, frozenset, range)) else (value,)
    return tuple(sorted({str(one) for one in several}))


def _differ(names: list[str], strange: set[str]) -> str:
    """What layers differ in (`strange`: in their weights), with the first few names."""
    what = "weights" if strange.issuperset(names) else "name, shape or weights" if strange else "name or shape"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"differ in {what}: {', '.join(names[:3])}{more}"


def _parse_head(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The validated JSON of the header."""
    if METADATA_KEY not in metadata:
        raise StatisticsError(
            "not a statistics file: its header has no statistics",
            path=path,
            hint="make one with convert_to_quant observe",
        )
    head = parse_json(
        metadata[METADATA_KEY],
        lambda problem: StatisticsError(f"damaged: the header's statistics are {problem}", path=path),
    )
    version = head.get("format_version") if isinstance(head, dict) else None
    if version != FORMAT_VERSION:
        problem = f"statistics of format {version!r}; this version reads format {FORMAT_VERSION}"
        raise StatisticsError(problem, path=path, hint="update convert_to_quant, or observe the model again")
    assert isinstance(head, dict)
    for key, (kind, is_right) in _HEAD.items():
        if not is_right(head.get(key)):
            raise StatisticsError(f"damaged: {key!r} in the header should be {kind}", path=path)
    for name, shape in head["layers"].items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(map(is_count, shape))):
            raise StatisticsError(f"damaged: [out, in] expected as its shape, found {shape}", path=path, tensor=name)
    return head


_HEAD: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "fingerprint": ("a text", lambda said: isinstance(said, str)),
    "samples": ("a count", is_count),
    "provenance": ("lists of texts by name", lambda said: isinstance(said, dict) and all(map(is_texts, said.values()))),
    "left_out": ("a list of texts", is_texts),
    "layers": ("shapes by layer", lambda said: isinstance(said, dict)),
}
"""Entries of the header besides the version: what each should be, in words and as a check."""
