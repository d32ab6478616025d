"""Every layer's figures, from what was observed: on one side, or on two that are compared.

    build(Source(statistics))                     all layers that were observed; present scales are 1.0
    build(Source(statistics, "fp8.safetensors"))  the FP8 layers of a checkpoint, as they are and calibrated
    build(Source(model="a.safetensors"), Source(model="b.safetensors"))
                                                  two calibrations
    build(Source(mine), Source(with_lora))        does a calibration on the first hold for the second?
    build(Source(mine), Source(mine, options=SolveOptions(margin=2)))

What is chosen is what `apply` would choose: `apply_statistics` and `solve` do it, and nothing here chooses. Without a
checkpoint every layer's present scale is 1.0, which is what ComfyUI reads from an FP8 file without `input_scale`.

Layers of two sides are the same where their names are, prefixes (`model.diffusion_model.`) apart.

Limits. Figures come from histograms, values taken as uniform within a bin of 1/16 octave: shares near a threshold are
off by at most the values of one bin. Costs are those of quantizing inputs, not of quantizing weights.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..calibrate_activation_scales import apply_statistics, present_scales, static_table
from ..checkpoint import open_checkpoint
from ..errors import StatisticsError, StrPath
from ..formats import DEFAULT_GRID, GRIDS
from ..formats.record import Grid
from ..inspection import Inspection, LayerView, inspect_checkpoint
from ..kernels import NONFINITE_BIN, SIGMA_BINS
from ..options import SolveOptions, flags_of
from ..problems import DYNAMIC, READINGS
from ..solve import LayerResult, Present, expected_errors, lost_rows, solve
from ..stats import BIN_EDGES, Statistics
from ..trials import Trials
from . import document, verdict
from .document import Figures, Layer, LeftAlone, Report, Risk, Side, State, encode_shares

Float = NDArray[np.float64]

_UNREAD = frozenset({"text-encoder", "scale-dropped"})
"""Readings of `inspection` in which no reader uses a layer's input scale."""

_TAKEN = ("format", "source", "reason", "cause", "conditioning_dependent", "multiply_adds")
"""What figures take over from solving."""

SUFFIX = ".safetensors"

_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, eq=False)
class Source:
    """What one side of a report is made from: statistics, a checkpoint, or both.

    Attributes:
        statistics: what was observed.
        model: an FP8 checkpoint.
        options: how scales are chosen.
        label: a short name; by default that of what tells the sides apart.
        files: names of the files that the statistics come from; by default that of the one they were loaded from.
    """

    statistics: Statistics | None = None
    model: StrPath | None = None
    options: SolveOptions = field(default_factory=SolveOptions)
    label: str | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Solved:
    """One side, solved.

    Attributes:
        source: where it comes from.
        results: one per layer that has figures, in file order.
        shapes: layer name -> (out, in).
        statistics: of those of them that were observed, by the same names.
        readings: what readers make of layers, by name; empty without a checkpoint.
        inspection: what the checkpoint is.
        notes: what a user should know.
        left_alone: layers without figures.
    """

    source: Source
    results: Sequence[LayerResult]
    shapes: Mapping[str, tuple[int, int]]
    statistics: Statistics
    readings: Mapping[str, str] = field(default_factory=dict)
    inspection: Inspection | None = None
    notes: Sequence[str] = ()
    left_alone: Sequence[LeftAlone] = ()

    def unused(self, name: str) -> str:
        """Why no reader uses a layer's input scale; "" where one does."""
        reading = self.readings.get(name, "")
        return READINGS[reading] if reading in _UNREAD else ""

    @cached_property
    def bare(self) -> dict[str, str]:
        """Name without prefix -> name, of every layer that has figures."""
        return {bare: name for name, bare in names.strip_prefix(self.shapes)[1].items()}


def build(
    *sources: Source, force: bool = False, options: Mapping[str, Any] | None = None, trials: Trials | None = None
) -> Report:
    """Make a report of one side, or of two that are compared.

    Args:
        *sources: one or two.
        force: use the layers of statistics that match a checkpoint where others do not.
        options: how the report was asked for, as JSON values; kept in it.
        trials: of the same model's layers.

    Returns:
        The report.

    Raises:
        CheckpointError: a checkpoint cannot be read, or has no FP8 layers.
        StatisticsError: statistics were made for another model than the checkpoint, or the sides share no layer.
        CalibrationError: a layer saw NaN or infinite inputs.
    """
    assert 1 <= len(sources) <= 2, "a report has one side or two"
    solved = [_solve(source, force=force) for source in sources]
    figures = [_figures(side) for side in solved]
    keys = sorted(dict.fromkeys(bare for side in solved for bare in side.bare), key=_natural)
    crossed = _crossed(*solved) if len(solved) == 2 else {}
    if len(solved) == 2 and not solved[0].bare.keys() & solved[1].bare.keys():
        raise StatisticsError(
            f"nothing to compare: {_what(sources[0])} and {_what(sources[1])} have no layer in common",
            hint="compare two files of the same model",
        )
    alone_db = {} if trials is None else trials.damages_db()
    alone_db = {bare: alone_db[name] for name, bare in names.strip_prefix(alone_db)[1].items()}
    layers = []
    for key in keys:
        spelled = [side.bare.get(key) for side in solved]
        name, owner = next((name, side) for name, side in zip(spelled, solved, strict=True) if name is not None)
        known = tuple(None if name is None else one[name] for one, name in zip(figures, spelled, strict=True))
        layers.append(Layer(name, owner.shapes[name], known, crossed.get(key), alone_db.get(key, {})))
    sides = tuple(
        _side(side, label, apply=_apply(side.source) if any(figure.changed for figure in known.values()) else "")
        for side, label, known in zip(solved, _labels(sources), figures, strict=True)
    )
    return Report(
        title=" against ".join(side.label for side in sides),
        sides=sides,
        layers=tuple(layers),
        verdict=verdict.judge(sides, layers, same_inputs=_same_inputs(sources)),
        left_alone=tuple(replace(left, side=number) for number, side in enumerate(solved) for left in side.left_alone),
        options={**(options or {})},
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key by which block 2 stands before block 10: numbers by their length first."""
    parts = enumerate(_DIGITS.split(name))
    return [(len(digits := part.lstrip("0")), digits) if number % 2 else (0, part) for number, part in parts]


def _same_inputs(sources: Sequence[Source]) -> bool:
    """Whether all sides were observed on the same inputs, or not at all."""
    first = sources[0].statistics
    return all(source.statistics is first or source.statistics == first for source in sources)


def _solve(source: Source, *, force: bool) -> _Solved:
    """Choose scales as `apply` does."""
    statistics = source.statistics
    if source.model is None:
        assert statistics is not None, "a source has statistics, or a checkpoint, or both"
        shapes = {name: (shape[0], shape[1]) for name, shape in statistics.layers.items()}
        moving = set(statistics.provenance.get("depends_on_conditioning", ()))
        results = solve(statistics, {name: Present(1.0, False, shapes[name]) for name in shapes}, source.options)
        results = [replace(result, conditioning_dependent=result.layer in moving) for result in results]
        return _Solved(source, results, shapes, statistics)
    with open_checkpoint(source.model) as checkpoint:
        inspection = inspect_checkpoint(checkpoint)
        if statistics is None:
            table = static_table(checkpoint)
            present = present_scales(checkpoint, table, energies=False)
            observed = Statistics.empty({})
            results, notes = solve(observed, present, source.options), table.notes
        else:
            calibration = apply_statistics(checkpoint, statistics, source.options, force=force)
            assert calibration.statistics is not None
            observed = calibration.statistics
            results, notes = calibration.results, calibration.notes
    views = {view.name: view for view in inspection.layers}
    solved = {result.layer for result in results}
    return _Solved(
        source,
        results,
        {name: (views[name].shape[0], views[name].shape[1]) for name in solved},
        observed,
        readings={name: views[name].reading for name in solved},
        inspection=inspection,
        notes=[text for text in notes if text.partition(":")[0] not in solved],  # a layer's row says those
        left_alone=_left_alone(views.values(), solved, statistics),
    )


def _left_alone(views: Iterable[LayerView], solved: Set[str], statistics: Statistics | None) -> list[LeftAlone]:
    """The layers of a checkpoint that are quantized, or were observed, and have no figures all the same."""
    recorded = set() if statistics is None else set(names.strip_prefix(statistics.layers)[1].values())
    listed = list(views)
    bare = names.strip_prefix(view.name for view in listed)[1]
    left = []
    for view in listed:
        if view.reading in DYNAMIC and view.name not in solved:
            left.append(LeftAlone(view.name, f"{view.format}, which has no input scale that this tool knows"))
        elif view.reading in ("cast", "high-precision") and bare.get(view.name) in recorded:
            left.append(LeftAlone(view.name, f"{view.format}: {READINGS[view.reading]}"))
    return left


def _figures(side: _Solved) -> dict[str, Figures]:
    """The figures of every layer of a side, by name."""
    seen = [result for result in side.results if result.source == "model"]
    statistics = side.statistics.take([result.layer for result in seen])
    grids = [GRIDS[result.format] for result in seen]
    lost = {
        when: lost_rows(statistics, np.array([getattr(result, f"scale_{when}") or 0.0 for result in seen]), grids)
        for when in ("before", "after")
    }
    columns = dict(zip((result.layer for result in seen), _columns(statistics), strict=True))
    numbers = {layer: number for number, layer in enumerate(columns)}
    figures = {}
    for result in side.results:
        column, unused = columns.get(result.layer, {}), side.unused(result.layer)
        states: dict[str, Any] = {}
        for when, rows_lost in lost.items():
            fields = ("scale_{}", "full_precision_{}", "sqnr_{}_db", "clipped_{}", "vanished_{}")
            values = (getattr(result, name.format(when)) for name in fields)
            state = replace(State(*values), max=GRIDS[result.format].max)
            if column and state.scale is not None:
                state = replace(state, rows_lost=float(rows_lost[numbers[result.layer]]))
            states[when] = state if unused else with_risk(state, column.get("absmax", 0), GRIDS[result.format])
        if side.readings.get(result.layer) == "error":  # no reader can use its scale
            states["before"] = State(0.0, states["before"].full_precision, risk="no scale")
        figures[result.layer] = Figures(
            **states,
            **column,
            **{name: getattr(result, name) for name in _TAKEN},
            unused=unused,
        )
    return figures


def with_risk(state: State, absmax: float, grid: Grid = DEFAULT_GRID) -> State:
    """A state with its risk, by the thresholds of `document`, which are those of the layer's grid.

    Args:
        state: with everything else.
        absmax: the largest |x|; 0 where nothing but zeros was seen, or nothing.
        grid: of the layer's inputs.
    """
    risk: Risk = ""
    if state.full_precision or state.scale is None:
        return state
    if state.scale == 0:
        risk = "no scale"
    elif state.sqnr_db is not None and state.sqnr_db < grid.worst_rounding_db:
        assert state.vanished is not None
        if absmax > grid.largest_rounded * state.scale:
            risk = "clips"
        else:
            risk = "vanishes" if state.vanished > document.MOST else "coarse"
    elif (state.rows_lost or 0) > document.MOST:
        risk = "tokens lost"
    return replace(state, risk=risk)


def _columns(statistics: Statistics) -> list[dict[str, Any]]:
    """What each layer's inputs looked like, as arguments of `Figures`."""
    count = np.maximum(statistics.count, 1)
    levels = np.where(statistics.sigma_count > 0, 1.0, np.nan)[:, :SIGMA_BINS]
    sigma_absmax = (statistics.sigma_absmax[:, :SIGMA_BINS] * levels)[:, ::-1]  # from noise to image
    sigma_rms = (np.sqrt(statistics.sigma_mean_square[:, :SIGMA_BINS]) * levels)[:, ::-1]
    densities = encode_shares(cell_shares(statistics.histogram))
    row_densities = encode_shares(cell_shares(statistics.row_histogram))
    scalars: dict[str, NDArray[Any]] = {
        "rows": statistics.rows,
        "rows_per_sample": statistics.rows_per_sample,
        "calls": statistics.calls,
        "zeros": statistics.zeros / count,
        "absmax": statistics.absmax,
        "rms": np.sqrt(statistics.mean_square),
        "median": statistics.quantiles(0.5),
        "p999": statistics.quantiles(0.999),
    }
    return [
        {
            **{name: column[number].item() for name, column in scalars.items()},
            "density": densities[number],
            "row_density": row_densities[number],
            "sigma_absmax": tuple(map(_finite, sigma_absmax[number])),
            "sigma_rms": tuple(map(_finite, sigma_rms[number])),
        }
        for number in range(len(count))
    ]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def cell_shares(histogram: NDArray[np.int64]) -> Float:
    """Shares of the values in each cell of the axis; see `document`.

    Args:
        histogram: [L, BINS]. Zeros, and all else in bin 0, count in the total and in no cell.

    Returns:
        [L, CELLS].
    """
    counts = histogram[:, :NONFINITE_BIN]
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    below = np.concatenate([np.zeros((len(counts), 1)), counts.cumsum(1)], 1)  # at each edge of a bin
    steps = np.arange(document.AXIS_LOW * document.CELLS_PER_OCTAVE, document.AXIS_HIGH * document.CELLS_PER_OCTAVE + 1)
    edges = np.exp2(steps / document.CELLS_PER_OCTAVE)
    number = np.searchsorted(BIN_EDGES, edges, side="right") - 1
    part = (edges - BIN_EDGES[number]) / (BIN_EDGES[number + 1] - BIN_EDGES[number])
    at_edge = below[:, number] * (1 - part) + below[:, number + 1] * part
    at_edge[:, 0], at_edge[:, -1] = below[:, 1], below[:, -1]  # what lies beyond the axis is in its last cells
    shares: Float = np.diff(at_edge, axis=1) / total
    return shares


def _crossed(first: _Solved, second: _Solved) -> dict[str, State]:
    """The first side's new scales on the second side's inputs, by bare name; nothing where both saw the same."""
    if _same_inputs([first.source, second.source]):
        return {}
    mine = {result.layer: result for result in first.results}
    theirs = {result.layer for result in second.results if result.source == "model"}
    pairs = [
        (bare, mine[name], second.bare[bare])
        for bare, name in first.bare.items()
        if bare in second.bare and second.bare[bare] in theirs and mine[name].source == "model"
    ]
    statistics = second.statistics.take([name for _, _, name in pairs])
    scales = np.array([result.scale_after or 0.0 for _, result, _ in pairs], np.float64)
    grids = [GRIDS[result.format] for _, result, _ in pairs]
    errors = expected_errors(statistics, scales, grids)
    lost = lost_rows(statistics, scales, grids)
    states = {}
    for number, (bare, result, name) in enumerate(pairs):
        costs: Any = (_finite(column[number]) for column in (errors.sqnr_db, errors.clipped, errors.vanished, lost))
        state = replace(State(result.scale_after, result.full_precision_after, *costs), max=grids[number].max)
        absmax = float(statistics.absmax[number])
        states[bare] = state if second.unused(name) else with_risk(state, absmax, grids[number])
    return states


def _side(side: _Solved, label: str, *, apply: str) -> Side:
    """What a side says of itself."""
    source, statistics, inspection = side.source, side.source.statistics, side.inspection
    facts = {} if statistics is None else dict(statistics.provenance)
    notes = list(side.notes)
    if inspection is not None and inspection.made is not None and inspection.made.version is not None:
        notes.append(f"the checkpoint was made by convert_to_quant {inspection.made.version}")
    return Side(
        label=label,
        statistics=_files(source),
        model=None if source.model is None else Path(source.model).name,
        family=None if inspection is None else inspection.title,
        samples=0 if statistics is None else statistics.samples,
        engine=", ".join(facts.get("engine", ())) or None,
        conditioning=", ".join(facts.get("conditioning", ())) or None,
        provenance=facts,
        options=asdict(source.options),
        notes=tuple(notes),
        apply=apply,
    )


def _apply(source: Source) -> str:
    """The command that writes what was solved into a new file."""
    model = "MODEL.safetensors" if source.model is None else Path(source.model).name
    output = f"{model.removesuffix('.index.json').removesuffix(SUFFIX)}_calibrated{SUFFIX}"
    flags = flags_of(source.options)
    return shlex.join(["convert_to_quant", "apply", model, *_files(source), "-o", output, *flags])


def _files(source: Source) -> tuple[str, ...]:
    """Names of the statistics files of a side."""
    if source.statistics is None:
        return ()
    path = source.statistics.path
    return source.files or (path.name if path is not None else "statistics",)


def _labels(sources: Sequence[Source]) -> list[str]:
    """What the sides are called: by what tells them apart, statistics first, then checkpoints, then options."""
    if len(sources) == 1:
        return [sources[0].label or _what(sources[0])]
    observed = [None if source.statistics is None else source.statistics.path for source in sources]
    models = [None if source.model is None else Path(source.model) for source in sources]
    candidates = (
        [" + ".join(_files(source)) for source in sources],
        [_in_folder(path) for path in observed],
        ["" if path is None else path.name for path in models],
        [_in_folder(path) for path in models],
        [_changed(source.options, other.options) for source, other in zip(sources, sources[::-1], strict=True)],
        ["A", "B"],
    )
    chosen = next(found for found in candidates if len(set(found)) == len(sources))
    return [source.label or name.replace(SUFFIX, "") for source, name in zip(sources, chosen, strict=True)]


def _in_folder(path: Path | None) -> str:
    """A file's name with that of its folder, for two of one name."""
    return "" if path is None else f"{path.resolve().parent.name}/{path.name}"


def _what(source: Source) -> str:
    """The checkpoint, or else the statistics."""
    return " + ".join(_files(source)) if source.model is None else Path(source.model).name


def _changed(options: SolveOptions, other: SolveOptions) -> str:
    """The options that differ from another's, in words.

    >>> _changed(SolveOptions(margin=2), SolveOptions())
    'margin 2'
    """
    mine, theirs = asdict(options), asdict(other)
    return ", ".join(f"{key.replace('_', ' ')} {_said(mine[key])}" for key in mine if mine[key] != theirs[key])


def _said(value: object) -> str:
    """The value of an option in words."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "nothing"
    if value is None:
        return "automatic"
    return f"{value:g}" if isinstance(value, float) else str(value)
