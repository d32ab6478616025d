"""The best file of a given size: each layer in the format that preserves image quality, found by running the model.

    observe      the inputs of layers on noise; the scales of FP8 inputs follow
    try          each layer in each format that the GPU computes natively (`engines.trials`)
    choose       a format for each layer under the size limit (`choose`)

`convert` then writes the resulting plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import headroom, naming, speeds
from .calibrate_activation_scales import refuse_unrunnable
from .checkpoint import Checkpoint, Spec
from .choose import CANDIDATES, Choice, Mixes, keeps
from .convert import ConversionPlan, Decision, MergedCheckpoint, plan_conversion, written_bytes
from .errors import OptionError, StatisticsError, StrPath
from .families.running import Geometry
from .formats import FORMATS
from .formats.record import Format
from .layers import Layer, named
from .lora import Lora
from .options import STEPS, BestOptions, ConvertOptions, RunOptions, SolveOptions
from .solve import LayerResult, Present, solve
from .stats import Statistics, merge
from .telling import Progress, advance, part
from .trials import Trials, decibels

if TYPE_CHECKING:
    from .engines.prompts import Prompts
    from .engines.trials import Candidate

LARGE_WEIGHTS, IMAGES, LARGE_IMAGES = 10**9, 12, 3
TRIAL_GEOMETRY = Geometry(height=16, width=16, text_tokens=64)
"""The size of trial images, a quarter of the tokens of an observation. Each way of conditioning gets four images, or
one if the model is large."""

INSTEAD = "--format converts all layers to one format, --layer-format some of them to another"
"""The alternative for models that cannot be run."""


@dataclass(frozen=True, eq=False)
class Best:
    """A mix of formats, and what it was chosen from.

    Attributes:
        plan: what `convert` writes.
        choice: a format per layer, as `mixes` counts them.
        mixes: all that could be chosen.
        statistics, trials: what was measured.
        results: JSON values about the run and the mix (`Mixes.results`), also stored in the file. "measured_db" is the
            lowest and highest SQNR of the velocity over image sizes, on other noise than the mix was chosen on; it is
            missing if the model was not run.
    """

    plan: ConversionPlan
    choice: Choice
    mixes: Mixes
    statistics: Statistics
    trials: Trials
    results: Mapping[str, Any]

    @property
    def bits(self) -> float:
        """Bits per weight, all scales included."""
        return self.mixes.point(self.choice)[0]

    @property
    def expected_db(self) -> float:
        """SQNR of the velocity on noise, if the damages of layers add up."""
        return self.mixes.point(self.choice)[1]

    def summary(self) -> str:
        """One line: the number of layers in each format, bits per weight, and quality."""
        fast = ""
        if "speed" in self.results:
            known = speeds.of_card(self.results["gpu"])
            speed = f"{self.results['speed']:.2f} × as fast as in 16 bits"
            fast = f", matmuls {speed} on {known['device']} ({known['source']})"
        kept = f"{self.bits:.2f} bits per weight, {keeps(self.results)} on {self.results['conditioning'] or 'noise'}"
        return f"{self.plan.summary()}; {kept}{fast}"

    def counts(self) -> dict[str, int]:
        """The number of layers in each format; "" is high precision."""
        return dict(Counter(self.mixes.by_layer(self.choice).values()).most_common())

    def to_json(self) -> dict[str, Any]:
        """The results."""
        return dict(self.results)


def formats_for(options: BestOptions) -> list[Format]:
    """The requested formats that the GPU computes natively.

    Raises:
        OptionError: there is none, or a speed is requested on a GPU without measurements.
    """
    requested = options.formats or CANDIDATES
    found = [FORMATS[name] for name in requested if options.gpu in FORMATS[name].native]
    if options.speed is not None:
        found = [fmt for fmt in found if fmt.name in speeds.formats(options.gpu)]
    if not found:
        known = "" if options.speed is None else " at a known speed"
        raise OptionError(f"{options.gpu} computes none of {', '.join(requested)} natively{known}")
    return found


def plan_any(
    checkpoint: Checkpoint, options: ConvertOptions | None = None, loras: Sequence[Lora] = ()
) -> ConversionPlan:
    """A plan with every layer that can be quantized.

    Raises:
        OptionError: there is none.
    """
    options = replace(options or ConvertOptions(), format="int8")  # has no requirements on dimensions
    plan = plan_conversion(checkpoint, options, loras)
    if not plan.quantized:
        raise OptionError("no layer of this file can be quantized", hint="--dry-run gives the reason for each layer")
    return plan


class TrialModel:
    """A model in high precision that trials are run on.

    Args:
        checkpoint: the open checkpoint.
        plan: with the layers that can be quantized.
        shown: what the model is run on; by default `IMAGES` images of `TRIAL_GEOMETRY`.
    """

    def __init__(self, checkpoint: Checkpoint, plan: ConversionPlan, shown: RunOptions) -> None:
        import torch

        from .engines import denoiser, sizes

        self.model = denoiser.load(checkpoint, plan.table, device=shown.device, dtype=torch.float32)
        self.geometry = sizes.asked(self.model.plan.family, shown.size) or TRIAL_GEOMETRY
        small = sum(layer.weight.elements for layer, _ in plan.quantized) < LARGE_WEIGHTS
        self.images = shown.samples or (IMAGES if small else LARGE_IMAGES)
        self.steps, self.seed = shown.steps or STEPS, shown.seed

    def try_formats(
        self,
        candidates: Mapping[str, Sequence[Candidate]],
        *,
        prompts: Prompts | None = None,
        share: tuple[int, int] = (0, 1),
        progress: Progress | None = None,
    ) -> Trials:
        """Run it with one layer in one format at a time, on prompts if given; see `engines.trials.run_trials`."""
        from .engines import trials

        geometry = self.geometry
        if prompts is not None:
            prompts = prompts.fitted(self.model, geometry)
            geometry = prompts.geometry
        with trials.tensor_float_32():
            shown = trials.moments(self.model, geometry, self.images, self.steps, self.seed, prompts=prompts)
            bench = trials.Bench(self.model, geometry, shown)
            return trials.run_trials(bench, candidates, share=share, progress=progress)

    def measured_db(self, mix: Mapping[str, Candidate], progress: Progress | None = None) -> tuple[float, float]:
        """SQNR of the velocity with a whole mix, on other noise than that of the trials.

        Returns:
            The lowest and the highest in dB, at the trials' image size and at a quarter of its tokens: sizes that the
            model was not trained for may suit formats differently.
        """
        from .engines import trials

        found = []
        with trials.tensor_float_32():
            for geometry in (self.geometry, self.geometry.quarter):
                shown = trials.moments(self.model, geometry, self.images, self.steps, self.seed + 1)
                bench = trials.Bench(self.model, geometry, shown)
                bench.tick = advance(progress, 1, done=1)
                found.append(decibels(trials.damage_of(bench, mix)))
        return min(found), max(found)


def candidates(
    layers: Mapping[str, Layer], solved: Mapping[str, LayerResult], formats: Sequence[Format]
) -> dict[str, list[Candidate]]:
    """The formats that each layer can be in, with its input scales from `input_scales`."""
    from .engines.trials import Candidate

    return {
        name: [Candidate(fmt, *inputs(fmt, solved[name])) for fmt in formats if fmt.takes(layer.shape)]
        for name, layer in layers.items()
    }


def inputs(fmt: Format, result: LayerResult) -> tuple[float | None, bool]:
    """The static input scale of a layer in a format, and whether its inputs stay in full precision.

    They do for layers that see one token per image, which costs no time while that token steers a whole block; and
    where a static scale would lose tokens. Formats whose readers ignore the request never do.
    """
    scale = None if fmt.dynamic else result.scale_after
    in_full = result.cause == "one row" or (not fmt.dynamic and result.full_precision_after)
    return scale, fmt.heeds_full_precision and in_full


def input_scales(checkpoint: Checkpoint, layers: Mapping[str, Layer], statistics: Statistics) -> dict[str, LayerResult]:
    """Scales of FP8 inputs, and which layers compute in full precision, by layer."""
    present = {
        name: Present(1.0, False, layer.shape, column_energies=headroom.column_energies(checkpoint, layer))
        for name, layer in layers.items()
    }
    return {result.layer: result for result in solve(statistics, present, SolveOptions())}


def plan_best(
    checkpoint: Checkpoint,
    convert_options: ConvertOptions,
    options: BestOptions,
    shown: RunOptions | None = None,
    measured: tuple[Statistics, Trials] | None = None,
    *,
    loras: Sequence[Lora] = (),
    progress: Progress | None = None,
) -> Best:
    """Find the best mix of formats for a checkpoint in high precision.

    Args:
        checkpoint: the open checkpoint.
        convert_options: which layers to leave out.
        options: size, GPU and formats.
        shown: what the model is run on.
        measured: results of an earlier run, instead of running the model.
        loras: adapters to merge first; the merged model is run.
        progress: called with the progress of the runs.

    Returns:
        The mix; nothing is written.

    Raises:
        OptionError: the size cannot be reached.
        UnsupportedModelError: the model cannot be run.
        StatisticsError: the measurements are for other layers, GPUs, formats or adapters.
        LoraError: an adapter does not fit, or a file matches nothing.
    """
    formats = formats_for(options)
    plan = plan_any(checkpoint, convert_options, loras)
    layers = {layer.name: layer for layer, _ in plan.quantized}
    run, shown, model = checkpoint, shown or RunOptions(), None
    if plan.merged.loras:
        rounded = next((layer for layer in layers.values() if layer.format and layer.name in plan.merged.matched), None)
        if rounded is not None:
            raise OptionError(
                f"--best cannot merge a LoRA into {rounded.name}, which is {named([rounded])} already",
                hint="start from the original in 16 bits",
            )
        run = MergedCheckpoint(checkpoint, plan.table.linear(), plan.merged)
    merged = tuple(sorted(f"{lora.path.name}:{lora.strength:g}" for lora in plan.merged.loras))
    if measured is None:
        refuse_unrunnable(run, plan.table, "chosen", INSTEAD)
        from .engines import diffusers

        seen = diffusers.observe(run, plan.table, shown, layers=list(layers), progress=part(progress, 0))
        statistics = seen.statistics.with_facts(merged=merged) if merged else seen.statistics
        solved = input_scales(run, layers, statistics)
        model = TrialModel(run, plan, shown)
        trials = model.try_formats(candidates(layers, solved, formats), progress=part(progress, 1))
    else:
        statistics, trials = measured
        if (before := tuple(statistics.provenance.get("merged", ()))) != merged:
            of = ", ".join(before) or "none"
            raise StatisticsError(f"measured with other adapters merged: {of}", path=statistics.path)
        statistics = naming.fitting(statistics, plan.table, layers)
        solved = input_scales(run, layers, statistics)

    def microseconds(name: str, fmt: str) -> float:
        if options.speed is None or solved[name].cause == "one row":  # one token per image takes no time
            return 0.0
        plain = not fmt or inputs(FORMATS[fmt], solved[name])[1]
        return speeds.microseconds(options.gpu, "" if plain else fmt, layers[name].shape)

    weights = {name: Spec.like(layer.weight) for name, layer in layers.items()}
    mixes = Mixes.of(weights, trials, formats, microseconds, options.speed)
    _refuse_untried(layers, trials, formats, statistics)
    facts = _facts(statistics, options)
    if model is not None:
        facts["measured_db"] = [-10.01, -10.01]  # takes as much room in the file as any result

    def best_of(choice: Choice) -> Best:
        speed = {} if options.speed is None else {"speed": round(mixes.speed(choice), 3)}
        results = {**facts, **speed, **mixes.results(choice)}
        mixed = replace(_plan_of(plan, results["layers"], solved), steps={"mix": results})
        return Best(mixed, choice, mixes, statistics, trials, results)

    if options.size_bytes is None:
        best = best_of(mixes.choose_bits(options.bits_wanted))
    else:
        best = _best_of_size(mixes, options.size_bytes, best_of, partial(written_bytes, checkpoint))
    if not best.plan.quantized:
        raise OptionError("nothing would be quantized: the layers fit as they are", hint="ask for a smaller file")
    if model is None:
        return best
    found_db = model.measured_db(candidates_of(best.plan), part(progress, 1))
    results = {**best.results, "measured_db": [round(each, 2) for each in found_db]}
    return replace(best, plan=replace(best.plan, steps={"mix": results}), results=results)


def _facts(statistics: Statistics, options: BestOptions) -> dict[str, Any]:
    """What a mix was measured on."""
    seeds, conditioning = (statistics.provenance.get(fact, ()) for fact in ("seed", "conditioning"))
    facts: dict[str, Any] = {"gpu": options.gpu, "samples": statistics.samples, "conditioning": ", ".join(conditioning)}
    if len(seeds) == 1 and seeds[0].isdecimal():
        facts["seed"] = int(seeds[0])
    if options.speed is not None:
        facts["speed_source"] = speeds.of_card(options.gpu)["source"]
    return facts


def _refuse_untried(layers: Mapping[str, Layer], trials: Trials, formats: Sequence[Format], seen: Statistics) -> None:
    """Refuse trials that lack a layer, or that were run for another GPU or other formats.

    Raises:
        StatisticsError: no format of some number of bits that a layer can be in was run to the end.
    """
    for name, layer in layers.items():
        tried = {fmt.bits for fmt in formats if trials.mean_damage(name, fmt.name) is not None}
        missing = [fmt.name for fmt in formats if fmt.takes(layer.shape) and fmt.bits not in tried]
        if missing:
            hint = "run the trials again for this model, this GPU and these formats"
            raise StatisticsError(f"{name} was not tried in {', '.join(missing)}", path=seen.path, hint=hint)


def _best_of_size(
    mixes: Mixes, size: int, best_of: Callable[[Choice], Best], written: Callable[[ConversionPlan], int]
) -> Best:
    """The best mix for a file of at most `size` bytes, whose header depends on the choice, too."""
    smallest, least_bytes = best_of(mixes.smallest), mixes.total_bytes(mixes.smallest)
    if (least := written(smallest.plan)) > size:
        raise OptionError(f"even the smallest formats make a file of {least:,} bytes, more than {size:,}")
    limit = math.inf
    while True:
        best = best_of(mixes.choose(limit))
        if (too_large := written(best.plan) - size) <= 0:
            return best
        if limit == least_bytes:  # as small, but with a longer header
            return smallest
        limit = max(mixes.total_bytes(best.choice) - too_large, least_bytes)


def candidates_of(plan: ConversionPlan) -> dict[str, Candidate]:
    """The quantized layers of a plan as candidates, to run them all at once."""
    from .engines.trials import Candidate

    return {
        each.layer.name: Candidate(each.format, each.input_scale, each.full_precision)
        for each in plan.decisions
        if each.format is not None
    }


def _plan_of(
    plan: ConversionPlan, layers: Mapping[str, Mapping[str, Any]], solved: Mapping[str, LayerResult]
) -> ConversionPlan:
    """What `convert` writes for the results of a mix by layer."""

    def decided(decision: Decision) -> Decision:
        name = decision.layer.name
        if name not in layers:
            return decision
        chosen = layers[name]["format"]
        if not chosen:
            return replace(decision, format=None, reason="high precision: quantizing it would cost too much quality")
        scale, in_full = inputs(FORMATS[chosen], solved[name])
        reason = f"alone keeps {layers[name]['tried'][chosen]:.1f} dB"
        return replace(decision, format=FORMATS[chosen], reason=reason, input_scale=scale, full_precision=in_full)

    decisions = list(map(decided, plan.decisions))
    ways = plan.ways if any(decision.format for decision in decisions) else ()
    return replace(plan, decisions=decisions, ways=ways)


def load_measured(*paths: StrPath) -> tuple[Statistics, Trials]:
    """Add up the statistics and trials of earlier runs.

    Raises:
        CheckpointError: a file cannot be read as safetensors.
        StatisticsError: a file has no trials, or the files are for different models.
    """
    found = []
    for path in paths:
        trials = Trials.load(path)
        if trials is None:
            hint = "make it with observe --trials"
            raise StatisticsError("the file has no trials of formats", path=Path(path), hint=hint)
        found.append(trials)
    return merge(*(Statistics.load(path) for path in paths)), reduce(Trials.plus, found)
