"""Activation scales for FP8 checkpoints: the whole way from a file to a calibrated file, in four functions.

    load_lora_tensors         adapters that will be used with the model
    compute_activation_scale  one layer, simulated from its weight
    calibrate_model           every FP8 layer of a checkpoint, by running the model or by simulation
    patch_model_with_scales   the scales into the file

The names are those of the hand-off that started this project. Its formula, the range of X·Wᵀ, was measured and found
wrong (a range cannot be read off a weight); so the default runs the network itself on noise (`engines.diffusers`). A
model that cannot be run is refused: scales guessed from weights (`engines.layer`) are for those who ask for them by
name. Here is only the way through; the rooms below do the work.

    python -m convert_to_quant.calibrate_activation_scales MODEL -o OUT [--lora FILE] [--json FILE] [--samples N]
"""

from __future__ import annotations

import importlib.util
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

INSTEAD = (
    "--actcal-engine layer guesses the scales from the weights; observe --comfyui-dir DIR may run the model in ComfyUI"
)
"""What can be done about a model that cannot be run."""
DEFAULT_PERCENTILE = 99.9


@dataclass(frozen=True)
class Calibration:
    """What calibration found; nothing has been written yet.

    Attributes:
        engine: the engine that ran, or "statistics" where a run was solved that had been recorded before.
        results: one per FP8 layer of the diffusion model, in file order.
        options: how.
        notes: what a user should know, one sentence each.
        lora: what the adapters matched; None without adapters.
        statistics: what the model engine recorded; None where simulated.
    """

    engine: Literal["model", "layer", "statistics"]
    results: list[LayerResult]
    options: CalibrationOptions | SolveOptions
    notes: list[str] = field(default_factory=list)
    lora: lora.LoraMatch | None = None
    statistics: Statistics | None = None

    @property
    def scales(self) -> dict[str, float]:
        """Input scale by layer name, of the layers that got one."""
        found = {result.layer: result.scale_after for result in self.results if result.range}
        return {layer: scale for layer, scale in found.items() if scale is not None}

    def changes(self, *, full_precision: bool = True) -> dict[str, LayerChange]:
        """What the file must change; without `full_precision` only scales, and no marks."""
        return {
            result.layer: LayerChange(
                input_scale=result.scale_after if result.range else None,
                full_precision=result.full_precision_after if full_precision else None,
            )
            for result in self.results
        }

    def metadata(self, before: Mapping[str, str]) -> dict[str, str]:
        """The header entry that says how the scales were found."""
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
        """Everything as JSON values."""
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
        path: a `.safetensors` file with adapters in any of the known spellings.
        strength: factor on all of it.

    Returns:
        Its adapters, still to be matched onto a checkpoint's layers (`calibrate_model` does).

    Raises:
        CheckpointError: the file cannot be read.
        LoraError: it holds no adapters, or one is damaged.
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
    """Input scale of one layer, simulated from its weight. See `engines.layer` for what such a guess is worth.

    Args:
        weight: [out, in]; a numpy array or torch tensor of floats, or FP8: a torch.float8 tensor, or uint8 codes of
            `formats.DEFAULT`.
        weight_scale: for FP8: one value, one per row, or one per block, in any shape that files have.
        lora_A: rows of a LoRA's A for this layer, [rank, in].
        samples: rows of random input; ignored with `lora_A`.
        percentile: of the simulated magnitudes, in (0, 100].
        seed: of the random numbers.
        margin: factor ≥ 1 on the range; by default 8.

    Returns:
        percentile · margin / max of the weight's format, FP8's where it is in high precision: a float32 value > 0; 1.0
        for a weight that is empty or all zero.

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
    """What the layer engine takes."""
    percentile = DEFAULT_PERCENTILE if options.percentile is None else options.percentile
    return layer_engine.Simulation(options.samples or DEFAULT_ROWS, percentile, options.seed)


def _floats(tensor: Any) -> layer_engine.Float32:
    """A numpy array or torch tensor of floats as float32."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().float().numpy()
    return np.asarray(tensor, np.float32)


def _real_weight(weight: Any, weight_scale: Any) -> layer_engine.Float32:
    """A weight, dequantized: float32 [out, in]."""
    shape = tuple(int(size) for size in weight.shape)
    if len(shape) != 2:
        raise TensorError(f"a weight should have two dimensions, found {list(shape)}")
    is_codes = isinstance(weight, np.ndarray) and weight.dtype == np.uint8
    weight_OI = DEFAULT_GRID.decode(weight) if is_codes else _floats(weight)
    if weight_scale is not None:
        scale = _floats(weight_scale)
        block = infer_block((shape[0], shape[1]), scale.shape)
        if block is None:
            raise TensorError(f"a weight scale of shape {list(scale.shape)} fits no rule for a weight of {list(shape)}")
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

    A layer that the running model does not visit keeps the scale that it has.

    Args:
        model: a `.safetensors` file, a `.safetensors.index.json`, or an open checkpoint.
        options: how.
        loras: adapters that will be used with the model; ranges then cover it with and without them.
        progress: told how far it is.

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
            notes.append("height, width, frames and text tokens are for running the model and were not used")
        return Calibration("layer", _simulate(model, table, options, match, progress), options, notes, match)

    from .engines import diffusers

    options = replace(options, samples=options.samples or SAMPLES)
    if options.percentile is not None:
        notes.append("the percentile is for simulated inputs and was not used: real ranges are taken whole")
    statistics = diffusers.observe(model, table, options, adapters=match, progress=progress).statistics
    shared = ("margin", "float16_safe", "one_row_full_precision")
    solving = SolveOptions(**{name: getattr(options, name) for name in shared})
    results = _solved(model, table, statistics, solving, notes)
    return Calibration("model", results, options, notes, match, statistics)


def static_table(checkpoint: Checkpoint) -> LayerTable:
    """The layers of a checkpoint whose diffusion model has layers with a static input scale.

    Raises:
        NoStaticScaleError: readers scale the inputs of all its layers as they come.
        TensorError: it has no such layers, and why.
    """
    table = find_layers(checkpoint)
    found = identify(checkpoint, table)
    if table.static and not found.encoder:
        return table
    if table.diffusion and not found.encoder:
        layers, name = named(table.diffusion.values()), checkpoint.path.name
        raise NoStaticScaleError(
            f"nothing to calibrate: readers of its {layers} layers scale inputs as they come",
            path=checkpoint.path,
            hint=f"convert_to_quant inspect {name} says how it is read, convert_to_quant check ORIGINAL {name} what it "
            "keeps of the images",
        )
    tensor = hint = None
    if table.quantized:
        tensor, layers = next(iter(table.quantized)), f"{len(table.quantized)} {named(table.quantized.values())} layers"
        problem = f"its {layers} are not a diffusion model's, and nothing reads their input scales"
        if found.encoder:
            problem = f"nothing to calibrate: {found.title}, which ComfyUI runs in full precision without input scales"
    elif table.raw:
        tensor, layers = next(iter(table.raw)), f"{len(table.raw)} {named(table.raw.values())} layers"
        problem = f"its {layers} are a plain cast without scales, and nothing reads input scales beside them"
        hint = f"{CALIBRATE} marks them and finds input scales; converting the original, in 16 bits, keeps more"
    elif found.kind not in (None, "diffusion"):
        problem = f"nothing to calibrate in it: {found.title}"
    else:
        problem = "no FP8 layers with weight scales in this file"
        hint = "convert and calibrate in one step: convert_to_quant -i IN -o OUT --actcal"
    raise TensorError(problem, path=checkpoint.path, tensor=tensor, hint=hint)


def _left_alone(table: LayerTable) -> list[str]:
    """Notes on a checkpoint's layers, and on those that a calibration does not touch."""
    notes = list(table.notes)
    foreign = [layer.form for name, layer in table.foreign.items() if table.owns(name)]
    if foreign:
        notes.append(f"left alone: {plural(len(foreign), 'layer')} in {', '.join(sorted(set(foreign)))}")
    alone: dict[str, list[Layer]] = {}
    for layer in table.quantized.values():
        if layer.static and not table.owns(layer.name):
            alone.setdefault(" beside the diffusion model, whose input scales nothing reads", []).append(layer)
        elif not layer.static and table.owns(layer.name):
            factored = names.PRE_QUANT_SCALE in layer.parts
            how = "multiply by pre_quant_scale first" if factored else "scale as they come"
            alone.setdefault(f", whose inputs readers {how}", []).append(layer)
    return notes + [
        f"left alone: {plural(len(layers), f'{named(layers)} layer')}{why}" for why, layers in alone.items()
    ]


def unrunnable(checkpoint: Checkpoint, table: LayerTable | None = None) -> str | None:
    """Why diffusers' classes cannot run a model here; None where they can. No weight is read."""
    # They are large, so some installations leave them out.
    missing = next((name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        return f"{missing} is not installed"
    from .engines import diffusers

    try:  # it loads what runs this family
        return diffusers.supports(checkpoint, table)
    except ImportError as error:
        return f"diffusers cannot be imported here: {' '.join(str(error).split())}"


def refuse_unrunnable(
    checkpoint: Checkpoint, table: LayerTable | None = None, undone: str = "calibrated", hint: str = INSTEAD
) -> None:
    """Refuse a model that cannot be run, in FP8 or in high precision; no weight is read.

    The message says that nothing was `undone`, and what can be done about it.

    Raises:
        UnsupportedModelError: why, and what to do instead.
    """
    reason = unrunnable(checkpoint, table)
    if reason is not None:
        raise UnsupportedModelError(
            f"the model cannot be run, so nothing was {undone}: {reason}", path=checkpoint.path, hint=hint
        )


def _solved(
    checkpoint: Checkpoint, table: LayerTable, statistics: Statistics, options: SolveOptions, notes: list[str]
) -> list[LayerResult]:
    """Results out of statistics; adds to the notes what a user should know of them."""
    results = solve(statistics, present_scales(checkpoint, table, energies=options.finds_headroom), options)
    if moving := statistics.provenance.get("depends_on_conditioning"):
        notes.append(
            f"calibrated on noise: the ranges of {len(moving)} layers depend on the conditioning, which noise only "
            f"imitates (first: {min(moving)})"
        )
    absent = set(statistics.left_out)
    notes += [f"{r.layer}: not in these statistics: keeps its scale" for r in results if r.layer in absent]
    notes += [f"{r.layer}: {r.reason}" for r in results if not r.range and r.layer not in absent]
    return results


def apply_statistics(
    checkpoint: Checkpoint, statistics: Statistics, options: SolveOptions | None = None, *, force: bool = False
) -> Calibration:
    """Solve statistics that were recorded before into a calibration of a checkpoint.

    Args:
        checkpoint: what will be patched.
        statistics: of this model, from `observe` or from the recorder, in any spelling of its names; see `naming`.
        options: how scales are chosen.
        force: use the layers that match where others do not.

    Returns:
        The calibration of the diffusion model's layers; nothing is written.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has no FP8 layers.
        StatisticsError: the statistics were made for another model.
        CalibrationError: a layer saw NaN or infinite inputs.
    """
    options = options or SolveOptions()
    table = static_table(checkpoint)
    fitting = naming.for_checkpoint(statistics, table, force=force)
    notes = _left_alone(table)
    results = _solved(checkpoint, table, fitting, options, notes)
    return Calibration("statistics", results, options, notes, statistics=fitting)


def present_scales(checkpoint: Checkpoint, table: LayerTable, *, energies: bool) -> dict[str, Present]:
    """What the layers with a static input scale have now; without the energies of their columns no weight is read."""
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
        scales: input scale by layer name, or a calibration, which also sets full precision and says so in the header.
        output: the new file; None with `in_place`.
        in_place: change `model` itself. Marks of full precision change only where they have room.
        enable_fp8_matmul: replace a legacy marker that turns FP8 products and input scales off.

    Returns:
        The patch that was written, with its notes.

    Raises:
        OptionError: neither or both of `output` and `in_place`.
        CheckpointError: the checkpoint cannot be read, or a layer is not in it.
        OutputError: it cannot be written; the input is as it was.
    """
    if (output is None) != in_place:
        raise OptionError("name an output, or ask for in place; one of the two")
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
    """The patch that writes scales or a calibration, but for the scales of some layers; see `patch.plan_patch`."""
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
    """Like `plan`, for the file itself.

    Where a mark has no room for full precision and the layer can do without, only the scales change. Of several layers
    those keep dynamic scales that have no place for another.

    Raises:
        OutputError: a scale has no place of its own in the file, or a mark that the picture needs has no room.
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
            f"{wanted} layers would gain from full precision, but their marks have no room for it in place; -o OUT "
            "writes a file that has it"
        )
    if dynamic:
        patch.notes.append(
            f"without a place for an input_scale, inputs stay scaled as they come in {plural(len(dynamic), 'layer')} "
            f"(first: {dynamic[0]}); -o OUT writes a file that has them"
        )
    return patch


def calibrate_written(
    writer: CheckpointWriter, source: Path, calibrate: Callable[[Checkpoint], Calibration]
) -> tuple[Calibration, Patch]:
    """Calibrate a complete output of a conversion while it has no name yet; messages call it `source`.

    Returns:
        The calibration, and the patch that was written.
    """
    with writer.reopen(source) as quantized:
        found = calibrate(quantized)
        patch = plan_in_place(quantized, find_layers(quantized), found)
        edits = in_place_edits(patch)
    for edit in edits:
        writer.overwrite(edit.file, edit.offset, edit.data)
    return found, patch


if __name__ == "__main__":
    # The command line stands above this module; only running the module as a program reaches up to it.
    raise SystemExit(importlib.import_module("convert_to_quant.cli.calibrate").main())
