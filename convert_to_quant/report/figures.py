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
from ..solve import LayerResult, Present, expected_errors, lost_rows, solve, unchanged
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
"""What readers do with a layer's inputs, by the readings of `inspection` in which no input scale says it; "" where the
layer should have one."""

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
        trials: of the same model's layers.
        label: a short name; by default that of what tells the sides apart.
        files: names of the files that the statistics come from; by default that of the one they were loaded from.
    """

    statistics: Statistics | None = None
    model: StrPath | None = None
    options: SolveOptions = field(default_factory=SolveOptions)
    trials: Trials | None = None
    label: str | None = None
    files: tuple[str, ...] = ()


class _Row(NamedTuple):
    """One layer of a side: what was chosen, (out, in), and what readers make of it, if a checkpoint says."""

    result: LayerResult
    shape: tuple[int, int]
    view: LayerView | None = None

    @property
    def reading(self) -> str:
        """What readers make of it; "" without a checkpoint."""
        return "" if self.view is None else self.view.reading

    @property
    def unused(self) -> str:
        """Why no reader uses its input scale; "" where one does."""
        return READINGS[self.reading] if self.reading in INPUTS else ""


@dataclass(frozen=True, eq=False)
class _Solved:
    """One side, solved.

    Attributes:
        source: where it comes from.
        rows: one per layer that has figures, by bare name, in file order.
        statistics: of those of them that were observed.
        inspection: what the checkpoint is.
        notes: what a user should know.
        mix: of its formats; see `document.Side.mix`.
        tried: what the mix says of each layer, by bare name.
    """

    source: Source
    rows: Mapping[str, _Row]
    statistics: Statistics
    inspection: Inspection | None = None
    notes: Sequence[str] = ()
    mix: Mapping[str, Any] = field(default_factory=dict)
    tried: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def build(*sources: Source, force: bool = False, options: Mapping[str, Any] | None = None) -> Report:
    """Make a report of one side, or of two that are compared.

    Args:
        *sources: one or two.
        force: use the layers of statistics that match a checkpoint where others do not.
        options: how the report was asked for, as JSON values; kept in it.

    Returns:
        The report.

    Raises:
        CheckpointError: a checkpoint cannot be read, or has no FP8 layers.
        StatisticsError: statistics were made for another model than the checkpoint, or the sides share no layer.
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
    """A sorting key by which block 2 stands before block 10: numbers by their length first."""
    parts = enumerate(_DIGITS.split(name))
    return [(len(digits := part.lstrip("0")), digits) if number % 2 else (0, part) for number, part in parts]


def _solve(source: Source, *, force: bool) -> _Solved:
    """Choose scales as `apply` does."""
    statistics = source.statistics
    if source.model is None:
        assert statistics is not None, "a source has statistics, or a checkpoint, or both"
        present = {name: Present(1.0, False, shape) for name, shape in statistics.layers.items()}
        rows = [_Row(result, statistics.layers[result.layer]) for result in solve(statistics, present, source.options)]
        mix, tried = _mix(source)
        return _Solved(source, _by_bare_name(rows), statistics, mix=mix, tried=tried)
    with open_checkpoint(source.model) as checkpoint:
        inspection = inspect_checkpoint(checkpoint)
        table = find_layers(checkpoint)
        results, notes = _calibrated(source, checkpoint, table, force=force)
    mix, tried = _mix(source, inspection)
    observed = Statistics.empty({}) if statistics is None else respell(statistics, table.shapes(), table.prefix)
    views = {view.name: view for view in inspection.layers}
    solved, bare = {result.layer for result in results}, names.strip_prefix(views)[1]
    results += [
        _without_scale(view, name in observed.layers)
        for name, view in views.items()
        if name not in solved and len(view.shape) > 1
        and (view.reading in DYNAMIC or name in observed.layers or bare.get(name) in tried)
    ]  # fmt: skip
    rows = [_Row(result, _two_sides(views[result.layer]), views[result.layer]) for result in results]
    told = {result.layer for result in results}
    notes = [text for text in notes if text.partition(":")[0] not in told]  # a layer's row says those
    return _Solved(source, _by_bare_name(rows), observed, inspection, notes, mix, tried)


def _by_bare_name(rows: Sequence[_Row]) -> dict[str, _Row]:
    bare = names.strip_prefix(row.result.layer for row in rows)[1]
    return {bare[row.result.layer]: row for row in rows if row.result.layer in bare}


def _calibrated(
    source: Source, checkpoint: Checkpoint, table: LayerTable, *, force: bool
) -> tuple[list[LayerResult], Sequence[str]]:
    """The layers that have an input scale, solved, and notes; none where readers scale all inputs as they come."""
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
    """(out, in) of a weight; a bank of experts has them one under the other."""
    return math.prod(view.shape[:-1]), view.shape[-1]


def _mix(source: Source, inspection: Inspection | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the formats of a file keep, and what others would, by trials or else by the file's own word; the layers."""
    made = None if inspection is None or inspection.made is None else inspection.made.mix
    said: dict[str, Any] = {} if made is None else {**made.figures, "gpu": made.gpu}
    on = None if made is None else made.conditioning
    if source.trials is not None:
        trials = source.trials
        asked = [FORMATS[name] for name in trials.formats if name in FORMATS]
        formats = [fmt for fmt in asked if made is None or made.gpu in fmt.native] or asked
        assert source.statistics is not None, "trials stand in statistics"
        shapes = {name: source.statistics.layers[name] for name in trials.layers if name in source.statistics.layers}
        mixes = Mixes.of({name: Spec("BF16", shape) for name, shape in shapes.items()}, trials, formats)
        said |= mixes.figures(_choice(mixes, inspection)) if shapes else {}
        on = ", ".join(source.statistics.provenance.get("conditioning", ()))
    if said:
        said["on"] = on or "noise"
    if inspection is not None and {"bits", "weights"} <= said.keys():
        said["other_bytes"] = inspection.size_bytes - said["bits"] * said["weights"] / 8
    layers = said.pop("layers", {})
    return said, {bare: layers[name] for name, bare in names.strip_prefix(layers)[1].items()}


def _choice(mixes: Mixes, inspection: Inspection | None) -> Choice | None:
    """The formats of a file as a choice; None without a file, or where a layer is in a format that was not tried."""
    views = {} if inspection is None else {view.name: view for view in inspection.layers}
    own = {bare: views[name] for name, bare in names.strip_prefix(views)[1].items()}
    found: Choice = {}
    for name, bare in names.strip_prefix(mixes.offers)[1].items():
        read_as = own[bare].read_as or "" if bare in own else None
        offer = next((each for each in mixes.offers[name] if each.format == read_as), None)
        if offer is None:
            return None
        found[name] = offer
    return found if any(offer.format for offer in found.values()) else None


def _figures(side: _Solved) -> dict[str, Figures]:
    """The figures of every layer of a side, by bare name."""
    results = {key: row.result for key, row in side.rows.items()}
    before, after = (_states(side, results, when) for when in ("before", "after"))
    seen = [key for key, result in results.items() if result.source == "model"]
    columns = dict(zip(seen, _columns(side.statistics.take([results[key].layer for key in seen])), strict=True))
    figures = {}
    for key, row in side.rows.items():
        view = row.view
        if row.reading == "error":  # no reader can use its scale
            before[key] = State(0.0, before[key].full_precision, risk="no scale")
        figures[key] = Figures(
            before[key],
            after[key],
            **columns.get(key, {}),
            **{name: getattr(row.result, name) for name in _TAKEN},
            unused=row.unused,
            inputs=INPUTS.get(row.reading, ""),
            stored="" if view is None else view.read_as or view.format,
            bits=None if view is None else view.bits,
            more=side.tried.get(key, {}).get("more", ""),
        )
    return figures


def _states(side: _Solved, results: Mapping[str, LayerResult], when: str) -> dict[str, State]:
    """What the inputs of a side's layers lose at the scales of results "before" or "after" solving, by bare name."""
    scales = {key: getattr(result, f"scale_{when}") for key, result in results.items()}
    grids = {key: GRIDS[result.format] for key, result in results.items()}
    met = [key for key, scale in scales.items() if scale is not None and side.rows[key].result.source == "model"]
    statistics = side.statistics.take([side.rows[key].result.layer for key in met])
    at, on = np.array([scales[key] for key in met], np.float64), [grids[key] for key in met]
    errors = expected_errors(statistics, at, on)
    costs = np.stack([errors.sqnr_db, errors.clipped, errors.vanished, lost_rows(statistics, at, on)], 1)
    lost: dict[str, Any] = {key: map(_finite, row) for key, row in zip(met, costs, strict=True)}
    absmax = dict(zip(met, statistics.absmax.tolist(), strict=True))
    states = {}
    for key, result in results.items():
        full_precision, grid = getattr(result, f"full_precision_{when}"), grids[key]
        state = replace(State(scales[key], full_precision, *lost.get(key, ())), max=grid.max)
        states[key] = state if side.rows[key].unused else with_risk(state, absmax.get(key, 0.0), grid)
    return states


def with_risk(state: State, absmax: float, grid: Grid = DEFAULT_GRID) -> State:
    """A state with its risk, by the thresholds of `document` on the grid of the inputs, whose largest is `absmax`."""
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
    """The first side's new scales on the second side's inputs, by bare name."""
    seen = [
        {key: row.result for key, row in side.rows.items() if row.result.source == "model"} for side in (first, second)
    ]
    both = {key: result for key, result in seen[0].items() if key in seen[1] and result.scale_after is not None}
    return _states(second, both, "after")


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
        mix=side.mix,
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
