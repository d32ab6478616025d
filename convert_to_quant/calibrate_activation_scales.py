"""Activation scales for FP8 checkpoints: from a file to a calibrated file, in four functions.

    load_lora_tensors         adapters that will be used with the model
    compute_activation_scale  one layer, simulated from its weight
    calibrate_model           every FP8 layer of a checkpoint, by running the model or by simulation
    patch_model_with_scales   writes the scales into the file

The hand-off that started this project gave the names. Its formula, the range of X·Wᵀ, proved wrong in measurements: a
range cannot be derived from a weight. So the default runs the network itself on noise (`engines.diffusers`). A model
that cannot be run is refused; scales guessed from weights (`engines.layer`) must be requested by name.

    python -m convert_to_quant.calibrate_activation_scales MODEL -o OUT [--lora FILE] [--json FILE] [--samples N]
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import convert, headroom, lora, names, naming
from .checkpoint import Checkpoint, CheckpointWriter, TensorInfo, open_checkpoint
from .engines import layer as layer_engine
from .errors import NoStaticScaleError, OptionError, OutputError, StrPath, TensorError, UnsupportedModelError
from .formats import DEFAULT, DEFAULT_GRID, GRIDS
from .identity import identify
from .layers import Layer, LayerTable, find_layers, infer_block, input_scale, named, scales_per_row
from .options import DEFAULT_ROWS, SAMPLES, CalibrationOptions, SolveOptions
from .patch import LayerChange, Patch, apply_in_place, in_place_edits, plan_patch, rewrite
from .problems import CALIBRATE
from .solve import LayerResult, Present, final_scale, solve, unchanged
from .telling import Progress, advance, plural

if TYPE_CHECKING:
    from .stats import Statistics

INSTEAD = "--actcal-engine layer guesses scales from weights; observe --comfyui-dir DIR may run the model in ComfyUI"
"""The alternatives for a model that cannot be run."""
DEFAULT_PERCENTILE = 99.9


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration; nothing has been written yet.

    Attributes:
        engine: the engine that ran, or "statistics" for an earlier recording.
        results: one per FP8 layer of the diffusion model, in file order.
        options: of the calibration.
        notes: for the user, one sentence each.
        lora: the layers that the adapters match; None without adapters.
        statistics: what was observed; None for simulated inputs.
    """

    engine: Literal["model", "layer", "statistics"]
    results: list[LayerResult]
    options: CalibrationOptions | SolveOptions
    notes: list[str] = field(default_factory=list)
    lora: lora.LoraMatch | None = None
    statistics: Statistics | None = None

    @property
    def scales(self) -> dict[str, float]:
        """Measured input scales by layer name."""
        found = {result.layer: result.scale_after for result in self.results if result.range}
        return {layer: scale for layer, scale in found.items() if scale is not None}

    def changes(self, *, full_precision: bool = True) -> dict[str, LayerChange]:
        """The changes to the file; without `full_precision` only to scales, not to quantization configs."""
        return {
            result.layer: LayerChange(
                input_scale=result.scale_after if result.range else None,
                full_precision=result.full_precision_after if full_precision else None,
            )
            for result in self.results
        }

    def metadata(self, before: Mapping[str, str]) -> dict[str, str]:
        """The header entry about how the scales were found."""
        said: dict[str, Any] = {**asdict(self.options), "engine": self.engine}
        if self.engine == "model":
            said["conditioning"] = "noise"
            said["depends_on_conditioning"] = [r.layer for r in self.results if r.conditioning_dependent]
        elif self.statistics is not None:
            said["samples"] = self.statistics.samples
            said["observed"] = {key: list(texts) for key, texts in self.statistics.provenance.items()}
        unmeasured = [result.layer for result in self.results if not result.range]
        if unmeasured and self.engine != "layer":
            said["unmeasured"] = unmeasured
        if self.lora is not None:
            said["lora"] = sorted({d.lora.path.name for deltas in self.lora.matched.values() for d in deltas})
        return {names.PROVENANCE_KEY: convert.provenance(before, calibrate=said)}

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "engine": self.engine,
            "options": asdict(self.options),
            "notes": self.notes,
            "lora": None if self.lora is None else self.lora.as_json(),
            "layers": [asdict(result) for result in self.results],
        }


def load_lora_tensors(path: StrPath, strength: float = 1.0) -> lora.Lora:
    """Read a LoRA file and check it.

    Args:
        path: a `.safetensors` file with adapters in any known naming convention.
        strength: factor on all adapters.

    Returns:
        Its adapters, not yet matched to the layers of a checkpoint (`calibrate_model` does that).

    Raises:
        CheckpointError: the file cannot be read.
        LoraError: it has no adapters, or one is damaged.
    """
    return lora.load_lora(path, strength)


def compute_activation_scale(
    weight: Any,
    *,
    weight_scale: Any = None,
    lora_A: Any = None,
    samples: int = 64,
    percentile: float = DEFAULT_PERCENTILE,
    seed: int = 42,
    margin: float | None = None,
) -> float:
    """Input scale of one layer, simulated from its weight; `engines.layer` says how good such a guess is.

    Args:
        weight: [out, in]; a numpy array or torch tensor of floats, or FP8: a torch.float8 tensor, or uint8 codes of
            `formats.DEFAULT`.
        weight_scale: for FP8: one value, one per row, or one per block, in any shape found in files.
        lora_A: rows of a LoRA's A for this layer, [rank, in].
        samples: random input rows; ignored with `lora_A`.
        percentile: of the simulated magnitudes, in (0, 100].
        seed: of the random numbers.
        margin: factor ≥ 1 on the range; by default 8.

    Returns:
        percentile · margin / max of the weight's format (FP8 for high precision), as a float32 value > 0; 1.0 for a
        weight that is empty or all zero.

    Raises:
        OptionError: samples, percentile or margin are out of range.
        TensorError: the shapes do not fit, or the weight or its scale has NaN or infinite values.

    >>> round(compute_activation_scale(np.eye(64, dtype=np.float32), samples=1000, percentile=100), 3)
    0.077
    """
    options = CalibrationOptions(engine="layer", samples=samples, percentile=percentile, seed=seed, margin=margin)
    weight_OI = _real_weight(weight, weight_scale)
    rows_RI = None if lora_A is None else _floats(lora_A)
    if rows_RI is not None and (rows_RI.ndim != 2 or rows_RI.shape[1] != weight_OI.shape[1]):
        raise TensorError(f"lora_A of shape {list(rows_RI.shape)} does not fit a weight of {list(weight_OI.shape)}")
    if not np.any(weight_OI):
        return 1.0
    simulation = _simulation(options)
    unit_RI = layer_engine.unit_rows(np.random.default_rng(seed), simulation, weight_OI.shape[1], rows_RI)
    squares_I = np.einsum("oi,oi->i", weight_OI, weight_OI, dtype=np.float64)
    found = layer_engine.input_range(unit_RI, squares_I, len(weight_OI), simulation.percentile)
    factor = layer_engine.DEFAULT_MARGIN if margin is None else margin
    grid = GRIDS.get(str(weight.dtype).removeprefix("torch."), DEFAULT_GRID)
    return final_scale(factor * found / grid.max, "weight")


def _simulation(options: CalibrationOptions) -> layer_engine.Simulation:
    """Options of the layer engine."""
    percentile = DEFAULT_PERCENTILE if options.percentile is None else options.percentile
    return layer_engine.Simulation(options.samples or DEFAULT_ROWS, percentile, options.seed)


def _floats(tensor: Any) -> layer_engine.Float32:
    """A float32 array from a numpy array or torch tensor."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().float().numpy()
    return np.asarray(tensor, np.float32)


def _real_weight(weight: Any, weight_scale: Any) -> layer_engine.Float32:
    """A dequantized weight, float32 [out, in]."""
    shape = tuple(int(size) for size in weight.shape)
    if len(shape) != 2:
        raise TensorError(f"a weight should have two dimensions, found {list(shape)}")
    is_codes = isinstance(weight, np.ndarray) and weight.dtype == np.uint8
    weight_OI = DEFAULT_GRID.decode(weight) if is_codes else _floats(weight)
    if weight_scale is not None:
        scale = _floats(weight_scale)
        block = infer_block((shape[0], shape[1]), scale.shape)
        if block is None:
            raise TensorError(f"a weight scale of shape {list(scale.shape)} does not fit a weight of {list(shape)}")
        info = TensorInfo("weight", DEFAULT_GRID.dtype, shape, 0, shape[0] * shape[1])
        layer = Layer("weight", info, DEFAULT, "none", block)
        if weight_OI.size:
            weight_OI = weight_OI * scales_per_row(scale, layer, slice(None))
    if not np.isfinite(weight_OI).all():
        raise TensorError("the weight or its scale has NaN or infinite values", tensor="weight")
    return weight_OI


def calibrate_model(
    model: StrPath | Checkpoint,
    options: CalibrationOptions | None = None,
    *,
    loras: Sequence[lora.Lora] = (),
    progress: Progress | None = None,
) -> Calibration:
    """Find the input scale of every FP8 layer of a checkpoint's diffusion model.

    Layers that the model does not visit keep their scale.

    Args:
        model: a `.safetensors` file, a `.safetensors.index.json`, or an open checkpoint.
        options: of the calibration.
        loras: adapters that will be used with the model; the ranges cover runs with and without them.
        progress: called with the progress.

    Returns:
        The calibration; nothing is written.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its diffusion model has no FP8 layers.
        UnsupportedModelError: the model cannot be run, and the engine is not "layer".
        CalibrationError: the model's activations are not finite.
        LoraError: an adapter matches nothing, or does not fit.
    """
    options = options or CalibrationOptions()
    if not isinstance(model, Checkpoint):
        with open_checkpoint(model) as checkpoint:
            return calibrate_model(checkpoint, options, loras=loras, progress=progress)

    table = static_table(model)
    if options.engine != "layer":
        refuse_unrunnable(model, table)
    notes = _left_alone(table)
    match = None
    if loras:
        match = lora.match_checkpoint(loras, model, table)
        notes += match.notes()
    if options.engine == "layer":
        options = replace(options, samples=options.samples or DEFAULT_ROWS)
        if any(options.size):
            notes.append("not used: height, width, frames and text tokens, which only apply when the model is run")
        return Calibration("layer", _simulate(model, table, options, match, progress), options, notes, match)

    from .engines import diffusers

    options = replace(options, samples=options.samples or SAMPLES)
    if options.percentile is not None:
        notes.append("not used: the percentile, which only applies to simulated inputs")
    statistics = diffusers.observe(model, table, options, adapters=match, progress=progress).statistics
    shared = ("margin", "float16_safe", "one_row_full_precision")
    solving = SolveOptions(**{name: getattr(options, name) for name in shared})
    results = _solved(model, table, statistics, solving, notes)
    return Calibration("model", results, options, notes, match, statistics)


def static_table(checkpoint: Checkpoint) -> LayerTable:
    """The layers of a checkpoint whose diffusion model has layers with a static input scale.

    Raises:
        NoStaticScaleError: readers scale the inputs of all its layers dynamically.
        TensorError: it has no such layers, and why.
    """
    table = find_layers(checkpoint)
    found, name = identify(checkpoint, table), checkpoint.path.name
    if table.static and not found.encoder:
        return table
    if table.diffusion and not found.encoder:
        raise NoStaticScaleError(
            f"nothing to calibrate: readers of its {named(table.diffusion.values())} layers scale inputs dynamically",
            path=checkpoint.path,
            hint=f"convert_to_quant inspect {name} shows how it is read, convert_to_quant check ORIGINAL {name} its "
            "image quality",
        )
    tensor = next(iter(table.quantized or table.raw), None)
    problem, hint = f"nothing to calibrate: {found.title}", None
    if found.encoder:
        problem += ", which ComfyUI runs in full precision without input scales"
    elif table.raw and not table.quantized:
        problem = f"nothing to calibrate: a plain {named(table.raw.values())} cast without scales"
        hint = (
            f"{CALIBRATE} adds quantization configs and input scales; converting the 16-bit original is more accurate"
        )
    elif found.kind in (None, "diffusion"):
        problem = "the diffusion model in this file has no FP8 layers with weight scales"
        hint = "to convert and calibrate in one step: convert_to_quant -i IN -o OUT --actcal"
    raise TensorError(problem, path=checkpoint.path, tensor=tensor, hint=hint)


def _left_alone(table: LayerTable) -> list[str]:
    """Notes on a checkpoint's layers, and on those that a calibration leaves alone."""
    alone = Counter(("layer", f" in {layer.form}") for name, layer in table.foreign.items() if table.owns(name))
    for layer in table.quantized.values():
        kind, how = f"{named([layer])} layer", "scale dynamically"
        if names.PRE_QUANT_SCALE in layer.parts:
            how = "multiply by pre_quant_scale first"
        if layer.static and not table.owns(layer.name):
            alone[kind, " outside the diffusion model, whose input scales are never read"] += 1
        elif not layer.static and table.owns(layer.name):
            alone[kind, f", whose inputs readers {how}"] += 1
    return [*table.notes, *(f"left alone: {plural(count, kind)}{why}" for (kind, why), count in alone.items())]


def unrunnable(checkpoint: Checkpoint, table: LayerTable | None = None) -> str | None:
    """Why diffusers' classes cannot run a model here; None if they can. Reads no weights."""
    missing = next((name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        return f"{missing} is not installed"
    from .engines import diffusers

    try:  # imports the family's classes
        return diffusers.supports(checkpoint, table)
    except ImportError as error:
        return f"diffusers cannot be imported here: {' '.join(str(error).split())}"


def refuse_unrunnable(
    checkpoint: Checkpoint, table: LayerTable | None = None, undone: str = "calibrated", hint: str = INSTEAD
) -> None:
    """Refuse a model that cannot be run, in FP8 or in high precision. Reads no weights.

    Raises:
        UnsupportedModelError: with the reason, and the statement that nothing was `undone`.
    """
    reason = unrunnable(checkpoint, table)
    if reason is not None:
        raise UnsupportedModelError(
            f"the model cannot be run, so nothing was {undone}: {reason}", path=checkpoint.path, hint=hint
        )


def _solved(
    checkpoint: Checkpoint, table: LayerTable, statistics: Statistics, options: SolveOptions, notes: list[str]
) -> list[LayerResult]:
    """Solve statistics, and add notes on the results."""
    results = solve(statistics, present_scales(checkpoint, table, energies=options.finds_headroom), options)
    if moving := statistics.provenance.get("depends_on_conditioning"):
        notes.append(
            f"calibrated on noise: in {plural(len(moving), 'layer')} the range depends on the conditioning, which "
            f"noise only approximates (first: {min(moving)})"
        )
    absent = set(statistics.left_out)
    notes += [f"{r.layer}: not in these statistics: keeps its scale" for r in results if r.layer in absent]
    notes += [f"{r.layer}: {r.reason}" for r in results if not r.range and r.layer not in absent]
    return results


def apply_statistics(
    checkpoint: Checkpoint, statistics: Statistics, options: SolveOptions | None = None, *, force: bool = False
) -> Calibration:
    """Calibrate a checkpoint from recorded statistics.

    Args:
        checkpoint: to be patched.
        statistics: of this model, in any naming convention (`naming`).
        options: how to choose scales.
        force: use the layers that match, even if others do not.

    Returns:
        The calibration of the diffusion model's layers; nothing is written.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has no FP8 layers.
        StatisticsError: the statistics are for another model.
        CalibrationError: a layer saw NaN or infinite inputs.
    """
    options = options or SolveOptions()
    table = static_table(checkpoint)
    fitting = naming.for_checkpoint(statistics, table, force=force)
    notes = _left_alone(table)
    results = _solved(checkpoint, table, fitting, options, notes)
    return Calibration("statistics", results, options, notes, statistics=fitting)


def present_scales(checkpoint: Checkpoint, table: LayerTable, *, energies: bool) -> dict[str, Present]:
    """The current state of layers with a static input scale; reads weights only for the `energies` of their columns."""
    return {
        name: Present(
            None if layer.dynamic else 1.0 if layer.input_problem is not None else input_scale(checkpoint, layer),
            layer.full_precision,
            layer.shape,
            (layer.format or DEFAULT).input_grid or DEFAULT_GRID,
            headroom.column_energies(checkpoint, layer) if energies else None,
        )
        for name, layer in table.static.items()
    }


def _simulate(
    checkpoint: Checkpoint,
    table: LayerTable,
    options: CalibrationOptions,
    match: lora.LoraMatch | None,
    progress: Progress | None,
) -> list[LayerResult]:
    """Simulate layer by layer."""
    told = advance(progress, sum(layer.weight.nbytes for layer in table.static.values()))
    matched = {} if match is None else match.matched
    rows_of = None if match is None else partial(lora.calibration_rows, match)
    ranges = layer_engine.simulate(checkpoint, table.static, _simulation(options), rows_of, told)
    margin = layer_engine.DEFAULT_MARGIN if options.margin is None else options.margin
    results = []
    for name, present in present_scales(checkpoint, table, energies=False).items():
        result = unchanged(name, present, "weight is empty or all zero: keeps its scale", "layer")
        if ranges[name] > 0:
            scale = final_scale(margin * ranges[name] / present.grid.max, name, float16_safe=options.float16_safe)
            reason = f"simulated from {'LoRA' if name in matched else 'random'} inputs × {margin:g}"
            result = replace(result, range=ranges[name], scale_after=scale, reason=reason)
        results.append(result)
    return results


def patch_model_with_scales(
    model: StrPath | Checkpoint,
    scales: Mapping[str, float] | Calibration,
    output: StrPath | None = None,
    *,
    in_place: bool = False,
    enable_fp8_matmul: bool = False,
) -> Patch:
    """Write input scales into a checkpoint: a new file, or the same one in place.

    Args:
        model: the checkpoint.
        scales: input scale by layer name, or a calibration, which also sets full precision and is recorded in the
            header.
        output: the new file; None with `in_place`.
        in_place: change `model` itself. Full precision is set only where the quantization config has room.
        enable_fp8_matmul: replace a legacy marker that turns FP8 matmuls and input scales off.

    Returns:
        The written patch, with its notes.

    Raises:
        OptionError: both `output` and `in_place`, or neither.
        CheckpointError: the checkpoint cannot be read, or a layer is not in it.
        OutputError: it cannot be written; the input is unchanged.
    """
    if (output is None) != in_place:
        raise OptionError("give either an output or in_place")
    with nullcontext(model) if isinstance(model, Checkpoint) else open_checkpoint(model) as checkpoint:
        make = plan if output is not None else plan_in_place
        patch = make(checkpoint, find_layers(checkpoint), scales, enable_fp8_matmul=enable_fp8_matmul)
        if output is not None:
            rewrite(patch, Path(output))
        else:
            apply_in_place(patch)
    return patch


def plan(
    checkpoint: Checkpoint,
    table: LayerTable,
    scales: Mapping[str, float] | Calibration,
    *,
    full_precision: bool = True,
    without: Collection[str] = (),
    enable_fp8_matmul: bool = False,
) -> Patch:
    """The patch that writes scales or a calibration, except the scales of layers in `without`."""
    metadata: Mapping[str, str] = {}
    if isinstance(scales, Calibration):
        changes, metadata = scales.changes(full_precision=full_precision), scales.metadata(checkpoint.metadata)
    else:
        changes = {name: LayerChange(input_scale=scale) for name, scale in scales.items()}
    for name in without:
        changes[name] = replace(changes[name], input_scale=None)
    return plan_patch(checkpoint, table, changes, metadata=metadata, enable_fp8_matmul=enable_fp8_matmul)


def plan_in_place(
    checkpoint: Checkpoint,
    table: LayerTable,
    scales: Mapping[str, float] | Calibration,
    *,
    enable_fp8_matmul: bool = False,
) -> Patch:
    """Like `plan`, for a change in place.

    If a quantization config has no room for full precision and the layer does not need it, only scales change. Layers
    without an input scale in the file keep dynamic scales, unless no layer has one.

    Raises:
        OutputError: the file has no place for a scale, or no room for full precision that image quality requires.
    """
    named_scales = scales.scales if isinstance(scales, Calibration) else scales
    dynamic = [name for name in named_scales if name in table.static and table.static[name].dynamic]
    if len(dynamic) == len(named_scales):
        dynamic = []  # so that the first of them is refused
    make = partial(plan, checkpoint, table, scales, without=dynamic, enable_fp8_matmul=enable_fp8_matmul)
    patch = make()
    results = scales.results if isinstance(scales, Calibration) else []
    try:
        in_place_edits(patch)
    except OutputError:
        if any(result.cause in ("rows lost", "budget") for result in results):
            raise
        patch = make(full_precision=False)
        in_place_edits(patch)
        wanted = sum(result.full_precision_after and not result.full_precision_before for result in results)
        patch.notes.append(
            f"{wanted} layers would gain from full precision, but their quantization configs have no room for it; "
            "write a new file with -o OUT"
        )
    if dynamic:
        patch.notes.append(
            f"no place for an input_scale in {plural(len(dynamic), 'layer')} (first: {dynamic[0]}), whose inputs stay "
            "scaled dynamically; write a new file with -o OUT"
        )
    return patch


def calibrate_written(
    writer: CheckpointWriter, source: Path, calibrate: Callable[[Checkpoint], Calibration]
) -> tuple[Calibration, Patch]:
    """Calibrate the complete output of a conversion before it gets its name; messages call it `source`.

    Returns:
        The calibration, and the written patch.
    """
    with writer.reopen(source) as quantized:
        found = calibrate(quantized)
        patch = plan_in_place(quantized, find_layers(quantized), found)
        edits = in_place_edits(patch)
    for edit in edits:
        writer.overwrite(edit.file, edit.offset, edit.data)
    return found, patch


if __name__ == "__main__":
    # importing the command line at the top would be circular
    raise SystemExit(importlib.import_module("convert_to_quant.cli.calibrate").main())
