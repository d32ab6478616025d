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
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import headroom, naming, speeds
from .calibrate_activation_scales import refuse_unrunnable
from .checkpoint import Checkpoint, Spec
from .choose import Choice, Offer, choose, decibels, total_bytes, total_damage
from .convert import ConversionPlan, MergedCheckpoint, plan_conversion, written_bytes
from .errors import OptionError, StatisticsError, StrPath
from .families.running import Geometry
from .formats import FORMATS
from .formats.record import GPUS, Format
from .layers import Layer, named
from .lora import Lora
from .options import STEPS, BestOptions, ConvertOptions, RunOptions, SolveOptions
from .solve import LayerResult, Present, solve
from .stats import Statistics, merge
from .telling import Progress, part
from .trials import Trials

if TYPE_CHECKING:
    from .engines.prompts import Prompts
    from .engines.trials import Candidate

CANDIDATES = ("fp8", "int8", "int8-convrot", "mxfp8", "nvfp4", "w6a8", "w4a8", "convrot-w4a4")
"""What is tried. One scale for a whole weight is never better than one for each of its rows, so INT8 is here once."""

CODEBOOK_BYTES = 64
LARGE_WEIGHTS, IMAGES, LARGE_IMAGES = 10**9, 12, 3
TRIAL_GEOMETRY = Geometry(height=16, width=16, text_tokens=64)
"""What trials are run on: four images of each way of conditioning, one where the model is large; a quarter of the
tokens of an observation."""

INSTEAD = "--format gives all layers one format, and --layer-format some of them another"
"""What can be done about a model that cannot be run."""

Microseconds = Callable[[str, str], float]

CURVE_BITS = (4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 8.0, 10.0)


@dataclass(frozen=True)
class Best:
    """A mix of formats, and what it was chosen from.

    Attributes:
        plan: what `convert` writes.
        choice: by layer.
        offers: what each layer could have become.
        layers: these layers.
        statistics, trials: what was measured.
        gpu: the card that it was chosen for.
        limit_microseconds: of the layers' products there.
    """

    plan: ConversionPlan
    choice: Choice
    offers: Mapping[str, Sequence[Offer]]
    layers: Mapping[str, Layer]
    statistics: Statistics
    trials: Trials
    gpu: str = "any"
    limit_microseconds: float = math.inf

    @property
    def weights(self) -> int:
        """Of these layers."""
        return sum(layer.weight.elements for layer in self.layers.values())

    @property
    def bits(self) -> float:
        """Per weight, all scales included."""
        return 8 * total_bytes(self.choice) / self.weights

    def bits_of(self, layer: str) -> float:
        """Of one layer, per weight, scales included."""
        return 8 * self.choice[layer].nbytes / self.layers[layer].weight.elements

    @property
    def expected_db(self) -> float:
        """The velocity's SQNR on noise, if the layers' damages add up; real prompts are usually kept better."""
        return decibels(total_damage(self.choice))

    @property
    def speed(self) -> float | None:
        """How many times as fast as in 16 bits the layers' products are; None where that was not asked for."""
        if math.isinf(self.limit_microseconds):
            return None
        before = sum(some[0].microseconds for some in self.offers.values())
        return before / sum(offer.microseconds for offer in self.choice.values())

    def summary(self) -> str:
        """One line: how many layers became what, their bits per weight, and what is expected of them."""
        fast = ""
        if self.speed is not None:
            known = speeds.of_card(self.gpu)
            fast = f", products {self.speed:.2f} × as fast as 16 bits on {known['device']} ({known['source']})"
        return (
            f"{self.plan.summary()}; {self.bits:.2f} bits per weight, {self.expected_db:.1f} dB expected on noise{fast}"
        )

    def provenance(self) -> dict[str, Any]:
        """What a file says of how its formats were chosen."""
        made = self.statistics.provenance
        run: dict[str, Any] = {
            "samples": self.statistics.samples,
            "conditioning": ", ".join(made.get("conditioning", ())),
        }
        if len(seeds := made.get("seed", ())) == 1 and seeds[0].isdecimal():
            run["seed"] = int(seeds[0])
        return {"gpu": self.gpu, "bits": round(self.bits, 3), "expected_db": round(self.expected_db, 2), **run}

    def counts(self) -> dict[str, int]:
        """How many layers are in which format; "" is high precision."""
        return dict(Counter(offer.format for offer in self.choice.values()).most_common())

    def curve(self) -> dict[float, float]:
        """Bits per weight -> what is expected of the best mix of that size, in dB."""
        found = {}
        for bits in CURVE_BITS:
            try:
                found[bits] = decibels(
                    total_damage(choose_of_cards(self.offers, limit_bytes(self.layers, bits), self.limit_microseconds))
                )
            except OptionError:  # not even the smallest formats fit
                continue
        return found

    def more(self, bits: float = 0.5) -> tuple[float, float]:
        """What a larger mix would keep.

        Args:
            bits: more, per weight.

        Returns:
            Bits per weight, and the expected dB.
        """
        larger = choose_of_cards(
            self.offers, total_bytes(self.choice) + bits * self.weights / 8, self.limit_microseconds
        )
        return 8 * total_bytes(larger) / self.weights, decibels(total_damage(larger))

    def uniform(self) -> dict[str, tuple[float, float]]:
        """Formats that every layer was tried in -> bits per weight, and the expected dB."""
        found = {}
        for name in self.trials.formats:
            chosen = {layer: next((o for o in some if o.format == name), None) for layer, some in self.offers.items()}
            full = {layer: offer for layer, offer in chosen.items() if offer is not None}
            if len(full) == len(chosen):
                found[name] = 8 * total_bytes(full) / self.weights, decibels(total_damage(full))
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "bits": self.bits,
            "expected_db": self.expected_db,
            **({} if self.speed is None else {"speed": self.speed, "speed_source": speeds.of_card(self.gpu)["source"]}),
            "counts": self.counts(),
            "half_a_bit_more": dict(zip(("bits", "expected_db"), self.more(), strict=True)),
            "curve": [{"bits": bits, "expected_db": db} for bits, db in self.curve().items()],
            "uniform": {name: {"bits": bits, "expected_db": db} for name, (bits, db) in self.uniform().items()},
            "layers": {
                layer: {
                    "format": offer.format,
                    "bits": self.bits_of(layer),
                    "damage_db": decibels(offer.damage),
                    "tried": {each.format: decibels(each.damage) for each in self.offers[layer] if each.format},
                }
                for layer, offer in self.choice.items()
            },
        }


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


def try_formats(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    formats: Sequence[Format],
    solved: Mapping[str, LayerResult],
    shown: RunOptions,
    *,
    prompts: Prompts | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Trials:
    """Run a model in high precision, with one layer in one format at a time.

    Args:
        checkpoint: the open checkpoint.
        plan: with the layers that can be quantized.
        formats: to try.
        solved: how FP8 inputs are scaled; of `input_scales`.
        shown: what the model is shown; `IMAGES` images where it does not say.
        prompts: conditioning in place of noise.
        share: of the layers; see `engines.trials.run_trials`.
        progress: told how far it is, and at every evaluation of the model.
    """
    import torch

    from .engines import denoiser, sizes, trials

    layers = {layer.name: layer for layer, _ in plan.quantized}
    model = denoiser.load(checkpoint, plan.table, device=shown.device, dtype=torch.float32)
    geometry = sizes.asked(model.plan.family, shown.size) or TRIAL_GEOMETRY
    small = sum(layer.weight.elements for layer in layers.values()) < LARGE_WEIGHTS
    images = shown.samples or (IMAGES if small else LARGE_IMAGES)
    if prompts is not None:
        prompts = prompts.fitted(model, geometry)
        geometry = prompts.geometry
    with trials.tensor_float_32():
        bench = trials.Bench(
            model, geometry, trials.moments(model, geometry, images, shown.steps or STEPS, shown.seed, prompts=prompts)
        )
        return trials.run_trials(bench, candidates(layers, solved, formats), share=share, progress=progress)


def candidates(
    layers: Mapping[str, Layer], solved: Mapping[str, LayerResult], formats: Sequence[Format]
) -> dict[str, list[Candidate]]:
    """What each layer could become.

    Args:
        layers: by name.
        solved: how FP8 inputs are scaled; of `input_scales`.
        formats: to choose from.
    """
    from .engines.trials import Candidate

    return {
        name: [
            Candidate(
                fmt,
                None if fmt.dynamic else solved[name].scale_after,
                full_precision(fmt, solved[name]),
            )
            for fmt in formats
            if fmt.takes(layer.shape)
        ]
        for name, layer in layers.items()
    }


def full_precision(fmt: Format, result: LayerResult) -> bool:
    """Whether a layer in a format does not quantize its inputs, as far as readers heed that.

    Layers that see one token per image do not: it costs no time, and one token steers a whole block. Others do not
    where a static scale would lose tokens.
    """
    return fmt.heeds_full_precision and (result.cause == "one row" or (not fmt.dynamic and result.full_precision_after))


def input_scales(checkpoint: Checkpoint, layers: Mapping[str, Layer], statistics: Statistics) -> dict[str, LayerResult]:
    """Scales of FP8 inputs, and which layers compute in full precision, by layer."""
    present = {
        name: Present(1.0, False, layer.shape, column_energies=headroom.column_energies(checkpoint, layer))
        for name, layer in layers.items()
    }
    return {result.layer: result for result in solve(statistics, present, SolveOptions())}


def offers_of(
    layers: Mapping[str, Layer], trials: Trials, formats: Sequence[Format], microseconds: Microseconds | None = None
) -> dict[str, list[Offer]]:
    """What each layer could become, what that takes, and what it does.

    Args:
        layers: by name.
        trials: of them.
        formats: to choose from.
        microseconds: what a layer's product takes in a format, "" for what it is now; where speed counts.

    Of the formats of one size those are offered that were run to the end: the best by output error of each card.
    """
    nothing, cost = np.zeros(len(trials.moments)), microseconds or (lambda _layer, _fmt: 0.0)
    offers: dict[str, list[Offer]] = {}
    for name, layer in layers.items():
        offers[name] = [Offer("", layer.weight.nbytes, nothing, cost(name, ""))]
        for fmt in formats:
            damage = trials.mean_damage(name, fmt.name)
            if damage is not None and fmt.takes(layer.shape):
                offers[name].append(Offer(fmt.name, stored_bytes(fmt, layer.shape), damage, cost(name, fmt.name)))
    return offers


def choose_of_cards(offers: Mapping[str, Sequence[Offer]], *limits: float) -> Choice:
    """The best of what is chosen from all formats, and from those of them that each card multiplies.

    With more formats `choose` may end at a mix that is a little worse than one of fewer.

    Args:
        offers: by layer.
        limits: as `choose` takes them.

    Raises:
        OptionError: even the smallest formats take more, or the fastest that fit.
    """
    some = {offer.format for row in offers.values() for offer in row if offer.format}
    kinds = {frozenset(name for name in some if gpu in FORMATS[name].native) for gpu in GPUS} - {frozenset(some)}
    found = [choose(offers, *limits)]
    for kind in kinds:
        fewer = {layer: [o for o in row if not o.format or o.format in kind] for layer, row in offers.items()}
        with suppress(OptionError):  # its smallest formats may take more
            found.append(choose(fewer, *limits))
    return max(found, key=lambda choice: decibels(total_damage(choice)))


def limit_bytes(layers: Mapping[str, Layer], bits: float) -> float:
    """What layers may take at so many bits per weight.

    As formats are called 8, 6.5 or 4.5 bits: with the scales of their blocks, but without the one scale that each row
    has in nearly all of them, and without codebooks.
    """
    weights = sum(layer.weight.elements for layer in layers.values())
    return bits * weights / 8 + sum(4 * layer.out_features + CODEBOOK_BYTES for layer in layers.values())


def stored_bytes(fmt: Format, shape: tuple[int, int]) -> int:
    """What a weight takes in a format, scales included."""
    return sum(Spec(dtype, size).nbytes for dtype, size in fmt.storage(shape, 0).values())


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
    run, shown = checkpoint, shown or RunOptions()
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

        statistics = diffusers.observe_shown(run, plan.table, shown, layers=list(layers), progress=part(progress, 0))
        statistics = statistics.with_facts(merged=merged) if merged else statistics
        solved = input_scales(run, layers, statistics)
        trials = try_formats(run, plan, formats, solved, shown, progress=part(progress, 1))
    else:
        statistics, trials = measured
        if (before := tuple(statistics.provenance.get("merged", ()))) != merged:
            of = ", ".join(before) or "none"
            raise StatisticsError(f"it was measured with other adapters merged: {of}", path=statistics.path)
        statistics = naming.fitting(statistics, plan.table, layers)
        solved = input_scales(run, layers, statistics)
    cost = None if options.speed is None else partial(_microseconds, options.gpu, layers, solved)
    offers = offers_of(layers, trials, formats, cost)
    _refuse_untried(layers, offers, formats, statistics)
    slowest = (
        math.inf if options.speed is None else sum(some[0].microseconds for some in offers.values()) / options.speed
    )

    def best_of(choice: Choice) -> Best:
        mixed = _plan_of(plan, choice, solved)
        found = Best(mixed, choice, offers, layers, statistics, trials, options.gpu, slowest)
        return replace(found, plan=replace(mixed, steps={"mix": found.provenance()}))

    if options.size_bytes is None:
        choice = _choose_of_bits(offers, options.bits_wanted, layers, slowest)
    else:
        choice = _choose_of_size(
            offers, options.size_bytes, lambda choice: written_bytes(checkpoint, best_of(choice).plan), slowest
        )
    best = best_of(choice)
    if not best.plan.quantized:
        raise OptionError("nothing would be quantized: the layers fit as they are", hint="ask for a smaller file")
    return best


def _microseconds(
    gpu: str, layers: Mapping[str, Layer], solved: Mapping[str, LayerResult], name: str, fmt: str
) -> float:
    """What a layer's products take; nothing where it sees one token per image."""
    if solved[name].cause == "one row":
        return 0.0
    plain = not fmt or full_precision(FORMATS[fmt], solved[name])
    return speeds.microseconds(gpu, "" if plain else fmt, layers[name].shape)


def _refuse_untried(
    layers: Mapping[str, Layer], offers: Mapping[str, Sequence[Offer]], formats: Sequence[Format], seen: Statistics
) -> None:
    """Refuse trials that lack a layer, or that were for another card or other formats.

    Raises:
        StatisticsError: of the formats of one size that a layer can be in, none was run to the end.
    """
    for name, layer in layers.items():
        tried = {FORMATS[offer.format].bits for offer in offers[name] if offer.format}
        missing = [fmt.name for fmt in formats if fmt.takes(layer.shape) and fmt.bits not in tried]
        if missing:
            raise StatisticsError(
                f"{name} was not tried in {', '.join(missing)}",
                path=seen.path,
                hint="run the trials again for this model, card and these formats",
            )


def _choose_of_bits(
    offers: Mapping[str, Sequence[Offer]], bits: float, layers: Mapping[str, Layer], slowest: float
) -> Choice:
    """The best choice of at most so many bits per weight."""
    over = total_bytes(_smallest(offers)) - limit_bytes(layers, bits)
    if over > 0:
        least = bits + 8 * over / sum(layer.weight.elements for layer in layers.values())
        raise OptionError(f"even the smallest formats take {least:.2f} bits per weight, and --bits asks for {bits:g}")
    return choose_of_cards(offers, limit_bytes(layers, bits), slowest)


def _choose_of_size(
    offers: Mapping[str, Sequence[Offer]], size: int, written: Callable[[Choice], int], slowest: float
) -> Choice:
    """The best choice whose file has at most so many bytes; what surrounds the weights depends on the choice, too."""
    smallest = _smallest(offers)
    if written(smallest) > size:
        raise OptionError(f"even the smallest formats make a file of {written(smallest):,} bytes, not of {size:,}")
    choice = choose_of_cards(offers, math.inf, slowest)
    while (too_large := written(choice) - size) > 0:
        limit = max(total_bytes(choice) - too_large, total_bytes(smallest))
        choice = choose_of_cards(offers, limit, slowest)
    return choice


def _smallest(offers: Mapping[str, Sequence[Offer]]) -> Choice:
    return {name: min(some, key=lambda offer: offer.nbytes) for name, some in offers.items()}


def _plan_of(plan: ConversionPlan, choice: Choice, solved: Mapping[str, LayerResult]) -> ConversionPlan:
    """What `convert` writes for a choice."""
    decisions = []
    for decision in plan.decisions:
        offer = choice.get(decision.layer.name)
        if offer is None:
            decisions.append(decision)
        elif not offer.format:
            decisions.append(replace(decision, format=None, reason="high precision: it would cost too much"))
        else:
            fmt, result = FORMATS[offer.format], solved[decision.layer.name]
            decisions.append(
                replace(
                    decision,
                    format=fmt,
                    reason=f"alone keeps {decibels(offer.damage):.1f} dB",
                    input_scale=None if fmt.dynamic else result.scale_after,
                    full_precision=full_precision(fmt, result),
                )
            )
    ways = plan.ways if any(decision.quantize for decision in decisions) else ()
    return replace(plan, decisions=decisions, ways=ways)


def load_measured(*paths: StrPath) -> tuple[Statistics, Trials]:
    """Statistics and trials of earlier runs, added up.

    Raises:
        CheckpointError: one cannot be read as a safetensors file.
        StatisticsError: one holds no trials, or they are of different models.
    """
    found = []
    for path in paths:
        if (trials := Trials.load(path)) is None:
            raise StatisticsError(
                "it holds no trials of formats", path=Path(path), hint="make it with observe --trials"
            )
        found.append(trials)
    return merge(*(Statistics.load(path) for path in paths)), reduce(Trials.plus, found)
