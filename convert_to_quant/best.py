"""The best file of a wanted size: every layer in the format that keeps the picture, found by running the model.

    observe      what layers receive on noise; scales of FP8 inputs follow from it
    try          every layer in every format that the wanted card multiplies (`engines.trials`)
    choose       a format for every layer under the size (`choose`)

The rest is `convert`'s: it writes what a `Plan` says.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import headroom, naming, speeds
from .calibrate_activation_scales import refuse_unrunnable
from .checkpoint import Checkpoint, Spec
from .choose import CANDIDATES, Choice, Mixes, keeps, total_bytes
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
"""What trials are run on: four images of each way of conditioning, one where the model is large; a quarter of the
tokens of an observation."""

INSTEAD = "--format gives all layers one format, and --layer-format some of them another"
"""What can be done about a model that cannot be run."""


@dataclass(frozen=True)
class Best:
    """A mix of formats, and what it was chosen from.

    Attributes:
        plan: what `convert` writes.
        choice: by layer.
        mixes: what it was chosen from.
        statistics, trials: what was measured.
        gpu: the card that it was chosen for.
        measured_db: what the mix keeps of the velocity on other noise than it was chosen on, least and most over sizes
            of the image; None where the model was not run.
    """

    plan: ConversionPlan
    choice: Choice
    mixes: Mixes
    statistics: Statistics
    trials: Trials
    gpu: str = "any"
    measured_db: tuple[float, float] | None = None

    @property
    def bits(self) -> float:
        """Per weight, all scales included."""
        return self.mixes.point(self.choice)[0]

    @property
    def expected_db(self) -> float:
        """The velocity's SQNR on noise, if the layers' damages add up."""
        return self.mixes.point(self.choice)[1]

    @property
    def conditioning(self) -> str:
        """What the model was shown in place of prompts, or that it was shown some; "" where statistics do not say."""
        return ", ".join(self.statistics.provenance.get("conditioning", ()))

    @property
    def speed(self) -> float | None:
        """How many times as fast as in 16 bits the layers' products are; None where that was not asked for."""
        if math.isinf(self.mixes.limit_microseconds):
            return None
        before = sum(some[0].microseconds for some in self.mixes.offers.values())
        return before / sum(offer.microseconds for offer in self.choice.values())

    def summary(self) -> str:
        """One line: how many layers became what, their bits per weight, and what they keep of the velocity."""
        fast = ""
        if self.speed is not None:
            known = speeds.of_card(self.gpu)
            fast = f", products {self.speed:.2f} × as fast as 16 bits on {known['device']} ({known['source']})"
        kept = f"{self.bits:.2f} bits per weight, {keeps(self.to_json())} on {self.conditioning or 'noise'}"
        return f"{self.plan.summary()}; {kept}{fast}"

    def counts(self) -> dict[str, int]:
        """How many layers are in which format; "" is high precision."""
        return dict(Counter(offer.format for offer in self.choice.values()).most_common())

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values: what the file says of how its formats were chosen, too."""
        return self._figures

    @cached_property
    def _figures(self) -> dict[str, Any]:  # once: to say what half a bit more buys, a mix is chosen
        made = self.statistics.provenance
        run: dict[str, Any] = {"samples": self.statistics.samples, "conditioning": self.conditioning}
        if len(seeds := made.get("seed", ())) == 1 and seeds[0].isdecimal():
            run["seed"] = int(seeds[0])
        if self.speed is not None:
            run |= {"speed": round(self.speed, 3), "speed_source": speeds.of_card(self.gpu)["source"]}
        if self.measured_db is not None:
            run["measured_db"] = [round(each, 2) for each in self.measured_db]
        return {"gpu": self.gpu, **run, **self.mixes.figures(self.choice)}


def formats_for(options: BestOptions) -> list[Format]:
    """The formats that may be chosen: those asked for, of those that the card multiplies natively.

    Raises:
        OptionError: none is left, or a speed is asked for on a card that was not measured.
    """
    asked = options.formats or CANDIDATES
    found = [FORMATS[name] for name in asked if options.gpu in FORMATS[name].native]
    if options.speed is not None:
        found = [fmt for fmt in found if fmt.name in speeds.formats(options.gpu)]
    if not found:
        known = "" if options.speed is None else ", as far as its speed is known"
        raise OptionError(f"{options.gpu} multiplies none of {', '.join(asked)} natively{known}")
    return found


def plan_any(
    checkpoint: Checkpoint, options: ConvertOptions | None = None, loras: Sequence[Lora] = ()
) -> ConversionPlan:
    """A plan with every layer that can be quantized.

    Raises:
        OptionError: there is none.
    """
    plan = plan_conversion(checkpoint, replace(options or ConvertOptions(), format="int8"), loras)  # for any sides
    if not plan.quantized:
        raise OptionError("no layer of this file can be quantized", hint="--dry-run says why, per layer")
    return plan


class TrialModel:
    """A model in high precision that trials are run on.

    Args:
        checkpoint: the open checkpoint.
        plan: with the layers that can be quantized.
        shown: what the model is shown; `IMAGES` images of `TRIAL_GEOMETRY` where it does not say.
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
        """Run it with one layer in one format at a time, on prompts if there are any; see `trials.run_trials`."""
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
        """What layers in formats keep of the velocity all together, on other noise than that of the trials.

        Returns:
            The least and the most in dB, of the trials' size and of one of a quarter of its tokens: a size that the
            model was not trained for may suit a format more or less than others.
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
    """What each layer could become, with its inputs scaled as `input_scales` found."""
    from .engines.trials import Candidate

    return {
        name: [Candidate(fmt, *inputs(fmt, solved[name])) for fmt in formats if fmt.takes(layer.shape)]
        for name, layer in layers.items()
    }


def inputs(fmt: Format, result: LayerResult) -> tuple[float | None, bool]:
    """The static scale of a layer's inputs in a format, and whether it does not quantize them, as far as readers heed.

    Layers that see one token per image do not: it costs no time, and one token steers a whole block. Others do not
    where a static scale would lose tokens.
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
        convert_options: which layers stay out of it.
        options: size, card and formats.
        shown: what the model is shown.
        measured: of an earlier run, in place of running the model.
        loras: adapters to merge first; the merged model is what is run.
        progress: told how far the runs are.

    Returns:
        The mix; nothing is written.

    Raises:
        OptionError: the size cannot be reached.
        UnsupportedModelError: the model cannot be run.
        StatisticsError: what was measured is of other layers, or for other cards, formats or adapters.
        LoraError: an adapter does not fit, or a file matches nothing.
    """
    formats = formats_for(options)
    plan = plan_any(checkpoint, convert_options, loras)
    layers = {layer.name: layer for layer, _ in plan.quantized}
    run, shown, model = checkpoint, shown or RunOptions(), None
    if plan.merged.loras:
        rounded = next((layer for layer in layers.values() if layer.format and layer.name in plan.merged.matched), None)
        if rounded is not None:
            raise OptionError(f"--best cannot merge a LoRA into {rounded.name}, which is {named([rounded])} already",
                              hint="start from the original in 16 bits")  # fmt: skip
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
            raise StatisticsError(f"it was measured with other adapters merged: {of}", path=statistics.path)
        statistics = naming.fitting(statistics, plan.table, layers)
        solved = input_scales(run, layers, statistics)
    cost = None if options.speed is None else partial(_microseconds, options.gpu, layers, solved)
    weights = {name: Spec.like(layer.weight) for name, layer in layers.items()}
    mixes = Mixes.of(weights, trials, formats, cost, options.speed)
    _refuse_untried(layers, mixes, formats, statistics)

    def best_of(choice: Choice, measured_db: tuple[float, float] | None) -> Best:
        mixed = _plan_of(plan, choice, solved)
        found = Best(mixed, choice, mixes, statistics, trials, options.gpu, measured_db)
        return replace(found, plan=replace(mixed, steps={"mix": found.to_json()}))

    room = None if model is None else (-10.01, -10.01)  # as long in the file as any figure
    if options.size_bytes is None:
        choice = mixes.choose_bits(options.bits_wanted)
    else:
        choice = _choose_of_size(
            mixes, options.size_bytes, lambda choice: written_bytes(checkpoint, best_of(choice, room).plan)
        )
    best = best_of(choice, room)
    if not best.plan.quantized:
        raise OptionError("nothing would be quantized: the layers fit as they are", hint="ask for a smaller file")
    return best if model is None else best_of(choice, model.measured_db(candidates_of(best.plan), part(progress, 1)))


def _microseconds(
    gpu: str, layers: Mapping[str, Layer], solved: Mapping[str, LayerResult], name: str, fmt: str
) -> float:
    """What a layer's products take; nothing where it sees one token per image."""
    if solved[name].cause == "one row":
        return 0.0
    plain = not fmt or inputs(FORMATS[fmt], solved[name])[1]
    return speeds.microseconds(gpu, "" if plain else fmt, layers[name].shape)


def _refuse_untried(layers: Mapping[str, Layer], mixes: Mixes, formats: Sequence[Format], seen: Statistics) -> None:
    """Refuse trials that lack a layer, or that were for another card or other formats.

    Raises:
        StatisticsError: of the formats of one size that a layer can be in, none was run to the end.
    """
    for name, layer in layers.items():
        tried = {FORMATS[offer.format].bits for offer in mixes.offers[name] if offer.format and offer.measured}
        missing = [fmt.name for fmt in formats if fmt.takes(layer.shape) and fmt.bits not in tried]
        if missing:
            hint = "run the trials again for this model, card and these formats"
            raise StatisticsError(f"{name} was not tried in {', '.join(missing)}", path=seen.path, hint=hint)


def _choose_of_size(mixes: Mixes, size: int, written: Callable[[Choice], int]) -> Choice:
    """The best choice whose file has at most so many bytes; what surrounds the weights depends on the choice, too."""
    if (least := written(mixes.smallest)) > size:
        raise OptionError(f"even the smallest formats make a file of {least:,} bytes, not of {size:,}")
    choice = mixes.choose(math.inf)
    while (too_large := written(choice) - size) > 0:
        choice = mixes.choose(max(total_bytes(choice) - too_large, total_bytes(mixes.smallest)))
    return choice


def candidates_of(plan: ConversionPlan) -> dict[str, Candidate]:
    """What the layers of a plan become, as trials are told."""
    from .engines.trials import Candidate

    return {
        each.layer.name: Candidate(each.format, each.input_scale, each.full_precision)
        for each in plan.decisions
        if each.format is not None
    }


def _plan_of(plan: ConversionPlan, choice: Choice, solved: Mapping[str, LayerResult]) -> ConversionPlan:
    """What `convert` writes for a choice."""

    def decided(decision: Decision) -> Decision:
        offer = choice.get(decision.layer.name)
        if offer is None:
            return decision
        if not offer.format:
            return replace(decision, format=None, reason="high precision: it would cost too much")
        fmt = FORMATS[offer.format]
        scale, in_full = inputs(fmt, solved[decision.layer.name])
        reason = f"alone keeps {decibels(offer.damage):.1f} dB"
        return replace(decision, format=fmt, reason=reason, input_scale=scale, full_precision=in_full)

    decisions = list(map(decided, plan.decisions))
    ways = plan.ways if any(decision.format for decision in decisions) else ()
    return replace(plan, decisions=decisions, ways=ways)


def load_measured(*paths: StrPath) -> tuple[Statistics, Trials]:
    """Statistics and trials of earlier runs, added up.

    Raises:
        CheckpointError: one cannot be read as a safetensors file.
        StatisticsError: one holds no trials, or they are of different models.
    """
    found = []
    for path in paths:
        trials = Trials.load(path)
        if trials is None:
            hint = "make it with observe --trials"
            raise StatisticsError("it holds no trials of formats", path=Path(path), hint=hint)
        found.append(trials)
    return merge(*(Statistics.load(path) for path in paths)), reduce(Trials.plus, found)
