"""Measurements of every layer: of one side, or of two sides that are compared.

    build(Source(statistics))                     all layers that were observed; current scales are 1.0
    build(Source(statistics, "fp8.safetensors"))  the FP8 layers of a checkpoint, as they are and calibrated
    build(Source(model="a.safetensors"), Source(model="b.safetensors"))
                                                  two calibrations
    build(Source(mine), Source(with_lora))        does a calibration on the first fit the second?
    build(Source(mine), Source(mine, options=SolveOptions(margin=2)))

`apply_statistics` and `solve` choose the scales, as in `apply`. Without a checkpoint the current scale of each layer is
1.0, which is what ComfyUI assumes for FP8 files without `input_scale`.

Layers of two sides match by name, ignoring prefixes (`model.diffusion_model.`).

Limits. Results are computed from histograms, with values taken as uniform within a bin of 1/16 octave: shares near a
threshold are off by at most the values of one bin. Costs are those of quantizing inputs, not weights.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..calibrate_activation_scales import apply_statistics, present_scales, static_table
from ..checkpoint import Checkpoint, Spec, open_checkpoint
from ..choose import Choice, Mixes
from ..errors import NoStaticScaleError, StatisticsError, StrPath
from ..formats import DEFAULT_GRID, FORMATS, GRIDS
from ..formats.record import Grid
from ..inspection import Inspection, LayerView, inspect_checkpoint
from ..kernels import NONFINITE_BIN, SIGMA_BINS
from ..layers import LayerTable, find_layers
from ..naming import for_checkpoint, respell
from ..options import SolveOptions, flags_of
from ..problems import DYNAMIC, READINGS
from ..solve import LayerResult, Present, expected_errors, finite, solve, unchanged
from ..stats import BIN_EDGES, Statistics
from ..trials import Trials
from . import document, verdict
from .document import Figures, Layer, Report, Risk, Side, State, encode_shares

Float = NDArray[np.float64]

INPUTS: Mapping[str, str] = {
    "dynamic": "scaled per token",
    "per-token": "scaled per token",
    "per-block-16": "scaled per block",
    "per-block-32": "scaled per block",
    "foreign": "not known",
    "experts-at-one": "at 1.0",
    "cast": "not quantized",
    "high-precision": "not quantized",
    "text-encoder": "",
    "scale-dropped": "",
}
"""How readers scale a layer's inputs, for the readings of `inspection` without an input scale; "" where the layer
should have one."""

_TAKEN = ("format", "source", "reason", "cause", "conditioning_dependent", "multiply_adds")
"""Fields that `Figures` copies from a solved layer."""

SUFFIX = ".safetensors"

_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, eq=False)
class Source:
    """What one side of a report is made from: statistics, a checkpoint, or both.

    Attributes:
        statistics: what was observed.
        model: an FP8 checkpoint.
        options: how to choose scales.
        trials: of the same model's layers.
        label: a short name; by default, what distinguishes the sides.
        files: names of the statistics files; by default, of the one that was loaded.
    """

    statistics: Statistics | None = None
    model: StrPath | None = None
    options: SolveOptions = field(default_factory=SolveOptions)
    trials: Trials | None = None
    label: str | None = None
    files: tuple[str, ...] = ()


class _Row(NamedTuple):
    """One layer of a side, solved; its shape (out, in); and how readers see it, if there is a checkpoint."""

    result: LayerResult
    shape: tuple[int, int]
    view: LayerView | None = None

    @property
    def reading(self) -> str:
        """A key of `problems.READINGS`; "" without a checkpoint."""
        return "" if self.view is None else self.view.reading

    @property
    def unused(self) -> str:
        """Why readers ignore its input scale; "" if they use it."""
        return READINGS[self.reading] if self.reading in INPUTS else ""


@dataclass(frozen=True, eq=False)
class _Solved:
    """One side, solved; `rows` and `tried`, the results of a mix, are by layer name without prefix."""

    source: Source
    rows: Mapping[str, _Row]
    statistics: Statistics
    inspection: Inspection | None
    notes: Sequence[str]
    mix: Mapping[str, Any]
    tried: Mapping[str, Mapping[str, Any]]


def build(*sources: Source, force: bool = False, options: Mapping[str, Any] | None = None) -> Report:
    """Make a report of one side, or of two that are compared.

    Args:
        *sources: one or two.
        force: use the layers of statistics that match a checkpoint, even if others do not.
        options: how the report was requested, as JSON values, to be kept in it.

    Raises:
        CheckpointError: a checkpoint cannot be read, or has no FP8 layers.
        StatisticsError: the statistics are for another model than the checkpoint, or the sides share no layer.
        CalibrationError: a layer saw NaN or infinite inputs.
    """
    assert 1 <= len(sources) <= 2, "a report has one side or two"
    solved = [_solve(source, force=force) for source in sources]
    first, second = solved[0], solved[-1]
    if not first.rows.keys() & second.rows.keys() and first is not second:
        raise StatisticsError(
            f"nothing to compare: {_what(sources[0])} and {_what(sources[1])} have no layer in common",
            hint="compare two files of the same model",
        )
    observed = [source.statistics for source in sources]
    same_inputs = observed == observed[::-1]
    figures = [_figures(side) for side in solved]
    crossed = {} if same_inputs else _crossed(first, second)
    layers = []
    for key in sorted({**first.rows, **second.rows}, key=_natural):
        row = first.rows.get(key) or second.rows[key]
        tried = first.tried.get(key) or second.tried.get(key, {})
        known = tuple(one.get(key) for one in figures)
        layers.append(Layer(row.result.layer, row.shape, known, crossed.get(key), tried.get("tried", {})))
    sides = tuple(
        _side(side, label, apply=_apply(side.source) if any(figure.changed for figure in known.values()) else "")
        for side, label, known in zip(solved, _labels(sources), figures, strict=True)
    )
    return Report(
        title=" against ".join(side.label for side in sides),
        sides=sides,
        layers=tuple(layers),
        verdict=verdict.judge(sides, layers, same_inputs=same_inputs),
        options=dict(options or {}),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts block 2 before block 10: numbers by their length first."""
    parts = enumerate(_DIGITS.split(name))
    return [(len(digits := part.lstrip("0")), digits) if number % 2 else (0, part) for number, part in parts]


def _solve(source: Source, *, force: bool) -> _Solved:
    """Choose scales as `apply` does."""
    statistics, observed = source.statistics, source.statistics or Statistics.empty({})
    if source.model is None:
        present = {name: Present(1.0, False, shape) for name, shape in observed.layers.items()}
        rows = [_Row(result, observed.layers[result.layer]) for result in solve(observed, present, source.options)]
        return _Solved(source, _by_bare_name(rows), observed, None, (), *_mix(source))
    with open_checkpoint(source.model) as checkpoint:
        inspection = inspect_checkpoint(checkpoint)
        table = find_layers(checkpoint)
        results, notes = _calibrated(source, checkpoint, table, force=force)
    mix, tried = _mix(source, inspection)
    observed = respell(observed, table.shapes(), table.prefix) if statistics is not None else observed
    views = {view.name: view for view in inspection.layers}
    solved, bare = {result.layer for result in results}, names.strip_prefix(views)[1]
    results += [
        _without_scale(view, name in observed.layers)
        for name, view in views.items()
        if name not in solved and len(view.shape) > 1
        and (view.reading in DYNAMIC or name in observed.layers or bare.get(name) in tried)
    ]  # fmt: skip
    rows = [_Row(result, _two_sides(views[result.layer]), views[result.layer]) for result in results]
    listed = {result.layer for result in results}
    notes = [text for text in notes if text.partition(":")[0] not in listed]  # the layer's row says the same
    return _Solved(source, _by_bare_name(rows), observed, inspection, notes, mix, tried)


def _by_bare_name(rows: Sequence[_Row]) -> dict[str, _Row]:
    bare = names.strip_prefix(row.result.layer for row in rows)[1]
    return {bare[row.result.layer]: row for row in rows if row.result.layer in bare}


def _calibrated(
    source: Source, checkpoint: Checkpoint, table: LayerTable, *, force: bool
) -> tuple[list[LayerResult], Sequence[str]]:
    """The layers that have an input scale, solved, and notes; none if readers scale all inputs dynamically."""
    try:
        if source.statistics is not None:
            found = apply_statistics(checkpoint, source.statistics, source.options, force=force)
            return list(found.results), found.notes
        static_table(checkpoint)
    except NoStaticScaleError:
        if source.statistics is not None:
            for_checkpoint(source.statistics, table, force=force)  # refuses those of another model
        return [], ()
    present = present_scales(checkpoint, table, energies=False)
    results = solve(Statistics.empty({}), present, source.options)
    return [replace(result, reason="nothing was observed: keeps its scale") for result in results], table.notes


def _without_scale(view: LayerView, seen: bool) -> LayerResult:
    """A layer that has no input scale."""
    present = Present(None, view.read_as is None, _two_sides(view))
    return unchanged(view.name, present, READINGS[view.reading], "model" if seen else "none")


def _two_sides(view: LayerView) -> tuple[int, int]:
    """(out, in) of a weight; the experts of a bank count as rows."""
    return math.prod(view.shape[:-1]), view.shape[-1]


def _mix(source: Source, inspection: Inspection | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of a mix from trials, or else from the file's own header; and those of its layers."""
    made = None if inspection is None or inspection.made is None else inspection.made.mix
    found: dict[str, Any] = {} if made is None else {**made.figures, "gpu": made.gpu}
    on = None if made is None else made.conditioning
    if source.trials is not None:
        trials = source.trials
        tried = [FORMATS[name] for name in trials.formats if name in FORMATS]
        formats = [fmt for fmt in tried if made is None or made.gpu in fmt.native] or tried
        assert source.statistics is not None, "trials come with statistics"
        shapes = source.statistics.layers
        mixes = Mixes.of(
            {name: Spec("BF16", shapes[name]) for name in trials.layers if name in shapes}, trials, formats
        )
        found |= mixes.results(_choice(mixes, inspection)) if mixes.weights else {}
        on = ", ".join(source.statistics.provenance.get("conditioning", ()))
    if found:
        found["on"] = on or "noise"
    if inspection is not None and {"bits", "weights"} <= found.keys():
        found["other_bytes"] = inspection.size_bytes - found["bits"] * found["weights"] / 8
    layers = found.pop("layers", {})
    return found, {bare: layers[name] for name, bare in names.strip_prefix(layers)[1].items()}


def _choice(mixes: Mixes, inspection: Inspection | None) -> Choice | None:
    """The formats of a file as a choice; None without a file, or if a layer's format was not tried."""
    views = {} if inspection is None else {view.name: view for view in inspection.layers}
    own = {bare: views[name].read_as or "" for name, bare in names.strip_prefix(views)[1].items()}
    bare = names.strip_prefix(mixes.weights)[1]
    chosen = [own.get(bare.get(name, name)) for name in mixes.weights]
    if not any(chosen) or not set(chosen) <= set(mixes.formats):
        return None
    choice = np.array([mixes.formats.index(fmt or "") for fmt in chosen])
    return choice if math.isfinite(mixes.point(choice)[1]) else None


def _figures(side: _Solved) -> dict[str, Figures]:
    """The measurements of every layer of a side, by name without prefix."""
    seen = {key: row.result.layer for key, row in side.rows.items() if row.result.source == "model"}
    columns = dict(zip(seen, _columns(side.statistics.take(seen.values())), strict=True))
    figures = {}
    for key, row in side.rows.items():
        known = columns.get(key, {})
        figures[key] = Figures(
            _solved_state(row, "before", known.get("absmax", 0.0)),
            _solved_state(row, "after", known.get("absmax", 0.0)),
            **known,
            **{name: getattr(row.result, name) for name in _TAKEN},
            unused=row.unused,
            inputs=INPUTS.get(row.reading, ""),
            stored="" if row.view is None else row.view.read_as or row.view.format,
            bits=None if row.view is None else row.view.bits,
            more=side.tried.get(key, {}).get("more", ""),
        )
    return figures


def _solved_state(row: _Row, when: str, absmax: float) -> State:
    """A layer "before" or "after" solving."""
    known = vars(row.result)
    scale, full_precision = known[f"scale_{when}"], known[f"full_precision_{when}"]
    if when == "before" and row.reading == "error":  # no reader can use its scale
        return State(0.0, full_precision, risk="no scale")
    lost = known["rows_lost_before" if when == "before" else "rows_lost"]
    costs = (known[f"sqnr_{when}_db"], known[f"clipped_{when}"], known[f"vanished_{when}"], lost)
    return _state(row, scale, full_precision, costs if scale is not None else (None,) * 4, absmax)


def _state(row: _Row, scale: float | None, full_precision: bool, costs: Sequence[Any], absmax: float) -> State:
    """A state with its costs, and its risk if readers use the scale."""
    sqnr_db, clipped, vanished, rows_lost = costs
    grid = GRIDS[row.result.format]
    state = State(scale, full_precision, sqnr_db, clipped, vanished, rows_lost, max=grid.max)
    return state if row.unused else with_risk(state, absmax, grid)


def with_risk(state: State, absmax: float, grid: Grid = DEFAULT_GRID) -> State:
    """A state with its risk, by the thresholds in `document`; `absmax` is the largest input, `grid` its codes."""
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
    """Measurements of each layer's inputs, as arguments of `Figures`."""
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
            "sigma_absmax": tuple(map(finite, sigma_absmax[number])),
            "sigma_rms": tuple(map(finite, sigma_rms[number])),
        }
        for number in range(len(count))
    ]


def cell_shares(histogram: NDArray[np.int64]) -> Float:
    """Shares of the values in each cell of the axis; see `document`.

    Args:
        histogram: [L, BINS]. Bin 0, which holds the zeros, counts in the total but in no cell.

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
    at_edge[:, 0], at_edge[:, -1] = below[:, 1], below[:, -1]  # values beyond the axis count in its last cells
    shares: Float = np.diff(at_edge, axis=1) / total
    return shares


def _crossed(first: _Solved, second: _Solved) -> dict[str, State]:
    """The first side's new scales on the second side's inputs, by name without prefix."""
    both = {  # a scale belongs to the format that it was solved for
        key: (row.result, other)
        for key, row in first.rows.items()
        if (other := second.rows.get(key)) is not None
        and row.result.source == other.result.source == "model" and row.result.scale_after is not None
    }  # fmt: skip
    scales = np.array([result.scale_after for result, _ in both.values()], np.float64)
    statistics = second.statistics.take(other.result.layer for _, other in both.values())
    errors = expected_errors(statistics, scales, [GRIDS[result.format] for result, _ in both.values()])
    crossed = {}
    for (key, (result, other)), absmax, *costs in zip(both.items(), statistics.absmax, *errors, strict=True):
        row = other._replace(result=result)
        known = list(map(finite, costs))
        crossed[key] = _state(row, result.scale_after, result.full_precision_after, known, float(absmax))
    return crossed


def _side(side: _Solved, label: str, *, apply: str) -> Side:
    """The description of a side."""
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
        mix=side.mix,
    )


def _apply(source: Source) -> str:
    """The command that writes the solved scales into a new file."""
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
    """Names of the sides, by the first thing that differs: statistics, checkpoints, options."""
    if len(sources) == 1:
        return [sources[0].label or _what(sources[0])]
    models = [None if source.model is None else Path(source.model) for source in sources]
    candidates = (
        [" + ".join(_files(source)) for source in sources],
        [_in_folder(None if (one := source.statistics) is None else one.path) for source in sources],
        ["" if path is None else path.name for path in models],
        [_in_folder(path) for path in models],
        [" ".join(flags_of(source.options)) or "defaults" for source in sources],
        ["A", "B"],
    )
    chosen = next(found for found in candidates if len(set(found)) == len(sources))
    return [source.label or name.replace(SUFFIX, "") for source, name in zip(sources, chosen, strict=True)]


def _in_folder(path: Path | None) -> str:
    """A file name with its folder, for two files of the same name."""
    return "" if path is None else f"{path.resolve().parent.name}/{path.name}"


def _what(source: Source) -> str:
    """The name of the checkpoint, or else of the statistics."""
    return " + ".join(_files(source)) if source.model is None else Path(source.model).name
